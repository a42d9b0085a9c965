"""The adapter of scipy.sparse.linalg: what it passes on, and what it makes of the answer."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from imaml_solvers import ScipySolver, Status
from tests.solvers.systems import F64, Recorded, noise, residual, rotated, spread

GENERAL = ["bicgstab", "cgs", "gcrotmk", "gmres", "lgmres"]


@pytest.mark.parametrize("method", ["minres", "gmres", "lgmres", "gcrotmk"])
def test_indefinite_systems_are_solved(method):
    matrix, b = rotated([-3.0, -2.0, -0.5, 0.3, 1.0, 2.0, 4.0]), noise(2, 7)
    solution = ScipySolver(method=method, rtol=1e-9).solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b.T).T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", GENERAL)
def test_unsymmetric_systems_are_solved(method):
    matrix, b = 3 * torch.eye(8, dtype=F64) + noise(8, 8) / 3, noise(2, 8)
    solution = ScipySolver(method=method, rtol=1e-9).solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b.T).T, rtol=1e-7, atol=1e-8)


def test_the_answer_and_the_steps_are_those_of_scipy():
    matrix, b, steps = rotated(spread(12, 50)), noise(12), []
    expected, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-6, callback=lambda _: steps.append(1))
    solution = ScipySolver(method="cg", rtol=1e-6).solve(matrix, b)
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=1e-7)
    assert solution.num_steps == len(steps)


@pytest.mark.parametrize(("condition", "rtol"), [(1e3, 1e-6), (1e5, 1e-6), (1e7, 1e-3), (1e8, 1e-2)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_minres_reaches_the_residual_that_scipy_does_not(condition, rtol, scale):
    matrix, b = scale * rotated(spread(15, condition)), noise(15)
    alone, info = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=rtol)
    assert info == 0 and residual(matrix, torch.from_numpy(alone), b) > rtol * b.norm()
    solution = ScipySolver(method="minres", rtol=rtol, max_steps=500).solve(matrix, b)
    assert solution.status == Status.CONVERGED and residual(matrix, solution.x, b) <= rtol * b.norm()


@pytest.mark.parametrize("method", ["cg", "minres", *GENERAL])
def test_too_few_steps(method):
    matrix, b = rotated(spread(30, 1e6)), noise(30)
    solution = ScipySolver(method=method, rtol=1e-10, max_steps=4).solve(matrix, b)
    assert solution.status == Status.MAX_STEPS and not solution.success
    assert 0 < solution.num_steps <= 10
    torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b), rtol=1e-9, atol=0)


def test_ten_n_steps_at_most():
    solution = ScipySolver(rtol=1e-12).solve(rotated(spread(12, 1e12)), noise(12))
    assert solution.num_steps == 120 and solution.status == Status.MAX_STEPS


def test_the_rounding_floor_is_stagnation():
    matrix, b = rotated(spread(10, 1e4)), noise(10)
    solution = ScipySolver(method="gmres", rtol=1e-18, max_steps=40).solve(matrix, b)
    assert solution.status in (Status.STAGNATED, Status.MAX_STEPS) and solution.residual_norm <= 1e-10 * b.norm()


def test_an_indefinite_preconditioner_of_minres_is_a_breakdown():
    matrix, b = rotated(spread(5, 10)), noise(5)
    solution = ScipySolver(method="minres").solve(matrix, b, preconditioner=lambda r: -r)
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


@pytest.mark.parametrize("method", ["cg", "minres", "bicgstab", "cgs"])
def test_values_that_scipy_itself_makes_infinite_are_a_breakdown(method):
    solution = ScipySolver(method=method).solve(torch.zeros(2, 2, dtype=F64), torch.ones(2, dtype=F64))
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


@pytest.mark.parametrize("method", ["cg", "minres", "bicgstab", "cgs"])
@pytest.mark.parametrize("rounding", [0.0, 2.0**-53, -(2.0**-52)])
def test_a_residual_as_large_as_at_the_start_is_a_breakdown_whatever_rounding_does(method, rounding):
    """p'Ap = 0 for the first p, or what some processors make of it: scipy then goes on to its limit, or is lucky."""
    matrix, b = torch.diag(torch.tensor([1.0, -1.0 + rounding], dtype=F64)), torch.ones(2, dtype=F64)
    solution = ScipySolver(method=method).solve(matrix, b)
    left = residual(matrix, solution.x, b) / b.norm()
    assert left <= 1e-5 if solution.status == Status.CONVERGED else left <= 1 + 1e-12
    assert solution.status == Status.BREAKDOWN or left < 0.9999
    assert solution.success or method != "minres"


@pytest.mark.parametrize(("answer", "code"), [(0.0, 7), (-0.5, 7), (-0.5, 0), (1e-9, 7)])
def test_what_scipy_reports_does_not_hide_that_nothing_was_gained(answer, code, monkeypatch):
    monkeypatch.setattr(ScipySolver, "_call", lambda self, apply, b, *_: (answer * b, code))
    matrix, b = torch.eye(4, dtype=F64), noise(4)
    for x0 in (None, 0.5 * b):
        solution = ScipySolver().solve(matrix, b, x0=x0)
        assert solution.status == Status.BREAKDOWN
        torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b))


