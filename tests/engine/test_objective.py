"""Which parameters adapt, which are learned, which are constants; models, functions and hyper-networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective, Task, TaskBatch
from imaml._objective.reach import parameters_in
from tests.engine.cases import classification, mlp, oracle_setting, problem
from tests.oracles import first_order, implicit, model_loss, relative_error, setting, unrolled

INNER = GradientDescent(lr=0.2, steps=3)
ENGINES = {
    "maml": (MAML(inner=INNER, regularization=0.5), unrolled),
    "fomaml": (FOMAML(inner=INNER, regularization=0.5), first_order),
    "implicit": (ImplicitMAML(inner=INNER, solver=Dense()), implicit),
}


@pytest.fixture(params=ENGINES)
def pair(request):
    """A strategy and its oracle."""
    return ENGINES[request.param]


@pytest.mark.parametrize(
    ("adapt", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2"], ["2.weight", "2.bias"]),
        (["2.weight"], ["2.weight"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (("0", "0.weight"), ["0.weight", "0.bias"]),
        pytest.param((n for n in ["2"]), ["2.weight", "2.bias"], id="generator"),
    ],
    ids=str,
)
def test_names_modules_and_patterns_choose_what_adapts(adapt, names):
    objective = Objective(mlp(), F.cross_entropy, adapt=adapt)
    assert list(objective.adapted) == names
    assert set(objective.parameters()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_module_name_is_no_prefix_of_another():
    model = nn.ModuleDict({"head": nn.Linear(2, 1), "head2": nn.Linear(2, 1)})
    assert Objective(model, F.mse_loss, adapt=["head"]).adapted == ("head.weight", "head.bias")


def test_only_the_head_adapts_and_the_body_is_learned_through_it(pair):
    engine, oracle = pair
    model, objective, tasks = problem(mlp, adapt=["2"])
    engine(objective, tasks).loss.backward()
    _, expected = oracle(oracle_setting(engine, model, objective, tasks))
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= 1e-10


def test_frozen_parameters_are_constants(pair):
    engine, oracle = pair
    model = mlp()
    model[0].requires_grad_(False)
    tasks = classification((4,))
    objective = Objective(model, F.cross_entropy)
    assert objective.adapted == ("2.weight", "2.bias")
    _, got = engine.value_and_grad(objective, tasks)
    theta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    _, expected = oracle(setting(engine, tasks, model_loss(model, F.cross_entropy), theta))
    assert relative_error(got, expected) <= 1e-10
    engine(objective, tasks).loss.backward()
    assert model[0].weight.grad is None


def test_a_frozen_parameter_that_is_named_adapts():
    model = mlp().requires_grad_(False)
    tasks = classification((4,))
    objective = Objective(model, F.cross_entropy, adapt=["2"])
    result = MAML(inner=INNER)(objective, tasks)
    assert not result.loss.requires_grad
    before = FOMAML(inner=GradientDescent(lr=0.2, steps=0)).value_and_grad(objective, tasks)
    assert result.report.support_loss[-1].mean() < result.report.support_loss[0].mean()
    assert set(before[1]) == {"2.weight", "2.bias"}


class Branches(nn.Module):
    """Has a layer that no output depends on, in the middle of the others."""

    def __init__(self):
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "finite-difference"])
def test_unused_parameters_get_zeros_in_their_place(hvp, chunk_size):
    model, tasks = Branches().double(), classification((4,))
    objective = Objective(model, F.cross_entropy)
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
    result = engine(objective, tasks)
    result.loss.backward()
    assert result.report.unused == ("idle.weight", "idle.bias")
    assert "idle.weight" in str(result.report)
    assert not model.idle.weight.grad.any() and not model.idle.bias.grad.any()
    _, expected = unrolled(setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters())))
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= 1e-6


@pytest.mark.parametrize("engine", [e for e, _ in ENGINES.values()], ids=ENGINES)
def test_a_parameter_that_enters_linearly_is_used(engine):
    params = {n: torch.randn(3).double().requires_grad_() for n in ("curved", "linear")}

    def loss(params, batch):
        return ((params["curved"] - batch) ** 2).sum() + (params["linear"] * batch).sum()

    batch = torch.randn(2, 3).double()
    report = engine(Objective.from_function(loss, params), TaskBatch(support=batch, query=batch)).report
    assert report.unused == ()


def test_unused_anywhere_means_in_every_task():
    params = {n: torch.randn(3).double().requires_grad_() for n in ("always", "large")}

    def loss(params, batch):
        value = ((params["always"] - batch.mean(0)) ** 2).sum()
        return value + (params["large"] ** 2).sum() if len(batch) > 2 else value

    def task(n):
        return Task(support=torch.randn(n, 3).double(), query=torch.randn(n, 3).double())

    report = FOMAML(inner=INNER)(Objective.from_function(loss, params), [task(4), task(2)]).report
    assert report.unused == ()


class Tied(nn.Module):
    """The same matrix at both ends."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)) @ self.decode.weight)


