"""What holds for every strategy. A new public `MetaGradient` is found by itself, and needs but an oracle."""

import copy
import dataclasses
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imaml
from imaml import FOMAML, GradientDescent, MetaGradient, Objective, SolverWarning, Task, TaskBatch
from tests.engine.cases import classification, conv, mlp, oracle_setting, problem, transformer
from tests.oracles import ORACLES, relative_error

STRATEGIES = [
    value
    for name, value in vars(imaml).items()
    if inspect.isclass(value) and issubclass(value, MetaGradient) and not inspect.isabstract(value)
]
INNER = GradientDescent(lr=0.2, steps=3)
EXACT = {"inner": INNER, "solver": imaml.Dense(), "on_failure": "ignore"}


def make(strategy, **options):
    """The strategy, with those of the options that it has; a solver, where it has one, is dense."""
    fields = {f.name for f in dataclasses.fields(strategy)}
    return strategy(**{k: v for k, v in (EXACT | options).items() if k in fields})


@pytest.fixture(params=STRATEGIES, ids=lambda s: s.__name__)
def strategy(request):
    return request.param


def test_the_three_strategies_are_found():
    assert {s.__name__ for s in STRATEGIES} >= {"MAML", "FOMAML", "ImplicitMAML"}


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
@pytest.mark.parametrize("regularization", [0.5, 2.0])
def test_value_and_gradient_are_those_of_the_oracle(strategy, regularization, adapt):
    assert strategy in ORACLES, (
        f"{strategy.__name__} has no oracle: write one in tests/oracles.py, a slow and obvious computation of the same "
        "meta-gradient in plain PyTorch, and add it to ORACLES."
    )
    engine = make(strategy, regularization=regularization)
    model, objective, tasks = problem(mlp, adapt=adapt)
    loss, expected = ORACLES[strategy](oracle_setting(engine, model, objective, tasks))
    got_loss, got = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-10
    assert all(got[n].shape == p.shape and got[n].dtype == p.dtype for n, p in model.named_parameters())


@pytest.mark.parametrize("build", [mlp, conv, transformer], ids=lambda build: build.__name__)
def test_chunks_do_not_matter(strategy, build):
    _, objective, tasks = problem(build, tasks=5)
    solver = imaml.CG(max_steps=3, rtol=0.0)
    loss, expected = make(strategy, solver=solver, chunk_size=1).value_and_grad(objective, tasks)
    for size in (None, 2, 100):
        got_loss, got = make(strategy, solver=solver, chunk_size=size).value_and_grad(objective, tasks)
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        assert relative_error(got, expected) <= 1e-10


def test_tasks_of_different_sizes(strategy):
    model, objective, _ = problem(mlp)
    sizes = [(2, 3), (4, 3), (2, 3), (3, 1), (2, 3)]
    tasks = [classification((4,), tasks=1, support=a, query=b)[0] for a, b in sizes]
    result = make(strategy, chunk_size=2)(objective, tasks)
    result.loss.backward()
    alone = [make(strategy).value_and_grad(objective, [task]) for task in tasks]
    torch.testing.assert_close(result.report.query_loss, torch.stack([loss for loss, _ in alone]), rtol=1e-12, atol=0)
    expected = {n: sum(g[n] for _, g in alone) / len(tasks) for n, _ in model.named_parameters()}
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= 1e-12


def test_a_list_of_equal_tasks_is_a_batch(strategy):
    _, objective, tasks = problem(mlp)
    a, b = (make(strategy)(objective, t).report for t in (tasks, list(tasks)))
    assert torch.equal(a.query_loss, b.query_loss)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_reports_follow_the_order_of_the_tasks(strategy, chunk_size):
    model, _, tasks = problem(mlp, tasks=4)
    objective = Objective(model, F.cross_entropy, metric=lambda output, y: (output.argmax(-1) == y).double().mean())
    order = torch.tensor([2, 0, 3, 1])
    permuted = TaskBatch(support=tuple(t[order] for t in tasks.support), query=tuple(t[order] for t in tasks.query))
    engine = make(strategy, chunk_size=chunk_size)
    a, b = engine(objective, tasks).report, engine(objective, permuted).report
    for field in dataclasses.fields(a):
        value = getattr(a, field.name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value[..., order], getattr(b, field.name), rtol=1e-8, atol=1e-12)
    _, g = engine.value_and_grad(objective, tasks)
    _, h = engine.value_and_grad(objective, permuted)
    assert relative_error(g, h) <= 1e-12


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", [{}, {"hvp": "finite-difference"}, {"linearize": False}], ids=str)
def test_the_report_has_one_support_loss_per_step_and_task(strategy, steps, options):
    _, objective, tasks = problem(mlp)
    engine = make(strategy, inner=GradientDescent(lr=0.2, steps=steps), **options)
    report = engine(objective, tasks).report
    assert report.support_loss.shape == (steps, len(tasks))
    assert report.query_loss.shape == (len(tasks),)
    with torch.no_grad():
        assert torch.equal(engine(objective, tasks).report.support_loss, report.support_loss)


def test_backward_delivers_value_and_grad(strategy):
    model, objective, tasks = problem(mlp)
    engine = make(strategy)
    loss, gradient = engine.value_and_grad(objective, tasks)
    result = engine(objective, tasks)
    assert result.loss.ndim == 0
    assert result.loss.item() == loss.item() == result.report.query_loss.mean().item()
    assert all(p.grad is None for p in model.parameters())
    result.loss.backward()
    assert all(torch.equal(p.grad, gradient[n]) for n, p in model.named_parameters())
    assert not any(t.requires_grad for t in (loss, *gradient.values()))


