"""Whether what two programs compute of the same function is the same, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]


def agree(found: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Whether two tensors differ by at most a part of their size, NaN and infinity in the same places."""
    if found is None or expected is None:
        return found is expected
    bad = ~expected.isfinite()
    if bool(bad.any()):
        return torch.allclose(found, expected, rtol=tolerance, atol=0.0, equal_nan=True)
    return bool((found - expected).norm() <= tolerance * expected.norm())


@dataclass(frozen=True)
class Expected:
    """What a compiled function is compared with."""

    outputs: Outputs
    nearby: Callable[[int], Outputs]
    """The outputs for arguments that are other by roundings; which ones depends on a number."""

    def is_met_by(self, found: Outputs, tolerance: float) -> bool:
        """Whether outputs agree, but for entries that roundings of the arguments change too: fewer than half of them.

        Adam divides by the size of a gradient, which may be zero but for its rounding: for the biases of the keys of an
        attention, or of what a norm follows.

        Args:
            found: What is compared.
            tolerance: Relative, of a tensor as a whole.

        Returns:
            Whether they do.
        """
        if all(agree(a, b, tolerance) for a, b in zip(found, self.outputs, strict=True)):
            return True
        settled = [b is not None and torch.ones_like(b, dtype=torch.bool) for b in self.outputs]
        for number in range(1, _NEARBY + 1):
            for still, b, c in zip(settled, self.outputs, self.nearby(number), strict=True):
                if b is not None and c is not None:
                    still &= (c - b).abs() <= tolerance * b.abs()
        return all(map(partial(_agree_at, tolerance), found, self.outputs, settled))


_NEARBY = 8
"""Points whose rounding is looked at: two roundings of what is zero may be the same."""
_MISSED = 8
"""One in so many entries that roundings change may have been the same at all of these points."""


def _agree_at(tolerance: float, found: Tensor | None, expected: Tensor | None, settled: Tensor) -> bool:
    if agree(found, expected, tolerance):
        return True
    if found is None or expected is None:
        return False
    unsettled = int((~settled).sum())
    if 2 * unsettled >= settled.numel():
        return False
    found, expected = found[settled], expected[settled]
    order = (found - expected).abs().argsort()[: len(found) - unsettled // _MISSED]
    return agree(found[order], expected[order], tolerance)


def nudged(tensor: Tensor, number: int) -> Tensor:
    """A tensor whose entries are other by up to 200 roundings, so that later ones are too; the number says which."""
    steps = torch.arange(tensor.numel(), device=tensor.device).mul_(number) % 7 - 3
    return tensor * (1 + 64 * torch.finfo(tensor.dtype).eps * steps.to(tensor.dtype).view(tensor.shape))
