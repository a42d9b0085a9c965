"""Where strategies are compared: each one measured, trained and tested under the same conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import monotonic

from rich.console import Console
from torch.nn import functional as F

from imaml import TaskBatch
from imaml.cli._exact_gradient import exact_gradient, flat
from imaml.cli._experiment import Experiment, build_engine
from imaml.cli._options import EngineOptions, Strategy
from imaml.cli._progress import progress
from imaml.cli._result import Result, Validation
from imaml.cli._time_left import TimeLeft
from imaml.measure import peak_memory
from imaml.training import Plan, Trainer


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A strategy before its training.

    Args:
        strategy: Which.
        options: Options of its engine.
        trainer: At step 0.
        start: The validation of the initial parameters.
        cosine: There, between its meta-gradient and the exact one.
        peak_bytes: Peak memory of a meta-gradient.
        step_seconds: What a meta-step took.
        task_seconds: What a task of the validation took.
    """

    strategy: Strategy
    options: EngineOptions
    trainer: Trainer
    start: Validation
    cosine: float
    peak_bytes: int
    step_seconds: float
    task_seconds: float

    @property
    def test_seconds(self) -> float:
        """What its test should take."""
        return self.task_seconds * self.trainer.plan.eval_tasks

    @property
    def validation_seconds(self) -> float:
        """What a validation should take."""
        return self.task_seconds * self.trainer.plan.val_tasks

    @property
    def seconds(self) -> float:
        """What its training, its validations and its test should take."""
        plan = self.trainer.plan
        validations = -(-plan.steps // plan.eval_every)
        return plan.steps * self.step_seconds + validations * self.validation_seconds + self.test_seconds


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What the strategies share.

    Args:
        experiment: Tasks and initial model.
        probe: Tasks that meta-gradients are compared on.
        console: Where progress is shown.
    """

    experiment: Experiment
    probe: TaskBatch
    console: Console

    def enter(self, strategy: Strategy, options: EngineOptions, plan: Plan) -> Contender:
        """Measure a strategy at the initial parameters.

        Args:
            strategy: Which.
            options: Options of its engine.
            plan: How its training goes.

        Returns:
            What is to be trained.
        """
        engine, model = build_engine(strategy, options), self.experiment.fresh_model()
        objective = self.experiment.objective(model, options.adapt)
        trainer = Trainer(model=model, objective=objective, engine=engine, episodes=self.experiment.episodes, plan=plan)
        call = partial(engine.value_and_grad, objective, self.probe)
        cosine = self._cosine_to_exact(trainer)
        peak = peak_memory(call, device=trainer.device)
        began = monotonic()
        call()
        step_seconds = monotonic() - began
        began = monotonic()
        validation = trainer.evaluate("val", tasks=plan.val_tasks)
        return Contender(
            strategy=strategy,
            options=options,
            trainer=trainer,
            start=Validation(step=0, seconds=0.0, value=validation),
            cosine=cosine,
            peak_bytes=peak,
            step_seconds=step_seconds * plan.meta_batch / len(self.probe),
            task_seconds=(monotonic() - began) / plan.val_tasks,
        )

    def judge(self, contender: Contender, *, label: str, seconds: float | None, left: TimeLeft) -> Result:
        """Train and test one strategy.

        Args:
            contender: From `enter`.
            label: Shown while it runs.
            seconds: Budget of everything here; None: the steps alone decide.
            left: What is left of all strategies together; kept up to date.

        Returns:
            What came of it.
        """
        trainer, metric = contender.trainer, self.experiment.metric
        if seconds is not None:
            trainer.plan = replace(trainer.plan, minutes=max(seconds - contender.test_seconds, 1.0) / 60)
        milliseconds, curve, expected = [], [contender.start], contender.seconds
        with progress(self.console, trainer, metric, label=label, left=left) as show:
            for record in trainer:
                milliseconds.append(record.milliseconds)
                done = contender.step_seconds
                if record.val:
                    curve.append(Validation(step=record.step, seconds=sum(milliseconds) / 1000, value=record.val))
                    done += contender.validation_seconds
                left.did(done)
                expected -= done
                show(record)
        with self.console.status(f"{label}: testing, {left} left"):
            test = trainer.evaluate("test", tasks=trainer.plan.eval_tasks)
        left.did(expected)  # the test, and steps that a budget of time left out
        return Result(
            strategy=contender.strategy,
            options=contender.options,
            plan=trainer.plan,
            test=test,
            steps=trainer.step,
            milliseconds=median(milliseconds),
            peak_bytes=contender.peak_bytes,
            cosine_start=contender.cosine,
            cosine_end=self._cosine_to_exact(trainer),
            curve=tuple(curve),
        )

    def _cosine_to_exact(self, trainer: Trainer) -> float:
        """The cosine of the angle between an engine's meta-gradient and the exact one.

        Exact is the derivative of the query loss through the inner loop which the engine runs (its proximal term and
        number of steps included), in float64. An implicit engine differentiates the stationary point of that loop
        instead: its cosine also shows how far the loop is from it.

        Returns:
            At most 1.
        """
        engine, objective = trainer.engine, trainer.objective
        ours = engine.value_and_grad(objective, self.probe)[1]
        true = exact_gradient(engine, objective, self.probe, chunk_size=engine.chunk_size)
        return F.cosine_similarity(flat(ours), true, dim=0).item()
