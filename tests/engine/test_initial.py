"""Query losses of the parameters before and after adaptation, and of a third batch: exact with every strategy."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import imaml
from imaml import CG, FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, NonFiniteError, Objective, TaskBatch
from tests.engine.cases import mlp
from tests.engine.outer_oracle import unrolled
from tests.oracles import relative_error

LAM, LR, STEPS = 0.7, 0.2, 3
INNER = GradientDescent(lr=LR, steps=STEPS)


def tasks_of(count=3):
    """A query set has a third batch, of other examples, as one more entry of its target."""
    torch.manual_seed(2)
    draw = torch.randn(count, 18, 4).double()
    labels = torch.randint(3, (count, 18))
    third = (draw[:, 12:], labels[:, 12:])
    return TaskBatch(support=(draw[:, :6], labels[:, :6]), query=(draw[:, 6:12], (labels[:, 6:12], *third)))


def criterion(output, target, meta):
    return F.cross_entropy(output * meta["scale"], target)


@pytest.fixture
def problem():
    """A head adapts on a shared body, both losses have something learned in them; and the same as plain functions."""
    torch.manual_seed(0)
    model, meta = mlp(), {"scale": torch.tensor(1.3).double().requires_grad_()}

    def outer(output, target, *, initial, adapted, meta):
        labels, x, y = target
        distance = sum(((adapted[n] - initial[n]) ** 2).sum() for n in initial)
        others = {n: p for n, p in body.items() if n not in initial}
        before = criterion(functional_call(model, {**others, **initial}, (x,)), y, meta)
        return criterion(output, labels, meta) + LAM / 2 * meta["scale"] * distance + before * distance.cos()

    body = {n: p.detach() for n, p in model.named_parameters()}
    objective = Objective(model, criterion, outer_loss=outer, adapt=["2"], meta=meta)

    def of(phi, theta, others, batch):
        output = functional_call(model, {**others, **phi}, (batch[0],))
        return outer(output, batch[1], initial=theta, adapted=phi, meta=others)

    def support(phi, others, batch):
        return criterion(functional_call(model, {**others, **phi}, (batch[0],)), batch[1], others)

    named = dict(model.named_parameters())
    adapted = {n: p for n, p in named.items() if n in objective.adapted}
    return objective, support, of, adapted, {n: p for n, p in named.items() if n not in adapted} | meta


def plain(tasks):
    return [(task.support, task.query) for task in tasks]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 1},
        {"chunk_size": 2, "linearize": False},
        {"checkpoints": 1, "storage": "disk"},
        {"linearize": 1},
        {"microbatch_size": 4},
        {"recompute": [nn.Tanh, nn.Linear]},
        {"hvp": "forward-over-reverse"},
        {"outer_steps": {0: 0.3, 1: -0.5, 3: 0.8}},
        {"outer_steps": {0: 0.3, 2: lambda meta: -(meta["scale"] ** 2)}, "chunk_size": 2},
        {"truncate": 1},
        {"truncate": 0, "regularization": 0.0},
    ],
)
def test_maml_equals_the_unrolled_loop(problem, options):
    objective, support, of, adapted, others = problem
    tasks, outer = tasks_of(), options.get("outer_steps", {STEPS: 1.0})
    engine = MAML(**{"inner": INNER, "regularization": 0.4} | options)
    loss, expected, _ = unrolled(
        support,
        of,
        adapted,
        others,
        plain(tasks),
        steps=STEPS,
        lr=lambda others, step: LR,
        damping=lambda others: engine.regularization,
        weights=lambda others: {k: w(others) if callable(w) else w for k, w in outer.items()},
        first=STEPS - min(STEPS if engine.truncate is None else engine.truncate, STEPS),
    )
    got_loss, got = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-12
    with torch.no_grad():
        torch.testing.assert_close(engine(objective, tasks).loss, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_fomaml_is_the_gradient_at_phi_and_that_by_theta_itself(problem, chunk_size):
    objective, support, of, adapted, others = problem
    total = {n: torch.zeros_like(p) for n, p in (adapted | others).items()}
    for batch, query in plain(tasks_of()):
        phi = descended(support, adapted, others, batch, STEPS)
        v, direct, rest = first_derivatives(of, phi, adapted, others, query)
        for n, g in {n: v[n] + direct[n] for n in v}.items() | rest.items():
            total[n] += g / 3
    got = FOMAML(inner=INNER, chunk_size=chunk_size).value_and_grad(objective, tasks_of())[1]
    assert relative_error(got, total) <= 1e-12


@pytest.mark.parametrize("regularization", [2.0, None])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_implicit_maml_adds_what_is_by_theta_itself(problem, chunk_size, regularization):
    """Against a dense Hessian and a dense solve, at the same phi."""
    objective, support, of, adapted, others = problem
    total = {n: torch.zeros_like(p) for n, p in (adapted | others).items()}
    inner = replace(INNER, steps=30)
    for batch, query in plain(tasks_of()):
        phi = descended(support, adapted, others, batch, inner.steps, regularization or 0.0)
        v, direct, rest = first_derivatives(of, phi, adapted, others, query)
        hessian, mixed = second_derivatives(support, phi, others, batch)
        damping = torch.eye(len(hessian)).double() * (regularization or 0.0)
        pulled = torch.linalg.solve(hessian + damping, torch.cat([v[n].flatten() for n in v]))
        theta = split(damping @ pulled, phi)
        for n, g in {n: theta[n] + direct[n] for n in v}.items() | {
            n: rest[n] - (pulled @ mixed[n]).view_as(rest[n]) for n in rest
        }.items():
            total[n] += g / 3
    engine = ImplicitMAML(inner=inner, regularization=regularization, solver=Dense(), chunk_size=chunk_size)
    assert relative_error(engine.value_and_grad(objective, tasks_of())[1], total) <= (1e-11 if regularization else 1e-7)


def descended(support, adapted, others, batch, steps, damping=0.0):
    theta = {n: p.detach() for n, p in adapted.items()}
    phi = dict(theta)
    for _ in range(steps):
        leaves = {n: p.detach().requires_grad_() for n, p in phi.items()}
        grads = torch.autograd.grad(support(leaves, others, batch), list(leaves.values()))
        phi = {n: p - LR * (g + damping * (p - theta[n])) for (n, p), g in zip(phi.items(), grads, strict=True)}
    return phi


def first_derivatives(of, phi, adapted, others, query):
    groups = [{n: p.detach().clone().requires_grad_() for n, p in d.items()} for d in (phi, adapted, others)]
    leaves = [p for group in groups for p in group.values()]
    grads = iter(torch.autograd.grad(of(*groups, query), leaves, materialize_grads=True))
    return [{n: next(grads) for n in group} for group in groups]


def second_derivatives(support, phi, others, batch):
    """H `(n, n)`, and the derivative `(n, m)` of the gradient by each of the others."""
    groups = [{n: p.detach().clone().requires_grad_() for n, p in d.items()} for d in (phi, others)]
    adapted, rest = ([*group.values()] for group in groups)
    grads = torch.autograd.grad(support(*groups, batch), adapted, create_graph=True)
    rows = [
        torch.autograd.grad(g, adapted + rest, retain_graph=True, materialize_grads=True)
        for g in torch.cat([g.flatten() for g in grads])
    ]
    hessian = torch.stack([torch.cat([g.flatten() for g in row[: len(adapted)]]) for row in rows])
    mixed = {n: torch.stack([row[len(adapted) + i].flatten() for row in rows]) for i, n in enumerate(groups[1])}
    return hessian, mixed


def split(flat, like):
    parts = flat.split([p.numel() for p in like.values()])
    return {n: part.view_as(p) for (n, p), part in zip(like.items(), parts, strict=True)}


@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=INNER, outer_steps={0: 0.3, 3: 0.7}, regularization=0.4),
        FOMAML(inner=INNER),
        ImplicitMAML(inner=replace(INNER, steps=60), solver=CG(max_steps=60, rtol=1e-12)),
    ],
    ids=lambda engine: type(engine).__name__,
)
def test_finite_differences_agree(engine):
    model = mlp()

    def outer(output, target, initial, adapted):
        distance = sum(((adapted[n] - initial[n]) ** 2).sum() for n in initial)
        return F.cross_entropy(output, target[0]) + LAM / 2 * distance

    objective = Objective(model, F.cross_entropy, outer_loss=outer)
    assert imaml.verify.meta_gradient(engine, objective, tasks_of()).status == "passed"

    def without(objective, tasks):  # v alone
        by_hand = {n: p.detach() for n, p in objective.parameters().items()}
        constant = Objective(
            objective.model, F.cross_entropy, outer_loss=lambda o, t, adapted: outer(o, t, by_hand, adapted)
        )
        return engine.value_and_grad(constant, tasks)[1]

    claim = {MAML: "maml", FOMAML: "fomaml", ImplicitMAML: "implicit"}[type(engine)]
    wrong = imaml.verify.meta_gradient(
        without, objective, tasks_of(), against=claim, inner=engine.inner, regularization=engine.regularization
    )
    assert wrong.status == "failed"


def test_an_outer_loss_of_parameters_alone():
    """From a function; and of the adapted ones alone, whose derivative is that of phi."""
    params = {
        "w": torch.tensor([1.0, -2.0]).double().requires_grad_(),
        "b": torch.tensor(0.5).double().requires_grad_(),
    }

    def loss(params, batch):
        return (batch[:, :2] @ params["w"] + params["b"] - batch[:, 2]).square().mean()

    def outer(params, batch, initial):
        return loss(params, batch["outer"]) * loss(initial, batch["third"]) + loss(initial, batch["outer"])

    draws = torch.randn(3, 2, 4, 5, 3).double()
    tasks = TaskBatch(support=draws[0, 0], query={"outer": draws[1, 0], "third": draws[2, 0, :, :2]})
    loss_, expected, _ = unrolled(
        lambda phi, others, batch: loss(phi, batch),
        lambda phi, theta, others, batch: outer(phi, batch, theta),
        params,
        {},
        plain(tasks),
        steps=STEPS,
        lr=lambda others, step: LR,
        weights=lambda others: {STEPS: 1.0},
    )
    objective = Objective.from_function(loss, params, outer_loss=outer)
    for size in (None, 1, 3):
        got_loss, got = MAML(inner=INNER, chunk_size=size).value_and_grad(objective, tasks)
        torch.testing.assert_close(got_loss, loss_, rtol=1e-12, atol=0)
        assert relative_error(got, expected) <= 1e-12
    as_params = Objective.from_function(loss, params, outer_loss=lambda p, b: loss(p, b["outer"]))
    as_adapted = Objective.from_function(loss, params, outer_loss=lambda p, b, *, adapted: loss(adapted, b["outer"]))
    one, other = (MAML(inner=INNER).value_and_grad(o, tasks)[1] for o in (as_params, as_adapted))
    assert relative_error(other, one) <= 1e-14


class Distance(nn.Module):
    """A loss with an argument of a name that belongs to it, and one that cannot be vectorised."""

    def forward(self, output, target, initial):
        assert target[0].shape[0] == output.shape[0]
        scale = 2.0 if output.sum().item() > 1e9 else 1.0
        return F.cross_entropy(output, target[0]) + scale * sum((p**2).sum() for p in initial.values())


def test_a_module_and_tasks_that_run_one_by_one():
    model = mlp()
    objective = Objective(model, F.cross_entropy, outer_loss=Distance())
    plain_one = Objective(model, F.cross_entropy, outer_loss=lambda output, target: F.cross_entropy(output, target[0]))
    expected = MAML(inner=INNER).value_and_grad(plain_one, tasks_of())[1]
    for size in (None, 1):
        got = MAML(inner=INNER, chunk_size=size).value_and_grad(objective, tasks_of())[1]
        assert relative_error(got, {n: g + 2 * model.get_parameter(n).detach() for n, g in expected.items()}) <= 1e-12


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_compiled_derivatives_see_the_parameters_of_each_call(strategy, problem):
    objective = problem[0]
    compiled, eager = strategy(inner=INNER, compile=True), strategy(inner=INNER)
    for _ in range(3):
        expected = eager.value_and_grad(objective, tasks_of())[1]
        assert relative_error(compiled.value_and_grad(objective, tasks_of())[1], expected) <= 1e-12
        for parameter in objective.model.parameters():  # anew, as some optimisers and .to() have it
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)


def test_a_derivative_by_initial_that_is_not_finite():
    model, tasks = mlp(), tasks_of()

    def outer(output, target, initial):
        return F.cross_entropy(output, target[0]) + sum(
            (p * 0 * target[1].sum()).abs().sqrt().sum() for p in initial.values()
        )

    objective = Objective(model, F.cross_entropy, outer_loss=outer)
    with pytest.raises(NonFiniteError, match="tasks 0 to 2 by `initial` is not finite although the losses are"):
        MAML(inner=INNER)(objective, tasks)
    some = Objective(
        model,
        F.cross_entropy,
        outer_loss=lambda output, target, initial: (
            F.cross_entropy(output, target[0]) + (initial["2.bias"] * (target[1][0, 0] != 7)).square().sum().sqrt()
        ),
    )
    spoilt = TaskBatch(support=tasks.support, query=tasks.query)
    engine = MAML(inner=INNER, on_nonfinite="skip", outer_steps={1: 0.5, 3: 0.5})
    expected = engine.value_and_grad(some, TaskBatch.stack([tasks[0], tasks[2]]))[1]
    spoilt.query[1][1][1, 0, 0] = 7
    assert relative_error(engine.value_and_grad(some, spoilt)[1], expected) <= 1e-12
    assert engine(some, spoilt).report.skipped == (1,)


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_backward_delivers_it(problem, strategy):
    objective, tasks = problem[0], tasks_of()
    _, expected = strategy(inner=INNER).value_and_grad(objective, tasks)
    strategy(inner=INNER)(objective, tasks).loss.backward()
    assert relative_error({n: p.grad for n, p in objective.parameters().items()}, expected) == 0


@pytest.mark.parametrize("strategy", [MAML, FOMAML])
def test_a_model_in_half_precision(strategy):
    objective = Objective(mlp().bfloat16(), lambda o, t: F.cross_entropy(o.float(), t), outer_loss=half_loss)
    _, got = strategy(inner=INNER).value_and_grad(objective, tasks_of().to(dtype=torch.bfloat16))
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in got.values())


def half_loss(output, target, initial, adapted):
    return (
        F.cross_entropy(output.float(), target[0])
        + sum(((adapted[n] - initial[n]) ** 2).sum() for n in initial).float()
    )


def test_a_support_loss_has_no_use_for_it():
    def loss(output, target, initial):
        raise AssertionError

    with pytest.raises(TypeError, match="`loss` has an argument `initial`, which the loss of the query set alone"):
        Objective(mlp(), loss)
    default = Objective(mlp(), lambda output, target, initial=2.0: initial * F.cross_entropy(output, target))
    assert not default.takes_initial

    def of(initial, adapted):  # names of the two that a loss has in any case
        return (initial["w"] - adapted).square().sum()

    function = Objective.from_function(of, {"w": torch.ones(2).double()}, outer_loss=of)
    assert not function.takes_parameters
    tasks = TaskBatch(support=torch.zeros(2, 2).double(), query=torch.ones(2, 2).double())
    MAML(inner=INNER)(function, tasks)
