"""The direct solve."""

import pytest
import torch

from imaml_solvers import Dense, Status
from tests.solvers.systems import F64, Recorded, noise, residual, rotated, spread


def test_an_unsymmetric_matrix_is_solved_and_not_its_transpose():
    matrix, b = noise(3, 6, 6, seed=4), noise(3, 6)
    solution = Dense().solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all()
    assert (residual(matrix, solution.x, b) <= 1e-12 * b.norm(dim=-1)).all()


def test_it_costs_n_products():
    op = Recorded(rotated(spread(6, 10)).expand(2, 6, 6))
    solution = Dense().solve(op, noise(2, 6))
    assert len(op.seen) == 6 and (solution.num_steps == 6).all()


def test_an_ill_conditioned_matrix_is_solved_to_rounding():
    matrix, b = rotated(spread(10, 1e12)), noise(10)
    solution = Dense().solve(matrix, b)
    assert solution.status == Status.CONVERGED and residual(matrix, solution.x, b) <= 1e-14 * solution.x.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_a_matrix_singular_to_rounding_is_a_breakdown(dtype, seed):
    spectrum = torch.linspace(0, 1, 20, dtype=F64)
    b = noise(2, 20, seed=seed).to(dtype)
    matrix = torch.stack([rotated(spectrum, seed), rotated(spectrum + 0.1, seed)]).to(dtype)
    solution = Dense().solve(matrix, b)
    assert solution.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED]
    assert (solution.x[0] == 0).all() and solution.residual_norm[0].item() == pytest.approx(b[0].norm().item())


def test_half_precision_is_accepted():
    solution = Dense().solve(torch.eye(3, dtype=torch.bfloat16) * 2, torch.ones(3, dtype=torch.bfloat16))
    assert solution.x.tolist() == [0.5] * 3
    found = solution.x, solution.residual_norm, solution.smallest_eigenvalue
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)


def test_the_residual_of_a_system_that_is_not_finite_is_that_of_zero():
    matrix = torch.stack([torch.eye(3, dtype=F64), 2 * torch.eye(3, dtype=F64)])
    matrix[0, 1, 2] = torch.inf
    b = noise(2, 3)
    solution = Dense().solve(matrix, b)
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    assert (solution.x[0] == 0).all() and solution.residual_norm[0].item() == pytest.approx(b[0].norm().item())


@pytest.mark.parametrize(("share", "status"), [(0.1, Status.BREAKDOWN), (0.001, Status.CONVERGED)])
def test_singular_is_where_rounding_reaches_a_hundredth_of_b(share, status):
    matrix = torch.ones(2, 2, dtype=F64)
    matrix[1, 1] += 2 * torch.finfo(F64).eps / share
    assert Dense().solve(matrix, torch.tensor([0.0, 1.0], dtype=F64)).status == status


@pytest.mark.parametrize(
    ("diagonal", "dtype"),
    [([1.0, 1.5], torch.bfloat16), ([1.0, 20.0], torch.float16), ([1e4, 1e-4], torch.float32)],
)
def test_a_regular_matrix_is_solved_in_every_dtype_and_whatever_the_scale_of_its_rows(diagonal, dtype):
    diagonal = torch.tensor(diagonal, dtype=dtype)
    solution = Dense().solve(torch.diag(diagonal), torch.ones(2, dtype=dtype))
    assert solution.status == Status.CONVERGED
    torch.testing.assert_close(solution.x, 1 / diagonal)


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_the_scale_of_rows_and_columns_hides_no_singular_matrix_and_makes_none(least):
    rows, columns = torch.logspace(-8, 8, 6, dtype=F64).unsqueeze(-1), torch.logspace(6, -6, 6, dtype=F64)
    matrix = rotated([least, 1.0, 1.5, 2.0, 3.0, 4.0])
    solution = Dense().solve(rows * matrix * columns, rows.squeeze(-1) * noise(6))
    assert solution.status == (Status.CONVERGED if least else Status.BREAKDOWN)
    if least:
        torch.testing.assert_close(solution.x * columns, torch.linalg.solve(matrix, noise(6)))


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, -100), (torch.float32, 100), (F64, -700), (F64, 700)])
def test_the_residual_outlasts_squares_that_leave_the_range(dtype, power):
    matrix, b, size = rotated(spread(8, 1e5)).to(dtype), noise(8).to(dtype), 2.0**power
    plain, scaled = Dense().solve(matrix, b), Dense().solve(matrix, size * b)
    assert scaled.residual_norm.item() / size == plain.residual_norm > 0
    zero = Dense().solve(0 * matrix, size * b)
    assert zero.residual_norm.item() / size == pytest.approx(b.norm().item())


def test_a_singular_or_large_matrix_stays_with_its_system_in_a_batch_of_two_dimensions():
    matrix = rotated(spread(4, 10)).repeat(2, 3, 1, 1)
    matrix[0, 1] *= 1e30
    matrix[1, 2] = 0
    solution = Dense().solve(matrix, noise(2, 3, 4))
    expected = [[Status.CONVERGED] * 3, [Status.CONVERGED, Status.CONVERGED, Status.BREAKDOWN]]
    assert solution.status.tolist() == expected
