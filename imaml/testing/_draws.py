"""Random tensors from a seed, whatever the global random state, default dtype and default device."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator(device="cpu").manual_seed(seed)


def normal(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers; those of a narrower dtype are the float64 ones, rounded."""
    return torch.randn(*shape, generator=source, dtype=torch.float64, device="cpu").to(dtype)
