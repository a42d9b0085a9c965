"""`verify.meta_gradient`: right ones pass, wrong ones fail, and nothing passes without resolving power."""

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, Task, TaskBatch, verify
from imaml.verify._implicit_mistakes import fitted
from imaml.verify._plain_cg import NegativeCurvature, iterates

LOOP = GradientDescent(lr=0.1, steps=3)
CONVERGED = ImplicitMAML(
    inner=GradientDescent(lr=0.2, steps=150), regularization=2.0, solver=CG(max_steps=100, rtol=1e-12)
)


def network(*middle: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), *middle, nn.Linear(width, 3))


def problem(model: nn.Module, tasks: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Objective, TaskBatch]:
    x, y = torch.randn(tasks, 10, 4, dtype=dtype), torch.randint(3, (tasks, 10))
    batch = TaskBatch(support=(x[:, :5], y[:, :5]), query=(x[:, 5:], y[:, 5:]))
    return Objective(model.to(dtype), F.cross_entropy), batch


@pytest.mark.parametrize(
    "engine",
    [MAML(inner=LOOP), MAML(inner=LOOP, regularization=1.0, checkpoints=1), FOMAML(inner=LOOP), CONVERGED],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("middle", [nn.Tanh, nn.ReLU], ids=["smooth", "kinks"])
def test_right_strategies_pass(engine, middle) -> None:
    result = verify.meta_gradient(engine, *problem(network(middle())))
    if middle is nn.ReLU and engine is CONVERGED and result.status == "inconclusive":
        return  # a stationary point may lie on a kink
    assert result.status == "passed", result
    assert result.cause is None
    assert result.relative_error < 1e-8
    assert result.resolution < 1e-6


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
def test_a_damped_solve_passes_as_what_it_is_and_its_bias_is_measured(adapt) -> None:
    objective, tasks = problem(network(nn.Tanh()))
    objective = Objective(objective.model, F.cross_entropy, adapt=adapt)
    result = verify.meta_gradient(replace(CONVERGED, damping=1.5), objective, tasks)
    assert result.status == "passed" and result.relative_error < 1e-8
    assert result.subject == "ImplicitMAML against damped" and "bias" in str(result)
    plain = verify.meta_gradient(CONVERGED, objective, tasks)
    assert plain.bias is None and "bias" not in str(plain)
    exact = verify.meta_gradient(replace(CONVERGED, damping=1.5), objective, tasks, against="implicit")
    assert exact.status == "failed"
    assert result.bias == pytest.approx(exact.relative_error, rel=1e-4) and result.bias > 0.1
    if adapt is None:
        assert "another linear system is solved: 2.5 I + 0.5 H where I + H / lambda is I + 0.5 H" in exact.cause
        assert "which damps by delta = 1.5" in exact.cause


def test_one_that_says_it_is_damped_and_is_not_fails_with_the_cause() -> None:
    def plain(objective: Objective, tasks: TaskBatch) -> dict[str, Tensor]:
        return CONVERGED.value_and_grad(objective, tasks)[1]

    claim = {"against": "damped", "regularization": 2.0, "inner": CONVERGED.inner}
    result = verify.meta_gradient(plain, *problem(network(nn.Tanh())), damping=1.5, **claim)
    assert result.status == "failed" and "the damping is missing" in result.cause
    with pytest.raises(ValueError, match="Pass damping=delta"):
        verify.meta_gradient(plain, *problem(network()), **claim)
    with pytest.raises(ValueError, match="`damping` must be >= 0. Got -1"):
        verify.meta_gradient(plain, *problem(network()), damping=-1.0, **claim)


def test_damping_that_adapts_is_refused_and_so_is_one_of_another_claim() -> None:
    with pytest.raises(ValueError, match="damping='auto' depends on the calls before.*Expected a number"):
        verify.meta_gradient(replace(CONVERGED, damping="auto"), *problem(network()))
    with pytest.raises(ValueError, match="Expected against='damped'. Got 'maml'"):
        verify.meta_gradient(MAML(inner=LOOP), *problem(network()), damping=1.0)


def test_a_learned_lambda_is_verified_with_damping() -> None:
    model = network(nn.Tanh()).double()
    _, tasks = problem(model, dtype=torch.float64)
    meta = {"log": torch.tensor(0.7, dtype=torch.float64, requires_grad=True)}
    objective = Objective(model, F.cross_entropy, meta=meta)
    engine = replace(CONVERGED, regularization=lambda meta: meta["log"].exp(), damping=1.5)
    result = verify.meta_gradient(engine, objective, tasks)
    assert result.status == "passed" and result.relative_error < 1e-7, result


def test_parameters_that_do_not_adapt_are_verified_too() -> None:
    model = network(nn.Tanh())
    _, tasks = problem(model)
    objective = Objective(model, F.cross_entropy, adapt=["2"])
    for engine in (MAML(inner=LOOP), FOMAML(inner=LOOP), CONVERGED):
        assert verify.meta_gradient(engine, objective, tasks).status == "passed"

    def without_them(objective: Objective, tasks: TaskBatch) -> dict[str, Tensor]:
        grads = MAML(inner=LOOP).value_and_grad(objective, tasks)[1]
        return {n: g if n in objective.adapted else torch.zeros_like(g) for n, g in grads.items()}

    assert verify.meta_gradient(without_them, objective, tasks, against="maml", inner=LOOP).status == "failed"


def test_regularisation_by_name_and_ragged_tasks() -> None:
    model = network(nn.Tanh())
    objective, batch = problem(model)
    shorter = Task(support=tuple(t[:3] for t in batch[0].support), query=batch[0].query)
    weights = {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 3.0, "2.bias": 4.0}
    for engine in (MAML(inner=LOOP, regularization=weights),):
        assert verify.meta_gradient(engine, objective, [shorter, batch[1]]).status == "passed"


def test_the_users_model_and_generators_are_untouched() -> None:
    objective, tasks = problem(network(nn.Tanh(), nn.BatchNorm1d(6, track_running_stats=False)))
    before, state = copy.deepcopy(objective.model.state_dict()), torch.get_rng_state()
    verify.meta_gradient(MAML(inner=LOOP), objective, tasks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.dtype == torch.float32 for p in objective.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), objective.model.state_dict().values(), strict=True))


