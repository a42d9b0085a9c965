"""Inner steps that are compiled as a whole: the same numbers, whatever a step depends on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from imaml import (
    FOMAML,
    MAML,
    Adam,
    AdamW,
    CompileWarning,
    GradientDescent,
    MetaGradient,
    Minibatches,
    Objective,
    RMSprop,
    Task,
    TaskBatch,
)
from imaml._curvature.agreement import Expected
from imaml._curvature.inductor import trace_and_split
from imaml._curvature.narrow import transpose_tall
from imaml._curvature.residuals import split
from imaml.inner import LAMB, InnerOptimizer, Lion, Muon, NormalizedDescent, warmup_cosine

META = {
    name: torch.tensor(value).double() for name, value in (("log_lr", -2), ("decay", 0.3), ("most", 0.3), ("pull", 0.4))
}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces run as they are, without the seconds of compilation."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)


def tasks_of(examples: int = 6, seed: int = 1) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 3, examples, size, generator=generator).double() for size in (4, 2))
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def objective_of(*learned: str, adapt: list[str] | None = None) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    meta = {name: META[name].clone().requires_grad_() for name in learned}
    return Objective(model, with_meta if meta else F.mse_loss, adapt=adapt, meta=meta)


def with_meta(output: Tensor, target: Tensor, meta: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(output, target)


OPTIMIZERS: dict[str, InnerOptimizer] = {
    "momentum": GradientDescent(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1, steps=4),
    "a step size for each step": GradientDescent(lr=[0.1, 0.2, 0.05, 0.3], steps=4),
    "one for each parameter": GradientDescent(
        lr={"0.weight": 0.1, "0.bias": [0.1, 0.2, 0.3, 0.1], "2.weight": 0.3, "2.bias": 0.2}, steps=4
    ),
    "a schedule": GradientDescent(lr=warmup_cosine(0.3, warmup=2, total=4), steps=4),
    "clipping": GradientDescent(lr=0.1, max_grad_norm=0.3, steps=4),
    "adam": Adam(lr=0.05, steps=4),
    "adamw with a schedule": AdamW(lr=warmup_cosine(0.1, warmup=1, total=4), weight_decay=0.2, steps=4),
    "rmsprop": RMSprop(lr=0.02, momentum=0.5, steps=4),
    "lamb": LAMB(lr=0.05, steps=4),
    "lion": Lion(lr=0.01, steps=4),
    "muon": Muon(lr=0.01, steps=4),
    "normalised": NormalizedDescent(lr=0.1, steps=4),
}
LEARNED: dict[str, tuple[list[str], InnerOptimizer]] = {
    "a step size": (["log_lr"], GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=4)),
    "a schedule": (["log_lr"], Adam(lr=lambda meta, step: meta["log_lr"].exp() / (1 + step), steps=4)),
    "decay and clipping": (
        ["decay", "most"],
        AdamW(lr=0.05, weight_decay=lambda meta: meta["decay"], max_grad_norm=lambda meta: meta["most"], steps=4),
    ),
}


def compare(engine: MetaGradient, objective: Objective, tasks: Any, **given: Any) -> MetaGradient:
    """That a compiled engine finds what another does, in its first calls and in later ones; returns it."""
    compiled = replace(engine, compile=True, compile_budget=600.0)
    expected = engine(objective, tasks, **given)
    learned = list(objective.parameters().values())
    gradients = torch.autograd.grad(expected.loss, learned, allow_unused=True)
    for _ in range(3):
        found = compiled(objective, tasks, **given)
        its = torch.autograd.grad(found.loss, learned, allow_unused=True)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0.0)
        for a, b in zip(its, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.report.support_loss, expected.report.support_loss, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(found.report.growth, expected.report.growth, rtol=1e-9, atol=0.0)
        counts = [(r.gradients, r.hvps, r.hvp_mode, r.unused) for r in (found.report, expected.report)]
        assert counts[0] == counts[1]
    assert compiled._memory.compiler.is_on
    return compiled


@pytest.mark.parametrize("regularization", [0.0, 0.5], ids=["plain", "proximal"])
@pytest.mark.parametrize("linearize", [False, True], ids=["by states", "kept"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_every_optimiser_is_one_function(name: str, linearize: bool, regularization: float) -> None:
    """With the query gradient, and what its derivative is where the step keeps nothing for it."""
    engine = MAML(inner=OPTIMIZERS[name], regularization=regularization, linearize=linearize)
    assert compare(engine, objective_of(), tasks_of())._memory.compiler.made == (2 if linearize else 3)


@pytest.mark.parametrize("linearize", [False, 2, True])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_hyper_parameters_get_their_gradient(name: str, linearize: bool | int) -> None:
    learned, inner = LEARNED[name]
    compare(MAML(inner=inner, linearize=linearize), objective_of(*learned), tasks_of())


@pytest.mark.parametrize("linearize", [False, True])
def test_a_learned_proximal_term_and_parameters_that_do_not_adapt(linearize: bool) -> None:
    engine = MAML(inner=Adam(lr=0.05, steps=3), regularization=lambda meta: meta["pull"].exp(), linearize=linearize)
    compare(engine, objective_of("pull", adapt=["2"]), tasks_of())


@pytest.mark.parametrize("options", [{"checkpoints": 1}, {"truncate": 2}, {"outer_steps": {1: 0.5, 4: 1.0}}], ids=str)
def test_every_way_of_a_sweep(options: dict[str, Any]) -> None:
    compare(MAML(inner=OPTIMIZERS["adam"], linearize=False, **options), objective_of(), tasks_of())


def test_a_training_that_goes_on() -> None:
    objective, engine = objective_of(), MAML(inner=OPTIMIZERS["adam"], linearize=False)
    state = engine(objective, tasks_of(), return_state=True).state
    compare(engine, objective, tasks_of(), start=state)


def test_minibatches_of_two_shapes() -> None:
    task = tasks_of()[0]
    source = Minibatches.of(task.support, batch_size=4)
    engine = MAML(inner=OPTIMIZERS["adam"], linearize=False)
    compare(engine, objective_of(), [Task(support=source, query=task.query)])


def test_a_step_size_that_changes_from_call_to_call_is_no_constant() -> None:
    """A number, of a function of the meta-parameters, is frozen in a trace; another one is another function."""
    lr, objective = [0.1], objective_of()
    engine = FOMAML(inner=GradientDescent(lr=lambda meta: lr[0], steps=2))
    compiled = replace(engine, compile=True)
    for value in (0.1, 0.2, 0.1):
        lr[0] = value
        expected, found = (e.value_and_grad(objective, tasks_of())[1] for e in (engine, compiled))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


@dataclass(frozen=True, kw_only=True)
class _Own(GradientDescent):
    """An update of the user's, who changes what it reads."""

    is_deterministic: ClassVar[bool] = True
    factor: ClassVar[list[float]] = [1.0]

    def update(self, state: Any, gradient: Tensor, step: int, at: Any) -> Any:
        return (state[0] - self.factor[0] * at["lr"] * gradient,)


