"""The most memory that one meta-gradient holds, against the number of inner steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from imaml import TaskBatch
from imaml.cli._experiment import Experiment, build_engine
from imaml.cli._options import EngineOptions, Strategy
from imaml.cli._result import NAMES
from imaml.cli._usual_loop import usual_loop
from imaml.measure import peak_memory

INNER_STEPS = (1, 2, 4, 8, 16, 32)
CHECKPOINTS = 4


@dataclass(frozen=True, kw_only=True)
class MemoryCurve:
    """Peak bytes of one meta-gradient at each of `INNER_STEPS`, of a strategy or of the usual loop."""

    method: Strategy | Literal["loop"]
    peak_bytes: tuple[int, ...]

    @property
    def name(self) -> str:
        """As it is shown."""
        return "usual loop" if self.method == "loop" else NAMES[self.method]

    @property
    def last(self) -> str:
        """What it takes at the most inner steps, such as "3.7 MB"."""
        megabytes = self.peak_bytes[-1] / 1e6
        return f"{megabytes:.{0 if megabytes >= 10 else 1 if megabytes >= 1 else 2}f} MB"


def memory_curves(
    experiment: Experiment, engines: Mapping[Strategy, EngineOptions], tasks: TaskBatch
) -> list[MemoryCurve]:
    """Measure the usual loop and every strategy on one task, by the allocator's own account.

    MAML keeps `CHECKPOINTS` inner states, unless told otherwise: left to itself it trades memory for time while there
    is plenty. Step sizes are divided by the number of steps, so that long inner loops stay where short ones do.

    Args:
        experiment: Whose initial model is used.
        engines: Options of each strategy; the loop has those of the first.
        tasks: The first is used.

    Returns:
        The loop's curve, then one for each strategy.
    """
    model, task = experiment.fresh_model(), tasks[0]
    device = next(model.parameters()).device

    def loop(options: EngineOptions, steps: int) -> object:
        return usual_loop(
            model,
            experiment.loss,
            task,
            adapted=experiment.objective(model, options.adapt).adapted,
            lr=(options.inner_lr or 0.0) / steps,
            steps=steps,
            regularization=options.regularization or 0.0,
        )

    def ours(strategy: Strategy, options: EngineOptions, steps: int) -> object:
        lean = replace(options, inner_lr=(options.inner_lr or 0.0) / steps, inner_steps=steps, compile=None)
        if strategy == "maml" and options.checkpoints is None:
            lean = replace(lean, checkpoints=CHECKPOINTS)
        return build_engine(strategy, lean).value_and_grad(experiment.objective(model, options.adapt), [task])

    def peaks(call: Callable[[int], object]) -> tuple[int, ...]:
        call(1)  # what torch sets up once is not counted
        return tuple(peak_memory(partial(call, steps), device=device) for steps in INNER_STEPS)

    curves = [MemoryCurve(method="loop", peak_bytes=peaks(partial(loop, next(iter(engines.values())))))]
    for strategy, options in engines.items():
        curves.append(MemoryCurve(method=strategy, peak_bytes=peaks(partial(ours, strategy, options))))
    return curves


def sentence(curves: Sequence[MemoryCurve]) -> str:
    """What a person should remember: the loop beside the first strategy, at the most inner steps."""
    loop, first, *_ = curves
    same = "the same one" if first.method == "maml" else "its own"
    return (
        f"At {INNER_STEPS[-1]} inner steps the usual loop holds {loop.last} for one task's meta-gradient; "
        f"{first.name} here holds {first.last} for {same}."
    )
