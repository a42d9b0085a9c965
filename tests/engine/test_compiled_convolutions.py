"""Convolutions as patches times weights, and batch normalisation by its formula: torch's derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective, TaskBatch
from imaml._curvature.patches import DECOMPOSITIONS, SMALL, Patches, convolve, fold, normalise
from imaml._sharding.runs import run_of

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), {}),
    "strided": ((2, 3, 7, 6), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "odd strides": ((2, 3, 11, 8), (4, 3, 4, 2), {"stride": (3, 2), "padding": (2, 0)}),
    "asymmetric": ((1, 2, 5, 9), (3, 2, 1, 5), {"padding": (0, 2)}),
    "one channel": ((3, 1, 5, 5), (1, 1, 3, 3), {"stride": [2]}),
    "gaps": ((2, 3, 9, 9), (2, 3, 2, 2), {"stride": 3}),
    "dilated": ((2, 3, 9, 8), (2, 3, 3, 2), {"dilation": (2, 3), "stride": 2, "padding": 2}),
    "the whole image": ((2, 3, 4, 4), (5, 3, 4, 4), {}),
    "one dimension": ((2, 3, 9), (4, 3, 3), {"stride": 2, "padding": (1,)}),
    "three dimensions": ((2, 2, 4, 5, 3), (3, 2, 2, 3, 2), {"stride": (2, 1, 1), "padding": 1}),
}
NORMALISED = [((4, 3), True), ((2, 3, 4, 5), True), ((2, 3, 4), False)]


def _derivatives(function: Callable[..., Tensor], tensors: list[Tensor], *, mode: bool = False) -> Callable[..., Any]:
    """The value of a function, its gradient, and the gradient of a product with that."""

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        found = function(*leaves)
        first = torch.autograd.grad(found.sin().sum(), leaves, create_graph=True)
        products = [(g.cos() * leaf.detach()).sum() for g, leaf in zip(first, leaves, strict=True)]
        second = torch.autograd.grad(products, leaves)
        return found.detach(), *(g.detach() for g in first), *second

    def replaced(*tensors: Tensor) -> tuple[Tensor, ...]:
        with Patches():
            return compute(*tensors)

    return make_fx(replaced, decomposition_table=DECOMPOSITIONS)(*tensors) if mode else compute


def _check(function: Callable[..., Tensor], tensors: list[Tensor], *gone: str) -> None:
    """That no operation of such a name is left in a trace, which computes what torch does."""
    graph: Any = _derivatives(function, tensors, mode=True)
    names = [str(node.target) for node in graph.graph.nodes]
    assert not [name for name in names if any(part in name for part in gone)]
    for found, expected in zip(graph(*tensors), _derivatives(function, tensors)(*tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_have_the_derivatives_of_a_convolution(case: str, bias: bool) -> None:
    size, weight, options = CONVOLUTIONS[case]
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (size, weight, *([weight[:1]] * bias))]
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(size)]
    _check(lambda *given: convolution(*given, **options), tensors, "convolution", "unfold_backward")


@pytest.mark.parametrize(("shape", "affine"), NORMALISED)
def test_the_formula_has_the_derivatives_of_batch_normalisation(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, *([shape[1:2]] * 2 * affine))]

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)

    _check(function, tensors, "batch_norm")


@pytest.mark.parametrize(("length", "size", "step"), [(7, 3, 2), (8, 2, 3), (5, 5, 1), (9, 4, 4), (6, 1, 1)])
@pytest.mark.parametrize("dim", [0, -1])
def test_windows_are_folded_as_torch_folds_them(length: int, size: int, step: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = length
    windows = torch.randn(shape, dtype=torch.float64).unfold(dim, size, step)
    expected = torch.ops.aten.unfold_backward(windows, shape, dim, size, step)
    torch.testing.assert_close(fold(windows, shape, dim, size, step), expected, rtol=1e-12, atol=1e-12)


def _images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, dtype=dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"input": _images(2, 4, 5, 5), "weight": _images(4, 2, 3, 3), "groups": 2},
        {"input": _images(2, 4, 5, 5), "weight": _images(4, 4, 3, 3), "padding": "same"},
        {"input": _images(4, 5, 5), "weight": _images(4, 4, 3, 3)},
        {"input": _images(2, 4, 5, 5).bfloat16(), "weight": _images(4, 4, 3, 3).bfloat16()},
        {"input": _images(2, 4, 5, 5, dtype=torch.complex64), "weight": _images(4, 4, 3, 3, dtype=torch.complex64)},
        {"input": _images(1, 1, 200, 200), "weight": _images(1, 1, 3, 3)},
        {"input": _images(1, 1, 2, 2), "weight": _images(1, 1, 3, 3)},
        {"input": _images(1, 1, 5, 5).to("meta"), "weight": _images(1, 1, 3, 3).to("meta")},
    ],
    ids=["groups", "same", "one image", "bfloat16", "complex", "large", "too small", "elsewhere"],
)
def test_other_convolutions_are_torchs(given: dict[str, Any]) -> None:
    assert SMALL < 9 * 198 * 198
    assert convolve(**given) is None


def test_other_normalisations_are_torchs() -> None:
    x, of = torch.randn(4, 3), torch.ones(3)
    assert normalise(x, of, of, training=False) is None
    assert normalise(x, of, of, training=True) is None
    assert normalise(x.bfloat16(), None, None, training=True) is None
    assert normalise(x[:1], None, None, training=True) is None
    with torch.autocast("cpu"):
        assert normalise(x, None, None, training=True) is None


def test_compiled_convolutions_find_what_uncompiled_ones_find() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten()
    )
    model = nn.Sequential(model, nn.Linear(12, 2)).double()
    x, y = torch.randn(2, 2, 4, 1, 4, 4).double(), torch.randint(2, (2, 2, 4))
    tasks = TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))
    inner = GradientDescent(lr=0.1, steps=2)
    engine = MAML(inner=inner, compile=True, compile_budget=600.0)
    found = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    assert engine._memory.compiler.is_on
    expected = MAML(inner=inner).value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_compiled_tasks_that_fill_a_cache_run_one_by_one() -> None:
    objective = Objective(nn.Sequential(nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 200)), F.mse_loss)
    tasks = TaskBatch(support=(torch.randn(4, 500, 200),) * 2, query=(torch.randn(4, 500, 200),) * 2)
    chunks = []
    for is_compiled in (False, True):
        engine = MAML(inner=GradientDescent(lr=0.1, steps=1), compile=is_compiled)
        run = run_of(engine, objective, derivatives=True)
        chunks.append(run.chunking(tasks).tasks)
    assert chunks[0] > 1 == chunks[1]
