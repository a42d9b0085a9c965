"""Memory of meta-gradients of a language model's head, by the cross entropy of all logits and by slices of them.

`python -m benchmarks.vocabulary` prints a table in Markdown, by the allocator's account, for 16,000 classes, 1,024
tokens and 256 hidden features in float32. One matrix of the head takes 16.4 MB, and all logits 65.5 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, TaskBatch
from imaml.measure import peak_memory
from imaml.nn import chunked_cross_entropy

CLASSES, TOKENS, WIDTH = 16_000, 1024, 256


class Head(nn.Module):
    """Maps features to hidden states, and returns them with the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.hidden(features), self.head.weight


def whole(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    hidden, weight = output
    return F.cross_entropy(hidden @ weight.T, target)


def sliced(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return chunked_cross_entropy(*output, target)


def engines() -> dict[str, MetaGradient]:
    few: Any = {"inner": GradientDescent(lr=0.1, steps=1), "chunk_size": 1}
    solver = CG(max_steps=2, rtol=0.0)
    return {
        "`FOMAML`, 1 step": FOMAML(**few),
        "`MAML`, 1 step": MAML(**few, linearize=False),
        'the same, `hvp="forward-over-reverse"`': MAML(**few, linearize=False, hvp="forward-over-reverse"),
        "`ImplicitMAML`, 2 CG steps": ImplicitMAML(**few, solver=solver, error_bound=False, on_failure="ignore"),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Head()
    features, targets = torch.randn(2, 1, TOKENS, WIDTH), torch.randint(CLASSES, (2, 1, TOKENS))
    tasks = TaskBatch(support=(features[0], targets[0]), query=(features[1], targets[1]))
    parameters, direction = [*model.parameters()], [torch.randn_like(p) for p in model.parameters()]

    def gradient(loss: Callable[..., Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
        value = loss(model(features[0, 0]), targets[0, 0])
        return torch.autograd.grad(value, parameters, create_graph=create_graph)

    def product(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient(loss, create_graph=True), parameters, direction)

    calls: dict[str, Callable[[Callable[..., Tensor]], object]] = {"a gradient": gradient, "a product": product}
    for name, engine in engines().items():
        calls[name] = lambda loss, engine=engine: engine.value_and_grad(Objective(model, loss), tasks)
    print("| | all logits | in slices |\n|---|---:|---:|")
    for name, call in calls.items():
        for loss in (whole, sliced):
            call(loss)  # what is allocated once in a process is not counted
        peaks = [peak_memory(lambda call=call, loss=loss: call(loss)) / 1e6 for loss in (whole, sliced)]
        print(f"| {name} | {peaks[0]:.0f} MB | {peaks[1]:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
