"""Wrong implicit meta-gradients: another stationary point, another system, another right-hand side."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imaml import Task
from tests.zoo.problems import BRIEF, IMPLICIT, Setup, layer_norm, mlp
from tests.zoo.right import Loss, cg, gradient, hvp, mean_over_tasks, states
from tests.zoo.specimen import specimen


@specimen(IMPLICIT, mlp, story="Published code runs plain gradient descent inside.", cause="proximal term is missing")
@mean_over_tasks
def inner_loop_without_proximal_term(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, replace(s, lam=0.0))[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w) / s.lam, v)


@specimen(BRIEF, mlp, story="The proximal term written as theta - phi in a descent step.", cause="wrong sign")
@mean_over_tasks
def inner_loop_with_proximal_sign(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, replace(s, lam=-s.lam))[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w) / s.lam, v)


@specimen(BRIEF, mlp, story="A handful of inner steps, as in MAML.", cause="unconverged inner")
@mean_over_tasks
def inner_loop_unconverged(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w) / s.lam, v)


@specimen(IMPLICIT, mlp, story="The query gradient alone, called implicit.", cause="first-order")
@mean_over_tasks
def no_system_at_all(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    return gradient(loss, states(loss, theta, task.support, s)[-1], task.query)


@specimen(IMPLICIT, mlp, story="Code for lambda = 1 used with another.", cause="1 i + 1 h")
@mean_over_tasks
def lambda_forgotten_in_the_system(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w), v)


@specimen(
    IMPLICIT,
    mlp,
    story="Published code damps twice: (1 + 1) I + H / (2 + 10) where its paper has I + H / 2.",
    cause="2 i + 0.08333 h",
)
@mean_over_tasks
def published_system(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: (1 + 1) * w + hvp(loss, phi, task.support, w) / (s.lam + 10), v)


@specimen(IMPLICIT, mlp, story="(H + lambda I)^-1 v taken from a paper that then multiplies by lambda.", cause="lambda")
@mean_over_tasks
def factor_lambda_missing(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: s.lam * w + hvp(loss, phi, task.support, w), v)


@specimen(IMPLICIT, mlp, story="The minus of the implicit function theorem kept where it cancels.", cause="-0.5 h")
@mean_over_tasks
def curvature_with_the_wrong_sign(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    h = torch.autograd.functional.hessian(lambda x: loss(x, task.support), phi)
    return torch.linalg.solve(torch.eye(len(phi)).to(h) - h / s.lam, v)


@specimen(
    IMPLICIT,
    mlp,
    story="A batch variable that still holds the query set when the products are taken.",
    cause="query loss",
)
@mean_over_tasks
def curvature_of_the_query_loss(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    h = torch.autograd.functional.hessian(lambda x: loss(x, task.query), phi)
    return torch.linalg.solve(torch.eye(len(phi)).to(h) + h / s.lam, v)


@specimen(IMPLICIT, mlp, story="Products of the module's own parameters, which are still theta.")
@mean_over_tasks
def curvature_at_theta(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    h = torch.autograd.functional.hessian(lambda x: loss(x, task.support), theta)
    return torch.linalg.solve(torch.eye(len(phi)).to(h) + h / s.lam, v)


@specimen(IMPLICIT, mlp, story="The module's own forward reads theta where phi was meant.")
@mean_over_tasks
def right_hand_side_at_theta(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, theta, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w) / s.lam, v)


@specimen(IMPLICIT, layer_norm, story="torch.func.hessian, wrong for normalisation layers.", cause="torch.func.hessian")
@mean_over_tasks
def dense_hessian_of_torch_func(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    h = torch.func.hessian(lambda x: loss(x, task.support))(phi)
    return torch.linalg.solve(torch.eye(len(phi)).to(h) + h / s.lam, v)
