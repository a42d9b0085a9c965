"""Sets that do not fit at once: slice by slice, the same numbers for the memory of a slice."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.measure import peak_memory
from tests.engine.cases import CLASSES, classification, mlp
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.2, steps=3)
EXACT, SHORT = CG(max_steps=50, rtol=1e-12), CG(max_steps=3, rtol=0.0)
ENGINES = [
    MAML(inner=INNER),
    MAML(inner=INNER, checkpoints=1),
    FOMAML(inner=INNER),
    ImplicitMAML(inner=INNER, solver=EXACT),
]


def accuracy(output, target):
    return (output.argmax(-1) == target).double().mean()


@pytest.fixture
def setting():
    return Objective(mlp(), F.cross_entropy, adapt=["2"], metric=accuracy), classification((4,), support=7, query=5)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_slices_give_the_same_numbers(setting, engine, size, chunk_size):
    sliced = dataclasses.replace(engine, microbatch_size=size, chunk_size=chunk_size)
    assert relative_error(sliced.value_and_grad(*setting)[1], engine.value_and_grad(*setting)[1]) <= 1e-10
    got, expected = sliced(*setting).report, engine(*setting).report
    for name in ("query_loss", "support_loss", "metric", "stationarity"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    with torch.no_grad():
        torch.testing.assert_close(sliced(*setting).report.metric, expected.metric)


@pytest.mark.parametrize("hvp", ["forward-over-reverse", "finite-difference", "reverse-over-reverse"])
def test_every_mode_accumulates(setting, hvp):
    expected = MAML(inner=INNER).value_and_grad(*setting)[1]
    got = MAML(inner=INNER, hvp=hvp, microbatch_size=2).value_and_grad(*setting)[1]
    assert relative_error(got, expected) <= (1e-6 if hvp == "finite-difference" else 1e-12)


@pytest.mark.parametrize(
    "engine",
    [MAML(inner=INNER, linearize=False), FOMAML(inner=INNER), ImplicitMAML(inner=INNER, solver=SHORT)],
    ids=lambda e: type(e).__name__,
)
def test_the_peak_is_that_of_a_slice(engine):
    net = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, CLASSES)).double()
    objective = Objective(net, F.cross_entropy)
    large, small = (classification((4,), tasks=1, support=n, query=n) for n in (4000, 400))

    def peak(engine, tasks):
        engine.value_and_grad(objective, tasks)  # looks at the shapes
        return peak_memory(lambda: engine.value_and_grad(objective, tasks))

    one_by_one = dataclasses.replace(engine, chunk_size=1, linearize=False) if hasattr(engine, "linearize") else engine
    by_slices = peak(dataclasses.replace(engine, microbatch_size=400), large)
    assert by_slices <= 1.15 * peak(one_by_one, small)
    assert by_slices <= 0.2 * peak(one_by_one, large)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (mlp, lambda z, y: F.cross_entropy(z, y, reduction="sum")),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double(),
            F.cross_entropy,
        ),
    ],
    ids=["sum", "batch statistics"],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused(model, loss):
    with pytest.raises(ValueError, match="mean over independent examples. Got a support loss of"):
        MAML(inner=INNER, microbatch_size=2)(Objective(model(), loss), classification((4,)))


def test_tensors_without_examples_are_refused():
    w = torch.ones(1, requires_grad=True)
    objective = Objective.from_function(lambda p, b: (p["w"] * b[0]).mean() * b[1], {"w": w})
    batch = (torch.ones(2, 5), torch.ones(2))
    with pytest.raises(ValueError, match="slices every tensor of a task along its first dimension"):
        MAML(inner=INNER, microbatch_size=2)(objective, TaskBatch(support=batch, query=batch))


def test_dropout_is_the_same_in_every_recomputation():
    """Else the recomputed steps of the sweep would be other steps."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    tasks, found = classification((4,)), []
    for checkpoints in (None, 0):
        torch.manual_seed(0)
        engine = MAML(inner=INNER, microbatch_size=2, checkpoints=checkpoints)
        found.append(engine.value_and_grad(Objective(net, F.cross_entropy), tasks)[1])
    assert relative_error(*found) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAML(inner=INNER, microbatch_size=0), "`microbatch_size`.*>= 1"),
        (lambda: MAML(inner=INNER, microbatch_size=2, linearize=True), "Expected microbatch_size=None. Got 2"),
        (lambda: ImplicitMAML(inner=INNER, microbatch_size=2, curvature="ggn"), "does not take `microbatch_size`"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
