"""Meta-gradients through long trainings of a language model: time beside what the checkpoints imply.

    python -m benchmarks.long_training [--steps 64 1000] [--length 32] [--small] [--folder]

One training of a GPT-2 shape (4 layers, d = 256, vocabulary 1000) by AdamW on minibatches of 8 sequences, with a weight
for every example, and sqrt(T) states. It prints a table in Markdown. "Implied" is the time of the gradients, products
and updates that the schedule counts, each measured by itself in the same run on one thread; "of implied" is the whole
call beside it. The peak is that of the allocator's own account, for as many steps as --measured says at most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import MAML, AdamW, Minibatches, Objective, Task
from imaml._strategies.schedule import sweep
from imaml.measure import peak_memory

EXAMPLES, BATCH, VOCABULARY = 512, 8, 1000


class Decoder(nn.Module):
    """The GPT-2 shape, of torch alone."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers, self.norm = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        hidden = self.tokens(tokens) + self.places(torch.arange(length))
        return self.norm(self.layers(hidden, mask=mask)) @ self.tokens.weight.t()


def gpt2(width: int, layers: int, length: int) -> nn.Module:
    """That of transformers where it is installed, else the one above."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415
    except ImportError:
        return Decoder(width, layers, length)
    shape: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 64), "n_positions": length}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, attn_implementation="eager", **shape, **off))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.model(tokens).logits
            return logits

    return Logits()


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each sequence."""
    every = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return every.mean(-1)


def weighted(logits: Tensor, target: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> Tensor:
    tokens, indices = target
    return (meta["weights"][indices] * losses(logits, tokens)).mean()


def held_out(logits: Tensor, tokens: Tensor) -> Tensor:
    return losses(logits, tokens).mean()


def problem(width: int, layers: int, length: int) -> tuple[Objective, list[Task]]:
    torch.manual_seed(0)
    model, texts = gpt2(width, layers, length), torch.randint(VOCABULARY, (EXAMPLES, length))
    query = torch.randint(VOCABULARY, (BATCH, length))
    weights = torch.ones(EXAMPLES, requires_grad=True)
    objective = Objective(model, weighted, outer_loss=held_out, meta={"weights": weights})
    source = Minibatches.of((texts, texts), batch_size=BATCH, seed=0, indices=True)
    return objective, [Task(support=source, query=(query, query))]


def engine(steps: int, checkpoints: int | None) -> MAML:
    options: dict[str, Any] = {"lr": 1e-4, "steps": steps}
    if "eps_root" in AdamW.__dataclass_fields__:
        options["eps_root"] = 1e-9
    return MAML(inner=AdamW(**options), checkpoints=checkpoints, linearize=False, chunk_size=1)


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The least processor time of some calls."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def parts(objective: Objective, tasks: list[Task], repeats: int) -> tuple[float, float, float]:
    """Seconds of a step on the way, of one that is differentiated, and of all that is done once.

    From calls of few steps, with all states kept: K steps on the way alone (no derivative wanted) and K of both.
    """
    few, more = engine(1, None), engine(5, None)

    def forward(which: MAML) -> float:
        with torch.no_grad():
            return seconds(lambda: which(objective, tasks), repeats)

    def both(which: MAML) -> float:
        return seconds(lambda: which.value_and_grad(objective, tasks), repeats)

    both(few)  # what torch sets up once
    step = (forward(more) - forward(few)) / 4
    short = both(few)
    reverse = (both(more) - short) / 4 - step
    return step, reverse, short - step - reverse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--measured", type=int, default=256, help="the most steps whose peak is measured by a profile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--folder", action="store_true", help="keep the computation in a folder too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    objective, tasks = problem(*((32, 2) if options.small else (256, 4)), options.length)
    step, reverse, once = parts(objective, tasks, options.repeats)
    print(f"a step {step:.4f} s, differentiated {reverse:.4f} s, once {once:.4f} s\n")
    print("| T | states | steps taken | implied, s | measured, s | of implied | of T plain steps | peak, MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for steps in options.steps:
        states = isqrt(steps)
        taken = sweep(steps, states).steps
        implied = taken * step + steps * reverse + once

        call = partial(engine(steps, states).value_and_grad, objective, tasks)
        measured = seconds(call)
        peak = f"{peak_memory(call) / 1e6:.0f}" if steps <= options.measured else ""
        ratios = f"{measured / implied:.3f} | {measured / (steps * step):.2f}"
        print(f"| {steps} | {states} | {taken} | {implied:.1f} | {measured:.1f} | {ratios} | {peak} |", flush=True)
        if options.folder:
            with TemporaryDirectory() as folder:
                kept = seconds(partial(call, folder=Path(folder) / "run"))
            print(f"| {steps}, kept | {states} | {taken} | {implied:.1f} | {kept:.1f} | {kept / implied:.3f} | | |")


if __name__ == "__main__":
    main()
