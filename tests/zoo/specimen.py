"""A specimen of the zoo, and how it gets there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.zoo.problems import Problem, Setup
from tests.zoo.right import Make


@dataclass(frozen=True)
class Specimen:
    """A wrong implementation, `make(setup)(objective, tasks)`, and a problem on which it shows."""

    name: str
    make: Make
    setup: Setup
    problem: Callable[[], Problem]
    story: str
    """Where such defects occur."""
    cause: str | None = None
    """What `Verification.cause` must contain."""

    @property
    def against(self) -> str:
        return self.setup.against


ZOO: list[Specimen] = []


def specimen(
    setup: Setup, problem: Callable[[], Problem], *, story: str, cause: str | None = None
) -> Callable[[Make], Make]:
    """Decorator that adds a wrong implementation to the zoo under its own name."""

    def add(make: Make) -> Make:
        ZOO.append(Specimen(make.__name__, make, setup, problem, story, cause))
        return make

    return add
