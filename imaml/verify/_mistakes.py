"""Meta-gradients with a known mistake in them, computed the plain way, as suspects for a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml._leaves import wrapped
from imaml._minibatches import Minibatches, batch_at
from imaml._torch import load_forward_ad, tree_map
from imaml.verify._reference import Reference, Values, flat

MOST_TRUNCATED = 10
Suspect = tuple[str, Callable[[], Tensor]]
"""A cause in words, and the vector that it leads to."""


def unrolled(
    reference: Reference,
    *,
    steps: int | None = None,
    differentiated: int | None = None,
    second_order: bool = True,
    damping: float = 1.0,
    fixed_centre: bool = False,
    zipped: bool = False,
    first_batch: bool = False,
) -> Tensor:
    """The derivative through the graph of the inner loop, right by default.

    Args:
        reference: The problem.
        steps: Inner steps.
        differentiated: How many of the last are differentiated; None: all.
        second_order: Whether the inner gradients are differentiated.
        damping: Factor of the proximal term.
        fixed_centre: Whether the centre of the proximal term is a constant.
        zipped: Whether gradients of used parameters update the first parameters of the same shapes instead.
        first_batch: Whether the first of the minibatches serves in every step.

    Returns:
        The meta-gradient as one vector.
    """
    start = {n: t.clone().requires_grad_() for n, t in reference.values().items()}
    centre = {n: t.detach() for n, t in start.items()} if fixed_centre else start
    names, losses, steps = reference.adapted, [], reference.steps if steps is None else steps
    with torch.enable_grad():
        for task in reference.tasks:
            values: Values = dict(start)
            for step in range(steps):
                if differentiated is not None and step == steps - differentiated:
                    values |= {n: start[n] + (values[n] - start[n]).detach() for n in names}
                loss = reference.loss(values, task.support, step=0 if first_batch else step)
                for name in names:
                    weight = damping * reference.damping[name] / 2
                    loss = loss + weight * (values[name] - centre[name]).square().sum() if weight else loss
                wanted = [values[n] for n in names]
                grads = torch.autograd.grad(loss, wanted, create_graph=second_order, allow_unused=True)
                updates = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
                if zipped:
                    updates = {
                        n: g for n, g in zip(names, updates.values(), strict=False) if g.shape == values[n].shape
                    }
                values |= {n: values[n] - reference.lr * g for n, g in updates.items()}
            losses.append(reference.loss(values, task.query, outer=True))
        total = torch.stack(losses).mean()
    grads = torch.autograd.grad(total, list(start.values()), allow_unused=True, materialize_grads=True)
    return flat(dict(zip(start, grads, strict=True)))


def swept(
    reference: Reference,
    *,
    query_hessian: bool = False,
    shift: int = 0,
    batch_shift: int = 0,
    sign: float = 1.0,
    product: Callable[..., Values] | None = None,
) -> Tensor:
    """The reverse sweep with a Hessian of the wrong loss, at the wrong state, of the wrong sign, or a wrong product.

    Args:
        reference: The problem.
        query_hessian: Take the Hessian of the query loss.
        shift: Take it so many states later (at most the last) or earlier (at least the first).
        batch_shift: Take it of the minibatch of so many steps later, or earlier, likewise.
        sign: Factor of the Hessian.
        product: Called like `hessian_product` in its stead.

    Returns:
        The meta-gradient as one vector.
    """
    start, total = reference.values(), torch.zeros(())
    for task in reference.tasks:
        states = [start]
        one = replace(reference, tasks=[task])
        for k in range(reference.steps):
            states.append(_step(one, states[-1], start, batch_at(task.support, k)))
        a = reference.gradient(lambda v, task=task: reference.loss(v, task.query, outer=True), states[-1])  # type: ignore[misc]
        a = {n: t.clone() for n, t in a.items()}
        pulled = {n: torch.zeros_like(t) for n, t in a.items()}
        for k in reversed(range(reference.steps)):
            at = states[min(max(k + shift, 0), reference.steps)]
            w = {n: -reference.lr * a[n] for n in reference.adapted}
            support = batch_at(task.support, min(max(k + batch_shift, 0), reference.steps - 1))
            curved = (product or hessian_product)(reference, at, w, task.query if query_hessian else support)
            for n in a:
                a[n] += sign * curved[n]
            for n, weight in reference.damping.items():
                a[n] += weight * w[n]
                pulled[n] -= weight * w[n]
        total = total.to(flat(a)) + flat(a) + flat(pulled)
    return total / len(reference.tasks)


def _step(one: Reference, values: Values, centre: Values, batch: Any) -> Values:
    grads = one.gradient(lambda v: one.inner_loss(v, centre, batch), values)
    return values | {n: values[n] - one.lr * grads[n] for n in one.adapted}


def hessian_product(reference: Reference, values: Values, w: Values, batch: Any) -> Values:
    """The derivative of (adapted gradient)' w by every parameter."""

    def slope(leaves: Values) -> Tensor:
        names = reference.adapted
        wanted = [leaves[n] for n in names]
        loss = reference.loss(leaves, batch)
        grads = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True, allow_unused=True)
        terms = [(g * w[n]).sum() for n, g in zip(names, grads, strict=True)]
        return torch.stack(terms).sum() + 0 * sum(t.sum() for t in leaves.values())

    return reference.gradient(slope, values)


