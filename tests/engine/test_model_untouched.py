"""Models that hold a module twice, or that a forward pass sets tensors on: right numbers, and left as found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import classification
from tests.oracles import ORACLES, model_loss, relative_error, setting, unrolled

INNER = GradientDescent(lr=0.1, steps=3)


class Twice(nn.Module):
    """A layer that is applied twice; `names` are further ones that it is registered under."""

    def __init__(self, layer, names=()):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)
        for name in names:
            self.add_module(name, layer)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.layer(x))
        return self.head(x)


class Symmetric(nn.Module):
    def forward(self, x):
        return x + x.T


def tied():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layers[2].weight = layers[0].weight
    return layers


def symmetric():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "parametrised": symmetric,
    "tied": tied,
    "batch norm": lambda: nn.BatchNorm1d(4, track_running_stats=False),
}


def state(model):
    """Every tensor that a module holds, by place, with its value."""
    held = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for group in (module.__dict__, module._parameters, module._buffers):
            held |= {f"{path}.{n}": t for n, t in group.items() if isinstance(t, torch.Tensor)}
    return held, {n: t.detach().clone() for n, t in held.items()}


def check_untouched(model, before):
    objects, values = before
    now, _ = state(model)
    assert now.keys() == objects.keys()
    assert all(t is objects[n] and torch.equal(t, values[n]) for n, t in now.items())


def engine_of(strategy, **options):
    if strategy is ImplicitMAML:
        options |= {"regularization": 5.0, "solver": Dense()}
    return strategy(inner=INNER, **options)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_a_module_of_several_names(name, chunk_size):
    plain, tasks = Twice(LAYERS[name]()).double(), classification((4,))
    model = Twice(copy.deepcopy(plain.layer), names=("again", "once_more"))
    model.head = copy.deepcopy(plain.head)
    engine, before = MAML(inner=INNER, chunk_size=chunk_size), state(model)
    s = setting(engine, tasks, model_loss(plain, F.cross_entropy), dict(plain.named_parameters()))
    got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    check_untouched(model, before)
    assert relative_error(got, unrolled(s)[1]) <= 1e-10


def test_a_module_that_a_list_has_twice():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double()
    before, objective = state(model), Objective(model, F.cross_entropy, adapt=["2", "3"])
    assert objective.adapted == ("0.weight", "0.bias", "3.weight", "3.bias")
    MAML(inner=INNER)(objective, classification((4,)))
    check_untouched(model, before)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_running_statistics_of_a_module_of_several_names(chunk_size):
    plain, tasks = Twice(nn.BatchNorm1d(4)).double(), classification((4,))
    model = Twice(copy.deepcopy(plain.layer), names=("again",))
    model.head = copy.deepcopy(plain.head)
    before = state(model)
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    found, expected = (
        engine(Objective(m, F.cross_entropy, buffers="update"), tasks).report.buffers for m in (model, plain)
    )
    check_untouched(model, before)
    assert expected["layer.num_batches_tracked"] == 2 * INNER.steps
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], b) for n, b in expected.items())


def test_running_statistics_that_two_modules_share():
    model, tasks = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), classification((4,))
    model[1].num_batches_tracked = model[0].num_batches_tracked
    before = state(model)
    report = MAML(inner=INNER)(Objective(model, F.cross_entropy, buffers="update"), tasks).report
    check_untouched(model, before)
    assert report.buffers["0.num_batches_tracked"] == 2 * INNER.steps


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_a_pruned_weight(strategy, chunk_size):
    model, tasks = Twice(nn.Linear(4, 4)).double(), classification((4,))
    prune.random_unstructured(model.layer, "weight", 0.5)
    engine, before = engine_of(strategy, chunk_size=chunk_size), state(model)
    got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    check_untouched(model, before)
    s = setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters()))
    assert relative_error(got, ORACLES[strategy](s)[1]) <= 1e-9


class Penalised(nn.Module):
    """Its forward pass leaves what the loss needs as an attribute."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(4, 3), None

    def forward(self, x):
        y = self.linear(x)
        self.last, self.penalty = y, y.square().mean()
        return y


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_what_a_forward_pass_sets_reaches_the_loss_and_does_not_stay(strategy, chunk_size):
    model, tasks = Penalised().double(), classification((4,))
    engine = engine_of(strategy, chunk_size=chunk_size)
    objective = Objective(model, lambda output, y: F.cross_entropy(output, y) + model.penalty)
    got = engine.value_and_grad(objective, tasks)[1]
    assert model.last is None
    assert not hasattr(model, "penalty")
    s = setting(
        engine,
        tasks,
        model_loss(model, lambda output, y: F.cross_entropy(output, y) + output.square().mean()),
        dict(model.named_parameters()),
    )
    assert relative_error(got, ORACLES[strategy](s)[1]) <= 1e-9


class Deep(nn.Module):
    """An LSTM with dropout, of whose weights one is normalised by a hook."""

    def __init__(self, dropout):
        super().__init__()
        self.lstm = spectral_norm(nn.LSTM(4, 5, num_layers=2, dropout=dropout, batch_first=True), "weight_hh_l0")
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_spectral_norm_leaves_the_dropout_of_its_module_on():
    model, tasks = Deep(dropout=0.9).double(), classification((6, 4))
    objective, engine, before = Objective(model, F.cross_entropy, buffers="batch"), FOMAML(inner=INNER), state(model)
    losses = set()
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.add(engine(objective, tasks).loss.item())
    check_untouched(model, before)
    assert len(losses) == 2
    assert model.lstm._forward_pre_hooks.popitem()[1].n_power_iterations == 1


def test_spectral_norm_of_a_vector_has_nothing_to_hold():
    model, tasks = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double(), classification((4,))
    parametrizations.spectral_norm(model[0], "weight")
    engine = MAML(inner=INNER)
    s = setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters()))
    got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    assert relative_error(got, unrolled(s)[1]) <= 1e-10
