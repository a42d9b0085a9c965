"""The theory of conjugate gradients over drawn spectra, and what every solver keeps whatever it is given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml.testing import spd_matrices, spectra
from imaml_solvers import CG, MINRES, Dense, Jacobi, Neumann, Nystrom, NystromInverse, ScipySolver, Status
from tests.solvers.systems import noise, residual, rotated

seeds = st.integers(0, 2**16)


def energy(matrix, error):
    """The A-norm."""
    return (error @ matrix @ error).clamp(min=0).sqrt()


def factor(matrix):
    """(sqrt(k) - 1) / (sqrt(k) + 1) for the condition number k."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    root = (eigenvalues[-1] / eigenvalues[0]).sqrt()
    return (root - 1) / (root + 1)


@settings(max_examples=40)
@given(spd_matrices(), seeds, st.booleans())
def test_the_error_obeys_the_bound_at_every_step_and_never_grows(matrix, seed, warm):
    """From a warm start too, which is hence never worse than to stay there."""
    b = noise(len(matrix), seed=seed)
    exact = torch.linalg.solve(matrix, b)
    x0 = exact + noise(len(b), seed=seed + 1) * exact.norm() if warm else torch.zeros_like(b)
    first = last = energy(matrix, exact - x0)
    rounding = 1e-9 * (first + energy(matrix, exact))
    for k in range(1, 8):
        error = energy(matrix, exact - CG(max_steps=k).solve(matrix, b, x0=x0 if warm else None).x)
        assert error <= 2 * factor(matrix) ** k * first + rounding
        assert error <= last + rounding
        last = error


@settings(max_examples=40)
@given(spd_matrices(condition=100), seeds, st.floats(0, 1))
def test_a_start_part_of_the_way_saves_that_part_of_the_error(matrix, seed, part):
    """From t x* the iterates are (1 - t) times those from 0, moved: never worse, and never later at a tolerance."""
    b = noise(len(matrix), seed=seed)
    exact = torch.linalg.solve(matrix, b)
    for k in (1, 2, 4):
        cold, warm = (energy(matrix, exact - CG(max_steps=k).solve(matrix, b, x0=x0).x) for x0 in (None, part * exact))
        assert warm <= (1 - part) * cold + 1e-9 * energy(matrix, exact)
    cold, warm = (CG(rtol=1e-6).solve(matrix, b, x0=x0) for x0 in (None, part * exact))
    assert warm.num_steps <= cold.num_steps


@settings(max_examples=40)
@given(st.lists(st.floats(1.0, 10.0), min_size=1, max_size=4), st.integers(1, 4), st.integers(-6, 6), seeds)
def test_exact_in_as_many_steps_as_distinct_eigenvalues(values, repeats, digits, seed):
    distinct = sorted({round(value, 1) for value in values})
    matrix = 10.0**digits * rotated(distinct * repeats, seed)
    b = noise(len(matrix), seed=seed)
    solution = CG(rtol=1e-9).solve(matrix, b)
    assert solution.status == Status.CONVERGED and solution.num_steps <= len(distinct)
    budget = CG(max_steps=len(distinct)).solve(matrix, b)
    assert residual(matrix, budget.x, b) <= 1e-9 * b.norm()


@settings(max_examples=40)
@given(spd_matrices(), seeds, st.integers(0, 40))
def test_more_steps_than_needed_do_no_harm(matrix, seed, more):
    b = noise(len(matrix), seed=seed)
    solution = CG(max_steps=3 * len(b) + more).solve(matrix, b)
    assert solution.success and residual(matrix, solution.x, b) <= 1e-9 * b.norm()


@settings(max_examples=40)
@given(spd_matrices(condition=100), seeds, st.data())
def test_preconditioned_equals_plain_at_convergence(matrix, seed, data):
    b = noise(len(matrix), seed=seed)
    preconditioner = data.draw(spd_matrices(n=len(b), condition=10))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    plain = CG(rtol=1e-10, max_steps=500).solve(matrix, b)
    solution = CG(rtol=1e-10, max_steps=500).solve(matrix, b, preconditioner=preconditioner)
    assert plain.status == solution.status == Status.CONVERGED
    assert (plain.x - solution.x).norm() <= 3e-10 * b.norm() / eigenvalues[0]


@settings(max_examples=40)
@given(spectra(indefinite=True, condition=100), seeds)
def test_negative_curvature_ends_conjugate_gradients_or_was_not_met(eigenvalues, seed):
    """x is the minimiser of 1/2 x'Ax - b'x along the directions taken: its value never exceeds that of 0."""
    matrix, b = rotated(eigenvalues, seed), noise(len(eigenvalues), seed=seed)
    solution = CG(rtol=1e-8).solve(matrix, b)
    assert solution.status in (Status.BREAKDOWN, Status.CONVERGED)
    if solution.status == Status.CONVERGED:
        assert residual(matrix, solution.x, b) <= 1.001e-8 * b.norm()
    assert solution.x @ matrix @ solution.x / 2 - b @ solution.x <= 1e-12 * (b.norm() * solution.x.norm())


@pytest.mark.parametrize(
    "solver",
    [CG(rtol=1e-9), MINRES(rtol=1e-9), Dense(), ScipySolver(rtol=1e-9), ScipySolver(method="minres")],
    ids=repr,
)
@settings(max_examples=10)
@given(spd_matrices(n=4, batch=(3,)), spectra(4, indefinite=True, condition=10), seeds)
def test_a_bad_system_of_a_batch_leaves_the_others_alone(solver, matrix, eigenvalues, seed):
    """Drawn systems beside an indefinite one: as alone, each with its own status."""
    matrix = torch.cat([matrix, rotated(eigenvalues, seed)[None]])
    b = noise(4, 4, seed=seed)
    together = solver.solve(matrix, b)
    for i in range(4):
        alone = solver.solve(matrix[i], b[i])
        assert together.status[i] == alone.status
        torch.testing.assert_close(
            matrix[i] @ together.x[i], matrix[i] @ alone.x, rtol=0, atol=1e-4 * b[i].norm().item()
        )
    assert together.success[:3].all()


