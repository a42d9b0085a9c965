"""What a meta-step costs on 1 to 1024 ranks: compute measured here, communication by the model of an all-reduce.

    python -m benchmarks.scaling [--tasks 1024] [--steps 5] [--flops 4e14] [--bandwidth B/s --latency S] [--out FOLDER]

A meta-batch of `--tasks` tasks is dealt out, so a step takes ceil(tasks / ranks) times the seconds of a task, and one
all-reduce of the parameters in float32, by the cheaper of

    ring: 2 (p - 1) (latency + bytes / (p bandwidth));   tree: 2 ceil(log2 p) (latency + bytes / bandwidth)

Nothing overlaps, and no rank waits for a slower one. Loopback's bandwidth and latency are those of two gloo processes
here; the other networks are round numbers of their kind. Writes `README.md` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, log2
from pathlib import Path
from time import process_time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure

from benchmarks.workloads import WORKLOADS
from imaml import MAML, GradientDescent, Objective
from imaml.measure import timed

RANKS = [2**i for i in range(11)]
RESULTS = Path(__file__).parent / "results"
SHOWN = (1, 8, 64, 256, 1024)
PER_STEP = 4
"""Gradients that an inner step of MAML costs, forward and in the sweep: one, and a product of about three."""
SMALL, LARGE = 2**10, 2**24
"""Entries of the two buffers that loopback is measured with, in float32."""


@dataclass(frozen=True)
class Network:
    """Bytes a second, and seconds that a message takes besides."""

    bandwidth: float
    latency: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds for a buffer of `size` bytes."""
        ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        tree = 2 * ceil(log2(ranks)) * (self.latency + size / self.bandwidth)
        return min(ring, tree)


NETWORKS = {
    "10 GbE": Network(1.25e9, 50e-6),
    "100 Gb/s": Network(12.5e9, 5e-6),
    "NVLink class": Network(300e9, 3e-6),
}


@dataclass(frozen=True)
class Model:
    """Entries of the all-reduce, and seconds of a task's meta-gradient on one rank, with where they come from."""

    parameters: float
    task: float
    source: str

    def compute(self, tasks: int, ranks: int) -> float:
        """Seconds of the rank with the most tasks."""
        return ceil(tasks / ranks) * self.task

    def step(self, tasks: int, ranks: int, network: Network) -> float:
        """Seconds of a meta-step."""
        return self.compute(tasks, ranks) + network.all_reduce(4 * self.parameters, ranks)

    def dominated_from(self, tasks: int, network: Network) -> int | None:
        """The fewest ranks on which communication takes more than half of a step; None for none of `RANKS`."""
        sizes = (p for p in RANKS if network.all_reduce(4 * self.parameters, p) > self.compute(tasks, p))
        return next(sizes, None)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of the fastest of several calls, which a busy machine spoils less than what a clock says."""
    taken = []
    for _ in range(5):
        started = process_time()
        call()
        taken.append(process_time() - started)
    return min(taken)


def models(steps: int, flops: float) -> dict[str, Model]:
    conv, mini = (WORKLOADS[name].problem(steps) for name in ("W2", "W4"))
    engine, sample = MAML(inner=GradientDescent(lr=conv.lr, steps=steps)), conv.tasks[:8]
    task = cpu_seconds(partial(engine.value_and_grad, Objective(conv.model, conv.criterion), sample)) / len(sample)
    (x, y), parameters = mini.tasks[0].support, list(mini.model.parameters())
    gradient = cpu_seconds(lambda: torch.autograd.grad(mini.criterion(mini.model(x), y), parameters))
    count, tokens = PER_STEP * steps + 1, x.numel()
    size = sum(p.numel() for p in parameters)

    def by_arithmetic(size: float, tokens: int) -> Model:
        source = f"{count} gradients of {tokens} tokens, 6 operations a parameter and token, at {flops:.0e}/s"
        return Model(size, count * 6 * size * tokens / flops, source)

    return {
        "Conv4": Model(
            sum(p.numel() for p in conv.model.parameters()), task, f"{task:.3g} s a task, measured on one thread"
        ),
        "MiniLM's size, CPU": Model(
            size, count * gradient, f"{count} gradients of {gradient:.3g} s, measured on one thread"
        ),
        "MiniLM's size, accelerator": by_arithmetic(size, tokens),
        "7 B, accelerator": by_arithmetic(7e9, 4096),
    }


def loopback() -> Network:
    """That of two gloo processes on this machine, from the fastest of several all-reduces of two sizes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_reduce, (folder,), nprocs=2, start_method="spawn")
        small, large = torch.load(Path(folder, "seconds")).tolist()
    return Network(bandwidth=4 * (LARGE - SMALL) / (large - small), latency=small / 2)


