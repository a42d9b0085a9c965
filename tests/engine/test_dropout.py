"""Random losses: the same draws wherever one inner step is evaluated again, and a tidy global generator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, Status, Task, TaskBatch
from tests.engine.cases import Transformer, classification
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.2, steps=4)
MODES = ("auto", "forward-over-reverse", "reverse-over-reverse", "finite-difference")


def noisy():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def seeded(engine, objective, tasks, seed=7):
    torch.manual_seed(seed)
    return engine.value_and_grad(objective, tasks)[1]


@pytest.fixture
def setup():
    return Objective(noisy(), F.cross_entropy), classification((4,))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_the_seed_decides(setup, strategy, chunk_size):
    engine = strategy(inner=INNER, chunk_size=chunk_size)
    same, again, other = (seeded(engine, *setup, seed=s) for s in (1, 1, 2))
    assert relative_error(again, same) == 0
    assert relative_error(other, same) > 1e-3


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("checkpoints", [0, 1, 2])
def test_recomputed_steps_see_the_same_draws(setup, checkpoints, chunk_size):
    expected = seeded(MAML(inner=INNER, chunk_size=chunk_size), *setup)
    got = seeded(MAML(inner=INNER, chunk_size=chunk_size, checkpoints=checkpoints), *setup)
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", MODES)
def test_every_mode_sees_the_same_draws(setup, hvp, chunk_size):
    expected = seeded(MAML(inner=INNER, chunk_size=chunk_size), *setup)
    got = seeded(MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size), *setup)
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("hvp", MODES[:3])
def test_an_implicit_solve_sees_one_symmetric_operator(setup, hvp, linearize, chunk_size):
    options = dict(inner=INNER, solver=CG(max_steps=100, rtol=1e-11), on_failure="raise", chunk_size=chunk_size)
    engine = ImplicitMAML(hvp=hvp, linearize=linearize, **options)
    torch.manual_seed(7)
    assert (engine(*setup).report.solver_status == Status.CONVERGED).all()
    assert relative_error(seeded(engine, *setup), seeded(ImplicitMAML(**options), *setup)) <= 1e-8


def test_steps_and_tasks_and_query_see_different_draws():
    draws = []

    def loss(params, batch):
        draws.append(torch.rand(()).item())
        return ((params["w"] - batch) ** 2).sum()

    batch = torch.randn(2, 3).double()
    tasks = [Task(support=b, query=b) for b in batch]
    objective = Objective.from_function(loss, {"w": torch.randn(3).double().requires_grad_()})
    MAML(inner=INNER, chunk_size=1)(objective, tasks)
    per_task = INNER.steps * 2 + 1  # each inner step once more in its product, and the query
    first, second = draws[:per_task], draws[per_task:]
    assert len(set(draws)) == 2 * (INNER.steps + 1)
    for sweep in (first, second):
        forward, query, products = sweep[: INNER.steps], sweep[INNER.steps], sweep[INNER.steps + 1 :]
        assert products == forward[::-1] and query not in forward


def test_the_tasks_of_a_chunk_see_different_masks():
    """Equal tasks give equal gradients only if their masks are equal."""
    model = noisy()
    tasks = classification((4,), tasks=1)
    twice = [tasks[0], tasks[0]]
    report = FOMAML(inner=INNER)(Objective(model, F.cross_entropy), twice).report
    assert report.query_loss[0] != report.query_loss[1]


def test_the_steps_of_a_chunk_see_different_masks():
    """Under equal masks an entry would move by -2 in both steps or in none, where the query loss is zero."""

    def loss(params, batch):
        w = params["w"]
        return (w * F.dropout(batch, 0.5)).sum() if len(batch) == 20 else (w * (w + 4)).sum()

    objective = Objective.from_function(loss, {"w": torch.zeros(20, dtype=torch.float64, requires_grad=True)})
    tasks = TaskBatch(support=torch.ones(3, 20).double(), query=torch.ones(3, 1).double())
    torch.manual_seed(0)
    report = FOMAML(inner=GradientDescent(lr=1.0, steps=2))(objective, tasks).report
    assert (report.query_loss < 0).all()


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_the_generator_ends_as_after_one_forward_pass(strategy):
    model, tasks = noisy(), classification((4,), tasks=1)
    objective = Objective(model, F.cross_entropy)
    torch.manual_seed(3)
    model(tasks[0].support[0])
    expected = torch.get_rng_state()
    for call in ("__call__", "value_and_grad"):
        torch.manual_seed(3)
        getattr(strategy(inner=INNER), call)(objective, tasks)
        assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(3)
    strategy(inner=INNER).adapt(objective, tasks[0].support)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_vectorised_pass_that_fails_has_drawn_nothing():
    class Drawing(nn.Linear):
        def forward(self, x):
            x = F.dropout(x)
            return torch.zeros(len(x), 3, dtype=x.dtype).add_(super().forward(x))  # vmap refuses to write

    objective, tasks = Objective(Drawing(4, 3).double(), F.cross_entropy), classification((4,))
    torch.manual_seed(0)
    FOMAML(inner=INNER, chunk_size=len(tasks))(objective, tasks)
    ended = torch.get_rng_state()
    torch.manual_seed(0)
    for inputs in tasks.support[0]:
        objective.model(inputs)
    assert torch.equal(torch.get_rng_state(), ended)


def test_two_calls_in_a_row_see_different_draws(setup):
    engine = FOMAML(inner=INNER)
    torch.manual_seed(0)
    a, b = (engine.value_and_grad(*setup)[1] for _ in range(2))
    assert relative_error(a, b) > 1e-3


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_a_model_without_randomness_leaves_the_generator_alone(setup, strategy):
    model = noisy().eval()
    before = torch.get_rng_state()
    strategy(inner=INNER)(Objective(model, F.cross_entropy), setup[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_query_loss_alone_that_draws():
    """Whether a loss draws is not decided by the support set."""

    def loss(params, batch):
        kept = F.dropout(batch, 0.5) if len(batch) == 6 else batch
        return ((params["w"] - kept) ** 2).sum()

    support, query = torch.randn(2, 5).double(), torch.randn(2, 6).double()
    params = {"w": torch.randn(()).double().requires_grad_()}
    objective, tasks = Objective.from_function(loss, params), TaskBatch(support=support, query=query)
    for chunk_size in (None, 1):
        engine = MAML(inner=GradientDescent(lr=0.01, steps=2), chunk_size=chunk_size)
        torch.manual_seed(0)
        first = engine(objective, tasks).loss
        state = torch.get_rng_state()
        assert engine(objective, tasks).loss != first
        torch.manual_seed(0)
        assert engine(objective, tasks).loss == first and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("hvp", MODES[:3])
def test_attention_dropout(hvp):
    """Masks are drawn in the order of memory, which forward AD may change: exact or refused, never wrong."""
    model, tasks = Transformer(dropout=0.3).double(), classification((5, 4))
    objective = Objective(model, F.cross_entropy)
    for chunk_size in (None, 1):
        expected = seeded(MAML(inner=INNER, chunk_size=chunk_size), objective, tasks)
        try:
            got = seeded(MAML(inner=INNER, hvp=hvp, checkpoints=1, chunk_size=chunk_size), objective, tasks)
        except RuntimeError as error:
            assert hvp == "forward-over-reverse" and "hvp='auto'" in str(error)
        else:
            assert relative_error(got, expected) <= 1e-10


class LongDropout(nn.Module):
    """Drops entries of sets of more than four examples alone."""

    def forward(self, x):
        return F.dropout(x, 0.5) if len(x) > 4 else x


def draws_at_once():
    return Objective(noisy(), F.cross_entropy), classification((4,))


def draws_late():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), LongDropout(), nn.Linear(8, 3)).double()
    return Objective(model, F.cross_entropy), [classification((4,), tasks=1, support=n, query=4)[0] for n in (4, 8)]


@pytest.mark.parametrize("make", [draws_at_once, draws_late])
def test_the_gradient_is_that_of_the_loss_with_these_masks(make):
    """The slope of the seeded loss along a direction, by central differences."""
    objective, tasks = make()
    engine = MAML(inner=INNER, linearize=False)
    gradient = seeded(engine, objective, tasks)
    parameters = objective.parameters()
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(direction[n], alpha=sign * 1e-5)
            torch.manual_seed(7)
            values.append(engine(objective, tasks).loss)
            for n, p in parameters.items():
                p.sub_(direction[n], alpha=sign * 1e-5)
    slope = sum((gradient[n] * d).sum() for n, d in direction.items())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-9)