def test_a_start_that_rounding_allows_no_better_has_not_broken_down(monkeypatch):
    monkeypatch.setattr(ScipySolver, "_call", lambda self, apply, b, *_: (-0.5 * b, 0))
    solution = ScipySolver(rtol=1e-17).solve(torch.eye(4, dtype=F64), noise(4), x0=noise(4) * (1 + 1e-15))
    assert solution.status == Status.STAGNATED


@pytest.mark.parametrize("method", ["lgmres", "minres", "cg", "gmres", "bicgstab", "cgs"])
def test_a_preconditioner_of_zero_is_a_breakdown(method):
    solution = ScipySolver(method=method).solve(rotated(spread(5, 10)), noise(5), preconditioner=lambda r: 0 * r)
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


@pytest.mark.parametrize("method", ["cg", "minres", *GENERAL])
def test_a_solution_that_overflows_is_a_breakdown(method):
    solution = ScipySolver(method=method).solve(1e-30 * torch.eye(3, dtype=F64), torch.full((3,), 1e300, dtype=F64))
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


@pytest.mark.parametrize("method", ["cg", "minres", *GENERAL])
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e156, 1e300])
def test_right_hand_sides_whose_squares_leave_the_range_are_solved(method, scale):
    matrix, b = rotated(spread(12, 50)), noise(12)
    solution = ScipySolver(method=method, rtol=1e-8).solve(matrix, scale * b)
    assert solution.status == Status.CONVERGED and residual(matrix, solution.x / scale, b) <= 1.001e-8 * b.norm()


def test_an_error_of_the_users_own_product_comes_through():
    def mv(x):
        raise ValueError("the product itself failed")

    with pytest.raises(ValueError, match="the product itself failed"):
        ScipySolver(method="minres").solve(mv, noise(3))


def test_each_product_serves_one_system_with_zeros_for_the_others():
    op = Recorded(rotated(spread(5, 10)))
    ScipySolver(method="cg").solve(op, noise(3, 5))
    assert all((x != 0).any(-1).sum() == 1 for x in op.seen)


def test_half_precision_comes_back_in_half_precision():
    solution = ScipySolver(rtol=1e-1).solve(2 * torch.eye(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
    assert solution.x.tolist() == [0.5] * 3 and solution.x.dtype == torch.bfloat16


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(ValueError, match="one of bicgstab, cg, .*minres. Got 'jacobi'"):
        ScipySolver(method="jacobi")


def test_a_budget_without_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"^`rtol` or `atol` must be > 0.*CG\(max_steps=...\)\.$"):
        ScipySolver(rtol=0.0, atol=0.0)


def test_stagnation_is_the_third_solve_that_does_not_halve_the_residual(monkeypatch):
    asked = []

    def call(self, apply, b, rtol, precondition):
        asked.append(rtol)
        return 0.4 * b, 0

    monkeypatch.setattr(ScipySolver, "_call", call)
    solution = ScipySolver(rtol=1e-3).solve(torch.eye(4, dtype=F64), noise(4))
    assert solution.status == Status.STAGNATED and len(asked) == 3
    # of the residual that is left, less the square of what the last solve left beyond its target
    assert asked[0] == pytest.approx(1e-3) and asked[1] == pytest.approx(1e-3 / 0.6 / 600**2)
    assert solution.residual_norm.item() == pytest.approx(0.6**3 * noise(4).norm().item())


def test_a_round_that_makes_it_worse_is_not_taken(monkeypatch):
    monkeypatch.setattr(ScipySolver, "_call", lambda self, apply, b, *_: (-0.5 * b, 0))
    solution = ScipySolver().solve(torch.eye(4, dtype=F64), noise(4))
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()
    assert solution.residual_norm.item() == pytest.approx(noise(4).norm().item())


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_units_of_b_change_no_status(scale):
    matrix, b = rotated(spread(20, 1e4)), scale * noise(20)
    assert ScipySolver(rtol=1e-8, max_steps=4).solve(matrix, b).status == Status.MAX_STEPS
    assert ScipySolver(rtol=1e-8, max_steps=500).solve(matrix, b).status == Status.CONVERGED


def test_a_right_hand_side_that_is_not_finite_costs_no_product():
    op = Recorded(torch.eye(3, dtype=F64))
    solution = ScipySolver().solve(op, torch.tensor([1.0, torch.inf, 0.0], dtype=F64))
    assert solution.status == Status.NONFINITE and solution.num_steps == 0 and not op.seen


def test_a_round_that_halves_the_residual_forgives_those_before(monkeypatch):
    parts = iter([0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.4])
    monkeypatch.setattr(ScipySolver, "_call", lambda self, apply, b, *_: (next(parts) * b, 0))
    solution = ScipySolver(rtol=1e-3).solve(torch.eye(4, dtype=F64), noise(4))
    assert solution.status == Status.STAGNATED and list(parts) == [0.4]
