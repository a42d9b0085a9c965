"""Sets that do not fit at once: slice by slice, the same numbers for the memory of a slice."""

import dataclasses
import gc
import weakref

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


def summed(output, target):
    return F.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize("chunk_size", [None, 1, "auto"])
def test_every_objective_is_looked_at(chunk_size):
    """Another loss, another mode of the model: the shapes alone say nothing."""
    engine, tasks = MAML(inner=INNER, microbatch_size=2, chunk_size=chunk_size), classification((4,))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    engine(Objective(model, F.cross_entropy), tasks)
    for objective in (Objective(model, summed), Objective(model, F.cross_entropy, outer_loss=summed)):
        with pytest.raises(ValueError, match="mean over independent examples"):
            engine(objective, tasks)
    model.train()
    with pytest.raises(ValueError, match="mean over independent examples"):
        engine(Objective(model, F.cross_entropy, buffers="batch"), tasks)


def test_adapt_looks_at_the_support_loss():
    engine, tasks = MAML(inner=INNER, microbatch_size=2), classification((4,))
    with pytest.raises(ValueError, match="Got a support loss of"):
        engine.adapt(Objective(mlp(), summed), tasks[0].support)
    engine.adapt(Objective(mlp(), F.cross_entropy, outer_loss=summed), tasks[0].support)


class Judge:
    """A user's class that owns the loss and a metric of it."""

    def loss(self, output, target):
        return F.cross_entropy(output, target)


def test_a_new_objective_of_the_same_parts_is_known_and_none_is_kept_alive():
    engine, tasks, calls = FOMAML(inner=INNER, microbatch_size=2), classification((4,)), []
    model, judge = mlp(), Judge()
    model.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(3):
        calls.clear()
        engine(Objective(model, judge.loss), tasks)
        counts.append(len(calls))
    assert counts[0] > counts[1] == counts[2]
    alive = weakref.ref(model), weakref.ref(judge)
    del model, judge
    gc.collect()
    assert [part() for part in alive] == [None, None]


@pytest.mark.parametrize("kind", ["support", "query"])
def test_the_refusal_says_what_was_computed(kind):
    """The first four examples of the first task, at once and as two slices of two."""
    model, tasks = mlp(), classification((4,), support=7, query=7)
    both = {"loss": summed} if kind == "support" else {"loss": F.cross_entropy, "outer_loss": summed}
    x, y = getattr(tasks[0], kind)
    at_once = summed(model(x[:4]), y[:4]).item()
    message = f"a {kind} loss of {at_once:.6g} for the first 4 examples at once and {at_once / 2:.6g} as the mean"
    with pytest.raises(ValueError, match=message):
        MAML(inner=INNER, microbatch_size=2)(Objective(model, **both), tasks)


def weighted_square(params, batch):
    """Of each example, with the scale that the batch brings."""
    return (params["w"] * batch).square().mean()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_the_size_of_the_loss_does_not_matter(scale):
    """Nor does rounding: a mean is no exact one."""
    objective = Objective.from_function(weighted_square, {"w": torch.randn(5, dtype=torch.float64)})
    batch = torch.randn(3, 7, 5, dtype=torch.float64) * scale
    tasks, engine = TaskBatch(support=batch, query=batch), FOMAML(inner=GradientDescent(lr=0.1, steps=0))
    expected = engine(objective, tasks).report.query_loss
    torch.testing.assert_close(dataclasses.replace(engine, microbatch_size=2)(objective, tasks).loss, expected.mean())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_small_departure_from_a_mean_is_refused(scale):
    """One part in a thousand depends on pairs of examples."""

    def loss(params, batch):
        return weighted_square(params, batch) + 1e-3 * (params["w"] * batch.mean(0)).square().mean()

    objective = Objective.from_function(loss, {"w": torch.randn(5, dtype=torch.float64)})
    batch = torch.randn(3, 7, 5, dtype=torch.float64) * scale
    with pytest.raises(ValueError, match="mean over independent examples"):
        FOMAML(inner=INNER, microbatch_size=2)(objective, TaskBatch(support=batch, query=batch))


