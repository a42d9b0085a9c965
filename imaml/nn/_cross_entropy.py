"""Cross entropy over a vocabulary, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imaml._torch import inside_transform, of_all_tasks, requires_grad
from imaml.nn._sliced import Factors, Sliced

_REDUCTIONS = ("mean", "sum", "none")
_SMALLEST = 64


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes the cross entropy of the logits `hidden @ weight.T + bias` without ever holding those of all tokens.

    The logits of a few tokens at a time are computed, and computed again in derivatives of every order. Values and
    derivatives are those of `torch.nn.functional.cross_entropy` on the logits, in float32 where these are of half
    precision. For a language model's head, whose logits would take more memory than the rest of it; `weight` may be
    the embedding.

    Memory: in a gradient the gradients themselves, and twice the logits of `chunk_size` tokens; in a Hessian-vector
    product the same and three times these.

    Cost: a gradient computes the logits once more, a third more arithmetic than one that keeps them. A Hessian-vector
    product takes about 1.2 times as much.

    Not for `ImplicitMAML(curvature="ggn")` where the model returns the hidden states and the head's weight: of both
    together the loss is not convex, and the Gauss-Newton matrix is another than that of a model that returns logits.

    Args:
        hidden: The inputs of the head, `(..., d)`.
        weight: The head's weight, `(classes, d)`, of the same dtype.
        target: Class indices, `(...)`, integers from 0 to classes - 1, or `ignore_index`.
        bias: The head's bias, `(classes,)`.
        class_weight: Weights of the classes, `(classes,)`: the argument `weight` of torch's cross entropy. They get no
            gradient.
        ignore_index: Tokens with this target have no loss.
        reduction: "mean", over the tokens that are not ignored, weighted by the class weights of their targets; "sum";
            or "none".
        label_smoothing: The share of a uniform distribution in the targets, from 0 to 1.
        chunk_size: Tokens at a time, of each task where tasks are vectorised. By default a quarter of d, at least 64:
            their logits take a quarter of the memory of `weight`.

    Returns:
        A scalar, or with "none" the losses, of the shape of `target`. The dtype is that of `hidden`, float32 where that
        is of half precision.

    Raises:
        TypeError: A dtype is not one of those above, or those of `hidden`, `weight` and `bias` differ.
        ValueError: A shape or an option is not one of those above, or `class_weight` requires grad.
        IndexError: A target is no class. On devices other than the CPU, it is torch that says so.
    """
    classes = _check_shapes(hidden, weight, target, bias, class_weight)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {_REDUCTIONS}. Got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must be from 0 to 1. Got {label_smoothing}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, a number of tokens. Got {chunk_size}.")
    hidden, weight, bias = _cast(hidden, weight, bias)
    ignored = target == ignore_index
    index = torch.where(ignored, 0, target).long()
    _check_classes(index, classes)

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    every = hidden.new_ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype)
    share = every[index]
    size = chunk_size or max(_SMALLEST, hidden.shape[-1] // 4)
    (found,) = Sliced(_losses, _INPUTS, (True,), size, (_gradient, _product))(
        hidden.reshape(1, -1, hidden.shape[-1]),
        weight.unsqueeze(0),
        bias if bias is None else bias.unsqueeze(0),
        index.reshape(1, -1),
        ((1 - label_smoothing) * share).reshape(1, -1),
        (every * (label_smoothing / classes)).unsqueeze(0) if label_smoothing else None,
    )
    assert found is not None
    losses = found.reshape(target.shape).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / share.masked_fill(ignored, 0.0).sum()


_INPUTS = (True, False, False, True, True, False)
"""Which inputs have tokens: hidden states h, weights w, biases b, targets t, their shares, uniform shares.

The loss of a token is -share log p_t - sum_v uniform_v log p_v, with p the softmax of z = w h + b.
"""


def _losses(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor, share: Tensor, uniform: Tensor | None) -> list[Tensor]:
    logs = F.log_softmax(_logits(h, w, b), -1)
    losses = -share * _picked(logs, t)
    return [losses if uniform is None else losses - _weighted(logs, uniform)]


def _gradient(
    wanted: Sequence[bool],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    t: Tensor,
    share: Tensor,
    uniform: Tensor | None,
    c: Tensor,
) -> list[Tensor | Factors | None]:
    """By z it is c (s p - q), where q holds the shares of the classes and s is their sum."""
    g = _by_logits(F.softmax(_logits(h, w, b), -1), t, share, uniform, c)
    return [
        g.to(w.dtype) @ w if wanted[0] else None,
        [(g.to(h.dtype), h)] if wanted[1] else None,
        g.sum(1) if wanted[2] else None,
        *[None] * 3,
    ]


def _product(
    wanted: Sequence[bool],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    t: Tensor,
    share: Tensor,
    uniform: Tensor | None,
    c: Tensor | None,
    uh: Tensor | None,
    uw: Tensor | None,
    ub: Tensor | None,
    *_: None,
) -> list[Tensor | Factors | None]:
    """Pull cotangents u of `_gradient` back: their product with it is g'dz, where dz is the derivative of z along u."""
    # By z that is r = c s p (dz - p'dz), the derivative of g along dz; and by c it is s p'dz - q'dz.
    p = F.softmax(_logits(h, w, b), -1)
    dz = torch.zeros_like(p)
    if uh is not None:
        dz += _logits(uh, w, None)
    if uw is not None:
        dz += _logits(h, uw, None)
    if ub is not None:
        dz += ub.unsqueeze(1)
    mean = (p * dz).sum(-1)
    by_c = None
    if wanted[-1]:
        by_c = _sum_of_shares(share, uniform) * mean - share * _picked(dz, t)
        by_c = by_c if uniform is None else by_c - _weighted(dz, uniform)
    if c is None or not any(wanted[:3]):
        return [*[None] * 6, by_c]
    r = dz - mean.unsqueeze(-1)
    del dz
    r = r.mul_(p).mul_((c * _sum_of_shares(share, uniform)).unsqueeze(-1))
    g = _by_logits(p, t, share, uniform, c).to(w.dtype)
    del p
    by_h, by_w = None, [(r.to(h.dtype), h)]
    if wanted[0]:
        by_h = r.to(w.dtype) @ w
        by_h = by_h if uw is None else by_h + g @ uw
    if uh is not None:
        by_w.append((g, uh))
    return [by_h, by_w if wanted[1] else None, r.sum(1) if wanted[2] else None, *[None] * 3, by_c]


def _logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    z = h @ w.mT if b is None else torch.baddbmm(b.unsqueeze(1), h, w.mT)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _by_logits(p: Tensor, t: Tensor, share: Tensor, uniform: Tensor | None, c: Tensor) -> Tensor:
    g = p * (c * _sum_of_shares(share, uniform)).unsqueeze(-1)
    g.scatter_add_(-1, t.unsqueeze(-1), (-c * share).unsqueeze(-1))
    return g if uniform is None else g.addcmul_(uniform.unsqueeze(1), c.unsqueeze(-1), value=-1)


def _picked(values: Tensor, t: Tensor) -> Tensor:
    return values.gather(-1, t.unsqueeze(-1)).squeeze(-1)


def _weighted(values: Tensor, uniform: Tensor) -> Tensor:
    return (values @ uniform.unsqueeze(-1)).squeeze(-1)


def _sum_of_shares(share: Tensor, uniform: Tensor | None) -> Tensor:
    return share if uniform is None else share + uniform.sum(-1, keepdim=True)


def _check_shapes(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> int:
    """How many classes there are; raises where arguments do not fit together."""
    for name, tensor in {"hidden": hidden, "weight": weight, "target": target}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor. Got {type(tensor).__name__}.")
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "Expected `hidden` of shape (..., d) and `weight` of shape (classes, d). Got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}: is the weight transposed?"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`target` must have one class index for each hidden state, shape {tuple(hidden.shape[:-1])}. Got "
            f"{tuple(target.shape)}; targets that are probabilities are not supported."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"`target` must hold class indices, such as torch.int64. Got {target.dtype}.")
    classes = weight.shape[0]
    for name, vector in {"bias": bias, "class_weight": class_weight}.items():
        if vector is not None and vector.shape != (classes,):
            raise ValueError(
                f"`{name}` must have one entry for each class, shape ({classes},). Got {tuple(vector.shape)}."
            )
    if class_weight is not None and requires_grad(class_weight):
        raise ValueError(
            "`class_weight` requires grad, and gets no gradient. Detach it, or weight the losses that "
            'reduction="none" returns.'
        )
    return classes


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the arguments of a matrix product, which must have one dtype."""
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
        bias = bias if bias is None else bias.to(weight.dtype)
    dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise TypeError(
            "`hidden`, `weight` and `bias` must have one real floating-point dtype. Got "
            f"{', '.join(sorted(str(d) for d in dtypes))}: cast them, or use torch.autocast."
        )
    return hidden, weight, bias


def _check_classes(index: Tensor, classes: int) -> None:
    """Raise IndexError where a target is no class, if that can be known without waiting for a device."""
    if index.device.type != "cpu" or inside_transform():
        return
    whole = of_all_tasks(index)
    wrong = whole[(whole < 0) | (whole >= classes)]
    if wrong.numel():
        raise IndexError(
            f"Targets must be class indices from 0 to {classes - 1}, or `ignore_index`. Got {int(wrong[0])}."
        )
