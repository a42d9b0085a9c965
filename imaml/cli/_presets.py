"""Defaults that work, by dataset and strategy."""

from __future__ import annotations

from dataclasses import dataclass

from imaml.cli._options import (
    STRATEGIES,
    Compare,
    Dataset,
    EngineOptions,
    EpisodeOptions,
    MachineOptions,
    PlanOptions,
    Strategy,
    Train,
)
from imaml.training import Plan


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The defaults of one dataset.

    Args:
        episodes: What to learn.
        plans: How long and how fast each strategy trains.
        engines: How each computes its meta-gradient.
        why: What the problem shows.
        comparison: What `imaml compare` does otherwise.
        machine: Where `imaml compare` computes.
    """

    episodes: EpisodeOptions
    plans: dict[Strategy, Plan]
    engines: dict[Strategy, EngineOptions]
    comparison: PlanOptions
    why: str = ""
    machine: MachineOptions = MachineOptions()


def _alike(plan: Plan) -> dict[Strategy, Plan]:
    return dict.fromkeys(STRATEGIES, plan)


PRESETS: dict[Dataset, Preset] = {
    "sinusoid": Preset(
        episodes=EpisodeOptions(dataset="sinusoid", shots=10, queries=10),
        plans=_alike(Plan(steps=10_000, meta_batch=25, eval_every=500)),
        engines={
            "maml": EngineOptions(inner_lr=0.01, inner_steps=5),
            "fomaml": EngineOptions(inner_lr=0.01, inner_steps=5),
            "imaml": EngineOptions(inner_lr=0.01, inner_steps=16, regularization=10.0, cg_steps=5),
        },
        comparison=PlanOptions(val_tasks=100),
        machine=MachineOptions(threads=1),
    ),
    "glyphs": Preset(
        episodes=EpisodeOptions(dataset="glyphs", ways=20, shots=1, queries=1),
        # Found by benchmarks/tune_demo.py; benchmarks/results/demo says why iMAML's own steps are smaller than there.
        plans={
            "maml": Plan(steps=400, meta_batch=4, meta_lr=1.2e-2, eval_every=50),
            "fomaml": Plan(steps=400, meta_batch=4, meta_lr=6e-3, eval_every=50),
            "imaml": Plan(steps=400, meta_batch=4, meta_lr=6e-3, eval_every=50),
        },
        engines={
            "maml": EngineOptions(adapt=["head"], inner_lr=3.0, inner_steps=1),
            "fomaml": EngineOptions(adapt=["head"], inner_lr=1.0, inner_steps=8),
            "imaml": EngineOptions(adapt=["head"], inner_lr=0.1, inner_steps=4, regularization=0.2, cg_steps=5),
        },
        comparison=PlanOptions(val_tasks=100),
        machine=MachineOptions(threads=1),
        why=(
            "Twenty classes with one support image and one query image each: the exact and the implicit gradient teach "
            "the features by both, through the adaptation; first order has no derivative by the support images."
        ),
    ),
    "omniglot": Preset(
        episodes=EpisodeOptions(dataset="omniglot", ways=5, shots=1, queries=1),
        plans=_alike(Plan(steps=10_000, meta_batch=16, meta_lr=2e-3, eval_every=250)),
        engines={
            "maml": EngineOptions(inner_lr=0.4, inner_steps=1, chunk_size=8),
            "fomaml": EngineOptions(inner_lr=0.4, inner_steps=1, chunk_size=8),
            "imaml": EngineOptions(
                adapt=["head"], inner_lr=0.02, inner_steps=16, regularization=0.5, cg_steps=6, chunk_size=16
            ),
        },
        comparison=PlanOptions(minutes=60.0, val_tasks=100),
    ),
    "banking77": Preset(
        episodes=EpisodeOptions(dataset="banking77", ways=5, shots=1, queries=2),
        plans=_alike(Plan(steps=300, meta_batch=4, meta_lr=2e-5, eval_every=100, val_tasks=100)),
        engines={
            "maml": EngineOptions(adapt=["head"], inner_lr=0.1, inner_steps=5, chunk_size=1),
            "fomaml": EngineOptions(adapt=["head"], inner_lr=0.1, inner_steps=5, chunk_size=1),
            "imaml": EngineOptions(
                adapt=["head"], inner_lr=0.1, inner_steps=5, regularization=0.5, cg_steps=5, chunk_size=1
            ),
        },
        comparison=PlanOptions(minutes=60.0, val_tasks=100),
    ),
}


def train(dataset: Dataset, strategy: Strategy) -> Train:
    """The defaults of `imaml train`."""
    preset = PRESETS[dataset]
    engine, plan = preset.engines[strategy], preset.plans[strategy]
    return Train(strategy=strategy, episodes=preset.episodes, engine=engine, plan=plan)


def compare(dataset: Dataset) -> Compare:
    """The defaults of `imaml compare`."""
    preset = PRESETS[dataset]
    return Compare(episodes=preset.episodes, plan=preset.comparison, machine=preset.machine)
