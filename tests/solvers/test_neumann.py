"""The Neumann series: its terms, its step, its divergence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imaml_solvers import Neumann, Status
from tests.solvers.systems import F64, Recorded, noise, problems, residual, rotated, spread

POWER_PRODUCTS = 10


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_terms_of_the_series(terms):
    matrix, b, alpha = rotated(spread(6, 10)), noise(2, 6), 0.7
    step = torch.eye(6, dtype=F64) - alpha * matrix
    series = sum(alpha * torch.linalg.matrix_power(step, k) for k in range(terms))
    solution = Neumann(max_steps=terms, step_size=alpha).solve(matrix, b)
    torch.testing.assert_close(solution.x, b @ series.T, rtol=1e-12, atol=1e-13)
    assert (solution.status == Status.BUDGET_SPENT).all() and (solution.num_steps == terms).all()
    torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b), rtol=1e-9, atol=0)


@given(problem=problems(condition=50), terms=st.integers(1, 30))
def test_the_scaled_step_contracts_as_documented(problem, terms):
    matrix, b, spectrum = problem
    solution = Neumann(max_steps=terms).solve(matrix, b)
    # 10 power steps leave the estimate within 25 % of the largest eigenvalue: the factor is at most 1 - 1 / c, or 1 / 3
    factor = max(1 - spectrum[0] / spectrum[-1], 1 / 3)
    assert solution.success and solution.residual_norm <= factor**terms * b.norm() * (1 + 1e-9) + 1e-12 * b.norm()


def test_every_system_has_its_own_step():
    matrix = torch.stack([rotated(spread(5, 5)) * scale for scale in (1e-6, 1.0, 1e6)])
    solution = Neumann(max_steps=300, rtol=1e-8).solve(matrix, noise(3, 5))
    assert (solution.status == Status.CONVERGED).all()


def test_products_are_the_steps_and_those_of_the_power_method():
    op = Recorded(rotated(spread(5, 5)))
    Neumann(max_steps=7).solve(op, noise(5))
    assert len(op.seen) == 7 + POWER_PRODUCTS
    op.seen.clear()
    Neumann(max_steps=7, step_size=0.5).solve(op, noise(5))
    assert len(op.seen) == 7
    op.seen.clear()
    Neumann(max_steps=7).solve(op, torch.zeros(5, dtype=F64))
    assert not op.seen


def test_too_few_steps_for_a_tolerance():
    solution = Neumann(max_steps=3, rtol=1e-8).solve(rotated(spread(5, 100)), noise(5))
    assert solution.status == Status.MAX_STEPS and not solution.success and solution.num_steps == 3


def test_too_long_a_step_is_a_breakdown_with_the_best_iterate():
    matrix, b = rotated(spread(5, 10)), noise(5)
    solution = Neumann(max_steps=1000, step_size=2.5).solve(matrix, b)
    assert solution.status == Status.BREAKDOWN and solution.num_steps < 100
    iterates = [Neumann(max_steps=k, step_size=2.5, atol=1e-30).solve(matrix, b) for k in range(1, 10)]
    assert solution.residual_norm <= min(s.residual_norm for s in iterates) and solution.residual_norm <= b.norm()
    torch.testing.assert_close(solution.residual_norm, residual(matrix, solution.x, b), rtol=1e-9, atol=0)


def test_a_spent_budget_does_not_hide_divergence():
    solution = Neumann(max_steps=1).solve(rotated([-1.0, -0.9, -0.8]), noise(3))
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()


def test_divergence_stays_with_its_system():
    matrix = torch.stack([rotated(spread(5, 5)), rotated([-1.0, 0.5, 1.0, 1.5, 2.0])])
    solution = Neumann(max_steps=400, rtol=1e-8).solve(matrix, noise(2, 5))
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN]


@pytest.mark.parametrize("seed", range(8))
def test_rounding_at_the_solution_is_not_divergence(seed):
    matrix, b = rotated(spread(8, 1e4), seed), noise(8, seed=seed)
    x0 = torch.linalg.solve(matrix, b)
    solution = Neumann(max_steps=50).solve(matrix, b, x0=x0)
    assert solution.success and residual(matrix, solution.x, b) <= residual(matrix, x0, b)


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_step_is_named(step_size):
    with pytest.raises(ValueError, match=f"`step_size` must be .*Got {step_size}"):
        Neumann(max_steps=5, step_size=step_size)


def test_an_overflow_stays_with_its_system():
    matrix = torch.stack([1e-10 * torch.eye(5, dtype=F64), rotated(spread(5, 5))])
    b = torch.stack([torch.full((5,), 1e300, dtype=F64), noise(5)])
    solution = Neumann(max_steps=400, rtol=1e-8).solve(matrix, b)
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED] and torch.isfinite(solution.x).all()


def test_the_zero_matrix_has_a_step_too():
    solution = Neumann(max_steps=3).solve(torch.zeros(3, 3, dtype=F64), noise(3))
    assert solution.status == Status.BUDGET_SPENT and solution.num_steps == 3 and (solution.x == 0).all()


def test_divergence_from_a_start_much_larger_than_b_is_seen():
    solution = Neumann(max_steps=3, step_size=2.5).solve(
        rotated([0.9, 0.95, 1.0]), 1e-12 * noise(3), x0=noise(3, seed=2)
    )
    assert solution.status == Status.BREAKDOWN and solution.num_steps == 1


def test_a_system_of_one_unknown():
    solution = Neumann(max_steps=1, step_size=0.5).solve(2 * torch.ones(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    assert solution.x.item() == 0.5 and solution.num_steps == 1
