"""Convolutions of few small images as matrix products, and batch normalisation by its formula, in what is compiled.

The kernels for convolutions are made for many images, and a compiler can neither look into them nor fuse anything with
them. Patches times weights are one matrix product, and so is every derivative of it. The derivatives of torch's batch
normalisation are long formulas for any case; those of the plain formula are what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SMALL = 2**18
"""Elements of the patches of a task, up to which they stay in the caches between the products that read them. They hold
a pixel as often as kernels overlap; beyond that, torch's are as fast, and up to 2.5 times so where strides are 1."""


class Patches(TorchFunctionMode):
    """Within it, convolutions and batch normalisations that are known run as products and sums, others as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands in for it."""
        found = _INSTEAD[func](*args, **(kwargs or {})) if func in _INSTEAD else None
        return func(*args, **(kwargs or {})) if found is None else found


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Computes a convolution of any number of dimensions as patches times weights.

    Args:
        input: Images `(n, channels, *size)`.
        weight: `(outputs, channels, *kernel)`.
        bias: `(outputs,)`.
        stride: One for all dimensions, or one for each.
        padding: Zeros on both sides.
        dilation: Between the elements of the kernel.
        groups: How many.

    Returns:
        Images `(n, outputs, *size)`, the channels of a pixel side by side; None where torch's kernel is to be taken.
    """
    axes = weight.ndim - 2
    if groups != 1 or isinstance(padding, str) or input.ndim != weight.ndim or not _is_plain(input, weight, bias):
        return None
    stride, padding, dilation = (_each(value, axes) for value in (stride, padding, dilation))
    kernel = weight.shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [(s + 2 * p - r) // t + 1 for s, p, r, t in zip(input.shape[2:], padding, reach, stride, strict=True)]
    length = kernel.numel() * input.shape[1]
    if min(size) < 1 or len(input) * torch.Size(size).numel() * length > SMALL:
        return None
    patches = F.pad(input, [p for p in reversed(padding) for _ in range(2)]) if any(padding) else input
    for axis, (r, t) in enumerate(zip(reach, stride, strict=True), 2):
        patches = patches.unfold(axis, r, t)
    for axis, d in enumerate(dilation, 2 + axes):
        patches = patches if d == 1 else patches.unfold(axis, 1, d).squeeze(-1)
    # Channels last: they are contiguous in the product that the next layer reads.
    rows = patches.permute(0, *range(2, 2 + 2 * axes), 1).reshape(-1, length)
    columns = weight.permute(*range(2, 2 + axes), 1, 0).reshape(length, -1)
    product = rows @ columns if bias is None else torch.addmm(bias, rows, columns)
    return product.view(-1, *size, weight.shape[0]).permute(0, -1, *range(1, 1 + axes))


def normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Computes a batch normalisation that keeps no running statistics; takes what `F.batch_norm` takes.

    Returns:
        The normalised input; None where torch's own function is to be taken.
    """
    if not training or running_mean is not None or running_var is not None or not _is_plain(input, weight, bias):
        return None
    axes, shape = [0, *range(2, input.ndim)], (-1, *(1,) * (input.ndim - 2))
    if input.numel() == input.shape[1]:  # one value a channel, for which torch has an error
        return None
    centred = input - input.mean(axes, keepdim=True)
    found = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    found = found if weight is None else found * weight.view(shape)
    return found if bias is None else found + bias.view(shape)


def fold(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Any:
    """Computes the derivative of `Tensor.unfold` by sums of shifted slices, where torch scatters element by element.

    A position q * step + r is element r + j * step of window q - j, for each j: so there is one sum for each r.

    Args:
        grad: Windows `(..., windows, ..., size)`.
        sizes: Shape of what was unfolded.
        dim: Along which axis.
        size: Elements of a window.
        step: From one window to the next.

    Returns:
        A tensor of those sizes; NotImplemented of a number, or of empty windows.
    """
    if not sizes or not size:
        return NotImplemented
    dim, windows = dim % len(sizes), grad.shape[dim % len(sizes)]
    length = -(-sizes[dim] // step)
    after = [0, 0] * (len(sizes) - 1 - dim)
    sums = list[Tensor]()
    for r in range(step):
        parts = [
            F.pad(grad.select(-1, element), [*after, j, length - windows - j])
            for j, element in enumerate(range(r, size, step))
        ]
        sums.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(sums[0]))
    return torch.stack(sums, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, sizes[dim])


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are of a kind for which this was measured."""
    given = [t for t in tensors if t is not None]
    return not torch.is_autocast_enabled("cpu") and all(
        t.device.type == "cpu" and t.layout is torch.strided and t.dtype in (torch.float32, torch.float64)
        and t.dtype == given[0].dtype
        for t in given
    )  # fmt: skip


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


_INSTEAD: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv1d: convolve,
    torch.conv2d: convolve,
    torch.conv3d: convolve,
    F.batch_norm: normalise,
}
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.aten.unfold_backward.default: fold}
"""For a trace: what its operations are replaced by."""