def _reduce(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seconds = []
    for size, repeats in ((SMALL, 200), (LARGE, 8)):
        buffer = torch.ones(size)

        def call(buffer: torch.Tensor = buffer) -> None:
            dist.all_reduce(buffer)

        seconds.append(min(timed(call, repeats=1).median for _ in range(repeats)))
    if rank == 0:
        torch.save(torch.tensor(seconds, dtype=torch.float64), Path(folder, "seconds"))
    dist.barrier()
    dist.destroy_process_group()


INTRODUCTION = """\
A model, not a measurement of many machines; `python -m benchmarks.scaling` made this page, and says what it assumes.
Compute falls with the ranks, while a large all-reduce comes to 2 bytes / bandwidth, however many there are:
communication takes more than half of a step once a rank's share of the tasks takes less time than that. More tasks a
rank are the cure, since the buffer does not grow with them. Seconds on this machine are CPU time of one thread. The 7 B
model, 28 GB a vector, is assumed to fit where a task is computed.
"""


def page(found: dict[str, Model], networks: dict[str, Network], tasks: int) -> str:
    lines = [
        f"# Scaling: a meta-step of {tasks} tasks on 1 to {RANKS[-1]} ranks",
        "",
        INTRODUCTION,
        "| network | bandwidth, GB/s | latency, µs |",
        "|---|---:|---:|",
        *(f"| {name} | {n.bandwidth / 1e9:.3g} | {n.latency * 1e6:.3g} |" for name, n in networks.items()),
        "",
        "| model | entries | compute |",
        "|---|---:|---|",
        *(f"| {name} | {m.parameters:.3g} | {m.source} |" for name, m in found.items()),
        "",
        "Seconds of a meta-step, by ranks; the efficiency on the most; where communication first takes more than half:",
        "",
        "| model | network | " + " | ".join(map(str, SHOWN)) + " | efficiency | more than half |",
        "|---|---|" + "---:|" * (len(SHOWN) + 2),
    ]
    for name, model in found.items():
        for title, network in networks.items():
            seconds = [model.step(tasks, p, network) for p in SHOWN]
            first = model.dominated_from(tasks, network)
            cells = [*(f"{s:.3g}" for s in seconds), f"{100 * seconds[0] / SHOWN[-1] / seconds[-1]:.0f} %"]
            lines.append(f"| {name} | {title} | {' | '.join(cells)} | {f'from {first} ranks' if first else 'never'} |")
    return "\n".join([*lines, "", check(networks["gloo, loopback"], found["Conv4"]), "", IMAGE, ""])


IMAGE = "![Seconds of a meta-step against ranks](scaling.png)"


def check(network: Network, conv: Model) -> str:
    """The communication of two processes, as the model has it and as `benchmarks.distributed` measured it."""
    measured = json.loads((RESULTS / "distributed" / "distributed.json").read_text())
    share = network.all_reduce(4 * conv.parameters, 2) / measured["seconds together"]
    return (
        f"Against two real processes, 32 tasks of Conv4: communication takes {100 * share:.2f} % of a step by this "
        f"model,\nand {100 * measured['communication']:.2f} % as measured by `benchmarks.distributed`."
    )


def draw(found: dict[str, Model], networks: dict[str, Network], tasks: int, path: Path) -> None:
    figure = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
    for axes, (name, model) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.loglog(RANKS, [model.compute(tasks, p) for p in RANKS], "k--", label="compute alone")
        for title, network in networks.items():
            axes.loglog(RANKS, [model.step(tasks, p, network) for p in RANKS], label=title)
        axes.set(title=name, xlabel="ranks", ylabel="seconds a meta-step")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1024, help="of a meta-batch")
    parser.add_argument("--steps", type=int, default=5, help="of the inner loop, by MAML")
    parser.add_argument("--flops", type=float, default=4e14, help="a second, of an accelerator")
    parser.add_argument("--bandwidth", type=float, help="of one more network, in bytes a second")
    parser.add_argument("--latency", type=float, default=5e-6, help="of it, in seconds")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = {"gloo, loopback": loopback(), **NETWORKS}
    if options.bandwidth:
        networks["as given"] = Network(options.bandwidth, options.latency)
    found = models(options.steps, options.flops)
    options.out.mkdir(parents=True, exist_ok=True)
    text = page(found, networks, options.tasks)
    (options.out / "README.md").write_text(text)
    draw(found, networks, options.tasks, options.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
