"""What the meta-gradient of a whole training costs, in trainings: a weight for every example of a small GPT-2.

    python -m benchmarks.inner_training 16 64 [--length 128] [--only time|memory] [--small]

AdamW on minibatches of 8 texts of random tokens (4 layers, d = 256, vocabulary 1,000), on one thread. The exact
gradient of a held-out loss by the weight of every example is taken through all T steps: with all states on disk, with
sqrt(T) states there, and with log T states in memory and recomputed layers. Prints a table in Markdown for each T: the
processor time beside that of the plain training of torch in the same process, the allocator's peak of the call, and how
much the resident set of a process of its own grows in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ratios import seconds
from imaml import MAML, AdamW, Minibatches, Objective, Task
from imaml.measure import peak_memory

BATCH = 8
GPT2: dict[str, Any] = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1000}
SMALL: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
PROFILED = 16
"""Steps up to which the allocator's account is taken."""
LR, DECAY, ROOT = 1e-3, 0.01, 1e-9


class Logits(nn.Module):
    """A GPT-2 of HuggingFace with random weights and without dropout: what it expects of each next token."""

    def __init__(self, length: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.model = GPT2LMHeadModel(
            GPT2Config(n_positions=length, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes, **dropout)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens[:, :-1]).logits


def of_each(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def weighted(logits: Tensor, target: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> Tensor:
    tokens, indices = target
    return (meta["w"][indices] * of_each(logits, tokens)).mean()


def held_out(logits: Tensor, tokens: Tensor) -> Tensor:
    return of_each(logits, tokens).mean()


@dataclass
class Training:
    """A model, its data, and a weight for every example."""

    model: Logits
    objective: Objective
    task: Task

    @classmethod
    def of(cls, steps: int, length: int, sizes: dict[str, Any]) -> Training:
        torch.manual_seed(0)
        model = Logits(length, sizes)
        tokens, query = (torch.randint(sizes["vocab_size"], (n, length)) for n in (BATCH * steps, BATCH))
        weights = torch.ones(len(tokens), requires_grad=True)
        support = Minibatches.of((tokens, tokens), batch_size=BATCH, indices=True)
        objective = Objective(model, weighted, outer_loss=held_out, meta={"w": weights})
        return cls(model, objective, Task(support=support, query=(query, query)))

    def plain(self, steps: int) -> None:
        """The training itself, by torch."""
        model = deepcopy(self.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        for step in range(steps):
            tokens, (target, _) = self.task.support.at(step)
            optimizer.zero_grad()
            held_out(model(tokens), target).backward()
            optimizer.step()


def ways(steps: int) -> dict[str, dict[str, Any]]:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    few = max(1, steps.bit_length() - 1)
    return {
        "all states on disk": {"storage": "disk"},
        f"{isqrt(steps)} states on disk": {"storage": "disk", "checkpoints": isqrt(steps)},
        f"{few} states, layers recomputed": {"checkpoints": few, "recompute": [GPT2Block]},
        f"{few} states on disk, layers recomputed": {"checkpoints": few, "storage": "disk", "recompute": [GPT2Block]},
    }


def engine(steps: int, way: dict[str, Any]) -> MAML:
    return MAML(inner=AdamW(lr=LR, weight_decay=DECAY, eps_root=ROOT, steps=steps), chunk_size=1, **way)


def most_resident() -> int:
    """The most that this program ever held, in bytes; `ru_maxrss` counts what its parent held too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def resident(steps: int, length: int, way: int | None, sizes: dict[str, Any]) -> int:
    """By how many bytes the most that this process ever held grows in a call, after one of few steps."""

    def call(steps: int) -> Callable[[], object]:
        made = Training.of(steps, length, sizes)
        if way is None:
            return lambda: made.plain(steps)
        return lambda: engine(steps, list(ways(steps).values())[way]).value_and_grad(made.objective, [made.task])

    Training.of(1, length, sizes).plain(1)
    last = call(steps)
    before = most_resident()
    last()
    return most_resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, nargs="+")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--resident", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SMALL if given.small else GPT2
    if given.resident is not None:
        print(
            json.dumps(resident(given.steps[0], given.length, given.resident if given.resident >= 0 else None, sizes))
        )
        return
    for steps in given.steps:
        made = Training.of(steps, given.length, sizes)
        bytes_of_state = 3 * sum(p.numel() * p.element_size() for p in made.model.parameters())
        print(f"\nT = {steps}, sequences of {given.length}; a state has {bytes_of_state / 2**20:.1f} MiB\n")
        print("| | time, in trainings | peak, MiB | resident, MiB |\n|---|---:|---:|---:|", flush=True)
        made.plain(min(steps, 4))
        rows: dict[str, dict[str, Any] | None] = {"plain training": None, **ways(steps)}
        for number, (name, way) in enumerate(rows.items(), start=-1):

            def call(way: dict[str, Any] | None = way, made: Training = made, steps: int = steps) -> object:
                if way is None:
                    return made.plain(steps)
                return engine(steps, way).value_and_grad(made.objective, [made.task])

            ratio, peak, grown = "", "", ""
            if given.only != "memory":
                ratio = f"{seconds(call) / seconds(lambda made=made, steps=steps: made.plain(steps)):.2f}"
            if given.only != "time":
                # The profiler that gives the peak keeps every allocation of the call.
                peak = f"{peak_memory(call) / 2**20:.0f}" if steps <= PROFILED else ""
                command = [sys.executable, "-m", "benchmarks.inner_training", str(steps), "--length", str(given.length)]
                command += ["--resident", str(number), *(["--small"] if given.small else [])]
                found = subprocess.run(command, check=True, capture_output=True, text=True)
                grown = f"{json.loads(found.stdout.splitlines()[-1]) / 2**20:.0f}"
            print(f"| {name} | {ratio} | {peak} | {grown} |", flush=True)


if __name__ == "__main__":
    main()
