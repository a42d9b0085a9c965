"""What a batch may hold: tensors, and beside them fields that are None, and objects that a model gets as they are."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from numbers import Number
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from imaml._torch import register_pytree_node, tree_leaves, tree_map


@dataclass(frozen=True, eq=False)
class Whole:
    """What is no tensor, hidden from whatever handles the tensors of a batch, and the same for all tasks of it.

    Equal are those of one type, so that tasks are alike that differ in an object: only one of them makes a batch.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Whole) and type(self.value) is type(other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))


register_pytree_node(Whole, lambda whole: ([], whole), lambda _, whole: whole)


def wrapped(batch: Any) -> Any:
    """A batch of tensors alone, for `opened`."""
    if all(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
        return batch
    return tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else Whole(leaf), batch)


def opened(batch: Any) -> Any:
    """A batch as it was before `wrapped`."""
    if isinstance(batch, Tensor) or type(batch) in (tuple, list) and all(isinstance(b, Tensor) for b in batch):
        return batch
    return tree_map(lambda x: x.value if isinstance(x, Whole) else x, batch, is_leaf=_is_whole)


def objects(batch: Any) -> list[Any]:
    """What a batch holds, wrapped or not, besides tensors and None."""
    leaves = (leaf.value if _is_whole(leaf) else leaf for leaf in tree_leaves(batch, is_leaf=_is_whole))
    return [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]


def check_leaves(name: str, batch: Any) -> None:
    """Raise TypeError unless a model can be given every part of a batch; the message says what to do."""
    for part in tree_leaves(batch, is_leaf=_is_typed):
        for leaf in tree_leaves(part):
            if leaf is not None or leaf is part:  # a type may have fields that are None
                _check_leaf(name, leaf)


def checksum(tensor: Tensor) -> tuple[torch.Size, str, int]:
    """The shape and dtype of a tensor, with a sum of its bits: another one is another tensor, in any process."""
    bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return tensor.shape, str(tensor.dtype), crc32(bits)


def _is_typed(part: Any) -> bool:
    return type(part) not in (tuple, list, dict, OrderedDict, defaultdict)


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        if leaf.layout not in (torch.strided, torch.jagged):
            raise TypeError(
                f"Every tensor of `{name}` must be dense, so that tasks can be stacked and sliced. Got {leaf.layout}: "
                "pass its indices and its values as two tensors, and make it of them in the model or the loss, with "
                "torch.sparse_coo_tensor."
            )
        if leaf.is_nested:
            raise TypeError(
                f"Every tensor of `{name}` must have one size in each dimension. Got a nested tensor ({leaf.layout}): "
                "pad it with torch.nested.to_padded_tensor and pass a mask, or pass the tensors of a task in a tuple "
                "or a dict."
            )
        if leaf.is_quantized:
            raise TypeError(
                f"Every tensor of `{name}` must be of a dtype to compute in. Got {leaf.dtype}: use .dequantize()."
            )
    elif remedy := _remedy(leaf):
        raise TypeError(f"Every leaf of `{name}` must be a tensor. Got {type(leaf).__name__}: {remedy}.")


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, Whole)


def _remedy(leaf: Any) -> str | None:
    """What to do about what is no tensor; None where a model can be given it as it is."""
    kind = type(leaf).__name__
    if leaf is None or isinstance(leaf, nn.Module) or callable(leaf):
        return "leave it out"
    if isinstance(leaf, (str, bytes)):
        return "encode it as a tensor, or leave it out"
    if isinstance(leaf, Number) or hasattr(leaf, "__array__") and not hasattr(leaf, "to"):
        return "convert it with torch.as_tensor"
    if isinstance(leaf, Mapping):
        return "make a dict of it, with dict(...)"
    if callable(getattr(leaf, "to", None)):
        return None
    if is_dataclass(leaf):
        return f"register its type once, with torch.export.register_dataclass({kind})"
    if isinstance(leaf, Iterable):
        return "make a tuple or list of it"
    return (
        "register its type once, say which tensors it holds, and how to make one of others: "
        f"torch.utils._pytree.register_pytree_node({kind}, lambda x: ([x.data], None), lambda xs, _: {kind}(*xs))"
    )
