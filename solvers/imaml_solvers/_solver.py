"""The interface of all solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator, OperatorLike, as_operator
from imaml_solvers._solution import Solution


class LinearSolver(ABC):
    """Solves A x = b for a batch of systems at once, each with its own stopping.

    A solver never raises on numerics and never prints: how each solve ended is a `Status`.

    Subclasses are frozen dataclasses that implement `_solve`; docs/testing.md has one.
    """

    _uses_x0: ClassVar[bool] = False
    _uses_preconditioner: ClassVar[bool] = False

    def solve(
        self,
        op: OperatorLike,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        preconditioner: OperatorLike | None = None,
    ) -> Solution:
        """Solve A x = b.

        Iterative solvers stop a system once |b - A x| <= max(rtol |b|, atol), in 2-norms over the last dimension. b = 0
        gives x = 0 in no step, whatever x0. Numerical trouble never raises: it is a `Status`.

        Args:
            op: A, as a `LinearOperator`, an object with a method `mv`, a function, or a tensor `(*batch, n, n)`.
            b: Right-hand sides, `(*batch, n)`, n >= 1, of a floating dtype; float64 where accuracy matters.
            x0: Where to start, in the shape and dtype of b; None starts at 0. It costs one product.
            preconditioner: An approximate inverse of A, given like `op`; symmetric positive definite for CG and MINRES,
                where it takes the place of the solver's own.

        Returns:
            Detached tensors; no derivative flows through a solve.

        Raises:
            TypeError: If b is not a floating tensor, or a map is none.
            ValueError: If shapes or dtypes disagree, or this solver cannot use what it was given.
        """
        _check_rhs(b)
        if x0 is not None:
            if not self._uses_x0:
                raise ValueError(f"{type(self).__name__} cannot use a start. Got `x0`; leave it out.")
            if x0.shape != b.shape or x0.dtype != b.dtype:
                raise ValueError(f"`x0` must be like b, {_what(b)}. Got {_what(x0)}.")
        if preconditioner is not None and not self._uses_preconditioner:
            raise ValueError(f"{type(self).__name__} cannot use a preconditioner. Leave it out, or use CG or MINRES.")
        with torch.no_grad():
            return self._solve(
                _checked(as_operator(op), "`op`", b),
                b,
                x0,
                None if preconditioner is None else _checked(as_operator(preconditioner), "`preconditioner`", b),
            )

    @abstractmethod
    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        """Solve a system whose arguments are checked, without gradients.

        `x0` and `preconditioner` are None unless the class sets `_uses_x0` and `_uses_preconditioner`.
        """


def _check_rhs(b: Tensor) -> None:
    if not isinstance(b, Tensor) or not b.is_floating_point():
        got = b.dtype if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"`b` must be a tensor of a real floating dtype. Got {got}.")
    if b.ndim == 0 or b.shape[-1] == 0:
        raise ValueError(f"`b` must have the shape (*batch, n) with n >= 1. Got {tuple(b.shape)}.")


def _checked(op: LinearOperator, name: str, b: Tensor) -> LinearOperator:
    """`op` with every product checked against b."""

    def mv(x: Tensor) -> Tensor:
        y = op.mv(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"A product with {name} must be a tensor. Got {type(y).__name__}.")
        if y.shape != b.shape or y.dtype != b.dtype:
            raise ValueError(f"A product with {name} must be like b, {_what(b)}. Got {_what(y)}.")
        return y

    return LinearOperator(mv)


def _what(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
