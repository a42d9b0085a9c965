"""Meta-gradients in JAX, as a good user would write them: of one task, and their mean over tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Batch = tuple[Array, Array]
Loss = Callable[[Any, Batch], Array]
OfTask = Callable[[Any, Batch, Batch], Any]
"""Of the parameters and a task's support and query set, the task's meta-gradient."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    lr: float
    steps: int
    regularization: float
    solver_steps: int
    unrolled: bool
    """Whether the inner steps are traced one by one; else they are a scan."""


def through_the_loop(loss: Loss, settings: Settings) -> OfTask:
    """`grad` through the inner loop."""

    def adapted_loss(theta: Any, support: Batch, query: Batch) -> Array:
        def step(phi: Any, _: None) -> tuple[Any, None]:
            return _moved(phi, jax.grad(loss)(phi, support), settings.lr), None

        return loss(lax.scan(step, theta, length=settings.steps, unroll=_unroll(settings))[0], query)

    return jax.grad(adapted_loss)


def by_tangents(loss: Loss, settings: Settings) -> OfTask:
    """The reverse sweep written out over the kept states, each product forward-over-reverse: no graph of a step."""

    def of_task(theta: Any, support: Batch, query: Batch) -> Any:
        def gradient(phi: Any) -> Any:
            return jax.grad(loss)(phi, support)

        def step(phi: Any, _: None) -> tuple[Any, Any]:
            return _moved(phi, gradient(phi), settings.lr), phi

        def back(v: Any, phi: Any) -> tuple[Any, None]:
            return _moved(v, jax.jvp(gradient, (phi,), (v,))[1], settings.lr), None

        phi, states = lax.scan(step, theta, length=settings.steps)
        return lax.scan(back, jax.grad(loss)(phi, query), states, reverse=True)[0]

    return of_task


def implicit(loss: Loss, settings: Settings) -> OfTask:
    """(I + H / lambda) x = v by `solver_steps` of conjugate gradients, after an inner loop with the proximal term."""

    def of_task(theta: Any, support: Batch, query: Batch) -> Any:
        def gradient(phi: Any) -> Any:
            return jax.grad(loss)(phi, support)

        def step(phi: Any, _: None) -> tuple[Any, None]:
            pulled = jax.tree.map(lambda g, p, s: g + settings.regularization * (p - s), gradient(phi), phi, theta)
            return _moved(phi, pulled, settings.lr), None

        def solve(state: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
            x, residual, direction = state
            product = jax.jvp(gradient, (phi,), (direction,))[1]
            product = jax.tree.map(lambda d, h: d + h / settings.regularization, direction, product)
            before = _dot(residual, residual)
            size = before / _dot(direction, product)
            x, residual = _moved(x, direction, -size), _moved(residual, product, size)
            return (x, residual, _moved(residual, direction, -_dot(residual, residual) / before)), None

        phi, _ = lax.scan(step, theta, length=settings.steps)
        v = jax.grad(loss)(phi, query)
        return lax.scan(solve, (jax.tree.map(jnp.zeros_like, v), v, v), length=settings.solver_steps)[0][0]

    return of_task


def vectorised(of_task: OfTask) -> OfTask:
    """The mean over tasks, all at once."""

    def mean(theta: Any, support: Batch, query: Batch) -> Any:
        return jax.tree.map(lambda g: g.mean(0), jax.vmap(of_task, (None, 0, 0))(theta, support, query))

    return mean


def one_by_one(of_task: OfTask) -> OfTask:
    """The mean over tasks, summed by a scan."""

    def mean(theta: Any, support: Batch, query: Batch) -> Any:
        def summed(total: Any, task: tuple[Batch, Batch]) -> tuple[Any, None]:
            return jax.tree.map(add, total, of_task(theta, *task)), None

        total, _ = lax.scan(summed, jax.tree.map(jnp.zeros_like, theta), (support, query))
        return jax.tree.map(lambda g: g / len(support[0]), total)

    return mean


def _moved(x: Any, direction: Any, size: Any) -> Any:
    return jax.tree.map(lambda a, b: a - size * b, x, direction)


def _dot(a: Any, b: Any) -> Array:
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)), start=jnp.zeros(()))


def _unroll(settings: Settings) -> int:
    return settings.steps if settings.unrolled else 1
