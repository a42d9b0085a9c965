"""`on_nonfinite="skip"`: the mean over the tasks that are left, as if the others had not been given."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    DivergenceError,
    GradientDescent,
    ImplicitMAML,
    NewtonCG,
    NonFiniteError,
    Objective,
    SolverWarning,
    Status,
    TaskBatch,
    TorchOptimizer,
)
from tests.engine.cases import classification, conv, mlp, problem, transformer

INNER = GradientDescent(lr=0.1, steps=3)
IMPLICIT = ImplicitMAML(inner=INNER, regularization=2.0, solver=CG(max_steps=50))
ENGINES = {
    "MAML": MAML(inner=INNER, regularization=0.5),
    "MAML, one by one": MAML(inner=INNER, chunk_size=1),
    "MAML, chunks of 4": MAML(inner=Adam(lr=0.1, steps=3), chunk_size=4, checkpoints=1),
    "MAML, slices": MAML(inner=INNER, microbatch_size=2),
    "FOMAML": FOMAML(inner=INNER),
    "FOMAML, L-BFGS": FOMAML(inner=TorchOptimizer(torch.optim.LBFGS, steps=2, line_search_fn="strong_wolfe")),
    "ImplicitMAML": IMPLICIT,
    "ImplicitMAML, Gauss-Newton": ImplicitMAML(inner=INNER, solver=CG(max_steps=50), curvature="ggn"),
    "ImplicitMAML, Newton": ImplicitMAML(inner=NewtonCG(steps=3), solver=CG(max_steps=50), chunk_size=3),
    "ImplicitMAML, early stop": ImplicitMAML(inner=GradientDescent(lr=0.1, steps=9, stationarity=0.2)),
}
BAD = (0, 3, 4)


def skipping(engine):
    return type(engine)(**{f: getattr(engine, f) for f in engine.__dataclass_fields__ if f[0] != "_"} | SKIP)


SKIP = {"on_nonfinite": "skip"}


def six_tasks(shape=(4,)):
    """Of which three are bad, each in its way, and the three without them."""
    tasks = classification(shape, tasks=6)
    good = TaskBatch.stack([task for i, task in enumerate(tasks) if i not in BAD])
    tasks.support[0][0, 1] = torch.nan
    tasks.query[0][3, 0] = torch.inf
    tasks.support[0][4] = -torch.inf
    return tasks, good


def assert_equal(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_gradient_is_that_without_the_bad_tasks(name, adapt):
    _, objective, _ = problem(mlp, adapt=adapt)
    tasks, good = six_tasks()
    loss, gradients = ENGINES[name].value_and_grad(objective, good)
    for given in (tasks, list(tasks)):
        ours, found = skipping(ENGINES[name]).value_and_grad(objective, given)
        assert_equal(ours, loss)
        assert_equal(found, gradients)


@pytest.mark.parametrize("build", [conv, transformer])
def test_in_models_of_other_kinds(build):
    model, objective, _ = problem(build)
    tasks, good = six_tasks({conv: (1, 16, 16), transformer: (5, 4)}[build])
    assert_equal(
        MAML(inner=INNER, **SKIP).value_and_grad(objective, tasks),
        MAML(inner=INNER).value_and_grad(objective, good),
    )


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "ImplicitMAML", "ImplicitMAML, Newton"])
def test_the_report_names_them_and_keeps_the_others_in_place(name):
    model, _, _ = problem(mlp)
    objective = Objective(model, F.cross_entropy, metric=lambda z, y: (z.argmax(-1) == y).sum())
    tasks, good = six_tasks()
    engine = ENGINES[name]
    report, expected = skipping(engine)(objective, tasks).report, engine(objective, good).report
    assert report.skipped == BAD and expected.skipped == ()
    kept = [1, 2, 5]
    for entry in ("query_loss", "metric", "support_loss", "stationarity", "solver_residual", "error_bound"):
        ours, theirs = getattr(report, entry), getattr(expected, entry)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.shape[-1] == 6
            torch.testing.assert_close(ours[..., kept].to(theirs), theirs, rtol=1e-9, atol=1e-13, equal_nan=True)
            assert ours[..., BAD].isnan().all()
    if expected.solver_status is not None:
        assert report.solver_status.tolist() == [4, 0, 0, 4, 4, 0]
        assert report.solver_steps[kept].tolist() == expected.solver_steps.tolist()
    text = str(report)
    assert "mean of 3 tasks" in text and "tasks 0, 3, 4" in text and "nan" not in text.lower()
    assert "skipped" not in str(expected)


def test_evaluation_skips_too():
    _, objective, _ = problem(mlp)
    tasks, good = six_tasks()
    for engine in (ENGINES["MAML"], ENGINES["ImplicitMAML"]):
        with torch.no_grad():
            result = skipping(engine)(objective, tasks)
            assert_equal(result.loss, engine(objective, good).loss)
        assert result.report.skipped == BAD


def test_divergence_is_skipped():
    objective = Objective.from_function(quartic, {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)})
    start = torch.tensor([[0.1], [50.0], [0.2]], dtype=torch.float64)
    result = MAML(inner=INNER, **SKIP)(objective, TaskBatch(support=start, query=torch.zeros_like(start)))
    assert result.report.skipped == (1,)
    others = TaskBatch(support=start[::2], query=torch.zeros(2, 1, dtype=torch.float64))
    assert_equal(result.loss, MAML(inner=INNER)(objective, others).loss)


def quartic(params, batch):
    return ((params["w"] - batch) ** 4).sum()


def test_errors_carry_the_positions_of_all_tasks_in_question():
    _, objective, _ = problem(mlp)
    tasks, _ = six_tasks()
    with pytest.raises(NonFiniteError) as error:
        MAML(inner=INNER)(objective, tasks)
    assert error.value.tasks == (0, 4)
    objective = Objective.from_function(quartic, {"w": torch.zeros(1, requires_grad=True)})
    with pytest.raises(DivergenceError) as error:
        MAML(inner=INNER)(objective, TaskBatch(support=torch.tensor([[0.1], [50.0]]), query=torch.zeros(2, 1)))
    assert error.value.tasks == (1,)


def root(params, batch):
    """Its second derivative is infinite for task data of zero, where its first is 0."""
    return (params["w"] * batch).abs().pow(1.5).sum() + (params["w"] - 1).square().sum()


_DATA = torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.2, 0.1]], dtype=torch.float64)
ROOTS, GOOD_ROOTS = (TaskBatch(support=data, query=data + 0.1) for data in (_DATA, _DATA[::2]))


def test_an_infinite_second_derivative_alone():
    """Found after the sweep, or by a solve that ends NONFINITE with zero as its last good iterate."""
    objective = Objective.from_function(root, {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)})
    tasks, good = ROOTS, GOOD_ROOTS
    for engine in (ENGINES["MAML"], ENGINES["ImplicitMAML"]):
        report = skipping(engine)(objective, tasks).report
        assert report.skipped == (1,)
        assert_equal(skipping(engine).value_and_grad(objective, tasks), engine.value_and_grad(objective, good))
    with pytest.raises(NonFiniteError, match="task 1 is not finite although") as error:
        ENGINES["MAML"](objective, tasks)
    assert error.value.tasks == (1,)
    with pytest.warns(SolverWarning, match="1 of 3 linear solves failed, the first that of task 1: NONFINITE"):
        assert ImplicitMAML(inner=INNER)(objective, tasks).report.solver_status[1] == Status.NONFINITE


def shared(params, batch, meta):
    """The gradient for `b` is infinite where the data are zero; that for `w` is not."""
    return (params["w"] - batch).square().sum() + (meta["b"] * batch).square().sum().sqrt()


@pytest.mark.parametrize("strategy", [MAML, FOMAML])
def test_a_sum_over_tasks_that_one_spoils(strategy):
    meta = {"b": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}
    w = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    objective = Objective.from_function(shared, w, meta=meta)
    data = torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.2, 0.1], [0.4, 0.1]], dtype=torch.float64)
    engine = strategy(inner=INNER)
    tasks, good = (TaskBatch(support=d.clone(), query=d) for d in (data, data[[0, 2, 3]]))
    with pytest.raises(NonFiniteError, match="tasks 0 to 3 for a parameter that does not adapt"):
        engine(objective, tasks)
    assert skipping(engine)(objective, tasks).report.skipped == (1,)
    assert_equal(skipping(engine).value_and_grad(objective, tasks), engine.value_and_grad(objective, good))


def test_learned_step_sizes_and_regularisation():
    """Their derivatives are sums too, which an attempt that failed has begun."""
    meta = {"log": torch.tensor(0.0, dtype=torch.float64, requires_grad=True)}
    w = {"w": torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)}
    objective = Objective.from_function(lambda w, batch, meta: root(w, batch), w, meta=meta)

    def positive(meta):
        return 0.1 * meta["log"].exp()

    for engine in (
        MAML(inner=GradientDescent(lr=positive, steps=3)),
        ImplicitMAML(inner=INNER, regularization=positive, solver=CG(max_steps=9), chunk_size=2),
    ):
        assert_equal(skipping(engine).value_and_grad(objective, ROOTS), engine.value_and_grad(objective, GOOD_ROOTS))


def test_a_step_size_whose_derivative_alone_overflows():
    w = {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)}
    meta = {"lr": torch.tensor(1e-150, dtype=torch.float64, requires_grad=True)}
    objective = Objective.from_function(lambda w, batch, meta: (w["w"] * batch).sum(), w, meta=meta)
    scale = torch.tensor([[1.0], [1e200], [2.0]], dtype=torch.float64)
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["lr"], steps=1))
    tasks, good = (TaskBatch(support=s, query=s.clone()) for s in (scale, scale[::2]))
    assert skipping(engine)(objective, tasks).report.skipped == (1,)
    assert_equal(skipping(engine).value_and_grad(objective, tasks), engine.value_and_grad(objective, good))


def test_the_error_of_finite_differences_is_of_a_task_that_counts():
    w = {"w": torch.ones(1, dtype=torch.float64, requires_grad=True)}

    def with_cliffs(params, batch):
        """Of task 0, one in reach of the first product, at 0.75, and one of the second, at 1."""
        x = params["w"] * batch
        factor = torch.where((x > 0.75) & (x < 0.9), 1e6, 1.0)
        return (x.square() * torch.where(x > 1, torch.nan, factor)).sum()

    objective = Objective.from_function(with_cliffs, w, outer_loss=lambda w, batch: (w["w"] * batch).square().sum())
    tasks = TaskBatch(support=torch.tensor([[1.0], [0.5]]).double(), query=torch.ones(2, 1).double())
    report = MAML(inner=GradientDescent(lr=0.125, steps=2), hvp="finite-difference", **SKIP)(objective, tasks).report
    assert report.skipped == (0,) and report.hvp_error < 1e-3


def test_warm_starts_remember_the_solutions_of_tasks_that_count():
    """A chunk computed anew starts from where its first attempt started."""
    objective = Objective.from_function(shared_support, {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)})
    data = torch.rand(3, 3, dtype=torch.float64) + 0.1
    data[1] = 0
    solver = CG(max_steps=1)
    warm, cold = (
        ImplicitMAML(inner=INNER, solver=solver, warm_start=w, error_bound=False, on_failure="ignore", **SKIP)
        for w in (True, False)
    )
    tasks = TaskBatch(support=data, query=data + 0.5)
    first = warm.value_and_grad(objective, tasks)
    assert_equal(first, cold.value_and_grad(objective, tasks))
    assert warm(objective, tasks).report.skipped == (1,)
    good = [tasks[0], tasks[2]]
    assert not torch.equal(warm.value_and_grad(objective, good)[1]["w"], first[1]["w"])
    assert len(warm._solutions.known) == 2


def shared_support(params, batch):
    return (params["w"] * batch).abs().pow(1.5).sum() + (params["w"] ** 4).sum()


def test_no_task_left():
    _, objective, _ = problem(mlp)
    tasks, _ = six_tasks()
    for given, chunk_size in itertools.product((tasks[3:5], tasks[:1]), (None, 1)):
        engine = MAML(inner=INNER, chunk_size=chunk_size, **SKIP)
        with pytest.raises(NonFiniteError, match=f"No task is left: all {len(given)} were skipped"):
            engine(objective, given)
        with torch.no_grad(), pytest.raises(NonFiniteError, match="No task is left"):
            engine(objective, given)


def test_nothing_is_changed_where_every_task_is_finite():
    _, objective, tasks = problem(mlp, adapt=["2"])
    for engine in (ENGINES["MAML"], ENGINES["ImplicitMAML"]):
        ours, theirs = (e.value_and_grad(objective, tasks) for e in (skipping(engine), engine))
        assert ours[0].equal(theirs[0]) and all(ours[1][n].equal(g) for n, g in theirs[1].items())
        assert skipping(engine)(objective, tasks).report.gradients == engine(objective, tasks).report.gradients


def test_running_statistics_are_those_of_the_tasks_that_count():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    objective = Objective(model, F.cross_entropy, buffers="update")
    tasks, good = six_tasks()
    ours, theirs = (MAML(inner=INNER, **SKIP)(objective, t).report.buffers for t in (tasks, good))
    assert_equal(ours, theirs)


def test_what_is_not_of_single_tasks_is_raised():
    meta = {"a": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    objective = Objective(mlp(), F.cross_entropy, meta=meta)
    engine = MAML(inner=GradientDescent(lr=lambda m: 0.1 + m["a"].sqrt(), steps=2), **SKIP)
    with pytest.raises(NonFiniteError, match="infinite derivative"):
        engine(objective, classification((4,)))


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip'. Got 'ignore'"):
        MAML(inner=INNER, on_nonfinite="ignore")
