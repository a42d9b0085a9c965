"""Tensors that a function uses, that require grad, and that no derivative would reach: an error instead of silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor


def leaves_of(values: Iterable[Tensor]) -> dict[int, Tensor]:
    """The leaves that require grad and that some values depend on, by address."""
    found = {id(value): value for value in values if value.requires_grad and value.grad_fn is None}
    pending, seen = [v.grad_fn for v in values if v.grad_fn is not None], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a node that accumulates into a leaf
        if variable is not None:
            found[id(variable)] = variable
        pending += [following for following, _ in node.next_functions if following is not None]
    return found


_BLOCK = "_imaml_block"


def inside(tensor: Tensor, block: str) -> Tensor:
    """An input of a recomputed block as a leaf of a graph of its own, which no loss may depend on."""
    leaf = tensor.detach().requires_grad_()
    setattr(leaf, _BLOCK, block)
    return leaf


def foreign_leaves(
    values: Sequence[Tensor], known: Iterable[Tensor], again: Callable[[], Sequence[Tensor]]
) -> list[Tensor]:
    """The leaves of values that are not known, and that a function finds and does not make.

    A function may make leaves itself, to differentiate by its input. A second evaluation makes others, and finds the
    same; it is needed only where there is any.

    Args:
        values: What the function returned.
        known: The leaves that it was given.
        again: Evaluates it once more.

    Returns:
        The leaves.
    """
    given = {id(leaf) for leaf in known}
    first = {address: leaf for address, leaf in leaves_of(values).items() if address not in given}
    if not first:
        return []
    if blocks := [leaf for leaf in first.values() if hasattr(leaf, _BLOCK)]:
        return blocks
    second = leaves_of(again())
    return [leaf for address, leaf in first.items() if address in second]


def described(leaves: Sequence[Tensor], names: Mapping[int, str]) -> str:
    """Tensors in words: those with a name first."""
    known = [names[id(leaf)] for leaf in leaves if id(leaf) in names]
    others = [leaf for leaf in leaves if id(leaf) not in names]
    blocks = sorted({getattr(leaf, _BLOCK) for leaf in others if hasattr(leaf, _BLOCK)})
    inner = [
        f"an activation inside {block}, which is recomputed and hands it out by its outputs alone" for block in blocks
    ]
    shapes = [f"one of shape {tuple(leaf.shape)}" for leaf in others if not hasattr(leaf, _BLOCK)]
    words = [*known, *inner, *shapes]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def check_reached(
    kind: str,
    values: Sequence[Tensor],
    known: Iterable[Tensor],
    again: Callable[[], Sequence[Tensor]],
    names: Callable[[], Mapping[int, str]],
) -> None:
    """Raise where a loss depends on a tensor that requires grad and would get no gradient.

    Args:
        kind: "support" or "query".
        values: The losses, with their graph.
        known: See `foreign_leaves`.
        again: See `foreign_leaves`.
        names: What tensors past the arguments of the loss are called, by address.

    Raises:
        ValueError: It does.
    """
    foreign = foreign_leaves(values, known, again)
    if foreign:
        raise ValueError(
            f"The {kind} loss uses what requires grad and would get no gradient: {described(foreign, names())}. "
            "Expected a loss of the model's output, the batch and the argument `meta`. Name it in "
            "Objective(..., meta={...}) and take it from `meta`, or detach it; a module that is not to be learned by "
            "requires_grad_(False). A loss of the model's own parameters as they adapt is "
            "Objective.from_function(loss, params), or the `weight_decay` of the inner optimiser."
        )
