"""Convolution and batch normalisation of many tasks in one, with second derivatives of our own.

A convolution is linear in its input and in its weight. So are its derivatives, which are convolutions again: three
operations, of which each has the others for derivatives, in every order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Geometry = tuple[list[int], list[int], list[int], int, torch.memory_format]
"""Strides, paddings, dilations, groups, and how images lie."""
_Found = tuple[Tensor | None, ...]


def convolution_of(own: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The convolution of all tasks.

    Args:
        own: The input `(n, tasks, in, h, w)`, the weight `(tasks, out, in / groups, kh, kw)`, and a bias `(tasks, out)`
            if there is one.
        args: What else `F.conv2d` was given.
        kwargs: What it was given by name.

    Returns:
        Of shape `(n, tasks, out, h, w)`; None where the geometry is not known.
    """
    given = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(_ARGUMENTS, args, strict=False)),
        **kwargs,
    }
    stride, padding, dilation = (_pair(given[name]) for name in _ARGUMENTS[:3])
    if stride is None or padding is None or dilation is None or len(given) > len(_ARGUMENTS):
        return None
    input, weight, *bias = own
    tasks = len(weight)
    # Channels last is faster but for small images, whose weights take longer to be put into that order too.
    lies = torch.channels_last if input.numel() >= weight.numel() else torch.contiguous_format
    how = stride, padding, dilation, tasks * int(given["groups"]), lies
    b = bias[0].flatten() if bias else None
    images: Tensor = _convolution(_lying(input.flatten(1, 2), how), weight.flatten(0, 1), b, how)
    return images.view(len(images), tasks, -1, *images.shape[2:])


_ARGUMENTS = ("stride", "padding", "dilation", "groups")
"""Arguments of `F.conv2d` after the tensors."""


