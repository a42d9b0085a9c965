"""Compiled derivatives: the same numbers, and a warning wherever they cannot be had."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    CompileWarning,
    GradientDescent,
    ImplicitMAML,
    MetaGradient,
    Objective,
    TaskBatch,
)

STEPS = GradientDescent(lr=0.1, steps=3)
ENGINES = [
    MAML(inner=STEPS),
    MAML(inner=Adam(lr=0.05, steps=3), checkpoints=1, regularization=0.3),
    FOMAML(inner=STEPS),
    ImplicitMAML(inner=replace(STEPS, steps=60), regularization=1.0, solver=CG(max_steps=40, rtol=1e-12)),
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces run as they are, without the seconds of compilation."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)


def _tasks(tasks: int = 3, examples: int = 6) -> TaskBatch:
    torch.manual_seed(1)
    x, y = torch.randn(2, tasks, examples, 4).double(), torch.randn(2, tasks, examples, 2).double()
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def _model(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 2)).double()


def _compare(
    engine: MetaGradient, objective: Objective, tasks: TaskBatch, *, compiled: MetaGradient | None = None
) -> MetaGradient:
    """That a compiled engine finds what another does, in its first call and in its second; returns it."""
    compiled = compiled or replace(engine, compile=True)
    loss, gradients = engine.value_and_grad(objective, tasks)
    for _ in range(2):
        its_loss, its_gradients = compiled.value_and_grad(objective, tasks)
        torch.testing.assert_close(its_loss, loss, rtol=1e-12, atol=0.0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-9, atol=1e-12)
    return compiled


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_every_strategy_finds_what_it_finds_uncompiled(engine: MetaGradient, traced: None) -> None:
    compiled = _compare(engine, Objective(_model(), F.mse_loss), _tasks())
    assert compiled._compiler.is_on
    assert compiled._compiler.made == (2 if isinstance(engine, FOMAML) else 3)


def test_inductor_compiles_a_model_with_everything_in_it() -> None:
    model = _model(nn.BatchNorm1d(5), nn.LayerNorm(5))
    model[-1].requires_grad_(False)
    objective = Objective(
        model,
        lambda output, target, meta: (meta["weights"].exp()[:, None] * (output - target).square()).mean(),
        adapt=["0"],
        outer_loss=F.mse_loss,
        meta={"weights": torch.zeros(6).double().requires_grad_(), "unused": torch.ones(()).double()},
        metric=F.l1_loss,
        buffers="batch",
    )
    tasks = _tasks()
    compiled = _compare(MAML(inner=STEPS), objective, tasks)
    assert compiled._compiler.is_on
    reports = [engine(objective, tasks).report for engine in (MAML(inner=STEPS), compiled)]
    torch.testing.assert_close(reports[1].metric, reports[0].metric)
    assert (reports[1].gradients, reports[1].hvps) == (reports[0].gradients, reports[0].hvps)
    assert reports[1].unused == reports[0].unused


def _swap(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


def test_tensors_that_change_are_arguments(traced: None) -> None:
    """Parameters, frozen or not, buffers, constants of `meta` and training flags: none is frozen in a trace."""
    model = _model(nn.BatchNorm1d(5)).eval()
    model[-1].bias.requires_grad_(False)
    scale = torch.ones(()).double()
    loss = lambda output, target, meta: F.mse_loss(meta["scale"] * output, target)  # noqa: E731
    objective = Objective(model, loss, meta={"scale": scale}, buffers="batch")
    engine = MAML(inner=STEPS, chunk_size=3)
    compiled = replace(engine, compile=True)
    changes = [
        lambda: None,
        lambda: nn.init.normal_(model[0].weight),
        _swap(model[-1], "bias", nn.Parameter(torch.ones(2).double(), requires_grad=False)),
        _swap(model[1], "running_mean", torch.full((5,), 0.3).double()),
        lambda: scale.fill_(2.0),
        lambda: model.train(),
    ]
    losses = []
    for change in changes:
        change()
        _compare(engine, objective, _tasks(), compiled=compiled)
        losses.append(engine.value_and_grad(objective, _tasks())[0].item())
    assert compiled._compiler.is_on
    assert all(abs(a - b) > 1e-3 for a, b in itertools.pairwise(losses))


def test_a_number_that_changes_is_noticed(traced: None) -> None:
    temperature = [1.0]
    objective = Objective(_model(), lambda output, target: F.mse_loss(output / temperature[0], target))
    engine, tasks = MAML(inner=STEPS), _tasks()
    compiled = _compare(engine, objective, tasks)
    temperature[0] = 1.01
    with pytest.warns(CompileWarning, match="another than the one that was compiled.*`meta`"):
        compiled.value_and_grad(objective, tasks)
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        _compare(engine, objective, tasks, compiled=compiled)


def test_an_outer_loss_that_changes_is_noticed(traced: None) -> None:
    factor = [1.0]
    objective = Objective(
        _model(), F.mse_loss, outer_loss=lambda output, target: factor[0] * F.mse_loss(output, target)
    )
    engine, tasks = MAML(inner=STEPS), _tasks()
    compiled = _compare(engine, objective, tasks)
    factor[0] = 3.0
    with pytest.warns(CompileWarning, match="another"):
        _compare(engine, objective, tasks, compiled=compiled)


class _ByLoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        pytest.param(nn.Dropout(), "draws random numbers", id="dropout"),
        pytest.param(_ByLoop(), "cannot be vectorised.*chunk_size=1", id="control flow"),
    ],
)
def test_what_cannot_be_compiled_runs_uncompiled(middle: nn.Module, said: str) -> None:
    objective, tasks, engine = Objective(_model(middle), F.mse_loss), _tasks(), MAML(inner=STEPS, chunk_size=3)
    torch.manual_seed(3)
    expected = engine.value_and_grad(objective, tasks)[1]
    torch.manual_seed(3)
    with pytest.warns(CompileWarning, match=said):
        found = replace(engine, compile=True).value_and_grad(objective, tasks)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


def test_control_flow_on_the_data_of_a_single_task() -> None:
    with pytest.warns(CompileWarning, match="cannot be compiled"):
        _compare(MAML(inner=STEPS, chunk_size=1), Objective(_model(_ByLoop()), F.mse_loss), _tasks())


@pytest.mark.parametrize("wrong", ["raises", "differs"])
def test_a_compiler_that_fails(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(graph: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
        if wrong == "raises":
            raise RuntimeError("no C++ compiler\nmore")
        return lambda *tensors: [t if t is None else 1.001 * t for t in graph(*tensors)]

    monkeypatch.setattr("torch._inductor.compile", compile_)
    said = r"\(RuntimeError: no C\+\+ compiler\)" if wrong == "raises" else "differs from the uncompiled"
    with pytest.warns(CompileWarning, match=said):
        _compare(MAML(inner=STEPS), Objective(_model(), F.mse_loss), _tasks())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_an_engine_can_be_copied_to_another_process(engine: MetaGradient, traced: None) -> None:
    objective, tasks = Objective(_model(), F.mse_loss), _tasks()
    compiled = replace(engine, compile=True, chunk_size="auto")
    compiled.value_and_grad(objective, tasks)
    copied = pickle.loads(pickle.dumps(compiled))
    assert copied == compiled
    _compare(engine, objective, tasks, compiled=copied)


def test_endless_shapes_end_it(traced: None) -> None:
    objective, engine = Objective(_model(), F.mse_loss), FOMAML(inner=STEPS, compile=True)
    for examples in range(1, 7):
        engine.value_and_grad(objective, _tasks(examples=examples))
    with pytest.warns(CompileWarning, match="12 functions are compiled already"):
        engine.value_and_grad(objective, _tasks(examples=7))


def test_errors_are_those_of_the_uncompiled_loss(traced: None) -> None:
    objective = Objective(_model(), lambda output, target: (output - target).square())
    with pytest.raises(ValueError, match="must be a scalar"):
        MAML(inner=STEPS, compile=True).value_and_grad(objective, _tasks())
    with pytest.raises(TypeError, match="`compile` must be True or False. Got 1."):
        MAML(inner=STEPS, compile=1)  # type: ignore[arg-type]


class _InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_autocast_is_as_it_was_traced(traced: None) -> None:
    """One engine in and outside of autocast, with a layer that switches it off."""
    objective, tasks = Objective(_model(_InFloat32(5, 5)).float(), F.mse_loss), _tasks().to(dtype=torch.float32)
    engine = MAML(inner=STEPS, chunk_size=1)
    compiled = replace(engine, compile=True)
    for enabled in (False, True, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected, found = (e.value_and_grad(objective, tasks)[1] for e in (engine, compiled))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert compiled._compiler.is_on
