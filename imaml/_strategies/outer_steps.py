"""The query losses after some of the inner steps: a weighted sum, of which a sweep meets the last term first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imaml._engine.problem import Problem
from imaml._engine.report import Outcome
from imaml._losses.gradient import Gradient
from imaml._numbers import check_integer, check_number
from imaml.inner._hyper import Hyper, takes_step


def name_of(step: int) -> str:
    """What the weight of the query loss after a step is called among the hyper-parameters."""
    return f"outer_steps[{step}]"


def check_outer_steps(given: object, steps: int, first: int) -> dict[int, Hyper]:
    """The weights in ascending order of their steps.

    Args:
        given: What came.
        steps: Inner steps.
        first: The first of them that is differentiated.

    Returns:
        The weights, numbers and functions.

    Raises:
        TypeError: Not a mapping from integers to these.
        ValueError: It is empty, or a step is out of range.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            "`outer_steps` must be a dictionary from numbers of inner steps to weights, such as {2: 0.2, 5: 0.8}. Got "
            f"{given!r}."
        )
    if not given:
        raise ValueError("`outer_steps` must have at least one step. Got none: leave it out for the loss at the end.")
    for step, weight in given.items():
        check_integer("A step of `outer_steps`", step, least=0)
        if step > steps:
            raise ValueError(
                f"A step of `outer_steps` must be from 0 (before the first inner step) to {steps} (after the last, "
                f"`inner.steps`). Got {step}."
            )
        if step < first:
            raise ValueError(
                f"`truncate` differentiates the inner steps from {first} on, and what comes before them counts as a "
                f"constant. Expected `outer_steps` from {first} to {steps}, whose losses depend on theta. "
                f"Got {step}: leave it out, or differentiate more steps."
            )
        if takes_step(weight):
            raise TypeError(
                f"`{name_of(step)}` belongs to one step. Expected a number, or a function of the meta-parameters "
                f"alone. Got {weight!r}, a function of the step too."
            )
        if not callable(weight):
            check_number(f"`{name_of(step)}`, unless a function of the meta-parameters,", weight)
    return dict(sorted(given.items()))


@dataclass
class OuterLoss:
    """w_0 L_query(phi_0) + ... + w_K L_query(phi_K) of the tasks of a chunk, whose terms are looked at one by one."""

    problem: Problem
    steps: tuple[int, ...]
    """Where there is a term, in ascending order."""
    weights: dict[int, float | Tensor] = field(init=False)
    """A number, or `(1,)`."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """L_query `(tasks,)` of each term that has been looked at."""
    metric: Tensor | None = None
    """The metric at the end."""

    def __post_init__(self) -> None:
        hyper = self.problem.hyper
        self.weights = {step: hyper.for_all_steps(name_of(step), 1.0) for step in self.steps}
        for step, weight in self.weights.items():
            if isinstance(weight, Tensor) and weight.shape != (1,):
                raise ValueError(
                    f"`{name_of(step)}` must be one number. Got {tuple(weight.shape)} from its function: return a "
                    "0-dim tensor."
                )

    def gradient(self, step: int, phi: Tensor) -> Gradient:
        """The derivatives of the term of a step, which there is, at phi; that by its weight is added up."""
        weight = self.weights[step]
        found = self.problem.judge(phi, step=step, weight=weight)
        self._note(step, found.losses, found.metric)
        if isinstance(weight, Tensor):
            hyper = self.problem.hyper
            hyper.add({name: found.losses.to(weight) for name in {name_of(step)} & hyper.learned}, 0)
        return found

    def at_the_end(self, phi: Tensor) -> Gradient:
        """The derivatives of the term at the end of the inner loop, zeros where there is none; and the metric."""
        self.problem.finish()
        last = self.problem.inner.steps
        if last in self.weights:
            return self.gradient(last, phi)
        snapshot = self.problem.snapshot
        if snapshot.objective.metric is not None:
            self.value(last, phi)
        none: list[Tensor | None] = [None] * len(snapshot.shared)
        shared = snapshot.shared_layout.gather(none, snapshot.like) if none else None
        return Gradient(phi.new_zeros(len(phi)), torch.zeros_like(phi), shared)

    def add(self, step: int, phi: Tensor, cotangent: Tensor, shared: Tensor | None) -> bool:
        """Add the derivatives of the term of a step to those of the terms after it; says whether there is one."""
        if step not in self.weights:
            return False
        found = self.gradient(step, phi)
        cotangent.add_(found.adapted)
        if shared is not None and found.shared is not None:
            shared.add_(found.shared)
        return True

    def value(self, step: int, phi: Tensor) -> None:
        """Look at the term of a step, if there is one, without derivatives; at the end at the metric too."""
        if step not in self.weights and step != self.problem.inner.steps:
            return
        self._note(step, *self.problem.derivatives.value(self.problem.query, phi, step))

    def saved(self) -> dict[str, Any]:
        """What has been looked at."""
        return {"losses": self.losses, "metric": self.metric}

    def resume(self, saved: dict[str, Any]) -> None:
        """Have looked at what was saved."""
        self.losses, self.metric = saved["losses"], saved["metric"]

    def check(self) -> None:
        """Raise NonFiniteError where a loss that has been looked at without derivatives is NaN or infinite."""
        for step in self.steps:
            self.problem.check_query(self.losses[step], step)

    def outcome(self, *, lists: bool) -> Outcome:
        """What the report says of these tasks, each of the losses if it lists them."""
        losses = torch.stack([self.losses[step] for step in self.steps])
        terms = [(self.weights[step] * loss).to(loss) for step, loss in zip(self.steps, losses, strict=True)]
        return Outcome(
            query_loss=terms[0] if len(terms) == 1 else torch.stack(terms).sum(0),
            support_loss=self.problem.history(),
            metric=self.metric,
            outer_losses=losses if lists else None,
        )

    def _note(self, step: int, losses: Tensor, metric: Tensor | None) -> None:
        self.losses[step] = losses
        if step == self.problem.inner.steps:
            self.metric = metric
