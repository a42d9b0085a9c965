"""Operations whose derivatives torch gets wrong without a word, computed by others that it gets right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imaml._objective.at_once import batch_norm, conv2d, linear
from imaml._torch import is_functorch_wrapped_tensor, may_drop_second_derivative, of_all_tasks, weight_norm


class ExactDerivatives(TorchFunctionMode):
    """Within it, replaced operations have the values, and the true derivatives, of the originals (torch 2.13).

    - `torch._weight_norm` (the parametrization `weight_norm`): its second derivative is wrong by percents.
    - `F.embedding` with `padding_idx`: vectorised over tasks, the padding row of all tasks but the first receives a
      gradient. With `sparse=True` its gradient has no second derivative: it is dense here, as that of
      `F.embedding_bag`.

    - `torch.view_as_complex` of a parameter, which lies anywhere in a flat vector, is a copy where torch wants another
      alignment; so is its view as a complex dtype.
    - `F.linear`, `F.conv2d` and `F.batch_norm` are those of all tasks at once: see `at_once.py`.
    - `F.group_norm` and views see images in the order that they have without these.
    - `requires_grad`, `is_leaf` and `grad_fn` of a tensor inside `vmap` are those of the tensors of all tasks; torch
      says that none requires grad, and a forward pass that asks would take another branch than for one task.

    An active mode also keeps `nn.TransformerEncoder` and `nn.MultiheadAttention` off their fast path, which has no
    derivative at all.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what replaces it."""
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def check_twice_differentiable(nodes: Sequence[Any]) -> None:
    """Raise RuntimeError where a graph passes an operation without second derivative.

    Autograd itself is silent about it: such an operation leads to no leaf, and counts as unused. A custom
    `autograd.Function` that `vmap` has rewritten drops its second derivative without a trace if it has none, so none of
    them is trusted; they are exact with `chunk_size=1`.

    Raises:
        RuntimeError: There is one.
    """
    seen: set[Any] = set()
    pending = [node for node in nodes if node is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if may_drop_second_derivative(node):
            raise RuntimeError(f"{node.name()} does not support double backward")
        pending += [following for following, _ in node.next_functions if following is not None]


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _check_fixed(max_norm)
    found = F.embedding(input, weight, scale_grad_by_freq=scale_grad_by_freq)
    if padding_idx is None:
        return found
    is_padding = input == padding_idx % weight.shape[0]
    return torch.where(is_padding.unsqueeze(-1), found.detach(), found)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    _check_fixed(max_norm)
    return F.embedding_bag(input, weight, offsets, None, norm_type, scale_grad_by_freq, mode, False, *args, **kwargs)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)  # which an evaluation has put in the place of torch's own


def _check_fixed(max_norm: float | None) -> None:
    if max_norm is not None:
        raise ValueError(
            f"An embedding with max_norm={max_norm} changes its weight in place, which is no function of the "
            "parameters. Build it with max_norm=None, and bound the norm in the loss or after a meta-step."
        )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return v * (g / norm)


def _group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.group_norm(input.contiguous(), *args, **kwargs)  # `vmap` has none of images whose channels are last


def _view_as_complex(pairs: Tensor) -> Tensor:
    try:
        return torch.view_as_complex(pairs)
    except RuntimeError:
        if pairs.shape[-1:] != (2,):
            raise
        return torch.complex(*pairs.unbind(-1))  # no view, whose derivative would want the same alignment


def _view(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = args[0] if args else kwargs.get("dtype")
    if not isinstance(dtype, torch.dtype) or not dtype.is_complex or tensor.is_complex():
        if tensor.ndim == 4 and is_functorch_wrapped_tensor(tensor):  # images whose channels `conv2d` has put last
            return tensor.contiguous().view(*args, **kwargs)
        return tensor.view(*args, **kwargs)
    return _view_as_complex(tensor.unflatten(-1, (-1, 2)))


def _of_all_tasks(getter: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def get(tensor: Tensor) -> Any:
        whole = of_all_tasks(tensor)
        if not whole.requires_grad:
            denied.count += 1
        return getter(whole)

    return get


class _Denied(threading.local):
    count = 0


denied = _Denied()
"""How often a forward pass asked of a tensor whether it requires grad, and heard that it does not."""


_TENSOR: Any = Tensor  # whose attributes have getters, which annotations do not say
_GETTERS = [getattr(_TENSOR, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn")]
_REPLACED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.scaled_dot_product_attention: _attention,
    F.linear: linear,
    F.conv2d: conv2d,
    F.batch_norm: batch_norm,
    F.group_norm: _group_norm,
    weight_norm: _weight_norm,
    torch.view_as_complex: _view_as_complex,
    Tensor.view: _view,
    **{getter: _of_all_tasks(getter) for getter in _GETTERS},
}
