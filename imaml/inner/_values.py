"""The values of a hyper-parameter, in every form that they may be given in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imaml._losses.layout import Layout


@dataclass
class Value:
    """One hyper-parameter: for all steps of a call, or as a schedule has it at one."""

    parts: list[Tensor]
    """For each parameter, or for all at once, `(1 or steps, 1 or size)`; small, and expanded step by step."""
    sizes: tuple[int, ...] | None
    """Entries of each parameter; None for one part for all."""
    cotangents: list[Tensor] = field(default_factory=list)

    @property
    def is_learned(self) -> bool:
        return any(part.requires_grad for part in self.parts)

    def at(self, step: int) -> Tensor:
        """The values of one step, `(1,)` or `(n,)`."""
        rows = [row.detach() for row in _rows(self.parts, step)]
        return (
            rows[0] if self.sizes is None else torch.cat([r.expand(s) for r, s in zip(rows, self.sizes, strict=True)])
        )

    def add(self, cotangent: Tensor, step: int) -> None:
        """Add the derivative by the values of one step, of a shape that summed is theirs."""
        self.cotangents = self.cotangents or [torch.zeros_like(part) for part in self.parts]
        pieces = [cotangent] if self.sizes is None else cotangent.split(self.sizes, dim=-1)
        for row, piece in zip(_rows(self.cotangents, step), pieces, strict=True):
            row += piece.sum_to_size(row.shape)

    @property
    def pulled(self) -> list[tuple[Tensor, Tensor]]:
        """The values that depend on a meta-parameter, each with its derivative, as far as any was added."""
        return [(p, c) for p, c in zip(self.parts, self.cotangents, strict=False) if p.requires_grad]


def _rows(parts: Sequence[Tensor], step: int) -> list[Tensor]:
    return [part[min(step, len(part) - 1)] for part in parts]


def value_of(name: str, found: Any, layout: Layout, steps: int, like: Tensor) -> Value:
    """What was given for a hyper-parameter, or returned by its function; raises TypeError or ValueError."""
    if isinstance(found, Mapping):
        _check_names(name, found, layout.names)
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        _check_one_meaning(name, found, shapes, steps)
        return Value(
            [_column(f"{name}[{n!r}]", found[n], shape, steps, like) for n, shape in shapes.items()], layout.sizes
        )
    if isinstance(found, (list, tuple)) and found:
        value = torch.stack([_tensor(name, v, like) for v in found])
    else:
        value = _tensor(name, found, like)
    if value.ndim > 1 or value.ndim == 1 and len(value) not in (1, steps):
        raise ValueError(
            f"`{name}` must be a number, or one per inner step, shape ({steps},). Got {tuple(value.shape)}: for one "
            "per parameter return a dictionary by parameter name."
        )
    return Value([value.reshape(-1, 1)], None)


def _check_names(name: str, found: Mapping[Any, Any], names: Sequence[str]) -> None:
    """Raise unless a mapping is by parameter name."""
    missing, unknown = set(names) - set(found), sorted(map(str, set(found) - set(names)))
    if unknown and len(missing) == len(names):
        raise ValueError(
            f"`{name}` must be one value for all parameters, or a dictionary with one for each by its name. Got a "
            f"group of values with other names, {unknown}, where {list(names)} adapt: choose one of the group, or give "
            "one to each parameter."
        )
    if missing or unknown:
        raise ValueError(
            f"`{name}` must name every adapted parameter and no other. Missing: {sorted(missing) or 'none'}; "
            f"unknown: {unknown or 'none'}."
        )


def _check_one_meaning(name: str, found: Mapping[str, Any], shapes: Mapping[str, torch.Size], steps: int) -> None:
    """Raise where a vector may be one value per step, as others beside it are, or one per entry of its parameter."""
    vectors = [n for n, value in found.items() if isinstance(value, Tensor) and value.shape == (steps,)]
    both = [n for n in vectors if shapes[n] == (steps,)]
    others = [n for n, v in found.items() if isinstance(v, (list, tuple)) and len(v) == steps or n in vectors]
    if steps > 1 and both and (other := next((n for n in others if n not in both), None)):
        raise ValueError(
            f"`{name}[{both[0]!r}]` may be one value per inner step, as `{name}[{other!r}]` is, or one per entry of "
            f"the parameter, which has as many. Expected shape ({steps}, 1) for one per step, or (1, {steps}) for one "
            f"per entry. Got ({steps},)."
        )


def _column(name: str, value: Any, shape: torch.Size, steps: int, like: Tensor) -> Tensor:
    """One parameter's part, `(1 or steps, 1 or size)`; of the parameter's shape is one value per entry."""
    if isinstance(value, (list, tuple)):
        if len(value) not in (1, steps):
            raise ValueError(f"`{name}` must be a sequence of {steps} values, one per inner step. Got {len(value)}.")
        rows = [_column(name, each, shape, 1, like) for each in value]
        width = max(row.shape[1] for row in rows)
        return torch.cat([row.expand(1, width) for row in rows])
    tensor = _tensor(name, value, like)
    if tensor.ndim == 0 or tensor.shape == shape:
        return tensor.reshape(1, -1)
    if tensor.ndim == 1 and len(tensor) in (1, steps):
        return tensor.reshape(-1, 1)
    per_step = (steps, *shape)
    if tensor.ndim == len(per_step) and all(a in (1, b) for a, b in zip(tensor.shape, per_step, strict=True)):
        full = tensor if tensor[0].numel() == 1 else tensor.expand(len(tensor), *shape)
        return full.reshape(len(full), -1)
    raise ValueError(
        f"`{name}` must be a number, of the parameter's shape {tuple(shape)}, or for each inner step of shape "
        f"({steps},), or {per_step}, where dimensions may be 1. Got {tuple(tensor.shape)}."
    )


def _tensor(name: str, value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like)
    if isinstance(value, Real):
        return like.new_tensor(float(value))
    if isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must be numbers or tensors. Got a group of them, {sorted(map(str, value))}: choose one. Values "
            "by parameter and step are a dictionary by parameter name, of one sequence each."
        )
    raise TypeError(f"`{name}` must be numbers or tensors. Got {value!r}.")
