"""What every inner loop is, and what exact MAML needs of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from imaml._numbers import check_integer, check_number
from imaml.inner._clipping import clipped
from imaml.inner._hyper import Hyper, check_hyper
from imaml.inner._inner_problem import InnerProblem, State
from imaml.inner._rates import Rates

BLOCK = 2**16
"""Entries that an update of long vectors handles at a time, where that is possible: what it makes in between is then
small, and stays in the caches. A step of Adam and its derivative take a third of the time."""


@dataclass(frozen=True, kw_only=True)
class InnerSolver(ABC):
    """Finds the adapted parameters of a task: all that `FOMAML` and `ImplicitMAML` need of an inner loop.

    A solver of one's own implements `run`, which gets the inner problem of a whole chunk of tasks.

    Args:
        steps: The most steps K >= 0; 0 adapts nothing.
    """

    steps: int

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        check_integer("`steps`", self.steps, least=0)

    @property
    def hyperparameters(self) -> dict[str, Hyper]:
        """What may be a function of meta-parameters, by name."""
        return {}

    @property
    def meta(self) -> tuple[str, ...]:
        """Which meta-parameters an `update` reads itself, besides what hyper-parameters are functions of."""
        return ()

    @abstractmethod
    def run(self, problem: InnerProblem) -> Tensor:
        """The adapted parameters of every task of a chunk, `(tasks, n)`."""


@dataclass(frozen=True, kw_only=True)
class InnerOptimizer(InnerSolver):
    """Adapts by K steps that can be differentiated, as `MAML` does.

    Formula: K times s <- U(s, g(phi)), with U a pure function, and phi in the state s.

    An optimiser of one's own needs `update`, and `buffers` and `nonnegative` where it has any. Its derivatives are
    taken of `update`, as it is written. Every row of a state or a gradient is a task: what mixes coordinates, such as a
    norm, does so along the last dimension. Random numbers are the same whenever a step is taken again.

    An `update` may use more than hyper-parameters: a learned optimiser is a network of meta-parameters. It names their
    keys in `meta`, a property or a field with a default, and finds them as `at.meta["net"]`. They may have any shape,
    and get the meta-gradient like those of a loss. `at.views(vector)` has the parts of a vector by parameter name,
    `(tasks, *shape)`, and `at.flat(named)` makes a vector of such.

    A subclass may change the `update` of another optimiser, to clip the gradient or to add noise. Its derivatives are
    taken of the new `update` too: what the other says of its own derivative does not hold for it. A `start` of one's
    own is differentiated too.

    Hyper-parameters: `lr`, `momentum` and `weight_decay` are each

    - a number;
    - a sequence of `steps` numbers, one a step;
    - a mapping from the name of every adapted parameter to a number, to a tensor of the parameter's shape, to a
      sequence of these, one a step, or to a tensor `(steps,)` or `(steps, *shape)`, whose dimensions may be 1;
    - a function of the objective's meta-parameters by name, such as `lambda meta: meta["log_lr"].exp()`, that returns
      any of these as tensors;
    - or a schedule, a function of the meta-parameters and of the step, which counts from 0: it is called at every step,
      and returns what holds at that step, such as `imaml.inner.warmup_cosine(0.1, warmup=10, total=100)`.

    A tensor of the parameter's shape is always one value an entry. For a parameter of shape `(steps,)` it is refused
    beside vectors that are one value a step, where `(steps, 1)` and `(1, steps)` say which is meant.

    Args:
        lr: Step size, > 0: see above.
        steps: Number of steps K >= 0; 0 adapts nothing.
        max_grad_norm: Clip the gradient of each task to this norm over all of its parameters before `update` gets it,
            as `torch.nn.utils.clip_grad_norm_` does. Like a step size it may differ from step to step or be learned,
            but it is one for all parameters. None: do not clip.
        stationarity: Stop a task once the norm of its gradient, proximal term included, is at most this: `steps` is
            then a limit. Not for `MAML`, which differentiates a known number of steps. None: take all.

    Raises:
        TypeError: A hyper-parameter of a wrong type, or `steps` not an integer.
        ValueError: A number out of range.
    """

    is_linear: ClassVar[bool] = False
    """Whether the derivative of U by state and gradient needs neither, as that of a linear U."""
    is_deterministic: ClassVar[bool] = False
    """Whether U draws no random numbers; those that it may draw are the same whenever a step is taken again."""
    is_elementwise: ClassVar[bool] = False
    """Whether no entry of U depends on another or on chance, so that it can be differentiated block by block."""
    positive: ClassVar[tuple[str, ...]] = ("lr",)
    nonnegative: ClassVar[tuple[str, ...]] = ()
    """The hyper-parameters, by range."""

    lr: Hyper
    max_grad_norm: Hyper | None = None
    stationarity: float | None = None

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        if self.stationarity is not None and check_number("`stationarity`", self.stationarity) < 0:
            raise ValueError(f"`stationarity` must be >= 0. Got {self.stationarity}.")
        for name, given in self.hyperparameters.items():
            check_hyper(name, given, must=">= 0" if name in self.nonnegative else "positive")
        if isinstance(self.max_grad_norm, Mapping):
            raise TypeError(
                "`max_grad_norm` is one for all parameters. Expected a number, one per step, or a function that "
                f"returns these. Got one by name, {list(self.max_grad_norm)}."
            )
        if not isinstance(self.meta, (tuple, list)) or not all(isinstance(name, str) for name in self.meta):
            raise TypeError(f"`meta` of {type(self).__name__} must be a tuple of names. Got {self.meta!r}.")

    @property
    def hyperparameters(self) -> dict[str, Hyper]:
        """What may be a function of meta-parameters, by name."""
        clipping = () if self.max_grad_norm is None else ("max_grad_norm",)
        return {name: getattr(self, name) for name in (*self.positive, *self.nonnegative, *clipping)}

    @property
    def buffers(self) -> int:
        """How many vectors besides phi the state has; all start at zero."""
        return 0

    def said_of_update(self, name: Literal["is_linear", "is_deterministic", "is_elementwise", "pullback"]) -> Any:
        """What a class says of its own `update`; where another class brings the `update`, what `InnerOptimizer` says.

        Looked up at each use, since an `update` may be set on a class or on an optimiser at any time.

        Args:
            name: Name of the attribute.

        Returns:
            Its value, for this optimiser.
        """
        if "update" not in vars(self):
            for cls in type(self).__mro__:
                if name in vars(cls):
                    return getattr(self, name)
                if "update" in vars(cls):
                    break
        value: Any = vars(InnerOptimizer)[name]
        return value.__get__(self) if callable(value) else value

    @abstractmethod
    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """The next state U(s, g), for steps counted from 0, as new tensors; differentiable by autograd."""

    def clipped(self, gradient: Tensor, at: Rates) -> Tensor:
        """What `update` gets in the place of a gradient; raises ValueError where `max_grad_norm` differs by entry."""
        if self.max_grad_norm is None:
            return gradient
        most = at["max_grad_norm"]
        if isinstance(most, Tensor) and most.numel() > 1:
            raise ValueError(
                f"`max_grad_norm` is one for all parameters. Expected a number. Got {most.numel()} from its function, "
                "one for each entry."
            )
        return clipped(gradient, most)

    def start(self, phi: Tensor) -> State:
        """The state before the first step."""
        return (phi, *(torch.zeros_like(phi) for _ in range(self.buffers)))

    def run(self, problem: InnerProblem) -> Tensor:
        """All steps, keeping nothing but the last state."""
        return self.last_state(problem)[0]

    def last_state(self, problem: InnerProblem) -> State:
        """The state after all steps, which `run` gives the parameters of."""
        first, state = problem.resume_at()
        for step in range(first, self.steps):
            problem.reach(step, state)
            if self.stationarity is None:
                state = problem.step(state, step)
                continue
            gradient = problem.gradient(state[0], step)
            moving = gradient.norm(dim=-1, keepdim=True) > self.stationarity
            if not moving.any():
                break
            problem.stopped = ~moving.squeeze(-1)
            following = problem.update(state, gradient, step)
            state = tuple(torch.where(moving, t, s) for t, s in zip(following, state, strict=True))
            del gradient, following
        else:
            problem.reach(self.steps, state)
        return state

    def pullback(
        self,
        state: State,
        gradient: Tensor,
        cotangents: State,
        step: int,
        at: Rates,
        learned: frozenset[str],
    ) -> tuple[State, Tensor, dict[str, Tensor]]:
        """The cotangents of s, of g and of what is learned and used, for those of U(s, g).

        Args:
            state: s.
            gradient: G; its cotangent may be written in its place.
            cotangents: For U(s, g), which those of s may be written over: a long vector is expensive to make.
            step: The number of the step, counted from 0.
            at: What the update is given besides.
            learned: Names of those whose cotangents are wanted.

        Returns:
            The cotangents, the last of them by name, of shapes that summed are theirs.
        """
        points, rates = (*state, gradient), Rates.of(at)
        blocks = self._blocks((*points, *cotangents))
        if not blocks:
            found, by_rates = self._pullback(points, cotangents, step, rates, learned)
            return tuple(found[:-1]), found[-1], by_rates
        room = _room((*cotangents, gradient))
        used, sums = set[str](), rates.replaced({n: torch.zeros_like(t) for n, t in rates.tensors(learned).items()})
        for part in blocks:
            some = tuple(map(part, cotangents))
            pulled, by_some = self._pullback([*map(part, points)], some, step, rates.part(part), learned)
            for whole, t in zip(room, pulled, strict=True):
                part(whole).copy_(t)
            mine = sums.part(part).tensors(by_some)
            for name, t in by_some.items():
                mine[name].add_(t)
            used.update(by_some)
        return tuple(room[:-1]), room[-1], sums.tensors(used)

    def stepped(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """What `update` gives, block by block where that is possible."""
        blocks = self._blocks((*state, gradient))
        if not blocks:
            return self.update(state, gradient, step, at)
        found, rates = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in state], Rates.of(at)
        for part in blocks:
            following = self.update(tuple(map(part, state)), part(gradient), step, rates.part(part))
            for whole, t in zip(found, following, strict=True):
                part(whole).copy_(t)
        return tuple(found)

    def _blocks(self, tensors: Sequence[Tensor]) -> list[Callable[[Tensor], Tensor]]:
        """What takes a block of the entries of vectors `(tasks, n)`, for each block; none for short ones."""
        tasks, n = tensors[0].shape
        # DTensors are left whole: a slice of one would be gathered from all processes.
        if (
            tasks * n <= 4 * BLOCK
            or not self.said_of_update("is_elementwise")
            or any(type(t) is not Tensor for t in tensors)
        ):
            return []
        width = max(BLOCK // tasks, BLOCK // 16, 1)  # not so narrow that the rows of many tasks become crumbs
        return [partial(_columns, of=n, first=first, width=width) for first in range(0, n, width)]

    @torch.enable_grad()
    def _pullback(
        self, points: Sequence[Tensor], cotangents: State, step: int, at: Rates, learned: Collection[str]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The cotangents of state and gradient, and of what is learned and used, at once."""
        leaves = [t.detach().requires_grad_() for t in points]
        rates = {name: rate.detach().requires_grad_() for name, rate in at.tensors(learned).items()}
        following = self.update(tuple(leaves[:-1]), leaves[-1], step, at.replaced(rates))
        found = _pulled(following, cotangents, [*leaves, *rates.values()])
        mine = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=False)]
        by_rates = zip(rates, found[len(leaves) :], strict=True)
        return mine, {name: g for name, g in by_rates if g is not None}

    @torch.enable_grad()
    def pull_through_start(self, theta: Callable[[], Tensor], cotangents: State) -> Tensor:
        """The cotangent of theta, for those of the state before the first step."""
        if type(self).start is InnerOptimizer.start:
            return cotangents[0]  # phi is theta, and the buffers are zeros
        point = theta().detach().requires_grad_()
        found = _pulled(self.start(point), cotangents, [point])[0]
        return torch.zeros_like(point) if found is None else found


def _columns(tensor: Tensor, *, of: int, first: int, width: int) -> Tensor:
    """A block of the entries of what broadcasts against `(tasks, of)`."""
    return tensor[..., first : first + width] if tensor.ndim and tensor.shape[-1] == of else tensor


def _room(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves, to be written over; in place of those that share memory, others."""
    found: list[Tensor] = []
    for t in tensors:
        shares = 0 in t.stride() or any(t.untyped_storage().data_ptr() == o.untyped_storage().data_ptr() for o in found)
        found.append(torch.empty(t.shape, dtype=t.dtype, device=t.device) if shares else t)
    return found


def _pulled(outputs: State, cotangents: State, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The cotangents of the inputs, for those of the outputs, some of which may have no derivative; None for unused."""
    smooth = [(t, c) for t, c in zip(outputs, cotangents, strict=True) if t.requires_grad]
    if not smooth:
        return [None] * len(inputs)
    values, weights = zip(*smooth, strict=True)
    return torch.autograd.grad(values, inputs, weights, allow_unused=True)