def test_an_update_of_the_users_is_never_frozen() -> None:
    objective, engine = objective_of(), MAML(inner=_Own(lr=0.1, steps=2), linearize=False)
    compiled = replace(engine, compile=True)
    for factor in (1.0, 0.5):
        _Own.factor[0] = factor
        expected, found = (e.value_and_grad(objective, tasks_of())[1] for e in (engine, compiled))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    _Own.factor[0] = 1.0


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


GLOBAL = [1.0]
OFFSET = torch.zeros(2).double()


def _shifted(output: Tensor, target: Tensor) -> Tensor:
    return GLOBAL[0] * F.mse_loss(output + OFFSET, target)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "an attribute of a module": lambda model: setattr(model[1], "factor", 1.5),
    "a global number": lambda model: GLOBAL.__setitem__(0, 2.0),
    "a tensor that is written to": lambda model: OFFSET.fill_(0.3),
    "a hook": lambda model: model[1].register_forward_hook(lambda module, args, output: 2 * output),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_calls_is_noticed_in_the_next(name: str) -> None:
    """Also in a call that would not compare: the third after the comparisons of the first and the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), _Scaled(), nn.Tanh(), nn.Linear(5, 2)).double()
    objective, engine = Objective(model, _shifted), MAML(inner=OPTIMIZERS["momentum"])
    compiled = replace(engine, compile=True)
    try:
        for _ in range(6):  # the next call after these would not compare
            compiled.value_and_grad(objective, tasks_of())
        CHANGES[name](model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)
            found = compiled.value_and_grad(objective, tasks_of())[1]
        for key, gradient in engine.value_and_grad(objective, tasks_of())[1].items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-14)
    finally:
        GLOBAL[0] = 1.0
        OFFSET.zero_()


def test_calls_compare_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = []
    objective = objective_of()
    evaluate = objective.evaluate
    compiled = MAML(inner=OPTIMIZERS["momentum"], compile=True)
    compiled.value_and_grad(objective, tasks_of())
    monkeypatch.setattr(objective, "evaluate", lambda *a, **k: evaluations.append(1) or evaluate(*a, **k))
    compared = []
    for _ in range(16):
        before = len(evaluations)
        compiled.value_and_grad(objective, tasks_of())
        compared.append(len(evaluations) > before)
    assert 3 <= sum(compared) <= 6, compared
    assert not any(compared[8:14])


def test_a_trace_is_split_at_what_comes_later() -> None:
    """A value that both parts use is handed on, once, and what is a view of it is not."""

    def function(late: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = (x @ y).tanh()
        return both.sum(), (both.T * late).sum(0), both.T[0] * late.sum(), y.sum()

    late, x, y = torch.randn(4, 3), torch.randn(3, 2), torch.randn(2, 4)
    graph = make_fx(function)(late, x, y)
    before, then = split(graph, {0}, 1)
    first, *handed = before(x, y)
    found = (first, *then(late, x, y, *handed))
    for a, b in zip(found, function(late, x, y), strict=True):
        torch.testing.assert_close(a, b)
    assert [t.shape for t in handed] == [(3, 4), ()]
    with pytest.raises(ValueError, match="depends on what comes later"):
        split(graph, {0}, 2)


def test_a_view_of_a_product_that_is_transposed() -> None:
    """A tall product is written the other way about, and a view of it becomes a copy where it has to."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b).view(2, -1)

    a, b = torch.randn(2, 5, 3), torch.randn(2, 3, 4)
    graph = make_fx(function)(a, b)
    transpose_tall(graph)
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.bmm.default]
    assert [node.meta["val"].shape for node in products] == [(2, 4, 5)]
    torch.testing.assert_close(graph(a, b), function(a, b))