def test_gradients_accumulate_and_scale(strategy):
    model, objective, tasks = problem(mlp, tasks=4)
    engine = make(strategy)
    _, whole = engine.value_and_grad(objective, tasks)
    for half in (tasks[:2], tasks[2:]):
        (engine(objective, half).loss / 2 * 8).backward()
    assert relative_error({n: p.grad / 8 for n, p in model.named_parameters()}, whole) <= 1e-12
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert total > 1e-3
    assert 0.99e-3 < nn.utils.get_total_norm(p.grad for p in model.parameters()) <= 1e-3


def test_the_loss_is_part_of_a_larger_one(strategy):
    model, objective, tasks = problem(mlp)
    engine = make(strategy)
    _, gradient = engine.value_and_grad(objective, tasks)
    (engine(objective, tasks).loss + sum((p**2).sum() for p in model.parameters())).backward()
    expected = {n: gradient[n] + 2 * p.detach() for n, p in model.named_parameters()}
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= 1e-12


def test_an_optimizer_lowers_the_loss(strategy):
    model, objective, tasks = problem(mlp)
    engine, optimizer = make(strategy), torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        result = engine(objective, tasks)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_call_only_evaluates(strategy, mode):
    _, objective, tasks = problem(mlp)
    engine = make(strategy)
    expected = engine(objective, tasks)
    with mode():
        result = engine(objective, tasks)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach(), rtol=1e-12, atol=0)
    assert result.report.hvps == 0 and result.report.gradients == INNER.steps * len(tasks)
    assert result.report.hvp_mode is None


def test_tasks_made_in_inference_mode(strategy):
    _, objective, _ = problem(mlp)
    with torch.inference_mode():
        result = make(strategy)(objective, classification((4,)))
    assert result.loss.isfinite() and not result.loss.requires_grad


def test_adapt_is_the_inner_loop(strategy):
    model, objective, tasks = problem(mlp)
    engine = make(strategy, regularization=0.5)
    adapted = engine.adapt(objective, tasks[1].support)
    assert list(adapted) == [n for n, _ in model.named_parameters()]
    assert not any(p.requires_grad for p in adapted.values())
    output = torch.func.functional_call(model, adapted, (tasks[1].query[0],))
    with torch.no_grad():
        expected = engine(objective, tasks).report.query_loss[1]
    torch.testing.assert_close(F.cross_entropy(output, tasks[1].query[1]), expected, rtol=1e-12, atol=0)


def snapshot(model, tasks):
    everything = [*model.parameters(), *model.buffers(), *tasks.support, *tasks.query]
    return [t.detach().clone() for t in everything] + [torch.get_rng_state()]


def failing(message):
    def loss(output, target):
        loss.calls += 1
        if loss.calls == 3:
            raise ZeroDivisionError(message)
        return F.cross_entropy(output, target)

    loss.calls = 0
    return loss


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_of_the_users_is_changed(strategy, raises):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[1].eval()
    tasks = classification((4,))
    loss = failing("the user's own") if raises else F.cross_entropy
    objective = Objective(model, loss)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes, attributes = [m.training for m in model.modules()], [set(vars(m)) for m in model.modules()]
    before, versions = snapshot(model, tasks), [p._version for p in model.parameters()]
    if raises:
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            make(strategy)(objective, tasks)
    else:
        make(strategy)(objective, tasks)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, tasks), strict=True))
    assert versions == [p._version for p in model.parameters()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    assert modes == [m.training for m in model.modules()] and attributes == [set(vars(m)) for m in model.modules()]
    assert torch.is_grad_enabled()


def test_strategies_are_frozen_keyword_only_dataclasses(strategy):
    engine = make(strategy)
    assert dataclasses.is_dataclass(strategy)
    assert all(f.kw_only for f in dataclasses.fields(strategy) if f.init)
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.chunk_size = 3
    changed = dataclasses.replace(engine, chunk_size=3)
    assert changed.chunk_size == 3 and engine.chunk_size is None
    assert dataclasses.replace(changed, chunk_size=None) == engine == copy.deepcopy(engine)


def test_strategies_are_documented(strategy):
    assert "Cost" in strategy.__doc__ and "Memory" in strategy.__doc__


def test_fields_that_every_strategy_has(strategy):
    assert {f.name for f in dataclasses.fields(FOMAML)} <= {f.name for f in dataclasses.fields(strategy)}


def test_float32_is_near_float64(strategy):
    model, objective, tasks = problem(mlp)
    _, expected = make(strategy).value_and_grad(objective, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        single = copy.deepcopy(model).float()
        _, got = make(strategy).value_and_grad(Objective(single, F.cross_entropy), tasks.to(dtype=torch.float32))
    assert all(g.dtype == torch.float32 for g in got.values())
    assert relative_error({n: g.double() for n, g in got.items()}, expected) <= 1e-5


def test_a_single_task(strategy):
    _, objective, tasks = problem(mlp)
    assert isinstance(tasks[0], Task)
    losses = [make(strategy)(objective, t).loss.item() for t in ([tasks[0]], tasks[:1])]
    assert losses[0] == losses[1]
