"""Outer losses along an inner loop, and of theta itself, by plain torch: one graph of everything, and one backward."""

import torch


def unrolled(support, outer, adapted, others, tasks, *, steps, lr, weights, damping=None, momentum=None, first=0):
    """The mean over tasks of sum_k w_k outer(phi_k, theta, others, query), and its gradient by adapted and others.

    `lr(others, step)`, `damping(others)` and `weights(others)`, a dictionary by step, are functions of the leaves.
    Steps before `first` are taken, and not differentiated.
    """
    theta, others = ({n: t.detach().clone().requires_grad_() for n, t in d.items()} for d in (adapted, others))
    totals, losses = [], []
    for batch, query in tasks:
        phi, velocity = dict(theta), {n: torch.zeros_like(t) for n, t in theta.items()}
        terms = []
        for step in range(steps + 1):
            if step == first:
                phi = {n: theta[n] + (t - theta[n]).detach() for n, t in phi.items()}
                velocity = {n: t.detach() for n, t in velocity.items()}
            terms.append(outer(phi, theta, others, query))
            if step == steps:
                break
            value = support(phi, others, batch)
            if damping is not None:
                value = value + damping(others) / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
            gradients = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            if momentum is not None:
                velocity = {n: momentum * velocity[n] + g for n, g in zip(phi, gradients, strict=True)}
                gradients = velocity.values()
            phi = {n: t - lr(others, step) * g for (n, t), g in zip(phi.items(), gradients, strict=True)}
        own = weights(others)
        totals.append(sum(w * terms[k] for k, w in own.items()))
        losses.append(torch.stack([terms[k] for k in sorted(own)]).detach())
    total, everything = torch.stack(totals).mean(), theta | others
    found = torch.autograd.grad(total, list(everything.values()), materialize_grads=True)
    return total.detach(), dict(zip(everything, found, strict=True)), torch.stack(losses, -1)
