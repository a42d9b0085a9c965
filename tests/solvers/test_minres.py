"""MINRES: its iterates, its stopping, its breakdowns, on definite, indefinite and singular systems."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from imaml_solvers import CG, MINRES, Status
from tests.solvers.systems import F64, Recorded, noise, residual, rotated, spread

INDEFINITE = torch.cat([spread(12, 30), -spread(9, 10)])


def scipy_iterates(matrix, b, preconditioner=None):
    found = []
    keep = {"callback": lambda x: found.append(x.copy()), "M": preconditioner, "rtol": 1e-12}
    scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), **keep)
    return found


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("spectrum", [spread(21, 100), INDEFINITE], ids=["definite", "indefinite"])
def test_every_iterate_is_that_of_scipy(spectrum, preconditioned):
    matrix, b = rotated(spectrum), noise(21)
    m = rotated(spread(21, 5), seed=3) if preconditioned else None
    expected = scipy_iterates(matrix, b, None if m is None else m.numpy())
    for k in (1, 2, 3, 4, 7, 10):
        solution = MINRES(max_steps=k).solve(matrix, b, preconditioner=m)
        assert np.linalg.norm(solution.x.numpy() - expected[k - 1]) <= 1e-10 * np.linalg.norm(expected[k - 1])
        assert solution.residual_norm == pytest.approx(residual(matrix, solution.x, b).item(), rel=1e-10)
        assert solution.status == Status.BUDGET_SPENT and solution.num_steps == k


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_no_vector_of_the_krylov_space_leaves_less(steps):
    matrix, b = rotated(INDEFINITE), noise(21)
    images = torch.stack([torch.linalg.matrix_power(matrix, k + 1) @ b for k in range(steps)], -1)
    least = (b - images @ torch.linalg.lstsq(images, b.unsqueeze(-1)).solution.squeeze(-1)).norm()
    assert MINRES(max_steps=steps).solve(matrix, b).residual_norm == pytest.approx(least.item(), rel=1e-9)


def test_a_start_gives_the_iterates_of_the_shifted_system():
    matrix, b, x0 = rotated(INDEFINITE), noise(21), noise(21, seed=5)
    shifted = MINRES(max_steps=4).solve(matrix, b - matrix @ x0)
    torch.testing.assert_close(MINRES(max_steps=4).solve(matrix, b, x0=x0).x, x0 + shifted.x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_indefinite_systems_are_solved_where_cg_breaks_down(scale):
    matrix = scale * torch.stack([rotated(INDEFINITE, seed) for seed in range(4)])
    b = noise(4, 21)
    solution = MINRES(rtol=1e-9).solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all() and (residual(matrix, solution.x, b) <= 1e-9 * b.norm()).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7 / scale)
    assert (CG(rtol=1e-9).solve(matrix, b).status == Status.BREAKDOWN).all()


def test_products_of_a_tolerance_are_the_steps_and_one_check_for_the_batch():
    op = Recorded(torch.stack([rotated([1.0, -1.0] * 8), rotated(spread(16, 100))]))
    solution = MINRES(rtol=1e-8).solve(op, noise(2, 16))
    assert solution.num_steps[0] == 2 < solution.num_steps[1] and (solution.status == Status.CONVERGED).all()
    assert len(op.seen) == solution.num_steps.max() + 1
    op.seen.clear()
    MINRES(max_steps=4).solve(op, noise(2, 16), x0=noise(2, 16, seed=2))
    assert len(op.seen) == 5


def test_a_finished_system_is_frozen_bit_for_bit():
    scale = torch.stack([torch.tensor([1.0, -1.0] * 15, dtype=F64), torch.cat([spread(15, 1e3), -spread(15, 1e2)])])
    b = noise(2, 30)
    whole = MINRES(rtol=1e-9, max_steps=300).solve(lambda x: scale * x, b)
    steps = whole.num_steps[0].item()
    early = MINRES(rtol=1e-9, max_steps=steps).solve(lambda x: scale * x, b)
    assert whole.num_steps[1] > 10 * steps and early.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert torch.equal(whole.x[0], early.x[0]) and torch.equal(whole.residual_norm[0], early.residual_norm[0])
    torch.testing.assert_close(whole.smallest_eigenvalue[0], early.smallest_eigenvalue[0])


@pytest.mark.parametrize("spectrum", [spread(20, 20), torch.cat([spread(12, 20), -spread(8, 5)])])
def test_a_singular_system_is_solved_where_it_has_a_solution(spectrum):
    matrix = rotated(torch.cat([spectrum, torch.zeros(5, dtype=F64)]))
    b = matrix @ noise(25)
    solution = MINRES(rtol=1e-9).solve(matrix, b)
    assert solution.status == Status.CONVERGED and residual(matrix, solution.x, b) <= 1e-9 * b.norm()
    torch.testing.assert_close(solution.x, torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", [spread(20, 20), torch.cat([spread(12, 20), -spread(8, 5)])])
@pytest.mark.parametrize("seed", range(4))
def test_a_singular_system_without_a_solution_is_said_at_the_least_residual(spectrum, dtype, seed):
    matrix, b = rotated(torch.cat([spectrum, torch.zeros(5, dtype=F64)]), seed), noise(25, seed=seed)
    least = residual(matrix, torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ b, b)
    solution = MINRES(rtol=1e-3).solve(matrix.to(dtype), b.to(dtype))
    assert solution.status == Status.BREAKDOWN
    assert residual(matrix, solution.x.double(), b) == pytest.approx(least.item(), rel=1e-3)
    assert solution.residual_norm == pytest.approx(least.item(), rel=1e-3)


def test_the_zero_matrix_is_a_breakdown_and_stays_with_its_system():
    matrix = torch.stack([torch.zeros(6, 6, dtype=F64), rotated([1.0, 2.0, -1.0, -2.0, 3.0, 4.0])])
    solution = MINRES(rtol=1e-9).solve(matrix, noise(2, 6))
    assert solution.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED] and (solution.x[0] == 0).all()


def test_more_steps_than_needed_leave_an_exact_solution_alone():
    matrix = torch.diag(torch.tensor([1.0, -2.0, 4.0], dtype=F64))
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 3.0], [5.0, 6.0, 7.0]], dtype=F64)
    solution = MINRES(max_steps=50).solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all() and (solution.num_steps <= torch.tensor([3, 4, 5])).all()
    torch.testing.assert_close(solution.x, b / matrix.diagonal(), rtol=1e-13, atol=1e-14)


def test_what_the_recursion_lost_is_made_good():
    # from a start far away in float32, the recursive residual drifts from the true one by more than the tolerance
    op, b = Recorded(rotated(torch.cat([spread(10, 10), -spread(10, 10)])).float()), noise(20).float()
    solution = MINRES(rtol=1e-5).solve(op, b, x0=1e5 * noise(20, seed=3).float())
    checks = len(op.seen) - 1 - solution.num_steps.item()
    assert checks > 1 and solution.status == Status.CONVERGED
    assert residual(op.matrix, solution.x, b) <= 1.01e-5 * b.norm()


def test_the_rounding_floor_is_stagnation():
    matrix, b = rotated(INDEFINITE), noise(21)
    solution = MINRES(rtol=1e-17, max_steps=5000).solve(matrix, b)
    assert solution.status == Status.STAGNATED and solution.residual_norm <= 1e-11 * b.norm()
    torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b), rtol=0.5, atol=0)


@pytest.mark.parametrize(
    ("max_steps", "rtol", "status"), [(2, 1e-12, 2), (2, None, 1), (None, 1e-3, 0), (None, None, 0)]
)
def test_the_stopping_rules_are_those_of_cg(max_steps, rtol, status):
    b = noise(21)
    solution = MINRES(max_steps=max_steps, rtol=rtol).solve(rotated(INDEFINITE), b)
    assert solution.status == Status(status)
    if status == Status.CONVERGED:
        assert 1e-3 * (rtol or 1e-5) < solution.residual_norm / b.norm() <= (rtol or 1e-5)


@pytest.mark.parametrize("steps", [5, 21])
def test_the_smallest_eigenvalue_may_be_negative(steps):
    solution = MINRES(max_steps=steps).solve(rotated(INDEFINITE), noise(21))
    assert -1.3 < solution.smallest_eigenvalue < -0.9
    if steps == 21:
        assert solution.smallest_eigenvalue == pytest.approx(-1.0, rel=1e-6)
    preconditioned = MINRES(max_steps=steps).solve(rotated(INDEFINITE), noise(21), preconditioner=lambda r: r / 2)
    assert preconditioned.smallest_eigenvalue is None


@pytest.mark.parametrize(
    ("value", "status"), [(-1.0, Status.BREAKDOWN), (0.0, Status.BREAKDOWN), (torch.nan, Status.NONFINITE)]
)
def test_a_bad_preconditioner_is_said(value, status):
    matrix, b = rotated([1.0, 2.0, -1.0, 3.0, -4.0]), noise(2, 5)
    scale = torch.tensor([[1.0], [value]], dtype=F64)
    solution = MINRES(rtol=1e-9).solve(matrix, b, preconditioner=lambda r: scale * r)
    assert solution.status.tolist() == [Status.CONVERGED, status] and (solution.x[1] == 0).all()


def test_a_preconditioner_that_turns_out_indefinite_is_said():
    matrix, m = rotated([1.0, 2.0, 3.0, 4.0]), torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=F64)
    solution = MINRES(rtol=1e-9).solve(matrix, b, preconditioner=m)
    assert solution.status == Status.BREAKDOWN and torch.isfinite(solution.x).all()


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_product_that_is_not_finite_leaves_the_last_good_iterate(fails_at):
    matrix, b, calls = rotated(INDEFINITE), noise(21), []

    def mv(x):
        calls.append(x)
        return matrix @ x if len(calls) < fails_at else torch.full_like(x, torch.nan)

    solution = MINRES(max_steps=20).solve(mv, b)
    assert solution.status == Status.NONFINITE and solution.num_steps == fails_at - 1 and len(calls) == fails_at
    expected = MINRES(max_steps=fails_at - 1).solve(matrix, b).x if fails_at > 1 else torch.zeros_like(b)
    assert torch.equal(solution.x, expected)


def test_the_smallest_eigenvalue_of_a_definite_matrix_is_that_of_cg():
    matrix, b = torch.stack([rotated(spread(21, 50), seed) for seed in range(3)]), noise(3, 21)
    for steps in (1, 4, 12):
        found, expected = (kind(max_steps=steps).solve(matrix, b).smallest_eigenvalue for kind in (MINRES, CG))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    matrix[0] = torch.eye(21)
    assert MINRES(rtol=1e-9).solve(matrix, b).smallest_eigenvalue[0] == pytest.approx(1)


def test_a_system_that_failed_is_asked_for_no_product_of_what_is_not_finite():
    matrix, seen = torch.stack([rotated(INDEFINITE, seed) for seed in range(2)]), []

    def mv(x):
        seen.append(x)
        y = (matrix @ x.unsqueeze(-1)).squeeze(-1)
        return y if len(seen) != 3 else y * torch.tensor([[torch.inf], [1.0]], dtype=F64)

    solution = MINRES(rtol=1e-9).solve(mv, noise(2, 21))
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED] and solution.num_steps[0] == 2
    assert torch.isfinite(torch.stack(seen)).all()
