"""Hyper-parameters of the inner loop: numbers, or functions of learned meta-parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from imaml._losses.layout import Layout
from imaml._numbers import check_number
from imaml._objective.foreign import leaves_of
from imaml._objective.meta import MetaParameters
from imaml.inner._rates import META, Rates
from imaml.inner._values import Value, value_of

Hyper = float | Sequence[float] | Mapping[str, Any] | Callable[..., Any]
"""See `InnerOptimizer.lr`."""


def is_off(given: Hyper | None) -> bool:
    """Whether a hyper-parameter is the number zero, or None."""
    kind = type(given)  # asked at every step: the common kinds first, without a look at abstract classes
    return given is None or (kind in (float, int) or isinstance(given, Real)) and given == 0


def takes_step(given: object) -> TypeGuard[Callable[..., Any]]:
    """Whether a hyper-parameter is a schedule: a function of the meta-parameters and the step, two arguments."""
    if not callable(given):
        return False
    try:
        arguments = inspect.signature(given).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not say
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(a.kind in kinds and a.default is a.empty for a in arguments) == 2


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
class _Schedule:
    """A hyper-parameter that is a function of the step too, evaluated whenever a step is taken or pulled back."""

    evaluate: Callable[[int], float | Value]
    steps: range
    """The steps of the call."""

    def values(self) -> Iterable[Value]:
        """The values at all of these that are no numbers."""
        for step in self.steps:
            value = self.evaluate(step)
            if isinstance(value, Value):
                yield value

    @cached_property
    def is_learned(self) -> bool:
        """Whether it depends on a meta-parameter at any of the steps."""
        return any(value.is_learned for value in self.values())


@dataclass
class Hyperparameters:
    """The values for one call, and the derivative of the meta-gradient's loss by each that is learned.

    Derivatives by what is the same function at all steps are summed by value while steps are pulled back, and go
    through the user's functions once, at the end. Those by a schedule go through its function step by step.
    """

    leaves: dict[str, Tensor]
    """The meta-parameters that are learned."""
    meta: MetaParameters
    layout: Layout
    like: Tensor
    named: MetaParameters
    """The meta-parameters that an update reads itself."""
    numbers: dict[str, float] = field(default_factory=dict)
    _values: dict[str, Value] = field(default_factory=dict)
    _schedules: dict[str, _Schedule] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    """Derivatives by meta-parameters, of schedules and of what an update reads itself."""

    @classmethod
    def of(
        cls,
        given: Mapping[str, tuple[Hyper, int]],
        meta: MetaParameters,
        layout: Layout,
        like: Tensor,
        *,
        names: Sequence[str] = (),
        first: int = 0,
    ) -> Hyperparameters:
        """Evaluate them; a schedule at its steps alone.

        Args:
            given: By name, each with the number of steps that it may have values for.
            meta: The meta-parameters.
            layout: Layout of the adapted parameters.
            like: The dtype and device of the values.
            names: The meta-parameters that an update reads itself: keys of what was given as `meta`.
            first: The first step that is taken.

        Returns:
            The values, all finite.

        Raises:
            TypeError: A value that is neither a number nor a tensor.
            ValueError: A shape that fits neither the steps nor the parameter, a value that is not finite, one that
                depends on a tensor which requires grad and is no meta-parameter, or a name of no meta-parameter.
        """
        if missing := [name for name in names if name not in meta.given]:
            raise ValueError(
                f"The inner optimiser's `meta` names {missing[0]!r}. Expected keys of Objective(..., meta={{...}}), of "
                f"which a group is one. Got {_listed(meta)}."
            )
        leaves = {n: t.detach().requires_grad_() for n, t in meta.learned().items()}
        detached = meta.like_given({n: t.detach() for n, t in meta.flat().items()}) if names else {}
        self = cls(leaves, meta, layout, like, MetaParameters({name: detached[name] for name in names}))
        for name, (what, steps) in given.items():
            if takes_step(what):
                self._schedules[name] = _Schedule(partial(self._scheduled, name, what), range(first, steps))
                continue
            value = self._evaluate(name, what, steps)
            if isinstance(value, Value):
                self._values[name] = value
            else:
                self.numbers[name] = value
        return self

    def _scheduled(self, name: str, what: Callable[..., Any], step: int) -> float | Value:
        return self._evaluate(f"{name}(meta, {step})", what, 1, step)

    def _evaluate(self, name: str, what: Hyper, steps: int, *at: int) -> float | Value:
        """What was given, or what its function returns at a step; raises as `of` does."""
        found = _called(name, what, self.meta, self.leaves, *at)
        if isinstance(found, Real):
            if not math.isfinite(found):
                raise ValueError(f"`{name}` must be finite. Got {found}.")
            return float(found)
        with torch.enable_grad():
            value = value_of(name, found, self.layout, steps, self.like)
        if leaves_of(value.parts).keys() - {id(leaf) for leaf in self.leaves.values()}:
            raise ValueError(
                f"`{name}` depends on a tensor that requires grad and is not in the dictionary that its function "
                "gets, so it would not be learned. Name it in Objective(..., meta={...}), or detach it."
            )
        for part in value.parts:
            if not bool(part.isfinite().all()):
                raise ValueError(f"`{name}` must be finite. Got {part.detach()}.")
        return value

    @cached_property
    def learned(self) -> frozenset[str]:
        """Names of those that depend on a meta-parameter, and of the learned ones that an update reads itself."""
        values = {n for n, v in self._values.items() if v.is_learned}
        schedules = {n for n, s in self._schedules.items() if self.leaves and s.is_learned}
        return frozenset(values | schedules | {f"{META}{n}" for n in self.named.flat() if n in self.leaves})

    def at(self, step: int) -> Rates:
        """The values of all hyper-parameters at one step, each a number or `(1 or n,)`, and what an update reads."""
        by_name: dict[str, float | Tensor] = {**self.numbers}
        if self._values:  # asked at every step
            by_name |= {name: value.at(step) for name, value in self._values.items()}
        for name, schedule in self._schedules.items():
            value = schedule.evaluate(step)
            by_name[name] = value.at(0) if isinstance(value, Value) else value
        return Rates(by_name, self.layout, self.named)

    def tensors_of(self, at: Rates) -> dict[str, Tensor]:
        """The values at a step that may be others at another one or in another call, each as a tensor, by name."""
        if not (self._values or self._schedules or self.named.given):  # asked at every step
            return {}
        found = at.tensors({*self._values, *self._schedules, *(f"{META}{name}" for name in self.named.flat())})
        return found | {n: self.like.new_tensor(at[n]) for n in self._schedules.keys() - found.keys()}

    def at_one_step(self, at: Rates) -> Hyperparameters:
        """What is the same at every step: these values, of one of them."""
        found = _AtOneStep(self.leaves, self.meta, self.layout, self.like, self.named, self.numbers)
        found.rates, found.learned = at, self.learned
        return found

    def for_all_steps(self, name: str, otherwise: float = 0.0) -> float | Tensor:
        """The value of one that is the same at all steps; another where there is none of this name."""
        return self._values[name].at(0) if name in self._values else self.numbers.get(name, otherwise)

    def add(self, cotangents: Mapping[str, Tensor], step: int) -> None:
        """Add to the derivatives those by the values of one step, of shapes that summed are theirs."""
        for name, cotangent in cotangents.items():
            if name in self._values:
                self._values[name].add(cotangent, step)
            elif name in self._schedules:
                value = self._schedules[name].evaluate(step)
                if isinstance(value, Value):
                    value.add(cotangent, 0)
                    self._sum(self._through(value.pulled))
            else:
                self._sum({name.removeprefix(META): cotangent})

    def _sum(self, found: Mapping[str, Tensor]) -> None:
        for name, gradient in found.items():
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient.clone()

    def _through(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The derivatives by the meta-parameters, for those by values of functions of them."""
        if not pairs:
            return {}
        values, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(self.leaves.values()), cotangents, allow_unused=True)
        return {n: g for n, g in zip(self.leaves, found, strict=True) if g is not None}

    def mark(self) -> Callable[[], None]:
        """What takes back the derivatives that are added from here on."""
        kept = {name: [c.clone() for c in value.cotangents] for name, value in self._values.items()}
        sums = {name: total.clone() for name, total in self._sums.items()}

        def undo() -> None:
            for name, value in self._values.items():
                value.cotangents = kept[name]
            self._sums = sums

        return undo

    def saved(self) -> dict[str, Any]:
        """The derivatives so far."""
        return {"by_value": {name: value.cotangents for name, value in self._values.items()}, "sums": self._sums}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on adding to those that were saved."""
        for name, cotangents in saved["by_value"].items():
            self._values[name].cotangents = cotangents
        self._sums = saved["sums"]

    @property
    def is_finite(self) -> bool:
        """Whether all derivatives so far are."""
        by_value = [c for value in self._values.values() for c in value.cotangents]
        return all(bool(c.isfinite().all()) for c in (*by_value, *self._sums.values()))

    def leads(self, names: Collection[str]) -> set[str]:
        """Meta-parameters that some of these hyper-parameters depend on, and those that an update was seen to read."""
        values = [self._values[n] for n in names if n in self._values]
        values += [v for n in names if n in self._schedules for v in self._schedules[n].values()]
        parts = [part for value in values for part in value.parts if part.requires_grad]
        found = {n.removeprefix(META) for n in names if n.startswith(META)} & self._sums.keys()
        if not parts:
            return found
        zeros = [torch.zeros_like(part) for part in parts]
        pulled = torch.autograd.grad(parts, list(self.leaves.values()), zeros, retain_graph=True, allow_unused=True)
        return found | {name for name, g in zip(self.leaves, pulled, strict=True) if g is not None}

    def gradients(self) -> dict[str, Tensor]:
        """The derivatives by the meta-parameters that act through hyper-parameters, as far as any was added."""
        self._sum(self._through([pair for value in self._values.values() for pair in value.pulled]))
        return self._sums


class _AtOneStep(Hyperparameters):
    rates: Rates

    def at(self, step: int) -> Rates:
        """See `Hyperparameters`."""
        return self.rates


def _called(name: str, what: Hyper, meta: MetaParameters, leaves: Mapping[str, Tensor], *at: int) -> Any:
    if not callable(what):
        return what
    try:
        with torch.enable_grad():
            return what(meta.like_given(leaves), *at)
    except (AttributeError, TypeError) as error:
        if not at:
            error.add_note(f"With one argument the function of `{name}` gets the meta-parameters, and not the step.")
        if groups := [key for key, value in meta.given.items() if isinstance(value, Mapping)]:
            error.add_note(
                f"In the dictionary that the function of `{name}` gets, each of {groups} is a dictionary itself."
            )
        raise
    except KeyError as error:
        if error.args and error.args[0] in meta.given:
            raise
        raise ValueError(
            f"`{name}` asks for the meta-parameter {error}. Got {_listed(meta)}: name it in Objective(..., "
            "meta={...}), and ask for a member of a group as meta['group']['member']."
        ) from error


def _listed(meta: MetaParameters) -> str:
    """The meta-parameters in words."""
    groups = [f", {k!r} a group of {sorted(v)}" for k, v in meta.given.items() if isinstance(v, Mapping)]
    return f"{sorted(meta.given) or 'none'}{''.join(groups)}"
