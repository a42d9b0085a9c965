"""What this library should reach: ratios within one run, and absolute limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.rivals import METHODS
from benchmarks.summary import Figure

Quantity = Literal["seconds", "bytes", "equivalents"]
RECIPES = ("torch.func, vmap inside", "torch.func, vmap outside")
LIBRARIES = ("learn2learn", "higher", "TorchOpt explicit")
EXACT = tuple(name for name, m in METHODS.items() if m.family == "exact" and not name.startswith("imaml"))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`ours` needs at most `factor` times what `theirs` needs; or at most `factor`, where there is no rival."""

    workload: str
    steps: int
    quantity: Quantity
    ours: str
    theirs: str | None = None
    factor: float

    def reached(self, figures: Sequence[Figure]) -> float | None:
        """What `factor` is in the measured figures; None where one is missing."""
        values = {f.method: getattr(f, self.quantity) for f in figures if (f.workload, f.steps) == self._where}
        ours, theirs = values.get(self.ours), values.get(self.theirs) if self.theirs else 1.0
        return None if ours is None or theirs is None else ours / theirs

    @property
    def _where(self) -> tuple[str, int]:
        return self.workload, self.steps

    @property
    def title(self) -> str:
        what = {"seconds": "time", "bytes": "peak memory", "equivalents": "gradient-equivalents"}[self.quantity]
        title = f"{self.workload}, K = {self.steps}: {what} of {self.ours}"
        return f"{title} / {self.theirs}" if self.theirs else title


def _faster(workload: str, steps: int, rivals: Sequence[str], times: float, ours: str = "imaml MAML") -> list[Goal]:
    return [
        Goal(workload=workload, steps=steps, quantity="seconds", ours=ours, theirs=rival, factor=1 / times)
        for rival in rivals
    ]


def _leaner(workload: str, steps: int, ours: str, theirs: str | None, factor: float) -> Goal:
    return Goal(workload=workload, steps=steps, quantity="bytes", ours=ours, theirs=theirs, factor=factor)


def _equivalents(steps: int, ours: str, limit: float) -> Goal:
    return Goal(workload="W3", steps=steps, quantity="equivalents", ours=ours, factor=limit)


GOALS = (
    *_faster("W1", 5, LIBRARIES, 10),
    *_faster("W1", 5, RECIPES, 2.5),
    *_faster("W2", 1, EXACT, 2.5),
    *_faster("W2", 5, EXACT, 2.5),
    *_faster("W2-implicit", 16, ["TorchOpt implicit"], 3, ours="imaml ImplicitMAML"),
    _leaner("W2", 5, "imaml MAML, chunk_size=1", "create_graph loop", 1),
    _leaner("W2", 5, "imaml MAML", None, 256e6),
    *(_leaner("W2", 5, "imaml MAML", recipe, 1 / 4) for recipe in RECIPES),
    *_faster("W2-15", 1, EXACT, 1.2),
    *_faster("W2-15", 5, EXACT, 1.2),
    *_faster("W3", 16, ["create_graph loop"], 1 / 1.1),
    _leaner("W3", 16, "imaml MAML", "create_graph loop", 1 / 6),
    _leaner("W3", 4, "imaml MAML", "torch-maml, checkpointing", 1),
    _leaner("W3", 16, "imaml MAML", "torch-maml, checkpointing", 1),
    _leaner("W3", 64, "imaml MAML, checkpoints=4", "create_graph loop", 1 / 30),
    *(_equivalents(steps, "imaml FOMAML", 1.05 * (steps + 1)) for steps in (4, 16)),
    *(_equivalents(steps, "imaml MAML", 4.2 * steps + 1) for steps in (4, 16)),
)
