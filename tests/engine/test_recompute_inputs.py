"""Blocks of every form: what they take, return, write to and hold, in gradients and in products of every mode."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import imaml
from imaml import FOMAML, MAML, GradientDescent, Objective, TaskBatch
from tests.engine.test_recompute import ENGINES, INNER, agree, meta_gradient

F64 = torch.float64
MODES = ["MAML", "MAML, one by one", "MAML, forward-over-reverse", "FOMAML", "ImplicitMAML, Gauss-Newton"]
ALL = pytest.mark.parametrize("engine", MODES)


class Block(nn.Module):
    """A function of a layer and of the block's arguments."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return self.function(self.layer, *args, **kwargs)


class Network(nn.Module):
    def __init__(self, block, use=None):
        super().__init__()
        self.enter, self.block, self.leave = nn.Linear(4, 4), block, nn.Linear(4, 2)
        self.use = use or (lambda block, h: block(h))

    def forward(self, x):
        return self.leave(self.use(self.block, self.enter(x)))


def objective(build, use=None, *, names=None, loss=F.mse_loss, buffers=None):
    torch.manual_seed(0)
    return Objective(Network(build(), use).double(), loss, recompute=names, buffers=buffers)


def tasks():
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 6, 4, dtype=F64), torch.randn(2, 3, 6, 2, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def compare(engine, build, use=None, names=("block",), **options):
    """That blocks change nothing."""

    def found(names):
        made = objective(build, use, names=names, **options)
        torch.manual_seed(2)
        return meta_gradient(ENGINES[engine], made, tasks())

    agree(found(names), found(None))


def of(function):
    return lambda: Block(function)


def twice(y):
    return y, y


def first(function):
    """How a model uses a block of several outputs."""
    return lambda block, h: function(*block(h))


CONSTANT = torch.arange(4.0, dtype=F64)


@dataclasses.dataclass
class Point:
    h: torch.Tensor


FORMS = {
    "expanded": (of(lambda layer, h: (h.expand(2, *h.shape), layer(h))), first(lambda a, b: a[0] * a[1] + b)),
    "one output twice": (of(lambda layer, h: twice(layer(h).tanh())), first(lambda a, b: a * b)),
    "views of one": (of(lambda layer, h: layer(h).tanh().split(2, -1)), first(lambda a, b: torch.cat((b, a), -1))),
    "nothing": (of(lambda layer, h: None), lambda block, h: (block(h), h.tanh())[1]),
    "an empty dict": (of(lambda layer, h: {}), lambda block, h: (block(h), h.tanh())[1]),
    "other things": (of(lambda layer, h: (3, "a", layer(h).tanh(), None)), first(lambda n, a, h, _: n * h)),
    "integers": (of(lambda layer, h: (layer(h).tanh(), h.argmax(-1))), first(lambda h, i: h * (1 + i.unsqueeze(-1)))),
    "not called": (of(lambda layer, h: layer(h)), lambda block, h: h.tanh()),
    "called twice": (of(lambda layer, h: layer(h).tanh()), lambda block, h: block(block(h))),
    "called often": (
        of(lambda layer, h: layer(h).tanh()),
        lambda block, h: functools.reduce(lambda h, _: block(h), range(9), h),
    ),
    "integer input": (
        of(lambda layer, h, i: layer(h).tanh()[..., i]),
        lambda block, h: block(h, torch.tensor([3, 2, 1, 0])),
    ),
    "bool input": (of(lambda layer, h, m: torch.where(m, layer(h).tanh(), h)), lambda block, h: block(h, h > 0)),
    "complex output": (
        of(lambda layer, h: torch.fft.fft(layer(h).tanh())),
        lambda block, h: torch.fft.ifft(block(h) * torch.fft.fft(h)).real,
    ),
    "complex input": (
        of(lambda layer, z: (z * layer(z.real)).abs().square()),
        lambda block, h: block(torch.complex(h, h.cos())),
    ),
    "one input twice": (of(lambda layer, a, b: layer(a) * b), lambda block, h: block(h, h)),
    "an input unused": (of(lambda layer, a, b: layer(a).tanh()), lambda block, h: block(h, h.cos())),
    "inputs without gradient": (
        of(lambda layer, a, b: layer(a).tanh() * b),
        lambda block, h: block(h.detach(), torch.full((4,), 0.5, dtype=F64)) * h,
    ),
    "without gradients around": (of(lambda layer, h: layer(h)), lambda block, h: h * torch.no_grad()(block)(h)),
    "writes to its own": (of(lambda layer, h: layer(h).mul_(2.0).tanh()), None),
    "a hidden constant": (of(lambda layer, h, c=CONSTANT: layer(h).tanh() * c), None),
    "sets an attribute": (of(lambda layer, h: (setattr(layer, "kept", layer(h).tanh()), layer.kept)[1]), None),
}


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_what_a_block_takes_and_returns(form, engine):
    compare(engine, *FORMS[form])


@ALL
def test_model_outputs_of_transformers(engine):
    outputs = pytest.importorskip("transformers.utils")

    @dataclasses.dataclass
    class Output(outputs.ModelOutput):
        h: torch.Tensor | None = None
        others: tuple[torch.Tensor, ...] | None = None

    build = of(lambda layer, h: Output(h=layer(h).tanh(), others=(h.cos(), h.sin())))
    compare(engine, build, lambda block, h: block(h)[0] * block(h).others[1])


MODULES = {
    "LSTM": (lambda: nn.LSTM(4, 4, batch_first=True), lambda block, h: block(h.unsqueeze(1))[0].squeeze(1)),
    "GRU": (lambda: nn.GRU(4, 2, 2, bidirectional=True, dropout=0.3), lambda block, h: block(h.unsqueeze(0))[0][0]),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Tanh()), None),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), None),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), None),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), None),
    "weight_norm by a hook": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), None),
    "spectral_norm by a hook": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), None),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.3), None),
    "pruned inside": (
        lambda: nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.3), nn.Tanh()),
        None,
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1, batch_first=True),
        lambda block, h: block(h.unsqueeze(1)).squeeze(1),
    ),
}


