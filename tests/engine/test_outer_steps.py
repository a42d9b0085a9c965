"""Query losses after several inner steps: one sweep is the gradient of their weighted sum, however it is computed."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from imaml import (
    MAML,
    Adam,
    DivergenceError,
    GradientDescent,
    Minibatches,
    NonFiniteError,
    Objective,
    RMSprop,
    Task,
    TaskBatch,
    verify,
)
from tests.engine.cases import classification, mlp
from tests.engine.outer_oracle import unrolled
from tests.oracles import relative_error

STEPS = 5
FIXED = {0: 0.3, 2: -0.5, 3: 0.25, 5: 0.8}
CONFIGURATIONS = [
    {},
    {"linearize": True},
    {"linearize": 2},
    {"linearize": 2, "checkpoints": 1},
    {"linearize": False},
    {"checkpoints": 0},
    {"checkpoints": 1, "storage": "disk"},
    {"storage": "disk", "chunk_size": 2},
    {"chunk_size": 1},
    {"chunk_size": "auto"},
    {"microbatch_size": 2},
    {"hvp": "forward-over-reverse"},
]


def learned(meta):
    """Weights that are learned, one of them negative, beside a number."""
    return {0: 0.3, 2: meta["weights"][0], 4: -(meta["weights"][1] ** 2), 5: 0.8}


@pytest.fixture(scope="module")
def everything():
    """A head adapts on a shared body; a step size, lambda, weights of the losses and one inside of them are learned."""
    torch.manual_seed(0)
    model, tasks = mlp(), classification((4,))
    meta = {
        "lr": torch.tensor(-1.5).double().requires_grad_(),
        "damping": torch.tensor(-0.5).double().requires_grad_(),
        "weights": torch.tensor([0.4, 0.7]).double().requires_grad_(),
        "scale": torch.tensor(1.3).double().requires_grad_(),
    }

    def loss(output, target, meta):
        return F.cross_entropy(output * meta["scale"], target) + 0.1 * output.square().mean()

    objective = Objective(model, loss, adapt=["2"], meta=meta)
    engine = MAML(
        inner=GradientDescent(lr=lambda meta: meta["lr"].exp(), momentum=0.6, steps=STEPS),
        regularization=lambda meta: meta["damping"].exp(),
        outer_steps={
            k: (lambda meta, k=k: learned(meta)[k]) if k in (2, 4) else learned(meta)[k] for k in (5, 2, 4, 0)
        },
    )

    def of(phi, others, batch):
        return loss(functional_call(model, {**others, **phi}, (batch[0],)), batch[1], others)

    named = dict(model.named_parameters())
    found = unrolled(
        of,
        lambda phi, theta, others, batch: of(phi, others, batch),
        {n: p for n, p in named.items() if n in objective.adapted},
        {n: p for n, p in named.items() if n not in objective.adapted} | meta,
        [(task.support, task.query) for task in tasks],
        steps=STEPS,
        lr=lambda others, step: others["lr"].exp(),
        damping=lambda others: others["damping"].exp(),
        momentum=0.6,
        weights=learned,
    )
    return engine, objective, tasks, found


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_equals_the_unrolled_loop_with_all_that_can_be_learned(everything, options):
    engine, objective, tasks, (loss, expected, losses) = everything
    engine = replace(engine, **options)
    got_loss, got = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-12
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(engine(objective, tasks).report.outer_losses, losses, rtol=1e-12, atol=0)


def test_is_the_slope_of_what_an_evaluation_says(everything):
    """No derivative of the query losses is taken here, and no sum of them in the oracle."""
    engine, objective, tasks, _ = everything
    parameters = objective.parameters()
    gradient = engine.value_and_grad(objective, tasks)[1]
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    found = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for name, p in parameters.items():
                p += h * direction[name]
            found.append(engine(objective, tasks).loss)
            for name, p in parameters.items():
                p -= h * direction[name]
    slope = (found[0] - found[1]) / 2e-5
    expected = sum((gradient[n] * d).sum() for n, d in direction.items())
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=0)


class WithoutWeights(MAML):
    """The query loss at the end, whatever is asked for."""

    def pull_back(self, problem):
        pulled = MAML.pull_back(replace(self, outer_steps=None), problem)
        return replace(pulled, outcome=super().pull_back(problem).outcome)


def test_verification_knows_of_them(everything):
    engine, objective, tasks, _ = everything
    assert verify.meta_gradient(engine, objective, tasks).status == "passed"
    numbers = {k: w for k, w in FIXED.items() if k <= 3}
    for strategy, status in ((MAML, "passed"), (WithoutWeights, "failed")):
        wrong = strategy(inner=GradientDescent(lr=0.2, steps=3), outer_steps=numbers)
        assert verify.meta_gradient(wrong, Objective(mlp(), F.cross_entropy), tasks).status == status


@pytest.mark.parametrize("inner", [Adam(lr=0.05, steps=4), RMSprop(lr=0.05, steps=4, momentum=0.3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"checkpoints": 1}, {"linearize": 2, "chunk_size": 2}], ids=str)
def test_equals_the_sum_over_engines_of_fewer_steps(inner, options):
    objective, tasks = Objective(mlp(), F.cross_entropy), classification((4,))
    weights = {0: 0.5, 1: -0.25, 3: 1.5, 4: 0.75}
    parts = {k: MAML(inner=replace(inner, steps=k)).value_and_grad(objective, tasks) for k in weights}
    loss, got = MAML(inner=inner, outer_steps=weights, **options).value_and_grad(objective, tasks)
    torch.testing.assert_close(loss, sum(w * parts[k][0] for k, w in weights.items()), rtol=1e-12, atol=0)
    expected = {n: sum(w * parts[k][1][n] for k, w in weights.items()) for n in got}
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("weights", [{0: 1.0}, {3: 0.5}, {2: 0.2, 4: 0.8}], ids=str)
@pytest.mark.parametrize("metric", [None, F.mse_loss])
def test_the_end_has_no_weight_unless_it_is_named(weights, metric):
    torch.manual_seed(0)
    model, draws = nn.Linear(3, 2).double(), torch.randn(4, 3, 6, 5).double()
    objective = Objective(model, F.mse_loss, metric=metric, adapt=["bias"])
    tasks = TaskBatch(support=(draws[0, ..., :3], draws[0, ..., 3:]), query=(draws[1, ..., :3], draws[1, ..., 3:]))
    inner = GradientDescent(lr=0.1, steps=4)
    parts = {k: MAML(inner=replace(inner, steps=k)).value_and_grad(objective, tasks)[1] for k in weights}
    engine = MAML(inner=inner, outer_steps=weights)
    expected = {n: sum(w * parts[k][n] for k, w in weights.items()) for n in objective.parameters()}
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12
    reports = [engine(objective, tasks).report]
    with torch.no_grad():
        reports.append(engine(objective, tasks).report)
    at_the_end = MAML(inner=inner)(objective, tasks).report.metric
    for report in reports:
        assert report.outer_losses.shape == (len(weights), 3)
        if metric is None:
            assert report.metric is None
        else:
            torch.testing.assert_close(report.metric, at_the_end, rtol=1e-12, atol=0)


def test_the_end_alone_is_the_default():
    objective, tasks = Objective(mlp(), F.cross_entropy), classification((4,))
    default, said = (MAML(inner=GradientDescent(lr=0.2, steps=3), outer_steps=given) for given in (None, {3: 1.0}))
    assert relative_error(said.value_and_grad(objective, tasks)[1], default.value_and_grad(objective, tasks)[1]) == 0
    assert default(objective, tasks).report.outer_losses is None
    report = said(objective, tasks).report
    assert torch.equal(report.outer_losses, report.query_loss.unsqueeze(0))


@pytest.mark.parametrize("truncate", [0, 2, 3, 9])
def test_with_a_truncated_loop(truncate):
    torch.manual_seed(0)
    model, tasks, first = mlp(), classification((4,)), STEPS - min(truncate, STEPS)
    weights = {k: w for k, w in {0: 0.3, 2: -0.5, 3: 0.25, 4: 1.0, 5: 0.8}.items() if k >= first}

    def of(phi, batch):
        return F.cross_entropy(functional_call(model, phi, (batch[0],)), batch[1])

    loss, expected, _ = unrolled(
        lambda phi, others, batch: of(phi, batch),
        lambda phi, theta, others, batch: of(phi, batch),
        dict(model.named_parameters()),
        {},
        [(task.support, task.query) for task in tasks],
        steps=STEPS,
        lr=lambda others, step: 0.2,
        weights=lambda others: weights,
        first=first,
    )
    engine = MAML(inner=GradientDescent(lr=0.2, steps=STEPS), truncate=truncate, outer_steps=weights)
    got_loss, got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-12


def test_the_gradient_by_a_weight_is_the_mean_query_loss_there():
    weights = torch.tensor([0.2, 0.3, 0.5]).double().requires_grad_()
    objective = Objective(mlp(), F.cross_entropy, meta={"weights": weights})
    outer = {k: lambda meta, i=i: meta["weights"].softmax(0)[i] for i, k in enumerate((1, 2, 4))}
    for size in (None, 1, 2):
        engine = MAML(inner=GradientDescent(lr=0.2, steps=4), outer_steps=outer, chunk_size=size)
        report = engine(objective, classification_of(5)).report
        leaves = weights.detach().clone().requires_grad_()
        (leaves.softmax(0) @ report.outer_losses.mean(1)).backward()
        got = engine.value_and_grad(objective, classification_of(5))[1]["weights"]
        torch.testing.assert_close(got, leaves.grad, rtol=1e-12, atol=0)


def classification_of(tasks):
    torch.manual_seed(5)
    return classification((4,), tasks=tasks)


def test_tasks_of_several_shapes():
    objective, engine = Objective(mlp(), F.cross_entropy), MAML(inner=GradientDescent(lr=0.2, steps=3))
    engine = replace(engine, outer_steps={1: 0.4, 3: 0.6}, chunk_size=2)
    tasks = [classification((4,), tasks=1, support=n, query=m)[0] for n, m in ((2, 3), (4, 3), (2, 3), (3, 1), (2, 3))]
    alone = [engine.value_and_grad(objective, [task]) for task in tasks]
    loss, got = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(loss, torch.stack([each for each, _ in alone]).mean(), rtol=1e-12, atol=0)
    assert relative_error(got, {n: torch.stack([g[n] for _, g in alone]).mean(0) for n in got}) <= 1e-12
    report = engine(objective, tasks).report
    torch.testing.assert_close(report.query_loss, torch.stack([each for each, _ in alone]), rtol=1e-12, atol=0)
    assert report.outer_losses.shape == (2, 5)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_task_that_is_skipped_counts_nowhere(chunk_size):
    """1 / (w - 1)^2 is infinite after one of two steps of 1 from 0; what was added up before is taken back."""
    weights = torch.tensor([0.4, 0.7]).double().requires_grad_()
    objective = Objective.from_function(
        lambda params, batch: -(params["w"] * batch).sum() + 0.1 * (params["w"] ** 4).sum(),
        {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)},
        outer_loss=lambda params, batch: (params["w"] - 1).square().reciprocal().sum(),
        meta={"weights": weights},
    )
    engine = MAML(
        inner=GradientDescent(lr=1.0, steps=2),
        outer_steps={0: 1.0, 1: lambda meta: meta["weights"][0], 2: lambda meta: meta["weights"][1]},
        on_nonfinite="skip",
        chunk_size=chunk_size,
    )
    slopes = torch.tensor([[0.5], [0.6], [1.0], [0.4]]).double()
    spoilt, good = (TaskBatch(support=s, query=s) for s in (slopes, slopes[[0, 1, 3]]))
    loss, expected = engine.value_and_grad(objective, good)
    got_loss, got = engine.value_and_grad(objective, spoilt)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-12
    report = engine(objective, spoilt).report
    assert report.skipped == (2,) and report.outer_losses[:, 2].isnan().all() and "outer steps" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(engine(objective, spoilt).loss, loss, rtol=1e-12, atol=0)


def test_a_loss_that_is_infinite_on_the_way_is_named():
    """1 / (w - 1)^2, which is infinite after one of two steps of 1 from 0."""
    objective = Objective.from_function(
        lambda params, batch: -(params["w"] * batch).sum(),
        {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)},
        outer_loss=lambda params, batch: (params["w"] - 1).square().reciprocal().sum(),
    )
    task = Task(support=torch.ones(1).double(), query=torch.ones(1).double())
    engine = MAML(inner=GradientDescent(lr=1.0, steps=2), outer_steps={0: 1.0, 1: 1.0, 2: 1.0})
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(NonFiniteError, match="query loss of task 0 is inf after 1 inner steps"):
            engine(objective, [task])
    diverging = replace(engine, inner=GradientDescent(lr=1e9, steps=2))
    steep = Objective.from_function(lambda params, batch: (params["w"] - batch).square().sum(), objective.parameters())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(DivergenceError, match="diverged"):
            diverging(steep, [task])


@pytest.mark.parametrize("where", [{}, {"checkpoints": 1}])
def test_every_query_loss_has_its_own_draws_and_an_evaluation_the_same(where):
    draws = []

    def loss(params, batch):
        draws.append(torch.rand(()).item())
        return (params["w"] - batch * draws[-1]).square().sum()

    objective = Objective.from_function(loss, {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)})
    task = Task(support=torch.ones(3).double(), query=torch.ones(3).double())
    engine = MAML(inner=GradientDescent(lr=0.1, steps=2), outer_steps={0: 1.0, 1: 1.0, 2: 1.0}, chunk_size=1, **where)
    torch.manual_seed(3)
    expected = engine(objective, [task]).report
    assert len(set(draws)) == 2 + 3  # a support loss in each step, replayed in the sweep, and a query loss around each
    for _ in range(2):
        draws.clear()
        torch.manual_seed(3)
        with torch.no_grad():
            found = engine(objective, [task]).report
        assert len(set(draws)) == len(draws) == 5
        torch.testing.assert_close(found.outer_losses, expected.outer_losses, rtol=1e-12, atol=0)


def test_dropout_is_the_slope_of_what_an_evaluation_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    objective, tasks = Objective(model, F.cross_entropy), classification((4,))
    engine = MAML(inner=GradientDescent(lr=0.2, steps=3), outer_steps={0: 0.5, 2: 1.0, 3: 0.5}, chunk_size=1)

    def seeded(call):
        torch.manual_seed(4)
        return call(objective, tasks)

    loss, gradient = seeded(engine.value_and_grad)
    direction, found = {n: torch.randn_like(p) for n, p in model.named_parameters()}, []
    with torch.no_grad():
        torch.testing.assert_close(seeded(engine).loss, loss, rtol=1e-12, atol=0)
        for h in (1e-5, -2e-5):
            for name, p in model.named_parameters():
                p += h * direction[name]
            found.append(seeded(engine).loss)
    slope = (found[0] - found[1]) / 2e-5
    torch.testing.assert_close(sum((gradient[n] * d).sum() for n, d in direction.items()), slope, rtol=1e-7, atol=0)


def test_compiled_derivatives_and_recomputed_blocks_give_the_same(everything, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    engine, objective, tasks, (_, expected, _) = everything
    engine = replace(engine, compile=True)
    for _ in range(2):
        assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12
    blocks = replace(engine, compile=False, recompute=[nn.Tanh, nn.Linear])
    assert relative_error(blocks.value_and_grad(objective, tasks)[1], expected) <= 1e-12
    assert blocks(objective, tasks).report.recomputed


def test_a_training_that_goes_on_counts_its_outer_steps_from_where_it_stands():
    torch.manual_seed(0)
    draws = torch.randn(6, 5, 4).double()
    task = Task(support=Minibatches([(x[:, :3], x[:, 3:]) for x in draws]), query=(draws[0, :, :3], draws[0, :, 3:]))
    objective, inner = Objective(nn.Linear(3, 1).double(), F.mse_loss), GradientDescent(lr=0.1, momentum=0.5, steps=6)
    whole = MAML(inner=inner, outer_steps={3: 0.4, 4: 0.6, 6: 1.0}, truncate=3)
    window = replace(whole, inner=replace(inner, steps=3), outer_steps={0: 0.4, 1: 0.6, 3: 1.0}, truncate=None)
    state = MAML(inner=replace(inner, steps=3))(objective, [task], return_state=True).state
    loss, expected = whole.value_and_grad(objective, [task])
    got_loss, got = window.value_and_grad(objective, [task], start=state)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-12
    with torch.no_grad():
        torch.testing.assert_close(window(objective, [task], start=state).loss, loss, rtol=1e-12, atol=0)


def test_it_takes_a_gradient_for_each_of_them_and_one_sweep():
    objective, tasks = Objective(mlp(), F.cross_entropy), classification((4,), tasks=3)
    report = MAML(inner=GradientDescent(lr=0.2, steps=5), outer_steps=FIXED)(objective, tasks).report
    assert (report.gradients, report.hvps) == (3 * (5 + len(FIXED)), 3 * 5)


INNER = GradientDescent(lr=0.1, steps=5)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({6: 1.0}, ValueError, r"must be from 0 \(before the first inner step\) to 5 \(after the last.*Got 6\."),
        ({-1: 1.0}, ValueError, "A step of `outer_steps` must be >= 0. Got -1."),
        ({2.0: 1.0}, TypeError, "A step of `outer_steps` must be an integer. Got 2.0."),
        ({True: 1.0}, TypeError, "must be an integer. Got True."),
        ({}, ValueError, "at least one step. Got none: leave it out"),
        ([0.2, 0.8], TypeError, r"dictionary from numbers of inner steps to weights.*Got \[0.2, 0.8\]"),
        ({2: "much"}, TypeError, r"`outer_steps\[2\]`, unless a function .* must be a number. Got 'much'."),
        ({2: float("nan")}, ValueError, r"`outer_steps\[2\]`.* must be finite"),
        ({2: torch.tensor(1.0)}, TypeError, "must be a number"),
    ],
)
def test_bad_outer_steps(given, error, words):
    with pytest.raises(error, match=words):
        MAML(inner=INNER, outer_steps=given)


def test_outer_steps_before_those_that_are_differentiated():
    with pytest.raises(ValueError, match="`truncate` differentiates the inner steps from 3 on.*from 3 to 5.*Got 2: "):
        MAML(inner=INNER, truncate=2, outer_steps={2: 0.5, 5: 0.5})
    assert MAML(inner=INNER, truncate=2, outer_steps={5: 0.5, 3: 0.5}).outer_steps == {3: 0.5, 5: 0.5}


def test_a_function_of_a_weight_that_gives_no_number():
    tasks, weights = classification((4,)), torch.ones(3).double().requires_grad_()
    objective = Objective(mlp(), F.cross_entropy, meta={"weights": weights})
    by_name = {n: weights.sum() for n in objective.adapted}
    for wrong in (lambda meta: meta["weights"], lambda meta: {n: meta["weights"].sum() for n in by_name}):
        with pytest.raises(ValueError, match=r"`outer_steps\[2\]` must be"):
            MAML(inner=INNER, outer_steps={2: wrong, 5: 1.0})(objective, tasks)
    with pytest.raises(ValueError, match=r"`outer_steps\[2\]` asks for the meta-parameter 'weight'"):
        MAML(inner=INNER, outer_steps={2: lambda meta: meta["weight"]})(objective, tasks)
