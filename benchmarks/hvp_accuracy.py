"""Error of each Hessian-vector product mode on the meta-gradient of MAML, by model and dtype.

    python -m benchmarks.hvp_accuracy

Relative error of the whole meta-gradient against reverse-over-reverse in float64, K = 5 inner steps, lr = 0.1, 4 tasks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import FOMAML, MAML, GradientDescent, Objective, TaskBatch
from imaml.models import MLP, Conv4


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed = nn.Linear(4, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()]).double()


def main() -> None:
    torch.manual_seed(0)
    cases: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("MLP, tanh", MLP(4, 5, activation=nn.Tanh), (20, 4)),
        ("MLP, ReLU", MLP(4, 5), (20, 4)),
        ("transformer, GELU", Transformer(), (6, 16, 4)),
        ("Conv4, BatchNorm and ReLU", Conv4(5), (5, 1, 28, 28)),
    ]
    inner = GradientDescent(lr=0.1, steps=5)
    print("| model | dtype | reverse-over-reverse | forward-over-reverse | finite-difference | (FOMAML) |")
    print("|---|---|---|---|---|---|")
    for name, model, shape in cases:
        labels = torch.randint(0, 5, (2, 4, shape[0]))
        tasks = TaskBatch(support=(torch.rand(4, *shape), labels[0]), query=(torch.rand(4, *shape), labels[1]))
        exact = None
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            objective = Objective(copy.deepcopy(model).to(dtype), F.cross_entropy)
            engines = [
                MAML(inner=inner, hvp="reverse-over-reverse"),
                MAML(inner=inner, hvp="forward-over-reverse"),
                MAML(inner=inner, hvp="finite-difference"),
                FOMAML(inner=inner),
            ]
            found = [flat(e.value_and_grad(objective, tasks.to(dtype=dtype))[1]) for e in engines]
            exact = found[0] if exact is None else exact
            errors = [f"{((g - exact).norm() / exact.norm()).item():.0e}" for g in found]
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
