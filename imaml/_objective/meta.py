"""Meta-parameters: named tensors that a loss or the inner optimiser uses, and that are no parameters of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Given = Mapping[str, Tensor | Mapping[str, Tensor]]
"""Tensors by name, or by name within a named group, such as the parameters of a learned loss."""


@dataclass(frozen=True)
class MetaParameters:
    """The meta-parameters that an objective was given, each under one name: that of its group comes first."""

    given: Given

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The meta-parameters under each key that was given: by name, `key.name` for those of groups."""
        return {
            key: {f"{key}.{n}": t for n, t in value.items()} if isinstance(value, Mapping) else {key: value}
            for key, value in self.given.items()
        }

    def flat(self) -> dict[str, Tensor]:
        """All meta-parameters by name."""
        if not self.given:  # asked in every evaluation
            return {}
        return {name: tensor for group in self.groups().values() for name, tensor in group.items()}

    def learned(self) -> dict[str, Tensor]:
        """The meta-parameters that require grad, by name; the others are constants."""
        return {name: tensor for name, tensor in self.flat().items() if tensor.requires_grad}

    def like_given(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values by name in the groups that were given; those without a value as they were given."""
        if not self.given:
            return {}
        return {
            key: {n: values.get(f"{key}.{n}", t) for n, t in value.items()}
            if isinstance(value, Mapping)
            else values.get(key, value)
            for key, value in self.given.items()
        }

    def check(self, taken: Iterable[str]) -> None:
        """Raise where one is no floating-point tensor, or its name is taken."""
        if not isinstance(self.given, Mapping):
            raise TypeError(f"`meta` must be a dictionary of tensors by name. Got {type(self.given).__name__}.")
        for name, value in self.flat().items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
                got = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"Meta-parameter {name!r} must be a dense floating-point tensor, or a dictionary of them such as "
                    f"dict(network.named_parameters()). Got {got}."
                )
        names = [name for group in self.groups().values() for name in group]
        both = sorted(set(names) & set(taken) | {name for name in names if names.count(name) > 1})
        if both:
            raise ValueError(
                f"The names {both} in `meta` are those of parameters, buffers or other entries already: rename them, "
                'or put them in a group, such as meta={"loss": {...}}.'
            )

    def double(self) -> MetaParameters:
        """Copies in float64."""
        copies = {n: t.detach().clone().double().requires_grad_(t.requires_grad) for n, t in self.flat().items()}
        return MetaParameters(self.like_given(copies))


def no_gradient(key: str, why: str) -> ValueError:
    """The refusal of a meta-parameter that no derivative leads to: zeros in its place would pass for a gradient."""
    return ValueError(
        f"The meta-gradient for the meta-parameter {key!r} is zero: {why}. Leave it out of `meta`, detach it, or use "
        "it where it counts."
    )
