"""Where an inner training stands: what a call goes on from, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imaml._losses.layout import Layout
from imaml._numbers import check_integer
from imaml._objective.objective import Objective
from imaml.inner import InnerOptimizer, InnerSolver
from imaml.inner._inner_problem import State


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerState:
    """Holds where the inner trainings of some tasks stand, for `engine(objective, tasks, start=state)`.

    A call with `return_state=True` gives one as `result.state`; `InnerState.of` makes one of a running optimiser of
    torch. It can be kept with `torch.save` and loaded with `torch.load(..., weights_only=False)`.

    Args:
        parameters: The adapted parameters by name, `(tasks, *shape)` each, in the order of the tasks; or `(1, *shape)`,
            from which all tasks start. In the dtype of the model's, or, as a call leaves them, in what an inner loop
            computes in: the widest of these, at least float32.
        buffers: What the inner optimiser keeps besides, such as Adam's two moments: vectors `(tasks, n)`, or `(1, n)`,
            whose entries are in the order of the parameters. Empty for inner solvers: `TorchOptimizer` begins anew.
        step: How many steps the training has taken, with those that a `stationarity` has spared: the next one is that
            of this number, counted from 0.
        solution: The solution of the linear systems of `ImplicitMAML`, `(tasks, n)`, from which a solve with
            `warm_start=True` starts; None: it starts at zero.
        optimizer: Name of the class whose buffers these are; None: not known.
    """

    parameters: dict[str, Tensor]
    buffers: tuple[Tensor, ...] = ()
    step: int = 0
    solution: Tensor | None = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        """Check the kinds of its parts; raises TypeError or ValueError."""
        check_integer("`step` of a state", self.step, least=0)
        solution = () if self.solution is None else (self.solution,)
        for part in (*self.parameters.values(), *self.buffers, *solution):
            if not isinstance(part, Tensor):
                raise TypeError(f"A state holds tensors (tasks, ...). Got {type(part).__name__}.")

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, objective: Objective, *, step: int | None = None) -> InnerState:
        """Where a running optimiser of torch stands, with the present parameters of its model.

        Args:
            optimizer: An SGD, Adam, AdamW or RMSprop.
            objective: One of the same model; its adapted parameters count.
            step: How many steps it has taken; None: as its state says, which that of an SGD does not.

        Returns:
            The state of one task, for `GradientDescent`, `Adam`, `AdamW` or `RMSprop` with the same settings.

        Raises:
            TypeError: Not an optimiser of torch, or none of these.
            ValueError: A variant of it (AMSGrad, centred, dampening, maximize), an optimiser of another model, or one
                of which it is not known how many steps it has taken.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Expected an optimiser of torch.optim. Got {type(optimizer).__name__}.")
        if not isinstance(objective, Objective):
            raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
        name = type(optimizer).__name__
        if name not in _BUFFERS:
            raise TypeError(f"Expected one of {', '.join(_BUFFERS)} of torch.optim. Got {name}.")
        adapted = {n: p for n, p in objective.parameters().items() if n in objective.adapted}
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if others := [n for n, p in adapted.items() if id(p) not in known]:
            raise ValueError(
                f"Expected an optimiser of the objective's adapted parameters. Got one without {others}: pass that of "
                "the same model, or name in Objective(adapt=[...]) what it trains."
            )
        states = [optimizer.state.get(p, {}) for p in adapted.values()]
        if other := sorted({key for state in states for key, value in state.items() if value is not None} & _OTHERS):
            raise ValueError(f"Expected plain {name}. Got one with {other}, which inner optimisers have not.")
        groups = optimizer.param_groups
        if other := sorted({option for group in groups for option in _VARIANTS if group.get(option)}):
            raise ValueError(f"Expected plain {name}. Got one with {other}, which no inner optimiser has.")
        ours, keys = _BUFFERS[name]
        if not any(group.get("momentum") for group in groups):
            keys = [key for key in keys if key != "momentum_buffer"]
        layout = Layout.of(adapted)
        buffers = tuple(
            torch.cat(
                [_flat(state.get(key), p, layout.dtype) for state, p in zip(states, adapted.values(), strict=True)]
            )
            for key in keys
        )
        counts = {int(state.get("step", 0)) for state in states}
        if step is None and name == "SGD":
            raise ValueError(
                "An SGD does not count its steps, by which minibatches and schedules go. Expected `step`. Got None."
            )
        if step is None and len(counts) > 1:
            raise ValueError(
                f"The adapted parameters have taken {sorted(counts)} steps. Expected one number: pass `step`."
            )
        return cls(
            parameters={n: p.detach().clone().unsqueeze(0) for n, p in adapted.items()},
            buffers=tuple(b.unsqueeze(0) for b in buffers),
            step=counts.pop() if step is None else step,
            optimizer=ours,
        )

    def flat(self, layout: Layout) -> State:
        """The parameters as one vector, and the buffers: each `(tasks or 1, n)`."""
        parts = [(self.parameters[name], size) for name, size in zip(layout.names, layout.sizes, strict=True)]
        rows = [p.detach().reshape(len(p), size).to(layout.dtype) for p, size in parts]
        return (torch.cat(rows, -1), *(b.detach() for b in self.buffers))

    @classmethod
    def joined(
        cls, parts: Sequence[tuple[Sequence[int], InnerState]], tasks: int, skipped: Sequence[int]
    ) -> InnerState:
        """Join the states of several chunks, whose tasks have these positions.

        Args:
            parts: The positions of each chunk, and its state.
            tasks: How many there are in all.
            skipped: Positions of tasks that no chunk has; their entries are NaN.

        Returns:
            The state of all tasks.
        """
        first = parts[0][1]
        order = [position for positions, _ in parts for position in positions]
        rows_of = {position: row for row, position in enumerate(order)}
        where = torch.tensor([rows_of.get(i, len(order)) for i in range(tasks)])

        def join(own: Sequence[Tensor | None]) -> Tensor | None:
            rows = [t for t in own if t is not None]
            if len(rows) < len(own) or not rows:
                return None
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            if skipped:
                joined = torch.cat([joined, torch.full_like(joined[:1], torch.nan)])
            return joined if order == list(range(tasks)) else joined[where.to(joined.device)]

        states = [state for _, state in parts]
        parameters = {n: join([s.parameters[n] for s in states]) for n in first.parameters}
        buffers = [join([s.buffers[i] for s in states]) for i in range(len(first.buffers))]
        return replace(
            first,
            parameters={n: t for n, t in parameters.items() if t is not None},
            buffers=tuple(t for t in buffers if t is not None),
            solution=join([s.solution for s in states]),
        )

    def of_tasks(self, positions: Sequence[int]) -> InnerState:
        """The state of some of the tasks."""

        def some(t: Tensor) -> Tensor:
            return t if len(t) == 1 else t[list(positions)]

        return replace(
            self,
            parameters={n: some(p) for n, p in self.parameters.items()},
            buffers=tuple(some(b) for b in self.buffers),
            solution=None if self.solution is None else some(self.solution),
        )

    def check(self, layout: Layout, inner: InnerSolver, tasks: int, like: Tensor) -> None:
        """Raise ValueError unless a call can go on from here.

        Args:
            layout: Which parameters adapt.
            inner: How.
            tasks: How many tasks there are.
            like: A flat vector, of the right dtype and device.

        Raises:
            ValueError: The state of another model, optimiser, dtype, device or number of tasks.
        """
        if missing := sorted(set(layout.names) ^ set(self.parameters)):
            raise ValueError(
                "The state is that of another model, or of other adapted parameters. Expected parameters "
                f"{list(layout.names)}. Got {list(self.parameters)}, which differ in {missing}."
            )
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            p = self.parameters[name]
            if p.ndim == 0 or p.shape[1:] != shape or p.dtype not in (dtype, layout.dtype):
                dims = "".join(f", {size}" for size in shape)
                raise ValueError(
                    f"The state is that of another model: {name!r} must be (tasks{dims}) in {dtype}. Got "
                    f"{tuple(p.shape)} in {p.dtype}."
                )
        has, n = type(inner).__name__, sum(layout.sizes)
        needs = inner.buffers if isinstance(inner, InnerOptimizer) else 0
        if len(self.buffers) != needs or self.optimizer not in (None, has):
            whose = f" of {self.optimizer}" if self.optimizer else ""
            zeros = f", buffers=(torch.zeros(1, {n}),) * {needs}" if needs else ""
            raise ValueError(
                f"The state is that of another optimiser. Expected the {needs} buffers of {has}. Got "
                f"{len(self.buffers)}{whose}: go on with the optimiser that it comes from, or begin a training at its "
                f"parameters, with InnerState(parameters=state.parameters{zeros})."
            )
        vectors = {"buffers": self.buffers, "solution": () if self.solution is None else (self.solution,)}
        for name, tensors in vectors.items():
            for t in tensors:
                if t.ndim != 2 or t.shape[1] != n or t.dtype != like.dtype:
                    raise ValueError(
                        f"The {name} of the state must be (tasks, {n}) in {like.dtype}. Got {tuple(t.shape)} in "
                        f"{t.dtype}."
                    )
        everything = [*self.parameters.values(), *self.buffers, *vectors["solution"]]
        if others := {len(t) for t in everything} - {1, tasks}:
            raise ValueError(
                f"The state must be of {tasks} tasks, or of one from which all start. Got {sorted(others)} tasks."
            )
        if elsewhere := {str(t.device) for t in everything} - {str(like.device)}:
            raise ValueError(f"The state must be on {like.device}, where the parameters are. Got {sorted(elsewhere)}.")


_BUFFERS: dict[str, tuple[str, list[str]]] = {
    "SGD": ("GradientDescent", ["momentum_buffer"]),
    "Adam": ("Adam", ["exp_avg", "exp_avg_sq"]),
    "AdamW": ("AdamW", ["exp_avg", "exp_avg_sq"]),
    "RMSprop": ("RMSprop", ["square_avg", "momentum_buffer"]),
}
"""The inner optimiser that is equal to one of torch, and the keys of its buffers there."""
_OTHERS = {"max_exp_avg_sq", "grad_avg"}
"""Keys of what only variants of these have: AMSGrad, and the centred RMSprop."""
_VARIANTS = ("amsgrad", "centered", "dampening", "maximize")
"""Options of them that inner optimisers have not."""


def _flat(buffer: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """One parameter's part of a buffer, zeros before its first step."""
    return (torch.zeros_like(parameter) if buffer is None else buffer).detach().reshape(-1).to(dtype)