def test_tied_parameters(pair):
    engine, oracle = pair
    model, tasks = Tied().double(), classification((4,))
    objective = Objective(model, F.cross_entropy)
    assert objective.adapted == ("encode.weight", "decode.bias")
    engine(objective, tasks).loss.backward()
    theta = dict(model.named_parameters())
    _, expected = oracle(setting(engine, tasks, model_loss(model, F.cross_entropy), theta))
    assert relative_error({n: p.grad for n, p in theta.items()}, expected) <= 1e-10


def test_the_other_name_of_a_tied_parameter_names_it_too():
    assert Objective(Tied(), F.cross_entropy, adapt=["decode.weight"]).adapted == ("encode.weight",)
    assert Objective(Tied(), F.cross_entropy, adapt=["decode"]).adapted == ("encode.weight", "decode.bias")


def test_a_function_of_parameters(pair):
    engine, oracle = pair
    model, objective, tasks = problem(mlp)
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    seen = []

    def loss(values, batch):
        seen.append(list(values))
        return model_loss(model, F.cross_entropy)(values, batch)

    result = engine(Objective.from_function(loss, params), tasks)
    result.loss.backward()
    _, expected = engine.value_and_grad(objective, tasks)
    assert relative_error({n: p.grad for n, p in params.items()}, expected) <= 1e-12
    assert all(names == list(params) for names in seen)


def test_integer_parameters_of_a_function_are_constants():
    params = {"w": torch.randn(3).double().requires_grad_(), "index": torch.tensor([2, 0])}

    def loss(values, batch):
        return ((values["w"][values["index"]] - batch) ** 2).sum()

    batch = torch.randn(2, 2).double()
    engine = MAML(inner=INNER)
    _, got = engine.value_and_grad(
        Objective.from_function(loss, params, adapt=["w"]), TaskBatch(support=batch, query=batch)
    )
    assert set(got) == {"w"} and got["w"][1] == 0 and got["w"][0] != 0


def test_a_hyper_network_that_produces_theta(pair):
    engine, oracle = pair
    model, _, tasks = problem(mlp)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    sizes = [s.numel() for s in shapes.values()]
    hyper, code = nn.Linear(2, sum(sizes)).double(), torch.randn(2).double()

    def produce():
        return {n: part.view(s) for (n, s), part in zip(shapes.items(), hyper(code).split(sizes), strict=True)}

    loss = model_loss(model, F.cross_entropy)
    engine(Objective.from_function(loss, produce()), tasks).loss.backward()
    produced = produce()
    _, at_theta = oracle(setting(engine, tasks, loss, produced))
    expected = torch.autograd.grad(list(produced.values()), list(hyper.parameters()), [at_theta[n] for n in produced])
    names = [n for n, _ in hyper.named_parameters()]
    got = {n: p.grad for n, p in hyper.named_parameters()}
    assert relative_error(got, dict(zip(names, expected, strict=True))) <= 1e-10


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.linear(x) * scale


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_several_inputs(form, chunk_size):
    model, tasks = TwoInputs().double(), classification((4,))

    def several(batch):
        x, y = batch
        scale = x.mean(-1, keepdim=True).exp()
        return ({"x": x, "scale": scale} if form == "dict" else [x, scale] if form == "list" else (x, scale)), y

    both = TaskBatch(support=several(tasks.support), query=several(tasks.query))
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    _, got = engine.value_and_grad(Objective(model, F.cross_entropy), both)

    def loss(params, batch):
        x, y = batch
        return F.cross_entropy(functional_call(model, params, (x, x.mean(-1, keepdim=True).exp())), y)

    _, expected = unrolled(setting(engine, tasks, loss, dict(model.named_parameters())))
    assert relative_error(got, expected) <= 1e-10


