"""Conjugate gradients in a few lines, independent of the library's solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class NegativeCurvature(Exception):
    """A matrix is not positive definite: `curvature` is the p'Ap / p'p that shows it."""

    def __init__(self, curvature: float) -> None:
        super().__init__(curvature)
        self.curvature = curvature


def iterates(mv: Product, b: Tensor, *, rtol: float, most: int) -> Iterator[Tensor]:
    """The iterates x_1, x_2, ... for A x = b, up to a relative residual `rtol`; raises NegativeCurvature."""
    x, r, p = torch.zeros_like(b), b, b
    size, floor = torch.dot(r, r), rtol * b.norm()
    for _ in range(most):
        if size.sqrt() <= floor:
            return
        q = mv(p)
        curvature = torch.dot(p, q)
        if curvature <= 10 * torch.finfo(b.dtype).eps * p.norm() * q.norm():  # its sign is that of rounding
            raise NegativeCurvature((curvature / torch.dot(p, p)).item())
        x, r = x + size / curvature * p, r - size / curvature * q
        before, size = size, torch.dot(r, r)
        p = r + size / before * p
        yield x


def solve(mv: Product, b: Tensor, *, rtol: float) -> Tensor:
    """The last iterate; raises NegativeCurvature."""
    x = torch.zeros_like(b)
    for x in iterates(mv, b, rtol=rtol, most=5 * len(b) + 50):  # noqa: B007
        pass
    return x
