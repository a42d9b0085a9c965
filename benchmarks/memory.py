"""Peak memory of one meta-gradient of a transformer, against the number of inner steps.

    python -m benchmarks.memory [--small] [--out FOLDER]

A pre-norm transformer of 4 layers (d = 256, 4 heads, feed-forward 1024, vocabulary 1000), sequence 128, batch 8, one
task, float32; by the allocator's own account above what the call found. The unrolled loop, one graph of all K steps, is
what most libraries build; it is measured up to K = 8. Writes `memory.jsonl` and `memory.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, TaskBatch
from imaml.measure import peak_memory

STEPS = (1, 2, 4, 8, 16, 32)
UNROLLED_STEPS = 8
LR = 0.01
MIB = 2**20


class Transformer(nn.Module):
    def __init__(self, *, vocabulary: int, width: int, layers: int, heads: int = 4, classes: int = 5) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(vocabulary, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(tokens)).mean(1))
        return logits


def unrolled(model: nn.Module, tasks: TaskBatch, steps: int) -> tuple[Tensor, ...]:
    """The meta-gradient through one graph of the whole inner loop."""
    theta = dict(model.named_parameters())
    (xs, ys), (xq, yq) = tasks[0].support, tasks[0].query
    phi = theta
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - LR * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        return torch.autograd.grad(F.cross_entropy(functional_call(model, phi, (xq,)), yq), list(theta.values()))


def strategies() -> dict[str, Callable[[GradientDescent], MetaGradient]]:
    implicit = partial(ImplicitMAML, solver=CG(max_steps=5), on_failure="ignore")
    return {
        "FOMAML": lambda inner: FOMAML(inner=inner),
        "ImplicitMAML, 5 CG steps": lambda inner: implicit(inner=inner),
        "ImplicitMAML, 5 CG steps, linearize=False": lambda inner: implicit(inner=inner, linearize=False),
        "MAML": lambda inner: MAML(inner=inner),
        "MAML, checkpoints=4": lambda inner: MAML(inner=inner, checkpoints=4),
    }


def measure(small: bool) -> list[dict[str, object]]:
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, width=64 if small else 256, layers=2 if small else 4)
    shape = (1, 4, 32) if small else (1, 8, 128)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randint(1000, shape), torch.randint(5, shape[:2])

    tasks, objective = TaskBatch(support=batch(), query=batch()), Objective(model, F.cross_entropy)
    theta = sum(p.numel() * p.element_size() for p in model.parameters())
    rows: list[dict[str, object]] = []

    def record(name: str, steps: int, call: Callable[[], object]) -> None:
        rows.append({"strategy": name, "steps": steps, "bytes": peak_memory(call), "theta_bytes": theta})

    for name, build in strategies().items():
        build(GradientDescent(lr=LR, steps=1))(objective, tasks)  # what torch sets up once is not counted
        for steps in STEPS:
            record(name, steps, partial(build(GradientDescent(lr=LR, steps=steps)), objective, tasks))
    for steps in (k for k in STEPS if k <= UNROLLED_STEPS):
        record("one graph of all steps", steps, partial(unrolled, model, tasks, steps))
    return rows


def table(rows: list[dict[str, object]]) -> str:
    peaks = {(row["strategy"], row["steps"]): int(str(row["bytes"])) for row in rows}
    theta = int(str(rows[0]["theta_bytes"]))
    lines = [
        f"Peak MiB of one meta-gradient; theta takes {theta / MIB:.1f} MiB; torch {torch.__version__}, CPU.",
        "",
        "| K | " + " | ".join(map(str, STEPS)) + " | growth per step, in thetas |",
        "|---|" + "---:|" * (len(STEPS) + 1),
    ]
    for name in dict.fromkeys(row["strategy"] for row in rows):
        have = {k: peaks[name, k] for k in STEPS if (name, k) in peaks}
        growth = (have[max(have)] - have[1]) / (max(have) - 1) / theta
        cells = [f"{have[k] / MIB:.1f}" if k in have else "" for k in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {growth:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory")
    options = parser.parse_args()
    rows = measure(options.small)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.out / "memory.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