class Attending(nn.Module):
    """Tokens of 4 entries that attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return found


WRITING: dict[str, list[nn.Module]] = {
    "group norm and pools": [nn.Unflatten(1, (4, 2, 2)), nn.GroupNorm(2, 4), nn.ELU(), nn.AvgPool2d(2), nn.Flatten()],
    "instance norm": [nn.Unflatten(1, (2, 8)), nn.InstanceNorm1d(2, affine=True), nn.Softplus(), nn.Flatten()],
    "attention": [nn.Unflatten(1, (4, 4)), Attending(), nn.Flatten()],
    "a bias that a norm follows": [nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh()],
    "in place": [nn.SELU(inplace=True), nn.Linear(16, 4), nn.LeakyReLU(0.1, inplace=True)],
}


@pytest.mark.parametrize("inner", [GradientDescent(lr=0.1, steps=3), Adam(lr=0.02, steps=3)], ids=["descent", "adam"])
@pytest.mark.parametrize("name", WRITING)
def test_steps_of_models_whose_derivatives_write_in_place(
    name: str, inner: InnerOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler, which makes copies of what is written to, is given two parts of that, and rounds otherwise."""

    def compiled(graph: Any, inputs: Any) -> Callable[..., Any]:
        function = torch.func.functionalize(graph)
        return lambda *given: function(*(t * (1 + 2**-52) if t.is_floating_point() else t for t in given))

    monkeypatch.setattr("torch._inductor.compile", compiled)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), *WRITING[name], nn.LazyLinear(2)).double()
    model(torch.zeros(6, 4).double())
    engine = MAML(inner=inner, compile=True)
    found, expected = (
        e.value_and_grad(Objective(model, F.mse_loss), tasks_of())[1] for e in (engine, MAML(inner=inner))
    )
    assert engine._memory.compiler.is_on
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9)


def test_a_gradient_that_is_zero_but_for_rounding_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cotangent of any size there would be multiplied by 1e8, and by what rounding leaves of the Hessian."""

    def compiled(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *given: graph(*(t * (1 + 2**-22) if t.is_floating_point() else t for t in given))

    monkeypatch.setattr("torch._inductor.compile", compiled)
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 16), norm, nn.Tanh(), nn.Linear(16, 2))
    engine = MAML(inner=Adam(lr=0.02, steps=3), compile=True)
    engine.value_and_grad(Objective(model, F.mse_loss), tasks_of().to(dtype=torch.float32))
    assert engine._memory.compiler.is_on


def test_a_second_part_that_would_write_to_what_it_is_handed_leaves_it_alone() -> None:
    """It is used for one cotangent after the other."""

    def function(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        total = y.sum()
        y.mul_(w)
        return total, y + x

    w, x = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.25])
    before, then = trace_and_split(function, [w, x], {0}, 1, "a function", 60.0)
    total, *handed = before(x)
    torch.testing.assert_close(total, x.exp().sum())
    for _ in range(2):
        (found,) = then(w, x, *handed)
        torch.testing.assert_close(found, x.exp() * w + x)


@pytest.mark.parametrize(
    ("wrong", "unsettled", "met"),
    [([], [], True), ([3], [3, 4], True), ([3], [], False), ([3], [4], False), ([0, 1], [*range(16)], True)]
    + [([0, 16], [*range(16)], True), ([16, 17, 18], [*range(16)], False), ([3], [*range(24)], False)],
)
def test_entries_that_rounding_decides_are_not_compared(wrong: list[int], unsettled: list[int], met: bool) -> None:
    """But one in eight as many others at most, and not where most are undecided."""

    def nearby(number: int) -> tuple[Tensor, None]:
        signs = torch.ones(40).double()
        signs[unsettled] = -1.0 if number == 5 else 1.0
        return signs * torch.arange(1.0, 41.0), None

    found = torch.arange(1.0, 41.0).double()
    expected = Expected((found.clone(), None), nearby)
    found[wrong] *= -1e16
    assert expected.is_met_by((found, None), 1e-6) == met
