"""Wrong gradients through the inner loop."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd import grad

from imaml import Objective, Task
from tests.zoo.problems import MAML, PROXIMAL, Setup, mlp
from tests.zoo.right import Function, Loss, by_name, flatten, gradient, hvp, mean_over_tasks, states, unrolled
from tests.zoo.specimen import specimen


@specimen(MAML, mlp, story="A 'MAML' whose inner gradients lack create_graph=True.", cause="first-order")
@mean_over_tasks
def first_order(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = grad(loss(phi, task.support), phi)
        phi = phi - s.lr * g
    return grad(loss(phi, task.query), theta)[0]


@specimen(MAML, mlp, story="Training loops call backward per task and never divide.", cause="sum")
def sum_over_tasks(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        return {n: g * len(list(tasks)) for n, g in unrolled(s)(objective, tasks).items()}

    return function


@specimen(MAML, mlp, story="Training loops zero the gradients before each task instead of each batch.")
def last_task_only(s: Setup) -> Function:
    return lambda objective, tasks: unrolled(s)(objective, list(tasks)[-1:])


@specimen(
    MAML,
    mlp,
    story="Loops that make the first inner step outside, then one less than they should.",
    cause="one inner step too few",
)
@mean_over_tasks
def one_step_too_few(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps - 1):
        (g,) = grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * g
    return grad(loss(phi, task.query), theta)[0]


@specimen(MAML, mlp, story="Fast weights that are not reset, so each task starts where the last one ended.")
def tasks_in_a_row(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        loss, start = flatten(objective)
        start.requires_grad_()
        phi, total = start, 0.0
        for task in tasks:
            for _ in range(s.steps):
                (g,) = grad(loss(phi, task.support), phi, create_graph=True)
                phi = phi - s.lr * g
            total = total + loss(phi, task.query) / len(list(tasks))
        return by_name(objective, grad(total, start)[0])

    return function


@specimen(MAML, mlp, story="Scripts with one data loader judge a model on what it adapted to.")
@mean_over_tasks
def judged_on_the_support_set(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * g
    return grad(loss(phi, task.support), theta)[0]


@specimen(MAML, mlp, story="The adapted weights are computed, and never put to use.", cause="before any adaptation")
@mean_over_tasks
def never_adapted(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    return gradient(loss, theta, task.query)


@specimen(MAML, mlp, story="The module's own forward reads theta where phi was meant.")
@mean_over_tasks
def query_gradient_at_theta(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    *visited, _ = states(loss, theta, task.support, s)
    a = gradient(loss, theta, task.query)
    for state in reversed(visited):
        a = a - s.lr * hvp(loss, state, task.support, a)
    return a


@specimen(
    MAML,
    mlp,
    story="Reverse sweeps that store a state after the update and read it as the one before.",
    cause="stale iterate",
)
@mean_over_tasks
def hessian_at_the_next_state(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    _, *visited = states(loss, theta, task.support, s)
    a = gradient(loss, visited[-1], task.query)
    for state in reversed(visited):
        a = a - s.lr * hvp(loss, state, task.support, a)
    return a


@specimen(MAML, mlp, story="Reverse sweeps that keep only the last state.", cause="stale iterate")
@mean_over_tasks
def hessian_at_the_last_state(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    a = gradient(loss, phi, task.query)
    for _ in range(s.steps):
        a = a - s.lr * hvp(loss, phi, task.support, a)
    return a


@specimen(
    MAML,
    mlp,
    story="A batch variable that still holds the query set when the Hessian products are taken.",
    cause="query loss",
)
@mean_over_tasks
def hessian_of_the_query_loss(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    *visited, phi = states(loss, theta, task.support, s)
    a = gradient(loss, phi, task.query)
    for state in reversed(visited):
        a = a - s.lr * hvp(loss, state, task.query, a)
    return a


@specimen(PROXIMAL, mlp, story="The proximal term written as theta - phi in a descent step.", cause="wrong sign")
@mean_over_tasks
def proximal_sign(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * (g + s.lam * (theta - phi))
    return grad(loss(phi, task.query), theta)[0]


@specimen(
    PROXIMAL,
    mlp,
    story="A regularised method whose inner steps are plain gradient descent.",
    cause="proximal term is missing",
)
@mean_over_tasks
def proximal_omitted(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * g
    return grad(loss(phi, task.query), theta)[0]


@specimen(
    PROXIMAL, mlp, story="The anchor of the proximal term detached, so that its pull on theta is lost.", cause="centre"
)
@mean_over_tasks
def proximal_anchor_detached(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * (g + s.lam * (phi - theta.detach()))
    return grad(loss(phi, task.query), theta)[0]
