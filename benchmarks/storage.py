"""Peak memory and time of exact MAML with its inner states on the device, on disk, or recomputed from checkpoints.

    python -m benchmarks.storage [--steps 1 8 32] [--repeats 3] [--small] [--out FOLDER]

The transformer of `benchmarks.memory`, one task, float32, one thread. The settings take turns, so that a slow minute of
the machine meets all of them; the times are medians. Writes `storage.md`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.memory import LR, MIB, Transformer
from imaml import MAML, GradientDescent, Objective, TaskBatch
from imaml.measure import peak_memory, timed_in_turn

SETTINGS = {
    'storage="device"': {},
    'storage="disk"': {"storage": "disk"},
    "checkpoints=4": {"checkpoints": 4},
}


def problem(small: bool) -> tuple[Objective, TaskBatch]:
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, width=64 if small else 256, layers=2 if small else 4)
    shape = (1, 4, 32) if small else (1, 8, 128)
    support, query = ((torch.randint(1000, shape), torch.randint(5, shape[:2])) for _ in range(2))
    return Objective(model, F.cross_entropy), TaskBatch(support=support, query=query)


def table(options: argparse.Namespace) -> str:
    objective, tasks = problem(options.small)
    theta = sum(p.numel() * p.element_size() for p in objective.parameters().values())
    lines = [
        f"Peak MiB and seconds of one meta-gradient; theta takes {theta / MIB:.1f} MiB; torch {torch.__version__}.",
        "",
        "| K | " + " | ".join(f"{name}, MiB | s" for name in SETTINGS) + " | disk / device |",
        "|---:|" + "---:|" * (2 * len(SETTINGS) + 1),
    ]
    for steps in options.steps:
        inner = GradientDescent(lr=LR, steps=steps)
        calls = [partial(MAML(inner=inner, linearize=False, **s), objective, tasks) for s in SETTINGS.values()]
        seconds = [timing.median for timing in timed_in_turn(calls, repeats=options.repeats)]
        peaks = [peak_memory(call) / MIB for call in calls]
        cells = " | ".join(f"{peak:.1f} | {time:.2f}" for peak, time in zip(peaks, seconds, strict=True))
        lines.append(f"| {steps} | {cells} | {seconds[1] / seconds[0]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "storage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "storage.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
