"""Where strategies are compared: each one measured, trained and tested under the same conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import monotonic

from rich.console import Console
from torch.nn import functional as F

from imaml import MetaGradient, Objective, TaskBatch
from imaml.cli._exact_gradient import exact_gradient, flat
from imaml.cli._options import EngineOptions, Strategy
from imaml.cli._outcome import Outcome, Point
from imaml.cli._problem import Problem, build_engine
from imaml.cli._progress import progress
from imaml.measure import peak_memory
from imaml.training import Plan, Trainer


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What the strategies share.

    Args:
        problem: Tasks and initial model.
        plan: Of the training.
        probe: Tasks that meta-gradients are compared on.
        console: Where progress is shown.
    """

    problem: Problem
    plan: Plan
    probe: TaskBatch
    console: Console

    def judge(self, strategy: Strategy, options: EngineOptions, *, label: str, seconds: float | None) -> Outcome:
        """Measure, train and test one strategy.

        Args:
            strategy: Which.
            options: Of its engine.
            label: Shown while it runs.
            seconds: Budget of everything here; None: the plan alone decides.

        Returns:
            What came of it.
        """
        began = monotonic()
        engine, model = build_engine(strategy, options), self.problem.fresh_model()
        objective = self.problem.objective(model, options.adapt)
        trainer = Trainer(
            model=model, objective=objective, engine=engine, episodes=self.problem.episodes, plan=self.plan
        )
        with self.console.status(f"{label}: measuring"):
            cosine_start = self._cosine_to_exact(engine, objective)
            after = monotonic() - began  # the same again follows the training
            peak = peak_memory(lambda: engine(objective, self.probe).loss.backward(), device=trainer.device)
            before = monotonic()
            curve = [Point(step=0, seconds=0.0, value=trainer.evaluate("val", tasks=self.plan.val_tasks))]
            after += (monotonic() - before) * (1 + self.plan.eval_tasks / self.plan.val_tasks)
        if seconds is not None:
            left = began + seconds - after - monotonic()
            trainer.plan = replace(self.plan, minutes=max(left, 1.0) / 60)
        milliseconds = []
        with progress(self.console, trainer, self.problem.metric, label=label) as show:
            for record in trainer:
                milliseconds.append(record.milliseconds)
                if record.val:
                    curve.append(Point(step=record.step, seconds=sum(milliseconds) / 1000, value=record.val))
                show(record)
        with self.console.status(f"{label}: testing"):
            return Outcome(
                strategy=strategy,
                options=options,
                test=trainer.evaluate("test", tasks=self.plan.eval_tasks),
                steps=trainer.step,
                milliseconds=median(milliseconds),
                peak_bytes=peak,
                cosine_start=cosine_start,
                cosine_end=self._cosine_to_exact(engine, objective),
                curve=tuple(curve),
            )

    def _cosine_to_exact(self, engine: MetaGradient, objective: Objective) -> float:
        """The cosine of the angle between an engine's meta-gradient and the exact one.

        Exact is the derivative of the query loss through the inner loop which the engine runs (its proximal term and
        number of steps included), in float64. An implicit engine differentiates the stationary point of that loop
        instead: its cosine also shows how far the loop is from it.

        Returns:
            At most 1.
        """
        ours = engine.value_and_grad(objective, self.probe)[1]
        true = exact_gradient(engine, objective, self.probe, chunk_size=engine.chunk_size)
        return F.cosine_similarity(flat(ours), true, dim=0).item()
