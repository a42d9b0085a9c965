"""Blocks of a forward pass that keep their inputs alone, and are computed again in derivatives of every order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from imaml._objective import attention
from imaml._objective.block_derivatives import Outputs, applied, writes
from imaml._objective.reach import as_it_is, modules_of
from imaml._torch import TreeSpec, inside_transform, requires_grad, tree_flatten

Place = tuple[dict[str, Any], str]
"""Where a module has a tensor: in its parameters or buffers, under a name."""
_MISSING = object()


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose activations are not kept: derivatives of every order compute them again from its inputs.

    Inside the model or the loss of an `Objective` the modules that the function holds have the parameters of the
    evaluation, as they do in `torch.utils.checkpoint.checkpoint`, which is honoured likewise. Elsewhere they have
    their own.

    Memory: the inputs, and the graph of one block at a time, of whatever order.

    Cost: a gradient evaluates the block once more. A Hessian-vector product takes about 12 forward passes of it by
    forward-over-reverse and 16 by reverse-over-reverse, where without recomputation it takes 9.

    Args:
        function: A function of its arguments and of the modules that it holds. Called again in the same random state
            and under the same autocast it must do the same.
        args: Tensors in any nesting, and anything else.
        kwargs: Further arguments by name.

    Returns:
        What the function returns: tensors in any nesting, and anything else.

    Raises:
        ValueError: The function changes an argument in place; or, in a derivative, it reads a tensor that requires
            grad and is neither an argument nor a parameter of a module that it holds.
    """
    name = name_of(function)
    conditions = _conditions.open[-1] if _conditions.open else None
    if not torch.is_grad_enabled() or inside_transform() or conditions and not conditions.recomputes(name):
        return function(*args, **kwargs)
    return _called(name, conditions, function, args, kwargs)


def name_of(function: Callable[..., Any]) -> str:
    """What the report and messages call a block: the class of a module, whatever way of calling it is given."""
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(function, "__name__", "") in ("__call__", "_wrapped_call_impl"):
        return type(owner).__name__
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name


def lean_attention(*args: Any, **kwargs: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, which in an evaluation takes less memory where second derivatives follow."""
    if not _conditions.open or inside_transform():
        return attention.plain(*args, **kwargs)
    if _conditions.blocks or not torch.is_grad_enabled():
        return attention.lean(lambda function, *args: function(*args), attention.FEW, *args, **kwargs)
    conditions = _conditions.open[-1]
    return attention.lean(
        lambda function, *args: _called("attention", conditions, function, args, {}), attention.MANY, *args, **kwargs
    )


def _called(
    name: str, conditions: Conditions | None, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """A call as a block."""
    leaves, structure = tree_flatten((args, kwargs))
    mine = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    held = _held(function)
    first, later = [function], as_it_is(function)  # what the first call writes to variables is to be seen

    def run(tensors: Sequence[Tensor]) -> Any:
        found = list(leaves)
        for i, tensor in zip(mine, tensors, strict=False):
            found[i] = tensor
        own, named = structure.unflatten(found)
        parameters = zip(held, tensors[len(mine) :], strict=True)
        with Swapped([(*place, tensor) for (_, places), tensor in parameters for place in places]):
            return (first.pop() if first else later)(*own, **named)

    inputs = [*(leaves[i] for i in mine), *(tensor for tensor, _ in held)]
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # a block keeps them once
    block = _Block(run, name, inputs, conditions)
    return block.placed(applied(block, inputs))


class Conditions(Protocol):
    """An evaluation of a loss, under whose guards a block is computed: the first time, and again."""

    is_active: bool

    def recomputes(self, name: str) -> bool:
        """Whether a block of this name is recomputed; remembers that it is."""
        ...

    def again(self) -> AbstractContextManager[None]:
        """Within it the evaluation is as it was."""
        ...


class _Open(threading.local):
    def __init__(self) -> None:
        self.open: list[Conditions] = []
        self.blocks = 0


_conditions = _Open()


def begin(evaluation: Conditions) -> None:
    """Blocks that are met from here on belong to this evaluation."""
    evaluation.is_active = True
    _conditions.open.append(evaluation)


def end(evaluation: Conditions) -> None:
    """Blocks belong to the evaluation before it again."""
    evaluation.is_active = False
    _conditions.open.remove(evaluation)


def _held(function: Callable[..., Any]) -> list[tuple[Tensor, list[Place]]]:
    """The tensors to differentiate by of the modules that a function holds, each with the places where it stands."""
    found: dict[int, tuple[Tensor, list[Place]]] = {}
    for module in modules_of([function]):
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and requires_grad(tensor):
                    found.setdefault(id(tensor), (tensor, []))[1].append((members, name))
    return list(found.values())


class Swapped:
    """Within it dictionaries have other values, and afterwards their own; a class, since every evaluation swaps."""

    def __init__(self, puts: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
        self._puts = puts

    def __enter__(self) -> None:
        self._before = [members.get(name, _MISSING) for members, name, _ in self._puts]
        for members, name, value in self._puts:
            members[name] = value

    def __exit__(self, *error: object) -> None:
        for (members, name, _), before in zip(self._puts, self._before, strict=True):
            if before is _MISSING:
                del members[name]
            else:
                members[name] = before


class _Block:
    """A function of tensors, in the state of the world in which it was met."""

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Any],
        name: str,
        inputs: Sequence[Tensor],
        conditions: Conditions | None,
    ) -> None:
        self._run, self.name = run, name
        self._conditions = conditions
        self._random = torch.get_rng_state(), *get_device_states(*inputs)
        self._autocast = [
            torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(t.device.type for t in inputs)}
        ]
        self._outline: tuple[TreeSpec, list[Any]] | None = None

    def __call__(self, *tensors: Tensor) -> Outputs:
        versions = [t._version for t in tensors]
        with ExitStack() as stack:
            if self._outline is not None:
                self._return(stack)
            _conditions.blocks += 1
            try:
                output = self._run(tensors)
            finally:
                _conditions.blocks -= 1
        if versions != [t._version for t in tensors]:
            raise writes(self.name)
        leaves, structure = tree_flatten(output)
        self._outline = structure, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def rewind(self) -> None:
        """To the random state before the first call."""
        cpu, devices, states = self._random
        torch.set_rng_state(cpu)
        set_device_states(devices, states)

    def placed(self, outputs: Outputs) -> Any:
        """The outputs as the function returned them."""
        assert self._outline is not None
        structure, leaves = self._outline
        found = list(leaves)
        for i, output in zip(self._tensors, outputs, strict=True):
            found[i] = output
        return structure.unflatten(found)

    def _return(self, stack: ExitStack) -> None:
        """To the state of the world."""
        stack.enter_context(torch.random.fork_rng(self._random[1]))
        self.rewind()
        for autocast in self._autocast:
            stack.enter_context(autocast)
        if self._conditions is not None and not self._conditions.is_active:
            stack.enter_context(self._conditions.again())
