"""`torch.utils.checkpoint` in a model: honoured however it is called, in gradients and in products of every mode."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)

from imaml import MAML, GradientDescent, Objective, TaskBatch
from tests.engine.test_recompute import ENGINES, INNER, agree, meta_gradient

F64 = torch.float64


class Layer(nn.Module):
    """A function of tensors in any nesting, of numbers, and of nothing."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, h, scales=None, *, power=1, shift=None, words="tanh"):
        self.calls += 1
        found = getattr(torch, words)(self.linear(h)) ** power
        found = found if scales is None else found * scales["one"][0] + scales["two"]
        return found if shift is None else found + 0.5 * shift

    def twice(self, h):
        return self(self(h))


class Network(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.enter, self.layers, self.leave = nn.Linear(3, 4), nn.Sequential(*(Layer() for _ in range(3))), None
        self.leave, self.call = nn.Linear(4, 2), call

    def forward(self, x):
        return self.leave(self.call(self.layers, self.enter(x)))


def network(call):
    torch.manual_seed(0)
    return Network(call).double()


def tasks():
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 4, 3, dtype=F64), torch.randn(2, 3, 4, 2, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def one(layer, *args, **kwargs):
    return layer(*args, **kwargs)


def each(h, layers, call, **kwargs):
    for layer in layers:
        h = call(layer, h, **kwargs)
    return h


def sequential(layers, h, **options):
    return checkpoint_sequential(layers, 2, h, **options)


def lambdas(layers, h, call):
    for layer in layers:
        h = call(lambda h, layer=layer: layer(h) + h, h)
    return h


def partials(layers, h, call):
    return each(h, [functools.partial(layer, power=2, words="sin") for layer in layers], call)


def nested_arguments(layers, h, call):
    scales = {"one": (h.cos(), "unused"), "two": h.mean(-1, keepdim=True), "three": None}
    return each(h, layers, call, scales=scales, power=2, shift=h.flip(-1), words="sin")


def positional(layers, h, call):
    return each(h, layers, lambda layer, h: call(layer, h, {"one": [h.cos()], "two": 0.5}))


def methods(layers, h, call):
    return each(h, [layer.twice for layer in layers], call)


def one_in_another(layers, h, call):
    return call(lambda h: each(h, layers, lambda layer, h: call(layer.twice, h)), h)


def closures(layers, h, call):
    """What is not an argument comes from the closure: tensors that need no gradient, and modules."""
    mask = torch.ones(4, dtype=F64)
    return call(lambda h: each(h * mask, layers, one), h)


def with_context(context, **options):
    def call(function, *args, **kwargs):
        with context():
            return checkpoint(function, *args, use_reentrant=False, **options, **kwargs)

    return call


MODES = [
    "MAML",
    "MAML, one by one",
    "MAML, graphs rebuilt",
    "MAML, forward-over-reverse",
    "FOMAML",
    "ImplicitMAML",
    "ImplicitMAML, Gauss-Newton",
]
NEW, OLD = functools.partial(checkpoint, use_reentrant=False), functools.partial(checkpoint, use_reentrant=True)
FORMS = [
    lambdas,
    partials,
    nested_arguments,
    positional,
    methods,
    one_in_another,
    closures,
]
WAYS = {
    "reentrant": OLD,
    "early_stop=False": functools.partial(NEW, early_stop=False),
    "determinism_check": functools.partial(NEW, determinism_check="none"),
    "debug": functools.partial(NEW, debug=True),
    "preserve_rng_state=False": functools.partial(NEW, preserve_rng_state=False),
    "reentrant, preserve_rng_state=False": functools.partial(OLD, preserve_rng_state=False),
    "early stop set": with_context(lambda: set_checkpoint_early_stop(False)),
    "debug set": with_context(lambda: set_checkpoint_debug_enabled(True)),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("engine", MODES)
def test_functions_and_arguments_of_every_form(engine, form):
    expected = meta_gradient(
        ENGINES[engine], Objective(network(functools.partial(form, call=one)), F.mse_loss), tasks()
    )
    model = network(functools.partial(form, call=NEW))
    agree(meta_gradient(ENGINES[engine], Objective(model, F.mse_loss), tasks()), expected)


@pytest.mark.parametrize("form", [lambdas, one_in_another], ids=lambda form: form.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_options_of_every_kind(way, form):
    engine = MAML(inner=INNER)
    expected = meta_gradient(engine, Objective(network(functools.partial(form, call=one)), F.mse_loss), tasks())
    model = network(functools.partial(form, call=WAYS[way]))
    agree(meta_gradient(engine, Objective(model, F.mse_loss), tasks()), expected)
    assert engine(Objective(model, F.mse_loss), tasks()).report.recomputed


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("engine", MODES)
def test_a_sequence_of_segments(engine, use_reentrant):
    expected = meta_gradient(ENGINES[engine], Objective(network(lambda layers, h: layers(h)), F.mse_loss), tasks())
    model = network(functools.partial(sequential, use_reentrant=use_reentrant))
    agree(meta_gradient(ENGINES[engine], Objective(model, F.mse_loss), tasks()), expected)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("way", ["preserve_rng_state=False", "reentrant, preserve_rng_state=False", "debug"])
def test_masks_are_drawn_again_whatever_the_options_say(way, chunk_size):
    """Torch's own recomputation would draw others, and its derivatives would be those of no loss."""
    engine = MAML(inner=INNER, chunk_size=chunk_size)

    def found(call):
        model = network(lambda layers, h: each(h, layers, lambda layer, h: call(lambda h: F.dropout(layer(h), 0.4), h)))
        torch.manual_seed(2)
        return meta_gradient(engine, Objective(model, F.mse_loss), tasks())

    agree(found(WAYS[way]), found(one))


@pytest.mark.parametrize("compute", [1, None])
def test_blocks_are_called_again_and_no_more_than_that(compute):
    """A gradient calls a block once more; the first evaluation of a call looks at it once more for each loss."""
    calls = []
    for call in (one, NEW):
        model = network(functools.partial(lambdas, call=call))
        engine = MAML(inner=GradientDescent(lr=0.01, steps=3), chunk_size=compute, linearize=False)
        meta_gradient(engine, Objective(model, F.mse_loss), tasks())
        calls.append(model.layers[0].calls)
    assert calls[0] < calls[1] <= 5 * calls[0]


def contexts():
    return nullcontext(), nullcontext()


def selective():
    return create_selective_checkpoint_contexts(lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE)


@pytest.mark.parametrize("context_fn", [contexts, selective], ids=lambda context_fn: context_fn.__name__)
@pytest.mark.parametrize("engine", ["MAML", "FOMAML", "ImplicitMAML"])
def test_a_context_function_is_refused_with_the_name_of_the_block(engine, context_fn):
    model = network(lambda layers, h: each(h, layers, functools.partial(NEW, context_fn=context_fn)))
    with pytest.raises(ValueError, match=r"The checkpoint of Layer has a `context_fn`.*Expected none: leave it out"):
        meta_gradient(ENGINES[engine], Objective(model, F.mse_loss), tasks())


DECORATES = torch.__version__ >= "2.15"


class Decorated(nn.Module):
    """A method that is a checkpoint wherever it is called."""

    def __init__(self, decorate):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)
        self.own = decorate(lambda h: self.enter(h).tanh())
        self.decorate = decorate

    def forward(self, x):
        return self.decorate(self.leave)(self.own(x))


@pytest.mark.skipif(not DECORATES, reason="This torch does not decorate.")
@pytest.mark.parametrize("engine", ["MAML", "MAML, one by one", "ImplicitMAML"])
def test_functions_that_a_checkpoint_has_decorated(engine):
    def made(decorate):
        torch.manual_seed(0)
        return Objective(Decorated(decorate).double(), F.mse_loss)

    objective = made(lambda function: checkpoint(use_reentrant=False)(function))
    agree(
        meta_gradient(ENGINES[engine], objective, tasks()), meta_gradient(ENGINES[engine], made(lambda f: f), tasks())
    )
    assert len(ENGINES[engine](objective, tasks()).report.recomputed) == 2
    with pytest.raises(ValueError, match="has a `context_fn`"):
        meta_gradient(MAML(inner=INNER), made(checkpoint(use_reentrant=False, context_fn=contexts)), tasks())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 9, "max_position_embeddings": 8, "num_labels": 3, "pad_token_id": 0}
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **size
        )
        return transformers.GPT2ForSequenceClassification(config)
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 4, **size}
    if name == "Llama":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(num_key_value_heads=1, **common))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**common, **off))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bert"])
def test_models_of_transformers_after_gradient_checkpointing_enable(name, chunk_size, use_reentrant):
    model = Logits(transformers_model(name)).double().train()
    torch.manual_seed(1)
    x, y = torch.randint(1, 9, (2, 6, 5)), torch.randint(3, (2, 6))
    batch = TaskBatch(support=(x[:, :3], y[:, :3]), query=(x[:, 3:], y[:, 3:]))
    engine = MAML(inner=GradientDescent(lr=0.05, steps=2), chunk_size=chunk_size)
    objective = Objective(model, F.cross_entropy)
    expected = meta_gradient(engine, objective, batch)
    enable = getattr(model.model, "activation_checkpointing_enable", model.model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    agree(meta_gradient(engine, objective, batch), expected, 1e-6 if name == "Llama" else 1e-12)  # it has float32 in it
    assert engine(objective, batch).report.recomputed