def test_a_function_gets_a_float64_copy() -> None:
    objective, tasks = problem(network(nn.Tanh()))

    def function(given: Objective, given_tasks: TaskBatch) -> Tensor:
        assert given.model is not objective.model
        assert all(p.dtype == torch.float64 for p in given.model.parameters())
        assert given_tasks.support[0].dtype == torch.float64
        grads = MAML(inner=LOOP).value_and_grad(given, given_tasks)[1]
        return torch.cat([g.flatten() for g in grads.values()])

    assert verify.meta_gradient(function, objective, tasks, against="maml", inner=LOOP).status == "passed"


def test_single_precision_results_pass_at_their_own_precision() -> None:
    objective, tasks = problem(network(nn.Tanh()))

    def single(_: Objective, __: TaskBatch) -> dict[str, Tensor]:
        return MAML(inner=LOOP).value_and_grad(objective, tasks)[1]

    result = verify.meta_gradient(single, objective, tasks, against="maml", inner=LOOP)
    assert (result.status, result.tolerance) == ("passed", 1e-3)
    assert result.relative_error > 1e-9


def test_an_error_of_a_known_size_is_measured() -> None:
    objective, tasks = problem(network(nn.Tanh()))

    def off(given: Objective, given_tasks: TaskBatch) -> dict[str, Tensor]:
        return {n: 1.0001 * g for n, g in MAML(inner=LOOP).value_and_grad(given, given_tasks)[1].items()}

    result = verify.meta_gradient(off, objective, tasks, against="maml", inner=LOOP)
    assert result.status == "failed"
    assert result.relative_error == pytest.approx(1e-4, rel=1e-3)
    assert verify.meta_gradient(off, objective, tasks, against="maml", inner=LOOP, tolerance=1e-3).status == "passed"


