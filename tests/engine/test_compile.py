"""Compiled derivatives: the same numbers, and a warning wherever they cannot be had."""

from __future__ import annotations

import itertools
import logging
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
    recompute,
)
from imaml._curvature.deadline import within

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
    compiled = compiled or replace(engine, compile=True, compile_budget=600.0)  # on a busy machine too
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
    assert compiled._memory.compiler.is_on
    # A step, with its derivative where MAML keeps that, and the query gradient; the derivative of a step, or the
    # gradient and the product after the inner loop.
    made = {"FOMAML": 2, "MAML": 2, "ImplicitMAML": 3}[type(engine).__name__]
    assert compiled._memory.compiler.made == made + (isinstance(engine, MAML) and engine.checkpoints is not None)


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
    assert compiled._memory.compiler.is_on
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
    assert compiled._memory.compiler.is_on
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


class _Checkpointed(nn.Module):
    """Recomputes while it is told to, as models do after `gradient_checkpointing_enable()`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_on = nn.Linear(5, 5), True

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.layer, x, use_reentrant=False) if self.is_on else self.layer(x)
        return found.tanh()


def _by_a_function() -> Objective:
    params = {name: p.detach() for name, p in _model().named_parameters()}

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = recompute(lambda x: F.linear(x, params["0.weight"], params["0.bias"]).tanh(), batch[0])
        return F.mse_loss(F.linear(hidden, params["2.weight"], params["2.bias"]), batch[1])

    return Objective.from_function(loss, params)


RECOMPUTED = {
    "Linear.forward": lambda: Objective(_model(), F.mse_loss, recompute=["0"]),
    "Linear": lambda: Objective(_model(_Checkpointed()), F.mse_loss),
    "_by_a_function": _by_a_function,
}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_recomputed_runs_uncompiled_and_stays_so(name: str, engine: MetaGradient, traced: None) -> None:
    compiled = replace(engine, compile=True)
    with pytest.warns(CompileWarning, match=rf"recomputed \({name}.*\), and compiled derivatives would keep them"):
        _compare(engine, RECOMPUTED[name](), _tasks(), compiled=compiled)
    assert not compiled._memory.compiler.made
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert compiled(RECOMPUTED[name](), _tasks()).report.recomputed[0].startswith(name)


def test_a_model_that_recomputes_from_now_on_is_noticed(traced: None) -> None:
    model = _model(_Checkpointed())
    objective, engine, tasks = Objective(model, F.mse_loss), MAML(inner=STEPS), _tasks()
    model[1].is_on = False
    compiled = _compare(engine, objective, tasks)
    model[1].is_on = True
    with pytest.warns(CompileWarning, match="compiled derivatives would keep them"):
        assert compiled(objective, tasks).report.recomputed == ("Linear",)
    _compare(engine, objective, tasks, compiled=compiled)


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
    assert compiled._memory.compiler.is_on


def _of_points(of: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Objective:
    """An objective whose loss has derivatives of a function of two variables in it, as physics-informed ones do."""
    torch.manual_seed(0)
    shapes = {"a": (5, 2), "b": (5,), "c": (5,)}
    params = {name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items()}

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        def function(x: Tensor) -> Tensor:
            return torch.tanh(x @ params["a"].T + params["b"]) @ params["c"]

        return F.mse_loss(function(batch[0]) + of(function, batch[0]), batch[1])

    return Objective.from_function(loss, params)


def _points() -> TaskBatch:
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 4).double()
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


TRACEABLE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x).sum(1),
    "grad of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: torch.func.grad(f)(x).sum()))(x).sum(1),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1])(x),
}
UNTRACEABLE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "vmap of hessian": lambda f, x: torch.func.vmap(torch.func.hessian(f))(x).diagonal(dim1=1, dim2=2).sum(1),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (torch.ones_like(x),))[
        1
    ].sum(1),
    "jvp of a loss": lambda f, x: torch.func.jvp(
        lambda x: F.mse_loss(f(x), x.detach()[:, 0] * 0 + 1.0, reduction="none"), (x,), (torch.ones_like(x),)
    )[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch.func.jvp, from torch 2.15
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("of", TRACEABLE.values(), ids=TRACEABLE)
def test_a_loss_that_differentiates_is_compiled(of: Any, chunk_size: int, traced: None) -> None:
    compiled = _compare(MAML(inner=STEPS, chunk_size=chunk_size), _of_points(of), _points())
    assert compiled._memory.compiler.is_on


def _in_a_process(kinds: str) -> None:
    """What `_compare` says of untraceable losses, whose trace would end the process that it runs in."""
    import torch._inductor  # noqa: PLC0415

    torch._inductor.compile = lambda graph, inputs: graph  # type: ignore[assignment]
    for kind in kinds.split(","):
        for chunk_size in (1, 3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compiled = _compare(MAML(inner=STEPS, chunk_size=chunk_size), _of_points(UNTRACEABLE[kind]), _points())
            said = [str(w.message) for w in caught if issubclass(w.category, CompileWarning)]
            assert len(said) == (not compiled._memory.compiler.is_on)
            print(said)


def test_a_loss_whose_trace_would_end_the_process_runs_uncompiled() -> None:
    """Or compiled, where a trace does not come to read a zero tangent."""
    script = f"from tests.engine.test_compile import _in_a_process; _in_a_process({','.join(UNTRACEABLE)!r})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    said = [line for line in found.stdout.splitlines() if line != "[]"]
    assert len(said) > len(UNTRACEABLE)
    assert all("cannot be compiled" in line and "forward-mode derivatives in the loss" in line for line in said)


def _frozen_in_a_process() -> None:
    """A loss with `torch.func.linearize`, whose own trace keeps values of the point that it was made at."""
    import torch._inductor  # noqa: PLC0415

    torch._inductor.compile = lambda graph, inputs: graph  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    of = lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x))  # noqa: E731
    _compare(MAML(inner=STEPS, chunk_size=1), _of_points(of), _points())


def test_a_value_that_a_trace_freezes_is_noticed_in_the_same_call() -> None:
    script = "from tests.engine.test_compile import _frozen_in_a_process; _frozen_in_a_process()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("nth", [1, 3])
def test_a_compiler_that_takes_too_long_is_given_up(
    nth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, ended = [], threading.Event()

    def compile_(graph: Any, inputs: list[Tensor]) -> Any:
        started.append(graph)
        if len(started) < nth:
            return graph
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    def little_for_the_last(compute: Any, *, seconds: float, meanwhile: Any) -> Any:
        if len(started) == nth - 1:
            return within(compute, seconds=3.0, meanwhile=[(0.05, meanwhile[0][1])])
        return compute()

    monkeypatch.setattr("torch._inductor.compile", compile_)
    monkeypatch.setattr("imaml._curvature.inductor.within", little_for_the_last)
    engine, objective, tasks = MAML(inner=STEPS, chunk_size=3), Objective(_model(), F.mse_loss), _tasks()
    compiled = replace(engine, compile=True, compile_budget=600.0)
    said = f"takes more than compile_budget=600 seconds .*function {nth} of this engine.*runs uncompiled from here on"
    with caplog.at_level(logging.INFO, "imaml"), pytest.warns(CompileWarning, match=said):
        _compare(engine, objective, tasks, compiled=compiled)
    assert ended.wait(60.0)
    assert len(started) == nth
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in messages].count("WARNING") == 1
    (warning,) = [message for level, message in messages if level == "WARNING"]
    assert "is still being compiled" in warning
    assert "`compile_budget`" in warning
    assert sum("Compiled the" in message for _, message in messages) == nth - 1


def test_a_budget_is_that_of_all_functions_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    given, clock = [], itertools.count(0.0, 1.0)

    def compile_(function: Any, tensors: Any, what: str, seconds: float) -> Any:
        given.append((what, seconds))
        return function

    monkeypatch.setattr("imaml._curvature.compiler.monotonic", lambda: next(clock))  # each function takes a second
    monkeypatch.setattr("imaml._curvature.compiler.trace_and_compile", compile_)
    compiled = MAML(inner=STEPS, compile=True, compile_budget=60.0, linearize=False)
    _compare(MAML(inner=STEPS), Objective(_model(), F.mse_loss), _tasks(), compiled=compiled)
    assert given == [
        ("the step of the support loss, 3 at once", 60.0),
        ("the gradient of the query loss, 3 at once", 59.0),
        ("the product of the support loss, 3 at once", 58.0),
    ]
    assert compiled._memory.compiler.spent == 3.0


def test_convolutions_are_said(traced: None, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    with caplog.at_level(logging.INFO, "imaml"):
        FOMAML(inner=STEPS, compile=True).value_and_grad(Objective(model, F.mse_loss), _tasks())
    assert "Compiling the step of the support loss, 3 at once (" in caplog.text
    assert "of convolutions)" in caplog.text
    assert "WARNING" not in caplog.text


@pytest.mark.parametrize(
    ("budget", "error"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_a_budget_is_a_positive_number(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"`compile_budget` must be.*Got"):
        MAML(inner=STEPS, compile_budget=budget)
