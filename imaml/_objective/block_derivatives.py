"""Derivatives of a block of which autograd keeps the inputs alone: every order of them computes it again.

A block is a function of tensors. Reverse mode: its backward is a block too, a function of the inputs and of cotangents,
so that one graph of one block exists at a time, whatever the order. Forward mode: along tangents x' of its inputs x a
block has the outputs y with their tangents y', and its backward goes from cotangents c with tangents c' to those of the
inputs at once. In all a Hessian-vector product takes 12 passes of every block, where reverse-over-reverse takes 16.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from imaml._objective.attention import AnyAttention, MathAttention
from imaml._objective.exact import check_twice_differentiable
from imaml._objective.foreign import described, foreign_leaves, inside
from imaml._torch import (
    LACKS_SECOND_DERIVATIVE,
    is_functorch_wrapped_tensor,
    is_write_to_leaf,
    requires_grad,
    vectorised,
)

Outputs = tuple[Tensor | None, ...]
Tangents = Mapping[int, Tensor]
"""Tangents of some tensors, by position."""


class TangentsAlone:
    """Within it nobody reads gradients by leaves, but the tangents of these: a block need not hold their numbers."""

    _inside: ClassVar[_Inside]

    def __enter__(self) -> None:
        self._inside.count += 1

    def __exit__(self, *error: object) -> None:
        self._inside.count -= 1


class _Inside(threading.local):
    count = 0


TangentsAlone._inside = _Inside()


class Block(Protocol):
    """A function of tensors, which called again does the same."""

    name: str

    def __call__(self, *tensors: Tensor) -> Outputs:
        """The outputs."""
        ...

    def rewind(self) -> None:
        """Go back to the state of the world before the first call, which has failed."""
        ...


def applied(block: Block, inputs: Sequence[Tensor]) -> Outputs:
    """The outputs of a block, whose graph has its inputs alone, with their tangents where the inputs have any."""
    if any(is_functorch_wrapped_tensor(t) for t in inputs):
        return _Recompute.apply(block, *inputs)  # type: ignore[no-untyped-call, no-any-return]
    pairs = [forward_ad.unpack_dual(t) for t in inputs]
    moving = {i: pair.tangent.detach() for i, pair in enumerate(pairs) if pair.tangent is not None}
    if not moving:
        return _Recompute.apply(block, *inputs)  # type: ignore[no-untyped-call, no-any-return]
    primals = [pair.primal for pair in pairs]
    values, tangents = _pushed_forward(block, [x.detach() for x in primals], moving)
    dropped = {i for i, t in enumerate(inputs) if t.is_leaf} if TangentsAlone._inside.count else set[int]()
    along = _Along(block, tuple(moving), dropped)
    outputs = _Moved.apply(along, values, *primals, *moving.values())  # type: ignore[no-untyped-call]
    return tuple(_dual(y, t) for y, t in zip(outputs, tangents, strict=True))


def writes(name: str) -> ValueError:
    """A block changes an input."""
    return ValueError(
        f"{name} is recomputed, and changes a tensor in place that it is given. Expected a function of its arguments: "
        "use e.g. x = x + 1 for x.add_(1)."
    )


class _Recompute(torch.autograd.Function):
    """A block, of which autograd keeps the inputs. Its backward is a block too, so that every order recomputes."""

    @staticmethod
    def forward(block: Block, *tensors: Tensor) -> Outputs:
        with AnyAttention():
            if isinstance(block, _Pullback):
                given = {id(t) for t in tensors}  # autograd saves no input that is an output too
                return tuple(y.view_as(y) if y is not None and id(y) in given else y for y in block(*tensors))
            # With a graph, which ends with this function: an activation that leaves the block by another way than its
            # outputs, through a hook or an attribute, leads to these leaves, and a loss that reads it is refused.
            with torch.enable_grad():
                own = [inside(t, block.name) if requires_grad(t) else t for t in tensors]
                try:
                    found: Outputs = block(*own)
                except RuntimeError as error:
                    if is_write_to_leaf(error):
                        raise writes(block.name) from error
                    raise
            return tuple(None if y is None else y.detach() for y in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.block, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*_whole(output))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (1 + len(tensors))
        given = [i for i, c in enumerate(cotangents) if c is not None]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        if given and wanted:
            pullback = _Pullback(ctx.block, len(tensors), wanted, given)
            found = applied(pullback, [*tensors, *(c for c in cotangents if c is not None)])
            for i, grad in zip(wanted, found, strict=True):
                grads[1 + i] = grad
        return tuple(grads)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], block: Block, *tensors: Tensor
    ) -> tuple[Outputs, tuple[int | None, ...]]:
        found = applied(_Batched(block, dims[1:], info.batch_size), tensors)
        return found, tuple(None if y is None else 0 for y in found)


@dataclass(frozen=True)
class _Along:
    """A block, and a direction."""

    block: Block
    moving: tuple[int, ...]
    """Positions of the inputs that have a tangent."""
    dropped: Set[int]
    """Positions of the inputs whose gradient is not read, but its tangent."""


class _Moved(torch.autograd.Function):
    """A block whose outputs are known, with tangents of some inputs. Its backward is along these."""

    @staticmethod
    def forward(along: _Along, values: Outputs, *tensors: Tensor) -> Outputs:
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.along, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*_whole(output))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        along, tensors = ctx.along, ctx.saved_tensors
        count = len(tensors) - len(along.moving)
        xs, moving = tensors[:count], dict(zip(along.moving, tensors[count:], strict=True))
        grads: list[Tensor | None] = [None] * (2 + len(tensors))
        pairs = {i: forward_ad.unpack_dual(c) for i, c in enumerate(cotangents) if c is not None}
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[2 : 2 + count]) if needs]
        if pairs and wanted:
            weights = {i: pair.primal.detach() for i, pair in pairs.items()}
            turns = {i: pair.tangent.detach() for i, pair in pairs.items() if pair.tangent is not None}
            values, tangents = _pulled_along(along, xs, moving, wanted, weights, turns)
            for i, value, tangent in zip(wanted, values, tangents, strict=True):
                # Any number does for a gradient that is not read, and its tangent is one that is there.
                grads[2 + i] = _dual(tangent if i in along.dropped else value, tangent)
        return tuple(grads)


def _whole(outputs: Outputs) -> list[Tensor]:
    """Outputs that have no derivative."""
    return [y for y in outputs if y is not None and not (y.is_floating_point() or y.is_complex())]


def _dual(value: Tensor | None, tangent: Tensor | None) -> Tensor | None:
    if value is None or tangent is None:
        return value
    if 0 in value.stride():  # an expanded one: a tangent lies as its primal does, and is written to
        value = value.contiguous()
    found: Tensor = forward_ad.make_dual(value, tangent)
    return found


def _pushed_forward(block: Block, xs: Sequence[Tensor], moving: Tangents) -> tuple[Outputs, Outputs]:
    """A block's outputs and their tangents."""
    with torch.no_grad(), MathAttention():
        try:
            ys = block(*(_dual(x, moving.get(i)) for i, x in enumerate(xs)))  # type: ignore[arg-type]
            pairs = [(None, None) if y is None else forward_ad.unpack_dual(y) for y in ys]
            values, tangents = zip(*pairs, strict=True) if pairs else ((), ())
            return values, tangents
        except RuntimeError as error:
            if not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
                raise
    block.rewind()
    return _pushed_by_reverse(block, xs, moving)


