"""Conjugate gradients: its iterates, its stopping, its breakdowns; its theory is in tests/properties."""

import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml_solvers import CG, MINRES, Status
from tests.solvers.systems import F64, Recorded, noise, problems, residual, rotated, spread


@settings(max_examples=20)
@given(problem=problems())
def test_every_iterate_is_that_of_scipy(problem):
    matrix, b, _ = problem
    iterates = []
    scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-6, atol=0.0, callback=lambda x: iterates.append(x.copy()))
    for k, expected in enumerate(iterates[:6], start=1):
        x = CG(max_steps=k).solve(matrix, b).x.numpy()
        assert np.linalg.norm(x - expected) <= 1e-8 * np.linalg.norm(expected)


@given(problem=problems(condition=1e6), digits=st.integers(2, 9))
def test_converged_is_true_of_the_true_residual(problem, digits):
    matrix, b, _ = problem
    rtol = 10.0**-digits
    solution = CG(rtol=rtol, max_steps=500).solve(matrix, b)
    true = residual(matrix, solution.x, b)
    if solution.status == Status.CONVERGED:
        assert true <= rtol * b.norm() * (1 + 1e-9)
        assert solution.residual_norm == pytest.approx(true.item(), rel=1e-3)
    else:
        assert true > 0.5 * rtol * b.norm()


@pytest.mark.parametrize(("max_steps", "status"), [(1, Status.BUDGET_SPENT), (3, Status.BUDGET_SPENT)])
def test_a_budget_is_spent_to_the_product(max_steps, status):
    op = Recorded(rotated(spread(9, 100)))
    solution = CG(max_steps=max_steps).solve(op, noise(2, 9))
    assert len(op.seen) == max_steps and (solution.num_steps == max_steps).all() and (solution.status == status).all()
    assert solution.success.all()


def test_products_of_a_tolerance_are_the_steps_and_one_check_for_the_batch():
    op = Recorded(torch.stack([rotated(spread(9, condition)) for condition in (1, 10, 1000)]))
    solution = CG(rtol=1e-8).solve(op, noise(3, 9))
    assert len(solution.num_steps.unique()) > 1 and (solution.status == Status.CONVERGED).all()
    assert len(op.seen) == solution.num_steps.max() + 1
    op.seen.clear()
    CG(max_steps=4).solve(op, noise(3, 9), x0=noise(3, 9, seed=2))
    assert len(op.seen) == 5


@pytest.mark.parametrize(("solver", "rtol"), [(CG(), 1e-5), (CG(rtol=1e-3), 1e-3), (CG(max_steps=99, rtol=1e-7), 1e-7)])
def test_the_relative_tolerance_and_its_default(solver, rtol):
    b = noise(40)
    solution = solver.solve(rotated(spread(40, 100)), b)
    assert solution.status == Status.CONVERGED and 0.1 * rtol < solution.residual_norm / b.norm() <= rtol


def test_too_few_steps_for_a_tolerance():
    solution = CG(max_steps=2, rtol=1e-12).solve(rotated(spread(40, 100)), noise(40))
    assert solution.status == Status.MAX_STEPS and solution.num_steps == 2 and not solution.success


def test_ten_n_steps_at_most():
    solution = CG(rtol=1e-8).solve(rotated(spread(12, 1e12)), noise(12))
    assert solution.num_steps == 120 and solution.status == Status.MAX_STEPS


def test_the_absolute_tolerance_is_in_the_units_of_b():
    matrix, b = rotated(spread(40, 100)), 1e6 * noise(40)
    solution = CG(rtol=0.0, atol=10.0).solve(matrix, b)
    assert solution.status == Status.CONVERGED and 1.0 < solution.residual_norm <= 10.0


def test_more_steps_than_needed_leave_an_exact_solution_alone():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 3.0], [5.0, 6.0, 7.0]], dtype=F64)
    solution = CG(max_steps=50).solve(matrix, b)
    few = torch.tensor([1, 2, 3])  # and rounding may ask for a step or two more
    assert (solution.status == Status.CONVERGED).all()
    assert (solution.num_steps >= few).all() and (solution.num_steps <= few + 2).all()
    torch.testing.assert_close(solution.x, b / matrix.diagonal(), rtol=1e-14, atol=1e-15)


def test_a_finished_system_is_frozen_bit_for_bit():
    scale = torch.stack([torch.ones(30, dtype=F64), spread(30, 1e4)])
    b = noise(2, 30)
    whole = CG(rtol=1e-9, max_steps=300).solve(lambda x: scale * x, b)
    steps = whole.num_steps[0].item()
    early = CG(rtol=1e-9, max_steps=steps).solve(lambda x: scale * x, b)
    assert whole.num_steps[1] > 30 * steps and early.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert torch.equal(whole.x[0], early.x[0]) and torch.equal(whole.residual_norm[0], early.residual_norm[0])


