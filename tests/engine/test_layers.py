"""Layers that torch does not vectorise, or whose derivatives it gets wrong: the engine is right on them as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from tests.oracles import ORACLES, finite_difference, model_loss, query_loss, relative_error, setting

INNER = GradientDescent(lr=0.2, steps=2)
WORDS = 7


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, WORDS)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Text(nn.Module):
    def __init__(self, middle=None, **options):
        super().__init__()
        self.embed, self.middle = nn.Embedding(WORDS, 4, **options), middle or nn.Tanh()
        self.head = nn.Linear(4, WORDS)

    def forward(self, x):
        return self.head(self.middle(self.embed(x)).mean(1))


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, WORDS)

    def forward(self, x):
        y = self.linear(x[:, 0]).tanh()
        return y if y.sum() > 0 else 2 * y


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)


def flat(layer):
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), nn.Linear(3, WORDS))


MODELS = {
    "lstm": lambda: Recurrent(nn.LSTM(4, 4, batch_first=True)),
    "gru": lambda: Recurrent(nn.GRU(4, 2, batch_first=True, bidirectional=True)),
    "branching": Branching,
    "padding": lambda: Text(padding_idx=1),
    "padding from the end": lambda: Text(padding_idx=-1),
    "sparse": lambda: Text(sparse=True),
    **{
        f"orthogonal, {kind}": lambda kind=kind: flat(
            parametrizations.orthogonal(nn.Linear(20, 3), orthogonal_map=kind)
        )
        for kind in ("cayley", "matrix_exp")
    },
    "fast path": lambda: Text(encoder()).eval(),
}


def problem(name):
    model = (MODELS | WEIGHT_NORM)[name]().double()
    x = torch.randint(WORDS, (3, 9, 5)) if isinstance(model, Text) else torch.randn(3, 9, 5, 4, dtype=torch.float64)
    y = torch.randint(WORDS, (3, 9))
    tasks = TaskBatch(support=(x[:, :4], y[:, :4]), query=(x[:, 4:], y[:, 4:]))
    return model, Objective(model, F.cross_entropy), tasks


WEIGHT_NORM = {
    f"weight norm, dim={dim}": lambda dim=dim: flat(parametrizations.weight_norm(nn.Linear(20, 3), dim=dim))
    for dim in (0, 1, -1)
} | {"weight norm by a hook": lambda: flat(nn.utils.weight_norm(nn.Linear(20, 3)))}


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
@pytest.mark.parametrize("name", MODELS)
def test_layers(name, strategy, chunk_size) -> None:
    model, objective, tasks = problem(name)
    options = {"regularization": 5.0, "solver": CG(max_steps=200, rtol=1e-13)} if strategy is ImplicitMAML else {}
    engine = strategy(inner=INNER, chunk_size=chunk_size, **options)
    plain = Text().double() if name == "sparse" else model.train()
    if plain is not model:
        plain.load_state_dict(model.state_dict())
    s = setting(engine, tasks, model_loss(plain, F.cross_entropy), dict(plain.named_parameters()))
    expected = ORACLES[strategy](s)[1]
    model.train(name != "fast path")
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-9


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", WEIGHT_NORM)
def test_weight_norm_whose_second_derivative_torch_gets_wrong(name, chunk_size) -> None:
    model, objective, tasks = problem(name)
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    s = setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters()))
    loss, grads = engine.value_and_grad(objective, tasks)
    assert abs(loss - query_loss(s, s.theta)) <= 1e-14
    for _ in range(3):
        direction = {n: torch.randn_like(p) for n, p in s.theta.items()}
        slope = sum((grads[n] * d).sum() for n, d in direction.items())
        assert slope == pytest.approx(finite_difference(s, direction).item(), rel=1e-7, abs=1e-9)


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(WORDS, 4, **options), nn.Linear(4, WORDS)

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("kind", [Text, Bags])
def test_an_embedding_that_renormalises_its_weight_is_refused(kind) -> None:
    model = kind(max_norm=1.0).double()
    x, y = torch.randint(WORDS, (2, 4, 5)), torch.randint(WORDS, (2, 4))
    before = model.embed.weight.detach().clone()
    with pytest.raises(ValueError, match=r"max_norm=1.0 changes its weight in place.*max_norm=None"):
        MAML(inner=INNER)(Objective(model, F.cross_entropy), TaskBatch(support=(x, y), query=(x, y)))
    assert torch.equal(model.embed.weight, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_bags_with_sparse_gradients_are_as_those_with_dense_ones(strategy, mode) -> None:
    sparse = Bags(mode=mode, sparse=True, padding_idx=1).double()
    dense = Bags(mode=mode, padding_idx=1).double()
    dense.load_state_dict(sparse.state_dict())
    x, y = torch.randint(WORDS, (3, 9, 5)), torch.randint(WORDS, (3, 9))
    tasks = TaskBatch(support=(x[:, :4], y[:, :4]), query=(x[:, 4:], y[:, 4:]))
    engine = strategy(inner=INNER)
    found, expected = (engine.value_and_grad(Objective(m, F.cross_entropy), tasks)[1] for m in (sparse, dense))
    assert relative_error(found, expected) == 0


def test_dropout_of_a_model_that_cannot_be_vectorised_is_replayed() -> None:
    layer = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(20, 4))
    model = nn.Sequential(layer, nn.Unflatten(1, (1, 4)), Recurrent(nn.GRU(4, 4, batch_first=True))).double()
    x, y = torch.randn(3, 8, 5, 4, dtype=torch.float64), torch.randint(WORDS, (3, 8))
    tasks = TaskBatch(support=(x[:, :4], y[:, :4]), query=(x[:, 4:], y[:, 4:]))
    engine = MAML(inner=INNER)
    state = torch.get_rng_state()
    first = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    torch.set_rng_state(state)
    again = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    assert relative_error(again, first) <= 1e-14
