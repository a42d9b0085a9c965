"""A strategy that can be called: from tasks to a loss that carries the meta-gradient."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from imaml._engine.chunking import ONE_BY_ONE, Chunking
from imaml._engine.course import Progress
from imaml._engine.inner_state import InnerState
from imaml._engine.node import attach
from imaml._engine.report import MetaResult
from imaml._engine.run import Run
from imaml._engine.strategy import Strategy
from imaml._minibatches import Minibatches, batch_like
from imaml._objective.objective import Objective
from imaml._sharding.runs import run_of
from imaml._tasks import Batch, Task, TaskBatch, check_constant, check_tensors
from imaml._tasks import group as by_shape
from imaml.planning import Forecast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class MetaGradient(Strategy):
    r"""Computes the meta-gradient: the gradient of the mean query loss after a model has adapted to each task.

    The inner loop of task i adapts $\phi$ from $\theta$ on $L_{support,i}(\phi) + 1/2 \, (\phi - \theta)^\top \Lambda
    (\phi - \theta)$. The result is the mean over tasks of $L_{query,i}(\phi_i)$, and its gradient for $\theta$ and for
    every other parameter that requires grad.

    `engine(objective, tasks)` returns a `MetaResult`. `result.loss.backward()` accumulates the meta-gradient into
    `.grad` of the parameters, like that of any loss. The meta-gradient is computed in the call and its memory is given
    back at once: backward only scales it, and it cannot be differentiated again. Under `torch.no_grad()` a call only
    evaluates.

    Nothing of the user's changes: neither the model, its `.grad`s and the tasks, nor the buffers of the model and of
    modules that a loss or the metric holds. A module is held by an attribute, a closure, a default, a bound argument or
    a global name, also of functions that are called by one. Not found are modules behind a weak reference, in a
    container of more than 1,000 entries, or behind a global name of an installed package.

    What requires grad, is used by a loss or an inner step, and is neither a parameter nor in `meta` is an error, since
    it would get no gradient.

    The global random state ends as if one forward pass had run. Every evaluation at one inner step of a task sees the
    same draws (dropout masks).

    Chunks: memory grows with the number of tasks that run at once, and the numbers are the same (without dropout). With
    `chunk_size=None` it is as many as save at most 12 MiB for a gradient on a CPU (256 MiB elsewhere), the support and
    the query sets each by themselves, and as hold at most eight times as much of inner states; fewer for `MAML` where
    that leaves room for the graphs of more steps. The chunks of a call are of equal sizes, as far as that goes. All
    that is found by a forward pass of one task when an engine first sees its shapes; it depends on shapes alone, and
    does not ask whether the memory is there.

    With `chunk_size="auto"` it is the most whose peak, as `plan` predicts it, fits into four fifths of the memory that
    is free when an engine first sees its shapes. On a CPU it is at most as many as None takes, since more are slower
    there. Graphs are kept where they fit too. Where not even one task fits, modules are recomputed, if `recompute` is
    left open and there are any that `plan` would list. Which it is may change with the free memory.

    With `chunk_size=1` tasks run one by one, without `torch.func.vmap`. A model that cannot be vectorised (LSTM,
    control flow that depends on the data) runs task by task in any case, though the graphs of a chunk are held
    together.

    Microbatches: gradients and products accumulate over slices of `microbatch_size` examples, so that the memory is
    that of one slice. The numbers are the same where the loss is a mean over independent examples; the first two slices
    are compared the first time, unless there is dropout.

    Recomputation: the activations of the modules that `recompute` names are not kept, but computed again in derivatives
    of every order, besides those of `Objective(recompute=...)`. The numbers are the same. It is an option of the engine
    too, so that a forecast can recommend it.

    Compilation: with `compile=True` an inner step, its derivative and the query gradient are traced and compiled by
    TorchInductor, each as a whole and once for each shape, whatever the number of steps. An update of the user's own,
    or of long vectors, stays uncompiled between compiled gradients and products. That is three times as fast where
    calls are many and tensors small, for some ten seconds of compilation the first time, and half a minute for four
    convolutions: those of few small images are compiled as products of patches and weights, others call torch's
    kernels. Another process finds what was compiled on disk (`TORCHINDUCTOR_CACHE_DIR`). A compiled product evaluates
    its step anew; no graph is kept.

    A compiled loss is taken for a function of its tensors (parameters, buffers, batch, `meta`). A first call compares
    what is compiled with what is not. Later ones compare one loss of each shape with an uncompiled forward pass: where
    anything has changed that the losses and the model can reach (attributes, closures, global names, hooks), and in any
    case in the 1st, 2nd, 4th, 8th... call.

    An engine goes on uncompiled, with the same results and a `CompileWarning` that says why, where they differ, with
    random draws (dropout), without a C++ compiler, with forward-mode derivatives in the loss that torch cannot trace
    (`vmap(hessian(...))`), beyond 12 functions, or beyond `compile_budget`. So it does where blocks are recomputed
    (`Objective(recompute=...)`, `imaml.recompute`, `torch.utils.checkpoint`), since compiled code would keep their
    activations. The logger "imaml" says what is being compiled and how long it took, and warns after 10 s.

    A strategy of one's own is a subclass with a `pull_back`: docs/testing.md has three.

    Args:
        inner: The inner loop.
        regularization: lambda >= 0, the weight of the proximal term: one number, or one per adapted parameter by name,
            or a function of the objective's meta-parameters that returns either. None: no proximal term.
        chunk_size: How many tasks run at once, vectorised: a number, "auto", or None, which goes by shapes alone.
        microbatch_size: How many examples of a support or query set are seen at once. None: all.
        recompute: Modules of the objective's model to recompute, as in `Objective(recompute=...)`. None leaves it open
            to `plan` and `chunk_size="auto"`, and recomputes nothing otherwise; [] closes it.
        on_nonfinite: What a task leads to whose support loss, query loss or meta-gradient is NaN or infinite, or whose
            inner loop diverges: "raise" an error, or "skip" it. The mean is then over the other tasks, as if it had not
            been given, and `report.skipped` names it; the cost is that of its chunk, which is computed anew without it.
        compile: Whether to compile the derivatives of the losses.
        compile_budget: How many seconds an engine may compile in all. The call that exceeds it goes on at once,
            uncompiled; what the compiler was doing is stopped, at the latest when the C++ compiler returns.
    """

    def __call__(
        self,
        objective: Objective,
        tasks: TaskBatch | Sequence[Task],
        *,
        start: InnerState | None = None,
        return_state: bool = False,
        folder: str | Path | None = None,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ) -> MetaResult:
        """Adapt to every task, and return the mean query loss with the meta-gradient behind it.

        With a `group` every rank passes its own tasks, such as `tasks[rank::world_size]`, an empty list where it has
        none, and takes part in every call. One all-reduce, of the size of the parameters, gives every rank the mean
        over the tasks of all. The same tasks on every rank give the right result too, and save nothing. The parameters
        must be the same on all ranks: the first call of an engine checks. Random draws are each rank's own.

        Args:
            objective: Model and loss.
            tasks: A `TaskBatch`, or a list of `Task` whose shapes may differ.
            start: Where the inner trainings stand that go on, of this rank's tasks; None: at theta. Its parameters
                count as theta plus a constant, and its buffers as constants: the gradient says what a change of theta
                would do that moved them by as much. Earlier steps are left out, as by `MAML(truncate=...)`.
            return_state: Whether the result has the state after the last step: the adapted parameters and the buffers
                of every task.
            folder: Keeps the computation, so that the same call goes on where another process was killed, in the inner
                loop or in the sweep, to the same bits. It is made where there is none. A call that ends removes its
                files from it, and the next one begins anew. See docs/survival.md; None: nothing is kept.
            progress: Is called after every inner step of a chunk of tasks with its number and "forward", and with
                "backward" after its part of a reverse sweep. Steps that a sweep takes again are not told, nor are those
                that were done before an interruption.
            group: The processes that share the work; None: this one alone.

        Returns:
            The loss, over the tasks of all ranks, and a report, of this rank's, as is the state.

        Raises:
            CheckpointError: The folder holds another computation, or damaged files.
            NonFiniteError: A loss or the meta-gradient is NaN or infinite, or all tasks were skipped; or another rank
                raised whatever error.
            DivergenceError: The inner loop diverged.
            TypeError: An argument of a wrong type.
            ValueError: The loss is not a scalar or depends on no parameter, BatchNorm with running statistics in
                training mode, a hyper-parameter that does not fit the parameters or steps, a meta-parameter whose
                meta-gradient is zero because nothing uses it, no task on any rank, or parameters that differ by rank.
        """
        parameters = objective.parameters() if isinstance(objective, Objective) else {}
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())
        with _plain_tensors():
            run = self._run(objective, tasks, derivatives=wanted, start=start, keeps_final=return_state)
            run.folder, run.progress = self._kept(folder, group), _checked(progress)
            sums = run.sums(by_shape(tasks)) if group is None else run.sums_over_ranks(tasks, group)
            loss, gradients, report = run.means(*sums)
            state = run.state(report)
        if wanted:
            loss = attach(loss, list(gradients.values()), list(parameters.values()))
        return MetaResult(loss, report, state)

    def value_and_grad(
        self,
        objective: Objective,
        tasks: TaskBatch | Sequence[Task],
        *,
        start: InnerState | None = None,
        folder: str | Path | None = None,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean query loss and the meta-gradient by parameter name, detached; `.grad` is not touched.

        Args:
            objective: Model and loss.
            tasks: As in a call.
            start: As in a call.
            folder: As in a call.
            progress: As in a call.
            group: As in a call.

        Returns:
            The 0-dim loss, and one gradient per parameter of `objective.parameters()`, in its shape and dtype.
        """
        with _plain_tensors():
            run = self._run(objective, tasks, derivatives=True, start=start)
            run.folder, run.progress = self._kept(folder, group), _checked(progress)
            sums = run.sums(by_shape(tasks)) if group is None else run.sums_over_ranks(tasks, group)
            loss, gradients, _ = run.means(*sums)
        return loss, gradients

    def adapt(
        self, objective: Objective, support: Batch | Minibatches, *, start: InnerState | None = None
    ) -> dict[str, Tensor]:
        """Adapt to one task, and return its parameters by name, for deployment with `torch.func.functional_call`.

        Args:
            objective: Model and loss.
            support: One task's support set, without a task dimension, or its minibatches.
            start: As in a call.

        Returns:
            The adapted parameters, detached, in shape and dtype of the originals, and with `buffers="update"` the
            task's running statistics; the model is not changed.
        """
        check_tensors("support", support)
        with _plain_tensors():
            run = run_of(self, objective, derivatives=False, start=start)
            tasks = TaskBatch.stack([Task(support=support, query=batch_like(support, run.first))])
            if start is not None:
                start.check(run.snapshot.layout, self.inner, 1, run.snapshot.like)
            run.check(tasks, query=False)
            try:
                problem = run.problem([0], tasks, ONE_BY_ONE)
                phi = problem.adapt()
                problem.finish()
            finally:
                run.snapshot.replay.restore()
            adapted = {name: value.squeeze(0).clone() for name, value in run.snapshot.layout.named(phi).items()}
            return adapted | run.record.mean_statistics()

    def plan(
        self, objective: Objective, tasks: TaskBatch | Sequence[Task], memory: int | str | None = None
    ) -> Forecast[Self]:
        """Predict what a call takes, in the settings that the engine leaves open, before any of them runs.

        Open are `chunk_size` where it is None or "auto", and for `MAML` `checkpoints`, `linearize` and `storage`, for
        `ImplicitMAML` `linearize`, where they are at their defaults. So is `recompute`, for an objective of a model
        that neither recomputes anything itself nor is compiled or sharded. All settings give the same numbers.

        One choice of modules to recompute is looked at, where one saves memory: a type of modules, or what a list of
        them holds. It is the one that leaves the least of a gradient's graph by a forward pass, and that has the same
        gradient; one that is refused gives way to the next best.

        The peak comes from a model of each strategy: how many states, graphs and vectors it holds beside an inner step,
        a query gradient or a Hessian-vector product. What these take is measured, for one, two and three tasks, and
        continued along a line. Of minibatches the first stands for all; those that a call holds besides are counted.

        Cost: at most 4 gradients and 4 products for each of these, six tasks in all. With modules to recompute it is as
        much again, of recomputed ones, and a few gradients of a task. The model, `.grad`s and random states are not
        changed.

        Args:
            objective: Model and loss.
            tasks: As in a call.
            memory: The limit, such as "4GiB", "500MB" or "1.5 GB", or in bytes. None: what is free on an accelerator,
                and none on a CPU.

        Returns:
            Every setting with its predicted peak and cost, and which to use; `print` it.

        Raises:
            RuntimeError: torch's profiler, which measures on a CPU, is in use.
            TypeError: See a call; or `memory` is neither an integer nor text.
            ValueError: See a call; or `memory` is no amount, or the strategy does not say what it costs.
        """
        from imaml.planning._planner import forecast  # noqa: PLC0415

        return forecast(self, objective, tasks, memory)

    def state_dict(self) -> dict[str, float]:
        """What later calls depend on besides the fields: nothing, for most settings."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027
        """Go on as the engine of the same fields that gave `state` would."""

    def _choose(
        self, objective: Objective, batch: TaskBatch, shapes: Hashable, fetched: int, start: InnerState | None
    ) -> Chunking:
        from imaml.planning._planner import automatic  # noqa: PLC0415

        return automatic(self, objective, batch, shapes, fetched, start)

    def _kept(self, folder: str | Path | None, group: ProcessGroup | None) -> Path | None:
        """The folder of a call; raises ValueError where it cannot be kept in one."""
        if folder is None:
            return None
        if group is not None:
            raise ValueError(
                "A folder keeps the computation of one process. Expected group=None. Got a group: leave one of them "
                "out, or save the parameters after every meta-step as imaml.training does."
            )
        for name, (expected, reason) in self._without_folder.items():
            raise ValueError(
                f"A computation that is kept in a folder goes on to the same bits, which {name}="
                f"{getattr(self, name)!r} excludes: {reason}. Expected {expected}: use one of the two."
            )
        return Path(folder)

    def _run(
        self,
        objective: Objective,
        tasks: TaskBatch | Sequence[Task],
        *,
        derivatives: bool,
        start: InnerState | None = None,
        keeps_final: bool = False,
    ) -> Run:
        if derivatives and isinstance(tasks, Sequence | TaskBatch):
            check_constant(tasks)
        return run_of(self, objective, derivatives=derivatives, start=start, keeps_final=keeps_final)


def _checked(progress: Progress | None) -> Progress | None:
    if progress is None or callable(progress):
        return progress
    raise TypeError(f"`progress` must be a function of the step and the direction. Got {type(progress).__name__}.")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Within it, tensors are neither inference tensors nor do they carry graphs."""
    with torch.inference_mode(False), torch.no_grad():
        yield