@pytest.mark.parametrize(
    ("engine", "options", "cause"),
    [
        (FOMAML(inner=LOOP), {"against": "maml"}, "first-order"),
        (FOMAML(inner=CONVERGED.inner, regularization=2.0), {"against": "implicit"}, "first-order"),
        (MAML(inner=LOOP), {"inner": GradientDescent(lr=0.1, steps=4)}, "one inner step too few"),
        (MAML(inner=LOOP, truncate=2), {}, "truncated: the last 2 of"),
        (MAML(inner=LOOP), {"regularization": 1.0}, "proximal term is missing"),
        (ImplicitMAML(inner=LOOP, solver=CG(max_steps=100, rtol=1e-12)), {}, "unconverged inner solution"),
        (ImplicitMAML(inner=CONVERGED.inner, solver=CG(max_steps=2)), {}, "unconverged solve: the iterate after 2"),
    ],
)
def test_causes(engine, options, cause) -> None:
    result = verify.meta_gradient(engine, *problem(network(nn.Tanh())), **options)
    assert result.status == "failed"
    assert cause in result.cause
    assert cause in str(result)


def test_dropout_of_our_own_engine_is_verified_with_its_own_draws() -> None:
    objective, tasks = problem(network(nn.Tanh(), nn.Dropout(0.3)), tasks=3)
    for size in (None, 1, 2):
        result = verify.meta_gradient(MAML(inner=LOOP, chunk_size=size), objective, tasks)
        assert result.status == "passed", result
    assert verify.meta_gradient(CONVERGED, objective, tasks).status == "inconclusive"


