"""An inner training whose smoothness is asked for: its meta-gradient, and what is left of that a distance away."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from imaml._errors import SolverError
from imaml._objective.objective import Objective
from imaml._objective.select import select
from imaml._strategies.maml import MAML
from imaml._strategies.meta_gradient import MetaGradient
from imaml.verify._reference import Values, draws, flat, moved, unflat
from imaml.verify._subject import Tasks, call, in_double

DISTANCES = (1e-5, 1e-4, 1e-3, 1e-2)
"""How far the meta-gradient is followed, relative to the size of what it is the gradient of."""
PARAMETERS, META = "parameters", "meta-parameters"
RESOLVED = 1e-12
"""Relative error of an outer loss in float64, which says over which distances its differences mean something."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """An engine on a problem, as given and in float64."""

    engine: MetaGradient
    objective: Objective
    tasks: Tasks
    of: tuple[str, ...]
    """Names of the parameters that are asked about."""
    seed: int

    @classmethod
    def of_engine(
        cls, engine: MetaGradient, objective: Objective, tasks: Tasks, of: Sequence[str] | None, seed: int
    ) -> Training:
        """One whose engine raises where a task is not finite, and compiles nothing.

        Args:
            engine: The engine.
            objective: The objective, as given.
            tasks: The tasks, as given.
            of: Names or patterns of what is asked about; None: all.
            seed: Seed of random draws.

        Returns:
            The training.

        Raises:
            TypeError: `of` is no list of names.
            ValueError: It names nothing, or nothing that there is.
        """
        names = objective.parameters()
        chosen = tuple(names) if of is None else select(of, names)
        if not chosen:
            raise ValueError("`of` must name at least one of objective.parameters(). Got none.")
        plain = replace(engine, compile=False, on_nonfinite="raise")
        return cls(engine=plain, objective=objective, tasks=tasks, of=chosen, seed=seed)

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype of the parameters that are asked about."""
        named = self.objective.parameters()
        return max((named[n].dtype for n in self.of), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def is_exact(self) -> bool:
        """Whether the meta-gradient is the derivative of the loss after the inner loop, whose differences it has."""
        return isinstance(self.engine, MAML) and (
            self.engine.truncate is None or self.engine.truncate >= self.engine.inner.steps
        )

    @cached_property
    def double(self) -> Objective:
        """The objective in float64."""
        return self.objective.double()

    @cached_property
    def double_tasks(self) -> Tasks:
        """The tasks in float64."""
        return in_double(self.tasks)

    @cached_property
    def gradient(self) -> Values:
        """The meta-gradient in float64.

        Raises:
            TypeError: The model or its loss does not run in float64.
            SolverError: A linear solve failed, and the engine raises then.
        """
        try:
            return self._gradient(self.double, self.double_tasks)
        except SolverError:
            raise
        except RuntimeError as error:
            with draws(self.seed):
                self.engine.value_and_grad(self.objective, self.tasks)  # one that fails as given says so
            raise TypeError(
                f"The model or its loss does not run in float64: {error}. Expected one that computes in the dtype of "
                "its parameters and inputs: keep constants as buffers of the model, and make no tensor of a fixed "
                "dtype."
            ) from error

    @cached_property
    def value(self) -> float:
        """The outer loss in float64."""
        return self._value(self.seed)

    @property
    def is_random(self) -> bool:
        """Whether losses or updates draw random numbers, which are others in another dtype."""
        return self._value(self.seed + 1) != self.value

    def rounding(self) -> dict[str, float]:
        """How far the meta-gradient in the dtype of the problem is from that in float64, relative, by group.

        In float64, and where random numbers are drawn, there is none to compare with: it is then how far parameters
        that are moved by their rounding error move the meta-gradient.

        Returns:
            The relative errors.
        """
        if self.dtype == torch.float64 or self.is_random:
            return self.after_rounding(self.dtype)
        return self._distances(self._gradient(self.objective, self.tasks))

    def after_rounding(self, dtype: torch.dtype) -> dict[str, float]:
        """How far the meta-gradient in float64 moves where all parameters are moved by a rounding error of a dtype."""
        unit, generator = torch.finfo(dtype).eps / 2, torch.Generator().manual_seed(self.seed)
        noise = {
            n: unit * p.abs() * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            for n, p in self.double.parameters().items()
        }
        with self._at(noise, 1.0):
            return self._distances(self._gradient(self.double, self.double_tasks))

    def agreement(self) -> dict[str, dict[float, float]]:
        """The slope of the outer loss along the meta-gradient over a distance, relative to that at its start.

        An exact meta-gradient is compared with differences of the loss, any other with itself at either end. A distance
        that float64 does not resolve is left out, as is a group whose meta-gradient is zero.

        Returns:
            1 where the outer loss changes as the meta-gradient says, by distance, for the parameters and for the
            meta-parameters.
        """
        found, by_group = {}, self._groups()
        for group, keys in {PARAMETERS: {PARAMETERS}, META: by_group.keys() - {PARAMETERS}}.items():
            direction = {n: t for key in keys & by_group.keys() for n, t in self._direction(by_group[key]).items()}
            slope = sum((self.gradient[n] * t).sum().item() for n, t in direction.items())
            if slope:
                found[group] = self._along(direction, slope)
        return {group: ratios for group, ratios in found.items() if ratios}

    def _along(self, direction: Values, slope: float) -> dict[float, float]:
        ratios = {}
        for distance in DISTANCES:
            if self.is_exact and distance * slope < RESOLVED * abs(self.value):
                continue
            try:
                ends = [self._end(direction, t) for t in (distance, -distance)]
            except FloatingPointError:  # it diverges there
                ratios[distance] = math.inf
                continue
            except ValueError:  # a hyper-parameter that may not be negative
                continue
            mean = (ends[0] - ends[1]) / (2 * distance) if self.is_exact else (ends[0] + ends[1]) / 2
            ratios[distance] = mean / slope
        return ratios

    def _end(self, direction: Values, distance: float) -> float:
        """The loss there, or the slope where the loss has no part in the meta-gradient."""
        with self._at(direction, distance):
            if self.is_exact:
                return self._value(self.seed)
            gradient = self._gradient(self.double, self.double_tasks)
        return sum((gradient[n] * t).sum().item() for n, t in direction.items())

    def _groups(self) -> dict[str, list[str]]:
        """What is asked about: the parameters as one, and every entry of `meta`."""
        meta = {key: [n for n in group if n in self.of] for key, group in self.objective.meta.groups().items()}
        others = [n for n in self.of if n not in self.objective.meta.learned()]
        return {group: names for group, names in ({PARAMETERS: others} | meta).items() if names}

    def _direction(self, names: Collection[str]) -> Values:
        """The meta-gradient of a group, as long as what it is the gradient of; zeros count as ones."""
        values = self.double.parameters()
        like = {n: values[n] for n in names}
        gradient, vector = flat({n: self.gradient[n] for n in names}), flat(like)
        length, wanted = gradient.norm().item(), vector.norm().item() or math.sqrt(len(vector))
        return unflat(gradient * (wanted / length) if length else gradient, like)

    def _distances(self, got: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative distances from the meta-gradient, by group."""
        found = {}
        for group, names in self._groups().items():
            right, mine = (flat({n: g[n] for n in names}) for g in (self.gradient, got))
            difference = (mine - right).norm().item()
            found[group] = difference / max(right.norm().item(), 1e-300) if difference else 0.0
        return found

    def _gradient(self, objective: Objective, tasks: Tasks) -> Values:
        fresh = replace(self.engine)  # none of the warm starts of the call before
        return unflat(call(fresh, objective, tasks, self.seed)[0], objective.parameters())

    def _value(self, seed: int) -> float:
        with torch.no_grad(), draws(seed):
            return self.engine(self.double, self.double_tasks).loss.item()

    @contextmanager
    def _at(self, direction: Values, distance: float) -> Iterator[None]:
        """Within it, the parameters in float64 are moved along a direction."""
        parameters = self.double.parameters()
        start = {n: parameters[n].detach().clone() for n in direction}
        self._set(parameters, moved(start, direction, distance))
        try:
            yield
        finally:
            self._set(parameters, start)

    @torch.no_grad()
    def _set(self, parameters: Mapping[str, Tensor], values: Values) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)
