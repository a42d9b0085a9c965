"""A training on minibatches in plain torch: one graph over all steps, differentiated as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.inner import unrolled

Values = dict[str, Tensor]
EXAMPLES = 11
"""A prime: no size of batches divides it."""
UPDATES = {
    "gradient descent": unrolled.sgd(),
    "nesterov": unrolled.sgd(0.8, True, 0.1),
    "adam": unrolled.adam((0.8, 0.9), 1e-3),
    "adamw": unrolled.adam((0.8, 0.9), 1e-3, decay=0.2, decoupled=True),
    "rmsprop": unrolled.rmsprop(0.7, 1e-3, momentum=0.5),
}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def make_data(examples: int = EXAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (examples,), generator=generator)


def make_weights(examples: int = EXAMPLES) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(examples, generator=generator, dtype=torch.float64).requires_grad_()


def weighted(output: Tensor, target: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> Tensor:
    """Cross entropy with a weight for every example of the data set."""
    labels, indices = target
    return (F.cross_entropy(output, labels, reduction="none") * meta["w"][indices].sigmoid()).mean()


def loss_of(model: nn.Module, *, has_weights: bool) -> Callable[[Values, Values, Any], Tensor]:
    def loss(phi: Values, meta: Values, batch: Any) -> Tensor:
        output = functional_call(model, phi, (batch[0],))
        return weighted(output, batch[1], meta) if has_weights else F.cross_entropy(output, batch[1])

    return loss


def train(
    model: nn.Module,
    meta: Values,
    batches: Sequence[Any],
    query: Any,
    update: Callable[..., Tensor],
    *,
    lr: float = 0.05,
    damping: float = 0.0,
    constant: int = 0,
    second_order: bool = True,
) -> tuple[Tensor, Values, Values]:
    """The query loss after a step on each batch, its gradients for theta and `meta`, and the last parameters.

    The state before step `constant` counts as theta plus a constant. Without `second_order` the gradient is that by
    the last parameters.
    """
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    meta = {n: t.detach().clone().requires_grad_() for n, t in meta.items()}
    loss = loss_of(model, has_weights="w" in meta)
    phi, memory = dict(theta), {n: {} for n in theta}
    for k, batch in enumerate(batches):
        if k == constant:
            phi = {n: theta[n] + (t - theta[n]).detach() for n, t in phi.items()}
            memory = {n: {key: t.detach() for key, t in m.items()} for n, m in memory.items()}
        value = loss(phi, meta, batch)
        value = value + damping / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
        grads = torch.autograd.grad(value, list(phi.values()), create_graph=second_order)
        phi = {n: update(phi[n], g, memory[n], k + 1, lr) for (n, g) in zip(phi, grads, strict=True)}
    if not second_order:
        phi = {n: theta[n] + (t - theta[n]).detach() for n, t in phi.items()}
    judged = F.cross_entropy(functional_call(model, phi, (query[0],)), query[1])
    everything = theta | meta
    found = torch.autograd.grad(judged, list(everything.values()), allow_unused=True, materialize_grads=True)
    return judged.detach(), dict(zip(everything, found, strict=True)), {n: t.detach() for n, t in phi.items()}


def close(got: Values, expected: Values, tolerance: float = 1e-12) -> None:
    """Equal to so much of the largest entry."""
    scale = max(t.abs().max().item() for t in expected.values())
    assert scale > 1e-6
    for name, value in expected.items():
        assert (got[name] - value).abs().max().item() <= tolerance * max(scale, 1e-2), name
