"""Which dtypes a computation rounds to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imaml._torch import CAST, TorchDispatchMode


class Casts(TorchDispatchMode):
    """Within it, `dtypes` gathers what floating-point tensors that require grad are cast to.

    That is by autocast, by the model, or inside of an autograd.Function, of which autograd sees only what it saves.
    What a constant is cast to is no matter: its rounding is the same in every evaluation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`."""
        found = func(*args, **(kwargs or {}))
        # Decompositions that forward mode loads cast plain numbers too.
        if func is CAST and isinstance(args[0], Tensor) and args[0].requires_grad and found.is_floating_point():
            self.dtypes.add(found.dtype)
        return found
