"""Which modules of a model are recomputed: by name, pattern or type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

Blocks = Iterable[str | type[nn.Module]]
"""Modules whose calls are recomputed: names, shell patterns of names, or types; the outermost that an entry matches."""


def listed(blocks: Blocks) -> tuple[str | type[nn.Module], ...]:
    """The entries of `recompute`; raises TypeError for a single string or type, or where it holds something else."""
    if isinstance(blocks, (str, type)):
        raise TypeError(f"`recompute` must be a list of module names or types. Got {blocks!r}: write [{blocks!r}].")
    if not isinstance(blocks, Iterable):
        raise TypeError(f"`recompute` must be a list of module names or types. Got {blocks!r}.")
    found = tuple(blocks)
    for block in found:
        if not (isinstance(block, str) or isinstance(block, type) and issubclass(block, nn.Module)):
            raise TypeError(f"`recompute` must be a list of module names or types. Got {block!r} in it.")
    return found


def blocks_of(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules of a model that are to be recomputed, each once.

    Args:
        model: Any module.
        blocks: Which of its modules.

    Returns:
        The modules, in the model's order.

    Raises:
        ValueError: An entry matches no module.
    """
    if not blocks:
        return []
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen = set[nn.Module]()
    for block in blocks:
        if isinstance(block, str):
            found = [name for name in named if fnmatchcase(name, block)]
        else:
            found = [name for name, module in named.items() if isinstance(module, block)]
        if not found:
            raise ValueError(
                f"`recompute` names no module by {block!r}. Close to it: {', '.join(_close(block, named))}."
            )
        # The outermost ones: a block inside a block would be computed once more for little memory.
        chosen.update(named[n] for n in found if not any(n.startswith(f"{other}.") for other in found))
    return [module for module in dict.fromkeys(named.values()) if module in chosen]


def _close(block: str | type[nn.Module], named: Mapping[str, nn.Module]) -> list[str]:
    if isinstance(block, str):
        return get_close_matches(block, named, n=3, cutoff=0.4) or [*named][:5] or ["none"]
    return sorted({type(module).__name__ for module in named.values()}) or ["none"]
