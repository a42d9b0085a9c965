"""What makes a meta-gradient meaningful: changes that are tried on the very problem, and named where they help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from imaml._strategies.maml import MAML
from imaml.verify._figures import USABLE, Figures
from imaml.verify._training import Training

EPS_ROOT, EPS, LESS = 1e-9, 1e-6, 4
KINKS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.Hardswish, nn.Hardtanh)


def advice_on(training: Training, tolerance: float, *, is_rough: bool, is_off: bool) -> tuple[str, ...]:
    """Sentences on the changes that help.

    Args:
        training: What is not well.
        tolerance: The largest error by rounding that counts as well.
        is_rough: Whether the outer loss does not follow the meta-gradient.
        is_off: Whether rounding is the trouble, or one of two.

    Returns:
        A sentence for each change, with the figures that it led to.
    """
    return tuple(_advice(training, tolerance, is_rough, is_off)) if is_rough or is_off else ()


def _advice(training: Training, tolerance: float, is_rough: bool, is_off: bool) -> Iterator[str]:
    for words, change in (*_changes(training), *(_smoothed(training) if is_rough else ())):
        try:
            changed = change()
            # Both are asked where both are in question: what heals one may leave the other.
            reach = Figures(errors={}, agreement=changed.agreement()).reach if is_rough else 0.0
            error = max(changed.rounding().values()) if is_off else math.inf
        except (ValueError, FloatingPointError):  # it cannot be made, or the training with it diverges
            continue
        found = [f"the outer loss follows the meta-gradient over a relative distance of {reach:.0e}"] * (
            reach >= USABLE
        )
        found += [f"the error by rounding is {error:.1g}"] * (error <= tolerance)
        if found:
            yield f"{words}: then {' and '.join(found)}."
    for wider in (torch.float32, torch.float64) if is_off else ():
        if torch.finfo(wider).eps >= torch.finfo(training.dtype).eps:
            continue
        error = max(training.after_rounding(wider).values())
        if error <= tolerance:
            name = str(wider).removeprefix("torch.")
            yield f"Compute in {name}: its rounding moves the meta-gradient by {error:.1g}."
            return


def _changes(training: Training) -> Iterator[tuple[str, Callable[[], Training]]]:
    """What may help against either: words for it, and the training with it."""
    engine, inner = training.engine, training.engine.inner
    name, own = type(inner).__name__, {field.name: getattr(inner, field.name) for field in fields(inner)}

    def with_inner(**changes: Any) -> Callable[[], Training]:
        return lambda: replace(training, engine=replace(engine, inner=replace(inner, **changes)))

    if own.get("eps_root") == 0:
        yield f"Use eps_root={EPS_ROOT:g} in {name}", with_inner(eps_root=EPS_ROOT)
    if isinstance(own.get("eps"), Real) and own["eps"] < EPS:
        yield f"Use eps={EPS:g} in {name}, for {own['eps']:g}", with_inner(eps=EPS)
    if isinstance(own.get("lr"), Real):
        lr = own["lr"] / LESS
        yield f"Use a smaller step size, such as lr={lr:g} for {own['lr']:g}", with_inner(lr=lr)
    steps = inner.steps // LESS
    if steps:
        yield f"Take fewer inner steps, such as {steps} for {inner.steps}", with_inner(steps=steps)
        if isinstance(engine, MAML) and training.is_exact:
            yield (
                f"Differentiate fewer steps, such as the last {steps} by truncate={steps} (biased)",
                lambda: replace(training, engine=replace(engine, truncate=steps)),
            )


def _smoothed(training: Training) -> Iterator[tuple[str, Callable[[], Training]]]:
    """The training with smooth activations, where the model has kinks that are modules."""
    model = training.double.model
    if model is None or not any(isinstance(module, KINKS) for module in model.modules()):
        return

    def smooth() -> Training:
        objective = training.objective.double()
        assert objective.model is not None
        for module in list(objective.model.modules()):
            for child, value in list(module.named_children()):
                if isinstance(value, KINKS):
                    setattr(module, child, nn.GELU())
        return replace(training, objective=objective, tasks=training.double_tasks)

    yield "Use smooth activations, such as nn.GELU for nn.ReLU", smooth
