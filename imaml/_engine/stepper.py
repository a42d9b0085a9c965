"""The steps of the inner optimiser in one call, which may be the user's own: taken, and checked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imaml._losses.replay import Role
from imaml._losses.snapshot import Snapshot
from imaml._objective.foreign import described, foreign_leaves
from imaml._torch import is_write_to_shared
from imaml.inner import InnerOptimizer
from imaml.inner._clipping import pull_back_clipping
from imaml.inner._hyper import Hyperparameters
from imaml.inner._inner_problem import State
from imaml.inner._rates import META, Rates


@dataclass(frozen=True)
class Stepper:
    """s_{k+1} = U(s_k, g_k) for the tasks of a chunk, and the cotangents of s_k and g_k."""

    optimizer: InnerOptimizer
    hyper: Hyperparameters
    snapshot: Snapshot
    start: int
    """Position of the first task, which keys random draws."""
    first: int = 0
    """The number of the first step in the whole training; the optimiser sees the number of a step there."""

    def take(self, state: State, gradient: Tensor, step: int) -> State:
        """The state after a step.

        Args:
            state: The state before it.
            gradient: The gradient of the inner objective there.
            step: Its number.

        Returns:
            The next state.

        Raises:
            TypeError: The optimiser's update does not return a state.
            ValueError: It changes its arguments, mixes tasks, or uses what requires grad and would get no gradient.
            RuntimeError: Its own.
        """
        optimizer = self.optimizer
        name, size = f"{type(optimizer).__name__}.update", 1 + optimizer.buffers
        in_place = f"{name} changes its arguments in place. Expected new tensors: use a + b for a.add_(b)."
        at = self.hyper.at(self.first + step)
        if optimizer.max_grad_norm is not None:
            gradient = optimizer.clipped(gradient, at)
        versions = [t._version for t in (*state, gradient)]
        try:
            following = self._update(state, gradient, step, at)
        except RuntimeError as error:
            if is_write_to_shared(error):  # theta, before the first step
                raise ValueError(in_place) from error
            raise
        if not isinstance(following, tuple) or len(following) != size:
            got = f"{len(following)} tensors" if isinstance(following, tuple) else type(following).__name__
            raise TypeError(f"{name} must return a tuple of phi and its {size - 1} `buffers`. Got {got}.")
        if versions != [t._version for t in (*state, gradient)]:
            raise ValueError(in_place)
        if not self._draws_nothing and step == 0 and len(gradient) > 1:
            self._check_rows(name, state, gradient, following, at)
        if not any([t.requires_grad for t in following]):
            return following
        # Nothing that it was given requires grad.
        foreign = self.snapshot.differentiates and foreign_leaves(
            following, (), lambda: self._update(state, gradient, step, at)
        )
        if foreign:
            raise ValueError(
                f"{name} uses what requires grad and would get no gradient: "
                f"{described(foreign, self.snapshot.objective.names())}. Expected a function of its arguments. Name it "
                "in Objective(..., meta={...}) and, by that key, in the optimiser's property `meta`, and read it from "
                "`at.meta`; or detach it."
            )
        return tuple(t.detach() for t in following)

    @cached_property
    def needs_gradient(self) -> bool:
        """Whether the derivative of a step depends on where it is taken, and not on its number alone."""
        clips = self.optimizer.max_grad_norm is not None
        return bool(self._learned) or clips or not self.optimizer.said_of_update("is_linear")

    @cached_property
    def _learned(self) -> frozenset[str]:
        """Names of what a step uses itself and is learned; the weight of the proximal term is in its gradient."""
        own = self.optimizer.hyperparameters
        return frozenset(name for name in self.hyper.learned if name in own or name.startswith(META))

    def pull_back(
        self, state: State, gradient: Tensor, cotangents: State, step: int
    ) -> tuple[State, Tensor, dict[str, Tensor]]:
        """The cotangents of s_k, of g_k and of the learned hyper-parameters, for those of s_{k+1}."""
        optimizer, number, learned = self.optimizer, self.first + step, self._learned
        at, clip = self.hyper.at(number), {"max_grad_norm"}
        pullback = optimizer.said_of_update("pullback")
        with self._draws(step):
            before, w, rates = pullback(state, optimizer.clipped(gradient, at), cotangents, number, at, learned - clip)
        if optimizer.max_grad_norm is not None:
            w, by_most = pull_back_clipping(gradient, at["max_grad_norm"], w)
            rates = rates | {name: by_most for name in learned & clip}
        return before, w, rates

    def _update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        with torch.enable_grad(), self._draws(step):
            return self.optimizer.stepped(state, gradient, self.first + step, at)

    @cached_property
    def _draws_nothing(self) -> bool:
        return bool(self.optimizer.said_of_update("is_deterministic"))

    def _draws(self, step: int) -> AbstractContextManager[None]:
        """Within it, random numbers are those of the optimiser at this step."""
        return nullcontext() if self._draws_nothing else self.snapshot.replay.at(Role.UPDATE, self.start, step)

    def _check_rows(self, name: str, state: State, gradient: Tensor, following: State, at: Rates) -> None:
        """Raise where the first step of a task depends on those that run with it; random draws are not looked at.

        Raises:
            ValueError: It does.
        """
        with self._draws(0):
            alone = self.optimizer.update(tuple(t[:1] for t in state), gradient[:1], self.first, at)
        if self.snapshot.replay.draws:
            return
        tolerance = torch.finfo(gradient.dtype).eps ** 0.5

        def agree(some: State, others: State) -> bool:
            pairs = zip(some, others, strict=True)
            return all(torch.allclose(a, b, rtol=tolerance, equal_nan=True) for a, b in pairs)

        if agree(alone, tuple(t[:1] for t in following)):
            return
        with self._draws(0):
            again = self.optimizer.update(state, gradient, self.first, at)
        if agree(again, following):  # else it is no function of its arguments, and says nothing of the tasks
            raise ValueError(
                f"{name} mixes tasks. Expected that every row of a state and of the gradient, `(tasks, n)`, is a task "
                "by itself. Got another step for a task alone than among others: take norms and sums along the last "
                "dimension, such as gradient.norm(dim=-1, keepdim=True)."
            )
