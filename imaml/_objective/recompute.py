"""Blocks of a forward pass that keep their inputs alone, and are computed again in derivatives of every order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from imaml._objective.exact import MathAttention, check_twice_differentiable
from imaml._objective.foreign import described, foreign_leaves, inside
from imaml._objective.reach import modules_of
from imaml._torch import TreeSpec, inside_transform, is_write_to_leaf, requires_grad, tree_flatten, vectorised

Place = tuple[dict[str, Any], str]
"""Where a module has a tensor: in its parameters or buffers, under a name."""
Outputs = tuple[Tensor | None, ...]
_MISSING = object()


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose activations are not kept: derivatives of every order compute them again from its inputs.

    Inside the model or the loss of an `Objective` the modules that the function holds have the parameters of the
    evaluation, as they do in `torch.utils.checkpoint.checkpoint`, which is honoured likewise. Elsewhere they have
    their own.

    Memory: the inputs, and the graph of one block at a time, of whatever order.

    Cost: a gradient evaluates the block once more. A Hessian-vector product takes about 16 forward passes of it, where
    a graph that is kept takes 9.

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
    name = getattr(function, "__qualname__", type(function).__name__)
    conditions = _conditions.open[-1] if _conditions.open else None
    if not torch.is_grad_enabled() or inside_transform() or conditions and not conditions.recomputes(name):
        return function(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    mine = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    held = _held(function)

    def run(tensors: Sequence[Tensor]) -> Any:
        found = list(leaves)
        for i, tensor in zip(mine, tensors, strict=False):
            found[i] = tensor
        own, named = structure.unflatten(found)
        parameters = zip(held, tensors[len(mine) :], strict=True)
        with Swapped([(*place, tensor) for (_, places), tensor in parameters for place in places]):
            return function(*own, **named)

    inputs = [*(leaves[i] for i in mine), *(tensor for tensor, _ in held)]
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # a block keeps them once
    block = _Block(run, name, inputs, conditions)
    return block.placed(_Recompute.apply(block, *inputs))  # type: ignore[no-untyped-call]


Blocks = Iterable[str | type[nn.Module]]
"""Modules whose calls are recomputed: names, shell patterns of names, or types; the outermost that an entry matches."""


def blocks_of(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules of a model that are to be recomputed, each once.

    Args:
        model: Any module.
        blocks: Which of its modules.

    Returns:
        The modules, in the model's order.

    Raises:
        TypeError: `blocks` is a single string or type, or holds something else.
        ValueError: An entry matches no module.
    """
    if isinstance(blocks, (str, type)):
        raise TypeError(f"`recompute` must be a list of module names or types. Got {blocks!r}: write [{blocks!r}].")
    if not isinstance(blocks, Iterable):
        raise TypeError(f"`recompute` must be a list of module names or types. Got {blocks!r}.")
    named, chosen = {name: module for name, module in model.named_modules() if name}, set[nn.Module]()
    for block in blocks:
        if isinstance(block, str):
            found = [name for name in named if fnmatchcase(name, block)]
        elif isinstance(block, type) and issubclass(block, nn.Module):
            found = [name for name, module in named.items() if isinstance(module, block)]
        else:
            raise TypeError(f"`recompute` must be a list of module names or types. Got {block!r} in it.")
        if not found:
            raise ValueError(
                f"`recompute` names no module by {block!r}. Close to it: {', '.join(_close(block, named))}."
            )
        # The outermost ones: a block inside a block would be computed once more for little memory.
        chosen.update(named[n] for n in found if not any(n.startswith(f"{other}.") for other in found))
    return [module for module in named.values() if module in chosen]


def _close(block: str | type[nn.Module], named: Mapping[str, nn.Module]) -> list[str]:
    if isinstance(block, str):
        return get_close_matches(block, named, n=3, cutoff=0.4) or [*named][:5] or ["none"]
    return sorted({type(module).__name__ for module in named.values()}) or ["none"]


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
            output = self._run(tensors)
        if versions != [t._version for t in tensors]:
            raise _writes(self.name)
        leaves, structure = tree_flatten(output)
        self._outline = structure, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

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
        cpu, devices, states = self._random
        stack.enter_context(torch.random.fork_rng(devices))
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        for autocast in self._autocast:
            stack.enter_context(autocast)
        if self._conditions is not None and not self._conditions.is_active:
            stack.enter_context(self._conditions.again())


def _writes(name: str) -> ValueError:
    return ValueError(
        f"{name} is recomputed, and changes a tensor in place that it is given. Expected a function of its arguments: "
        "use e.g. x = x + 1 for x.add_(1)."
    )