def _pair(size: Any) -> list[int] | None:
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, (tuple, list)) and all(isinstance(s, int) for s in size) and len(size) in (1, 2):
        return list(size) * (2 // len(size))
    return None


def _backward(g: Tensor, x: Tensor, w: Tensor, how: Geometry, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups, _ = how
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, w, [len(w)], stride, padding, dilation, False, [0, 0], groups, mask
    )
    return found


def _lying(images: Tensor, how: Geometry) -> Tensor:
    """The images as they are to lie: outside of a function, which would save others than it was given."""
    return images.contiguous(memory_format=how[-1])


def _unread(shape: torch.Size, like: Tensor, how: Geometry) -> Tensor:
    """A tensor of which a derivative reads the shape alone."""
    return torch.empty(shape, dtype=like.dtype, memory_format=how[-1])


class _Convolution(Function):
    """y = w * x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
        """The convolution of images that lie as `how` says."""
        stride, padding, dilation, groups, _ = how
        ctx.save_for_backward(x, w)
        ctx.how, ctx.has_bias = how, b is not None
        return torch.conv2d(x, w, b, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> _Found:
        """The derivatives by x, w and b."""
        (x, w), (by_x, by_w, by_b, _) = ctx.saved_tensors, ctx.needs_input_grad
        g = _lying(g, ctx.how)
        found_w = found_b = None
        if by_w or by_b:
            found_w, found_b = _by_weight(g, x, w.shape, ctx.has_bias, ctx.how)
        return _by_input(g, w, x.shape, ctx.how) if by_x else None, found_w, found_b, None


class _ByInput(Function):
    """The derivative of a convolution by its input, for a cotangent g; linear in g and w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, how: Geometry) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.how = how
        return _backward(g, _unread(shape, g, how), w, how, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> _Found:
        (g, w), (by_g, by_w, *_) = ctx.saved_tensors, ctx.needs_input_grad
        u = _lying(u, ctx.how)
        return (
            _convolution(u, w, None, ctx.how) if by_g else None,
            _by_weight(g, u, w.shape, False, ctx.how)[0] if by_w else None,
            None,
            None,
        )


class _ByWeight(Function):
    """The derivatives of a convolution by its weight and its bias, for a cotangent g; linear in g and x."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, with_bias: bool, how: Geometry
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(g, x)
        ctx.set_materialize_grads(False)
        ctx.how = how
        by_w = _backward(g, x, _unread(shape, g, how), how, [False, True, False])[1]
        return by_w, g.sum((0, 2, 3)) if with_bias else None  # by itself: oneDNN's own takes longer

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vb: Tensor | None) -> _Found:
        (g, x), (by_g, by_x, *_) = ctx.saved_tensors, ctx.needs_input_grad
        found_g = found_x = None
        if v is None and vb is not None and by_g:
            found_g = vb.view(1, -1, 1, 1).expand_as(g)
        if v is not None:
            found_g = _convolution(x, v, vb, ctx.how) if by_g else None
            found_x = _by_input(g, v, x.shape, ctx.how) if by_x else None
        return found_g, found_x, None, None, None


def batch_norm_of(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch normalisation of all tasks.

    Args:
        input: `(n, tasks, channels, h, w)`.
        weight: `(tasks, channels)`, as the bias.
        bias: Is added.
        eps: Is added to the variance.

    Returns:
        In the shape of the input.
    """
    found: Tensor = _batch_norm(_packed(input.flatten(1, 2)), weight.flatten(), bias.flatten(), eps)
    return found.view(len(found), *weight.shape, *found.shape[2:])


class _BatchNorm(Function):
    """y = gamma z + beta, with z = (x - mean) r and r = (variance + eps)^(-1/2) of every channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        y, mean, r = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> _Found:
        x, gamma, mean, r = ctx.saved_tensors
        return *_batch_norm_backward(_like(x, g), x, gamma, mean, r, ctx.eps), None


class _BatchNormBackward(Function):
    """With P(g) = r (g - mean(g) - z mean(g z)): gamma P(g), sum(g z) and sum(g)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(g, x, gamma, mean, r)
        ctx.eps = eps
        return _projected(g, x, gamma, mean, r, eps)

    @staticmethod
    def backward(ctx: Any, u: Tensor, a: Tensor, b: Tensor) -> _Found:
        """The derivatives by g, x and gamma of <u, gamma P(g)> + <a, sum(g z)> + <b, sum(g)>."""
        g, x, gamma, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: what follows is not
            return *_second(g, x, gamma, u, a, b, ctx.eps), None, None, None
        # m is the number of entries of a channel. With s(u) = mean(u z) the first term is gamma r m (mean(u g) -
        # mean(u) mean(g) - s(u) s(g)) = gamma <u, P(g)>, and by z at constant r it is h = - gamma r (s(g) u + s(u) g).
        # x moves z by P, of h + a g, and r by - r^2 z / m.
        u = _like(x, u)
        m = g.numel() // len(gamma)
        by_u, u_z, _ = _projected(u, x, None, mean, r, ctx.eps)
        by_g, g_z, _ = _projected(g, x, None, mean, r, ctx.eps)
        by_gamma = (u * by_g).sum((0, 2, 3))
        along_g, along_u = a - gamma * r * u_z / m, -gamma * r * g_z / m
        along_x = -gamma * by_gamma * r * r / m
        found_x = (by_g * _each(along_g)).addcmul_(by_u, _each(along_u))
        found_x.addcmul_(x, _each(along_x)).sub_(_each(along_x * mean))
        a_r = a * r
        found_g = by_u.mul_(_each(gamma)).addcmul_(x, _each(a_r)).add_(_each(b - a_r * mean))
        return found_g, found_x, by_gamma, None, None, None


def _packed(images: Tensor) -> Tensor:
    """The images, in one of the two orders that torch has kernels for."""
    return images if images.is_contiguous(memory_format=torch.channels_last) else images.contiguous()


def _like(images: Tensor, others: Tensor) -> Tensor:
    """Others in the order of the images."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    return others.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _each(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _projected(
    g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, r: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, None, None, mean, r, True, eps, [True, True, True]
    )
    return found


def _second(
    g: Tensor, x: Tensor, gamma: Tensor, u: Tensor, a: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the derivatives of batch normalisation with a graph, by plain operations."""
    # Views, since g may itself depend on x.
    g, x, gamma = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, gamma))
    centred = x - x.mean((0, 2, 3), keepdim=True)
    r = (centred.square().mean((0, 2, 3), keepdim=True) + eps).rsqrt()
    z = centred * r
    means = [t.mean((0, 2, 3), keepdim=True) for t in (g, g * z)]
    by_x = _each(gamma) * r * (g - means[0] - z * means[1])
    total = (u * by_x).sum() + (a * (g * z).sum((0, 2, 3))).sum() + (b * g.sum((0, 2, 3))).sum()
    by_g, by_x, by_gamma = torch.autograd.grad(total, (g, x, gamma), create_graph=True)
    return by_g, by_x, by_gamma


_convolution: Any = _Convolution.apply
_by_input: Any = _ByInput.apply
_by_weight: Any = _ByWeight.apply
_batch_norm: Any = _BatchNorm.apply
_batch_norm_backward: Any = _BatchNormBackward.apply