@ALL
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("module", MODULES)
def test_modules_as_blocks(module, engine):
    def build():
        with torch.random.fork_rng():
            torch.set_default_dtype(F64)  # a weight that a hook makes is not cast with the module
            try:
                return MODULES[module][0]()
            finally:
                torch.set_default_dtype(torch.float32)

    compare(engine, build, MODULES[module][1], buffers="batch" if "spectral" in module else None)


def tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Sequential(first, nn.Tanh()))


@ALL
@pytest.mark.parametrize(
    "names",
    [
        ("block",),
        ("block.0", "block.2"),
        ("block", "block.0", "block.3", "block.2"),
        (nn.Linear,),
        (nn.Sequential, nn.Linear),
        ("enter", "block", "leave"),
    ],
    ids=str,
)
def test_tied_parameters_nested_blocks_and_modules_that_stand_twice(names, engine):
    compare(engine, tied, names=names)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("mode", ["train", "eval", "block eval", "block train"])
@pytest.mark.parametrize("buffers", ["batch", "frozen", "update"])
def test_running_statistics_by_every_policy_and_in_every_mode(buffers, mode, chunk_size):
    def found(names):
        made = objective(
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh()),
            names=names,
            buffers=buffers,
        )
        made.model(torch.randn(9, 4, dtype=F64))
        made.model.train("train" in mode and "block" not in mode)
        made.model.block.train("train" in mode)
        before = {n: b.clone() for n, b in made.model.named_buffers()}
        torch.manual_seed(2)
        result = MAML(inner=INNER, chunk_size=chunk_size)(made, tasks())
        result.loss.backward()
        assert all(torch.equal(b, before[n]) for n, b in made.model.named_buffers())
        return {n: p.grad for n, p in made.model.named_parameters()}, result.report.buffers or {}

    (grads, statistics), (expected, its_statistics) = found(["block"]), found(None)
    agree(grads, expected)
    assert statistics.keys() == its_statistics.keys()
    for name, values in statistics.items():
        torch.testing.assert_close(values, its_statistics[name], rtol=1e-12, atol=1e-12)