@settings(max_examples=20)
@given(spd_matrices(condition=50), seeds, st.integers(1, 20))
def test_every_step_of_the_scaled_neumann_series_lowers_the_residual(matrix, seed, steps):
    b = noise(len(matrix), seed=seed)
    norms = [Neumann(max_steps=k).solve(matrix, b).residual_norm for k in (steps, steps + 1)]
    assert norms[1] <= norms[0] * (1 + 1e-9) + 1e-12 * b.norm() <= b.norm() * (1 + 1e-6)


@settings(max_examples=60)
@given(spectra(indefinite=True, condition=100), seeds, st.booleans())
def test_minres_solves_indefinite_systems_whatever_the_start(eigenvalues, seed, warm):
    matrix, b = rotated(eigenvalues, seed), noise(len(eigenvalues), seed=seed)
    x0 = noise(len(b), seed=seed + 1) / min(map(abs, eigenvalues)) if warm else None
    solution = MINRES(rtol=1e-8).solve(matrix, b, x0=x0)
    assert solution.status == Status.CONVERGED and residual(matrix, solution.x, b) <= 1.001e-8 * b.norm()
    error = (solution.x - torch.linalg.solve(matrix, b)).norm()
    assert error <= 1.01e-8 * b.norm() / min(map(abs, eigenvalues))


@settings(max_examples=40)
@given(spectra(indefinite=True, condition=100), seeds)
def test_the_residual_of_minres_never_grows_and_is_at_most_that_of_cg(eigenvalues, seed):
    matrix, b = rotated(eigenvalues, seed), noise(len(eigenvalues), seed=seed)
    last = b.norm()
    for k in range(1, 6):
        left = residual(matrix, MINRES(max_steps=k).solve(matrix, b).x, b)
        assert left <= last + 1e-9 * b.norm()
        assert left <= residual(matrix, CG(max_steps=k).solve(matrix, b).x, b) + 1e-9 * b.norm()
        last = left


@settings(max_examples=40)
@given(spectra(indefinite=True, condition=30), seeds, st.data())
def test_preconditioned_minres_equals_plain_at_convergence(eigenvalues, seed, data):
    matrix, b = rotated(eigenvalues, seed), noise(len(eigenvalues), seed=seed)
    preconditioner = data.draw(spd_matrices(n=len(b), condition=10))
    plain = MINRES(rtol=1e-10, max_steps=500).solve(matrix, b)
    solution = MINRES(rtol=1e-10, max_steps=500).solve(matrix, b, preconditioner=preconditioner)
    assert plain.status == solution.status == Status.CONVERGED
    assert (plain.x - solution.x).norm() <= 3e-10 * b.norm() / min(map(abs, eigenvalues))


@settings(max_examples=60)
@given(spectra(indefinite=True, condition=100), st.integers(1, 3), seeds, st.booleans())
def test_singular_systems_are_solved_where_they_have_a_solution_and_said_where_not(eigenvalues, zeros, seed, has_one):
    matrix = rotated(eigenvalues + [0.0] * zeros, seed)
    b = noise(len(matrix), seed=seed)
    b = matrix @ b / max(map(abs, eigenvalues)) if has_one else b
    solution = MINRES(rtol=1e-6).solve(matrix, b)
    assert torch.isfinite(solution.x).all()
    if has_one:
        assert solution.status == Status.CONVERGED and residual(matrix, solution.x, b) <= 1.001e-6 * b.norm()
    else:
        inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9)
        least = residual(matrix, inverse @ b, b)
        assert solution.success == bool(least <= 1e-6 * b.norm())
        assert residual(matrix, solution.x, b) <= 1.001 * least + 1e-6 * b.norm()


@settings(max_examples=40)
@given(spd_matrices(condition=1e3), seeds, st.integers(0, 2**16))
def test_nystrom_of_full_rank_leaves_two_steps(matrix, seed, own):
    b = noise(len(matrix), seed=seed)
    for solver in (CG, MINRES):
        solution = solver(rtol=1e-8, preconditioner=Nystrom(rank=len(b), seed=own)).solve(matrix, b)
        assert solution.status == Status.CONVERGED and solution.num_steps <= 2
    direct = NystromInverse(rank=len(b), seed=own, rtol=1e-8).solve(matrix, b)
    assert direct.status == Status.CONVERGED and residual(matrix, direct.x, b) <= 1.001e-8 * b.norm()


@settings(max_examples=40)
@given(spd_matrices(condition=100), seeds, st.integers(1, 8), st.sampled_from([CG, MINRES]))
def test_built_preconditioners_change_the_way_and_not_the_solution(matrix, seed, size, kind):
    b = noise(len(matrix), seed=seed)
    exact = torch.linalg.solve(matrix, b)
    for preconditioner in (Nystrom(rank=size, seed=seed), Jacobi(probes=size + 1, seed=seed)):
        solution = kind(rtol=1e-10, max_steps=500, preconditioner=preconditioner).solve(matrix, b)
        assert solution.status == Status.CONVERGED
        assert (solution.x - exact).norm() <= 2e-10 * b.norm() / torch.linalg.eigvalsh(matrix)[0]