def test_the_rounding_of_autocast_is_no_departure():
    """bfloat16 keeps three digits of a mean: here that of six examples is off by 0.5 % from that of its halves."""
    model, batch = nn.Linear(4, 4), (torch.randn(2, 8, 4), torch.zeros(2, 8))
    objective = Objective(model, lambda z, y: (z * z).sum(-1).mean())
    tasks, engine = TaskBatch(support=batch, query=batch), FOMAML(inner=INNER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = [objective.loss(model(batch[0][0, i:j]), None) for i, j in ((0, 6), (0, 3), (3, 6))]
        assert abs(first[0] - first[1] / 2 - first[2] / 2) > 1e-3 * first[0]
        expected = engine(objective, tasks).loss
        got = dataclasses.replace(engine, microbatch_size=3)(objective, tasks).loss
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("second", "sizes"), [((2,), r"\[0, 5\] \(0: a scalar\)"), ((2, 4), r"\[4, 5\]")], ids=["scalar", "other number"]
)
def test_tensors_without_one_number_of_examples_are_refused(second, sizes):
    w = torch.ones(1, requires_grad=True)
    objective = Objective.from_function(lambda p, b: (p["w"] * b[0]).mean() * b[1].mean(), {"w": w})
    batch = (torch.ones(2, 5), torch.ones(second))
    with pytest.raises(ValueError, match=f"slices every tensor of a task along its first dimension.*{sizes}"):
        MAML(inner=INNER, microbatch_size=2)(objective, TaskBatch(support=batch, query=batch))


def test_scalars_alone_are_refused():
    objective = Objective.from_function(lambda p, b: p["w"] * b, {"w": torch.ones((), requires_grad=True)})
    with pytest.raises(ValueError, match=r"Got \[0\] \(0: a scalar\)"):
        MAML(inner=INNER, microbatch_size=2)(objective, TaskBatch(support=torch.ones(2), query=torch.ones(2)))


def test_dropout_is_the_same_in_every_recomputation():
    """Else the recomputed steps of the sweep would be other steps."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    tasks, found = classification((4,)), []
    for checkpoints in (None, 0):
        torch.manual_seed(0)
        engine = MAML(inner=INNER, microbatch_size=2, checkpoints=checkpoints)
        found.append(engine.value_and_grad(Objective(net, F.cross_entropy), tasks)[1])
    assert relative_error(*found) <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(("examples", "steps"), [(1, 2), (2, 1)], ids=["steps", "slices"])
def test_steps_and_slices_see_different_masks(examples, steps, chunk_size):
    """Under equal masks an entry of w would end at 0 or -2, where the query loss is zero."""

    def loss(params, batch):
        w = params["w"]
        return (w * F.dropout(batch, 0.5)).sum(-1).mean() if batch.shape[-1] == 20 else (w * (w + 2)).sum()

    objective = Objective.from_function(loss, {"w": torch.zeros(20, dtype=torch.float64, requires_grad=True)})
    tasks = TaskBatch(support=torch.ones(3, examples, 20).double(), query=torch.ones(3, 1, 1).double())
    inner = GradientDescent(lr=1 / steps, steps=steps)
    report = FOMAML(inner=inner, microbatch_size=1, chunk_size=chunk_size)(objective, tasks).report
    assert (report.query_loss < 0).all()


def test_dropout_is_the_same_without_gradients():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    objective, tasks, found = Objective(net, F.cross_entropy), classification((4,)), []
    for grad in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            found.append(FOMAML(inner=INNER, microbatch_size=2)(objective, tasks).report.query_loss)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAML(inner=INNER, microbatch_size=0), "`microbatch_size`.*>= 1"),
        (lambda: MAML(inner=INNER, microbatch_size=2, linearize=True), "Expected microbatch_size=None. Got 2"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "per_example", [lambda o, t: (o.argmax(-1) == t).sum(), lambda o, t: (o.argmax(-1) == t).all()]
)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_a_metric_of_whole_numbers_has_a_mean(engine, per_example):
    net, tasks = mlp(), classification((4,), support=7, query=5)
    sliced = dataclasses.replace(engine, microbatch_size=2)
    metrics = (per_example, lambda o, t: per_example(o, t).double())
    found, expected = (sliced(Objective(net, F.cross_entropy, metric=m), tasks).report.metric for m in metrics)
    torch.testing.assert_close(found.double(), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            sliced(Objective(net, F.cross_entropy, metric=per_example), tasks).report.metric, found
        )
