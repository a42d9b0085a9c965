"""Operations of all tasks at once, where `vmap` takes them apart, or torch's derivatives of what it makes are slow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imaml._objective.grouped import batch_norm_of, convolution_of
from imaml._torch import at_once, is_along_tangents, is_traced


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, which is one product of batches of matrices where every task has its own weight and bias."""
    own = (input, weight) if bias is None else (input, weight, bias)
    known = weight.ndim == 2 and input.ndim > 0 and (bias is None or bias.ndim == 1)
    if known and not torch.is_autocast_enabled(input.device.type) and not is_traced():
        found = at_once(_linear, own, [0] * len(own), 0)
        if found is not None:
            return found
    return F.linear(input, weight, bias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layers with an input `(tasks, ..., in)`, a weight `(tasks, out, in)` and a bias `(tasks, out)`."""
    rows = input.unsqueeze(1) if input.ndim == 2 else input.flatten(1, -2)
    found = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return found if input.ndim == 3 else found.view(*input.shape[:-1], found.shape[-1])


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`F.conv2d`, which is one of as many groups as there are tasks where each has its own weight.

    Large images have their channels last, of which the derivative by the input takes a third of the time. Torch's own
    second derivative goes through the groups one by one.

    Args:
        input: `(n, in, h, w)`; for others, with a string for a padding, or on an accelerator it is torch's.
        weight: `(out, in / groups, kh, kw)`.
        bias: `(out,)`.
        args: The rest.
        kwargs: The rest by name.

    Returns:
        `(n, out, h, w)`.
    """
    own = (input, weight) if bias is None else (input, weight, bias)
    if input.ndim == weight.ndim == 4 and _is_plain(own):
        found = at_once(lambda *own: convolution_of(own, args, kwargs), own, [1, 0, 0][: len(own)], 1)
        if found is not None:
            return found
    return F.conv2d(input, weight, bias, *args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, with a short second derivative where it is by the statistics of the batch alone.

    Torch's is some 25 passes over the images; its third derivative is wrong.

    Args:
        input: `(n, channels, h, w)`; for others, or without weight and bias, it is torch's.
        running_mean: None, or it is torch's.
        running_var: None, or it is torch's.
        weight: `(channels,)`.
        bias: `(channels,)`.
        training: True, or it is torch's.
        momentum: For the running statistics.
        eps: Is added to the variance.

    Returns:
        In the shape of the input.
    """
    if (
        training
        and running_mean is running_var is None
        and weight is not None
        and bias is not None
        and input.ndim == 4
        and input.shape[0] * input.shape[2] * input.shape[3] > 1
        and _is_plain((input, weight, bias))
    ):
        found = at_once(partial(batch_norm_of, eps=eps), (input, weight, bias), [1, 0, 0], 1)
        if found is not None:
            return found
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether an operation of our own knows what to do: on a CPU, in full precision, and without tangents."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and all([t.dtype == first.dtype for t in tensors])
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
        and not is_along_tangents()
    )
