"""The inner problem, as inner solvers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from imaml._curvature.product import HvpMode
from imaml._losses.layout import Layout
from imaml_solvers import LinearOperator

State = tuple[Tensor, ...]
"""The adapted parameters phi and the optimiser's buffers, each `(tasks, n)`."""


@dataclass
class Quadratic:
    """The inner objective to second order about one point."""

    value: Tensor
    """The objective, `(tasks,)`."""
    gradient: Tensor
    """Its gradient, `(tasks, n)`."""
    hessian: LinearOperator
    """Its Hessian, H + Lambda; a product costs one Hessian-vector product a task."""


class InnerProblem(Protocol):
    """min over phi of L_support(phi) + 1/2 (phi - theta)' Lambda (phi - theta), for every task of a chunk at once.

    Vectors are `(tasks, n)`, with the adapted parameters of a task in a row, as `layout` says. `step` counts from 0,
    and says which random draws (dropout) a loss sees.
    """

    stopped: Tensor | None
    """Which tasks have stopped, `(tasks,)`, as a solver says: their running statistics stay as they are."""

    @property
    def theta(self) -> Tensor:
        """What the proximal term pulls to, `(tasks, n)`: not to be written to."""
        ...

    @property
    def phi_0(self) -> Tensor:
        """Where a solver starts, `(tasks, n)`, likewise: theta, or where an inner training stands that goes on."""
        ...

    def begin(self) -> State:
        """The state of the optimiser that solves this problem before the first step."""
        ...

    def resume_at(self) -> tuple[int, State]:
        """The step that a loop goes on with after an interruption, 0 otherwise, and the state before it."""
        ...

    def reach(self, step: int, state: State) -> None:
        """Say which state is that before a step; where the computation is kept in a folder it may go on from there."""
        ...

    @property
    def layout(self) -> Layout:
        """Which parameters a row holds, and where."""
        ...

    def value(self, phi: Tensor, step: int) -> Tensor:
        """The objective `(tasks,)`, for one forward pass; its support loss is not recorded."""
        ...

    def gradient(self, phi: Tensor, step: int) -> Tensor:
        """The gradient of the objective; records the support loss, once a step. One gradient a task."""
        ...

    def value_and_gradient(self, phi: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The objective and its gradient, recorded likewise, for the same cost."""
        ...

    def quadratic(self, phi: Tensor, step: int, mode: HvpMode) -> Quadratic:
        """The objective, its gradient and its Hessian, recorded likewise; holds the graph of a gradient until freed."""
        ...

    def step(self, state: State, step: int) -> State:
        """The state after one step of the optimiser that solves this problem: a gradient, and its `update`."""
        ...

    def update(self, state: State, gradient: Tensor, step: int) -> State:
        """The state after one step, for a gradient that is known."""
        ...

    def one_by_one(self, run: Callable[[Self], Tensor]) -> Tensor:
        """What a function makes of the problem of each task alone, `(1, n)` each, as one `(tasks, n)`."""
        ...