def test_targets_of_any_nesting():
    model, tasks = nn.Linear(4, 3).double(), classification((4,))

    def loss(output, target):
        return (F.cross_entropy(output, target["labels"], reduction="none") * target["weights"]).mean()

    def nested(batch):
        x, y = batch
        return x, {"labels": y, "weights": torch.ones(y.shape).double()}

    batch = TaskBatch(support=nested(tasks.support), query=nested(tasks.query))
    got = MAML(inner=INNER)(Objective(model, loss), batch).loss
    expected = MAML(inner=INNER)(Objective(model, F.cross_entropy), tasks).loss
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_the_metric_is_that_of_the_adapted_model_on_the_query_set(chunk_size):
    model, _, tasks = problem(mlp)

    def accuracy(output, y):
        return (output.argmax(-1) == y).double().mean()

    objective = Objective(model, F.cross_entropy, metric=accuracy)
    engine = FOMAML(inner=INNER, chunk_size=chunk_size)
    adapted = [engine.adapt(objective, task.support) for task in tasks]
    expected = [
        accuracy(functional_call(model, a, (t.query[0],)), t.query[1]) for a, t in zip(adapted, tasks, strict=True)
    ]
    assert torch.equal(engine(objective, tasks).report.metric, torch.stack(expected))
    with torch.no_grad():
        assert torch.equal(engine(objective, tasks).report.metric, torch.stack(expected))
    assert engine(Objective(model, F.cross_entropy), tasks).report.metric is None


def test_an_integer_metric():
    model, _, tasks = problem(mlp)
    objective = Objective(model, F.cross_entropy, metric=lambda output, y: (output.argmax(-1) == y).sum())
    assert FOMAML(inner=INNER)(objective, tasks).report.metric.dtype == torch.int64


@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse"])
def test_parameters_of_different_precision(hvp):
    params = {"half": torch.randn(3), "full": torch.randn(3).double()}
    params = {n: p.requires_grad_() for n, p in params.items()}

    def loss(params, batch):
        return ((params["half"].double() * params["full"] - batch) ** 2).sum()

    batch = torch.randn(2, 3).double()
    engine = MAML(inner=GradientDescent(lr=0.05, steps=3), hvp=hvp)
    tasks = TaskBatch(support=batch, query=batch + 1)
    result = engine(Objective.from_function(loss, params), tasks)
    result.loss.backward()
    wide = {n: p.detach().double().requires_grad_() for n, p in params.items()}
    _, expected = unrolled(setting(engine, tasks, loss, wide))
    assert {n: p.grad.dtype for n, p in params.items()} == {"half": torch.float32, "full": torch.float64}
    assert relative_error({n: p.grad.double() for n, p in params.items()}, expected) <= 1e-5


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "finite-difference"])
def test_scalar_and_empty_parameters(hvp, chunk_size):
    params = {"scale": torch.tensor(0.7), "none": torch.zeros(0, 3), "shift": torch.tensor(-0.3)}
    params = {n: p.double().requires_grad_() for n, p in params.items()}

    def loss(params, batch):
        x, y = batch
        return ((params["scale"] ** 2 * x + params["shift"] - y) ** 2).mean() + params["none"].sum()

    batch = tuple(torch.randn(2, 2, 5).double())
    tasks = TaskBatch(support=batch, query=batch)
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
    for adapt in (None, ["scale"]):
        objective = Objective.from_function(loss, params, adapt=adapt)
        assert engine.adapt(objective, tasks[0].support)["scale"].shape == ()
        _, expected = unrolled(setting(engine, tasks, loss, params, objective.adapted))
        assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-6


def test_parameters_are_read_anew_at_every_call():
    model, objective, tasks = problem(mlp)
    before = MAML(inner=INNER)(objective, tasks).loss
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[2].weight = nn.Parameter(model[2].weight.detach() / 2)
    fresh = Objective(model, F.cross_entropy)
    after = MAML(inner=INNER)(objective, tasks).loss
    assert after != before and after == MAML(inner=INNER)(fresh, tasks).loss


def test_weights_of_a_parametrization():
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 3), "weight", "householder")).double()
    tasks = classification((4,))
    engine = MAML(inner=INNER)
    _, expected = unrolled(setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters())))
    assert relative_error(engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1], expected) <= 1e-10


def weighted():
    """A loss that is a module with a tensor of its own."""
    return nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.5, 0.3]))


def accuracy(output, target):
    return (output.argmax(-1) == target).double().mean()


def test_a_float64_copy_is_complete_and_independent():
    model, losses, tasks = mlp().float(), (weighted(), weighted()), classification((4,))
    model[0].bias.requires_grad_(False)
    before, wide = copy.deepcopy(model.state_dict()), copy.deepcopy(model).double()
    copied = Objective(model, losses[0], adapt=["2"], outer_loss=losses[1], metric=accuracy).double()
    result = MAML(inner=INNER)(copied, tasks)
    result.loss.backward()
    loss = model_loss(wide, lambda z, y: F.cross_entropy(z, y, losses[0].weight.double()))
    s = setting(MAML(inner=INNER), tasks, loss, dict(wide.named_parameters()), ["2.weight", "2.bias"])
    assert relative_error({n: p.grad for n, p in copied.parameters().items()}, unrolled(s)[1]) <= 1e-10
    assert result.report.metric.shape == (3,)
    with torch.no_grad():
        for p in copied.parameters().values():
            p.zero_()
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()) and losses[0].weight.dtype == torch.float32


