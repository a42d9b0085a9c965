"""The solvers of scipy.sparse.linalg."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._start import check_stopping
from imaml_solvers._vectors import norm

Vector = np.ndarray[Any, np.dtype[np.float64]]
# Not tfqmr: with a preconditioner, that of scipy 1.17 mixes two kinds of residual and stops far from the solution.
Method = Literal["bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "minres"]

_CYCLES = {"gmres": ("restart", 20), "lgmres": ("inner_m", 30), "gcrotmk": ("m", 20)}
"""Methods whose `maxiter` counts cycles: the keyword and scipy's default for the length of a cycle."""

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = _EPS**0.5
"""A share that rounding may add to a residual, or leave of b."""
_BREAKDOWNS = ("indefinite preconditioner", "non-symmetric matrix", "Preconditioner returned a zero vector")
"""How errors begin by which scipy's MINRES and LGMRES say that they broke down."""


class _StoppedError(ArithmeticError):
    """Leaves scipy with the status of the system; never leaves this module."""

    def __init__(self, status: Status) -> None:
        self.status = status


@dataclass(frozen=True, kw_only=True)
class ScipySolver(LinearSolver):
    """Solves systems by the iterative solvers of scipy.sparse.linalg, behind the interface of this package.

    scipy comes with the extra `imaml[scipy]`; without it, making a solver is an ImportError that says so.

    `minres` is for symmetric A that may be indefinite, `gmres` and the others for any regular A, `cg` to compare with.

    CONVERGED is decided by the true residual, |b - A x| <= max(rtol |b|, atol), and not by what scipy reports: its
    MINRES stops by |A| |x|, its CG does not see negative curvature. Where scipy is content and the residual is not, the
    next round solves for what is left; three rounds in a row that do not halve the residual are STAGNATED.

    MAX_STEPS is scipy's spent `maxiter`. BREAKDOWN is its negative codes, errors and values that are not finite, and a
    round that comes to 0. NONFINITE is a product of finite values that is not finite. x is the result of the round of
    least residual.

    A solve that ends with a residual as large as at its start is a BREAKDOWN too, whatever scipy says: where a scalar
    of a method should be 0, rounding decides whether scipy sees it or runs on to its limit. Two such ends keep their
    status: fewer than n steps, in which the residual of `cg`, `bicgstab` or `cgs` may well rise before it falls, and a
    start that rounding allows no better.

    Cost: systems are solved one by one in float64 on the CPU, with products in the dtype and on the device of b. A
    product evaluates the whole batch, with zeros for the other systems: solve large systems one at a time. `num_steps`
    counts scipy's products (two a step for `bicgstab` and `cgs`, one more a round for `minres`); a further one checks
    each round.

    Args:
        method: The function of scipy.sparse.linalg.
        rtol: Relative tolerance; `rtol` and `atol` cannot both be 0.
        atol: Absolute tolerance, in the units of b.
        max_steps: Most steps of a round, for scipy's `maxiter`; those of `gmres`, `lgmres` and `gcrotmk` come in cycles
            of 20 to 30, rounded up. None is 10 n.
    """

    method: Method = "cg"
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    _uses_x0: ClassVar[bool] = True
    _uses_preconditioner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields, and that scipy is there; raises ValueError and ImportError."""
        check_stopping(self.max_steps, self.rtol, self.atol)
        if self.method not in get_args(Method):
            raise ValueError(f"`method` must be one of {', '.join(get_args(Method))}. Got {self.method!r}.")
        if self.rtol == self.atol == 0:
            raise ValueError("`rtol` or `atol` must be > 0. Got 0 for both; for a fixed budget use CG(max_steps=...).")
        if find_spec("scipy") is None:
            raise ImportError("ScipySolver needs scipy: pip install 'imaml[scipy]'", name="scipy")

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        start = torch.zeros_like(b) if x0 is None else x0
        x, residual = torch.zeros_like(b), torch.zeros_like(b[..., 0])
        status, num_steps = (torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device) for _ in range(2))
        for index in np.ndindex(b.shape[:-1]):
            apply = _product(op, b, index)
            precondition = None if preconditioner is None else _product(preconditioner, b, index)
            with np.errstate(all="ignore"):
                outcome = self._solve_one(apply, _to_numpy(b[index]), _to_numpy(start[index]), precondition)
            x[index] = torch.as_tensor(outcome[0]).to(b)
            status[index], num_steps[index], residual[index] = outcome[1:]
        return Solution(x, status, num_steps, residual)

    def _solve_one(
        self,
        apply: Callable[[Vector], Vector],
        b: Vector,
        x: Vector,
        precondition: Callable[[Vector], Vector] | None,
    ) -> tuple[Vector, Status, int, float]:
        """Return x, status, products and true residual of one system."""
        if not b.any():
            return np.zeros_like(b), Status.CONVERGED, 0, 0.0
        if not (np.isfinite(b).all() and np.isfinite(x).all()):
            return np.zeros_like(b), Status.NONFINITE, 0, _norm(b)
        tolerance = max(self.rtol * _norm(b), self.atol)
        products, stalls, gain = 0, 0, 1.0

        def counted(v: Vector) -> Vector:
            nonlocal products
            products += 1
            return apply(v)

        r, start = b, x
        x = np.zeros_like(b)
        try:
            r, x = (b - apply(start), start) if start.any() else (r, x)
            first = _norm(r)
            while (size := _norm(r)) > tolerance:
                target = max(tolerance / size / gain, _EPS)
                d, info = self._call(counted, r / size, target, precondition)
                if not info and not d.any():
                    return x, Status.BREAKDOWN, products, size
                left = b - apply(x + size * d)
                share = _norm(left) / size
                if share < 1:
                    r, x = left, x + size * d
                stalls = stalls + 1 if share > 0.5 else 0
                # MINRES leaves more than it is asked for, the worse A is conditioned: ask for much less next time.
                gain = max(gain, (share / target) ** 2)
                if share * size > tolerance and (info or stalls == 3):
                    status = Status.MAX_STEPS if info > 0 else Status.BREAKDOWN if info else Status.STAGNATED
                    least = min(share, 1.0) * size
                    enough = info <= 0 or self.max_steps is None or self.max_steps >= len(b)
                    if enough and least >= (1 - _ROUNDING) * first > _ROUNDING * _norm(b):
                        status = Status.BREAKDOWN
                    return x, status, products, least
        except _StoppedError as stopped:
            return x, stopped.status, products, _norm(r)
        return x, Status.CONVERGED, products, size

    def _call(
        self,
        apply: Callable[[Vector], Vector],
        b: Vector,
        rtol: float,
        precondition: Callable[[Vector], Vector] | None,
    ) -> tuple[Vector, int]:
        """Return x and the code that scipy returns for one system."""
        from scipy.sparse import linalg  # noqa: PLC0415  (it takes as long to import as all the rest)

        n = len(b)
        # scipy's MINRES compares parts of A with |b| and with eps: it would stop at once where |A| is far below 1.
        size = (_norm(apply(b)) or 1.0) if self.method == "minres" else 1.0
        max_steps = 10 * n if self.max_steps is None else self.max_steps
        options: dict[str, Any] = {"rtol": rtol, "maxiter": max_steps}
        if self.method in _CYCLES:
            keyword, length = _CYCLES[self.method]
            length = min(length, max_steps)
            options |= {keyword: length, "maxiter": -(-max_steps // length)}
        if self.method != "minres":
            options["atol"] = 0.0
        if precondition is not None:
            options["M"] = linalg.LinearOperator((n, n), matvec=precondition, dtype=np.float64)
        matrix = linalg.LinearOperator((n, n), matvec=lambda v: apply(v) / size, dtype=np.float64)
        try:
            x, info = getattr(linalg, self.method)(matrix, b, **options)
        except (ValueError, RuntimeError) as error:
            if not str(error).startswith(_BREAKDOWNS):
                raise
            raise _StoppedError(Status.BREAKDOWN) from None
        return x / size, int(info)


def _product(op: LinearOperator, b: Tensor, index: tuple[int, ...]) -> Callable[[Vector], Vector]:
    """The products of one system of a batch."""

    def apply(v: Vector) -> Vector:
        x = torch.zeros_like(b)
        x[index] = torch.as_tensor(v).to(b)
        if not torch.isfinite(x[index]).all():
            raise _StoppedError(Status.BREAKDOWN)
        y = _to_numpy(op.mv(x)[index])
        if not np.isfinite(y).all():
            raise _StoppedError(Status.NONFINITE)
        return y

    return apply


def _norm(v: Vector) -> float:
    return norm(torch.from_numpy(v)).item()


def _to_numpy(x: Tensor) -> Vector:
    # NumPy has no bfloat16.
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.numpy(force=True).astype(np.float64)
