"""A meta-gradient is called meaningful where it is, and what helps is named where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imaml
from imaml import FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Minibatches, Objective, Task, TaskBatch, bilevel
from imaml.models import MLP
from tests.engine.cases import MODELS, problem

START = 0.3


def logistic(steps, dtype=torch.float64, lr=1.0):
    """Gradient descent with lr = 1 is phi <- 4 phi (1 - phi), which is chaotic: phi_K = sin(2^K asin(sqrt(phi)))^2."""

    def loss(params, batch):
        return (4 / 3 * params["x"] ** 3 - 1.5 * params["x"] ** 2).sum()

    def outer(params, batch):
        return params["x"].square().sum()

    x = torch.tensor([START], dtype=dtype, requires_grad=True)
    objective = Objective.from_function(loss, {"x": x}, outer_loss=outer)
    empty = torch.zeros(1, dtype=dtype)
    return MAML(inner=GradientDescent(lr=lr, steps=steps)), objective, [Task(support=empty, query=empty)]


def closed_form(x, steps):
    return (2**steps * x.sqrt().asin()).sin() ** 4


@pytest.mark.parametrize(("steps", "status"), [(0, "smooth"), (3, "smooth"), (16, "rough"), (30, "rough")])
def test_a_chaotic_training_is_rough_once_it_is_long(steps, status):
    found = imaml.verify.smoothness(*logistic(steps))
    assert found.status == status
    x = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(closed_form(x, steps), x)
    for distance, ratio in found.agreement["parameters"].items():
        step = distance * START * slope.sign()
        with torch.no_grad():
            secant = (closed_form(x + step, steps) - closed_form(x - step, steps)) / (2 * step)
        assert ratio == pytest.approx((secant / slope).item(), abs=1e-4 * 2**steps / 2**16 + 1e-6)


def test_changes_that_calm_it_are_named_with_what_they_lead_to():
    found = imaml.verify.smoothness(*logistic(16))
    assert "smaller step size, such as lr=0.25 for 1" in found.advice[0] and "1e-02" in found.advice[0]
    assert imaml.verify.smoothness(*logistic(16, lr=0.25)).status == "smooth"
    assert "parameters" in found.cause and found.advice[0] in str(found)


def test_the_error_by_rounding_is_that_of_float32_beside_float64():
    engine, single, tasks = logistic(16, torch.float32)
    found = imaml.verify.smoothness(engine, single, tasks)
    x = torch.tensor(START).double().requires_grad_()
    (right,) = torch.autograd.grad(closed_form(x, 16), x)
    got = engine.value_and_grad(single, tasks)[1]["x"].item()
    assert found.relative_error == pytest.approx(abs(got / right.item() - 1), rel=1e-3)
    assert found.relative_error > 1e-5


def test_in_float64_parameters_are_moved_by_their_rounding_error():
    found = imaml.verify.smoothness(*logistic(16))
    assert 1e-14 < found.relative_error < 1e-10  # about 2^16 times 1e-16


def cancelling():
    """Gradients of 1e-6 that are differences of gradients of 1: float32 has a digit of them left."""
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (16,)))
    support = (torch.cat([z, -z * (1 - 1e-6)]), torch.cat([y, y]))

    def loss(params, batch, meta):
        log = meta["weight"]
        weights = torch.cat([log, 0.9999 * log]).exp() if len(batch[0]) == 32 else 1
        return (weights * (batch[0] @ params["w"] - batch[1]).square()).mean()

    meta = {"weight": torch.zeros(16, requires_grad=True)}
    objective = Objective.from_function(loss, {"w": torch.zeros(8, requires_grad=True)}, meta=meta)
    return objective, [Task(support=support, query=(z, y))]


def test_adam_at_small_gradients_is_told_of_eps_root():
    objective, tasks = cancelling()
    engine = MAML(inner=Adam(lr=0.1, steps=1))
    found = imaml.verify.smoothness(engine, objective, tasks, of=["weight"])
    assert found.status == "rounding" and found.relative_error > 1e-2
    assert "eps_root=1e-09 in Adam" in found.advice[0]
    rooted = imaml.verify.smoothness(MAML(inner=Adam(lr=0.1, steps=1, eps_root=1e-9)), objective, tasks, of=["weight"])
    assert rooted.status == "smooth" and rooted.relative_error < 5e-3 and rooted.advice == ()


def batches(examples=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, examples, 4, generator=generator, dtype=dtype), torch.randint(3, (2, 2, examples))
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def test_half_precision_is_told_of_float32():
    torch.manual_seed(0)
    model = MLP(4, 3, (8,), nn.Tanh).bfloat16()
    engine = MAML(inner=GradientDescent(lr=0.1, steps=3))
    found = imaml.verify.smoothness(
        engine, Objective(model, F.cross_entropy), batches(dtype=torch.bfloat16), tolerance=1e-3
    )
    assert found.status == "rounding" and "bfloat16" in found.cause
    assert found.advice[-1].startswith("Compute in float32")


class Folded(nn.Module):
    """A triangle wave with a kink every 1e-5: ReLU units whose slopes alternate."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.ones(1))
        self.register_buffer("kinks", 1 + 1e-5 * (torch.arange(-3000, 3000) + 0.5).double())
        self.register_buffer("slopes", torch.tensor([2.0, -2.0]).repeat(3000).double())
        self.act = nn.ReLU()

    def forward(self, batch):
        return ((self.act(self.x.double() - self.kinks) * self.slopes).sum() - self.x.sum()) * batch.sum()