class Numbered(nn.Linear):
    """Scales by a buffer that it has written to before."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, h):
        self.count.add_(1)
        return super().forward(h).tanh() * self.count


@ALL
def test_a_block_that_writes_to_its_own_buffer_finds_it_as_it_was(engine):
    compare(engine, Numbered)


CALLS = {
    "plain": lambda module, *args: module(*args),
    "checkpoint": lambda module, *args: checkpoint(module, *args, use_reentrant=False),
    "imaml.recompute": imaml.recompute,
}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("held_by", ["the loss", "the model"])
def test_buffers_of_modules_that_are_held_stay_as_they_are(held_by, call, chunk_size):
    critic = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Tanh()).double().requires_grad_(False)
    before = {n: b.clone() for n, b in critic.named_buffers()}

    def loss(output, target):
        return F.mse_loss(output, target) + CALLS[call](critic, output.repeat(1, 2)).square().mean()

    use = lambda block, h: F.pad(CALLS[call](critic, block(h)), (0, 2))  # noqa: E731
    by_loss = held_by == "the loss"
    made = objective(nn.Tanh, None if by_loss else use, loss=loss if by_loss else F.mse_loss)
    MAML(inner=INNER, chunk_size=chunk_size).value_and_grad(made, tasks())
    assert all(torch.equal(b, before[n]) for n, b in critic.named_buffers())


HIDDEN = torch.ones(4, dtype=F64, requires_grad=True)


def in_place(layer, h):
    h.mul_(2.0)
    return layer(h)


def a_part_in_place(layer, h):
    h[..., 0] = 0.0
    return layer(h)


class Held:
    """No container that is known."""

    def __init__(self, h):
        self.h = h


REFUSED = {
    "a hidden tensor": (of(lambda layer, h: layer(h) * HIDDEN), None, "Block.forward is recomputed, and uses what"),
    "an input in place": (of(in_place), None, "Block.forward is recomputed, and changes a tensor in place"),
    "a fresh input in place": (
        of(in_place),
        lambda block, h: block(h + 0),
        "changes a tensor in place that it is given",
    ),
    "a part in place": (of(a_part_in_place), None, "changes a tensor in place that it is given"),
    "a dataclass": (of(lambda layer, h: Point(layer(h))), lambda block, h: block(h).h, "an activation inside Block"),
    "an object": (of(lambda layer, h: Held(layer(h))), lambda block, h: block(h).h, "an activation inside Block"),
    "a list on the side": (
        of(lambda layer, h, box=[]: (box.append(layer(h)), box.pop)[1]),  # noqa: B006
        lambda block, h: block(h)(),
        "an activation inside Block",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_function_of_its_inputs_is_refused_before_a_step_is_taken(what, engine):
    build, use, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        meta_gradient(ENGINES[engine], objective(build, use, names=["block"]), tasks())


@pytest.mark.parametrize("engine", [MAML, FOMAML])
def test_a_written_output_is_an_error_where_it_was_an_input(engine):
    """A block may return its input; whoever writes to it then writes to what the block keeps."""
    made = objective(of(lambda layer, h: h.view_as(h)), lambda block, h: block(h).mul_(2.0) + h, names=["block"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        meta_gradient(engine(inner=INNER), made, tasks())


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_block_has_no_other_inputs_than_its_own(chunk_size):
    """What it keeps, and what it is differentiated by."""
    counts = []

    def use(block, h):
        found = block(h)
        if found.grad_fn is not None:
            counts.append(len(found.grad_fn.next_functions))
        return found

    made = objective(lambda: nn.Linear(4, 4), use, names=["block"])
    MAML(inner=GradientDescent(lr=0.1, steps=1), chunk_size=chunk_size).value_and_grad(made, tasks())
    assert max(counts) == 3  # of a dual number there is one
