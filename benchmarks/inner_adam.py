"""Peak memory and time of exact MAML with Adam inside, against one graph of the whole inner loop.

    python -m benchmarks.inner_adam [--steps 32] [--small] [--out FOLDER]

The transformer of `benchmarks.memory`, one task, float32. The unrolled loop is Adam written out and differentiated by
autograd through all steps. Memory is that of the allocator above what the call found; time that of the same call, once,
in turn. Writes `inner_adam.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import MIB, Transformer
from imaml import MAML, Adam, Objective, TaskBatch
from imaml.measure import peak_memory

LR, EPS, BETAS = 1e-3, 1e-8, (0.9, 0.999)


def unrolled(model: nn.Module, tasks: TaskBatch, steps: int) -> list[Tensor]:
    """The meta-gradient through one graph of the whole inner loop; the square root is kept off zero."""
    theta = dict(model.named_parameters())
    (xs, ys), (xq, yq) = tasks[0].support, tasks[0].query
    phi, m, v = dict(theta), {n: torch.zeros_like(p) for n, p in theta.items()}, {}
    with sdpa_kernel(SDPBackend.MATH):
        for k in range(1, steps + 1):
            loss = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            for (name, p), g in zip(phi.items(), grads, strict=True):
                m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
                v[name] = BETAS[1] * v.get(name, 0) + (1 - BETAS[1]) * g * g
                root = (v[name] / (1 - BETAS[1] ** k) + 1e-30).sqrt()
                phi[name] = p - LR / (1 - BETAS[0] ** k) * m[name] / (root + EPS)
        loss = F.cross_entropy(functional_call(model, phi, (xq,)), yq)
        return list(torch.autograd.grad(loss, list(theta.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a small transformer")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inner_adam"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, width=64 if options.small else 256, layers=2 if options.small else 4)
    shape = (1, 4, 32) if options.small else (1, 8, 128)
    batches = [(torch.randint(1000, shape), torch.randint(5, shape[:2])) for _ in range(2)]
    tasks, objective = TaskBatch(support=batches[0], query=batches[1]), Objective(model, F.cross_entropy)
    inner = Adam(lr=LR, steps=options.steps, betas=BETAS, eps=EPS)

    def engine(**settings: int) -> Callable[[], list[Tensor]]:
        return lambda: list(MAML(inner=inner, **settings).value_and_grad(objective, tasks)[1].values())

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "unrolled loop": lambda: unrolled(model, tasks, options.steps),
        "MAML": engine(),
        "MAML, checkpoints=6": engine(checkpoints=6),
    }
    table = Table("method", "peak MiB", "seconds", "memory / loop", "time / loop", title=f"Adam, K = {options.steps}")
    rows: list[dict[str, object]] = []
    for name, call in calls.items():
        peak = peak_memory(call)
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        rows.append({"method": name, "steps": options.steps, "peak_bytes": peak, "seconds": seconds})
        loop_peak, loop_seconds = rows[0]["peak_bytes"], rows[0]["seconds"]
        ratios = (f"{peak / loop_peak:.3f}", f"{seconds / loop_seconds:.2f}")  # type: ignore[operator]
        table.add_row(name, f"{peak / MIB:.0f}", f"{seconds:.1f}", *ratios)
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "inner_adam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