def reverse_over_forward(reference: Reference, values: Values, w: Values, batch: Any) -> Values:
    """`grad` of `jvp`, which torch gets wrong for affine normalisation layers."""
    load_forward_ad()

    def slope(leaves: Values) -> Tensor:
        adapted = {n: leaves[n] for n in reference.adapted}
        tangents = {n: w[n] for n in reference.adapted}
        slope: Tensor = torch.func.jvp(lambda p: reference.loss(leaves | p, batch), (adapted,), (tangents,))[1]
        return slope

    product: Values = torch.func.grad(slope)(values)
    return product


def vectorised(reference: Reference) -> Tensor:
    """`grad` over `vmap` over inner `grad`, which torch gets wrong for affine normalisation layers."""
    start, names = reference.values(), reference.adapted
    seen = [_stack([batch_at(task.support, k) for task in reference.tasks]) for k in range(reference.steps)]
    query = _stack([task.query for task in reference.tasks])

    def one(values: Values, seen: Sequence[Any], query: Any) -> Tensor:
        phi = {n: values[n] for n in names}
        for support in seen:
            grads = torch.func.grad(lambda p, support=support: reference.inner_loss(values | p, values, support))(phi)
            phi = {n: phi[n] - reference.lr * grads[n] for n in names}
        return reference.loss(values | phi, query, outer=True)

    def mean(values: Values) -> Tensor:
        return torch.func.vmap(one, in_dims=(None, 0, 0))(values, seen, query).mean()

    return flat(torch.func.grad(mean)(start))


def _stack(batches: Sequence[Any]) -> Any:
    return tree_map(lambda *t: torch.stack(t), *map(wrapped, batches))


def permuted(reference: Reference, right: Tensor) -> Iterator[Suspect]:
    """The right values in the wrong places: gradients of used parameters moved onto the first parameters."""
    like = reference.values()
    blocks = list(right.split([t.numel() for t in like.values()]))
    used = [b for b in blocks if bool(b.any())]
    if len(used) == len(blocks):
        return
    joined = torch.cat([*used, right.new_zeros(len(right) - sum(map(len, used)))])
    text = "gradients of used parameters are moved onto the wrong parameters, past unused ones (fill in zeros there)"
    yield text, lambda: joined
    shapes, moved = [t.shape for t in like.values()], [torch.zeros_like(b) for b in blocks]
    for i, (block, shape) in enumerate(
        zip(used, [s for s, b in zip(shapes, blocks, strict=True) if bool(b.any())], strict=True)
    ):
        if shapes[i] == shape:
            moved[i] = block
    yield text, lambda: torch.cat(moved)


def of_maml(reference: Reference, right: Tensor | None) -> Iterator[Suspect]:
    """Mistakes in exact MAML."""
    steps, damped = reference.steps, any(reference.damping.values())
    yield "first-order: the inner gradients are not differentiated", lambda: unrolled(reference, second_order=False)
    yield "the gradient is taken at theta, before any adaptation", lambda: unrolled(reference, steps=0)
    if steps:
        yield f"one inner step too few ({steps - 1} of {steps})", lambda: unrolled(reference, steps=steps - 1)
    for last in range(1, min(steps, MOST_TRUNCATED)):
        text = f"truncated: the last {last} of {steps} inner steps alone are differentiated"
        yield text, partial(unrolled, reference, differentiated=last)
    yield f"one inner step too many ({steps + 1} for {steps})", lambda: unrolled(reference, steps=steps + 1)
    if damped:
        yield "the proximal term is missing in the inner steps", lambda: unrolled(reference, damping=0.0)
        yield "the proximal term has the wrong sign", lambda: unrolled(reference, damping=-1.0)
        text = "the proximal term is differentiated as if its centre theta were a constant"
        yield text, lambda: unrolled(reference, fixed_centre=True)
    text = "gradients of used parameters update the wrong parameters, past unused ones, in the inner loop"
    yield text, lambda: unrolled(reference, zipped=True)
    text = "the Hessian is that of the query loss, not of the support loss"
    yield text, lambda: swept(reference, query_hessian=True)
    text = "stale iterate: the Hessian of an inner step is taken at the state "
    yield text + "after it", lambda: swept(reference, shift=1)
    yield text + "before it", lambda: swept(reference, shift=-1)
    yield text + "at the end of the inner loop", lambda: swept(reference, shift=steps)
    yield text + "theta", lambda: swept(reference, shift=-steps)
    if any(isinstance(task.support, Minibatches) for task in reference.tasks):
        yield "the first minibatch serves in every inner step", lambda: unrolled(reference, first_batch=True)
        text = "the Hessian of an inner step is that of the minibatch of "
        yield text + "the step after it", lambda: swept(reference, batch_shift=1)
        yield text + "the step before it", lambda: swept(reference, batch_shift=-1)
        yield text + "the last step", lambda: swept(reference, batch_shift=steps)
        yield text + "the first step", lambda: swept(reference, batch_shift=-steps)
    yield "the Hessian has the wrong sign", lambda: swept(reference, sign=-1.0)
    text = "second derivatives through vmap between two grads, which torch gets wrong for affine normalisation layers"
    yield text, lambda: vectorised(reference)
    text = "second derivatives through grad of jvp, which torch gets wrong for affine normalisation layers"
    yield text, lambda: swept(reference, product=reverse_over_forward)
    if right is not None:
        yield from permuted(reference, right)
