"""The parts of the error bound alone: the smallest eigenvalue, and what lies between here and the exact point."""

import pytest
import torch

from imaml._strategies.error_bound import careful_eigenvalue, solution_error
from imaml_solvers import LinearOperator, Solution

F64 = torch.float64


def vector(*entries):
    return torch.tensor([entries], dtype=F64)


def careful(found, steps, rhs, damping=0.0):
    whole = torch.tensor([steps])
    solution = Solution(rhs, torch.tensor([0]), whole, torch.zeros(1), torch.tensor([found], dtype=F64))
    return careful_eigenvalue(solution, LinearOperator(lambda x: x), rhs, damping).item()


@pytest.mark.parametrize(
    ("found", "steps", "expected"), [(0.5, 1, 0.5), (1.44, 1, 1.2), (9.0, 1, 3.0), (9.0, 3, 9.0), (-2.0, 1, -2.0)]
)
def test_above_one_the_root_is_taken_unless_the_krylov_space_is_all(found, steps, expected):
    assert careful(found, steps, vector(1.0, 2.0, 3.0)) == pytest.approx(expected)


@pytest.mark.parametrize(("found", "expected"), [(2.5, 0.5), (1.0, -1.0), (3.44, 1.2)])
def test_what_damping_adds_is_taken_away(found, expected):
    """The solver's estimate is that of A + delta I."""
    assert careful(found, 1, vector(1.0, 2.0, 3.0), damping=2.0) == pytest.approx(expected)


def test_a_right_hand_side_of_zero_tells_nothing():
    assert careful(torch.inf, 0, vector(0.0, 0.0, 0.0)) == 1


def test_at_a_stationary_point_it_looks_along_b_as_far_as_rounding_may_have_moved_it():
    seen = []

    def look(displacement):
        seen.append(displacement)
        return torch.zeros_like(displacement), lambda: torch.zeros_like(displacement)

    one = torch.ones(1, dtype=F64)
    solution_error(one / 2, vector(3.0, 4.0), 0 * one, vector(0.0, 0.0), one, look)
    torch.testing.assert_close(seen[0] / seen[0].norm(), vector(0.6, 0.8))
    nearer = seen[0].norm()
    solution_error(one / 4, vector(3.0, 4.0), 0 * one, vector(0.0, 0.0), 3 * one, look)
    torch.testing.assert_close(seen[1].norm(), 6 * nearer)


@pytest.mark.parametrize(("gradient", "corrected"), [(1e-11, False), (1e-3, True)])
def test_the_change_of_the_gradient_counts_beyond_the_root_of_rounding(gradient, corrected):
    """A gradient that stays the same is one of no curvature."""
    here, one = vector(gradient, 0.0), torch.ones(1, dtype=F64)
    bound = solution_error(one, vector(1.0, 1.0), one, here, one, lambda move: (here, lambda: torch.zeros_like(move)))
    assert bool(torch.isfinite(bound)) is not corrected
    if not corrected:
        assert bound.item() == pytest.approx(5.0)
