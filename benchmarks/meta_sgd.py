"""Meta-SGD (Li et al. 2017), a learned step size for every parameter, against MAML at equal meta-steps.

    python -m benchmarks.meta_sgd DATA [--steps 1500] [--tasks 4] [--lr 0.4] [--threads 1] [--out FOLDER]

Omniglot, 20-way 1-shot, one query image a class, Conv4, one inner step, Adam outside with a cosine schedule. Both start
at the same parameters and the same step size and see the same tasks. Writes `meta_sgd.jsonl` (validation accuracy on
100 tasks along the way, test accuracy on 600 at the end), line by line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective
from imaml.data import Omniglot
from imaml.models import Conv4
from imaml.training import evaluate

WAYS, EVERY = 20, 250


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float().mean()


def run(name: str, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, episodes = Conv4(WAYS), Omniglot(ways=WAYS, shots=1, queries=1, path=options.data)
    log_lr: dict[str, Tensor] = {}
    if name == "Meta-SGD":
        log_lr = {n: torch.full_like(p, options.lr).log().requires_grad_() for n, p in model.named_parameters()}
        engine = MAML(inner=GradientDescent(lr=lambda meta: {n: t.exp() for n, t in meta["log_lr"].items()}, steps=1))
    else:
        engine = MAML(inner=GradientDescent(lr=options.lr, steps=1))
    objective = Objective(model, F.cross_entropy, meta={"log_lr": log_lr} if log_lr else None, metric=accuracy)
    optimizer = torch.optim.Adam([*model.parameters(), *log_lr.values()], lr=options.meta_lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    started = time.perf_counter()

    def write(**row: object) -> None:
        line = {"method": name, **row, "seconds": round(time.perf_counter() - started, 1)}
        with (options.out / "meta_sgd.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    for step in range(options.steps):
        if step % EVERY == 0:
            write(step=step, val=evaluate(engine, objective, episodes, "val", tasks=100).mean)
        optimizer.zero_grad()
        engine(objective, episodes.batch("train", step, options.tasks)).loss.backward()
        optimizer.step()
        scheduler.step()
    test = evaluate(engine, objective, episodes, "test", tasks=600)
    write(step=options.steps, test=test.mean, interval=test.interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Omniglot, as in imaml.data.Omniglot(path=...)")
    for flag, default in (("steps", 1500), ("tasks", 4), ("lr", 0.4), ("meta-lr", 0.003), ("threads", 1)):
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "meta_sgd")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("MAML", "Meta-SGD"):
        run(name, options)


if __name__ == "__main__":
    main()
