"""How much Python stands between a call and the model: calls of an evaluation, and the files and frames on the way.

`python -m benchmarks.calls` prints them. They are counts by `sys.setprofile`, and the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import imaml
from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, Task

PACKAGE = str(Path(imaml.__file__).parent)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def deep() -> nn.Module:
    """301 modules, one of them the whole."""
    return nn.Sequential(*(layer for _ in range(150) for layer in (nn.Linear(4, 4), nn.Tanh())))


def counted(run: Callable[[], Any]) -> int:
    """Calls of Python functions, resumed generators among them."""
    count = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def evaluation(model: nn.Module) -> tuple[int, int]:
    """Calls of one more evaluation within a call of `FOMAML`, and those of `functional_call` and the loss alone."""
    objective, task = problem(model)
    values = {n: p.detach() for n, p in model.named_parameters()}
    bare = counted(lambda: F.mse_loss(functional_call(model, values, (task.support[0],)), task.support[1]))
    totals = []
    for steps in (2, 3):
        engine = FOMAML(inner=GradientDescent(lr=0.1, steps=steps), chunk_size=1)
        engine(objective, [task])
        totals.append(counted(lambda engine=engine: engine(objective, [task])))
    return totals[1] - totals[0], bare


def way(engine: Any) -> tuple[int, int, int]:
    """Files of the library that a call passes, its most calls on the stack, and calls from one file to another."""
    objective, task = problem(mlp())
    engine(objective, [task])
    files: set[str] = set()
    deepest = changes = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal deepest, changes
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        files.add(frame.f_code.co_filename)
        depth, before, up = 0, None, frame
        while up is not None:
            if up.f_code.co_filename.startswith(PACKAGE):
                depth += 1
                if depth == 2:
                    before = up.f_code.co_filename
            up = up.f_back
        deepest, changes = max(deepest, depth), changes + (before not in (None, frame.f_code.co_filename))

    sys.setprofile(profile)
    try:
        engine(objective, [task])
    finally:
        sys.setprofile(None)
    return len(files), deepest, changes


def problem(model: nn.Module) -> tuple[Objective, Task]:
    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(5, 4)
        return x, torch.randn_like(model(x).detach())

    return Objective(model, F.mse_loss), Task(support=batch(), query=batch())


def main() -> None:
    for name, model in {"301 modules": deep(), "MLP": mlp()}.items():
        ours, bare = evaluation(model)
        print(f"an inner step of {name}: {ours} calls, {bare} of functional_call and the loss")
    inner = GradientDescent(lr=0.1, steps=1)
    engines = (
        FOMAML(inner=inner, chunk_size=1),
        MAML(inner=inner, chunk_size=1),
        ImplicitMAML(inner=inner, solver=CG(max_steps=1), chunk_size=1, on_failure="ignore"),
    )
    for engine in engines:
        files, frames, changes = way(engine)
        print(f"one call of {type(engine).__name__}, K = 1: {files} files, {frames} frames, {changes} changes of file")


if __name__ == "__main__":
    main()