def test_kinks_are_told_of_smooth_activations():
    one = torch.ones(1)
    objective = Objective(Folded(), lambda output, target: output)
    tasks = [Task(support=(torch.zeros(1), one), query=(one, one))]
    found = imaml.verify.smoothness(MAML(inner=GradientDescent(lr=0.1, steps=1)), objective, tasks)
    assert found.status == "rough"
    assert any("smooth activations" in line for line in found.advice)


@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=GradientDescent(lr=0.2, steps=5)),
        MAML(inner=GradientDescent(lr=0.2, steps=5), truncate=2),
        FOMAML(inner=GradientDescent(lr=0.2, steps=5)),
        ImplicitMAML(inner=GradientDescent(lr=0.1, steps=20), regularization=5.0),
    ],
    ids=["MAML", "truncated", "FOMAML", "ImplicitMAML"],
)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore::imaml.SolverWarning")
def test_a_usual_problem_gets_no_complaint(build, engine):
    _, objective, tasks = problem(build)
    found = imaml.verify.smoothness(engine, objective, tasks)
    assert found.status == "smooth" and found.cause is None and found.advice == (), str(found)


def test_dropout_and_a_list_of_tasks_and_learned_step_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    meta = {"log_lr": torch.tensor(-2.0, requires_grad=True)}
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3))
    found = imaml.verify.smoothness(engine, Objective(model, F.cross_entropy, meta=meta), list(batches()))
    assert found.status == "smooth" and found.relative_errors.keys() == {"parameters", "log_lr"}
    assert found.agreement.keys() == {"parameters", "meta-parameters"} and found.reach == 1e-2


def test_a_bilevel_problem_is_asked_about_its_meta_parameters():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator)

    def fit(inner, meta, batch):
        return (batch[0] @ inner["w"] - batch[1]).square().mean()

    def loss(inner, meta, batch):
        return fit(inner, meta, batch) + meta["log_decay"].exp() * inner["w"].square().sum()

    meta = {"log_decay": torch.tensor(-2.0, requires_grad=True)}
    tasks = [Task(support=(x[:6], y[:6]), query=(x[6:], y[6:]))]
    engine = ImplicitMAML(inner=GradientDescent(lr=0.1, steps=100), regularization=None)
    found = imaml.verify.smoothness(engine, bilevel(loss, fit, inner={"w": torch.zeros(3)}, meta=meta), tasks)
    assert found.status == "smooth" and found.agreement.keys() == {"meta-parameters"}


@pytest.mark.parametrize("one", [False, True], ids=["TaskBatch", "list"])
def test_another_batch_in_each_step(one):
    tasks = batches(12)
    sources = [tuple(t[:, 3 * k : 3 * k + 3] for t in tasks.support) for k in range(4)]
    given = TaskBatch(support=Minibatches(sources), query=tasks.query)
    if one:
        source = Minibatches([tuple(t[0] for t in batch) for batch in sources])
        given = [Task(support=source, query=tuple(t[0] for t in tasks.query))]
    torch.manual_seed(0)
    objective = Objective(MLP(4, 3, (8,), nn.Tanh), F.cross_entropy)
    found = imaml.verify.smoothness(MAML(inner=GradientDescent(lr=0.1, steps=4)), objective, given)
    assert found.status == "smooth" and 0 < found.relative_error < 1e-4


def test_nothing_of_the_users_changes():
    engine, objective, tasks = logistic(16, torch.float32)
    before, state = objective.parameters()["x"].clone(), torch.random.get_rng_state()
    imaml.verify.smoothness(engine, objective, tasks)
    assert torch.equal(objective.parameters()["x"], before) and torch.equal(torch.random.get_rng_state(), state)


def test_a_gradient_of_zero_has_no_verdict():
    objective = Objective.from_function(
        lambda p, batch: p["x"].square().sum(), {"x": torch.zeros(2, requires_grad=True)}
    )
    one = torch.ones(1)
    engine = MAML(inner=GradientDescent(lr=0.1, steps=1))
    found = imaml.verify.smoothness(engine, objective, [Task(support=one, query=one)])
    assert found.status == "inconclusive" and "zero" in found.cause


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"engine": GradientDescent(lr=0.1, steps=1)}, TypeError, "Expected a strategy.*Got GradientDescent"),
        ({"objective": nn.Linear(4, 3)}, TypeError, "Expected an Objective.*Got Linear"),
        ({"tasks": [3]}, TypeError, "Expected a TaskBatch or a list of Task"),
        ({"tasks": []}, ValueError, "at least one task"),
        ({"of": ["nowhere"]}, ValueError, "No parameter is called 'nowhere'"),
        ({"of": "x"}, TypeError, "Expected a list of parameter names"),
        ({"of": []}, ValueError, "`of` must name at least one"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be positive"),
        ({"seed": -1}, ValueError, "`seed`"),
    ],
)
def test_bad_input(changes, error, message):
    engine, objective, tasks = logistic(2)
    given = {"engine": engine, "objective": objective, "tasks": tasks} | changes
    with pytest.raises(error, match=message):
        imaml.verify.smoothness(given.pop("engine"), given.pop("objective"), given.pop("tasks"), **given)


def test_a_model_that_does_not_run_in_float64():
    objective = Objective(nn.Linear(4, 3), lambda output, target: F.cross_entropy(output @ torch.eye(3), target))
    with pytest.raises(TypeError, match="does not run in float64"):
        imaml.verify.smoothness(MAML(inner=GradientDescent(lr=0.1, steps=1)), objective, batches())
