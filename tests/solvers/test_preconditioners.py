"""Jacobi and Nystrom: what they build, from how many products, and what CG and MINRES gain by it."""

import pytest
import torch

from imaml_solvers import CG, MINRES, Jacobi, Nystrom, NystromInverse, Preconditioner, Status
from imaml_solvers._operator import LinearOperator
from imaml_solvers._sketch import sketch
from tests.solvers.systems import F64, Recorded, noise, residual, rotated, spread

SOLVERS = [CG, MINRES]
PRECONDITIONERS = [Jacobi(), Jacobi(probes=50), Nystrom(rank=6), Nystrom(rank=6, shift=1.0), Nystrom(rank=40)]
every_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=repr)
every_solver = pytest.mark.parametrize("kind", SOLVERS, ids=lambda kind: kind.__name__)


def damped(rank, n=40, largest=1e4, seed=0):
    """I + H for H of some rank, whose eigenvalues are spread over four decades up to `largest`."""
    return rotated(torch.cat([1 + largest * spread(rank, 1e4), torch.ones(n - rank, dtype=F64)]), seed)


def dense(preconditioner, matrix, dtype=F64):
    op = preconditioner.build(LinearOperator.from_matrix(matrix.to(dtype)), matrix[0].to(dtype))
    return torch.stack([op.mv(column) for column in torch.eye(len(matrix), dtype=dtype)], -1)


@every_preconditioner
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "spectrum",
    [spread(40, 1e6), torch.cat([spread(30, 10), -spread(10, 10)]), -spread(40, 10), torch.zeros(40, dtype=F64)],
    ids=["definite", "indefinite", "negative", "zero"],
)
def test_it_is_positive_definite_whatever_the_matrix_is(preconditioner, dtype, spectrum):
    inverse = dense(preconditioner, rotated(spectrum), dtype)
    torch.testing.assert_close(inverse, inverse.mT, rtol=1e-4, atol=1e-6)
    assert torch.linalg.eigvalsh(inverse.double()).min() > 0


@every_preconditioner
@every_solver
def test_the_solution_is_that_without(kind, preconditioner):
    matrix = torch.stack([damped(8, seed=seed) for seed in range(3)])
    b = noise(3, 40)
    solution = kind(rtol=1e-9, preconditioner=preconditioner).solve(matrix, b)
    assert (solution.status == Status.CONVERGED).all() and (residual(matrix, solution.x, b) <= 1e-9 * b.norm()).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)
    assert solution.smallest_eigenvalue is None


@every_preconditioner
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_batched_equals_one_by_one(preconditioner, bad):
    matrix, b = torch.stack([damped(5), rotated(spread(40, 1e3)), 1e8 * damped(9)]), noise(3, 40)
    matrix[1, 0, 0] = bad
    together = preconditioner.build(LinearOperator.from_matrix(matrix), b).mv(b)
    for i in (0, 2):
        alone = preconditioner.build(LinearOperator.from_matrix(matrix[i]), b[i]).mv(b[i])
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-12)
    assert torch.equal(together[1], b[1])


@every_preconditioner
def test_the_seed_alone_decides_and_the_global_state_is_left_alone(preconditioner):
    op, b, state = LinearOperator.from_matrix(damped(30)), noise(40), torch.get_rng_state()
    first = preconditioner.build(op, b).mv(b)
    torch.manual_seed(7)
    assert torch.equal(preconditioner.build(op, b).mv(b), first)
    torch.set_rng_state(state)
    preconditioner.build(op, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("preconditioner", "digits"), [(Jacobi(), 40), (Jacobi(probes=50), 100), (Nystrom(rank=6), 100)], ids=repr
)
def test_the_scale_of_the_matrix_does_not_matter(preconditioner, digits):
    # in float32 the square of 2^-100 is zero and that of 2^100 infinite
    matrix = damped(8).float()
    for scale in (2.0**-digits, 2.0**digits):
        scaled = dense(preconditioner, scale * matrix, torch.float32)
        torch.testing.assert_close(scaled, dense(preconditioner, matrix, torch.float32))


@pytest.mark.parametrize("make", [lambda seed: Jacobi(seed=seed), lambda seed: Nystrom(rank=6, seed=seed)])
def test_another_seed_is_another_draw(make):
    assert not torch.equal(dense(make(0), damped(30)), dense(make(1), damped(30)))


@every_solver
@pytest.mark.parametrize(
    ("preconditioner", "products"), [(Jacobi(probes=7), 7), (Jacobi(probes=99), 40), (Nystrom(rank=9), 9), (None, 0)]
)
def test_building_takes_as_many_products_as_documented_and_none_for_nothing(kind, preconditioner, products):
    op, b = Recorded(damped(8)), noise(40)
    solver = kind(rtol=1e-6, preconditioner=preconditioner)
    solution = solver.solve(op, b)
    assert len(op.seen) == products + solution.num_steps + 1
    op.seen.clear()
    assert solver.solve(op, torch.zeros_like(b)).status == Status.CONVERGED and not op.seen
    # one given to `solve` takes its place, and nothing is built
    solver.solve(op, b, preconditioner=torch.linalg.inv(op.matrix))
    assert len(op.seen) == 2


