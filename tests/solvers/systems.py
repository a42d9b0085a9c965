"""Linear systems with a known spectrum, and operators that tell what was asked of them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64


def rotation(n, seed):
    """A random orthogonal matrix, `(n, n)`."""
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(noise).Q


def rotated(spectrum, seed=0):
    """Q diag(spectrum) Q', symmetric to the last bit."""
    spectrum = torch.as_tensor(spectrum, dtype=F64)
    q = rotation(len(spectrum), seed)
    matrix = q @ torch.diag(spectrum) @ q.T
    return (matrix + matrix.T) / 2


def spread(n, condition):
    """A spectrum from 1 / condition to 1, evenly spread in its logarithm."""
    return torch.logspace(-torch.tensor(float(condition)).log10().item(), 0, n, dtype=F64)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def residual(matrix, x, b):
    """|b - A x|, whatever a solver says of it."""
    return (b - (matrix @ x.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)


@st.composite
def problems(draw, largest=16, condition=1e3):
    """A symmetric positive definite matrix, a right-hand side, and the spectrum."""
    n, seed = draw(st.integers(1, largest)), draw(st.integers(0, 2**16))
    scale = 10.0 ** draw(st.integers(-6, 6))
    spectrum = scale * spread(n, draw(st.floats(1, condition)))
    return rotated(spectrum, seed), noise(n, seed=seed + 1), spectrum


class Recorded:
    """An operator that keeps the vectors it was applied to."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.seen = matrix, []

    def mv(self, x):
        self.seen.append(x.clone())
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1)
