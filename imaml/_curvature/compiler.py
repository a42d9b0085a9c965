"""Functions of tensors, traced and compiled once per shape, and compared with what they were traced from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from imaml._curvature.agreement import Expected, Outputs
from imaml._curvature.deadline import OutOfTimeError
from imaml._curvature.inductor import Function, run, trace_and_compile, trace_and_split
from imaml._errors import CompileWarning, warn
from imaml._losses.record import Record
from imaml._losses.snapshot import Snapshot
from imaml._objective.objective import Objective
from imaml._objective.reach import Reach, modules_in

F = TypeVar("F")
MOST = 12
"""Functions that one engine compiles; more say that the shapes or the objective keep changing."""


@dataclass(frozen=True)
class CompiledFunction:
    """One function for one shape, and which parameters it uses; see `Record`."""

    function: Function
    then: Function | None
    """The second part of one that is split; see `split`."""
    done: Record
    """What it adds to the record of a call."""


@dataclass
class Shape:
    """The functions of losses that are made of the same kinds of things, by what they compute."""

    functions: dict[Hashable, CompiledFunction] = field(default_factory=dict)
    calls: int = 0
    """How many calls have used them."""
    reach: list[Reach] | None = None
    """What the losses could reach when one of them was last compared with an uncompiled evaluation."""

    def is_due(self, reach: list[Reach]) -> bool:
        """Count a call; whether it is to compare: it is the 1st, 2nd, 4th, 8th..., or what losses reach has changed."""
        self.calls += 1
        if self.reach is None or self.calls & (self.calls - 1) == 0:
            return True
        return not all(new.is_as(old) for new, old in zip(reach, self.reach, strict=True))


Functions = defaultdict[Hashable, Shape]
"""By what the loss is made of."""


@dataclass
class Compiler:
    """What an engine has compiled, for all its calls."""

    functions: WeakKeyDictionary[Objective, Functions] = field(default_factory=WeakKeyDictionary)
    made: int = 0
    spent: float = 0.0
    """Seconds so far."""
    is_on: bool = True

    def give_up(self, reason: str) -> None:
        """Run uncompiled from here on, and say why."""
        self.is_on = False
        warn(f"compile=True: {reason} This engine runs uncompiled from here on.", CompileWarning)


@dataclass
class Session:
    """A compiler in one call."""

    compiler: Compiler
    functions: Functions
    """Functions compiled for the call's objective."""
    frozen: dict[str, Tensor]
    """The tensors of the objective that are neither parameters to differentiate by nor buffers."""
    state: Hashable
    """What a trace depends on besides tensors, as far as it can be seen."""
    accuracy: float
    """Relative accuracy of the losses: the square root of the coarsest rounding in them."""
    budget: float
    """Seconds of compilation, in all of an engine's calls."""
    looked_at: set[int] = field(default_factory=set)
    """Addresses of the shapes that this call has looked at."""

    @classmethod
    def of(cls, compiler: Compiler, snapshot: Snapshot, budget: float) -> Session:
        """Begin a call on the snapshot's objective."""
        objective, device = snapshot.objective, snapshot.like.device.type
        training = () if objective.model is None else tuple(m.training for m in modules_in(objective.model))
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        rounding = max(torch.finfo(d).eps for d in (lower, *snapshot.layout.dtypes) if d is not None)
        state = (snapshot.layout, snapshot.shared_layout, training, lower)
        functions = compiler.functions.setdefault(objective, defaultdict(Shape))
        learned = {*snapshot.layout.names, *snapshot.shared_layout.names}
        return cls(compiler, functions, objective.others(learned), state, rounding**0.5, budget)

    def compile(self, function: Function, tensors: Sequence[Tensor], expected: Expected, what: str) -> Function | None:
        """The compiled form of a function; None, with a warning, where there is none that agrees with `expected`."""

        def compile_(seconds: float) -> tuple[Function, Outputs]:
            compiled = trace_and_compile(function, tensors, what, seconds)
            return compiled, run(compiled, tensors)

        return self._compiled(compile_, expected, what)

    def compile_in_two(
        self,
        function: Function,
        tensors: Sequence[Tensor],
        late: Collection[int],
        first: int,
        expected: Expected,
        what: str,
    ) -> tuple[Function, Function | None] | None:
        """The compiled forms of the two parts of a function, as `split` has it; None likewise."""

        def compile_(seconds: float) -> tuple[tuple[Function, Function | None], Outputs]:
            before, then = trace_and_split(function, tensors, late, first, what, seconds)
            found = run(before, [t for i, t in enumerate(tensors) if i not in late])
            handed = [t for t in found[first:] if t is not None]
            return (before, then), (*found[:first], *run(then, [*tensors, *handed]))

        return self._compiled(compile_, expected, what)

    def _compiled(self, compile_: Callable[[float], tuple[F, Outputs]], expected: Expected, what: str) -> F | None:
        if self.compiler.made == MOST:
            self.compiler.give_up(f"{MOST} functions are compiled already, and shapes or objectives keep changing.")
            return None
        self.compiler.made += 1
        start = monotonic()
        try:
            compiled, found = compile_(self.budget - self.compiler.spent)
            self.compiler.spent += monotonic() - start
        except OutOfTimeError:
            self.compiler.give_up(
                f"compiling takes more than compile_budget={self.budget:g} seconds (at {what}, function "
                f"{self.compiler.made} of this engine). A larger model takes longer: give more, or leave out compile."
            )
            return None
        except Exception as error:  # whatever a compiler may raise, the uncompiled loss has just been evaluated
            reason = next(iter(str(error).splitlines()), "")
            self.compiler.give_up(f"the loss cannot be compiled ({type(error).__name__}: {reason}).")
            return None
        if not expected.is_met_by(found, 32 * self.accuracy):
            self.compiler.give_up("the compiled derivative of the loss differs from the uncompiled one.")
            return None
        return compiled
