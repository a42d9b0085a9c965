"""Functions of tensors, traced below autograd and compiled by TorchInductor.

`torch.compile` does not differentiate twice. A trace by `make_fx` lies below autograd, where a gradient and its product
with a vector are operations like any other.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from imaml._curvature.agreement import Outputs
from imaml._curvature.deadline import within
from imaml._curvature.narrow import transpose_tall
from imaml._curvature.patches import DECOMPOSITIONS, Patches
from imaml._curvature.residuals import split
from imaml._torch import TorchDispatchMode, compile_graph, tree_leaves

Function = Callable[..., Outputs]
LOGGER = logging.getLogger("imaml")
LONG = 10.0
"""Seconds after which it is said that a compilation goes on."""
_ONE_AT_A_TIME = threading.Lock()
"""One that was given up may not be over yet, and TorchInductor has settings that are the process's."""


def trace_and_compile(function: Function, tensors: Sequence[Tensor], what: str, seconds: float) -> Function:
    """The compiled function, in a given time; said on the logger "imaml", from 10 s on as a warning.

    A trace takes about a second for 300 operations, and is not interrupted; the compiler takes the rest.

    Args:
        function: A function of tensors alone.
        tensors: What to trace it with.
        what: For people.
        seconds: The time.

    Returns:
        A function of tensors of these shapes.

    Raises:
        OutOfTimeError: It takes longer.
    """

    def compile_(graphs: Sequence[torch.fx.GraphModule]) -> list[Function]:
        return [compile_graph(graphs[0], tensors)]

    return _compiled(lambda: [_trace(function, tensors)], compile_, what, seconds, tensors[0].device)[0]


def trace_and_split(
    function: Function, tensors: Sequence[Tensor], late: Collection[int], first: int, what: str, seconds: float
) -> tuple[Function, Function]:
    """Compile a function in two parts, as `split` has it, which see the same evaluation of a loss.

    Args:
        function: A function of tensors alone.
        tensors: What to trace it with.
        late: Which of these come later.
        first: How many of its outputs the first part has.
        what: For people.
        seconds: The time.

    Returns:
        The two parts.

    Raises:
        OutOfTimeError: It takes longer.
    """
    early = [t for i, t in enumerate(tensors) if i not in late]

    def compile_(graphs: Sequence[torch.fx.GraphModule]) -> list[Function]:
        before = compile_graph(graphs[0], early)
        handed = before(*early)[first:]  # which lie as the compiler has them, and not as the trace had
        return [before, compile_graph(graphs[1], [*tensors, *handed])]

    def traced() -> list[torch.fx.GraphModule]:
        return list(split(_trace(function, tensors), late, first))

    before, then = _compiled(traced, compile_, what, seconds, tensors[0].device)
    return before, then


def _trace(function: Function, tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    graph: torch.fx.GraphModule = make_fx(_as_compiled(function), decomposition_table=DECOMPOSITIONS)(*tensors)
    if any(map(_writes, graph.graph.nodes)):  # what is written here is read there, in an order that a graph hides
        with as_traced(tensors[0].device):
            graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(*tensors)
    transpose_tall(graph)
    return graph


def _writes(node: torch.fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _compiled(
    traced: Callable[[], list[torch.fx.GraphModule]],
    compile_: Callable[[Sequence[torch.fx.GraphModule]], list[Function]],
    what: str,
    seconds: float,
    device: torch.device,
) -> list[Function]:
    """The graphs that are traced, compiled."""
    start = monotonic()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of its own
        graphs = traced()
        size = _size(graphs)
        left = max(0.0, seconds - (monotonic() - start))
        LOGGER.info("Compiling %s (%s). It may take %.0f s.", what, size, left)
        threads = torch.get_num_threads()

        def compute() -> list[Function]:
            with _ONE_AT_A_TIME, _current(device), as_traced(device):
                torch.set_num_threads(threads)  # each thread has a number of its own, which goes into the code
                return compile_(graphs)

        # A limit by the size of the trace would be the same on every machine, and off by the machine's speed.
        compiled = within(
            compute, seconds=left, meanwhile=[(LONG, lambda: LOGGER.warning(_STILL, what, LONG, size, left))]
        )
    LOGGER.info("Compiled %s in %.1f s.", what, monotonic() - start)
    return compiled


_STILL = (
    "compile=True: %s is still being compiled after %.0f s (%s). The engine waits for %.0f s in all, what is left "
    "of its `compile_budget`, and else goes on uncompiled."
)


def _size(graphs: Sequence[torch.fx.GraphModule]) -> str:
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    convolutions = sum("convolution" in target for target in called)
    return f"{len(called)} operations" + (f", {convolutions} of convolutions" if convolutions else "")


class _RefuseToReadZeros(TorchDispatchMode):
    """Raises where a trace would read a tensor without memory, which kills the process (torch 2.13).

    Forward-mode derivatives (`torch.func.jvp`, `jacfwd`, `hessian`) hold zero tangents that have a shape and no memory.
    Untraced no operation sees one; a trace hands them on to operations such as `mul` by a number.
    """

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, which may make a view of a tensor without memory."""
        if not func.is_view and any(isinstance(t, Tensor) and t._is_zerotensor() for t in tree_leaves((args, kwargs))):
            raise NotImplementedError(
                f"{func} would read a zero tangent: torch cannot trace these forward-mode derivatives in the loss"
            )
        return func(*args, **(kwargs or {}))


def _as_compiled(function: Function) -> Function:
    """The function in the operations that compile best."""

    def traced(*tensors: Tensor) -> Outputs:
        with Patches(), _RefuseToReadZeros():  # type: ignore[no-untyped-call]
            return function(*tensors)

    return traced


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, a thread works on this one of several accelerators."""
    if device.type == "cpu":
        return nullcontext()
    found: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return found


@contextmanager
def as_traced(device: torch.device) -> Iterator[None]:
    """Within it a trace means what it did, where the casts of autocast are operations like any other."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def run(function: Function, tensors: Sequence[Tensor]) -> Outputs:
    """The outputs of a compiled function."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return function(*tensors)
    with as_traced(tensors[0].device):
        return function(*tensors)
