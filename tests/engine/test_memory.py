"""Peak memory as the inner loop grows: the allocator's own account of a small transformer."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._curvature import product
from imaml.measure import peak_memory
from tests.losses import curvature, gradient, loss_of

VOCABULARY, WIDTH, LENGTH = 50, 32, 12
STEPS = (1, 4, 12)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)).mean(1))


@cache
def problem():
    torch.manual_seed(0)
    model = Classifier()

    def batch():
        return torch.randint(VOCABULARY, (1, 4, LENGTH)), torch.randint(5, (1, 4))

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Objective(model, F.cross_entropy), TaskBatch(support=batch(), query=batch()), size


def peaks(strategy, steps=STEPS, **options):
    objective, tasks, _ = problem()
    engines = [strategy(inner=GradientDescent(lr=0.01, steps=k), **options) for k in steps]
    engines[-1](objective, tasks)  # what torch sets up once
    return [peak_memory(lambda engine=engine: engine(objective, tasks)) for engine in engines]


def flat(sizes):
    return max(sizes) <= 1.05 * min(sizes)


def test_fomaml_is_flat_in_the_number_of_inner_steps():
    assert flat(peaks(FOMAML))


def test_implicit_maml_is_flat_in_the_number_of_inner_steps():
    for linearize in (True, False):
        assert flat(peaks(ImplicitMAML, solver=CG(max_steps=3, rtol=0.0), linearize=linearize, on_failure="ignore"))


def test_the_error_bound_needs_one_vector_more_than_the_solve():
    """The slope; its evaluation elsewhere begins when the solve has given its memory back."""
    theta, solver = problem()[2], CG(max_steps=3, rtol=0.0)
    for linearize in (True, False):
        options = {"steps": (2,), "solver": solver, "linearize": linearize, "on_failure": "ignore"}
        (without,), (peak,) = (peaks(ImplicitMAML, error_bound=wanted, **options) for wanted in (False, True))
        assert peak <= without + 1.2 * theta


def of_a_product():
    """What one takes besides the parameters it is taken at and the vector it is taken along, nothing being kept."""
    objective, tasks, _ = problem()
    support, phi = loss_of(objective, tasks.support)

    def product():
        return curvature(support, phi).product(phi)

    product()  # what torch sets up once
    return peak_memory(product)


def test_maml_holds_its_states_and_two_vectors_beside_a_product():
    """The cotangent, and its multiple that the product is taken along; at the first step, theta is the state."""
    theta, product = problem()[2], of_a_product()
    for steps in (1, 4):
        (peak,) = peaks(MAML, steps=(steps,), linearize=False)
        states = max(steps - 1, 1)
        assert product < peak <= product + (states + 2.3) * theta


def test_implicit_maml_holds_seven_vectors_beside_a_product():
    """Phi, the query gradient, the slope, and those of CG: b, x, r and p; theta is not among them."""
    theta, product = problem()[2], of_a_product()
    options = {"solver": CG(max_steps=3, rtol=0.0), "linearize": False, "on_failure": "ignore"}
    (peak,) = peaks(ImplicitMAML, steps=(4,), **options)
    assert product < peak <= product + 7.3 * theta


def test_fomaml_holds_the_adapted_parameters_beside_a_gradient():
    objective, tasks, theta = problem()
    support, phi = loss_of(objective, tasks.support)
    least = peak_memory(lambda: gradient(support, phi))
    (peak,) = peaks(FOMAML, steps=(4,))
    assert least < peak <= least + 1.1 * theta


def test_maml_grows_by_one_state_a_step():
    theta = problem()[2]
    sizes = peaks(MAML, linearize=False)
    growth = [(b - a) / (n - m) for (m, a), (n, b) in pairwise(zip(STEPS, sizes, strict=True))]
    assert all(0.5 * theta < g <= 1.15 * theta for g in growth)


def test_maml_with_checkpoints_is_flat_beyond_their_number():
    """Held beyond what one step needs are the checkpoints, the state at hand, and a cotangent."""
    theta, count = problem()[2], 4
    sizes = peaks(MAML, steps=(1, 12, 20), checkpoints=count)
    assert flat(sizes[1:])
    assert sizes[-1] - sizes[0] <= 1.05 * theta * (count + 2)
    assert peaks(MAML, steps=(12,), checkpoints=0)[0] < sizes[1]


def test_nothing_is_held_after_the_call_but_the_gradients():
    objective, tasks, theta = problem()
    engine = MAML(inner=GradientDescent(lr=0.01, steps=4))
    engine(objective, tasks)
    results = []
    one = peak_memory(lambda: results.append(engine(objective, tasks)))
    assert peak_memory(lambda: results.append(engine(objective, tasks))) <= 1.01 * one
    held = sum(t.numel() * t.element_size() for t in results[0].loss.grad_fn.saved_tensors)
    assert held == theta


@pytest.mark.parametrize("slices", [None, 2])
def test_a_product_of_long_parameters_holds_a_vector_less(monkeypatch, slices):
    """The numbers of the gradient that it differentiates, which nothing reads, are let go."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))
    x, y = torch.randn(2, 1, 4, 128)
    loss, phi = loss_of(Objective(model, F.mse_loss), (x, y))
    loss = replace(loss, size=slices)

    def peak(least):
        monkeypatch.setattr(product, "LONG", least)
        curvature(loss, phi).product(phi)
        return peak_memory(lambda: curvature(loss, phi).product(phi))

    with torch.no_grad():
        assert peak(1) <= peak(2**40) - 0.9 * phi.nbytes
