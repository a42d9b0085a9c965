"""Small trainings, and whether two of them are the same to the last bit."""

import json
from pathlib import Path

import torch

from imaml.training import load_checkpoint

TIMES = ("milliseconds", "seconds")


def options(out: Path, strategy: str = "maml", steps: int = 40) -> list[str]:
    """A training with a checkpoint after every meta-step."""
    size = ["--meta-batch", "3", "--val-tasks", "4", "--eval-tasks", "5", "--eval-every", "7", "--steps", str(steps)]
    return ["train", "--dataset", "sinusoid", *size, "--strategy", strategy, "--save-minutes", "0", "--out", str(out)]


def resume(out: Path) -> list[str]:
    return ["train", "--resume", "--save-minutes", "0", "--out", str(out)]


def metrics(out: Path) -> list[dict]:
    """Every record but for its times, which no two runs share."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what two finished runs differ: metrics, parameters and moments, random state, test."""
    found = [] if metrics(ours) == metrics(theirs) else ["metrics.jsonl"]
    first, second = (load_checkpoint(folder / "checkpoint.pt") for folder in (ours, theirs))
    found += [name for name in ("model", "optimizer", "step", "rng") if not _same(first[name], second[name])]
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    return found + [name for name in ("mean", "interval", "steps") if results[0][name] != results[1][name]]


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b
