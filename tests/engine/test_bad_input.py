"""What cannot be computed is refused with an error of the right type, which names the thing and the remedy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import (
    CG,
    FOMAML,
    MAML,
    DivergenceError,
    GradientDescent,
    ImplicitMAML,
    NonFiniteError,
    Objective,
    Task,
    TaskBatch,
)
from tests.engine.cases import classification, mlp, problem
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=3)
STRATEGIES = (MAML, FOMAML, ImplicitMAML)


def call(objective, tasks, engine=None):
    return (engine or MAML(inner=INNER))(objective, tasks)


# The configuration


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradientDescent(lr=0.0, steps=1), ValueError, "`lr` must be .*positive.*Got 0"),
        (lambda: GradientDescent(lr=-1.0, steps=1), ValueError, "`lr`.*Got -1"),
        (lambda: GradientDescent(lr=float("nan"), steps=1), ValueError, "`lr`.*Got nan"),
        (lambda: GradientDescent(lr=float("inf"), steps=1), ValueError, "`lr`.*Got inf"),
        (lambda: GradientDescent(lr="0.1", steps=1), TypeError, "`lr` .*Got '0.1'"),
        (lambda: GradientDescent(lr=0.1, steps=-1), ValueError, "`steps` must be >= 0.*Got -1"),
        (lambda: GradientDescent(lr=0.1, steps=2.0), TypeError, "`steps` must be an integer.*Got 2.0"),
        (lambda: GradientDescent(lr=0.1, steps=True), TypeError, "`steps` must be an integer.*Got True"),
        (lambda: MAML(inner=0.1), TypeError, "`inner` must be.*GradientDescent.*Got 0.1"),
        (lambda: MAML(inner=INNER, regularization=-1.0), ValueError, "`regularization` must be >= 0.*Got -1"),
        (lambda: MAML(inner=INNER, regularization=float("nan")), ValueError, "`regularization`.*Got nan"),
        (lambda: MAML(inner=INNER, regularization="2"), TypeError, "`regularization` .*Got '2'"),
        (lambda: MAML(inner=INNER, regularization={"a": -1.0}), ValueError, "`regularization`.*Got -1.0 for 'a'"),
        (lambda: MAML(inner=INNER, checkpoints=-1), ValueError, "`checkpoints`.*>= 0.*Got -1"),
        (lambda: MAML(inner=INNER, hvp="exact"), ValueError, "`hvp` must be one of auto.*Got 'exact'"),
        (lambda: MAML(inner=INNER, chunk_size=0), ValueError, "`chunk_size`.*>= 1.*Got 0"),
        (lambda: FOMAML(inner=INNER, chunk_size=2.5), TypeError, "`chunk_size`.*Got 2.5"),
        (lambda: ImplicitMAML(inner=INNER, regularization=0.0), ValueError, "`regularization` must be > 0.*Got 0"),
        (lambda: ImplicitMAML(inner=INNER, regularization={"a": 1.0, "b": 0.0}), ValueError, "> 0.*b"),
        (lambda: ImplicitMAML(inner=INNER, damping=-1.0), ValueError, "`damping` must be >= 0, or 'auto'. Got -1"),
        (lambda: ImplicitMAML(inner=INNER, damping=float("nan")), ValueError, "`damping`.* must be finite. Got nan"),
        (lambda: ImplicitMAML(inner=INNER, damping="lm"), TypeError, "`damping`.* must be a number. Got 'lm'"),
        (lambda: ImplicitMAML(inner=INNER, solver="cg"), TypeError, "`solver` must be a LinearSolver.*Got 'cg'"),
        (lambda: ImplicitMAML(inner=INNER, solver=CG), TypeError, "`solver` must be a LinearSolver"),
        (lambda: ImplicitMAML(inner=INNER, on_failure="stop"), ValueError, "`on_failure` must be.*Got 'stop'"),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"0.weight": 1.0, "0.bias": 1.0, "2.weight": 1.0}, r"Missing: \['2.bias'\]"),
        ({"0.weight": 1.0, "0.bias": 1.0, "2.weight": 1.0, "2.bias": 1.0, "3": 1.0}, r"unknown: \['3'\]"),
    ],
    ids=["missing", "unknown"],
)
def test_regularization_by_name(given, message):
    _, objective, tasks = problem(mlp)
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match=message):
            call(objective, tasks, strategy(inner=INNER, regularization=given))


# The objective


def complex_model():
    return nn.ParameterDict({"weight": torch.ones(2, dtype=torch.cfloat)})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Objective(F.relu, F.mse_loss), TypeError, "Expected an nn.Module.*from_function"),
        (lambda: Objective(mlp(), "mse"), TypeError, "`loss` must be callable.*Got str"),
        (lambda: Objective(mlp(), F.mse_loss, metric="accuracy"), TypeError, "`metric` must be callable.*Got str"),
        (lambda: Objective(nn.ReLU(), F.mse_loss), ValueError, "No parameter to adapt.*requires_grad"),
        (lambda: Objective(mlp().requires_grad_(False), F.mse_loss), ValueError, "No parameter to adapt among 4"),
        (lambda: Objective(mlp(), F.mse_loss, adapt=[]), ValueError, "No parameter to adapt.*`adapt`"),
        (lambda: Objective(mlp(), F.mse_loss, adapt=["2.wieght"]), ValueError, "'2.wieght'.*Close to it: 2.weight"),
        (lambda: Objective(mlp(), F.mse_loss, adapt=["body.*"]), ValueError, r"'body.\*'"),
        (lambda: Objective(mlp(), F.mse_loss, adapt="2"), TypeError, r"list of parameter names.*write \['2'\]"),
        (lambda: Objective(mlp(), F.mse_loss, adapt=[2]), TypeError, "parameter names.*Got 2"),
        (lambda: Objective(nn.LazyLinear(2), F.mse_loss), ValueError, "'weight' is not initialised.*forward pass"),
        (lambda: Objective(complex_model(), F.mse_loss), TypeError, "'weight'.*complex64"),
        (lambda: Objective.from_function(F.mse_loss, {}), ValueError, "No parameter to adapt"),
        (lambda: Objective.from_function(F.mse_loss, {"i": torch.ones(2).long()}), TypeError, "'i'.*int64"),
        (lambda: Objective.from_function(F.mse_loss, {"i": 1.0}), TypeError, "'i'.*tensor.*Got float"),
    ],
)
def test_objective(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_integer_parameter_that_is_named():
    model = mlp()
    model.register_parameter("table", nn.Parameter(torch.ones(2).long(), requires_grad=False))
    Objective(model, F.cross_entropy)
    with pytest.raises(TypeError, match="'table'.*floating.*Got torch.int64: leave it out"):
        Objective(model, F.cross_entropy, adapt=["table", "2"])


# The loss


def test_nan_at_first_names_the_task():
    _, objective, tasks = problem(mlp, tasks=4)
    tasks.support[0][2, 0, 0] = torch.nan
    for strategy in STRATEGIES:
        for chunk_size in (None, 1, 3):
            with pytest.raises(NonFiniteError, match="support loss of task 2 is nan at inner step 0.*data"):
                call(objective, tasks, strategy(inner=INNER, chunk_size=chunk_size))
    with pytest.raises(NonFiniteError, match="support loss of task 2"), torch.no_grad():
        call(objective, tasks)
    with pytest.raises(NonFiniteError, match="support loss of task 0 is nan"):
        MAML(inner=INNER).adapt(objective, tasks[2].support)


def test_a_ragged_list_names_the_position_in_the_list():
    _, objective, _ = problem(mlp)
    tasks = [classification((4,), tasks=1, support=n)[0] for n in (2, 3, 2, 3)]
    tasks[2].support[0][:] = torch.inf
    with pytest.raises(NonFiniteError, match="task 2"):
        call(objective, tasks)


def test_nan_in_the_query_set():
    _, objective, tasks = problem(mlp)
    tasks.query[0][1] = torch.inf
    for strategy in STRATEGIES:
        with pytest.raises(NonFiniteError, match="query loss of task 1 is nan after 3 inner steps.*query data"):
            call(objective, tasks, strategy(inner=INNER))
    with pytest.raises(NonFiniteError, match="query loss of task 1"), torch.no_grad():
        call(objective, tasks)


def quartic(params, batch):
    return ((params["w"] - batch) ** 4).sum()


def test_divergence_names_task_and_step():
    tasks = TaskBatch(support=torch.tensor([[0.1], [50.0]]), query=torch.zeros(2, 1))
    objective = Objective.from_function(quartic, {"w": torch.zeros(1, requires_grad=True)})
    for strategy in STRATEGIES:
        with pytest.raises(DivergenceError, match="task 1 diverged.*inner step 1.*smaller inner step size than lr=0.1"):
            call(objective, tasks, strategy(inner=INNER))
    with pytest.raises(DivergenceError, match="task 0 diverged"):
        MAML(inner=INNER).adapt(objective, torch.tensor([50.0]))
    with pytest.raises(NonFiniteError, match="query loss of task 1 is inf after 1 inner steps.*smaller.*lr=10000"):
        call(objective, tasks, MAML(inner=GradientDescent(lr=1e5, steps=1)))


def test_an_infinite_second_derivative():
    params = {"w": torch.zeros(2).double().requires_grad_()}
    objective = Objective.from_function(lambda p, batch: ((p["w"].abs() + batch) ** 1.5).sum(), params)
    zero = torch.zeros(1, 2).double()
    with pytest.raises(NonFiniteError, match="meta-gradient of task 0.*infinite second derivative"):
        call(objective, TaskBatch(support=zero, query=zero + 1))


def test_an_infinite_gradient_of_a_fixed_parameter():
    params = {n: torch.zeros(()).double().requires_grad_() for n in ("w", "scale")}
    objective = Objective.from_function(
        lambda p, batch: ((p["w"] - batch) ** 2).sum() + p["scale"].sqrt(), params, adapt=["w"]
    )
    data = torch.ones(1, 2).double()
    for strategy in STRATEGIES:
        with pytest.raises(NonFiniteError, match="meta-gradient.*not finite"):
            call(objective, TaskBatch(support=data, query=data), strategy(inner=INNER))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), ValueError, r"scalar.*Got shape \(5,\): reduce.*mean"),
        (lambda o, y: F.cross_entropy(o, y)[None], ValueError, r"scalar.*Got shape \(1,\)"),
        (lambda o, y: 1.0, TypeError, "must return a tensor. Got float"),
        (lambda o, y: None, TypeError, "must return a tensor. Got NoneType"),
        (lambda o, y: (F.cross_entropy(o, y), o), TypeError, "must return a tensor. Got tuple"),
        (lambda o, y: (o.argmax(-1) == y).sum(), TypeError, "floating-point.*int64"),
        (lambda o, y: o.sum() * 1j, TypeError, "floating-point.*complex"),
        (lambda o, y: F.cross_entropy(o, y).detach(), ValueError, r"support loss depends on no adapted.*\.detach\(\)"),
        (lambda o, y: F.cross_entropy(o.detach(), y), ValueError, "depends on no adapted parameter"),
    ],
)
def test_losses(loss, error, message, chunk_size):
    tasks = classification((4,))
    for strategy in STRATEGIES:
        with pytest.raises(error, match=message):
            call(Objective(mlp(), loss), tasks, strategy(inner=INNER, chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (lambda o, y: 1.0, TypeError, "metric must return a tensor. Got float"),
        (lambda o, y: o.argmax(-1) == y, ValueError, r"metric must be a scalar.*Got shape \(6,\)"),
    ],
)
def test_metrics(metric, error, message, chunk_size):
    objective = Objective(mlp(), F.cross_entropy, metric=metric)
    with pytest.raises(error, match=message):
        call(objective, classification((4,)), MAML(inner=INNER, chunk_size=chunk_size))


# The model


def test_batchnorm_with_running_statistics():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    tasks, objective = classification((4,)), Objective(model, F.cross_entropy)
    before = [b.clone() for b in model.buffers()]
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match=r"BatchNorm1d '1'.*track_running_stats=False.*\.eval\(\)"):
            call(objective, tasks, strategy(inner=INNER))
    with pytest.raises(ValueError, match="BatchNorm1d '1'"):
        MAML(inner=INNER).adapt(objective, tasks[0].support)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    model[1].eval()
    for hvp in ("auto", "forward-over-reverse", "finite-difference"):
        for chunk_size in (None, 1):
            assert call(objective, tasks, MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)).loss.isfinite()


class Counting(nn.Module):
    """Updates a buffer of its own in every forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()).double())

    def forward(self, x):
        self.seen += 1
        return self.linear(x) * self.seen


