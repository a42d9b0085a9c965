"""Meta-parameters: named tensors that a loss or the inner optimiser uses, and that are no parameters of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Given = Mapping[str, Tensor | Mapping[str, Tensor]]
"""Tensors by name, or by name within a named group, such as the parameters of a learned loss."""


@dataclass(frozen=True)
class MetaParameters:
    """The meta-parameters that an objective was given, each under one name: that of its group comes first."""

    given: Given

    def flat(self) -> dict[str, Tensor]:
        """All by name, `group.name` for those of groups."""
        found: dict[str, Tensor] = {}
        for key, value in self.given.items():
            found |= {f"{key}.{n}": t for n, t in value.items()} if isinstance(value, Mapping) else {key: value}
        return found

    def like_given(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values by name in the groups that were given; those without a value as they were given."""

        def one(name: str, value: Tensor) -> Tensor:
            return values.get(name, value)

        return {
            key: {n: one(f"{key}.{n}", t) for n, t in value.items()} if isinstance(value, Mapping) else one(key, value)
            for key, value in self.given.items()
        }

    def check(self, taken: Iterable[str]) -> None:
        """Raise where one is no floating-point tensor, or its name is that of a parameter."""
        for name, value in self.flat().items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"Meta-parameter {name!r} must be a floating-point tensor. Got {got}.")
        both = sorted(set(self.flat()) & set(taken))
        if both:
            raise ValueError(
                f"The names {both} in `meta` are those of parameters or buffers already: rename them, or put them in a "
                'group, such as meta={"loss": {...}}.'
            )

    def double(self) -> MetaParameters:
        """Copies in float64."""
        copies = {n: t.detach().clone().double().requires_grad_() for n, t in self.flat().items()}
        return MetaParameters(self.like_given(copies))


def with_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that takes the keyword `meta`, which it gets only if it has an argument of that name."""
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        takes = "meta" in inspect.signature(target).parameters
    except ValueError:  # some built-in functions have no signature
        takes = False
    return function if takes else lambda *args, meta: function(*args)
