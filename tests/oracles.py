"""Meta-gradients the plain way: independent oracles in PyTorch alone, slow and obvious, for small problems.

Nothing here calls the library, except that `ORACLES` is keyed by its classes and `setting` reads their fields. A new
strategy needs one function here, and a line in `ORACLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml import FOMAML, MAML, ImplicitMAML, MetaGradient

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]


@dataclass(frozen=True)
class Setting:
    """All that a meta-gradient depends on. `theta` holds every parameter that receives one, adapted or not."""

    loss: Loss
    theta: Params
    adapted: Sequence[str]
    tasks: Sequence[tuple[Any, Any]]
    lr: float
    steps: int
    damping: float | Mapping[str, float] = 0.0
    delta: float = 0.0
    """What is added to the linear system of `implicit`, as a multiple of its identity."""

    def proximal(self, phi: Params, theta: Params) -> Tensor:
        weights = self.damping if isinstance(self.damping, Mapping) else dict.fromkeys(self.adapted, self.damping)
        return sum(weights[n] / 2 * ((phi[n] - theta[n]) ** 2).sum() for n in self.adapted)

    def fixed(self) -> list[str]:
        return [n for n in self.theta if n not in self.adapted]


Curvature = Callable[[Setting, Params, Any], Tensor]


def model_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> Loss:
    """`loss(model(input), target)` as a function of parameters; the attention kernels that have second derivatives."""

    def of_params(params: Params, batch: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return loss(functional_call(model, params, (batch[0],)), batch[1])

    return of_params


def setting(
    engine: MetaGradient,
    tasks: Any,
    loss: Loss,
    theta: Mapping[str, Tensor],
    adapted: Sequence[str] | None = None,
) -> Setting:
    """What `engine` is asked to compute."""
    return Setting(
        loss=loss,
        theta={n: p.detach().clone() for n, p in theta.items() if p.requires_grad},
        adapted=tuple(theta) if adapted is None else tuple(adapted),
        tasks=[(task.support, task.query) for task in tasks],
        lr=engine.inner.lr,
        steps=engine.inner.steps,
        damping=engine.regularization,
        delta=getattr(engine, "damping", 0.0),
    )


def unrolled(s: Setting) -> tuple[Tensor, Params]:
    """Mean query loss and its gradient through the graph of the whole inner loop."""
    theta = {n: p.clone().requires_grad_() for n, p in s.theta.items()}
    losses = [_query_loss(s, theta, task, create_graph=True) for task in s.tasks]
    return _differentiate(torch.stack(losses).mean(), theta)


def first_order(s: Setting) -> tuple[Tensor, Params]:
    """Mean query loss and its gradient at phi, taken as that at theta."""
    theta = {n: p.clone().requires_grad_() for n, p in s.theta.items()}
    losses = []
    for support, query in s.tasks:
        phi = _adapt(s, theta, support, create_graph=False)
        moved = {n: theta[n] + (phi[n] - theta[n]).detach() for n in s.adapted}
        losses.append(s.loss(theta | moved, query))
    return _differentiate(torch.stack(losses).mean(), theta)


def implicit(s: Setting, curvature: Curvature | None = None) -> tuple[Tensor, Params]:
    """Mean query loss and the implicit meta-gradient at phi_K, by a dense matrix (the Hessian) and a dense solve."""
    curvature = curvature or hessian
    losses, total = [], {n: torch.zeros_like(p) for n, p in s.theta.items()}
    for support, query in s.tasks:
        phi = _adapt(s, {n: p.clone().requires_grad_() for n, p in s.theta.items()}, support, create_graph=False)
        values = s.theta | {n: p.detach() for n, p in phi.items()}
        leaves = {n: p.clone().requires_grad_() for n, p in values.items()}
        loss, v = _differentiate(s.loss(leaves, query), leaves)
        damping = torch.cat([torch.full_like(values[n], _weight(s, n)).flatten() for n in s.adapted])
        solved = torch.linalg.solve(curvature(s, values, support) + (1 + s.delta) * damping.diag(), _flat(v, s.adapted))
        theta = _split(damping * solved, {n: values[n] for n in s.adapted})
        mixed = mixed_derivatives(s, values, support)
        for n in s.theta:
            total[n] += theta[n] if n in s.adapted else v[n] - (solved @ mixed[n]).view(v[n].shape)
        losses.append(loss)
    return torch.stack(losses).mean(), {n: g / len(s.tasks) for n, g in total.items()}


def hessian(s: Setting, values: Params, batch: Any) -> Tensor:
    """Second derivatives `(n, n)` of the loss by the adapted parameters."""
    like = {n: values[n] for n in s.adapted}

    def of_flat(flat: Tensor) -> Tensor:
        return s.loss(values | _split(flat, like), batch)

    return torch.autograd.functional.hessian(of_flat, _flat(like, s.adapted))


def mixed_derivatives(s: Setting, values: Params, batch: Any) -> Params:
    """Derivatives `(n, m)` of the adapted gradient by every other parameter, `m` its size."""
    like = {n: values[n] for n in s.adapted}
    start = _flat(like, s.adapted).requires_grad_()

    def gradient(name: str, flat: Tensor) -> Tensor:
        other = {name: flat.view(values[name].shape)}
        return torch.autograd.grad(s.loss(values | other | _split(start, like), batch), start, create_graph=True)[0]

    return {
        n: torch.autograd.functional.jacobian(lambda flat, n=n: gradient(n, flat), values[n].flatten())
        for n in s.fixed()
    }


def query_loss(s: Setting, theta: Params) -> Tensor:
    """Mean query loss after adaptation from `theta`, a number."""
    leaves = {n: p.clone().requires_grad_() for n, p in theta.items()}
    return torch.stack([_query_loss(s, leaves, task, create_graph=False) for task in s.tasks]).mean().detach()


def finite_difference(s: Setting, direction: Params, h: float = 1e-5) -> Tensor:
    """Central difference of theta -> mean query loss after adaptation, along `direction`."""
    ahead, behind = ({n: p + sign * h * direction[n] for n, p in s.theta.items()} for sign in (1, -1))
    return (query_loss(s, ahead) - query_loss(s, behind)) / (2 * h)


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """|got - expected| / |expected|, over all parameters; their names must agree."""
    assert set(got) == set(expected)
    a, b = (_flat(tensors, list(expected)) for tensors in (got, expected))
    return float((a - b).norm() / b.norm())


def _weight(s: Setting, name: str) -> float:
    return s.damping[name] if isinstance(s.damping, Mapping) else s.damping


def _adapt(s: Setting, theta: Params, support: Any, *, create_graph: bool) -> Params:
    phi = {n: theta[n] for n in s.adapted}
    for _ in range(s.steps):
        inner = s.loss(theta | phi, support) + s.proximal(phi, theta if create_graph else _detached(theta))
        grads = torch.autograd.grad(inner, list(phi.values()), create_graph=create_graph, materialize_grads=True)
        phi = {n: p - s.lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        if not create_graph:
            phi = {n: p.detach().requires_grad_() for n, p in phi.items()}
    return phi


def _detached(params: Params) -> Params:
    return {n: p.detach() for n, p in params.items()}


def _query_loss(s: Setting, theta: Params, task: tuple[Any, Any], *, create_graph: bool) -> Tensor:
    support, query = task
    return s.loss(theta | _adapt(s, theta, support, create_graph=create_graph), query)


def _differentiate(loss: Tensor, params: Params) -> tuple[Tensor, Params]:
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return loss.detach(), dict(zip(params, grads, strict=True))


def _flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[n].detach().flatten() for n in names])


def _split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([p.numel() for p in like.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


ORACLES: dict[type[MetaGradient], Callable[[Setting], tuple[Tensor, Params]]] = {
    MAML: unrolled,
    FOMAML: first_order,
    ImplicitMAML: implicit,
}
