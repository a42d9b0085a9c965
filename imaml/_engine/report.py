"""What a call did: losses, the solver's outcome, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count
from operator import eq
from typing import Any

import torch
from torch import Tensor

from imaml._engine.inner_state import InnerState
from imaml._losses.record import Record
from imaml._losses.snapshot import Snapshot
from imaml_solvers import Solution, Status


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The part of a report that has an entry per task. Tensors are detached, in the order of the tasks."""

    query_loss: Tensor
    """L_query after adaptation, `(tasks,)`; with `MAML(outer_steps=...)` the weighted sum of those of a task."""
    support_loss: Tensor
    """L_support before each inner step, without the proximal term, `(steps, tasks)`; NaN after an early stop."""
    metric: Tensor | None = None
    """The objective's metric on the query set after adaptation, `(tasks,)`; None without a metric."""
    outer_losses: Tensor | None = None
    """L_query after each of the `outer_steps`, ascending, `(outer steps, tasks)`; None where there are none."""
    drift: Tensor | None = None
    """How far the states that a sweep took again are from those on the way to the end, the largest relative difference
    of a vector, `(tasks,)` in float64, estimated; 0: their bits are the same. None without `MAML(check_states=True)`.
    """
    stationarity: Tensor | None = None
    """Norm of the gradient of L_support + proximal term at the adapted parameters, `(tasks,)`: how far the inner loop
    is from the stationary point that implicit differentiation assumes. None for strategies that do not assume one."""
    solver_status: Tensor | None = None
    """A `Status` per task, `(tasks,)` integers; None where no system is solved, as for the next three."""
    solver_steps: Tensor | None = None
    """Steps of the linear solver, `(tasks,)`."""
    solver_residual: Tensor | None = None
    """Relative residual |b - A x| / |b| of the linear solve, with damping that of the damped system, `(tasks,)`."""
    damping: Tensor | None = None
    """The delta of `ImplicitMAML(damping=...)` that each system was solved with, `(tasks,)`; None without damping."""
    undamped_residual: Tensor | None = None
    """What the damping biases: the relative residual |v - A u| / |v| of the system without it, `(tasks,)`; None without
    damping, and with `error_bound=False`."""
    error_bound: Tensor | None = None
    """A bound on the relative error of each task's meta-gradient, `(tasks,)`, from the stationarity and the residual:
    see `ImplicitMAML`, which may be told to leave it out. inf: nothing can be said."""
    growth: Tensor | None = None
    """The largest norm of the cotangent in the reverse sweep relative to that of the query gradient, `(tasks,)`: inner
    steps that are too large make it explode, and rounding errors with it. None for strategies other than `MAML`."""

    @classmethod
    def of_no_task(cls, snapshot: Snapshot, steps: int, outer_losses: int | None) -> Outcome:
        """The outcome of a rank without a task, with tensors of length 0."""
        none = snapshot.like.new_zeros(0)
        metric = None if snapshot.objective.metric is None else none
        outer = None if outer_losses is None else none.expand(outer_losses, 0)
        return Outcome(query_loss=none, support_loss=none.expand(steps, 0), metric=metric, outer_losses=outer)


