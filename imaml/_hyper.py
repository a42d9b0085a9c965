"""Hyper-parameters of the inner loop: numbers, or functions of learned meta-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imaml._layout import Layout
from imaml._meta import MetaParameters
from imaml._numbers import check_number

Hyper = float | Sequence[float] | Mapping[str, Any] | Callable[[dict[str, Any]], Any]
"""See `InnerOptimizer.lr`."""


def is_off(given: Hyper | None) -> bool:
    """Whether a hyper-parameter is the number zero, or None."""
    return given is None or isinstance(given, Real) and given == 0


def check_hyper(name: str, given: object, *, must: str, where: str = "") -> None:
    """Raise unless a hyper-parameter is of the right kind, and its numbers are in range.

    Args:
        name: For the message.
        given: What came.
        must: What is expected of a number, for the message; unless it begins with ">= 0" it must not be zero.
        where: Which part of `given`, for the message.

    Raises:
        TypeError: A wrong kind.
        ValueError: A number out of range, or a tensor that requires grad.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            check_hyper(name, value, must=must, where=f" for {key!r}{where}")
    elif isinstance(given, (list, tuple)):
        for step, value in enumerate(given):
            check_hyper(name, value, must=must, where=f" at step {step}{where}")
    elif isinstance(given, Tensor):
        if given.requires_grad:
            raise ValueError(
                f"`{name}` is a tensor that requires grad. Expected a function of the meta-parameters: name the tensor "
                "in Objective(..., meta={...}), and return it from a function of that dictionary."
            )
        for value in (given.min().item(), given.max().item()) if given.numel() else ():
            check_hyper(name, value, must=must, where=where)
    elif not callable(given):
        value = check_number(f"`{name}`", given)
        if value < 0 or value == 0 and not must.startswith(">= 0"):
            raise ValueError(f"`{name}` must be {must}. Got {value}{where}.")


@dataclass
class Hyperparameters:
    """The values for one call, and the derivative of the meta-gradient's loss by each that is learned."""

    values: dict[str, float | Tensor]
    """A number, or `(1 or steps, 1 or n)`."""
    leaves: dict[str, Tensor]
    """The meta-parameters."""
    _learned: dict[str, Tensor] = field(default_factory=dict)
    _cotangents: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, given: Mapping[str, tuple[Hyper, int]], meta: MetaParameters, layout: Layout, like: Tensor
    ) -> Hyperparameters:
        """Evaluate them.

        Args:
            given: By name, each with the number of steps that it may have values for.
            meta: The meta-parameters.
            layout: Of the adapted parameters.
            like: The dtype and device of the values.

        Returns:
            The values, all finite.

        Raises:
            ValueError: A shape that fits neither the steps nor the parameter, or a value that is not finite.
        """
        self = cls({}, {n: t.detach().requires_grad_() for n, t in meta.flat().items()})
        for name, (what, steps) in given.items():
            with torch.enable_grad():
                try:
                    found = what(meta.like_given(self.leaves)) if callable(what) else what
                except KeyError as error:
                    raise ValueError(
                        f"`{name}` asks for the meta-parameter {error}. Got {sorted(meta.given) or 'none'}: name it in "
                        "Objective(..., meta={...})."
                    ) from error
                if isinstance(found, Real):
                    self.values[name] = float(found)
                    continue
                value = _as_matrix(name, found, layout, steps, like)
            if not bool(value.isfinite().all()):
                raise ValueError(f"`{name}` must be finite. Got {value.detach()}.")
            self.values[name] = value.detach()
            if value.requires_grad:
                self._learned[name] = value
        return self

    @property
    def learned(self) -> frozenset[str]:
        """Names of those that depend on a meta-parameter."""
        return frozenset(self._learned)

    def at(self, step: int) -> dict[str, float | Tensor]:
        """Those of one step, each a number or `(1 or n,)`."""
        return {n: v[min(step, len(v) - 1)] if isinstance(v, Tensor) else v for n, v in self.values.items()}

    def add(self, cotangents: Mapping[str, Tensor], step: int) -> None:
        """Add to the derivatives those by the values of one step, of shapes that summed are theirs."""
        for name, cotangent in cotangents.items():
            total = self._cotangents.setdefault(name, torch.zeros_like(self._learned[name]))
            row = total[min(step, len(total) - 1)]
            row += cotangent.sum_to_size(row.shape)

    def gradients(self) -> dict[str, Tensor]:
        """The derivatives by the meta-parameters that act through hyper-parameters, as far as any was added."""
        pairs = [(self._learned[n], c) for n, c in self._cotangents.items()]
        if not pairs:
            return {}
        values, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(self.leaves.values()), cotangents, allow_unused=True)
        return {n: g for n, g in zip(self.leaves, found, strict=True) if g is not None}


def _as_matrix(name: str, found: Any, layout: Layout, steps: int, like: Tensor) -> Tensor:
    """`(1 or steps, 1 or n)` in dtype and on the device of `like`."""

    def tensor(value: Any) -> Tensor:
        return value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)

    if not isinstance(found, Mapping):
        value = torch.stack([tensor(v) for v in found]) if isinstance(found, (list, tuple)) else tensor(found)
        if value.ndim > 1 or value.ndim == 1 and len(value) not in (1, steps):
            raise ValueError(
                f"`{name}` must be a number, or one per inner step, shape ({steps},). Got {tuple(value.shape)}: for "
                "one per parameter return a dictionary by parameter name."
            )
        return value.reshape(-1, 1)
    if set(found) != set(layout.names):
        raise ValueError(
            f"`{name}` must name every adapted parameter and no other. "
            f"Missing: {sorted(set(layout.names) - set(found)) or 'none'}; "
            f"unknown: {sorted(set(found) - set(layout.names)) or 'none'}."
        )
    columns = [
        _column(f"{name}[{n!r}]", found[n], shape, steps, like)
        for n, shape in zip(layout.names, layout.shapes, strict=True)
    ]
    rows = max(len(c) for c in columns)
    return torch.cat([c.expand(rows, -1) for c in columns], dim=1)


def _column(name: str, value: Any, shape: torch.Size, steps: int, like: Tensor) -> Tensor:
    """One parameter's part, `(1 or steps, size)`."""
    if isinstance(value, (list, tuple)) and len(value) in (1, steps):
        return torch.cat([_column(name, each, shape, 1, like) for each in value])
    tensor = value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)
    if tensor.ndim == 0 or tensor.shape == shape:
        return tensor.expand(shape).reshape(1, -1)
    per_step = (steps, *shape)
    if tensor.ndim == len(per_step) and all(a in (1, b) for a, b in zip(tensor.shape, per_step, strict=True)):
        return tensor.expand(per_step).reshape(steps, -1)
    raise ValueError(
        f"`{name}` must be a number, of the parameter's shape {tuple(shape)}, or of shape {per_step}, where dimensions "
        f"may be 1, for each inner step. Got {tuple(tensor.shape)}."
    )
