"""Gradients through the inner loop that are wrong by what PyTorch does, or lets pass, in silence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import grad

from imaml import Objective, Task
from tests.zoo.problems import MAML, Setup, batch_norm, layer_norm, mlp, quantised, unused
from tests.zoo.right import Function, Loss, by_name, flatten, gradient, mean_over_tasks, states, unrolled
from tests.zoo.specimen import specimen


@specimen(MAML, mlp, story="A .detach() or .data left in the head of the query forward pass.")
def head_detached(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        gradients = unrolled(s)(objective, tasks)
        head = list(gradients)[-1]
        return gradients | {head: torch.zeros_like(gradients[head])}

    return function


def _named_leaves(objective: Objective) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in objective.parameters().items()}


@specimen(
    MAML,
    unused,
    story="allow_unused=True, then inner updates zipped with the gradients not None.",
    cause="wrong parameters",
)
def inner_updates_misaligned(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        theta, total = _named_leaves(objective), 0.0
        for task in tasks:
            phi = dict(theta)
            for _ in range(s.steps):
                loss, _ = objective.evaluate(phi, task.support)
                grads = grad(loss, list(phi.values()), create_graph=True, allow_unused=True)
                for name, g in zip(phi, [g for g in grads if g is not None], strict=False):
                    phi[name] = phi[name] - s.lr * g
            total = total + objective.evaluate(phi, task.query)[0] / len(list(tasks))
        return dict(zip(theta, grad(total, list(theta.values()), materialize_grads=True), strict=True))

    return function


@specimen(MAML, unused, story="Gradients not None handed to the parameters in order.", cause="wrong parameters")
def gradients_misaligned(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        gradients = unrolled(s)(objective, tasks)
        used = [g for g in gradients.values() if g.any()]
        used += [torch.zeros_like(g) for g in gradients.values() if not g.any()]
        return dict(zip(gradients, used, strict=True))

    return function


@specimen(MAML, layer_norm, story="The torch.func recipe: grad of the mean over vmap of an inner grad.", cause="vmap")
def vmap_between_the_derivatives(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        loss, theta = flatten(objective)
        (xs, ys), (xq, yq) = ([torch.stack(t) for t in zip(*sets, strict=True)] for sets in _sets(tasks))

        def of_task(theta: Tensor, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
            phi = theta
            for _ in range(s.steps):
                phi = phi - s.lr * torch.func.grad(loss)(phi, (xs, ys))
            return loss(phi, (xq, yq))

        def mean(theta: Tensor) -> Tensor:
            return torch.func.vmap(of_task, (None, 0, 0, 0, 0))(theta, xs, ys, xq, yq).mean()

        return by_name(objective, torch.func.grad(mean)(theta))

    return function


@specimen(MAML, quantised, story="Inside vmap no tensor seems to require grad, and a model takes its other branch.")
def vmap_of_a_model_that_asks(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        (xs, ys), (xq, yq) = ([torch.stack(t) for t in zip(*sets, strict=True)] for sets in _sets(tasks))
        count, theta = len(xs), _named_leaves(objective)

        def losses(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            def one(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return torch.nn.functional.mse_loss(torch.func.functional_call(objective.model, phi, (x,)), y)

            return torch.func.vmap(one)(phi, x, y)

        phi = {n: p.expand(count, *p.shape) for n, p in theta.items()}
        for _ in range(s.steps):
            grads = grad(losses(phi, xs, ys).sum(), list(phi.values()), create_graph=True)
            phi = {n: p - s.lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        found = grad(losses(phi, xq, yq).mean(), list(theta.values()), materialize_grads=True)
        return dict(zip(theta, found, strict=True))

    return function


def _sets(tasks: Iterable[Task]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    return [task.support for task in tasks], [task.query for task in tasks]


@specimen(MAML, batch_norm, story="Hessian products as the gradient of a directional derivative.", cause="jvp")
@mean_over_tasks
def reverse_over_forward(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    *visited, phi = states(loss, theta, task.support, s)
    a = gradient(loss, phi, task.query)
    for state in reversed(visited):

        def slope(x: Tensor, a: Tensor = a) -> Tensor:
            return torch.func.jvp(lambda x: loss(x, task.support), (x,), (a,))[1]

        a = a - s.lr * torch.func.grad(slope)(state)
    return a
