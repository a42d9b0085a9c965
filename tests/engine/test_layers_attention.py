"""Attention: the fast kernel where first derivatives suffice, models of transformers as they are."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from tests.engine.cases import Attention, classification
from tests.oracles import model_loss, relative_error, setting, unrolled

INNER = GradientDescent(lr=0.1, steps=2)


class Kernels(TorchDispatchMode):
    """Counts forward passes of the fused attention kernel."""

    fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("engine", "fused"),
    [
        (FOMAML(inner=INNER, chunk_size=1), INNER.steps + 1),
        (MAML(inner=INNER, chunk_size=1), INNER.steps + 1),
        (ImplicitMAML(inner=INNER, chunk_size=1, solver=CG(max_steps=2, rtol=0.0), error_bound=False), INNER.steps + 1),
    ],
    ids=["fomaml", "maml", "implicit"],
)
def test_first_derivatives_of_a_single_task_keep_the_fast_kernel(engine, fused) -> None:
    tasks = classification((5, 4), tasks=1)
    with Kernels() as kernels:
        engine(Objective(Attention().double(), F.cross_entropy), tasks)
    assert kernels.fused == fused


class Classifier(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformers_model_as_it_is(checkpointing, chunk_size) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 4}
    config = transformers.BertConfig(
        vocab_size=9, max_position_embeddings=8, num_labels=3, attn_implementation="sdpa", **options
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = Classifier(transformers.BertForSequenceClassification(config)).double().train()
    x, y = torch.randint(1, 9, (2, 6, 5)), torch.randint(3, (2, 6))
    tasks = TaskBatch(support=(x[:, :3], y[:, :3]), query=(x[:, 3:], y[:, 3:]))
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    s = setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters()))
    expected = unrolled(s)[1]
    if checkpointing:
        enable = getattr(model.model, "activation_checkpointing_enable", model.model.gradient_checkpointing_enable)
        enable()
    got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    assert relative_error(got, expected) <= 1e-10


def test_threads_that_differentiate_attention_at_once_all_do_it_exactly():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    batch = TaskBatch(support=(torch.randn(1, 4, 6, 8),) * 2, query=(torch.randn(1, 4, 6, 8),) * 2)
    engine = MAML(inner=GradientDescent(lr=0.01, steps=2), chunk_size=1, linearize=False)
    found = []

    def run():
        model = copy.deepcopy(layer)
        found.extend(engine(Objective(model, F.mse_loss), batch).report.hvp_mode for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["reverse-over-reverse"] * 15
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
