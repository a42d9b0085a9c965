"""The interface of a strategy, as one call of it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from imaml._engine.chunking import Chunking, Needs
from imaml._engine.inner_state import InnerState
from imaml._engine.nonfinite import OnNonfinite, check_on_nonfinite
from imaml._engine.problem import Problem
from imaml._engine.remembered import Memory
from imaml._engine.report import Outcome, Pullback, Report
from imaml._numbers import check_integer, check_number
from imaml._objective.blocks import Blocks, listed
from imaml._objective.objective import Objective
from imaml._tasks import TaskBatch
from imaml.inner import InnerSolver
from imaml.inner._hyper import Hyper, check_hyper, takes_step


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """What a run knows of an engine: its settings, what it remembers, and how it pulls a query gradient back.

    See `MetaGradient`, its one subclass, which runs it.
    """

    _without_path: ClassVar[str] = "no derivative leads to it from a loss or from an inner step that is differentiated"

    _manages_without_second_derivatives: ClassVar[bool] = False
    """Whether there is a way that takes first derivatives alone."""

    _costs: ClassVar[Callable[..., Any] | None] = None
    """What it costs, for a forecast: a class on `planning`'s `Costs`."""

    inner: InnerSolver
    regularization: Hyper | None = 0.0
    chunk_size: int | Literal["auto"] | None = None
    microbatch_size: int | None = None
    recompute: Blocks | None = None
    on_nonfinite: OnNonfinite = "raise"
    compile: bool = False
    compile_budget: float = 60.0
    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        if not isinstance(self.inner, InnerSolver):
            raise TypeError(
                f"`inner` must be an inner optimiser such as GradientDescent. Got {self.inner!r}."
                + (_WRAP if _of_torch(self.inner) else "")
            )
        if isinstance(self.regularization, (list, tuple)):
            raise TypeError(
                "`regularization` is one for all steps. Expected a number, or one per parameter by name. Got "
                f"{self.regularization!r}."
            )
        if takes_step(self.regularization):
            raise TypeError(
                "`regularization` is one for all steps. Expected a number, one per parameter by name, or a function of "
                "the meta-parameters alone. Got a function of two arguments, as a schedule is."
            )
        if self.regularization is not None:
            check_hyper("regularization", self.regularization, must=">= 0")
        if self.chunk_size not in (None, "auto"):
            check_integer("`chunk_size`, unless None or 'auto',", self.chunk_size, least=1)
        if not isinstance(self.compile, bool):
            raise TypeError(f"`compile` must be True or False. Got {self.compile!r}.")
        if check_number("`compile_budget`", self.compile_budget) <= 0:
            raise ValueError(f"`compile_budget` must be positive, in seconds. Got {self.compile_budget}.")
        if self.microbatch_size is not None:
            check_integer("`microbatch_size`, unless None,", self.microbatch_size, least=1)
        if self.recompute is not None:
            object.__setattr__(self, "recompute", listed(self.recompute))
        check_on_nonfinite(self.on_nonfinite)

    def __reduce__(self) -> tuple[Callable[[], Strategy], tuple[()]]:
        """Copies, as in another process, begin without what this engine has found out and compiled."""
        return partial(type(self), **{f.name: getattr(self, f.name) for f in fields(self) if f.init}), ()

    @abstractmethod
    def pull_back(self, problem: Problem) -> Pullback:
        """Adapt, judge, and pull the query gradient back to theta, for one chunk of tasks.

        Args:
            problem: The chunk. It is called with gradients disabled, once for each chunk, in any order.

        Returns:
            The meta-gradient of each task; NaN and infinity in it are found by the caller.
        """

    def evaluate(self, problem: Problem) -> Outcome:
        """Adapt and judge without derivatives, for one chunk of tasks: what a call under `torch.no_grad()` does.

        Args:
            problem: The chunk, as in `pull_back`.

        Returns:
            The query losses that `pull_back` differentiates.
        """
        return problem.evaluate(problem.adapt())

    @property
    def _hyperparameters(self) -> dict[str, Hyper]:
        """What may be a function of meta-parameters besides those of the inner loop, and is one for all its steps."""
        return {} if self.regularization is None else {"regularization": self.regularization}

    @property
    def _outer_losses(self) -> int | None:
        """How many query losses a task has, where the report is to have each of them."""
        return None

    @abstractmethod
    def _choose(
        self, objective: Objective, batch: TaskBatch, shapes: Hashable, fetched: int, start: InnerState | None
    ) -> Chunking:
        """How tasks run with `chunk_size="auto"`, each of whose steps fetches so many bytes."""

    @property
    def _without_folder(self) -> dict[str, tuple[str, str]]:
        """Options that exclude a folder as they are set: what is expected of each, and why."""
        found = {}
        if self.chunk_size == "auto":
            found["chunk_size"] = ("a number or None", "it goes by the memory that is free, another time another")
        if self.compile:
            found["compile"] = ("False", "it goes by the clock, and what is compiled rounds otherwise")
        return found

    @property
    def _needs(self) -> Needs:
        """What it holds of the inner loop of a task until the sweep."""
        return Needs()

    def _keep(self, problem: Problem, pullback: Pullback) -> None:  # noqa: B027
        """Remember for later calls what was found for a chunk that counts; a strategy may have nothing to remember."""

    def _look_at(self, report: Report) -> None:  # noqa: B027
        """Raise or warn about an outcome, before it is returned; a strategy that has nothing to object does neither."""


_WRAP = (
    " MAML differentiates imaml's own, such as GradientDescent, Adam, AdamW and RMSprop; ImplicitMAML and FOMAML also "
    "take an optimiser of torch.optim as TorchOptimizer(torch.optim.LBFGS, steps=...)."
)


def _of_torch(given: object) -> bool:
    return isinstance(given, torch.optim.Optimizer) or (
        isinstance(given, type) and issubclass(given, torch.optim.Optimizer)
    )
