"""Is this meta-gradient meaningful, or does rounding or the training itself leave nothing of it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from imaml._numbers import check_integer, check_number
from imaml._objective.objective import Objective
from imaml._strategies.meta_gradient import MetaGradient
from imaml._tasks import group
from imaml.verify._figures import USABLE, Figures
from imaml.verify._remedies import advice_on
from imaml.verify._subject import Tasks
from imaml.verify._training import Training

Verdict = Literal["smooth", "rounding", "rough", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Says whether a meta-gradient is meaningful: a verdict, the figures behind it, and what to change.

    `print(smoothness)` shows a few lines.
    """

    subject: str
    """What was looked at, for people."""
    status: Verdict
    """"smooth": all is well. "rounding": the dtype leaves no meaningful meta-gradient, though float64 would. "rough":
    the outer loss does not follow the meta-gradient over any usable distance, whatever the dtype. "inconclusive": the
    meta-gradient is zero."""
    relative_error: float
    """How far the meta-gradient is off by rounding, relative; of the worst of `relative_errors`."""
    relative_errors: dict[str, float]
    """How far off it is for the parameters as one ("parameters"), and of every entry of `meta`."""
    reach: float
    """The longest relative distance, of those looked at, over which (and over the next shorter) the outer loss changes
    as the meta-gradient says, to a factor of 3; of the worst of `agreement`. 0: over none of them."""
    agreement: dict[str, dict[float, float]]
    """How much of the slope is left over a relative distance along the meta-gradient, 1 being all of it: by distance,
    for "parameters" and "meta-parameters"."""
    cause: str | None
    """A sentence on what was found; None where all is well."""
    advice: tuple[str, ...]
    """What to change, a sentence each: changes that were tried on this very problem, with the figure that they led to.
    Empty where all is well, or where nothing that was tried helps."""
    tolerance: float
    """The largest relative error that passes."""

    def __str__(self) -> str:
        """A few lines to read."""
        lines = [
            f"{self.subject}: {self.status}",
            f"off by {self.relative_error:.2g} by rounding (tolerance {self.tolerance:.2g}); the outer loss follows it "
            f"over a relative distance of {self.reach:.2g}",
            *(
                f"{name}: " + ", ".join(f"{ratio:.2g} of the slope at {h:.0e}" for h, ratio in ratios.items())
                for name, ratios in self.agreement.items()
            ),
        ]
        return "\n".join([*lines, *([f"cause: {self.cause}"] if self.cause else []), *self.advice])


def smoothness(
    engine: MetaGradient,
    objective: Objective,
    tasks: Tasks,
    *,
    of: Sequence[str] | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Smoothness:
    """Say whether float32, or the training itself, leaves a meaningful meta-gradient, and what to change if not.

    A meta-gradient can be right and useless. Two figures tell:

    - its error by rounding: the relative distance from the meta-gradient of a copy in float64. Where the problem is in
      float64 already, or draws random numbers, it is how far the meta-gradient moves with parameters that are moved by
      their rounding error;
    - how far the outer loss follows it: central differences of the loss after the inner loop, over relative distances
      from 1e-5 to 1e-2 along the meta-gradient, in float64. `FOMAML`, `ImplicitMAML` and a truncated `MAML` do not
      claim to be derivatives of that loss: their slopes at either end are compared with that at the start.

    Parameters are moved as one vector, relative to its length, and each entry of `meta` relative to its own.

    Where the verdict is another than "smooth", changes are tried that may help, as far as they apply: `eps_root=1e-9`
    and a larger `eps` in optimisers that have them, a quarter of the step size, of the inner steps or of the steps that
    are differentiated (`truncate`), smooth activations for ReLU, and float64. Those that help are in `advice`.

    Cost: two meta-gradients and 10 to 18 inner loops without derivatives, or as many meta-gradients in place of these
    loops where it is not exact MAML; and as much again at most for each change that is tried, of which there are five
    or six.

    Source: Engstrom et al. 2025 (arXiv 2503.13751) ask how smooth a training is before they follow its meta-gradient.

    Args:
        engine: A strategy.
        objective: Model and loss; copies are looked at.
        tasks: A few tasks with shapes and an inner training as in use, in the dtype in use.
        of: What is asked about: names of `objective.parameters()`, of modules, or patterns. None: all. Where a model is
            only trained and `meta` is what is learned, name that.
        tolerance: The largest relative error by rounding that counts as well.
        seed: Seed of random draws and of the rounding errors.

    Returns:
        The verdict.

    Raises:
        TypeError: Not a strategy, an objective or tasks; or the model cannot be copied, or not run in float64.
        ValueError: An unknown name, or a tolerance that is not positive; and whatever a call of the engine raises.
        NonFiniteError: A loss or the meta-gradient is NaN or infinite: nothing is left to ask about.
        DivergenceError: The inner loop diverges.
    """
    if not isinstance(engine, MetaGradient):
        raise TypeError(f"Expected a strategy such as MAML(inner=...). Got {type(engine).__name__}.")
    if not isinstance(objective, Objective):
        raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
    if check_number("`tolerance`", tolerance) <= 0:
        raise ValueError(f"`tolerance` must be positive. Got {tolerance}.")
    check_integer("`seed`", seed, least=0)
    group(tasks)  # says what tasks are, where these are none
    training = Training.of_engine(engine, objective, tasks, of, seed)
    figures = Figures.of(training)
    status, cause = _verdict(figures, training.dtype, tolerance)
    return Smoothness(
        subject=f"{type(engine).__name__} with {type(engine.inner).__name__}, {engine.inner.steps} steps, "
        f"{_short(training.dtype)}",
        status=status,
        relative_error=figures.error,
        relative_errors=figures.errors,
        reach=figures.reach,
        agreement=figures.agreement,
        cause=cause,
        advice=advice_on(
            training,
            tolerance,
            is_rough=status == "rough",
            is_off=figures.error > tolerance and status != "inconclusive",
        ),
        tolerance=tolerance,
    )


def _verdict(figures: Figures, dtype: torch.dtype, tolerance: float) -> tuple[Verdict, str | None]:
    if not figures.agreement:
        return "inconclusive", "the meta-gradient is zero, or too small for differences of the outer loss in float64"
    rounding = f"in {_short(dtype)} the meta-gradient of {figures.worst} is off by {figures.error:.2g}"
    is_off = figures.error > tolerance
    if figures.is_rough:
        return "rough", (
            f"the outer loss does not follow the meta-gradient of the {figures.roughest} over a relative distance of "
            f"{USABLE:g}, in any dtype: an inner step is steep somewhere, the training chaotic, or kinks too close "
            "together" + (f"; besides, {rounding}" if is_off else "")
        )
    if is_off:
        return "rounding", f"{rounding}, though in float64 the outer loss follows it"
    return "smooth", None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
