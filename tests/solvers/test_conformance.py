"""What every solver promises, checked for every public one."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import imaml_solvers
from imaml_solvers import CG, Dense, LinearOperator, LinearSolver, Neumann, ScipySolver, Solution, Status
from tests.solvers.systems import F64, Recorded, noise, problems, residual, rotated, spread

RTOL = 1e-8
SCIPY_METHODS = ("bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "minres")
TABLE = {
    CG: [CG(rtol=RTOL), CG(rtol=RTOL, max_steps=50)],
    Neumann: [Neumann(rtol=RTOL, max_steps=1500)],
    Dense: [Dense()],
    ScipySolver: [ScipySolver(method=method, rtol=RTOL) for method in SCIPY_METHODS],
}
"""Every public solver, in configurations that reach the relative residual RTOL on a well-conditioned system."""

SOLVERS = [solver for solvers in TABLE.values() for solver in solvers]
PUBLIC = [
    value
    for value in vars(imaml_solvers).values()
    if inspect.isclass(value) and issubclass(value, LinearSolver) and not inspect.isabstract(value)
]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_public_solver_is_in_the_table(kind):
    assert kind in TABLE, f"{kind.__name__} has no entry in TABLE of {__file__}: add configurations to check."
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))


def assert_converged(solution, matrix, b):
    """CONVERGED, with the residual that it says, at the solution of numpy."""
    assert (solution.status == Status.CONVERGED).all() and solution.success.all()
    true = residual(matrix, solution.x, b)
    assert (true <= 1.001 * RTOL * b.norm(dim=-1)).all()
    torch.testing.assert_close(solution.residual_norm, true, rtol=1e-3, atol=1e-13 * b.norm().item())
    expected = torch.from_numpy(np.linalg.solve(matrix.numpy(), b.unsqueeze(-1).numpy())).squeeze(-1)
    error = (solution.x - expected).norm(dim=-1)
    smallest = torch.linalg.eigvalsh(matrix).abs().amin(-1)
    assert (error <= 1.01 * RTOL * b.norm(dim=-1) / smallest).all()


@every_solver
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_solves_batches_of_any_shape(solver, batch):
    count = int(np.prod(batch))
    matrix = torch.stack([rotated(spread(6, 20), seed) for seed in range(count)]).reshape(*batch, 6, 6)
    b = noise(*batch, 6)
    solution = solver.solve(matrix, b)
    assert isinstance(solution, Solution)
    assert solution.x.shape == b.shape and solution.x.dtype == b.dtype
    for per_system in (solution.status, solution.num_steps):
        assert per_system.shape == batch and per_system.dtype == torch.int64
    assert solution.residual_norm.shape == batch and solution.residual_norm.dtype == b.dtype
    assert_converged(solution, matrix, b)


@every_solver
@settings(max_examples=8)
@given(problem=problems(largest=8, condition=20))
def test_solves_what_hypothesis_draws(solver, problem):
    matrix, b, _ = problem
    assert_converged(solver.solve(matrix, b), matrix, b)


@every_solver
def test_batched_equals_one_by_one(solver):
    matrix = torch.stack([rotated(spread(6, condition), seed) for seed, condition in enumerate((1, 5, 30))])
    b = noise(3, 6) * torch.tensor([[1.0], [1e-9], [1e9]], dtype=F64)
    together = solver.solve(matrix, b)
    for i in range(3):
        alone = solver.solve(matrix[i], b[i])
        torch.testing.assert_close(together.x[i], alone.x, rtol=1e-7, atol=1e-12 * b[i].norm().item())
        assert together.num_steps[i] == alone.num_steps and together.status[i] == alone.status


@every_solver
def test_the_identity_is_solved_exactly(solver):
    b = noise(3, 5)
    solution = solver.solve(lambda x: x, b)
    torch.testing.assert_close(solution.x, b, rtol=1e-14, atol=0)
    assert (solution.status == Status.CONVERGED).all()


@every_solver
def test_a_system_of_size_one(solver):
    solution = solver.solve(torch.tensor([[4.0]], dtype=F64), torch.tensor([2.0], dtype=F64))
    assert solution.x.item() == pytest.approx(0.5, rel=1e-7) and solution.status == Status.CONVERGED


@every_solver
def test_a_zero_right_hand_side_gives_zero_in_no_step(solver):
    b = noise(2, 5)
    b[0] = 0
    starts = (None, torch.ones_like(b)) if solver._uses_x0 else (None,)
    for x0 in starts:
        solution = solver.solve(rotated(spread(5, 10)), b, x0=x0)
        assert (solution.x[0] == 0).all() and solution.residual_norm[0] == 0
        assert solution.num_steps[0] == 0 and (solution.status == Status.CONVERGED).all()


@every_solver
@pytest.mark.parametrize("size_b", [1e-25, 1e25])
@pytest.mark.parametrize("size_a", [1e-10, 1e10])
def test_scale_does_not_matter_even_where_squares_leave_the_range(solver, size_a, size_b):
    # in float32 the square of 1e-25 is zero and that of 1e25 infinite
    solver = dataclasses.replace(solver, rtol=1e-4) if hasattr(solver, "rtol") else solver
    matrix, b = rotated(spread(5, 10)).float(), noise(5).float()
    plain = solver.solve(matrix, b)
    scaled = solver.solve(size_a * matrix, size_b * b)
    assert scaled.status == plain.status == Status.CONVERGED
    torch.testing.assert_close(scaled.x * size_a / size_b, plain.x, rtol=1e-3, atol=1e-3)


@every_solver
def test_float32_stays_float32(solver):
    solver = dataclasses.replace(solver, rtol=1e-4) if hasattr(solver, "rtol") else solver
    matrix, b = rotated(spread(8, 20)), noise(8)
    solution = solver.solve(matrix.float(), b.float())
    assert solution.x.dtype == solution.residual_norm.dtype == torch.float32
    assert solution.status == Status.CONVERGED
    assert residual(matrix, solution.x.double(), b) <= 1.1e-4 * b.norm()


@every_solver
@pytest.mark.parametrize("condition", [1e6, 1e12])
def test_an_ill_conditioned_system_never_claims_more_than_is_true(solver, condition):
    if isinstance(solver, Neumann | ScipySolver):
        solver = dataclasses.replace(solver, max_steps=100)
    matrix, b = rotated(spread(20, condition)), noise(20)
    solution = solver.solve(matrix, b)
    assert torch.isfinite(solution.x).all()
    if solution.status == Status.CONVERGED and not isinstance(solver, Dense):  # which has no tolerance
        assert residual(matrix, solution.x, b) <= 1.001 * RTOL * b.norm()


@every_solver
def test_an_indefinite_system_is_solved_or_said_not_to_be(solver):
    if isinstance(solver, ScipySolver):
        solver = dataclasses.replace(solver, max_steps=100)
    matrix, b = rotated([-2.0, -0.5, 0.3, 1.0, 2.0, 4.0]), noise(6)
    solution = solver.solve(matrix, b)
    assert torch.isfinite(solution.x).all()
    assert solution.success == (residual(matrix, solution.x, b) <= 1.001 * RTOL * b.norm())
    if isinstance(solver, CG | Neumann):
        assert solution.status == Status.BREAKDOWN


@every_solver
def test_a_singular_system_is_a_failure(solver):
    if isinstance(solver, ScipySolver):
        solver = dataclasses.replace(solver, max_steps=100)
    solution = solver.solve(torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=F64)), noise(3))
    assert not solution.success and torch.isfinite(solution.x).all()
    if isinstance(solver, CG | Dense):
        assert solution.status == Status.BREAKDOWN


@every_solver
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_said_and_stays_with_its_system(solver, bad):
    matrix = torch.stack([rotated(spread(5, 10), seed) for seed in range(3)])
    b = noise(3, 5)
    good = solver.solve(matrix, b)
    matrix[1, 2, 2] = bad
    b_with = b.clone()
    b_with[0, 1] = bad
    for solution, i in ((solver.solve(matrix, b), 1), (solver.solve(matrix.nan_to_num(1, 1, 1), b_with), 0)):
        assert solution.status[i] == Status.NONFINITE and torch.isfinite(solution.x).all()
        assert (solution.status[2], solution.status[1 - i]) == (Status.CONVERGED, Status.CONVERGED)
        torch.testing.assert_close(solution.x[2], good.x[2], rtol=1e-12, atol=1e-12)


@every_solver
def test_every_form_of_a_map_is_accepted(solver):
    matrix, b = rotated(spread(5, 10)), noise(5)
    expected = solver.solve(matrix, b).x
    for op in (LinearOperator.from_matrix(matrix), Recorded(matrix), lambda x: matrix @ x):
        torch.testing.assert_close(solver.solve(op, b).x, expected, rtol=1e-12, atol=1e-12)


@every_solver
def test_no_derivative_flows_and_no_input_changes(solver, capfd):
    matrix, b = rotated(spread(5, 10)), noise(5)
    matrix_before, b_before = matrix.clone(), b.clone()
    seen = []

    def mv(x):
        seen.append(torch.is_grad_enabled())
        return matrix @ x

    solution = solver.solve(mv, b.requires_grad_())
    assert seen and not any(seen) and torch.is_grad_enabled()
    assert not solution.x.requires_grad and not solution.residual_norm.requires_grad
    assert torch.equal(matrix, matrix_before) and torch.equal(b, b_before)
    assert capfd.readouterr() == ("", "")


@every_solver
def test_a_start_is_used_or_refused(solver):
    matrix, b = rotated(spread(6, 10)), noise(2, 6)
    if not solver._uses_x0:
        with pytest.raises(ValueError, match="cannot use a start.*leave it out"):
            solver.solve(matrix, b, x0=b)
        return
    exact = torch.linalg.solve(matrix, b.T).T
    x0 = torch.stack([exact[0], noise(6)])
    before = x0.clone()
    solution = solver.solve(matrix, b, x0=x0)
    assert solution.num_steps[0] == 0 and torch.equal(solution.x[0], exact[0]) and solution.num_steps[1] > 0
    assert_converged(solution, matrix, b)
    assert torch.equal(x0, before)


@every_solver
def test_a_start_that_is_not_finite_is_said(solver):
    if solver._uses_x0:
        matrix, b = rotated(spread(3, 10)), noise(2, 3)
        x0 = torch.zeros_like(b)
        x0[0, 0] = torch.nan
        solution = solver.solve(matrix, b, x0=x0)
        assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
        assert (solution.x[0] == 0).all() and solution.residual_norm[0] == pytest.approx(b[0].norm().item())


@every_solver
def test_a_preconditioner_is_used_or_refused(solver):
    matrix = torch.diag(spread(20, 1e3)) + 0.001 * rotated(spread(20, 10))
    b = noise(20)
    inverse = 1 / matrix.diagonal()
    if not solver._uses_preconditioner:
        with pytest.raises(ValueError, match="cannot use a preconditioner"):
            solver.solve(matrix, b, preconditioner=lambda r: inverse * r)
        return
    solution = solver.solve(matrix, b, preconditioner=lambda r: inverse * r)
    assert_converged(solution, matrix, b)
    assert solution.num_steps < solver.solve(matrix, b).num_steps


@every_solver
def test_bad_input_is_named(solver):
    matrix, b = rotated(spread(3, 10)), noise(3)
    with pytest.raises(TypeError, match="floating dtype. Got torch.int64"):
        solver.solve(matrix, torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="Got list"):
        solver.solve(matrix, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"\(\*batch, n\).*Got \(\)"):
        solver.solve(matrix, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"n >= 1. Got \(2, 0\)"):
        solver.solve(matrix, torch.ones(2, 0))
    with pytest.raises(ValueError, match=r"like b, \(3,\) of torch.float64. Got \(2,\) of torch.float64"):
        solver.solve(lambda x: x[:2], b)
    with pytest.raises(ValueError, match=r"`op`.*Got \(3,\) of torch.float32"):
        solver.solve(lambda x: x.float(), b)
    with pytest.raises(TypeError, match="must be a tensor. Got list"):
        solver.solve(lambda x: x.tolist(), b)
    with pytest.raises(TypeError, match="linear map must be.*Got str"):
        solver.solve("matrix", b)
    with pytest.raises(ValueError, match=r"fit the matrix \(3, 3\).*Got \(4,\)"):
        solver.solve(matrix, noise(4))
    if solver._uses_x0:
        with pytest.raises(ValueError, match=r"`x0` must be like b.*Got \(4,\) of torch.float64"):
            solver.solve(matrix, b, x0=noise(4))
        with pytest.raises(ValueError, match=r"`x0` must be like b.*Got \(3,\) of torch.float32"):
            solver.solve(matrix, b, x0=b.float())
    if solver._uses_preconditioner:
        with pytest.raises(ValueError, match=r"`preconditioner`.*Got \(2,\)"):
            solver.solve(matrix, b, preconditioner=lambda r: r[:2])


@pytest.mark.parametrize("kind", [kind for kind in PUBLIC if kind is not Dense], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("option", "value"),
    [("max_steps", 0), ("max_steps", -1), ("rtol", -1e-3), ("rtol", float("nan")), ("atol", -1.0), ("atol", torch.inf)],
)
def test_bad_stopping_rules_are_named(kind, option, value):
    with pytest.raises(ValueError, match=rf"`{option}` must be .*Got {value}"):
        kind(**{"max_steps": 5, option: value})