@every_solver
@pytest.mark.parametrize("spectrum", [spread(30, 1e3), spread(30, 1.0), 5 + spread(30, 1e6)])
def test_nystrom_of_full_rank_takes_two_steps(kind, spectrum):
    solution = kind(rtol=1e-9, preconditioner=Nystrom(rank=30)).solve(rotated(spectrum), noise(30))
    assert solution.status == Status.CONVERGED and solution.num_steps <= 2


@every_solver
@pytest.mark.parametrize("shift", [None, 1.0])
def test_nystrom_takes_two_steps_where_its_rank_is_that_of_what_is_damped(kind, shift):
    matrix, b = damped(8), noise(40)
    plain = kind(rtol=1e-8).solve(matrix, b)
    solution = kind(rtol=1e-8, preconditioner=Nystrom(rank=10, shift=shift)).solve(matrix, b)
    assert solution.status == Status.CONVERGED and solution.num_steps <= 2 < plain.num_steps


def test_nystrom_is_the_formula_of_the_paper():
    h = rotated(10 * spread(12, 1e2))
    omega = torch.linalg.qr(noise(12, 4, seed=5)).Q
    approximation = (h @ omega) @ torch.linalg.inv(omega.T @ h @ omega) @ (h @ omega).T
    values, vectors = torch.linalg.eigh(approximation)
    values, vectors = values[-4:], vectors[:, -4:]
    mu = 0.3
    expected = torch.eye(12, dtype=F64) - vectors @ vectors.T
    expected += (values[0] + mu) * vectors @ torch.diag(1 / (values + mu)) @ vectors.T
    generator = torch.Generator().manual_seed(5)
    drawn = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=F64)).Q
    torch.testing.assert_close(omega @ omega.T, drawn @ drawn.T)  # `noise` draws as `Nystrom` does
    found = dense(Nystrom(rank=4, shift=mu, seed=5), h + mu * torch.eye(12, dtype=F64))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_condition_number_is_about_that_of_the_rest():
    """(l_k + mu) / mu for the paper's preconditioner; here within a factor of 10."""
    matrix = rotated(1 + 1e4 * torch.arange(1, 201, dtype=F64) ** -2.0)
    inverse = dense(Nystrom(rank=20, shift=1.0), matrix)
    values = torch.linalg.eigvals(inverse @ matrix).real
    assert values.max() / values.min() <= 10 * (1 + 1e4 / 20**2) < 1e4 / 10


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shift", [None, 1.0])
@pytest.mark.parametrize(
    "spectrum",
    [1e4 * torch.arange(1, 101, dtype=F64) ** -2.0, torch.cat([100 * spread(5, 10), torch.linspace(-0.9, 0.5, 95)])],
    ids=["semidefinite", "indefinite"],
)
def test_no_eigenvalue_is_seen_that_is_not_there(spectrum, shift, dtype):
    matrix = rotated(1 + spectrum).to(dtype)
    for seed in range(10):
        seen = sketch(LinearOperator.from_matrix(matrix), matrix[0], 12, shift, seed)
        assert (seen.values * seen.unit).max() <= 10 * spectrum.max() and (seen.values > 0).sum() >= 3


def test_minres_takes_a_nystrom_preconditioner_of_an_indefinite_matrix():
    matrix = rotated(torch.cat([1 + 1e3 * spread(6, 10), 1 - 3 * spread(4, 10), torch.ones(50, dtype=F64)]))
    plain = MINRES(rtol=1e-8).solve(matrix, noise(60))
    solution = MINRES(rtol=1e-8, preconditioner=Nystrom(rank=12, shift=1.0)).solve(matrix, noise(60))
    assert solution.status == plain.status == Status.CONVERGED
    torch.testing.assert_close(solution.x, plain.x, rtol=1e-5, atol=1e-6)


def test_jacobi_is_exact_with_enough_products_and_for_a_diagonal_matrix():
    matrix = rotated(spread(20, 100))
    inverse = dense(Jacobi(probes=20), matrix)
    torch.testing.assert_close(inverse / inverse[0, 0], torch.diag(matrix[0, 0] / matrix.diagonal()))
    scale = torch.diag(spread(20, 1e6))
    inverse = dense(Jacobi(probes=2), scale)
    torch.testing.assert_close(inverse / inverse[0, 0], torch.diag(scale[0, 0] / scale.diagonal()))


def test_jacobi_takes_negative_entries_by_their_size():
    inverse = dense(Jacobi(probes=2), torch.diag(torch.tensor([-1.0, 4.0], dtype=F64)))
    torch.testing.assert_close(inverse, torch.diag(torch.tensor([4.0, 1.0], dtype=F64)))


