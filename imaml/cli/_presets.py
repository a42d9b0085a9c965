"""Defaults that work, by dataset and strategy."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from imaml.cli._options import Compare, Dataset, EngineOptions, EpisodeOptions, Strategy, Train
from imaml.training import Plan


class Preset(NamedTuple):
    """The defaults of one dataset."""

    episodes: EpisodeOptions
    plan: Plan
    engines: dict[Strategy, EngineOptions]
    minutes_to_compare: float


PRESETS: dict[Dataset, Preset] = {
    "sinusoid": Preset(
        EpisodeOptions(dataset="sinusoid", shots=10, queries=10),
        Plan(steps=10_000, meta_batch=25, eval_every=500),
        {
            "maml": EngineOptions(inner_lr=0.01, inner_steps=5),
            "fomaml": EngineOptions(inner_lr=0.01, inner_steps=5),
            "imaml": EngineOptions(inner_lr=0.01, inner_steps=16, regularization=10.0, cg_steps=5),
        },
        minutes_to_compare=10.0,
    ),
    "glyphs": Preset(
        EpisodeOptions(dataset="glyphs", ways=5, shots=1, queries=5),
        Plan(steps=10_000, meta_batch=8, meta_lr=2e-3, eval_every=50),
        {
            "maml": EngineOptions(inner_lr=0.15, inner_steps=5, chunk_size=8),
            "fomaml": EngineOptions(inner_lr=0.15, inner_steps=5, chunk_size=8),
            "imaml": EngineOptions(inner_lr=0.15, inner_steps=5, regularization=0.5, cg_steps=1, chunk_size=8),
        },
        minutes_to_compare=4.5,
    ),
    "omniglot": Preset(
        EpisodeOptions(dataset="omniglot", ways=5, shots=1, queries=1),
        Plan(steps=10_000, meta_batch=16, meta_lr=2e-3, eval_every=250),
        {
            "maml": EngineOptions(inner_lr=0.4, inner_steps=1, chunk_size=8),
            "fomaml": EngineOptions(inner_lr=0.4, inner_steps=1, chunk_size=8),
            "imaml": EngineOptions(
                adapt=["head"], inner_lr=0.02, inner_steps=16, regularization=0.5, cg_steps=6, chunk_size=16
            ),
        },
        minutes_to_compare=60.0,
    ),
    "banking77": Preset(
        EpisodeOptions(dataset="banking77", ways=5, shots=1, queries=2),
        Plan(steps=300, meta_batch=4, meta_lr=2e-5, eval_every=100, val_tasks=100),
        {
            "maml": EngineOptions(adapt=["head"], inner_lr=0.1, inner_steps=5, chunk_size=1),
            "fomaml": EngineOptions(adapt=["head"], inner_lr=0.1, inner_steps=5, chunk_size=1),
            "imaml": EngineOptions(
                adapt=["head"], inner_lr=0.1, inner_steps=5, regularization=0.5, cg_steps=5, chunk_size=1
            ),
        },
        minutes_to_compare=60.0,
    ),
}


def train(dataset: Dataset, strategy: Strategy) -> Train:
    """The defaults of `imaml train`."""
    preset = PRESETS[dataset]
    return Train(strategy=strategy, episodes=preset.episodes, engine=preset.engines[strategy], plan=preset.plan)


def compare(dataset: Dataset) -> Compare:
    """The defaults of `imaml compare`."""
    preset = PRESETS[dataset]
    plan = replace(preset.plan, minutes=preset.minutes_to_compare, val_tasks=100)
    return Compare(episodes=preset.episodes, plan=plan)
