"""What this library should reach: ratios within one run, and absolute limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.rivals import METHODS
from benchmarks.summary import Figure
from benchmarks.workloads import WORKLOADS

Quantity = Literal["seconds", "bytes", "equivalents", "arithmetic", "first", "first_warm"]
RECIPES = ("torch.func, vmap inside", "torch.func, vmap outside")
LIBRARIES = ("learn2learn", "higher", "TorchOpt explicit")
EXACT = tuple(name for name, m in METHODS.items() if m.family == "exact" and not name.startswith("imaml"))


def _allowance(products: float, gradients: float, per_step: float, vectors: float) -> Callable[[Figure], float | None]:
    """Bytes as a sum of those of a product, of a gradient, and of copies of theta."""

    def of(figure: Figure) -> float | None:
        product, gradient, theta = figure.product_bytes, figure.gradient_bytes, figure.theta_bytes
        if product is None or gradient is None or theta is None:
            return None
        return products * product + gradients * gradient + (per_step * figure.steps + vectors) * theta

    return of


ALLOWANCES = {
    "one HVP's + K thetas": _allowance(1, 0, 1, 0),
    "1.1 x one HVP's + 6 thetas": _allowance(1.1, 0, 0, 6),
    "one gradient's": _allowance(0, 1, 0, 0),
}
"""Bytes that a goal compares with in place of a rival's."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`ours` needs at most `factor` times what `theirs` needs; or at most `factor`, where there is no rival."""

    workload: str
    steps: int
    quantity: Quantity
    ours: str
    theirs: str | None = None
    """A rival, or one of `ALLOWANCES`."""
    factor: float

    def reached(self, figures: Sequence[Figure]) -> float | None:
        """What `factor` is in the measured figures; None where one is missing."""
        here = {f.method: f for f in figures if (f.workload, f.steps) == (self.workload, self.steps)}
        if self.ours not in here:
            return None
        theirs: float | None = 1.0
        if self.theirs in ALLOWANCES:
            theirs = ALLOWANCES[self.theirs](here[self.ours])
        elif self.theirs is not None:
            theirs = getattr(here.get(self.theirs), self.quantity, None)
        ours = getattr(here[self.ours], self.quantity)
        return None if ours is None or theirs is None else ours / theirs

    @property
    def title(self) -> str:
        what = {
            "seconds": "time",
            "bytes": "peak memory",
            "equivalents": "gradient-equivalents by time",
            "arithmetic": "gradient-equivalents by arithmetic",
            "first": "CPU seconds of the first call",
            "first_warm": "CPU seconds of the first call, from a warm cache,",
        }[self.quantity]
        title = f"{self.workload}, K = {self.steps}: {what} of {self.ours}"
        return f"{title} / {self.theirs}" if self.theirs else title


def _faster(workload: str, steps: int, rivals: Sequence[str], times: float, ours: str = "imaml MAML") -> list[Goal]:
    return [
        Goal(workload=workload, steps=steps, quantity="seconds", ours=ours, theirs=rival, factor=1 / times)
        for rival in rivals
    ]


def _leaner(workload: str, steps: int, ours: str, theirs: str | None, factor: float) -> Goal:
    return Goal(workload=workload, steps=steps, quantity="bytes", ours=ours, theirs=theirs, factor=factor)


def _equivalents(steps: int, ours: str, limit: float) -> list[Goal]:
    kinds: tuple[Quantity, ...] = ("equivalents", "arithmetic")
    return [Goal(workload="W3", steps=steps, quantity=kind, ours=ours, factor=limit) for kind in kinds]


GOALS = (
    *_faster("W1", 5, LIBRARIES, 10),
    *_faster("W1", 5, RECIPES, 2.5),
    *_faster("W1", 5, LIBRARIES, 10, ours="imaml MAML, compile=True"),
    *_faster("W1", 5, RECIPES, 2.5, ours="imaml MAML, compile=True"),
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
    *(
        goal
        for steps in WORKLOADS["W3"].steps
        for goal in (
            _leaner("W3", steps, "imaml MAML", "one HVP's + K thetas", 1.15),
            _leaner("W3", steps, "imaml ImplicitMAML", "1.1 x one HVP's + 6 thetas", 1),
            _leaner("W3", steps, "imaml ImplicitMAML, linearize=False", "1.1 x one HVP's + 6 thetas", 1),
            _leaner("W3", steps, "imaml FOMAML", "one gradient's", 1.1),
            *_equivalents(steps, "imaml FOMAML", 1.05 * (steps + 1)),
            *_equivalents(steps, "imaml MAML", 4.2 * steps + 1),
            *_equivalents(steps, "imaml ImplicitMAML", 1.05 * (steps + 1) + 1.2 + 2.2 * WORKLOADS["W3"].solver_steps),
        )
    ),
)


def _beside(workload: str, steps: int, ours: str, factor: float, theirs: str = "JAX") -> Goal:
    return Goal(workload=workload, steps=steps, quantity="seconds", ours=ours, theirs=theirs, factor=factor)


def _first(workload: str, steps: int, cold: float, warm: float) -> list[Goal]:
    ours = "imaml MAML, compile=True"
    kinds: tuple[tuple[Quantity, float], ...] = (("first", cold), ("first_warm", warm))
    return [Goal(workload=workload, steps=steps, quantity=kind, ours=ours, factor=limit) for kind, limit in kinds]


TORCH = (*RECIPES, "create_graph loop")
BESIDE_JAX = (
    *(
        goal
        for steps in (1, 5, 10, 50)
        for goal in (
            _beside("W1", steps, "imaml MAML, compile=True", 1.3),
            *_first("W1", steps, 4, 1.5),
            _beside("W1", steps, "imaml MAML", 4),
            *_faster("W1", steps, RECIPES, 1.3),
        )
    ),
    *(
        goal
        for steps in (1, 5, 16)
        for goal in (
            _beside("W2", steps, "imaml MAML, compile=True", 1.1),
            *_faster("W2", steps, TORCH, 2, ours="imaml MAML, compile=True"),
            *_first("W2", steps, 30, 10),
            *_faster("W2", steps, TORCH, 1.3),
        )
    ),
    *_faster("W2-15", 5, TORCH, 1.3),
    *(
        _beside("W2-implicit", 16, f"imaml ImplicitMAML{how}", 1.2, theirs="JAX, implicit")
        for how in ("", ", compile=True")
    ),
    *(
        goal
        for steps in (4, 16)
        for goal in (
            _beside("W3", steps, "imaml MAML, linearize=True", 0.80),
            _beside("W3", steps, "imaml MAML, linearize=True", 1.02, theirs="create_graph loop"),
        )
    ),
    *(_leaner("W3", steps, "imaml MAML", "JAX, leanest", 1) for steps in (1, 4, 16)),
)
"""What this library should reach beside JAX, by processor time in turns (`benchmarks.against_jax`)."""
