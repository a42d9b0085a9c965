"""Buffers of every module that a loss or a metric can reach are as they were after a call."""

import functools
from collections import deque
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, verify
from imaml._objective.reach import modules_of
from tests.engine.cases import CLASSES, classification, mlp
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=2)
ENGINES = {
    "maml": MAML(inner=INNER),
    "one by one": MAML(inner=INNER, chunk_size=1),
    "fomaml": FOMAML(inner=INNER),
    "implicit": ImplicitMAML(inner=INNER, regularization=10.0),
    "compiled": MAML(inner=INNER, compile=True, chunk_size=1),
}


class Counting(nn.Module):
    """Replaces a buffer, writes to another, and to a third behind autograd's back."""

    def __init__(self):
        super().__init__()
        for name in ("replaced", "written", "hidden"):
            self.register_buffer(name, torch.ones(2).double())

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.written.add_(1)
        self.hidden.data.mul_(2)
        return x


def generator():
    torch.manual_seed(0)
    layers = nn.Linear(CLASSES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)
    return nn.Sequential(*layers, Counting()).double().requires_grad_(False)


GLOBAL = generator()


def by_global_name(output, target):
    return F.mse_loss(output, GLOBAL(output))


def through_another_function(output, target):
    return by_global_name(output, target) + F.cross_entropy(output, target)


class Loss:
    """An object with a network; `loss` is a method, and it can be called itself."""

    def __init__(self, network):
        self.networks = {"one": [network]}

    def loss(self, output, target):
        return F.mse_loss(output, self.networks["one"][0](output))

    __call__ = loss


class GlobalModule(nn.Module):
    """A loss that is a module, and finds another by its name."""

    def forward(self, output, target):
        return F.mse_loss(output, GLOBAL(output))


class LossModule(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, output, target):
        return F.mse_loss(output, self.network(output))


class HelperMethod:
    """Its loss is a method that its call calls."""

    def score(self, output, target):
        return F.mse_loss(output, GLOBAL(output))

    def __call__(self, output, target):
        return self.score(output, target)


class ClassAttribute:
    network = GLOBAL

    def __call__(self, output, target):
        return F.mse_loss(output, self.network(output))


class Slots:
    __slots__ = ("network",)

    def __init__(self, network):
        self.network = network

    def __call__(self, output, target):
        return F.mse_loss(output, self.network(output))


class AfterMuchData(Slots):
    __slots__ = ("data",)

    def __init__(self, network):
        self.data, self.network = [(str(i), i) for i in range(20_000)], network


def with_network(output, target, network):
    return F.mse_loss(output, network(output))


def by_default(network):
    def loss(output, target, network=network):
        return with_network(output, target, network)

    return loss


HOLDERS = {
    "closure": lambda network: lambda output, target: with_network(output, target, network),
    "global name": lambda network: by_global_name,
    "another function": lambda network: through_another_function,
    "method": lambda network: Loss(network).loss,
    "object": Loss,
    "module": LossModule,
    "module by global name": lambda network: GlobalModule(),
    "global name in a method": lambda network: HelperMethod(),
    "class attribute": lambda network: ClassAttribute(),
    "slot": Slots,
    "after much data": AfterMuchData,
    "deque": lambda network: lambda output, target, held=deque([network]): with_network(output, target, held[0]),
    "argument": lambda network: functools.partial(with_network, network=network),
    "default": by_default,
}


def network_of(holder):
    return GLOBAL if holder in _OF_GLOBAL else generator()


_OF_GLOBAL = (
    *("global name", "another function", "module by global name"),
    *("global name in a method", "class attribute"),
)


def state(module):
    return {n: b.clone() for n, b in module.named_buffers()}, {n: id(b) for n, b in module.named_buffers()}


def unchanged(module, before):
    after = state(module)
    return after[1] == before[1] and all(torch.equal(after[0][n], value) for n, value in before[0].items())


@pytest.mark.filterwarnings("ignore::imaml.CompileWarning")
@pytest.mark.parametrize(
    ("holder", "name"),
    [(holder, name) for holder in HOLDERS for name in ENGINES if name != "compiled" or holder == "closure"],
)
def test_the_buffers_of_a_module_that_the_loss_holds_never_change(holder, name):
    network, model, tasks = network_of(holder), mlp(), classification((4,))
    before, objective = state(network), Objective(model, HOLDERS[holder](network))
    ENGINES[name].value_and_grad(objective, tasks)
    assert unchanged(network, before)
    with torch.no_grad():
        ENGINES[name](objective, tasks)
    ENGINES[name].adapt(objective, (tasks.support[0][0], tasks.support[1][0]))
    assert unchanged(network, before)


