"""Derivatives that are traced and compiled, once for each shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from imaml._curvature.agreement import Expected, Outputs, agree, nudged
from imaml._curvature.compiler import CompiledFunction, Session
from imaml._curvature.derivatives import Derivatives, Findings, Want
from imaml._curvature.exact_products import ReverseOverReverse
from imaml._curvature.inductor import Function, run
from imaml._curvature.product import Graph, HvpMode, Product, Sum
from imaml._leaves import objects
from imaml._losses.gradient import Gradient
from imaml._losses.record import Record
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._objective.buffers import Constants
from imaml._torch import tree_flatten


class Compiled(Derivatives):
    """Compiled functions of every tensor that a loss is made of.

    Whatever else it depends on is frozen in them. So what is compiled anew is compared with the uncompiled derivative,
    and the losses of the next gradient of its shape with an uncompiled forward pass of the first task (of the query set
    only if it has a loss of its own). Later calls compare where anything has changed that the losses and the model can
    reach, and the 1st, 2nd, 4th, 8th... do in any case. Where they differ, or cannot be compiled, the engine goes on
    without. A guard by bytecode (Dynamo) would see more, and would have to trace through `vmap`, hooks and modes.
    """

    def __init__(self, session: Session, found: Findings) -> None:
        super().__init__(found)
        self._session = session
        self._known: WeakKeyDictionary[Slice, _Made] = WeakKeyDictionary()

    def gradient_of(self, part: Slice, phi: Tensor, step: int, want: Want, into: Sum | None = None) -> Gradient:
        """See `Derivatives`."""
        uncompiled, compiler = super().gradient_of, self._session.compiler

        def plain(part: Slice, phi: Tensor, *weights: Tensor) -> Outputs:
            found = uncompiled(part, phi, step, Want(want.shared, weights=weights[0] if weights else None))
            return found.losses, found.adapted, found.shared, found.initial

        if compiler.is_on:
            given, made = (phi,) if want.weights is None else (phi, want.weights), compiler.made
            name = f"gradient {want.shared and bool(part.snapshot.shared)}"
            losses, adapted, by_shared, initial = self._derive(part, name, plain, given)
            assert losses is not None
            assert adapted is not None
            if compiler.made > made or self._is_still(part, losses, phi, step):
                is_judged = want.metric and part.snapshot.objective.metric is not None
                metric = self.value_of(part, phi, step)[1] if is_judged else None
                vector = adapted if into is None else into.add(adapted, part)
                return Gradient(losses, vector, by_shared, metric, initial)
        return uncompiled(part, phi, step, want, into)

    def product_of(self, part: Slice, phi: Tensor, step: int, graph: Graph, mode: HvpMode) -> Product:
        """See `Derivatives`; a compiled product evaluates the gradient anew, fused with it, unless there are many."""
        if not self._session.compiler.is_on or mode == "forward-over-reverse":
            return super().product_of(part, phi, step, graph, mode)
        if graph is Graph.KEPT:

            def plain(part: Slice, w: Tensor, phi: Tensor) -> Outputs:
                product = ReverseOverReverse(part, phi, step, Graph.ONCE)
                assert product.gradient is not None
                return product.gradient.losses, product.gradient.adapted, product(w)[0]

            name = "linearised gradient"
            two = self.whole_in_two(part, name, plain, (phi,), step, late=1, first=2, key=(), losses=0)
            if two is not None:
                (losses, adapted), then = two
                assert losses is not None
                assert adapted is not None
                return _Product(self, part, phi, step, Gradient(losses, adapted, None), then)
        gradient = None if graph is Graph.REBUILT else self.gradient_of(part, phi, step, Want())
        return _Product(self, part, phi, step, gradient)

    def product(self, part: Slice, phi: Tensor, step: int, w: Tensor, *, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """What `ReverseOverReverse` makes of w at phi."""

        def plain(part: Slice, phi: Tensor, w: Tensor) -> Outputs:
            return ReverseOverReverse(part, phi, step, Graph.REBUILT)(w, mixed=mixed)

        name = f"product {mixed and bool(part.snapshot.shared)}"
        found, by_shared = self._derive(part, name, plain, (phi, w))
        assert found is not None
        return found, by_shared

    @property
    def compiles(self) -> bool:
        """See `Derivatives`; no longer where the compiler has given up."""
        return self._session.compiler.is_on

    @property
    def uncompiled(self) -> Derivatives:
        """See `Derivatives`."""
        return Derivatives(self._found)

    def whole(
        self,
        part: Slice,
        name: str,
        plain: Function,
        given: tuple[Tensor, ...],
        step: int,
        *,
        key: Hashable,
        losses: int | None,
    ) -> Outputs | None:
        """See `Derivatives`."""
        made = self._session.compiler.made
        found = self._derive(part, name, plain, given, key=key)
        if losses is None or not self.compiles or self._session.compiler.made > made:
            return found
        values = found[losses]
        assert values is not None
        return found if self._is_still(part, values, given[0], step) else None

    def whole_in_two(
        self,
        part: Slice,
        name: str,
        plain: Function,
        given: tuple[Tensor, ...],
        step: int,
        *,
        late: int,
        first: int,
        key: Hashable,
        losses: int,
    ) -> tuple[Outputs, Callable[..., Outputs]] | None:
        """See `Derivatives`."""
        compiler, shape = self._session.compiler, self._shape(part)
        key, made = (name, key, late, first, *[t.shape for t in given]), compiler.made
        if key not in shape.known.functions:
            # A cotangent like those that come: none where a gradient is zero but for rounding. Adam divides by that,
            # and another cotangent would make a comparison of roundings of it.
            unnoted = replace(part, record=replace(part.record))
            likely = super().gradient_of(unnoted, given[0], step, Want()).adapted
            stand_ins = [_stand_in(given[0]) for _ in range(late)]
            if bool(likely.norm() > 0):
                stand_ins[0] = likely
            function, _ = self._compile(part, name, plain, (*stand_ins, *given), late=late, first=first)
            if function is None:
                return None
            shape.known.functions[key] = function
        part.record.add(shape.known.functions[key].done)
        compiled, tensors = shape.known.functions[key], [*_plain(given), *shape.tensors()]
        found = run(compiled.function, tensors)
        values = found[losses]
        assert values is not None
        if compiler.made == made and not self._is_still(part, values, given[0], step):
            return None
        handed = [t for t in found[first:] if t is not None]

        def then(*later: Tensor) -> Outputs:
            assert compiled.then is not None
            return run(compiled.then, [*_plain(later), *tensors, *handed])

        return found[:first], then

    def _is_still(self, part: Slice, losses: Tensor, phi: Tensor, step: int) -> bool:
        """Whether the first of the losses is what it is uncompiled, where this call is to compare; once a shape."""
        session, objective, shape = self._session, part.snapshot.objective, self._shape(part).known
        has_own_loss = part.role is Role.SUPPORT or objective.outer_loss is not None
        if not session.compiler.is_on or id(shape) in session.looked_at or not has_own_loss:
            return True
        session.looked_at.add(id(shape))
        reach = part.snapshot.survey.reach
        if not shape.is_due(reach):
            return True
        first = part if part.tasks == 1 else part.of_tasks(0, 1)
        expected = first.at_leaves(phi[:1], step, shared=False)[2].detach()  # as it was traced, with gradients enabled
        if self._keeps_what_is_recomputed(part):
            return False
        if agree(losses[:1], expected, session.accuracy):
            shape.reach = reach
            return True
        session.compiler.give_up(
            "the loss is another than the one that was compiled, for the same shapes. Expected a loss that "
            "depends on tensors alone: make numbers that change, such as a temperature, tensors in `meta`."
        )
        return False

    def _keeps_what_is_recomputed(self, part: Slice) -> bool:
        """Give up where an uncompiled evaluation has recomputed a block: compiled, it would keep the activations."""
        if names := sorted(part.snapshot.survey.recomputed):
            self._session.compiler.give_up(
                f"activations are recomputed ({', '.join(names)}), and compiled derivatives would keep them. Expected "
                "no recomputation with compile=True: leave out `recompute`, `imaml.recompute` or "
                "torch.utils.checkpoint to compile, or compile=True to recompute."
            )
        return bool(names)

    def _derive(
        self, part: Slice, name: str, plain: Function, given: tuple[Tensor, ...], *, key: Hashable = ()
    ) -> Outputs:
        """A function of this loss and of tensors, compiled if it can be."""
        if not self._session.compiler.is_on:
            return plain(part, *given)
        shape, record = self._shape(part), part.record
        key = (name, key, *[t.shape for t in given])
        if key not in shape.known.functions:
            function, expected = self._compile(part, name, plain, given)
            if function is not None:
                shape.known.functions[key] = function
            return expected
        compiled = shape.known.functions[key]
        record.add(compiled.done)
        return run(compiled.function, [*_plain(given), *shape.tensors()])

    def _compile(
        self, part: Slice, name: str, plain: Function, given: tuple[Tensor, ...], *, late: int = 0, first: int = 0
    ) -> tuple[CompiledFunction | None, Outputs]:
        """The compiled function, if it can be, and what the uncompiled one finds.

        Args:
            part: The slice.
            name: What is computed.
            plain: The function.
            given: Its tensors.
            late: How many of these, the first ones, are stand-ins for what comes later; 0: it is one function.
            first: How many of the outputs come before.

        Returns:
            Both.
        """
        session, snapshot, shape = self._session, part.snapshot, self._shape(part)
        done = Record(needs_shared=part.record.needs_shared, needs_grad_mode=part.record.needs_grad_mode)

        def traced(*tensors: Tensor) -> Outputs:
            parts = iter(tensors[len(given) :])
            shared, initial = ([next(parts) for _ in some] for some in (snapshot.shared, snapshot.initial))
            arguments = _Arguments({name: next(parts) for name in shape.constants})
            inside = replace(
                part,
                snapshot=replace(snapshot, shared=shared, initial=initial, constants=arguments, differentiates=False),
                record=done,
                batch=shape.structure.unflatten(list(parts)),
                writes={},
            )
            return plain(inside, *tensors[: len(given)])

        # What it costs to look at a function whose arguments are not there yet is not what the call has done.
        looked = replace(part, record=replace(part.record)) if late else part
        expected = plain(looked, *given)

        def nearby(number: int) -> Outputs:  # not of numbers, such as that of the step
            others = (nudged(t, number) if t.ndim else t for t in given)
            return plain(replace(part, record=replace(part.record)), *others)

        if others := objects(part.batch):
            session.compiler.give_up(f"a task holds a {type(others[0]).__name__}, which is no tensor.")
        elif snapshot.replay.draws:
            session.compiler.give_up("a loss draws random numbers (dropout), which are replayed uncompiled.")
        elif part.tasks > 1 and not looked.record.is_vectorised:
            session.compiler.give_up("the model cannot be vectorised over tasks. Use chunk_size=1 to compile it.")
        elif looked.record.mode != "finite-difference" and not self._keeps_what_is_recomputed(part):
            what = f"the {name.partition(' ')[0]} of the {part.role} loss, {part.tasks} at once"
            tensors = [*_plain(given), *shape.tensors()]
            if late:
                both = session.compile_in_two(traced, tensors, range(late), first, Expected(expected, nearby), what)
            else:
                function = session.compile(traced, tensors, Expected(expected, nearby), what)
                both = None if function is None else (function, None)
            if both is not None:
                return CompiledFunction(*both, done), expected
        return None, expected

    def _shape(self, part: Slice) -> _Made:
        if part not in self._known:
            self._known[part] = _Made(self._session, part)
        return self._known[part]


class _Arguments(Constants):
    """Buffers that are arguments of the traced function."""

    def fresh(self) -> dict[str, Tensor]:
        return dict(self.buffers)


class _Made:
    """What a slice is made of, and the functions that are compiled for such."""

    def __init__(self, session: Session, part: Slice) -> None:
        leaves, self.structure = tree_flatten(part.batch)
        self._snapshot, self._frozen, self._data = part.snapshot, session.frozen, _plain(leaves)
        self._own = _plain([*part.snapshot.shared, *part.snapshot.initial])
        self.constants = (*session.frozen, *part.snapshot.constants.buffers)
        sizes = [(t.shape, t.dtype, t.device) for t in (*leaves, *part.snapshot.constants.buffers.values())]
        self.known = session.functions[(session.state, part.role, part.tasks, self.structure, *sizes)]

    def tensors(self) -> list[Tensor]:
        """All of them but the function's own arguments; buffers that nothing has written to."""
        if not self.constants:
            return [*self._own, *self._data]
        constants = self._frozen | self._snapshot.constants.fresh()
        return [*self._own, *_plain(constants[name] for name in self.constants), *self._data]


def _stand_in(like: Tensor) -> Tensor:
    """A vector of no particular values, which takes nothing from a random generator."""
    return torch.linspace(-1.0, 1.0, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)


def _plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().contiguous() if t.layout is torch.strided else t.detach() for t in tensors]


@dataclass
class _Product:
    """H of a slice at one point."""

    derivatives: Compiled
    part: Slice
    phi: Tensor
    step: int
    gradient: Gradient | None
    then: Callable[..., Outputs] | None = None
    """What makes a product of w alone from what the gradient has left."""
    mode: ClassVar[str] = "reverse-over-reverse"

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Product`."""
        if self.then is not None and not mixed:
            (product,) = self.then(w)
            assert product is not None
            return product if into is None else into.add(product, self.part), None
        product, by_shared = self.derivatives.product(self.part, self.phi, self.step, w, mixed=mixed)
        return product if into is None else into.add(product, self.part), by_shared
