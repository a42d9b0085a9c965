"""Clipping of a gradient by its global norm, as torch does it, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm."""


def clipped(gradient: Tensor, most: float | Tensor) -> Tensor:
    """Rows min(1, most / (norm + 1e-6)) g of those of a gradient `(tasks, n)`, with its norm over all parameters."""
    return gradient * _coefficient(gradient, most)[0].clamp(max=1.0)


def pull_back_clipping(gradient: Tensor, most: float | Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The cotangents of the gradient `(tasks, n)` and of the largest norm `(tasks, 1)`, for that of `clipped`."""
    # With c = most / (|g| + eps) < 1 and w the cotangent: c w - c (g'w) / ((|g| + eps) |g|) g, and (g'w) / (|g| + eps).
    coefficient, norm = _coefficient(gradient, most)
    slope = (gradient * cotangent).sum(-1, keepdim=True) / (norm + _EPS) * (coefficient <= 1)
    along = -coefficient * slope / torch.where(norm > 0, norm, 1.0)
    return torch.addcmul(cotangent * coefficient.clamp(max=1.0), gradient, along), slope


def _coefficient(gradient: Tensor, most: float | Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return most / (norm + _EPS), norm