def test_the_estimate_of_the_diagonal_is_unbiased_with_the_documented_variance():
    matrix = rotated(1 + spread(30, 10))
    op = LinearOperator.from_matrix(matrix)
    estimates = torch.stack([Jacobi(probes=4, seed=seed)._diagonal(op, matrix[0]) for seed in range(600)])
    variance = (matrix.square().sum(-1) - matrix.diagonal().square()) / 4
    assert ((estimates.mean(0) - matrix.diagonal()).abs() <= 4.5 * (variance / 600).sqrt()).all()
    torch.testing.assert_close(estimates.var(0), variance, rtol=0.35, atol=0)


def test_an_entry_is_not_trusted_below_its_standard_error():
    # a diagonal of zeros beside large entries: an estimate that happens to be near zero would be a huge step
    matrix = torch.ones(20, 20, dtype=F64) - torch.eye(20, dtype=F64)
    op = LinearOperator.from_matrix(matrix)
    signs = torch.randn(20, 10, generator=torch.Generator().manual_seed(0), dtype=F64).sign()
    draws = signs * (matrix @ signs)
    error = draws.std(-1) / 10**0.5
    torch.testing.assert_close(Jacobi(probes=10)._diagonal(op, matrix[0]), draws.mean(-1).abs().maximum(error))


def test_jacobi_mends_a_bad_scaling():
    scale = spread(60, 1e3)
    matrix = scale.unsqueeze(-1) * rotated(1 + 0.1 * spread(60, 10)) * scale
    plain, mended = (CG(rtol=1e-8, preconditioner=p).solve(matrix, noise(60)) for p in (None, Jacobi(probes=20)))
    assert mended.status == Status.CONVERGED and mended.num_steps < plain.num_steps / 2


@pytest.mark.parametrize(("rank", "shift"), [(10, None), (10, 1.0), (60, None)])
def test_the_inverse_is_exact_for_a_damped_matrix_of_low_rank(rank, shift):
    op, b = Recorded(torch.stack([damped(8), 1e-3 * damped(3)][: 2 if shift is None else 1])), noise(40)
    b = b.expand(len(op.matrix), 40)
    solution = NystromInverse(rank=rank, shift=shift, rtol=1e-8).solve(op, b)
    assert (solution.status == Status.CONVERGED).all() and len(op.seen) == min(rank, 40) + 1
    assert (solution.num_steps == min(rank, 40)).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(op.matrix, b), rtol=1e-6, atol=1e-6)


def test_the_inverse_says_what_it_leaves():
    matrix, b = rotated(1 + 1e-1 * torch.arange(1, 41, dtype=F64) ** -1.0), noise(40)
    spent = NystromInverse(rank=5, shift=1.0).solve(matrix, b)
    assert spent.status == Status.BUDGET_SPENT
    missed = NystromInverse(rank=5, shift=1.0, rtol=1e-8).solve(matrix, b)
    assert missed.status == Status.MAX_STEPS and torch.equal(missed.x, spent.x)
    torch.testing.assert_close(spent.residual_norm, residual(matrix, spent.x, b), rtol=1e-9, atol=0)
    loose = NystromInverse(rank=5, shift=1.0, rtol=0.1).solve(matrix, b)
    assert loose.status == Status.CONVERGED and torch.equal(loose.x, spent.x)


def test_the_inverse_is_that_of_the_shift_that_is_given():
    """A rank of one sees little of the matrix, and the rest of the inverse is 1 / shift."""
    matrix, b = rotated(torch.full((40,), 3.0, dtype=F64)), noise(40)
    along = [(NystromInverse(rank=1, shift=shift).solve(matrix, b).x @ b) / (b @ b) for shift in (2.0, 3.0)]
    assert along[0] > 1.2 * along[1] > 0


@pytest.mark.parametrize("spectrum", [spread(40, 1e3), torch.cat([spread(30, 10), -spread(10, 10)])])
def test_an_inverse_that_makes_it_worse_is_a_breakdown(spectrum):
    b = noise(40)
    solution = NystromInverse(rank=3).solve(rotated(spectrum), b)
    assert solution.status == Status.BREAKDOWN and (solution.x == 0).all()
    assert solution.residual_norm == pytest.approx(b.norm().item())


@pytest.mark.parametrize("kind", [Nystrom, NystromInverse])
def test_bad_options_are_named(kind):
    with pytest.raises(ValueError, match=r"`rank` must be >= 1. Got 0"):
        kind(rank=0)
    with pytest.raises(ValueError, match=r"`shift` must be .* Got -1.0"):
        kind(rank=3, shift=-1.0)
    with pytest.raises(ValueError, match=r"`probes` must be >= 2. Got 1"):
        Jacobi(probes=1)


@every_solver
def test_a_preconditioner_that_is_none_is_named(kind):
    with pytest.raises(TypeError, match=r"Nystrom\(rank=20\).*Got <function"):
        kind(preconditioner=lambda r: r)


def test_your_own_preconditioner_is_one_method():
    class Halve(Preconditioner):
        def build(self, op, like):
            return LinearOperator(lambda r: r / 2)

    assert CG(rtol=1e-8, preconditioner=Halve()).solve(damped(5), noise(40)).status == Status.CONVERGED