@dataclass(frozen=True, kw_only=True)
class Report(Outcome):
    """Says what one call did: the outcome of every task, in the order of the input, and what the call cost.

    The entries of a task that was skipped are NaN, its `solver_status` is NONFINITE and its `solver_steps` are 0.

    `print(report)` shows a few lines.
    """

    gradients: int
    """Gradients evaluated, summed over tasks; building a linearisation counts as one, gradients within a Hessian-vector
    product do not."""
    hvps: int
    """Hessian-vector products, summed over tasks."""
    hvp_mode: str | None
    """How the products were computed, "gauss-newton" for those of that matrix; None if there were none."""
    hvp_error: float | None
    """Estimated relative error of a product by finite differences: how far the first is from one with a step eight
    times as long, for the worst task of its chunk; from about 1 up they are of no use. None for the exact modes."""
    unused: tuple[str, ...]
    """Adapted parameters that the support loss does not depend on: the inner loop leaves them as they are."""
    buffers: dict[str, Tensor]
    """With `Objective(..., buffers="update")` the mean over the tasks of the running statistics after the inner loop,
    for `model.load_state_dict(report.buffers, strict=False)`; else empty."""
    recomputed: tuple[str, ...] = ()
    """Names of the blocks that derivatives computed again, of `Objective(recompute=...)`, `imaml.recompute` and
    `torch.utils.checkpoint`; empty where nothing was."""
    curvature_batches: int | None = None
    """How many minibatches stood for the whole source in `stationarity` and in the products after the inner loop, as
    `ImplicitMAML(curvature_batches=...)` says; None: all of them, or there are none."""
    skipped: tuple[int, ...] = ()
    """Positions of the tasks that `on_nonfinite="skip"` left out of the mean, in ascending order."""

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        record: Record,
        outcomes: Sequence[Outcome],
        positions: Sequence[int],
        skipped: Sequence[int] = (),
    ) -> Report:
        """Join the outcomes of all chunks, whose tasks have these positions in the input."""
        joined: dict[str, Any] = {}
        for field in fields(Outcome):
            parts = [getattr(outcome, field.name) for outcome in outcomes]
            missing = _MISSING.get(field.name, math.nan)
            joined[field.name] = None if parts[0] is None else _place(torch.cat(parts, -1), positions, skipped, missing)
        return cls(
            **joined,
            gradients=record.gradients,
            hvps=record.products,
            hvp_mode="gauss-newton" if record.gauss_newton else record.mode,
            hvp_error=record.difference_error,
            unused=tuple(n for n in snapshot.layout.names if record.used and n not in record.used),
            buffers=record.mean_statistics(),
            recomputed=tuple(sorted(snapshot.survey.recomputed)),
            curvature_batches=record.curvature_batches,
            skipped=tuple(skipped),
        )

    def __str__(self) -> str:
        """A few lines to read."""
        kept = self._without_skipped()
        lines = [f"query loss {kept.query_loss.mean().item():.6g} (mean of {len(kept.query_loss)} tasks)"]
        if self.skipped:
            lines.append(f"skipped as not finite: tasks {', '.join(map(str, self.skipped))}")
        if kept.outer_losses is not None:
            means = ", ".join(f"{loss.mean().item():.6g}" for loss in kept.outer_losses)
            lines.append(f"after each of the outer steps {means}")
        if kept.metric is not None:
            lines.append(f"metric {kept.metric.double().mean().item():.6g}")
        if kept.drift is not None:
            lines.append(f"states taken again differ by {kept.drift.max().item():.2g} (worst task)")
        if kept.stationarity is not None:
            lines.append(f"stationarity {kept.stationarity.max().item():.3g} (worst task)")
        if kept.solver_status is not None and kept.solver_steps is not None and kept.solver_residual is not None:
            codes = kept.solver_status.tolist()
            counts = ", ".join(f"{codes.count(s)} {s.name}" for s in Status if s in codes)
            lines.append(
                f"solver {counts}; {kept.solver_steps.double().mean().item():.3g} steps, relative residual "
                f"{kept.solver_residual.max().item():.3g} (worst task)"
            )
        if kept.damping is not None:
            worst = "" if kept.undamped_residual is None else f"{kept.undamped_residual.max().item():.3g} (worst task)"
            lines.append(
                f"damping {kept.damping.max().item():.3g}" + (worst and f", without it relative residual {worst}")
            )
        if kept.error_bound is not None:
            lines.append(
                f"relative error of the meta-gradient at most {kept.error_bound.max().item():.3g} (worst task)"
            )
        if kept.growth is not None:
            lines.append(f"cotangent grown {kept.growth.max().item():.3g} times (worst task)")
        cost = f"{self.gradients} gradients, {self.hvps} Hessian-vector products"
        error = "" if self.hvp_error is None else f", relative error about {self.hvp_error:.1g}"
        lines.append(cost + (f" ({self.hvp_mode}{error})" if self.hvp_mode else ""))
        if self.curvature_batches is not None:
            lines.append(f"curvature of {self.curvature_batches} minibatches")
        if self.recomputed:
            lines.append(f"recomputed: {', '.join(self.recomputed)}")
        if self.unused:
            lines.append(f"not used by the support loss: {', '.join(self.unused)}")
        return "\n".join(lines)

    def _without_skipped(self) -> Outcome:
        rows = [i for i in range(len(self.query_loss)) if i not in self.skipped]
        kept: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Outcome)}
        kept |= {name: value[..., rows] for name, value in kept.items() if value is not None}
        return Outcome(**kept)


_MISSING = {"solver_status": int(Status.NONFINITE), "solver_steps": 0}


def _place(values: Tensor, positions: Sequence[int], skipped: Sequence[int], missing: float) -> Tensor:
    """Put the tasks in the order of the input, the missing value in the places of those that were skipped."""
    if not skipped and all(map(eq, positions, count())):
        return values
    size = (*values.shape[:-1], len(positions) + len(skipped))
    dtype = torch.result_type(values, missing) if skipped else values.dtype
    placed = torch.full(size, missing if skipped else 0, dtype=dtype, device=values.device)
    placed[..., list(positions)] = values.to(dtype)
    return placed


@dataclass(frozen=True)
class MetaResult:
    """Holds what a call returns: a loss to call backward on, and a report."""

    loss: Tensor
    """The mean query loss after adaptation, 0-dim; its backward delivers the meta-gradient."""
    report: Report
    """What the call did, for every task."""
    state: InnerState | None = None
    """Where the inner trainings stand, with `return_state=True`; for `start=` of a call that goes on."""


@dataclass
class Pullback:
    """Holds what a strategy's `pull_back` returns: the meta-gradients of a chunk's tasks, and their outcome."""

    theta: Tensor
    """The meta-gradient of each task, `(tasks, n)`."""
    shared: Tensor | None
    """The meta-gradient of the shared parameters, which do not adapt but are learned, meta-parameters among them,
    summed over tasks, `(m,)`; None if there are none."""
    outcome: Outcome
    """What the report says of these tasks, from `Problem.outcome`."""
    solution: Solution | None = None
    """Solution of the linear systems, where the strategy solves any."""