def test_a_float64_copy_of_a_function():
    shape = torch.arange(3.0)
    params = {"w": torch.randn(3, requires_grad=True), "index": torch.tensor([2, 0])}
    given = params["w"].detach().clone()

    def loss(values, batch):
        return ((values["w"][values["index"]] - batch) ** 2).sum()

    def outer(values, batch):
        return (values["w"] * shape.to(values["w"])).sum() + loss(values, batch)

    def size(values, batch):
        return values["w"].detach().norm() * len(batch)

    batch = torch.randn(2, 2).double()
    tasks, engine = TaskBatch(support=batch, query=batch + 1), MAML(inner=INNER)
    copied = Objective.from_function(loss, params, adapt=["w"], outer_loss=outer, metric=size).double()
    assert copied.parameters()["w"].is_leaf and copied.parameters()["w"] is not params["w"]
    result = engine(copied, tasks)
    result.loss.backward()
    start = given.double().requires_grad_()
    ends = []
    for support, query in zip(tasks.support, tasks.query, strict=True):
        w = start
        for _ in range(INNER.steps):
            w = w - INNER.lr * torch.autograd.grad(((w[[2, 0]] - support) ** 2).sum(), w, create_graph=True)[0]
        ends.append((w.detach().norm() * len(query), (w * shape.double()).sum() + ((w[[2, 0]] - query) ** 2).sum()))
    metrics, losses = (torch.stack(found) for found in zip(*ends, strict=True))
    torch.testing.assert_close(result.report.query_loss, losses.detach())
    torch.testing.assert_close(result.report.metric, metrics)
    torch.testing.assert_close(copied.parameters()["w"].grad, torch.autograd.grad(losses.mean(), start)[0])
    assert torch.equal(params["w"], given) and params["w"].grad is None


def test_a_float64_copy_of_a_model_that_cannot_be_copied():
    class Remembers(nn.Linear):
        pass

    model = Remembers(4, 3)
    model.last = model.weight * 2
    with pytest.raises(TypeError, match=r"Remembers or its loss cannot be copied \(.*with \.detach\(\)\."):
        Objective(model, F.cross_entropy).double()


def test_an_error_of_the_loss_comes_through_after_one_task_by_itself():
    calls = []

    def loss(output, target):
        calls.append(1)
        raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="^my own mistake$"):
        FOMAML(inner=INNER, chunk_size=3)(Objective(mlp(), loss), classification((4,)))
    assert len(calls) == 2  # vectorised, and by itself, which tells whether vectorising was what failed


@pytest.mark.parametrize(
    ("form", "got"),
    [(lambda x, y: {"x": x, "y": y}, "dict"), (lambda x, y: (x, y, y), "tuple of 3")],
    ids=["dict", "3"],
)
def test_a_batch_of_another_form_is_refused(form, got):
    batch = form(*classification((4,)).support)
    message = (
        rf"^A model's batch must be \(input, target\)\. Got {got}: for other batches use Objective\.from_function\.$"
    )
    with pytest.raises(ValueError, match=message):
        FOMAML(inner=INNER)(Objective(mlp(), F.cross_entropy), TaskBatch(support=batch, query=batch))


class _Renamed(nn.Linear):
    def named_parameters(self, *args, **kwargs):
        return ((f"renamed.{name}", p) for name, p in super().named_parameters(*args, **kwargs))


def _tied():
    first, last = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    last.weight = first.weight
    shared = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = nn.Sequential(
        first, nn.Sequential(shared, nn.Tanh()), shared, nn.ModuleDict({"a": last, "b": _Renamed(3, 3)})
    )
    model.register_parameter("own", nn.Parameter(torch.zeros(2)))
    model.register_parameter("none", None)
    model.register_module("nothing", None)
    return model


@pytest.mark.parametrize("build", [_tied, lambda: nn.MultiheadAttention(4, 2), lambda: _Renamed(2, 2)])
def test_parameters_have_the_names_and_the_order_of_the_model(build):
    model = build()
    assert [(n, id(p)) for n, p in parameters_in(model).items()] == [(n, id(p)) for n, p in model.named_parameters()]
