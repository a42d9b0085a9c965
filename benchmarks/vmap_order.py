"""Where `vmap` stands between two derivatives: the usual torch.func recipe of MAML, and this library, against a loop.

    python -m benchmarks.vmap_order

Relative error of the meta-gradient in float64 (one inner step, lr = 0.1, 3 tasks) against a plain autograd loop over
tasks. The recipe is `grad` of the mean over `vmap` of a task that takes an inner `grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective, TaskBatch

LR = 0.1
Named = dict[str, Tensor]


class Instance(nn.Module):
    """InstanceNorm over the examples of a batch, with affine weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.T[None])[0].T


NORMS: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "LayerNorm": nn.LayerNorm(6),
    "BatchNorm": nn.BatchNorm1d(6, track_running_stats=False),
    "InstanceNorm": Instance(),
    "GroupNorm": nn.GroupNorm(2, 6),
}


def flat(named: Named) -> Tensor:
    return torch.cat([g.flatten() for g in named.values()])


def main() -> None:
    print("| normalisation | torch.func recipe | imaml, vectorised |\n|---|---|---|")
    for name, norm in NORMS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), norm, nn.Linear(6, 1)).double()
        theta = {n: p.detach() + 0.3 * torch.randn_like(p) for n, p in model.named_parameters()}
        model.load_state_dict(theta)
        x, y = torch.randn(3, 7, 4).double(), torch.randn(3, 7, 1).double()

        def loss(values: Named, x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            return F.mse_loss(functional_call(model, values, (x,)), y)

        def task(values: Named, x: Tensor, y: Tensor, loss=loss) -> Tensor:
            gradients = grad(loss)(values, x, y)
            return loss({n: p - LR * gradients[n] for n, p in values.items()}, x, y)

        def recipe(values: Named, task=task, x: Tensor = x, y: Tensor = y) -> Tensor:
            return vmap(task, (None, 0, 0))(values, x, y).mean()

        leaves = {n: p.clone().requires_grad_() for n, p in theta.items()}
        total = torch.zeros(()).double()
        for xi, yi in zip(x, y, strict=True):
            gradients = torch.autograd.grad(loss(leaves, xi, yi), list(leaves.values()), create_graph=True)
            phi = {n: p - LR * g for (n, p), g in zip(leaves.items(), gradients, strict=True)}
            total = total + loss(phi, xi, yi) / len(x)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(leaves.values()))])

        engine = MAML(inner=GradientDescent(lr=LR, steps=1))
        ours = engine.value_and_grad(Objective(model, F.mse_loss), TaskBatch(support=(x, y), query=(x, y)))[1]
        errors = [f"{((flat(g) - exact).norm() / exact.norm()).item():.0e}" for g in (grad(recipe)(theta), ours)]
        print(f"| {name} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