def test_buffers_that_a_forward_pass_changes_are_the_same_in_every_evaluation():
    model, tasks = Counting().double(), classification((4,))
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict(model.linear.state_dict())
    engine = MAML(inner=INNER, chunk_size=1)
    _, got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)
    _, expected = engine.value_and_grad(Objective(plain, F.cross_entropy), tasks)
    assert relative_error({n.removeprefix("linear."): g for n, g in got.items()}, expected) <= 1e-12
    assert model.seen == 0


def test_errors_of_the_model_come_through_unchanged():
    objective = Objective(nn.Linear(7, 3).double(), F.cross_entropy)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(objective, classification((4,)), MAML(inner=INNER, chunk_size=1))


# The tasks


def test_numbers_of_tasks_differ():
    with pytest.raises(ValueError, match=r"same number of tasks.*\[3\] in support and \[4\] in query"):
        TaskBatch(support=(torch.ones(3, 2), torch.ones(3)), query=(torch.ones(4, 2), torch.ones(4)))
    with pytest.raises(ValueError, match=r"same number of tasks.*\[2, 3\] in support"):
        TaskBatch(support=(torch.ones(3, 2), torch.ones(2)), query=(torch.ones(3, 2), torch.ones(3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TaskBatch(support=torch.ones(0, 2), query=torch.ones(0, 2)), ValueError, "at least one task"),
        (lambda: TaskBatch(support=torch.tensor(1.0), query=torch.ones(1)), ValueError, "0-dim"),
        (lambda: TaskBatch(support=(), query=()), ValueError, "`support` holds no tensor"),
        (lambda: TaskBatch(support=[1, 2], query=torch.ones(2)), TypeError, "must be a tensor. Got int.*as_tensor"),
        (lambda: Task(support=(torch.ones(2), None), query=torch.ones(2)), TypeError, "`support` must be a tensor"),
    ],
)
def test_tasks(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_arguments_of_a_call(strategy):
    model, objective, tasks = problem(mlp)
    engine = strategy(inner=INNER)
    for bad, error, message in (
        ([], ValueError, "at least one task. Got an empty list"),
        (tasks[0], TypeError, "TaskBatch or a list of Task. Got Task"),
        (tasks.support, TypeError, "TaskBatch or a list of Task. Got.*Tensor"),
        ([tasks, tasks], TypeError, "TaskBatch or a list of Task. Got.*TaskBatch"),
        (None, TypeError, "Got NoneType"),
    ):
        with pytest.raises(error, match=message):
            engine(objective, bad)
        with pytest.raises(error, match=message):
            engine.value_and_grad(objective, bad)
    with pytest.raises(TypeError, match="Expected an Objective.*Got Sequential"):
        engine(model, tasks)
    with pytest.raises(TypeError, match="Expected an Objective.*Got Sequential"):
        engine.adapt(model, tasks[0].support)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_batches_that_are_not_input_and_target(chunk_size):
    objective = Objective(mlp(), F.mse_loss)
    x = torch.randn(2, 5, 4).double()
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    for batch, message in ((x, "Got Tensor"), ((x, x, x), "Got tuple of 3"), ({"x": x, "y": x}, "Got dict")):
        with pytest.raises(ValueError, match=rf"must be \(input, target\).*{message}.*from_function"):
            call(objective, TaskBatch(support=batch, query=batch), engine)


@pytest.mark.parametrize("support", [None, 3.0, classification((4,))[0]], ids=["None", "float", "Task"])
def test_adapt_wants_one_support_set(support):
    with pytest.raises(TypeError, match="must be a tensor. Got"):
        MAML(inner=INNER).adapt(Objective(mlp(), F.cross_entropy), support)
