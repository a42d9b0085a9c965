"""The loss of a chunk with compiled derivatives."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imaml._curvature.compiler import Compiled, Session, agree
from imaml._curvature.exact_products import ReverseOverReverse
from imaml._curvature.inductor import Function, Outputs, run
from imaml._leaves import objects
from imaml._losses.chunk import SUPPORT, ChunkLoss
from imaml._losses.context import Context
from imaml._losses.gradient import Gradient
from imaml._torch import TreeSpec, tree_flatten


@dataclass(frozen=True, kw_only=True)
class CompiledLoss(ChunkLoss):
    """A loss whose derivatives are compiled functions of every tensor that it is made of.

    Whatever else it depends on is frozen in them. So what is compiled anew is compared with the uncompiled derivative,
    and the losses of the next gradient of its shape, as of the first in every later call, with an uncompiled forward
    pass of the first task (of the query set only if it has a loss of its own); where they differ, or cannot be
    compiled, the engine goes on without.
    """

    session: Session

    def gradient(
        self, phi: Tensor, step: int, *, fixed: bool = False, metric: bool = False, weights: Tensor | None = None
    ) -> Gradient:
        """See `ChunkLoss.gradient`."""

        def plain(loss: ChunkLoss, phi: Tensor, *weights: Tensor) -> Outputs:
            found = ChunkLoss.gradient(loss, phi, step, fixed=fixed, weights=weights[0] if weights else None)
            return found.losses, found.adapted, found.fixed

        if self.is_compiled:
            given, made = (phi,) if weights is None else (phi, weights), self.session.compiler.made
            losses, adapted, by_fixed = self._derive(f"gradient {fixed and bool(self.context.fixed)}", plain, given)
            assert losses is not None
            assert adapted is not None
            if self.session.compiler.made > made or self._is_still(losses, phi, step):
                is_judged = metric and self.context.objective.metric is not None
                return Gradient(losses, adapted, by_fixed, self.value(phi, step)[1] if is_judged else None)
        return super().gradient(phi, step, fixed=fixed, metric=metric, weights=weights)

    def product(self, phi: Tensor, step: int, w: Tensor, *, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """What `ReverseOverReverse` makes of w at phi."""

        def plain(loss: ChunkLoss, phi: Tensor, w: Tensor) -> Outputs:
            return ReverseOverReverse(loss, phi, step, "rebuild")(w, mixed=mixed)

        found, by_fixed = self._derive(f"product {mixed and bool(self.context.fixed)}", plain, (phi, w))
        assert found is not None
        return found, by_fixed

    @property
    def is_compiled(self) -> bool:
        """Whether derivatives are compiled, as long as nothing has spoken against it."""
        return self.session.compiler.is_on

    def _is_still(self, losses: Tensor, phi: Tensor, step: int) -> bool:
        """Whether the first of the losses is what it is uncompiled; looked at once a call for each shape."""
        session, objective = self.session, self.context.objective
        has_own_loss = self.kind == SUPPORT or objective.outer_loss is not None
        shape = id(self._functions)
        if not self.is_compiled or shape in session.checked or not has_own_loss:
            return True
        session.checked.add(shape)
        _, first = next(self.split(1))
        expected = first.at_leaves(phi[:1], step, fixed=False)[2].detach()  # as it was traced, with gradients enabled
        if agree(losses[:1], expected, session.accuracy):
            return True
        session.compiler.give_up(
            "the loss is another than the one that was compiled, for the same shapes. Expected a loss that "
            "depends on tensors alone: make numbers that change, such as a temperature, tensors in `meta`."
        )
        return False

    def _derive(self, name: str, plain: Function, given: tuple[Tensor, ...]) -> Outputs:
        """A function of this loss and of tensors, compiled if it can be."""
        if not self.is_compiled:
            return plain(self, *given)
        context, session, key = self.context, self.session, (name, len(given))
        constants = session.frozen | context.fresh_constants()
        tensors = [*_plain(given), *_plain(context.fixed), *_plain(constants.values()), *self._data]
        if key not in self._functions:
            used: dict[str, Any] = {"used": set(), "used_fixed": set()}

            def traced(*tensors: Tensor) -> Outputs:
                parts = iter(tensors[len(given) :])
                fixed = [next(parts) for _ in context.fixed]
                named = {name: next(parts) for name in constants}
                snapshot = {f.name: getattr(context, f.name) for f in fields(context)}
                inside = _Traced(**snapshot | used | {"fixed": fixed, "constants": named, "differentiates": False})
                loss = ChunkLoss(
                    inside, self._leaves[1].unflatten(list(parts)), self.tasks, self.start, self.kind, self.part
                )
                return plain(loss, *tensors[: len(given)])

            expected = plain(self, *given)
            if others := objects(self.batch):
                session.compiler.give_up(f"a task holds a {type(others[0]).__name__}, which is no tensor.")
                return expected
            if context.replay.draws:
                session.compiler.give_up("a loss draws random numbers (dropout), which are replayed uncompiled.")
                return expected
            if self.tasks > 1 and not context.is_vectorised:
                session.compiler.give_up("the model cannot be vectorised over tasks. Use chunk_size=1 to compile it.")
                return expected
            what = f"the {name.partition(' ')[0]} of the {('support', 'query')[self.kind]} loss, {self.tasks} at once"
            function = session.compile(traced, tensors, expected, what)
            if function is None:
                return expected
            self._functions[key] = Compiled(function, **used)
        compiled = self._functions[key]
        context.used |= compiled.used
        context.used_fixed |= compiled.used_fixed
        return run(compiled.function, tensors)

    @cached_property
    def _leaves(self) -> tuple[list[Tensor], TreeSpec]:
        return tree_flatten(self.batch)

    @cached_property
    def _data(self) -> list[Tensor]:
        return _plain(self._leaves[0])

    @cached_property
    def _functions(self) -> dict[Hashable, Compiled]:
        return self.session.functions[self._shape]

    @cached_property
    def _shape(self) -> Hashable:
        leaves, structure = self._leaves
        sizes = [(t.shape, t.dtype, t.device) for t in (*leaves, *self.context.constants.values())]
        return (self.session.state, self.kind, self.tasks, structure, *sizes)


def _plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().contiguous() if t.layout is torch.strided else t.detach() for t in tensors]


class _Traced(Context):
    """A context in which the buffers are arguments of the traced function."""

    def fresh_constants(self) -> dict[str, Tensor]:
        return self.constants


class CompiledProduct:
    """H at one point; every product evaluates the gradient anew, fused with it."""

    def __init__(self, loss: CompiledLoss, phi: Tensor, step: int, *, with_gradient: bool) -> None:
        self._loss, self._phi, self._step = loss, phi, step
        self.gradient = loss.gradient(phi, step) if with_gradient else None

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        """See `Product`."""
        return self._loss.product(self._phi, self._step, w, mixed=mixed)
