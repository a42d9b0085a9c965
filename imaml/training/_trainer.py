"""The outer loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from imaml import MetaGradient, NonFiniteError, Objective, Report, Status
from imaml.data import Split
from imaml.training._evaluation import Episodes, Evaluation, draw, evaluate, task_metrics, were_skipped
from imaml.training._plan import Plan
from imaml.training._ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Says what one meta-step did.

    Args:
        step: Its number, from 1.
        loss: Mean query loss before the update.
        metric: Mean query metric before the update.
        learning_rate: Learning rate of the outer optimiser.
        milliseconds: Time of the meta-step: batch, meta-gradient and update, without validation.
        seconds: Trained so far, validation included.
        gradient_norm: Euclidean norm of the meta-gradient before it was clipped; None where the plan does not clip.
        solver: For implicit strategies: how many solves ended in each status, mean steps, worst residual.
        skipped: How many tasks counted in none of these, as they were not finite; None where such a task is an error.
        val: The validation after this step, where one was due.
    """

    step: int
    loss: float
    metric: float
    learning_rate: float
    milliseconds: float
    seconds: float
    gradient_norm: float | None = None
    solver: dict[str, Any] | None = None
    skipped: int | None = None
    val: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Trainer:
    """Meta-trains the initialisation of one model with the optimiser of its plan, step by step.

    Batch i of the tasks is a function of the seed and i alone, so a trainer that loads the state of another
    continues it bit for bit (same machine, same numbers of threads and processes).

    The ranks of a group share the tasks of every batch out, training and evaluation alike, and take the same steps:
    each has its own trainer, made alike, and calls the same methods. Loss, metrics and the clock are the same on all.

    Args:
        model: The model of `objective`; its parameters are updated in place.
        objective: With a `metric`.
        engine: The strategy.
        episodes: Where tasks come from.
        plan: How long and how fast.
        group: The processes that train together; None: this one alone.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        engine: MetaGradient,
        episodes: Episodes,
        plan: Plan,
        group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.engine = engine
        self.episodes = episodes
        self.plan = plan
        self.optimizer = plan.make_optimizer(model.parameters())
        self.device = next(model.parameters()).device
        self.ranks = Ranks(group, self.device)
        self.step = 0
        self.seconds = 0.0
        self.follow: Callable[[int, str], object] | None = None
        """Is told of the inner steps of a meta-step, as `progress` of an engine; None: nobody is."""

    @property
    def progress(self) -> float:
        """The fraction of the plan that is done; 1 or more: finished."""
        return self.plan.progress(self.step, self.seconds)

    def __iter__(self) -> Iterator[StepRecord]:
        """Meta-steps until the plan is done; a loop left early can be taken up again, or the trainer saved."""
        while self.progress < 1:
            yield self._advance()

    def evaluate(self, split: Split, *, tasks: int) -> Evaluation:
        """The metric over tasks of `split`, with the inner steps the plan wants for evaluation."""
        engine = self.engine
        if self.plan.eval_inner_steps is not None:
            engine = replace(engine, inner=replace(engine.inner, steps=self.plan.eval_inner_steps))
        return evaluate(
            engine, self.objective, self.episodes, split, tasks=tasks, device=self.device, group=self.ranks.group
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the trainer that gave `state` stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["rng"])
        self.engine.load_state_dict(state.get("engine", {}))  # older checkpoints have none

    def _advance(self) -> StepRecord:
        start = perf_counter()
        learning_rate = self.plan.learning_rate(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        tasks = draw(self.episodes, "train", self.step, self.plan.meta_batch, self.ranks)
        self.optimizer.zero_grad()
        result = self.engine(self.objective, tasks, progress=self.follow, group=self.ranks.group)
        result.loss.backward()
        norm = None if self.plan.clip_norm is None else self._clip(self.plan.clip_norm)
        self.optimizer.step()
        loss = result.loss.item()
        rows = self.ranks.gather(_rows(result.report), self.plan.meta_batch)
        _, metrics, *solves = rows[rows[:, 0] == 0].T
        elapsed = self.ranks.first(perf_counter() - start)
        self.step += 1
        self.seconds += elapsed
        val = None
        if self.step % self.plan.eval_every == 0 or self.progress >= 1:
            val = self.evaluate("val", tasks=self.plan.val_tasks)
            self.seconds += self.ranks.first(perf_counter() - start - elapsed)
        return StepRecord(
            step=self.step,
            loss=loss,
            metric=metrics.mean().item(),
            learning_rate=learning_rate,
            milliseconds=1000 * elapsed,
            seconds=self.seconds,
            gradient_norm=norm,
            solver=_solver_outcome(*solves),
            skipped=None if self.engine.on_nonfinite == "raise" else len(rows) - len(metrics),
            val=val,
        )

    def _clip(self, largest: float) -> float:
        """Scale the meta-gradient down to a norm, the same on all ranks; the norm that it had."""
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not norm.isfinite():  # finite numbers whose squares are not: scaled, they would be zeros
            raise NonFiniteError(
                f"The norm of the meta-gradient of step {self.step + 1} is {norm.item()}, and it cannot be clipped to "
                f"{largest}. Expected a finite one: take a smaller step size of the inner loop."
            )
        clip_grads_with_norm_(self.model.parameters(), largest, norm)
        return norm.item()


def _rows(report: Report) -> Tensor:
    """Whether skipped, metric, solver status, steps and residual of every task, `(tasks, 5)`; NaN where none is."""
    metric = task_metrics(report).double()
    missing = torch.full_like(metric, torch.nan)
    solves = (report.solver_status, report.solver_steps, report.solver_residual)
    return torch.stack([were_skipped(report), metric, *(missing if s is None else s.to(metric) for s in solves)], dim=1)


def _solver_outcome(status: Tensor, steps: Tensor, residual: Tensor) -> dict[str, Any] | None:
    if steps.isnan().all():
        return None
    return {
        "status": dict(Counter(Status(int(code)).name.lower() for code in status.tolist())),
        "steps": steps.mean().item(),
        "residual": residual.max().item(),
    }
