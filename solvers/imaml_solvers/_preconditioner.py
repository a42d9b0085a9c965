"""Preconditioners that are built from products with the matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._start import RUNNING, Start


class Preconditioner(ABC):
    """Builds an approximate inverse M of A, symmetric positive definite, for `CG(preconditioner=...)` or `MINRES`.

    Subclasses are frozen dataclasses. What they draw depends on their own `seed`, the shape and the device alone, and
    is the same for every system of a batch, so that a batch equals its systems one by one.
    """

    @abstractmethod
    def build(self, op: LinearOperator, like: Tensor) -> LinearOperator:
        """Build M by products with A.

        Args:
            op: Symmetric A; its products are of the whole batch.
            like: Any tensor of the shape `(*batch, n)`, dtype and device of the vectors.

        Returns:
            Products with M. A system whose A is not finite gets M = I.
        """


def check_preconditioner(preconditioner: Preconditioner | None) -> None:
    """Check the field of a solver; raises TypeError."""
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        raise TypeError(
            "`preconditioner` must be a Preconditioner such as Nystrom(rank=20), which each solve builds; give an "
            f"approximate inverse to `solve`. Got {preconditioner!r}."
        )


def chosen(
    field: Preconditioner | None, given: LinearOperator | None, op: LinearOperator, begun: Start
) -> LinearOperator | None:
    """The preconditioner of a solve: the `given` one, or the `field` built, unless nothing is left to solve."""
    if given is not None or field is None or not bool((begun.status == RUNNING).any()):
        return given
    return field.build(op, begun.b)


def probe(like: Tensor, seed: int, count: int) -> Tensor:
    """Independent standard normal numbers, `(n, count)`, in at least float32."""
    source = torch.Generator(device=like.device).manual_seed(seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape[-1], count, generator=source, dtype=dtype, device=like.device)
