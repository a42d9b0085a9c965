"""What a computation is made of, in a few plain values: another one has others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.metadata import version
from inspect import ismethod
from types import CellType, CodeType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from imaml._engine.inner_state import InnerState
from imaml._engine.strategy import Strategy
from imaml._leaves import checksum
from imaml._losses.snapshot import Snapshot
from imaml._minibatches import Minibatches
from imaml._tasks import TaskBatch
from imaml._torch import tree_leaves

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def fingerprint(
    engine: Strategy, snapshot: Snapshot, groups: Sequence[tuple[list[int], TaskBatch]], start: InnerState | None
) -> dict[str, Any]:
    """Describe a call, by settings, shapes and sums of the bits of all tensors.

    Functions count by their names and their code, objects by their types, and a source of minibatches by its first
    batch: the others are compared as they are asked for again.

    Args:
        engine: Its settings count.
        snapshot: The objective.
        groups: The tasks.
        start: Where the inner trainings go on from.

    Returns:
        Plain values in nested dicts, for JSON.
    """
    objective = snapshot.objective
    model = objective.model
    return {
        "versions": {"imaml": version("imaml"), "torch": torch.__version__},
        "engine": _plain(engine),
        "model": None
        if model is None
        else {
            "text": crc32(_ADDRESS.sub("", repr(model)).encode()),
            "training": crc32(bytes(module.training for module in model.modules())),
        },
        "loss": _plain(objective.loss),
        "outer_loss": _plain(objective.outer_loss),
        "metric": _plain(objective.metric),
        "adapted": list(snapshot.layout.names),
        "differentiates": snapshot.differentiates,
        "parameters": _plain(
            ({} if model is None else dict(model.named_parameters())) | objective.parameters() | objective.meta.flat()
        ),
        "buffers": _plain(snapshot.constants.fresh()),
        "tasks": {str(i): _of_tasks(*group, 0 if start is None else start.step) for i, group in enumerate(groups)},
        "start": _plain(start),
    }


def _of_tasks(positions: list[int], batch: TaskBatch, first: int) -> dict[str, Any]:
    of_source: dict[str, Any] = {}
    if isinstance(batch.support, Minibatches):
        of_source = {"batches": batch.support.length, "examples": batch.support.examples}
    seen = batch.alike(first)
    return {
        "positions": positions,
        **of_source,
        "support": [_plain(leaf) for leaf in tree_leaves(seen.support)],
        "query": [_plain(leaf) for leaf in tree_leaves(seen.query)],
    }


def _plain(value: Any) -> Any:
    """A value of any kind as plain ones: equal for equal values, in any process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        shape, dtype, bits = checksum(value)
        return f"{dtype} {list(shape)} {bits:08x}"
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, partial):
        return {"partial": [_plain(part) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, nn.Module):
        return {"module": _ADDRESS.sub("", repr(value)), "state": _plain(value.state_dict())}
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"type": type(value).__qualname__} | settings
    return _of_callable(value) if callable(value) else type(value).__qualname__


def _of_callable(value: Callable[..., Any]) -> Any:
    if ismethod(value):
        return [_plain(value.__self__), _of_callable(value.__func__)]
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    code = getattr(value, "__code__", None)
    if code is None:
        return name
    return [f"{name} {_of_code(code):08x}", *map(_of_cell, getattr(value, "__closure__", None) or ())]


def _of_cell(cell: CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # it is empty
        return None
    return type(value).__qualname__ if callable(value) else _plain(value)


def _of_code(code: CodeType) -> int:
    constants = [_of_code(c) if isinstance(c, CodeType) else _of_constant(c) for c in code.co_consts]
    return crc32(code.co_code + repr((code.co_names, constants)).encode())


def _of_constant(constant: Any) -> str:
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
