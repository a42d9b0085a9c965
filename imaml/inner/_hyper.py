"""Hyper-parameters of the inner loop: numbers, or functions of learned meta-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from imaml._losses.layout import Layout
from imaml._numbers import check_number
from imaml._objective.foreign import leaves_of
from imaml._objective.meta import MetaParameters

Hyper = float | Sequence[float] | Mapping[str, Any] | Callable[[dict[str, Any]], Any]
"""See `InnerOptimizer.lr`."""


def is_off(given: Hyper | None) -> bool:
    """Whether a hyper-parameter is the number zero, or None."""
    kind = type(given)  # asked at every step: the common kinds first, without a look at abstract classes
    return given is None or (kind in (float, int) or isinstance(given, Real)) and given == 0


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
    elif isinstance(given, (nn.ParameterDict, nn.ParameterList)):
        raise TypeError(
            f"`{name}` is a {type(given).__name__}. Expected a number, or a function of the meta-parameters: name its "
            "tensors in Objective(..., meta={...}), and return them from a function of that dictionary."
        )
    elif where or not callable(given):
        value = check_number(f"`{name}`", given)
        if value < 0 or value == 0 and not must.startswith(">= 0"):
            raise ValueError(f"`{name}` must be {must}. Got {value}{where}.")


@dataclass
class _Value:
    """One hyper-parameter for one call."""

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


def _rows(parts: Sequence[Tensor], step: int) -> list[Tensor]:
    return [part[min(step, len(part) - 1)] for part in parts]


@dataclass
class Hyperparameters:
    """The values for one call, and the derivative of the meta-gradient's loss by each that is learned.

    Derivatives are summed by value while steps are pulled back, and go through the user's functions once, at the end.
    """

    leaves: dict[str, Tensor]
    """The meta-parameters."""
    numbers: dict[str, float] = field(default_factory=dict)
    _values: dict[str, _Value] = field(default_factory=dict)

    @classmethod
    def of(
        cls, given: Mapping[str, tuple[Hyper, int]], meta: MetaParameters, layout: Layout, like: Tensor
    ) -> Hyperparameters:
        """Evaluate them.

        Args:
            given: By name, each with the number of steps that it may have values for.
            meta: The meta-parameters.
            layout: Layout of the adapted parameters.
            like: The dtype and device of the values.

        Returns:
            The values, all finite.

        Raises:
            TypeError: A value that is neither a number nor a tensor.
            ValueError: A shape that fits neither the steps nor the parameter, a value that is not finite, or one that
                depends on a tensor which requires grad and is no meta-parameter.
        """
        self = cls({n: t.detach().requires_grad_() for n, t in meta.learned().items()})
        for name, (what, steps) in given.items():
            found = _evaluate(name, what, meta, self.leaves)
            if isinstance(found, Real):
                if not math.isfinite(found):
                    raise ValueError(f"`{name}` must be finite. Got {found}.")
                self.numbers[name] = float(found)
                continue
            with torch.enable_grad():
                value = _value(name, found, layout, steps, like)
            if leaves_of(value.parts).keys() - {id(leaf) for leaf in self.leaves.values()}:
                raise ValueError(
                    f"`{name}` depends on a tensor that requires grad and is not in the dictionary that its function "
                    "gets, so it would not be learned. Name it in Objective(..., meta={...}), or detach it."
                )
            for part in value.parts:
                if not bool(part.isfinite().all()):
                    raise ValueError(f"`{name}` must be finite. Got {part.detach()}.")
            self._values[name] = value
        return self

    @property
    def learned(self) -> frozenset[str]:
        """Names of those that depend on a meta-parameter."""
        return frozenset(n for n, v in self._values.items() if v.is_learned)

    def at(self, step: int) -> dict[str, float | Tensor]:
        """The values of all hyper-parameters at one step, each a number or `(1 or n,)`."""
        return self.numbers | {name: value.at(step) for name, value in self._values.items()}

    def add(self, cotangents: Mapping[str, Tensor], step: int) -> None:
        """Add to the derivatives those by the values of one step, of shapes that summed are theirs."""
        for name, cotangent in cotangents.items():
            self._values[name].add(cotangent, step)

    def mark(self) -> Callable[[], None]:
        """What takes back the derivatives that are added from here on."""
        kept = {name: [c.clone() for c in value.cotangents] for name, value in self._values.items()}

        def undo() -> None:
            for name, value in self._values.items():
                value.cotangents = kept[name]

        return undo

    def saved(self) -> dict[str, list[Tensor]]:
        """The derivatives so far."""
        return {name: value.cotangents for name, value in self._values.items()}

    def resume(self, saved: Mapping[str, list[Tensor]]) -> None:
        """Go on adding to those that were saved."""
        for name, cotangents in saved.items():
            self._values[name].cotangents = cotangents

    @property
    def is_finite(self) -> bool:
        """Whether all derivatives so far are."""
        return all(bool(c.isfinite().all()) for value in self._values.values() for c in value.cotangents)

    def leads(self, names: Collection[str]) -> set[str]:
        """Meta-parameters that some of these hyper-parameters depend on."""
        parts = [part for name in self.learned & {*names} for part in self._values[name].parts if part.requires_grad]
        if not parts:
            return set()
        zeros = [torch.zeros_like(part) for part in parts]
        found = torch.autograd.grad(parts, list(self.leaves.values()), zeros, retain_graph=True, allow_unused=True)
        return {name for name, g in zip(self.leaves, found, strict=True) if g is not None}

    def gradients(self) -> dict[str, Tensor]:
        """The derivatives by the meta-parameters that act through hyper-parameters, as far as any was added."""
        pairs = [
            (part, cotangent)
            for value in self._values.values()
            for part, cotangent in zip(value.parts, value.cotangents, strict=False)
            if part.requires_grad
        ]
        if not pairs:
            return {}
        values, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(self.leaves.values()), cotangents, allow_unused=True)
        return {n: g for n, g in zip(self.leaves, found, strict=True) if g is not None}


def _evaluate(name: str, what: Hyper, meta: MetaParameters, leaves: Mapping[str, Tensor]) -> Any:
    if not callable(what):
        return what
    try:
        with torch.enable_grad():
            return what(meta.like_given(leaves))
    except (AttributeError, TypeError) as error:
        if groups := [key for key, value in meta.given.items() if isinstance(value, Mapping)]:
            error.add_note(
                f"In the dictionary that the function of `{name}` gets, each of {groups} is a dictionary itself."
            )
        raise
    except KeyError as error:
        if error.args and error.args[0] in meta.given:
            raise
        groups = [f", {k!r} a group of {sorted(v)}" for k, v in meta.given.items() if isinstance(v, Mapping)]
        raise ValueError(
            f"`{name}` asks for the meta-parameter {error}. Got {sorted(meta.given) or 'none'}{''.join(groups)}: name "
            "it in Objective(..., meta={...}), and ask for a member of a group as meta['group']['member']."
        ) from error


def _value(name: str, found: Any, layout: Layout, steps: int, like: Tensor) -> _Value:
    if isinstance(found, Mapping):
        _check_names(name, found, layout.names)
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        _check_one_meaning(name, found, shapes, steps)
        return _Value(
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
    return _Value([value.reshape(-1, 1)], None)


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
