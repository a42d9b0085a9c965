"""Meta-gradients of models from transformers and peft, against plain loops in float64; tasks on other devices."""

import functools

import pytest
import torch
import torch.nn.functional as F

from imaml import CG, FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective, TaskBatch
from tests.oracles import ORACLES, model_loss, relative_error, setting

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",
)
INNER = GradientDescent(lr=0.3, steps=2)
# a proximal term above all negative curvature
IMPLICIT = functools.partial(ImplicitMAML, inner=GradientDescent(lr=0.01, steps=2), regularization=50.0)
ENGINES = [
    MAML(inner=INNER),
    MAML(inner=INNER, chunk_size=1, checkpoints=1),
    FOMAML(inner=INNER),
    IMPLICIT(solver=Dense()),
    IMPLICIT(solver=CG(max_steps=100, rtol=1e-13)),
]
NAMES = ["MAML", "MAML one by one", "FOMAML", "ImplicitMAML Dense", "ImplicitMAML CG"]


def transformer():
    """A classifier of the transformers library, its attention as it comes, in training mode without dropout."""
    transformers = pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=5,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).double().train()


def with_adapters():
    """LoRA adapters that are no longer zero, and the head and a LayerNorm besides to be learned."""
    peft = pytest.importorskip("peft", reason="the extra imaml[examples] is not installed")
    config = peft.LoraConfig(r=1, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(transformer(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "layer.1.output.LayerNorm" in name:
            parameter.requires_grad_()
    return model


def texts():
    def batch(examples):
        return torch.randint(11, (2, examples, 5)), torch.randint(3, (2, examples))

    return TaskBatch(support=batch(4), query=batch(5))


def loss(output, labels):
    return F.cross_entropy(output.logits, labels)


def found_and_expected(engine, model, adapt):
    tasks, objective = texts(), Objective(model, loss, adapt=adapt)
    theta = dict(model.named_parameters())
    asked = setting(engine, tasks, model_loss(model, loss), theta, objective.adapted)
    value, gradients = engine.value_and_grad(objective, tasks)
    expected_value, expected = ORACLES[type(engine)](asked)
    torch.testing.assert_close(value, expected_value)
    return objective, gradients, expected


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_lora_adapters_adapt_and_the_rest_is_learned_through_them(engine):
    model = with_adapters()
    objective, gradients, expected = found_and_expected(engine, model, ["*lora_*"])
    assert relative_error(gradients, expected) <= 1e-10
    assert len(objective.adapted) == 8 and all("lora_" in name for name in objective.adapted)
    learned = [name for name in gradients if name not in objective.adapted]
    assert {name.split(".")[-2] for name in learned} == {"LayerNorm", "default"}  # the head is modules_to_save.default
    for name in learned:
        assert relative_error({name: gradients[name]}, {name: expected[name]}) <= 1e-10


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_the_head_adapts_and_the_adapters_are_learned_through_it(engine):
    _, gradients, expected = found_and_expected(engine, with_adapters(), ["*modules_to_save*"])
    assert relative_error(gradients, expected) <= 1e-10
    adapters = [name for name in gradients if "lora_" in name]
    assert len(adapters) == 8 and all(gradients[name].norm() > 0 for name in adapters)


def test_adapted_adapters_go_into_the_model_by_name():
    model, tasks = with_adapters(), texts()
    objective = Objective(model, loss, adapt=["*lora_*"])
    adapted = FOMAML(inner=INNER).adapt(objective, tasks[0].support)
    predicted = torch.func.functional_call(model, adapted, tasks[0].query[0]).logits
    before = model(tasks[0].query[0]).logits
    assert not model.load_state_dict(adapted, strict=False).unexpected_keys
    torch.testing.assert_close(model(tasks[0].query[0]).logits, predicted)
    assert (predicted - before).abs().max() > 1e-4


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
@pytest.mark.parametrize("build", [transformer, with_adapters])
def test_gradient_checkpointing_of_transformers(build, engine):
    """A recomputed layer would see the model's own parameters in place of the adapted ones."""
    model, tasks = build(), texts()
    adapt = ["*query*", "*value*"] if build is transformer else ["*lora_*"]
    objective = Objective(model, loss, adapt=adapt)
    expected = engine.value_and_grad(objective, tasks)[1]
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12


def test_tasks_move_as_tensors_do():
    tasks = texts()
    for moved in (tasks.to("meta"), tasks.to(torch.device("meta")), tasks.to(device="meta")):
        assert {t.device.type for t in (*moved.support, *moved.query)} == {"meta"}
