"""Functions of many tokens that are evaluated a slice of them at a time, in derivatives of every order.

A block of `imaml.recompute` for each slice would do the same, but autograd holds up to three matrices where it adds up
the gradients of what all slices share. Here they are added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Given = Sequence[Tensor | None]
Factors = list[tuple[Tensor, Tensor]]
"""The sum of a.mT @ b over the pairs (a, b), which is added to a total without a matrix of its own."""
Compute = Callable[..., Sequence[Tensor | Factors | None]]


@dataclass(frozen=True)
class Sliced:
    """A function of tensors `(rows, tokens, ...)`, of which a slice has its own, and `(rows, ...)`, which all share.

    Rows, which are tasks that are vectorised, and tokens are independent. Derivatives need nothing but the inputs.
    """

    compute: Compute
    """The function, of one slice."""
    inputs: tuple[bool, ...]
    """Which inputs have tokens."""
    outputs: tuple[bool, ...]
    """Which outputs have tokens; the others are summed over the slices."""
    size: int
    """Tokens of a slice."""
    pullbacks: tuple[Compute, ...] = ()
    """The pullback of `compute`, the pullback of that, and so on, as far as they are known; autograd takes the others.

    Each takes which gradients are wanted, the inputs, and cotangents of the outputs, which may be None.
    """
    of: Sliced | None = None
    """What this is the pullback of."""
    wanted: tuple[bool, ...] = ()
    """Which gradients of that one are computed."""

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = _Evaluated.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return found

    def pullback(self, wanted: Sequence[bool]) -> Sliced:
        """The gradients by the inputs: a function of these and of cotangents of the outputs."""
        own, *further = self.pullbacks or (partial(_by_autograd, self),)
        return Sliced(
            compute=partial(own, wanted),
            inputs=self.inputs + self.outputs,
            outputs=self.inputs,
            size=self.size,
            pullbacks=tuple(further),
            of=self,
            wanted=tuple(wanted),
        )

    def pushed(self, tensors: Given, tangents: Given) -> Sequence[Tensor | None]:
        """The derivative of the outputs along tangents of the inputs, by pullbacks alone."""
        able = [t is not None and t.is_floating_point() for t in tensors]
        if self.of is None:
            # The pullback is linear in the cotangents, so that its own pullback, to them, of the tangents is this.
            cotangents = [None] * len(self.outputs)
            twice = self.pullback(able).pullback([False] * len(able) + [True] * len(cotangents))
            return twice(*tensors, *cotangents, *tangents)[len(able) :]
        # A gradient's derivative is symmetric, and so its pullback; and the gradient is linear in its cotangents.
        count = len(self.of.inputs)
        found: Sequence[Tensor | None] = [None] * count
        if any(t is not None for t in tangents[:count]):
            twice = self.of.pullback(able[:count]).pullback(self.wanted + (False,) * len(self.of.outputs))
            found = twice(*tensors, *tangents[:count])[:count]
        if any(t is not None for t in tangents[count:]):
            others = self(*tensors[:count], *tangents[count:])
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, others, strict=True)]
        return found

    def evaluated(self, tensors: Given) -> list[Tensor | None]:
        """The outputs, from one slice after the other."""
        tokens = next(t.shape[1] for t, own in zip(tensors, self.inputs, strict=True) if own and t is not None)
        parts: list[list[Any]] = [[] for _ in self.outputs]
        for start in range(0, max(tokens, 1), self.size):
            mine = [
                t if t is None or not own else t[:, start : start + self.size]
                for t, own in zip(tensors, self.inputs, strict=True)
            ]
            for part, output, own in zip(parts, self.compute(*mine), self.outputs, strict=True):
                if output is not None and own:
                    part.append(output)
                elif output is not None:
                    part[:] = [_added(output, *part)]
        found = [
            torch.cat(p, 1) if p and own else p[0] if p else None for p, own in zip(parts, self.outputs, strict=True)
        ]
        if self.of is not None:  # a gradient has the dtype of what it is by
            found = [y if y is None or t is None else y.to(t.dtype) for y, t in zip(found, tensors, strict=False)]
        return found


def _added(found: Tensor | Factors, total: Tensor | None = None) -> Tensor:
    """The sum of both, in the total where that can be; in float32 or better."""
    if isinstance(found, Tensor):
        found = found.to(_wide(found))
        return found if total is None else total + found
    for a, b in found:
        if total is None:
            total = (a.mT @ b).to(_wide(a))
        elif total.dtype == a.dtype:
            total.baddbmm_(a.mT, b)
        else:
            total.add_(a.mT @ b)
    assert total is not None
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_autograd(of: Sliced, wanted: Sequence[bool], *tensors: Tensor | None) -> list[Tensor | None]:
    """The pullback of a function that has none in closed form."""
    again, count = torch.is_grad_enabled(), len(of.inputs)  # whether this is differentiated itself
    with torch.enable_grad():
        xs = [
            t if t is None or not wants or again and t.requires_grad else t.detach().requires_grad_()
            for t, wants in zip(tensors, wanted, strict=False)
        ]
        ys = [_added(y) if isinstance(y, list) else y for y in of.compute(*xs)]
        pairs = [
            (y, c)
            for y, c in zip(ys, tensors[count:], strict=True)
            if y is not None and c is not None and y.requires_grad
        ]
        at = {i: x for i, (x, wants) in enumerate(zip(xs, wanted, strict=False)) if wants and x is not None}
        found: list[Tensor | None] = [None] * count
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, [*at.values()], cotangents, create_graph=again, allow_unused=True)
            for i, grad in zip(at, grads, strict=True):
                found[i] = grad
    return found


def _exact(tensors: Given) -> AbstractContextManager[object]:
    """Within it autocast is off: what it would change has been cast, and a backward pass may run outside of it."""
    kind = next(t.device.type for t in tensors if t is not None)
    able = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if able else nullcontext()


class _Evaluated(torch.autograd.Function):
    """What `Sliced` computes. Its backward and its jvp are `Sliced` too, so that every order is computed in slices."""

    @staticmethod
    def forward(function: Sliced, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        with _exact(tensors):
            return tuple(function.evaluated(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        pullback = ctx.function.pullback(ctx.needs_input_grad[1:])
        return None, *pullback(*ctx.saved_tensors, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(ctx.function.pushed(ctx.saved_tensors, tangents))

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], function: Sliced, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        size = info.batch_size

        def stacked(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

        given = list(zip(tensors, dims[1:], function.inputs, strict=True))
        found: list[Tensor | None]
        if all(function.outputs) and all(own or dim is None for _, dim, own in given):
            # What all share is shared by the tasks too: the tokens of all of them are tokens of one.
            folded = [
                t if t is None or not own else stacked(t, dim).transpose(0, 1).flatten(1, 2) for t, dim, own in given
            ]
            found = [y if y is None else y.unflatten(1, (size, -1)).transpose(0, 1) for y in function(*folded)]
        else:  # the rows of all tasks are rows of one
            rows = [t if t is None else stacked(t, dim).flatten(0, 1) for t, dim, _ in given]
            found = [y if y is None else y.unflatten(0, (size, -1)) for y in function(*rows)]
        return tuple(found), tuple(None if y is None else 0 for y in found)
