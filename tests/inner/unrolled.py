"""Inner optimisers written out by name and parameter, differentiated through the whole loop by autograd."""

from collections.abc import Callable
from typing import Any

import torch

Values = dict[str, torch.Tensor]


def sgd(momentum=0.0, nesterov=False, decay=0.0):
    def update(p, g, memory, k, lr):
        g = g + decay * p
        if momentum == 0:
            return p - lr * g
        memory["b"] = g if k == 1 else momentum * memory["b"] + g
        return p - lr * (g + momentum * memory["b"] if nesterov else memory["b"])

    return update


def adam(betas=(0.9, 0.999), eps=1e-8, decay=0.0, decoupled=False, root=0.0):
    def update(p, g, memory, k, lr):
        if decoupled:
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        memory["m"] = betas[0] * memory.get("m", 0) + (1 - betas[0]) * g
        memory["v"] = betas[1] * memory.get("v", 0) + (1 - betas[1]) * g**2
        return p - lr * (memory["m"] / (1 - betas[0] ** k)) / ((memory["v"] / (1 - betas[1] ** k) + root) ** 0.5 + eps)

    return update


def rmsprop(alpha=0.99, eps=1e-8, momentum=0.0, decay=0.0, root=0.0):
    def update(p, g, memory, k, lr):
        g = g + decay * p
        memory["v"] = alpha * memory.get("v", 0) + (1 - alpha) * g**2
        memory["b"] = momentum * memory.get("b", 0) + g / ((memory["v"] + root) ** 0.5 + eps)
        return p - lr * memory["b"]

    return update


def meta_gradient(
    inner: Callable[[Values, Values, Any], torch.Tensor],
    outer: Callable[[Values, Values, Any], torch.Tensor],
    theta: Values,
    meta: Values,
    tasks: Any,
    update: Callable[..., torch.Tensor],
    steps: int,
    *,
    lr: Callable[[Values, str, int], Any],
    damping: Callable[[Values], Any] = lambda meta: 0.0,
    truncate: int | None = None,
    prepare: Callable[[Values, Values, int], Values] = lambda grads, meta, step: grads,
) -> Values:
    """Gradients of the mean outer loss for every entry of theta and meta, all of theta adapting.

    An update is of one parameter; `prepare` changes the gradients of all of them together, before it.
    """
    theta, meta = ({n: t.detach().clone().requires_grad_() for n, t in d.items()} for d in (theta, meta))
    losses = []
    for task in tasks:
        phi, memory = dict(theta), {n: {} for n in theta}
        for k in range(steps):
            if truncate is not None and k == max(0, steps - truncate):
                phi = {n: theta[n] + (t - theta[n]).detach() for n, t in phi.items()}
                memory = {n: {key: t.detach() for key, t in m.items()} for n, m in memory.items()}
            value = inner(phi, meta, task.support)
            value = value + damping(meta) / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
            grads = dict(zip(phi, torch.autograd.grad(value, list(phi.values()), create_graph=True), strict=True))
            grads = prepare(grads, meta, k)
            phi = {n: update(phi[n], grads[n], memory[n], k + 1, lr(meta, n, k)) for n in phi}
        if truncate == 0:
            phi = {n: theta[n] + (t - theta[n]).detach() for n, t in phi.items()}
        losses.append(outer(phi, meta, task.query))
    everything = theta | meta
    found = torch.autograd.grad(torch.stack(losses).mean(), list(everything.values()), materialize_grads=True)
    return dict(zip(everything, found, strict=True))
