"""How much Python stands between a call and the model: calls of an evaluation, and the files and frames on the way.

`python -m benchmarks.calls` prints them. They are counts by `sys.setprofile`, and the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import imaml
import imaml_solvers
from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, Solution, Task

PACKAGES = tuple(str(Path(package.__file__).parent) for package in (imaml, imaml_solvers))


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


class Stack(nn.Module):
    """A model that notes the files and frames of the library that stand between a call and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.files, self.frames = mlp(), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        found, frame = [], sys._getframe()
        while (frame := frame.f_back) is not None:
            if frame.f_code.co_filename.startswith(PACKAGES):
                found.append(frame.f_code.co_filename)
        self.files, self.frames = max(self.files, len(set(found))), max(self.frames, len(found))
        return self.body(x)


def before_the_model(engine: Any) -> tuple[int, int]:
    """Files and frames on the stack, from the engine to the model: the most in a call after the first."""
    model = Stack()
    objective, task = problem(model)
    engine(objective, [task])
    model.files = model.frames = 0
    engine(objective, [task])
    return model.files, model.frames


def passed(run: Callable[[], Any]) -> tuple[int, int, int]:
    """Files of the library that something passes, its most calls on the stack, and calls from one file to another."""
    files: set[str] = set()
    deepest = changes = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal deepest, changes
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGES):
            return
        files.add(frame.f_code.co_filename)
        depth, before, up = 0, None, frame
        while up is not None:
            if up.f_code.co_filename.startswith(PACKAGES):
                depth += 1
                if depth == 2:
                    before = up.f_code.co_filename
            up = up.f_back
        deepest, changes = max(deepest, depth), changes + (before not in (None, frame.f_code.co_filename))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(files), deepest, changes


@dataclass(frozen=True, kw_only=True)
class Looking(CG):
    """CG that notes what its second product passes; the first shows what there is to find out."""

    found: list[tuple[int, int]] = field(default_factory=list)

    def solve(self, op: Any, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        op.mv(rhs)
        depth = _depth()
        files, frames, _ = passed(lambda: op.mv(rhs))
        self.found.append((files, frames - depth))
        return super().solve(op, rhs, x0=x0)


def _depth() -> int:
    """Frames of the library on the stack."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        count, frame = count + frame.f_code.co_filename.startswith(PACKAGES), frame.f_back
    return count


def product(*, linearize: bool) -> tuple[int, int]:
    """Files and frames that a product of a linear solve passes, from the operator that the solver has."""
    solver = Looking(max_steps=1)
    inner = GradientDescent(lr=0.1, steps=1)
    engine = ImplicitMAML(inner=inner, solver=solver, chunk_size=1, on_failure="ignore", linearize=linearize)
    objective, task = problem(mlp())
    for _ in range(2):
        engine(objective, [task])
    return solver.found[-1]


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
        name, (objective, task) = type(engine).__name__, problem(mlp())
        files, frames = before_the_model(engine)
        print(f"{name}, K = 1: {files} files and {frames} frames stand between the call and the model", end="; ")
        engine(objective, [task])
        files, frames, changes = passed(partial(engine, objective, [task]))
        print(f"in all {files} files, {frames} frames, {changes} changes of file")
    for linearize, what in ((True, "with the graph kept"), (False, "rebuilt")):
        files, frames = product(linearize=linearize)
        print(f"a product {what}: {files} files, {frames} frames")


if __name__ == "__main__":
    main()