@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_negative_curvature_stops_at_the_iterate_before(rtol):
    # b has no part in the last eigenvector but a tiny one: steps go well before it is met
    q = rotated([3.0, 2.5, 2.0, 1.0, -1.0])
    vectors = torch.linalg.eigh(q).eigenvectors
    b = vectors[:, 1:].sum(1) + 1e-3 * vectors[:, 0]
    solution = CG(max_steps=20, rtol=rtol).solve(q, b)
    taken = solution.num_steps.item()
    assert solution.status == Status.BREAKDOWN and taken >= 1
    before = CG(max_steps=taken).solve(q, b)
    assert before.status == Status.BUDGET_SPENT
    assert torch.equal(solution.x, before.x) and torch.equal(solution.residual_norm, before.residual_norm)
    torch.testing.assert_close(solution.residual_norm, residual(q, solution.x, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ulps", [0.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("stopping", [{}, {"max_steps": 1}, {"max_steps": 5}], ids=repr)
def test_a_curvature_of_rounding_alone_is_none(stopping, ulps, dtype):
    """p'Ap = 0 for the first p, or what some processors make of it: a step of its inverse would be as long as 1e17."""
    matrix = torch.diag(torch.tensor([1.0, -1.0 + ulps * torch.finfo(dtype).eps], dtype=dtype))
    b = torch.ones(2, dtype=dtype)
    for preconditioner in (None, lambda r: 3 * r):
        solution = CG(**stopping).solve(matrix, b, preconditioner=preconditioner)
        assert solution.status == Status.BREAKDOWN and (solution.x == 0).all() and solution.num_steps == 0


@pytest.mark.parametrize("ulps", [0.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("kind", [CG, MINRES])
def test_a_preconditioner_of_which_rounding_alone_is_positive_is_a_breakdown(kind, ulps):
    m = torch.diag(torch.tensor([1.0, -1.0 + ulps * torch.finfo(F64).eps], dtype=F64))
    solution = kind().solve(torch.eye(2, dtype=F64), torch.ones(2, dtype=F64), preconditioner=m)
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


def test_negative_curvature_stays_with_its_system():
    matrix = torch.stack([rotated(spread(6, 20)), -rotated(spread(6, 20)), rotated(spread(6, 5))])
    b = noise(3, 6)
    solution = CG(rtol=1e-9).solve(matrix, b)
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.CONVERGED]
    assert (solution.x[1] == 0).all() and solution.num_steps[1] == 0
    assert solution.residual_norm[1].item() == pytest.approx(b[1].norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_a_matrix_singular_to_rounding_is_a_breakdown(dtype, seed):
    spectrum = torch.linspace(0, 1, 20, dtype=F64)
    solution = CG(max_steps=60).solve(rotated(spectrum, seed).to(dtype), noise(20, seed=seed).to(dtype))
    assert solution.status == Status.BREAKDOWN


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_product_that_is_not_finite_leaves_the_last_good_iterate(fails_at):
    matrix, b, calls = rotated(spread(9, 100)), noise(9), []

    def mv(x):
        calls.append(x)
        return matrix @ x if len(calls) < fails_at else torch.full_like(x, torch.nan)

    solution = CG(max_steps=20).solve(mv, b)
    assert solution.status == Status.NONFINITE and solution.num_steps == fails_at - 1 and len(calls) == fails_at
    expected = CG(max_steps=fails_at - 1).solve(matrix, b).x if fails_at > 1 else torch.zeros_like(b)
    assert torch.equal(solution.x, expected)


def test_a_step_that_overflows_is_not_taken():
    solution = CG().solve(torch.eye(2) * 1e-30, torch.full((2,), 1e30))
    assert solution.status == Status.NONFINITE and (solution.x == 0).all()


def test_the_rounding_floor_is_stagnation():
    matrix, b = rotated(spread(12, 1e4)), noise(12)
    solution = CG(rtol=1e-17, max_steps=5000).solve(matrix, b)
    assert solution.status == Status.STAGNATED and solution.num_steps < 1000
    assert solution.residual_norm <= 1e-11 * b.norm()
    torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b), rtol=0.5, atol=0)


def test_what_the_recursion_lost_is_made_good():
    # from a start far away in float32, the recursive residual drifts from the true one by more than the tolerance
    op, b = Recorded(rotated(spread(20, 10)).float()), noise(20).float()
    solution = CG(rtol=1e-5).solve(op, b, x0=1e5 * noise(20, seed=3).float())
    checks = len(op.seen) - 1 - solution.num_steps.item()
    assert checks > 1 and solution.status == Status.CONVERGED
    assert residual(op.matrix, solution.x, b) <= 1.01e-5 * b.norm()


@pytest.mark.parametrize("spare", [0, 1])
def test_a_claim_that_fails_at_the_last_step_is_not_success(spare):
    matrix, b, x0 = rotated(spread(20, 10)).float(), noise(20).float(), 1e5 * noise(20, seed=3).float()
    claims = next(k for k in range(1, 100) if CG(max_steps=k).solve(matrix, b, x0=x0).residual_norm <= 1e-5 * b.norm())
    solution = CG(rtol=1e-5, max_steps=claims + spare).solve(matrix, b, x0=x0)
    assert solution.status == Status.MAX_STEPS and solution.num_steps == claims + spare


def test_a_check_that_is_not_finite_is_not_success():
    calls = []

    def mv(x):
        calls.append(x)
        return x if len(calls) == 1 else x * torch.nan

    solution = CG().solve(mv, noise(3))
    assert solution.status == Status.NONFINITE and torch.equal(solution.x, noise(3))


def test_a_tolerance_below_the_rounding_unit_is_stagnation_even_where_its_square_is_zero():
    solution = CG(rtol=1e-30, max_steps=500).solve(rotated(spread(9, 100)).float(), noise(9).float())
    assert solution.status == Status.STAGNATED and solution.residual_norm <= 1e-5


def test_with_zero_tolerances_a_residual_of_rounding_takes_no_step():
    b = torch.ones(1, dtype=F64)
    x0 = torch.nextafter(b, 0 * b)
    solution = CG(max_steps=3).solve(lambda x: x, b, x0=x0)
    assert solution.status == Status.CONVERGED and solution.num_steps == 0 and solution.residual_norm > 0


def test_the_iterates_are_those_of_scipy_with_a_preconditioner():
    matrix, b, m = rotated(spread(9, 100)), noise(9), rotated(spread(9, 5), seed=3)
    iterates = []
    arguments = {"M": m.numpy(), "callback": lambda x: iterates.append(x.copy())}
    scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-6, **arguments)
    for k, expected in enumerate(iterates[:5], start=1):
        x = CG(max_steps=k).solve(matrix, b, preconditioner=m).x.numpy()
        np.testing.assert_allclose(x, expected, rtol=1e-9)


def test_the_inverse_as_preconditioner_takes_one_step():
    matrix, b = rotated(spread(9, 1e4)), noise(9)
    solution = CG(rtol=1e-9).solve(matrix, b, preconditioner=torch.linalg.inv(matrix))
    assert solution.num_steps == 1 and solution.status == Status.CONVERGED


@pytest.mark.parametrize(
    ("value", "status"), [(-1.0, Status.BREAKDOWN), (0.0, Status.BREAKDOWN), (torch.nan, Status.NONFINITE)]
)
def test_a_bad_preconditioner_is_said(value, status):
    matrix, b = rotated(spread(5, 10)), noise(2, 5)
    scale = torch.tensor([[1.0], [value]], dtype=F64)
    solution = CG(rtol=1e-9).solve(matrix, b, preconditioner=lambda r: scale * r)
    assert solution.status.tolist() == [Status.CONVERGED, status] and (solution.x[1] == 0).all()


def test_a_start_gives_the_iterates_of_the_shifted_system():
    matrix, b, x0 = rotated(spread(9, 100)), noise(9), noise(9, seed=5)
    shifted = CG(max_steps=3).solve(matrix, b - matrix @ x0)
    torch.testing.assert_close(CG(max_steps=3).solve(matrix, b, x0=x0).x, x0 + shifted.x, rtol=1e-10, atol=1e-12)


def test_a_start_much_larger_than_b_is_survived():
    matrix, b = rotated(spread(6, 10)).float(), 1e-20 * noise(6).float()
    solution = CG(max_steps=50, rtol=1e-5).solve(matrix, b, x0=torch.full((6,), 1e12))
    assert torch.isfinite(solution.x).all() and solution.residual_norm <= 1e-4 * 1e12


@pytest.mark.parametrize("condition", [30, 100])
def test_stagnation_is_said_at_the_third_check_that_halves_nothing(condition):
    op, b = Recorded(rotated(spread(20, condition)).float()), noise(20).float()
    b = b / b.abs().max()  # in the units of the solver
    solution = CG(rtol=1e-12, max_steps=500).solve(op, b)
    found = [
        size for x in op.seen if (size := residual(op.matrix, x, b) / b.norm()) < 1e-3
    ]  # of x: others are directions
    assert solution.status == Status.STAGNATED and len(op.seen) - solution.num_steps == len(found)
    stalls = [after > before / 2 for before, after in itertools.pairwise(found)]
    in_a_row = [all(pair) for pair in itertools.pairwise(stalls)]
    assert in_a_row[-1] and not any(in_a_row[:-1])


def test_a_batch_of_two_dimensions():
    matrix, b = rotated(spread(5, 10)), noise(2, 3, 5)
    solution = CG(rtol=1e-9).solve(matrix.expand(2, 3, 5, 5), b)
    assert solution.status.shape == (2, 3) and (solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(
        solution.x, torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1), rtol=1e-6, atol=1e-7
    )