def _pushed_by_reverse(block: Block, xs: Sequence[Tensor], moving: Tangents) -> tuple[Outputs, Outputs]:
    """The result of `_pushed_forward` where an operation has no forward mode: J x' is that of <x', J' u> by u."""
    with torch.enable_grad(), MathAttention():
        xs = [x.detach().requires_grad_(i in moving) for i, x in enumerate(xs)]
        ys = block(*xs)
        known = [i for i, y in enumerate(ys) if y is not None and y.requires_grad]
        weights = [torch.zeros_like(y, requires_grad=True) for i in known if (y := ys[i]) is not None]
        tangents: list[Tensor | None] = [None] * len(ys)
        if known:
            at, leaves = [ys[i] for i in known], [xs[i] for i in moving]
            pulled = torch.autograd.grad(at, leaves, weights, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
            pairs = [(p, t) for p, t in zip(pulled, moving.values(), strict=True) if p is not None and p.requires_grad]
            check_twice_differentiable([p.grad_fn for p, _ in pairs])
            if pairs:
                ends, along = zip(*pairs, strict=True)
                found = torch.autograd.grad(ends, weights, along, allow_unused=True)
                for i, tangent in zip(known, found, strict=True):
                    tangents[i] = tangent
    return tuple(None if y is None else y.detach() for y in ys), tuple(tangents)


def _pulled_along(
    along: _Along, xs: Sequence[Tensor], moving: Tangents, wanted: Sequence[int], weights: Tangents, turns: Tangents
) -> tuple[Outputs, Outputs]:
    """J' c of the wanted inputs, and its derivative along tangents of inputs and cotangents.

    By double backward, whatever the block's operations: d/de J(x + e x')' (c + e c') is the derivative by x of
    <c', f(x)> + <x', J(x)' c>.

    Args:
        along: f, and which gradients are not read: these are left out.
        xs: x.
        moving: x'.
        wanted: Positions of the inputs in question.
        weights: c, by the position of the output.
        turns: c' likewise.

    Returns:
        The cotangents of the wanted inputs, and their tangents.
    """
    none: Outputs = (None,) * len(wanted)
    leaves = sorted({*wanted, *moving})
    with torch.enable_grad(), MathAttention():
        xs = [x.detach().requires_grad_(i in leaves) for i, x in enumerate(xs)]
        ys = {i: y for i, y in enumerate(along.block(*xs)) if i in weights and y is not None and y.requires_grad}
        if not ys:
            return none, none
        cotangents = [weights[i] for i in ys]
        pulled = torch.autograd.grad(
            list(ys.values()), [xs[i] for i in leaves], cotangents, create_graph=True, allow_unused=True
        )
        by = dict(zip(leaves, pulled, strict=True))
        values = tuple(None if (g := by[i]) is None or i in along.dropped else g.detach() for i in wanted)
        pairs = [(g, t) for i, t in moving.items() if (g := by[i]) is not None and g.requires_grad]
        pairs += [(y, turns[i]) for i, y in ys.items() if i in turns]
        check_twice_differentiable([g.grad_fn for g, _ in pairs])
        if not pairs:
            return values, none
        # Edges, without the numbers of gradients by the block's parameters, which would stand beside their product.
        ends, directions = [get_gradient_edge(g) for g, _ in pairs], [t for _, t in pairs]
        del pulled, by, ys, pairs, g
        tangents = torch.autograd.grad(ends, [xs[i] for i in wanted], directions, allow_unused=True)
    return values, tangents


class _Pullback:
    """The cotangents of a block's inputs, for those of its outputs: a function of both, to be recomputed itself."""

    def __init__(self, block: Block, inputs: int, wanted: Sequence[int], given: Sequence[int]) -> None:
        self._block, self._inputs, self._wanted, self._given = block, inputs, wanted, given
        self.name = block.name

    def __call__(self, *tensors: Tensor) -> Outputs:
        again = torch.is_grad_enabled()  # whether the pullback is differentiated itself
        xs, cotangents = list(tensors[: self._inputs]), tensors[self._inputs :]
        with torch.enable_grad(), MathAttention() if again else nullcontext():
            for i in self._wanted:
                if not (again and xs[i].requires_grad):
                    xs[i] = xs[i].detach().requires_grad_()
            ys = self._block(*xs)
            at = [ys[i] for i in self._given]
            pairs = [(y, c) for y, c in zip(at, cotangents, strict=True) if y is not None and y.requires_grad]
            if not pairs:
                return (None,) * len(self._wanted)
            outputs, weights = zip(*pairs, strict=True)
            if not again:
                self._check_own(outputs, xs)
            wanted = [xs[i] for i in self._wanted]
            found = torch.autograd.grad(outputs, wanted, weights, create_graph=again, allow_unused=True)
            if again:  # nobody sees the graph of a block from outside
                check_twice_differentiable([g.grad_fn for g in found if g is not None])
            return found

    def rewind(self) -> None:
        """See `Block`; this one is never the first to call its own."""

    def _check_own(self, outputs: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        def evaluated() -> list[Tensor]:
            return [y for y in self._block(*xs) if y is not None]

        if foreign := foreign_leaves(outputs, xs, evaluated):
            raise ValueError(
                f"{self.name} is recomputed, and uses what requires grad and would get no gradient: "
                f"{described(foreign, {})}. Expected a function of its arguments and of modules that it holds: pass "
                "the tensor as an argument."
            )


class _Batched:
    """A block of every row, by `vmap`."""

    def __init__(self, block: Block, dims: Sequence[int | None], size: int) -> None:
        self._block, self._dims, self._size = block, dims, size
        self.name = block.name

    def __call__(self, *tensors: Tensor) -> Outputs:
        rows = [t.movedim(d, 0) for t, d in zip(tensors, self._dims, strict=True) if d is not None]
        missing: list[bool] = []

        def one(rows: list[Tensor]) -> list[Tensor]:
            own = iter(rows)
            found = self._block(*(t if d is None else next(own) for t, d in zip(tensors, self._dims, strict=True)))
            missing[:] = [y is None for y in found]
            return [y for y in found if y is not None]

        with MathAttention():
            outputs = iter(vectorised(one, rows, self._size))
        return tuple(None if is_missing else next(outputs) for is_missing in missing)

    def rewind(self) -> None:
        """See `Block`."""
        self._block.rewind()
