"""Symmetric matrices with a chosen spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from imaml.testing._draws import generator, normal, seeds

_LARGEST_N = 8
_KINDS = ("repeated", "clustered", "geometric", "wide")


def spectra(
    n: int | None = None, *, condition: float = 1e3, largest: float | None = None, indefinite: bool = False
) -> st.SearchStrategy[list[float]]:
    """Draw eigenvalues in ascending order, of four kinds.

    - Repeated: up to three distinct values.
    - Clustered: the same, 1e-6 apart within a cluster.
    - Geometric: a constant ratio.
    - Wide: spread at random over the whole range allowed, with its ends.

    Args:
        n: How many; None draws 1 to 8, from 2 where `indefinite`.
        condition: Most that the largest modulus is above the smallest, >= 1.
        largest: The largest modulus; None draws a power of ten from 1e-6 to 1e6.
        indefinite: At least one eigenvalue is negative and at least one positive; without, all are positive.

    Returns:
        A hypothesis strategy.

    Raises:
        ValueError: `n`, `condition` or `largest` out of range.
    """
    least = 2 if indefinite else 1
    if n is not None and n < least:
        raise ValueError(f"`n` must be >= {least}{', for both signs' if indefinite else ''}. Got {n}.")
    if not 1 <= condition < math.inf:
        raise ValueError(f"`condition` must be finite and >= 1. Got {condition}.")
    if largest is not None and not 0 < largest < math.inf:
        raise ValueError(f"`largest` must be finite and > 0. Got {largest}.")
    return _spectra(st.integers(least, _LARGEST_N) if n is None else st.just(n), condition, largest, indefinite)


@st.composite
def _spectra(
    draw: st.DrawFn, sizes: st.SearchStrategy[int], condition: float, largest: float | None, indefinite: bool
) -> list[float]:
    n, kind = draw(sizes), draw(st.sampled_from(_KINDS))
    scale = 10.0 ** draw(st.integers(-6, 6)) if largest is None else largest
    moduli = [condition**-depth for depth in _depths(draw, kind, n)]
    if kind == "clustered":
        moduli = [max(modulus * (1 - 1e-6 * i / n), 1 / condition) for i, modulus in enumerate(moduli)]
    scale /= max(moduli)
    flipped = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)) if indefinite else set()
    return sorted(scale * (-modulus if i in flipped else modulus) for i, modulus in enumerate(moduli))


def _depths(draw: st.DrawFn, kind: str, n: int) -> list[float]:
    """How far each eigenvalue is below the top of the range, from 0 to 1 in the logarithm."""
    unit = st.floats(0, 1)
    if kind == "geometric":
        depth = draw(unit)
        return [depth * i / max(n - 1, 1) for i in range(n)]
    if kind == "wide":
        return [0.0, 1.0, *draw(st.lists(unit, min_size=n, max_size=n))][:n]
    levels = draw(st.lists(unit, min_size=1, max_size=min(n, 3)))
    return [levels[i % len(levels)] for i in range(n)]


def spd_matrices(
    n: int | None = None,
    *,
    condition: float = 1e3,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    largest: float | None = None,
) -> st.SearchStrategy[Tensor]:
    """Draw symmetric positive definite matrices Q diag(spectrum) Q', symmetric to the last bit.

    Args:
        n: Their size; None draws 1 to 8.
        condition: Most that their condition number is. Rounding to `dtype` respects it below about 1 / eps.
        batch: Leading dimensions; every matrix has a spectrum of its own.
        dtype: The result's; matrices are made in float64 and rounded.
        largest: The largest eigenvalue; None draws a power of ten from 1e-6 to 1e6 for each.

    Returns:
        A hypothesis strategy of tensors `(*batch, n, n)`.

    Raises:
        ValueError: As for `spectra`.
    """
    spectra(n, condition=condition, largest=largest)  # checks the arguments, now rather than at the first draw
    return _spd_matrices(n, condition, tuple(batch), dtype, largest)


@st.composite
def _spd_matrices(
    draw: st.DrawFn,
    n: int | None,
    condition: float,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    largest: float | None,
) -> Tensor:
    size = draw(st.integers(1, _LARGEST_N)) if n is None else n
    source = generator(draw(seeds))
    eigenvalues = spectra(size, condition=condition, largest=largest)
    matrices = [rotated(draw(eigenvalues), source) for _ in range(math.prod(batch))]
    return torch.stack(matrices).reshape(*batch, size, size).to(dtype)


def rotated(spectrum: Sequence[float], source: torch.Generator) -> Tensor:
    """Q diag(spectrum) Q' in float64 for a random orthogonal Q."""
    n = len(spectrum)
    q = torch.linalg.qr(normal(source, n, n)).Q
    matrix: Tensor = (q * torch.tensor(spectrum, dtype=torch.float64, device="cpu")) @ q.mT
    return (matrix + matrix.mT) / 2