class _Pullback:
    """The cotangents of a block's inputs, for those of its outputs: a function of both, to be recomputed itself."""

    def __init__(self, block: Any, inputs: int, wanted: Sequence[int], given: Sequence[int]) -> None:
        self._block, self._inputs, self._wanted, self._given = block, inputs, wanted, given
        self.name: str = block.name

    def __call__(self, *tensors: Tensor) -> Outputs:
        again = torch.is_grad_enabled()  # whether the pullback is differentiated itself
        xs, cotangents = list(tensors[: self._inputs]), tensors[self._inputs :]
        with torch.enable_grad(), MathAttention() if again else nullcontext():
            for i in self._wanted:
                if not (again and xs[i].requires_grad):
                    xs[i] = xs[i].detach().requires_grad_()
            ys = self._block(*xs)
            at = [ys[i] for i in self._given]
            pairs = [(y, c) for y, c in zip(at, cotangents, strict=True) if y is not None and y.requires_grad]
            if not pairs:
                return (None,) * len(self._wanted)
            outputs, weights = zip(*pairs, strict=True)
            if not again:
                self._check_own(outputs, xs)
            wanted = [xs[i] for i in self._wanted]
            found = torch.autograd.grad(outputs, wanted, weights, create_graph=again, allow_unused=True)
            if again:  # nobody sees the graph of a block from outside
                check_twice_differentiable([g.grad_fn for g in found if g is not None])
            return found

    def _check_own(self, outputs: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        def evaluated() -> list[Tensor]:
            return [y for y in self._block(*xs) if y is not None]

        if foreign := foreign_leaves(outputs, xs, evaluated):
            raise ValueError(
                f"{self.name} is recomputed, and uses what requires grad and would get no gradient: "
                f"{described(foreign, {})}. Expected a function of its arguments and of modules that it holds: pass "
                "the tensor as an argument."
            )


class _Batched:
    """A block of every row, by `vmap`."""

    def __init__(self, block: Any, dims: Sequence[int | None], size: int) -> None:
        self._block, self._dims, self._size = block, dims, size
        self.name: str = block.name

    def __call__(self, *tensors: Tensor) -> Outputs:
        rows = [t.movedim(d, 0) for t, d in zip(tensors, self._dims, strict=True) if d is not None]
        missing: list[bool] = []

        def one(rows: list[Tensor]) -> list[Tensor]:
            own = iter(rows)
            found = self._block(*(t if d is None else next(own) for t, d in zip(tensors, self._dims, strict=True)))
            missing[:] = [y is None for y in found]
            return [y for y in found if y is not None]

        outputs = iter(vectorised(one, rows, self._size))
        return tuple(None if is_missing else next(outputs) for is_missing in missing)


class _Recompute(torch.autograd.Function):
    """A block, of which autograd keeps the inputs. Its backward is a block too, so that every order recomputes."""

    @staticmethod
    def forward(block: Any, *tensors: Tensor) -> Outputs:
        if isinstance(block, _Pullback):
            return block(*tensors)
        # With a graph, which ends with this function: an activation that leaves the block by another way than its
        # outputs, through a hook or an attribute, leads to these leaves, and a loss that reads it is refused.
        with torch.enable_grad():
            own = [inside(t, block.name) if requires_grad(t) else t for t in tensors]
            try:
                found: Outputs = block(*own)
            except RuntimeError as error:
                if is_write_to_leaf(error):
                    raise _writes(block.name) from error
                raise
        return tuple(None if y is None else y.detach() for y in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.block, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        whole = (y for y in output if y is not None and not (y.is_floating_point() or y.is_complex()))
        ctx.mark_non_differentiable(*whole)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (1 + len(tensors))
        given = [i for i, c in enumerate(cotangents) if c is not None]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        if given and wanted:
            pullback = _Pullback(ctx.block, len(tensors), wanted, given)
            found = _Recompute.apply(pullback, *tensors, *(cotangents[i] for i in given))  # type: ignore[no-untyped-call]
            for i, grad in zip(wanted, found, strict=True):
                grads[1 + i] = grad
        return tuple(grads)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], block: Any, *tensors: Tensor
    ) -> tuple[Outputs, tuple[int | None, ...]]:
        batched = _Batched(block, dims[1:], info.batch_size)
        found = _Recompute.apply(batched, *tensors)  # type: ignore[no-untyped-call]
        return found, tuple(None if y is None else 0 for y in found)
