"""What rounding leaves of a meta-gradient through a training, and what the growth of the cotangent says of it.

    python -m benchmarks.smoothness
    python -m benchmarks.smoothness --gpt2     # needs transformers; some minutes

Small networks fit random labels, with a weight for every example as a meta-parameter. Printed are the growth of the
cotangent times the rounding unit, and the relative error of the meta-gradient by the weights, both in float32, and the
relative distance over which the outer loss follows that meta-gradient, as `imaml.verify.smoothness` finds it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import MAML, AdamW, GradientDescent, InnerOptimizer, NonFiniteError, Objective, TaskBatch
from imaml._errors import DivergenceError, PrecisionWarning
from imaml.models import MLP
from imaml.verify._figures import Figures
from imaml.verify._training import Training

UNIT = torch.finfo(torch.float32).eps / 2


class Language(nn.Module):
    """GPT-2's shape, with logits of every token."""

    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def weighted(output: Tensor, target: Tensor, meta: dict[str, Tensor]) -> Tensor:
    """The mean over examples of their weighted cross entropy."""
    return (meta["weight"] * _each(output, target)).mean()


def plain(output: Tensor, target: Tensor) -> Tensor:
    """The mean over examples of their cross entropy."""
    return _each(output, target).mean()


def _each(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(len(target), -1).mean(1)


def objective(model: nn.Module, examples: int) -> Objective:
    """With a weight for every example."""
    return Objective(model, weighted, outer_loss=plain, meta={"weight": torch.ones(examples, requires_grad=True)})


def labels(model: nn.Module) -> tuple[Objective, TaskBatch]:
    """32 random vectors with random labels."""
    x, y = torch.randn(2, 1, 32, 20), torch.randint(5, (2, 1, 32))
    return objective(model, 32), TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def texts(model: nn.Module, vocabulary: int, length: int) -> tuple[Objective, TaskBatch]:
    """8 random texts."""
    tokens = torch.randint(vocabulary, (2, 1, 8, length + 1))
    support, query = ((t[..., :-1], t[..., 1:]) for t in tokens)
    return objective(model, 8), TaskBatch(support=support, query=query)


def small() -> Iterator[tuple[str, tuple[Objective, TaskBatch], InnerOptimizer]]:
    """Networks of two hidden layers, from step sizes that are small to such that are too large."""
    for name, activation in (("tanh", nn.Tanh), ("ReLU", nn.ReLU)):
        for steps in (16, 64):
            inner: list[tuple[str, InnerOptimizer]] = []
            for lr in (0.1, 1.0, 2.0, 3.0, 5.0):
                inner += [
                    (f"descent, lr {lr:g}", GradientDescent(lr=lr, steps=steps)),
                    (f"momentum, lr {lr:g}", GradientDescent(lr=lr, steps=steps, momentum=0.9)),
                ]
            for lr in (1e-3, 1e-2, 1e-1):
                inner += [
                    (f"AdamW, lr {lr:g}", AdamW(lr=lr, steps=steps)),
                    (f"AdamW, eps_root 1e-9, lr {lr:g}", AdamW(lr=lr, steps=steps, eps_root=1e-9)),
                ]
            for words, one in inner:
                torch.manual_seed(0)
                yield f"{name} | {words}", labels(MLP(20, 5, (64, 64), activation)), one


def gpt2() -> Iterator[tuple[str, tuple[Objective, TaskBatch], InnerOptimizer]]:
    """GPT-2 of 4 layers, d = 256, 1000 tokens, sequences of 32."""
    for lr in (1e-4, 1e-3):
        for words, inner in (
            ("AdamW, eps 1e-8", AdamW(lr=lr, steps=16)),
            ("AdamW, eps 1e-6", AdamW(lr=lr, steps=16, eps=1e-6)),
            ("AdamW, eps_root 1e-9", AdamW(lr=lr, steps=16, eps_root=1e-9)),
        ):
            torch.manual_seed(0)
            yield f"GPT-2 | {words}, lr {lr:g}", texts(Language(1000, 256, 4, 32), 1000, 32), inner


def row(name: str, problem: tuple[Objective, TaskBatch], inner: InnerOptimizer) -> str:
    """A line of the table."""
    engine, start = MAML(inner=inner), f"| {name} | {inner.steps} |"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            growth = engine(*problem).report.growth
            figures = Figures.of(Training.of_engine(engine, *problem, of=["weight"], seed=0))
    except (DivergenceError, NonFiniteError) as error:
        return f"{start} {type(error).__name__} | | |"
    assert growth is not None
    return f"{start} {growth.max().item() * UNIT:.0e} | {figures.error:.0e} | {figures.reach:g} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpt2", action="store_true")
    print("| model | inner loop | steps | growth x unit | error in float32 | followed over |")
    print("|---|---|---|---|---|---|")
    for case in gpt2() if parser.parse_args().gpt2 else small():
        print(row(*case), flush=True)


if __name__ == "__main__":
    main()
