"""The smallest eigenvalue as solvers estimate it: Ritz values of an independent Krylov basis."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml_solvers import CG, Dense, Neumann, ScipySolver, Status
from imaml_solvers._lanczos import lower_ritz_value, smallest_eigenvalue
from imaml_solvers._operator import LinearOperator
from tests.solvers.systems import F64, Recorded, noise, problems, rotated, spread


def ritz(matrix, b, steps):
    """The smallest Ritz value less the norm of its residual, from an orthonormal basis of the Krylov space."""
    vectors = [b.numpy()]
    for _ in range(steps - 1):
        vectors.append(matrix.numpy() @ vectors[-1] / np.linalg.norm(vectors[-1]))
        for _ in range(2):
            vectors[-1] = vectors[-1] - sum(v * (v @ vectors[-1]) / (v @ v) for v in vectors[:-1])
    basis = np.stack([v / np.linalg.norm(v) for v in vectors], axis=1)
    values, combinations = np.linalg.eigh(basis.T @ matrix.numpy() @ basis)
    w = basis @ combinations[:, 0]
    return values[0] - np.linalg.norm(matrix.numpy() @ w - values[0] * w)


@settings(max_examples=40)
@given(problem=problems(condition=1e2), steps=st.integers(1, 6))
def test_it_is_that_of_the_krylov_space_by_either_way(problem, steps):
    matrix, b, spectrum = problem
    steps = min(steps, len(b))
    expected, scale = ritz(matrix, b, steps), spectrum[-1].item()
    budget = CG(max_steps=steps).solve(matrix, b)
    if budget.num_steps == steps:
        assert budget.smallest_eigenvalue.item() == pytest.approx(expected, abs=1e-6 * scale)
    lanczos = smallest_eigenvalue(LinearOperator.from_matrix(matrix), b, steps)
    assert lanczos.item() == pytest.approx(expected, abs=1e-6 * scale)


@pytest.mark.parametrize("spectrum", [[0.3], [2.0, -1.0, 5.0], [1.0, 1.0, 4.0, 4.0, 4.0]], ids=str)
def test_it_is_exact_once_the_krylov_space_is_exhausted(spectrum):
    n = len(spectrum)
    b = noise(2, n)
    estimate = smallest_eigenvalue(LinearOperator.from_matrix(rotated(spectrum)), b, n)
    torch.testing.assert_close(estimate, torch.full((2,), min(spectrum), dtype=F64), rtol=1e-10, atol=1e-12)


def test_a_definite_matrix_of_full_steps():
    matrix = rotated(spread(8, 50))
    expected = np.linalg.eigvalsh(matrix.numpy())[0]
    for solver in (CG(rtol=1e-13), Dense()):
        assert solver.solve(matrix, noise(8)).smallest_eigenvalue.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("solver", [CG(rtol=1e-9), CG(max_steps=3)], ids=repr)
def test_batched_equals_one_by_one(solver):
    """Each with its own stopping, in every shape of batch."""
    matrices = torch.stack([rotated(spread(9, c), seed) for seed, c in enumerate((1, 10, 1000, 3))]).view(2, 2, 9, 9)
    b = noise(2, 2, 9)
    b[1, 0] = 0
    together = solver.solve(matrices, b).smallest_eigenvalue
    for i, j in np.ndindex(2, 2):
        alone = solver.solve(matrices[i, j], b[i, j]).smallest_eigenvalue
        torch.testing.assert_close(together[i, j], alone, rtol=1e-6, atol=0)
    assert together[1, 0] == torch.inf


def test_rows_after_a_restart_belong_to_another_space():
    """Two blocks, [1, 2; 2, 5] and [3], and a row in which the system rested."""
    inf = torch.inf
    diagonal, coupling = torch.tensor([1.0, 5.0, inf, 3.0]), torch.tensor([2.0, 0.0, inf, 0.0])
    fresh = torch.tensor([True, False, False, True])
    assert lower_ritz_value(diagonal, coupling, fresh).item() == pytest.approx(3 - 8**0.5, rel=1e-6)
    open_ended = torch.tensor([2.0, 0.5, inf, 0.0])
    w = np.linalg.eigh([[1, 2], [2, 5]])[1][:, 0]
    expected = 3 - 8**0.5 - 0.5 * abs(w[1])
    assert lower_ritz_value(diagonal, open_ended, fresh).item() == pytest.approx(expected, rel=1e-5)
    assert lower_ritz_value(diagonal, torch.zeros(4), torch.ones(4).bool()).item() == 1
    assert lower_ritz_value(diagonal, torch.zeros(4), fresh).item() == pytest.approx(1)


def test_restarted_cg_still_knows():
    """float32 cannot meet this tolerance in one go."""
    matrix, b = rotated(spread(20, 3000)).float(), noise(20).float()
    op = Recorded(matrix)
    solution = CG(rtol=1e-6, max_steps=400).solve(op, b)
    assert len(op.seen) > solution.num_steps + 1  # it did restart
    assert solution.smallest_eigenvalue.item() == pytest.approx(1 / 3000, rel=0.05)
    assert solution.smallest_eigenvalue.dtype == torch.float32


@pytest.mark.parametrize("least", [-2.0, 0.0])
def test_a_breakdown_is_an_eigenvalue_that_is_not_positive(least):
    matrix = rotated([least, 1.0, 3.0, 7.0])
    solution = CG().solve(matrix, noise(4))
    assert solution.status == Status.BREAKDOWN
    assert solution.smallest_eigenvalue <= 1e-12
    assert Dense().solve(rotated([-2.0, 1.0]), noise(2)).smallest_eigenvalue.item() == pytest.approx(-2)


def test_who_has_none():
    matrix, b = rotated(spread(5, 4)), noise(5)
    assert CG().solve(matrix, b, preconditioner=torch.eye(5, dtype=F64)).smallest_eigenvalue is None
    for solver in (Neumann(max_steps=50), ScipySolver()):
        assert solver.solve(matrix, b).smallest_eigenvalue is None


def test_an_exhausted_krylov_space_knows_no_other_eigenvalue():
    matrix = rotated([1.0, 2.0, 4.0])
    b = torch.linalg.eigh(matrix).eigenvectors[:, 2]
    assert smallest_eigenvalue(LinearOperator(lambda x: x @ matrix), b, 3).item() == pytest.approx(4.0, rel=1e-12)


def test_a_product_that_is_not_finite_tells_nothing():
    solution = CG().solve(LinearOperator(lambda x: x * torch.nan), noise(3))
    assert solution.status == Status.NONFINITE and solution.smallest_eigenvalue == torch.inf
