"""JAX, in a process and an environment of its own: this side writes the problem and asks.

Parameters and tasks go through a file, and only questions and seconds through the pipe (`benchmarks.pipes`). The
programs are in `benchmarks.jax_programs`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import Transformer
from benchmarks.pipes import Process
from benchmarks.reference import flat
from benchmarks.rivals import environment
from benchmarks.workloads import Family, Problem
from imaml.measure import Timing
from imaml.models import MLP, Conv4

ROOT = Path(__file__).resolve().parents[2]


class Elsewhere:
    """A call that another process makes, and answers for.

    Args:
        problem: What to compute.
        way: `reverse`, `tangents` or `lean`, of `benchmarks.jax_programs`.
        family: What is computed.
        variables: Of the process's environment.
    """

    def __init__(
        self, problem: Problem, way: str, family: Family = "exact", variables: Mapping[str, str] | None = None
    ) -> None:
        python = environment.jax_python()
        if not python.exists():
            raise FileNotFoundError(
                "JAX has no environment of its own here: `python -m benchmarks.rivals.environment` makes it"
            )
        self._names, self._folder = list(problem.parameters), tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "problem.npz"
        np.savez(file, **_arrays(problem, family))
        command = [str(python), "-m", "benchmarks.jax_programs", str(file), way]
        self.process = Process(
            [*command, "--threads", str(torch.get_num_threads())],
            {**(variables or {}), "PYTHONPATH": str(ROOT)},
        )
        self._started = False

    def start(self) -> dict[str, float]:
        """Compile, and call for the first time."""
        self._started = True
        return self.process.ask("first")

    def __call__(self) -> list[Tensor]:
        self.seconds()
        return self._returned()

    def gradient(self) -> Tensor:
        """What the last call returned, as one vector."""
        return flat(self._returned())

    def _returned(self) -> list[Tensor]:
        file = Path(self._folder.name) / "gradient.npz"
        self.process.ask(f"gradient {file}")
        with np.load(file) as found:
            return [torch.from_numpy(found[name]) for name in self._names]

    def seconds(self, calls: int = 1) -> dict[str, float]:
        """Processor and wall seconds of a call, the mean of some in a row; of one if it is the first."""
        return self.process.ask(f"call {calls}") if self._started else self.start()

    def timed(self, repeats: int) -> Timing:
        """Wall time, after a first call."""
        self.seconds()
        taken = [self.seconds()["wall"] for _ in range(repeats)]
        return Timing(median=median(taken), spread=max(taken) - min(taken))

    def peak_memory(self) -> int:
        """Bytes besides the arguments, by XLA's account of the compiled program."""
        if not self._started:
            self.start()
        return int(self.process.ask("memory")["bytes"])

    def close(self) -> None:
        self.process.close()
        self._folder.cleanup()

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.close()


def _arrays(problem: Problem, family: Family) -> dict[str, Any]:
    model = problem.model
    name = type(model).__name__
    options: dict[str, Any] = {}
    if isinstance(model, MLP):
        options["activation"] = type(model[1]).__name__
    elif isinstance(model, Transformer):
        options["heads"] = model.encoder.layers[0].self_attn.num_heads
    elif not isinstance(model, Conv4):
        raise NotImplementedError(f"{name} is not written in JAX")
    about = {
        "model": name,
        "options": options,
        "loss": problem.criterion.__name__,
        "names": list(problem.parameters),
        "float64": next(model.parameters()).dtype == torch.float64,
        "family": family,
        "lr": problem.lr,
        "steps": problem.steps,
        "regularization": problem.regularization,
        "solver_steps": problem.solver_steps,
    }
    arrays: dict[str, Any] = {f"parameters/{n}": p.detach().numpy() for n, p in problem.parameters.items()}
    for part, batch in (("support", problem.tasks.support), ("query", problem.tasks.query)):
        for i, tensor in enumerate(batch):
            values = tensor.numpy()
            arrays[f"{part}/{i}"] = values if tensor.is_floating_point() else values.astype(np.int32)
    return arrays | {"about": json.dumps(about)}


def reverse(problem: Problem) -> Elsewhere:
    return Elsewhere(problem, "reverse")


def tangents(problem: Problem) -> Elsewhere:
    return Elsewhere(problem, "tangents")


def lean(problem: Problem) -> Elsewhere:
    return Elsewhere(problem, "lean")


def implicit(problem: Problem) -> Elsewhere:
    return Elsewhere(problem, "reverse", "implicit")


def implicit_lean(problem: Problem) -> Elsewhere:
    return Elsewhere(problem, "lean", "implicit")
