"""What every solver promises, checked for every public one."""

import dataclasses
import inspect

import pytest
import torch

import imaml_solvers
from imaml.testing import solver_conformance
from imaml_solvers import (
    CG,
    MINRES,
    Dense,
    Jacobi,
    LinearOperator,
    LinearSolver,
    Neumann,
    Nystrom,
    NystromInverse,
    ScipySolver,
    Status,
)
from tests.solvers.systems import F64, Recorded, noise, residual, rotated, spread

RTOL = 1e-8
SCIPY_METHODS = ("bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "minres")
TABLE = {
    CG: [
        CG(rtol=RTOL),
        CG(rtol=RTOL, max_steps=50),
        CG(rtol=RTOL, preconditioner=Jacobi(probes=3)),
        CG(rtol=RTOL, preconditioner=Nystrom(rank=3)),
    ],
    MINRES: [MINRES(rtol=RTOL), MINRES(rtol=RTOL, preconditioner=Nystrom(rank=3))],
    Neumann: [Neumann(rtol=RTOL, max_steps=1500)],
    Dense: [Dense()],
    NystromInverse: [NystromInverse(rank=12, rtol=RTOL)],
    ScipySolver: [ScipySolver(method=method, rtol=RTOL) for method in SCIPY_METHODS],
}
"""Every public solver, in configurations that reach the relative residual RTOL on a well-conditioned system."""

SOLVERS = [solver for solvers in TABLE.values() for solver in solvers]
PUBLIC = [
    value
    for value in vars(imaml_solvers).values()
    if inspect.isclass(value) and issubclass(value, LinearSolver) and not inspect.isabstract(value)
]

for position, solver in enumerate(SOLVERS):  # collected by pytest
    name = f"Test{type(solver).__name__}{position}"
    globals()[name] = solver_conformance(lambda solver=solver: solver, rtol=RTOL)

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_public_solver_is_in_the_table(kind):
    assert kind in TABLE, f"{kind.__name__} has no entry in TABLE of {__file__}: add configurations to check."
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))


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
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_nor_does_that_of_the_matrix_alone(solver, size):
    solver = dataclasses.replace(solver, rtol=1e-4) if hasattr(solver, "rtol") else solver
    matrix, b = rotated(spread(5, 10)).float(), noise(5).float()
    solution = solver.solve(size * matrix, b)
    assert solution.status == Status.CONVERGED
    torch.testing.assert_close(solution.x * size, solver.solve(matrix, b).x, rtol=1e-3, atol=1e-3)


@every_solver
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-30])
def test_converged_is_true_of_a_start_far_larger_than_the_solution(solver, size):
    if solver._uses_x0:
        solver = dataclasses.replace(solver, rtol=1e-5)
        matrix, b = rotated(spread(5, 10)).float(), size * noise(5).float()
        solution = solver.solve(matrix, b, x0=torch.ones(5))
        left = residual(matrix.double(), solution.x.double(), b.double()) / b.double().norm()
        if solution.status == Status.CONVERGED:
            assert left <= 1.1e-5
        assert solution.status == Status.CONVERGED or not isinstance(solver, CG | MINRES)


@every_solver
def test_float32_stays_float32(solver):
    solver = dataclasses.replace(solver, rtol=1e-4) if hasattr(solver, "rtol") else solver
    matrix, b = rotated(spread(8, 20)), noise(8)
    solution = solver.solve(matrix.float(), b.float())
    assert solution.x.dtype == solution.residual_norm.dtype == torch.float32
    assert solution.status == Status.CONVERGED
    assert residual(matrix, solution.x.double(), b) <= 1.1e-4 * b.norm()


@pytest.mark.parametrize("kind", [CG, Neumann], ids=lambda kind: kind.__name__)
def test_an_indefinite_system_is_a_breakdown(kind):
    solution = TABLE[kind][0].solve(rotated([-2.0, -0.5, 0.3, 1.0, 2.0, 4.0]), noise(6))
    assert solution.status == Status.BREAKDOWN


@pytest.mark.parametrize("kind", [CG, Dense], ids=lambda kind: kind.__name__)
def test_a_singular_system_is_a_breakdown(kind):
    solution = TABLE[kind][0].solve(torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=F64)), noise(3))
    assert solution.status == Status.BREAKDOWN


@every_solver
def test_an_exact_start_takes_no_step_and_a_bad_one_gives_zero(solver):
    if solver._uses_x0:
        matrix, b = rotated(spread(6, 10)), noise(3, 6)
        x0 = torch.linalg.solve(matrix, b.T).T
        x0[1], x0[2, 0] = noise(6), torch.nan
        solution = solver.solve(matrix, b, x0=x0)
        assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
        assert solution.num_steps[0] == 0 and torch.equal(solution.x[0], x0[0]) and solution.num_steps[1] > 0
        assert (solution.x[2] == 0).all() and solution.residual_norm[2] == pytest.approx(b[2].norm().item())


@every_solver
def test_a_preconditioner_saves_steps(solver):
    if solver._uses_preconditioner:
        matrix, b = torch.diag(spread(20, 1e3)) + 0.001 * rotated(spread(20, 10)), noise(20)
        inverse = 1 / matrix.diagonal()
        solution = solver.solve(matrix, b, preconditioner=lambda r: inverse * r)
        without = dataclasses.replace(solver, preconditioner=None) if hasattr(solver, "preconditioner") else solver
        assert solution.status == Status.CONVERGED and solution.num_steps < without.solve(matrix, b).num_steps


@every_solver
def test_every_form_of_a_map_is_accepted(solver):
    matrix, b = rotated(spread(5, 10)), noise(5)
    expected = solver.solve(matrix, b).x
    for op in (LinearOperator.from_matrix(matrix), Recorded(matrix), lambda x: matrix @ x):
        torch.testing.assert_close(solver.solve(op, b).x, expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(
    "kind", [kind for kind in PUBLIC if hasattr(TABLE[kind][0], "max_steps")], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize(
    ("option", "value"),
    [("max_steps", 0), ("max_steps", -1), ("rtol", -1e-3), ("rtol", float("nan")), ("atol", -1.0), ("atol", torch.inf)],
)
def test_bad_stopping_rules_are_named(kind, option, value):
    with pytest.raises(ValueError, match=rf"`{option}` must be .*Got {value}"):
        kind(**{"max_steps": 5, option: value})