def test_dropout_drawn_in_the_order_of_one_pass_a_step_passes_in_a_function() -> None:
    objective, tasks = problem(network(nn.Tanh(), nn.Dropout(0.3)))

    def plain(given: Objective, given_tasks: TaskBatch) -> dict[str, Tensor]:
        theta = given.parameters()
        losses = []
        for task in given_tasks:
            phi = dict(theta)
            for _ in range(LOOP.steps):
                grads = torch.autograd.grad(given.evaluate(phi, task.support)[0], list(phi.values()), create_graph=True)
                phi = {n: p - LOOP.lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
            losses.append(given.evaluate(phi, task.query)[0])
        return dict(zip(theta, torch.autograd.grad(torch.stack(losses).mean(), list(theta.values())), strict=True))

    assert verify.meta_gradient(plain, objective, tasks, against="maml", inner=LOOP).status == "passed"


def test_a_function_that_differs_between_calls_fails() -> None:
    objective, tasks = problem(network(nn.Tanh(), nn.BatchNorm1d(6)))

    def leaking(given: Objective, given_tasks: TaskBatch) -> dict[str, Tensor]:
        given.model(given_tasks.support[0][0])  # in training mode: the running statistics move
        given.model.eval()
        grads = MAML(inner=LOOP).value_and_grad(given, given_tasks)[1]
        given.model.train()
        return grads

    def descending(given: Objective, given_tasks: TaskBatch) -> dict[str, Tensor]:
        given.model.eval()
        grads = MAML(inner=LOOP).value_and_grad(given, given_tasks)[1]
        given.model.train()
        with torch.no_grad():
            for name, parameter in given.parameters().items():
                parameter -= 0.1 * grads[name]
        return grads

    for function, cause in ((leaking, "running statistics"), (descending, "in place")):
        result = verify.meta_gradient(function, objective, tasks, against="maml", inner=LOOP)
        assert result.status == "failed"
        assert cause in result.cause


def test_a_loss_that_cannot_run_in_double_precision_is_an_error() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    _, tasks = problem(model := network(nn.Tanh()))
    with pytest.raises(TypeError, match="does not run in float64"):
        verify.meta_gradient(
            MAML(inner=LOOP), Objective(model, lambda out, y: F.cross_entropy(out, y, weight=weight)), tasks
        )


def test_a_loss_whose_autograd_gradient_is_not_its_derivative() -> None:
    """The row of a padding index has no gradient in torch, and moves the loss."""
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randint(5, (2, 10, 2)), torch.randint(3, (2, 10))
    tasks = TaskBatch(support=(x[:, :5], y[:, :5]), query=(x[:, 5:], y[:, 5:]))
    result = verify.meta_gradient(MAML(inner=LOOP), Objective(model, F.cross_entropy), tasks)
    assert result.status == "failed"
    assert "padding_idx" in result.cause


def test_a_zero_meta_gradient_is_inconclusive() -> None:
    weight = torch.ones(3, dtype=torch.float64)
    objective = Objective.from_function(lambda p, batch: 0 * (p["w"] * batch[0]).sum(), {"w": weight})
    x = torch.randn(2, 3, dtype=torch.float64)
    result = verify.meta_gradient(MAML(inner=LOOP), objective, TaskBatch(support=(x, x), query=(x, x)))
    assert result.status == "inconclusive"
    assert "zero" in result.cause


def test_a_kink_at_the_parameters_themselves_is_not_passed() -> None:
    """Central differences of |x| at 0 are consistent, and say 0, whatever the step."""
    objective = Objective.from_function(
        lambda p, batch: (p["w"].abs() * batch[0]).sum() + (p["v"] * batch[0]).sum(),
        {"w": torch.zeros(3, dtype=torch.float64), "v": torch.ones(3, dtype=torch.float64)},
    )
    x = torch.rand(2, 3, dtype=torch.float64) + 1
    result = verify.meta_gradient(
        MAML(inner=GradientDescent(lr=0.1, steps=0)), objective, TaskBatch(support=(x, x), query=(x, x))
    )
    assert result.status == "inconclusive"
    assert "smooth" in result.cause


def test_an_inner_problem_without_a_minimum_is_inconclusive() -> None:
    objective = Objective.from_function(
        lambda p, batch: -5 * (p["w"] * batch[0]).square().sum(), {"w": torch.ones(3, dtype=torch.float64)}
    )
    x = torch.rand(2, 3, dtype=torch.float64) + 1
    result = verify.meta_gradient(
        FOMAML(inner=GradientDescent(lr=0.01, steps=1)),
        objective,
        TaskBatch(support=(x, x), query=(x, x)),
        against="implicit",
        regularization=1.0,
    )
    assert result.status == "inconclusive"
    assert math.isinf(result.resolution)


def test_the_result_is_frozen_and_readable() -> None:
    result = verify.meta_gradient(MAML(inner=LOOP), *problem(network(nn.Tanh())))
    assert str(result).startswith("MAML against maml: passed\nrelative error ")
    with pytest.raises(AttributeError):
        result.status = "failed"


@dataclass(frozen=True, kw_only=True)
class Claims(GradientDescent):
    """Says that its `update` is linear, which it is not."""

    is_linear: ClassVar[bool] = True

    def update(self, state, gradient, step, at):
        return super().update(state, gradient.tanh(), step, at)


@dataclass(frozen=True, kw_only=True)
class Pulls(Claims):
    """Has a derivative of its own that is another's."""

    def update(self, state, gradient, step, at):
        return super().update(state, gradient.tanh(), step, at)

    def pullback(self, state, gradient, cotangents, step, at, learned):
        return cotangents, -at["lr"] * cotangents[0], {}


@pytest.mark.parametrize("kind", [Claims, Pulls])
def test_an_optimizer_with_a_derivative_that_is_not_of_its_update_fails(kind) -> None:
    engine = MAML(inner=kind(lr=0.5, steps=3))
    assert verify.meta_gradient(engine, *problem(network(nn.Tanh()))).status == "failed"


def test_the_cause_is_looked_for_where_a_result_overflows() -> None:
    class Overflowing:
        v = torch.ones(3, dtype=torch.float64)

        def hessian(self, u: Tensor) -> Tensor:
            return u * math.inf

    assert fitted(Overflowing(), torch.ones(3, dtype=torch.float64))[2] == math.inf


@pytest.mark.parametrize("ulps", [0.0, 0.5, 2.0, -1.0])
def test_a_curvature_of_rounding_alone_is_no_minimum(ulps):
    diagonal = torch.tensor([1.0, -1.0 + ulps * torch.finfo(torch.float64).eps], dtype=torch.float64)
    steps = iterates(lambda p: diagonal * p, torch.ones(2, dtype=torch.float64), rtol=1e-10, most=9)
    with pytest.raises(NegativeCurvature):
        next(steps)
