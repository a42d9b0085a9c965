"""Peak memory and time of exact MAML with Adam inside, against one graph of the whole inner loop.

    python -m benchmarks.inner_adam [--steps 32] [--threads 1] [--small] [--out FOLDER]

The transformer of `benchmarks.memory`, one task, float32, each method in a fresh process after a call with one step.
The unrolled loop is Adam written out and differentiated by autograd through all steps. Memory is the growth of the
process's peak resident set, coarse but right for peaks of gigabytes (the allocator's events of so long a call take more
memory than the call); time is that of the same call. Writes `inner_adam.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import Transformer
from imaml import MAML, Adam, Objective, TaskBatch

METHODS = {"unrolled loop": None, "MAML": None, "MAML, checkpoints=6": 6}
"""By name, with the checkpoints of the engine."""
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


def problem(small: bool) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, width=64 if small else 256, layers=2 if small else 4)
    shape = (1, 4, 32) if small else (1, 8, 128)
    support, query = [(torch.randint(1000, shape), torch.randint(5, shape[:2])) for _ in range(2)]
    return model, TaskBatch(support=support, query=query)


def call(method: str, model: nn.Module, tasks: TaskBatch, steps: int) -> list[Tensor]:
    if method == "unrolled loop":
        return unrolled(model, tasks, steps)
    engine = MAML(inner=Adam(lr=LR, steps=steps, betas=BETAS, eps=EPS), checkpoints=METHODS[method])
    return list(engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1].values())


def measure(method: str, steps: int, small: bool, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    model, tasks = problem(small)
    call(method, model, tasks, 1)
    before, started = getrusage(RUSAGE_SELF).ru_maxrss, time.perf_counter()
    gradients = call(method, model, tasks, steps)
    seconds, after = time.perf_counter() - started, getrusage(RUSAGE_SELF).ru_maxrss
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    return {"peak_mib": (after - before) / 1024, "seconds": seconds, "gradient_norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a small transformer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inner_adam")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    table = Table("method", "peak MiB", "seconds", "memory / loop", "time / loop", title=f"Adam, K = {options.steps}")
    for method in METHODS:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(measure, method, options.steps, options.small, options.threads).result()
        rows.append({"method": method, "steps": options.steps, "threads": options.threads, **found})
        ratios = [found[key] / float(str(rows[0][key])) for key in ("peak_mib", "seconds")]
        table.add_row(method, f"{found['peak_mib']:.0f}", f"{found['seconds']:.1f}", *(f"{r:.3f}" for r in ratios))
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "inner_adam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
