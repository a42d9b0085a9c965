"""Which run an objective gets: the usual one, or that of a model sharded over processes."""

from __future__ import annotations

import sys

from imaml._engine.inner_state import InnerState
from imaml._engine.run import Run
from imaml._engine.strategy import Strategy
from imaml._objective.objective import Objective


def run_of(
    engine: Strategy,
    objective: Objective,
    *,
    derivatives: bool,
    start: InnerState | None = None,
    keeps_final: bool = False,
) -> Run:
    """What an engine does with one objective: takes the snapshot, and evaluates the hyper-parameters."""
    # There are no sharded parameters before torch's module of them is imported.
    if "torch.distributed.tensor" in sys.modules and isinstance(objective, Objective):
        from imaml._sharding.sharded_run import ShardedRun, layout_for  # noqa: PLC0415

        layout_of = layout_for(engine, objective)
        if layout_of is not None:
            if start is not None or keeps_final:
                raise ValueError(
                    "The model's parameters are sharded over processes. Expected an inner loop that starts at them and "
                    "whose end is not kept. Got `start` or `return_state`: leave these out."
                )
            return ShardedRun.of(engine, objective, derivatives=derivatives, layout_of=layout_of)
    return Run.of(engine, objective, derivatives=derivatives, start=start, keeps_final=keeps_final)
