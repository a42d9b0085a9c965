"""Meta-parameters: named tensors that a loss or the inner optimiser uses, and that are no parameters of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def check_meta(meta: Mapping[str, Tensor], taken: Iterable[str]) -> dict[str, Tensor]:
    """The meta-parameters; raises where one is no floating-point tensor, or its name is that of a parameter."""
    for name, value in meta.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"Meta-parameter {name!r} must be a floating-point tensor. Got {got}.")
    both = sorted(set(meta) & set(taken))
    if both:
        raise ValueError(f"The names {both} in `meta` are those of parameters or buffers already: rename them.")
    return dict(meta)


def with_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that takes the keyword `meta`, which it gets only if it has an argument of that name."""
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        takes = "meta" in inspect.signature(target).parameters
    except ValueError:  # some built-in functions have no signature
        takes = False
    return function if takes else lambda *args, meta: function(*args)
