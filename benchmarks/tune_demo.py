"""The settings of the demo, found on validation tasks of Glyphs.

    python -m benchmarks.tune_demo [--gigaflops 150] [--out FOLDER]

The problem is that of `imaml compare --dataset glyphs`. Every trial has the same arithmetic for its meta-steps, counted
in flops, to which the time on one thread is in proportion: a cheap gradient takes more steps. MAML and FOMAML choose
from the same list. In turn: the inner loop, at one meta learning rate; that rate halved and doubled; the best of all
from two more seeds, to see the spread. No test task is looked at. Writes `tuning.jsonl`, a line a trial; trials that it
holds are not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from imaml.cli._experiment import build_engine, build_experiment, given
from imaml.cli._options import STRATEGIES, EngineOptions, MachineOptions, Strategy
from imaml.cli._presets import PRESETS
from imaml.measure import counted
from imaml.training import Plan, Trainer

HEAD = ["head"]
EXPLICIT = [
    EngineOptions(adapt=HEAD, inner_lr=1.0, inner_steps=1),
    EngineOptions(adapt=HEAD, inner_lr=3.0, inner_steps=1),
    EngineOptions(adapt=HEAD, inner_lr=0.3, inner_steps=4),
    EngineOptions(adapt=HEAD, inner_lr=1.0, inner_steps=4),
    EngineOptions(adapt=HEAD, inner_lr=3.0, inner_steps=4),
    EngineOptions(adapt=HEAD, inner_lr=1.0, inner_steps=8),
    EngineOptions(adapt=HEAD, inner_lr=3.0, inner_steps=8),
    EngineOptions(adapt=HEAD, inner_lr=1.0, inner_steps=16),
    EngineOptions(inner_lr=0.4, inner_steps=1),
    EngineOptions(inner_lr=1.0, inner_steps=1),
    EngineOptions(inner_lr=0.1, inner_steps=4),
    EngineOptions(inner_lr=0.3, inner_steps=4),
]
IMPLICIT = [
    EngineOptions(adapt=HEAD, inner_lr=0.1, inner_steps=4, regularization=0.2, cg_steps=5),
    EngineOptions(adapt=HEAD, inner_lr=0.3, inner_steps=4, regularization=0.2, cg_steps=5),
    EngineOptions(adapt=HEAD, inner_lr=0.3, inner_steps=8, regularization=0.2, cg_steps=5),
    EngineOptions(adapt=HEAD, inner_lr=0.3, inner_steps=8, regularization=0.05, cg_steps=5),
    EngineOptions(adapt=HEAD, inner_lr=0.3, inner_steps=8, regularization=1.0, cg_steps=5),
    EngineOptions(adapt=HEAD, inner_lr=1.0, inner_steps=8, regularization=0.2, cg_steps=5),
]
INNER: dict[Strategy, list[EngineOptions]] = {"maml": EXPLICIT, "fomaml": EXPLICIT, "imaml": IMPLICIT}
META_LR, META_BATCH, VAL_TASKS = 6e-3, 4, 200
Setting = tuple[EngineOptions, float, int]


class Tuner:
    """Trials of one strategy, each remembered in a file."""

    def __init__(self, strategy: Strategy, gigaflops: float, file: Path) -> None:
        self.strategy, self.gigaflops, self.file = strategy, gigaflops, file
        self.lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def tune(self) -> None:
        tried: list[Setting] = [(engine, META_LR, META_BATCH) for engine in INNER[self.strategy]]
        engine, meta_lr, batch = self.best(tried)
        tried += [(engine, meta_lr * factor, batch) for factor in (0.5, 2.0)]
        engine, meta_lr, batch = best = self.best(tried)
        chosen = {**given(engine), "meta_lr": meta_lr, "meta_batch": batch}
        seeds = ", ".join(f"{100 * self.trial(best, seed):.1f}" for seed in range(3))
        print(f"{self.strategy}: {seeds} % with {chosen}", flush=True)

    def best(self, settings: list[Setting]) -> Setting:
        return max(settings, key=lambda setting: self.trial(setting, 0))

    def trial(self, setting: Setting, seed: int) -> float:
        """The accuracy on validation tasks."""
        engine, meta_lr, batch = setting
        key = {
            "strategy": self.strategy,
            "engine": given(engine),
            "meta_lr": meta_lr,
            "meta_batch": batch,
            "seed": seed,
        }
        for line in self.lines:
            if line | key == line:
                return float(line["val"])
        result = train(self.strategy, setting, seed, self.gigaflops)
        self.lines.append(key | result)
        with self.file.open("a") as stream:
            stream.write(json.dumps(self.lines[-1]) + "\n")
        print(json.dumps(self.lines[-1]), flush=True)
        return float(result["val"])


def train(strategy: Strategy, setting: Setting, seed: int, gigaflops: float) -> dict[str, float]:
    """As many meta-steps as the arithmetic allows, then a validation; accuracy 0 where the training diverged."""
    options, meta_lr, batch = setting
    experiment = build_experiment(replace(PRESETS["glyphs"].episodes, seed=seed), MachineOptions(threads=1))
    model, engine = experiment.fresh_model(), build_engine(strategy, options)
    objective, tasks = experiment.objective(model, options.adapt), experiment.episodes.batch("train", 0, batch)
    flops = counted(lambda: engine.value_and_grad(objective, tasks)).flops
    plan = Plan(
        steps=max(1, round(1e9 * gigaflops / flops)),
        meta_batch=batch,
        meta_lr=meta_lr,
        eval_every=10**9,
        val_tasks=VAL_TASKS,
    )
    trainer = Trainer(model=model, objective=objective, engine=engine, episodes=experiment.episodes, plan=plan)
    try:
        *_, last = trainer
    except FloatingPointError:
        return {"val": 0.0, "interval": 0.0, "steps": plan.steps}
    assert last.val is not None
    return {"val": round(last.val.mean, 4), "interval": round(last.val.interval, 4), "steps": plan.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigaflops", type=float, default=150.0, help="arithmetic of a trial's meta-steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for strategy in STRATEGIES:
        Tuner(strategy, options.gigaflops, options.out / "tuning.jsonl").tune()


if __name__ == "__main__":
    main()
