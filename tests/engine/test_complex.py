"""Complex parameters: refused where they would get no gradient, right as pairs of real numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, verify
from tests.engine.cases import CLASSES, classification

INNER = GradientDescent(lr=0.1, steps=2)
HARD = GradientDescent(lr=0.1, steps=0)


class Spectral(nn.Module):
    """Multiplies by complex weights, kept as such or as pairs, with a parameter of odd size before them."""

    def __init__(self, as_pairs, as_view=False):
        super().__init__()
        self.as_view = as_view
        self.bias, self.head = nn.Parameter(torch.randn(3).double()), nn.Linear(4, CLASSES).double()
        pairs = torch.randn(4, 2).double()
        self.weight = nn.Parameter(pairs if as_pairs else torch.view_as_complex(pairs))
        self.as_pairs = as_pairs

    def forward(self, x):
        weight = torch.view_as_complex(self.weight) if self.as_pairs else self.weight
        weight = self.weight.view(torch.complex128).squeeze(-1) if self.as_view else weight
        return self.head(torch.tanh(torch.view_as_real(x * weight).sum(-1))) + self.bias


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("inner", [INNER, HARD], ids=["two steps", "no step"])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_one_that_requires_grad_and_does_not_adapt_is_refused(strategy, inner):
    objective = Objective(Spectral(False), F.cross_entropy, adapt=["head"])
    with pytest.raises(TypeError, match=r"'weight' requires grad .*Got torch.complex128.*view_as_complex") as caught:
        strategy(inner=inner)(objective, classification((4,)))
    assert "requires_grad_(False)" in str(caught.value)
    with pytest.raises(TypeError, match="'weight' requires grad"):
        verify.meta_gradient(strategy(inner=inner), objective, classification((4,)))


def test_one_that_is_a_constant_may_stay():
    model = Spectral(False)
    model.weight.requires_grad_(False)
    objective = Objective(model, F.cross_entropy)
    assert verify.meta_gradient(MAML(inner=INNER), objective, classification((4,))).status == "passed"


def test_one_of_a_function_is_refused_too():
    params = {"c": torch.ones(2, dtype=torch.complex128, requires_grad=True), "w": torch.ones(2).double()}
    objective = Objective.from_function(lambda p, b: (p["c"].abs() * p["w"] * b).sum(), params, adapt=["w"])
    with pytest.raises(TypeError, match="'c' requires grad"):
        MAML(inner=INNER)(objective, classification((4,)))


@pytest.mark.parametrize(
    "make", [lambda: Objective(Spectral(False), F.cross_entropy), lambda: Objective(Sparse(), F.mse_loss)]
)
def test_one_that_is_to_adapt_is_refused_at_once(make):
    with pytest.raises(TypeError, match="must be dense and of a real floating-point dtype"):
        make()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3).double().to_sparse())


ENGINES = {
    "vectorised": MAML(inner=INNER),
    "one by one": MAML(inner=INNER, chunk_size=1),
    "forward-over-reverse": MAML(inner=INNER, hvp="forward-over-reverse"),
    "graphs kept": MAML(inner=INNER, linearize=True),
    "fomaml": FOMAML(inner=INNER),
    "implicit": ImplicitMAML(
        inner=GradientDescent(lr=0.2, steps=200), regularization=4.0, solver=CG(max_steps=50, rtol=1e-12)
    ),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("adapt", [None, ["head", "bias"]], ids=["all adapt", "it does not"])
def test_pairs_may_lie_anywhere_in_the_flat_vector(name, adapt):
    objective = Objective(Spectral(True), F.cross_entropy, adapt=adapt)
    verdict = verify.meta_gradient(ENGINES[name], objective, classification((4,)))
    assert verdict.status == "passed", str(verdict)


def test_pairs_agree_with_complex_parameters_of_torch():
    pairs, tasks = Spectral(True), classification((4,))
    pairs_gradient = FOMAML(inner=HARD).value_and_grad(Objective(pairs, F.cross_entropy), tasks)[1]["weight"]
    whole = Spectral(False)
    whole.load_state_dict(pairs.state_dict() | {"weight": torch.view_as_complex(pairs.weight.detach())})
    losses = [F.cross_entropy(whole(task.query[0]), task.query[1]) for task in tasks]
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), whole.weight)
    torch.testing.assert_close(torch.view_as_complex(pairs_gradient.clone()), gradient)


def test_what_is_not_a_pair_keeps_the_error_of_torch():
    def loss(params, batch):
        return torch.view_as_complex(params["w"]).abs().sum()

    objective = Objective.from_function(loss, {"w": torch.ones(3).double()})
    with pytest.raises(RuntimeError, match="size of last dimension 2|must have a last dimension of size 2|of size 2"):
        FOMAML(inner=INNER)(objective, classification((4,)))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_view_as_a_complex_dtype_is_that_of_pairs(chunk_size):
    engine, tasks = MAML(inner=INNER, chunk_size=chunk_size), classification((4,))
    model = Spectral(True)
    expected = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    model.as_view = True
    found = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    torch.testing.assert_close(found, expected)
