"""What one call was given, as it was when the call began."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from imaml._losses.layout import Layout
from imaml._losses.replay import Replay
from imaml._objective.blocks import Blocks
from imaml._objective.buffers import Constants, HeldBuffers
from imaml._objective.faithful import Survey
from imaml._objective.objective import Objective


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The objective, its parameters and buffers, and the random draws, for every evaluation of one call."""

    objective: Objective
    layout: Layout
    """Layout of the adapted parameters."""
    like: Tensor
    """A tensor of no entries, in the dtype and on the device of flat vectors."""
    shared_layout: Layout
    """Layout of the shared parameters: those that do not adapt but are learned, the objective's `meta` among them."""
    shared: list[Tensor]
    """Values of the shared parameters."""
    initial: list[Tensor]
    """Values of the adapted parameters before the inner loop, as the user holds them, for a query loss that takes them
    by themselves; empty for others."""
    constants: Constants
    """Copies of the model's buffers."""
    survey: Survey
    """What the model needs in a forward pass."""
    held: HeldBuffers
    """Buffers of the modules that the losses and the metric hold."""
    replay: Replay
    differentiates: bool = True
    """Whether the call is asked for derivatives, and does not only evaluate."""

    @property
    def theta(self) -> Tensor:
        """The adapted parameters as a new flat vector `(n,)`: whoever needs it for a while holds it for as long."""
        named = self.objective.parameters()
        return self.layout.flatten([named[name] for name in self.layout.names])

    def recomputing(self, blocks: Blocks | None) -> Snapshot:
        """The snapshot with more modules whose calls are recomputed, if any are given; see `Survey.recomputing`."""
        return replace(self, survey=self.survey.recomputing(self.objective.model, blocks)) if blocks else self

    @classmethod
    def of(
        cls,
        objective: Objective,
        layout_of: Callable[[Mapping[str, Tensor]], Layout] = Layout.of,
        *,
        differentiates: bool = True,
    ) -> Snapshot:
        """Check the objective in its present state, and take the snapshot.

        Args:
            objective: Model and loss.
            layout_of: From named parameters to how they lie in a flat vector.
            differentiates: Whether derivatives are asked for.

        Returns:
            The snapshot of one call.

        Raises:
            TypeError: Not an objective.
            ValueError: The model's present state cannot be adapted, or its parameters are on several devices.
        """
        if not isinstance(objective, Objective):
            raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
        objective.check()
        named = objective.parameters()
        adapted = {n: p for n, p in named.items() if n in objective.adapted}
        shared = {n: p.detach() for n, p in named.items() if n not in objective.adapted}
        devices = {p.device for p in adapted.values()}
        if len(devices) > 1:
            raise ValueError(f"Adapted parameters must be on one device. Got {sorted(map(str, devices))}.")
        layout, survey = layout_of(adapted), objective.survey()
        return cls(
            objective=objective,
            layout=layout,
            like=layout.empty(next(iter(adapted.values()))),
            shared_layout=layout_of(shared),
            shared=list(shared.values()),
            initial=[p.detach() for p in adapted.values()] if objective.takes_initial else [],
            constants=survey.constants,
            survey=survey,
            held=survey.held,
            replay=Replay(devices.pop()),
            differentiates=differentiates,
        )
