"""How long and how fast to meta-train."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from imaml.training._optimizer import OptimizerOptions, check_name, make_optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast to meta-train.

    Args:
        steps: Meta-steps at most.
        minutes: Wall-clock budget of training and validation; the step that spends it is the last one.
        meta_batch: Tasks per meta-step.
        meta_lr: Learning rate of the outer optimiser.
        optimizer: The outer optimiser: a class of torch.optim by its name, in any case.
        optimizer_options: Options of that class by name, such as weight_decay=0.01; the others have its defaults.
        clip_norm: Largest Euclidean norm of a meta-gradient over all parameters: a longer one is scaled down to it.
            None: meta-gradients are taken as they are.
        schedule: Learning rate over the run: constant, or half a cosine from `meta_lr` to 0. The cosine
            follows the larger of the fractions of `steps` and `minutes` that are spent, so it reaches 0 whichever
            ends the run; with `minutes` it depends on the clock, and only then two runs differ.
        eval_every: Meta-steps between two validations; the last meta-step is validated too.
        val_tasks: Tasks of a validation.
        eval_tasks: Test tasks of the final evaluation.
        eval_inner_steps: Inner steps in validation and test; None: as in training.

    Raises:
        ValueError: A count or rate is out of its range, or the outer optimiser is unknown, when names like it are
            listed, or cannot be used.
    """

    steps: int = 1000
    minutes: float | None = None
    meta_batch: int = 16
    meta_lr: float = 1e-3
    optimizer: str = "adam"
    optimizer_options: OptimizerOptions = field(default_factory=dict)
    clip_norm: float | None = None
    schedule: Literal["constant", "cosine"] = "cosine"
    eval_every: int = 100
    val_tasks: int = 200
    eval_tasks: int = 600
    eval_inner_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("meta_batch", "eval_every", "val_tasks", "eval_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")
        for name in ("steps", "eval_inner_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must not be negative. Got {getattr(self, name)}.")
        for name in ("meta_lr", "minutes", "clip_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite. Got {getattr(self, name)}.")
        object.__setattr__(self, "optimizer", self.optimizer.lower())
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in self.optimizer_options.items()}
        object.__setattr__(self, "optimizer_options", plain)
        check_name(self.optimizer)

    def progress(self, step: int, seconds: float) -> float:
        """The fraction of the plan done after `step` meta-steps and `seconds`: 1 or more ends the run."""
        by_steps = step / self.steps if self.steps else 1.0
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_clock)

    def learning_rate(self, progress: float) -> float:
        """The learning rate of the meta-step that begins at `progress` in [0, 1]."""
        if self.schedule == "constant":
            return self.meta_lr
        return self.meta_lr * (1 + math.cos(math.pi * progress)) / 2

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Make the outer optimiser.

        Args:
            parameters: What it changes.

        Returns:
            The optimiser, with `meta_lr`.

        Raises:
            ValueError: An option is not one of its own, is of no use here, or has a value that its class refuses; or
                the class refuses the parameters.
        """
        return make_optimizer(self.optimizer, self.optimizer_options, parameters, lr=self.meta_lr)
