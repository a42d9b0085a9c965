"""Linear maps known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class HasMv(Protocol):
    """Anything with a matrix-vector product."""

    def mv(self, x: Tensor, /) -> Tensor:
        """A x, in the shape of x."""


class LinearOperator:
    """A linear map on the last dimension, known by its products; one map per index of the leading dimensions.

    Args:
        mv: x `(*batch, n)` to A x `(*batch, n)` in the same dtype on the same device. Solvers call it under
            `torch.no_grad()`; a product that needs gradients inside has to enable them.
    """

    def __init__(self, mv: Callable[[Tensor], Tensor]) -> None:
        if not callable(mv):
            raise TypeError(f"`mv` must be a function of a tensor. Got {type(mv).__name__}.")
        self._mv = mv

    def mv(self, x: Tensor) -> Tensor:
        """A x `(*batch, n)` of x `(*batch, n)`."""
        return self._mv(x)

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
