"""What every `LinearSolver` promises, as a class of tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from imaml.testing._draws import generator, normal, seeds
from imaml.testing._spectra import rotated, spd_matrices, spectra
from imaml_solvers import LinearSolver, Solution, Status

drawn = settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # draws are small: to shrink them takes minutes, in vain
    # pytest makes a new instance for every test, which hypothesis takes for trouble; an instance has no state here
    suppress_health_check=[HealthCheck.differing_executors],
)


def solver_conformance(make: Callable[[], LinearSolver], *, rtol: float = 1e-5) -> type[SolverConformance]:
    """Make a class of tests of a solver, for pytest to collect.

    For example `TestMine = solver_conformance(lambda: Mine(max_steps=200))`.

    Args:
        make: Returns the solver, in a configuration that solves symmetric positive definite systems of up to 8 unknowns
            and a condition number of up to 20 to the relative residual `rtol` in float64.
        rtol: The relative residual that CONVERGED claims, at most.

    Returns:
        A subclass of `SolverConformance`.
    """
    return type("SolverConformance", (SolverConformance,), {"make": staticmethod(make), "rtol": rtol})


class SolverConformance:
    """Tests what every correct solver promises; `solver_conformance` makes a subclass of it."""

    rtol: ClassVar[float]

    @staticmethod
    def make() -> LinearSolver:
        """The solver under test."""
        raise NotImplementedError

    @pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_batches_of_any_shape_keep_shape_and_dtype(self, batch: tuple[int, ...], dtype: torch.dtype) -> None:
        """The fields of a solution have the documented shapes and dtypes."""
        matrix = torch.stack([_matrix(6, 20, seed) for seed in range(math.prod(batch))]).view(*batch, 6, 6).to(dtype)
        b = _vector(*batch, 6).to(dtype)
        solution = self.make().solve(matrix, b)
        assert isinstance(solution, Solution)
        assert (solution.x.shape, solution.x.dtype) == (b.shape, dtype)
        assert (solution.residual_norm.shape, solution.residual_norm.dtype) == (batch, dtype)
        for per_system in (solution.status, solution.num_steps):
            assert (per_system.shape, per_system.dtype) == (batch, torch.int64)
        if dtype == torch.float64:
            self._assert_solved(solution, matrix, b)

    @drawn
    @given(matrix=spd_matrices(condition=20), seed=seeds)
    def test_well_conditioned_systems_are_solved(self, matrix: Tensor, seed: int) -> None:
        """Systems of any size from 1, of any scale, with repeated, clustered and spread eigenvalues."""
        b = normal(generator(seed), len(matrix))
        solution = self.make().solve(matrix, b)
        self._assert_solved(solution, matrix, b)
        error = matrix @ solution.x - b
        assert abs(error.norm() - solution.residual_norm) <= 0.1 * self.rtol * b.norm(), (
            "residual_norm is not |b - A x|"
        )

    @drawn
    @given(matrix=spd_matrices(condition=20, n=5, batch=(3,)), seed=seeds)
    def test_batched_equals_one_by_one(self, matrix: Tensor, seed: int) -> None:
        """Every system of a batch has its own stopping."""
        b = normal(generator(seed), 3, 5) * torch.tensor([[1.0], [1e-9], [1e9]], dtype=torch.float64)
        together = self.make().solve(matrix, b)
        self._assert_solved(together, matrix, b)
        for i in range(3):
            alone = self.make().solve(matrix[i], b[i])
            assert together.status[i] == alone.status
            difference = matrix[i] @ (together.x[i] - alone.x)
            assert difference.norm() <= 2.01 * self.rtol * b[i].norm()

    def test_the_identity(self) -> None:
        """A = I is solved by x = b."""
        b = _vector(3, 5)
        self._assert_solved(self.make().solve(lambda x: x, b), torch.eye(5, dtype=torch.float64), b)

    def test_zero_right_hand_sides(self) -> None:
        """Where b = 0: x = 0 in no step, whatever the start and the other systems."""
        solver, b = self.make(), _vector(2, 5)
        b[0] = 0
        for x0 in (None, torch.ones_like(b)) if solver._uses_x0 else (None,):
            solution = solver.solve(_matrix(5, 10), b, x0=x0)
            assert (solution.x[0] == 0).all() and solution.residual_norm[0] == 0
            assert solution.num_steps[0] == 0 and solution.status[0] == Status.CONVERGED
            assert solution.success[1]

    @pytest.mark.parametrize("value", [1e-6, 1.0, 4.0, 1e6])
    def test_systems_of_size_one(self, value: float) -> None:
        """A system of one unknown is a system like any other."""
        b = torch.tensor([2.0], dtype=torch.float64)
        matrix = torch.tensor([[value]], dtype=torch.float64)
        self._assert_solved(self.make().solve(matrix, b), matrix, b)

    @pytest.mark.parametrize("scale", [1e-9, 0.3, 7.0, 1e9])
    def test_scaled_matrices(self, scale: float) -> None:
        """Scaling A by a scales x by 1 / a."""
        matrix, b = scale * _matrix(6, 10), _vector(6)
        self._assert_solved(self.make().solve(matrix, b), matrix, b)

    def test_repeated_eigenvalues(self) -> None:
        """An exact solution after few steps, with many more allowed, stays one: nothing becomes 0 / 0."""
        eigenvalues = torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64)
        b = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0, 2, 3, 0, 0, 0], [1.0, 2, 3, 4, 5, 6]], dtype=torch.float64)
        self._assert_solved(self.make().solve(lambda x: eigenvalues * x, b), eigenvalues.diag(), b)

    @drawn
    @given(eigenvalues=spectra(indefinite=True, condition=100), seed=seeds)
    def test_indefinite_systems_are_solved_or_said_not_to_be(self, eigenvalues: list[float], seed: int) -> None:
        """A status other than success, or a solution; finite either way."""
        source = generator(seed)
        matrix = rotated(eigenvalues, source)
        b = normal(source, len(matrix))
        self._assert_honest(self.make().solve(matrix, b), matrix, b)

    def test_singular_systems_are_not_solved(self) -> None:
        """A right-hand side outside the range of A has no solution to claim."""
        matrix, b = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)), _vector(3)
        solution = self.make().solve(matrix, b)
        assert torch.isfinite(solution.x).all() and not solution.success

    @pytest.mark.parametrize("condition", [1e6, 1e12])
    def test_converged_is_never_claimed_in_vain(self, condition: float) -> None:
        """CONVERGED means that the true residual meets the tolerance, however hard the system."""
        matrix, b = _matrix(12, condition), _vector(12)
        solution = self.make().solve(matrix, b)
        assert torch.isfinite(solution.x).all()
        if solution.status == Status.CONVERGED:
            self._assert_residual(solution, matrix, b)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_said_and_stays_with_its_system(self, bad: float) -> None:
        """NONFINITE for the system that it concerns, with a finite x; the others are solved."""
        matrix, b = torch.stack([_matrix(5, 10, seed) for seed in range(3)]), _vector(3, 5)
        bad_matrix, bad_b = matrix.clone(), b.clone()
        bad_matrix[1, 2, 2] = bad_b[1, 1] = bad
        for one, other in ((bad_matrix, b), (matrix, bad_b)):
            solution = self.make().solve(one, other)
            assert torch.isfinite(solution.x).all() and solution.status[1] == Status.NONFINITE
            assert solution.success[0] and solution.success[2]
            assert (_residual(matrix, solution.x, b)[::2] <= 1.001 * self.rtol * b.norm(dim=-1)[::2]).all()

    def test_a_product_that_turns_bad_is_said(self) -> None:
        """NaN from the second product on is no success either."""
        matrix, b, calls = _matrix(6, 20), _vector(6), list[None]()

        def mv(x: Tensor) -> Tensor:
            calls.append(None)
            return matrix @ x if len(calls) == 1 else torch.full_like(x, math.nan)

        solution = self.make().solve(mv, b)
        assert torch.isfinite(solution.x).all() and solution.status == Status.NONFINITE

    def test_no_derivative_flows_and_nothing_is_changed_or_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Products see no gradient mode; matrix and right-hand side stay as they are."""
        matrix, b = _matrix(5, 10).requires_grad_(), _vector(5).requires_grad_()
        before, modes = (matrix.detach().clone(), b.detach().clone()), list[bool]()
        state = torch.get_rng_state()

        def mv(x: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return matrix @ x

        solution = self.make().solve(mv, b)
        assert modes and not any(modes) and torch.is_grad_enabled()
        assert not (solution.x.requires_grad or solution.residual_norm.requires_grad)
        assert torch.equal(matrix, before[0]) and torch.equal(b, before[1])
        assert torch.equal(torch.get_rng_state(), state)
        assert capfd.readouterr() == ("", "")

    def test_a_start_is_used_or_refused(self) -> None:
        """A start at the solution is kept; one that is not finite is said. x0 is not changed."""
        solver, matrix, b = self.make(), _matrix(6, 10), _vector(2, 6)
        x0 = torch.linalg.solve(matrix, b.mT).mT.contiguous()
        x0[1] = 1.0
        before = x0.clone()
        if not solver._uses_x0:
            with pytest.raises(ValueError, match="cannot use a start"):
                solver.solve(matrix, b, x0=x0)
            return
        solution = solver.solve(matrix, b, x0=x0)
        self._assert_solved(solution, matrix, b)
        assert torch.equal(x0, before) and solution.num_steps[0] <= solution.num_steps[1]
        assert (solution.x[0] - x0[0]).norm() <= 1e-12 * x0[0].norm()
        x0[0, 0] = math.nan
        solution = solver.solve(matrix, b, x0=x0)
        assert torch.isfinite(solution.x).all() and solution.status[0] == Status.NONFINITE and solution.success[1]

    def test_a_preconditioner_is_used_or_refused(self) -> None:
        """The preconditioned solution is that of the same system."""
        solver, matrix, b = self.make(), _matrix(6, 20), _vector(2, 6)
        inverse = 1 / matrix.diagonal()
        if not solver._uses_preconditioner:
            with pytest.raises(ValueError, match="cannot use a preconditioner"):
                solver.solve(matrix, b, preconditioner=lambda r: inverse * r)
            return
        self._assert_solved(solver.solve(matrix, b, preconditioner=lambda r: inverse * r), matrix, b)

    def _assert_solved(self, solution: Solution, matrix: Tensor, b: Tensor) -> None:
        assert torch.isfinite(solution.x).all()
        assert solution.success.all(), f"not solved: {_names(solution)}"
        self._assert_residual(solution, matrix, b)

    def _assert_honest(self, solution: Solution, matrix: Tensor, b: Tensor) -> None:
        assert torch.isfinite(solution.x).all()
        if solution.success:
            self._assert_residual(solution, matrix, b)

    def _assert_residual(self, solution: Solution, matrix: Tensor, b: Tensor) -> None:
        size = torch.linalg.matrix_norm(matrix) * solution.x.norm(dim=-1)
        rounding = 10 * torch.finfo(b.dtype).eps * size  # of b - A x itself; as much as a direct solver can do
        allowed = (1.001 * self.rtol * b.norm(dim=-1)).maximum(rounding)
        true = _residual(matrix, solution.x, b)
        assert (true <= allowed).all(), f"{_names(solution)}, but |b - A x| is {true}, with {allowed} allowed"


def _names(solution: Solution) -> str:
    return ", ".join(Status(code).name for code in solution.status.flatten().tolist())


def _residual(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    size: Tensor = (b - (matrix @ x.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)
    return size


def _matrix(n: int, condition: float, seed: int = 0) -> Tensor:
    return rotated([condition ** (-i / (n - 1)) for i in range(n)], generator(seed))


def _vector(*shape: int) -> Tensor:
    return normal(generator(1), *shape)