def test_the_numbers_are_those_of_batch_statistics():
    network, model, tasks = generator(), mlp(), classification((4,))
    stateless = generator()
    stateless[1].track_running_stats, stateless[1].running_mean, stateless[1].running_var = False, None, None
    results = [
        MAML(inner=INNER).value_and_grad(Objective(model, HOLDERS["closure"](g)), tasks)[1]
        for g in (network, stateless)
    ]
    assert relative_error(*results) <= 1e-12


def test_a_metric_and_an_outer_loss_are_looked_at_too():
    first, second, model = generator(), generator(), mlp()
    objective = Objective(
        model,
        F.cross_entropy,
        outer_loss=HOLDERS["closure"](first),
        metric=lambda output, target: second(output).mean(),
    )
    before = state(first), state(second)
    MAML(inner=INNER)(objective, classification((4,)))
    assert unchanged(first, before[0]) and unchanged(second, before[1])


class Teaching(nn.Module):
    """A model that holds a network without registering it."""

    def __init__(self, network):
        super().__init__()
        self.body, self.unregistered = mlp(), [network]

    def forward(self, x):
        output = self.body(x)
        return output + self.unregistered[0](output)


def test_a_network_that_a_model_holds_without_registering_it_is_left_alone():
    network = generator()
    before, model = state(network), Teaching(network)
    MAML(inner=INNER)(Objective(model, F.cross_entropy), classification((4,)))
    assert unchanged(network, before)


def test_a_loss_that_calls_the_model_itself_leaves_its_buffers_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()
    before = state(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(6, 4).double()
    loss = lambda output, target: F.cross_entropy(output, target) + 0 * model(x).sum()  # noqa: E731
    objective = Objective(model, loss, adapt=["2"], buffers="batch")
    MAML(inner=INNER)(objective, classification((4,)))
    assert unchanged(model, before)


def test_the_model_of_a_function_is_left_alone_as_well():
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()

    def loss(params, batch):
        return F.cross_entropy(functional_call(network, params, (batch[0],)), batch[1])

    objective, before = Objective.from_function(loss, dict(network.named_parameters())), state(network)
    MAML(inner=INNER)(objective, classification((4,)))
    assert unchanged(network, before)


def test_verification_leaves_them_alone():
    network, tasks = generator(), classification((4,))
    network[3] = nn.Identity()  # `Counting` leads nowhere, but is not deterministic
    objective, before = Objective(mlp(), HOLDERS["closure"](network)), state(network)
    assert verify.meta_gradient(MAML(inner=INNER), objective, tasks).status == "passed"
    assert verify.hvp(objective, None, (tasks.support[0][0], tasks.support[1][0])).status == "passed"
    assert unchanged(network, before)


def test_a_failing_call_leaves_them_alone():
    network = generator()

    def broken(output, target):
        network(output)
        raise ValueError("of the user's own")

    before = state(network)
    with pytest.raises(ValueError, match="of the user's own"):
        MAML(inner=INNER)(Objective(mlp(), broken), classification((4,)))
    assert unchanged(network, before)


def test_the_walk_ends():
    circle = [F.cross_entropy]
    circle.append(circle)
    network = nn.Linear(1, 1)
    assert modules_of([functools.partial(with_network, network=network), lambda: circle, None]) == [network]
    assert modules_of([F.cross_entropy, nn.CrossEntropyLoss.forward, max]) == []


class Closed(Mapping):
    """A mapping whose entries cannot be read any more."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter("ab")

    def __getitem__(self, key):
        raise OSError("closed")


class Proxy:
    """Answers for an object that is not there."""

    @property
    def __class__(self):
        raise RuntimeError("no object")


class Trainer:
    def __init__(self, network):
        self.data, self.proxy, self.numbers, self.network = Closed(), Proxy(), list(range(5000)), network

    def loss(self, output, target):
        return F.mse_loss(output, self.network(output))


def test_no_code_of_the_user_runs_while_modules_are_looked_for():
    network = generator()
    before = state(network)
    MAML(inner=INNER)(Objective(mlp(), Trainer(network).loss), classification((4,)))
    assert unchanged(network, before)
    assert network in modules_of([Trainer(network).loss])
