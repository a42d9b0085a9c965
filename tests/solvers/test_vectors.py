"""Long vectors go block by block: the same numbers, and no other vector of that length."""

import pytest
import torch

from imaml.measure import peak_memory
from imaml_solvers import CG, LinearOperator, Status, _vectors
from imaml_solvers._vectors import add_where, dot, largest_entry, largest_of_sum, norm, norm_of_sum

SHAPES = [(17,), (1, 17), (3, 17), (2, 3, 17), (0, 17)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_vectors, "_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_whole_vectors(shape):
    x, y, factor = torch.randn(shape).double(), torch.randn(shape).double(), torch.randn(*shape[:-1], 1).double()
    torch.testing.assert_close(dot(x, y), (x * y).sum(-1))
    total = x + factor * y
    torch.testing.assert_close(norm_of_sum(x, factor, y), total.norm(dim=-1))
    torch.testing.assert_close(largest_of_sum(x, factor, y), total.abs().amax(-1))
    assert torch.equal(largest_entry(x), x.abs().amax(-1))


@pytest.mark.usefixtures("small_blocks")
def test_norms_outlast_squares_that_leave_the_range():
    x = torch.randn(5, 17)
    scale = torch.tensor([1e-38, 1e-21, 1.0, 1e19, 1e37]).unsqueeze(-1)
    torch.testing.assert_close(norm(x * scale) / scale.squeeze(-1), norm(x), rtol=1e-5, atol=0)
    bad = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    torch.testing.assert_close(norm(bad), torch.tensor([0.0, torch.inf, torch.nan]), equal_nan=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_chosen_change(shape, every):
    x, y, factor = torch.randn(shape).double(), torch.randn(shape).double(), torch.randn(*shape[:-1], 1).double()
    chosen = torch.arange(factor.numel()).reshape(shape[:-1]) % every == 0
    before = x.clone()
    add_where(chosen, x, factor, y)
    assert torch.equal(x[~chosen], before[~chosen])
    torch.testing.assert_close(x[chosen], (before + factor * y)[chosen])


@pytest.mark.usefixtures("small_blocks")
def test_vectors_that_are_differentiated_stay_whole():
    x = torch.randn(3, 17, requires_grad=True)
    (largest_entry(x) + dot(x, x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad((x.abs().amax(-1) + (x * x).sum(-1)).sum(), x)[0])


@pytest.mark.usefixtures("small_blocks")
def test_many_systems_stay_whole():
    x = torch.randn(300, 4)
    assert [scratch for scratch, _ in _vectors._blocks(x)] == [None]
    assert len(list(_vectors._blocks(x[:2]))) == 1 and len(list(_vectors._blocks(x[:3]))) == 2


def test_a_solve_is_the_same_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 20, 20, generator=generator, dtype=torch.float64)
    op = LinearOperator.from_matrix(factors @ factors.mT + torch.eye(20))
    b = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    solver = CG(rtol=1e-12)
    whole = solver.solve(op, b)
    monkeypatch.setattr(_vectors, "_BLOCK", 8)
    parts = solver.solve(op, b)
    assert torch.equal(parts.status, whole.status) and bool((parts.status == Status.CONVERGED).all())
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_what_is_not_finite_in_one_block_stops_its_system_alone():
    diagonal = torch.linspace(1, 4, 40, dtype=torch.float64).repeat(2, 1)

    def mv(x):
        product = diagonal * x
        product[1, 33] = torch.nan
        return product

    solution = CG(rtol=1e-10).solve(LinearOperator(mv), torch.ones(2, 40, dtype=torch.float64))
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert torch.equal(solution.x[1], torch.zeros(40, dtype=torch.float64))
    torch.testing.assert_close(solution.x[0], 1 / diagonal[0])


def test_a_step_holds_no_vector_besides():
    """b, x, r and p; and A p, or another p."""
    n = 2**20
    diagonal, b = torch.linspace(1, 2, n), torch.ones(n)
    solver, op = CG(max_steps=4), LinearOperator(lambda x: x * diagonal)
    solver.solve(op, b)
    assert peak_memory(lambda: solver.solve(op, b)) <= 5.6 * b.nbytes


def test_operator_and_preconditioner_may_keep_what_they_are_given():
    diagonal = torch.linspace(1, 9, 12, dtype=torch.float64).repeat(2, 1)
    seen = []

    def kept(factor):
        def mv(x):
            seen.append((x, x.clone()))
            return factor * x

        return LinearOperator(mv)

    solution = CG(rtol=1e-10).solve(kept(diagonal), torch.ones_like(diagonal), preconditioner=kept(diagonal**-0.5))
    assert bool(solution.success.all()) and all(torch.equal(x, before) for x, before in seen)
