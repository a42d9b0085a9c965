"""Linear maps known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class HasMv(Protocol):
    """Anything with a matrix-vector product."""

    def mv(self, x: Tensor, /) -> Tensor:
        """A x, in the shape of x."""


class LinearOperator:
    """Stands for a linear map on the last dimension, known by its products alone.

    There is one map per index of the leading dimensions.

    Args:
        mv: x `(*batch, n)` to A x `(*batch, n)` in the same dtype on the same device. Solvers call it under
            `torch.no_grad()`; a product that needs gradients inside has to enable them.
    """

    def __init__(self, mv: Callable[[Tensor], Tensor]) -> None:
        if not callable(mv):
            raise TypeError(f"`mv` must be a function of a tensor. Got {type(mv).__name__}.")
        self._mv = mv

    makes_new: bool = False
    """Whether every product is a new tensor, which whoever asked for it may write to."""

    def mv(self, x: Tensor) -> Tensor:
        """A x `(*batch, n)` of x `(*batch, n)`."""
        return self._mv(x)

    def shifted(self, by: float | Tensor) -> LinearOperator:
        """The operator A + diag(by).

        Args:
            by: A number for all entries, or a tensor that broadcasts against the vectors.

        Returns:
            An operator that keeps references to this one and to `by`. A product costs one of this one's.
        """
        return _Shifted(self, by)

    def scaled(self, by: Tensor) -> LinearOperator:
        """The operator D^-1 A D^-1 with D = diag(by), symmetric where A is.

        Args:
            by: Positive, 0-dim or `(n,)`.

        Returns:
            An operator that keeps references to this one and to `by`. A product costs one of this one's.
        """
        return _Scaled(self, by)

    def computed_in(self, dtype: torch.dtype) -> LinearOperator:
        """The operator for vectors of any dtype, with its products computed in one.

        Args:
            dtype: What products are computed in.

        Returns:
            An operator that keeps a reference to this one; its products have the dtype of the vectors.
        """
        return _ComputedIn(self, dtype)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> LinearOperator:
        """The operator of dense matrices.

        Args:
            matrix: `(*batch, n, n)`; one matrix `(n, n)` serves a whole batch of vectors.

        Returns:
            An operator that keeps a reference to `matrix`.

        Raises:
            ValueError: If `matrix` is not square, or, in a product, if the vector does not fit it.
        """
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"`matrix` must have the shape (*batch, n, n). Got {tuple(matrix.shape)}.")

        def mv(x: Tensor) -> Tensor:
            if x.shape[-1] != matrix.shape[-1] or x.dtype != matrix.dtype:
                raise ValueError(
                    f"The vector must fit the matrix {tuple(matrix.shape)} of {matrix.dtype}. "
                    f"Got {tuple(x.shape)} of {x.dtype}."
                )
            return x @ matrix.mT if matrix.ndim == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)

        return cls(mv)


class _Shifted(LinearOperator):
    makes_new = True

    def __init__(self, op: LinearOperator, by: float | Tensor) -> None:
        self._op, self._by = op, by

    def mv(self, x: Tensor) -> Tensor:
        product, by = self._op.mv(x), self._by
        if isinstance(by, Tensor):
            return torch.addcmul(product, x, by.to(x.dtype))
        return product.add_(x, alpha=by) if self._op.makes_new else product.add(x, alpha=by)


class _Scaled(LinearOperator):
    makes_new = True

    def __init__(self, op: LinearOperator, by: Tensor) -> None:
        self._op, self._by, self._square = op, by, by.square() if by.ndim == 0 else None

    def mv(self, x: Tensor) -> Tensor:
        # One number needs no scaled vector beside the product.
        product, by = (self._op.mv(x / self._by), self._by) if self._square is None else (self._op.mv(x), self._square)
        return product.div_(by) if self._op.makes_new else product / by


class _ComputedIn(LinearOperator):
    def __init__(self, op: LinearOperator, dtype: torch.dtype) -> None:
        self._op, self._dtype, self.makes_new = op, dtype, op.makes_new

    def mv(self, x: Tensor) -> Tensor:
        return self._op.mv(x.to(self._dtype)).to(x.dtype)


OperatorLike = HasMv | Callable[[Tensor], Tensor] | Tensor
"""What is accepted as a linear map: an object with `mv`, a function, or matrices `(*batch, n, n)`."""


def as_operator(map_: OperatorLike) -> LinearOperator:
    """The operator of `map_`; raises TypeError for anything that is not `OperatorLike`."""
    # A tensor has a method `mv` too, but one that knows no batches.
    if isinstance(map_, Tensor):
        return LinearOperator.from_matrix(map_)
    if isinstance(map_, LinearOperator):
        return map_
    mv = getattr(map_, "mv", map_)
    if not callable(mv):
        raise TypeError(
            "A linear map must be a LinearOperator, an object with a method `mv`, a function of a tensor, or a tensor "
            f"(*batch, n, n). Got {type(map_).__name__}."
        )
    return LinearOperator(mv)
