"""One call of a strategy for a model whose parameters are sharded over processes, each of which has the same tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication

from imaml._curvature.derivatives import Derivatives
from imaml._engine.chunking import ONE_BY_ONE, Chunking
from imaml._engine.report import Outcome, Pullback, Report
from imaml._engine.run import Run
from imaml._leaves import checksum
from imaml._losses.layout import Layout
from imaml._losses.snapshot import Snapshot
from imaml._objective.objective import Objective
from imaml._sharding.sharded_derivatives import Sharded
from imaml._sharding.sharded_layout import ShardedLayout, whole
from imaml._tasks import TaskBatch
from imaml._torch import tree_leaves
from imaml.inner import InnerOptimizer
from imaml_solvers import CG, MINRES, Neumann

if TYPE_CHECKING:
    from imaml._engine.strategy import Strategy


class ShardedRun(Run):
    """Task by task, each by all processes together."""

    def sums(self, groups: list[tuple[list[int], TaskBatch]]) -> tuple[list[Tensor], Report]:
        """As those of a whole model; raises ValueError, on all processes, where they have not the same tasks."""
        if self.folder is not None:
            raise ValueError(
                "The model's parameters are sharded over processes. Expected folder=None, which keeps the computation "
                "of one. Got a folder: leave it out."
            )
        layout = self.snapshot.layout
        assert isinstance(layout, ShardedLayout)
        first = [batch.alike(self.first) for _, batch in groups]
        tensors = [t for batch in first for t in tree_leaves((batch.support, batch.query))]
        mine = [checksum(t) for t in tensors]
        everyone: list[Any] = [None] * layout.mesh.size()
        dist.all_gather_object(everyone, mine, group=layout.mesh.get_group())
        if any(theirs != mine for theirs in everyone):
            raise ValueError(
                "The processes that a model is sharded over compute every task together. Expected the same tasks on "
                "all of them. Got others: draw them from the same seed everywhere, and do not deal them out."
            )
        with implicit_replication(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found a non-scalar tensor with numel=1")  # of the one task
            return super().sums(groups)

    def sums_over_ranks(self, *_: object) -> NoReturn:
        """Raise ValueError: the processes are taken."""
        raise ValueError(
            "The processes that a model is sharded over compute every task together. Expected group=None. Got a group: "
            "leave it out."
        )

    @classmethod
    def derivatives_of(cls, engine: Strategy, snapshot: Snapshot) -> Derivatives:
        """See `Run`."""
        return Sharded()

    def chunking(self, batch: TaskBatch) -> Chunking:
        """See `Run`."""
        return ONE_BY_ONE

    def _outcome(self, pullback: Pullback) -> Outcome:
        entries: dict[str, Any] = {f.name: getattr(pullback.outcome, f.name) for f in fields(Outcome)}
        entries |= {name: whole(tensor) for name, tensor in entries.items() if tensor is not None}
        return Outcome(**entries)


def layout_for(engine: Strategy, objective: Objective) -> Callable[[Mapping[str, Tensor]], Layout] | None:
    """How parameters that are sharded over processes become flat vectors, if they are.

    Args:
        engine: The strategy.
        objective: Model and loss.

    Returns:
        The layout of tensors by name; None where the parameters are whole.

    Raises:
        ValueError: Something is asked for that a sharded model cannot have.
    """
    model = objective.model
    tensors = list(objective.parameters().values() if model is None else model.parameters())
    if model is not None and any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("Expected torch.distributed.fsdp.fully_shard (FSDP2). Got a FullyShardedDataParallel module.")
    meshes = list(dict.fromkeys(t.device_mesh for t in tensors if isinstance(t, DTensor)))
    if not meshes:
        return None
    for holds, expected, got in _rules(engine, objective, tensors, meshes):
        if not holds:
            raise ValueError(f"The model's parameters are sharded over processes. Expected {expected}. Got {got}.")
    return partial(ShardedLayout.on, meshes[0])


def _rules(
    engine: Strategy, objective: Objective, tensors: Sequence[Tensor], meshes: Sequence[DeviceMesh]
) -> Iterator[tuple[bool, str, object]]:
    """What must hold, what is expected, and what there is."""
    yield (
        engine._manages_without_second_derivatives,
        "FOMAML or ImplicitMAML, since there are no second derivatives",
        type(engine).__name__,
    )
    yield objective.model is not None, "Objective(model, loss)", "an objective from a function"
    yield len(meshes) == 1 and meshes[0].ndim == 1, "a single device mesh of one dimension", list(meshes)
    partial_ones = [t for t in tensors if isinstance(t, DTensor) and t.placements[0].is_partial()]
    yield not partial_ones, "parameters that are sharded or replicated", "partial sums"
    frozen = [n for n, p in objective.parameters().items() if n in objective.adapted and not p.requires_grad]
    yield not frozen, "adapted parameters that require grad", f"{frozen} without"
    yield not objective.meta.learned(), "no meta-parameters", sorted(objective.meta.learned())
    of_output = not objective.takes_parameters
    yield of_output, "an outer loss of the model's output", "one that takes `initial` or `adapted`"
    yield not objective.statistics(), "another policy for the running statistics", "buffers='update'"
    yield isinstance(engine.inner, InnerOptimizer), "an inner optimiser such as GradientDescent or Adam", engine.inner
    for name, given in {**engine.inner.hyperparameters, "regularization": engine.regularization}.items():
        numbers = not callable(given) and not isinstance(given, Mapping)
        yield numbers, f"`{name}` as a number for all parameters", given
    hvp = getattr(engine, "hvp", "auto")
    yield hvp in ("auto", "finite-difference"), "hvp='finite-difference', of first derivatives", repr(hvp)
    for name, only in {"curvature": "hessian", "warm_start": False, "compile": False}.items():
        yield getattr(engine, name, only) == only, f"{name}={only!r}", repr(getattr(engine, name, only))
    yield getattr(engine, "damping", 0.0) != "auto", "`damping` as a number", "'auto'"
    solver = getattr(engine, "solver", None)
    plain = isinstance(solver, (CG, MINRES, Neumann)) and getattr(solver, "preconditioner", None) is None
    yield solver is None or plain, "CG, MINRES or Neumann without a preconditioner", solver
    yield (
        solver is None or _computes(meshes[0]),
        "FOMAML, or a newer torch, such as 2.13, whose DTensors have what linear solvers compute with",
        f"torch {torch.__version__}",
    )


def _computes(mesh: DeviceMesh) -> bool:
    """Whether the DTensors of this torch know operations that they learned late; those of 2.9 do not."""
    one = torch.ones(1, device=mesh.device_type)
    try:
        torch.frexp(DTensor.from_local(one, mesh, [Replicate()], run_check=False))
    except NotImplementedError:
        return False
    return True
