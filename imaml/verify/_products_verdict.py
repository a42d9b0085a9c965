"""From what the modes gave to a verdict with its cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from imaml.verify._differences import SHRINK
from imaml.verify._modes import Found, ratio, unsymmetric
from imaml.verify._products import VISIBLE, Differences
from imaml.verify._verification import RESOLVING, Status, Verification, judge

INEXACT = 1e-3
"""What the finite-difference mode may be off, in the median over directions: kinks near by can spoil one of them."""
NOISE = 1e-6
"""And beside that, relative to the gradient: its steps of sqrt(eps) leave sqrt(eps) of the gradient as noise."""
ROUNDED = 20
"""How many times the rounding error of an operation that of a product may be, in which linearity and symmetry show."""

_ZERO = (
    "the Hessian is zero to rounding (the loss is linear in the adapted parameters, or saturated): nothing can be "
    "compared"
)
_NOT_ONE_LOSS = (
    "autograd's gradient is not the gradient of one loss: finite differences of it are not symmetric. Look for "
    ".detach() or torch.no_grad() in the loss, a straight-through estimator, or a wrong backward of a custom "
    "autograd.Function"
)
_NOT_SMOOTH = (
    "finite differences of the gradient do not settle: the loss is not twice differentiable at or near these "
    "parameters (kinks of ReLU, max pooling, abs), or too noisy"
)
_COARSE = (
    "only finite differences support this model, and they report an error above the tolerance themselves: the gradient "
    "is too noisy, as where an operation computes in less than float64"
)
_NO_MODE = "no mode supports this model: see the reasons below"


def verdict(
    found: Mapping[str, Found | str],
    right: Differences,
    directions: Tensor,
    tolerance: float,
    *,
    random: bool,
    eps: float,
) -> Verification:
    """Judge the modes by the finite differences, and by what holds for every Hessian.

    Args:
        found: What each mode gave, or why it gave nothing.
        right: The finite differences.
        directions: Along which, `(directions, n)`.
        tolerance: The largest relative error that passes.
        random: Whether the loss draws random numbers.
        eps: The relative rounding error of an operation, where that is in less than float64.

    Returns:
        The verdict.
    """
    able = [f for f in found.values() if isinstance(f, Found)]
    exact = [f for f in able if f.is_exact]
    if not exact:
        tolerance = max(tolerance, INEXACT)
    size = right.products.norm().item()
    error = max((_error(f, right) for f in exact or able), default=math.nan)
    uncertain = right.error
    if right.jump > tolerance * size and error * size <= right.jump + right.error:
        uncertain = max(right.error, right.jump)
    resolution = uncertain / size if size else math.inf
    status, cause = _judge(able, right, directions, tolerance, error, resolution, random, ROUNDED * eps)
    if status == "inconclusive" and eps:
        cause = f"{cause}. An operation computes in less than float64"
    return Verification(
        subject="Hessian-vector products",
        status=status,
        relative_error=error,
        resolution=resolution,
        cause=cause,
        tolerance=tolerance,
        details=(*_table(found, right), _order(right), *_agreement(exact)),
    )


def _judge(
    able: Sequence[Found],
    right: Differences,
    directions: Tensor,
    tolerance: float,
    error: float,
    resolution: float,
    random: bool,
    rounding: float,
) -> tuple[Status, str | None]:
    if not able:
        return "inconclusive", _NO_MODE
    for mode in able:
        if not bool(mode.products.isfinite().all()):
            text = "returns NaN or infinite values: look for an operation with an infinite second derivative"
            return "failed", f"{mode.mode} {text} (sqrt or a norm at 0)"
    nothing = 2 * right.error + NOISE * right.gradient
    if right.products.norm() <= 2 * right.error and all(f.products.norm() <= nothing for f in able):
        return "inconclusive", _ZERO
    off, relative = unsymmetric(directions, right.products)
    if relative > tolerance and off > 10 * right.error:
        return "failed", _NOT_ONE_LOSS
    for mode in able:
        if mode.is_exact and (cause := _broken(mode, max(tolerance, rounding), random)):
            return "failed", cause
    if resolution > RESOLVING:
        return "inconclusive", _NOT_SMOOTH
    status = judge(error, resolution, tolerance)
    wrong = [f for f in able if not _is_right(f, right, max(tolerance, 3 * resolution))]
    if status == "failed" and not wrong:
        return "inconclusive", _COARSE
    if wrong:
        worst = max(wrong, key=lambda f: _error(f, right))
        return "failed", _off(worst, [f for f in able if f not in wrong], right)
    return "passed", None


def _error(found: Found, right: Differences) -> float:
    if found.is_exact:
        return ratio(found.products - right.products, right.products)
    pairs = zip(found.products, right.products, strict=True)
    return sorted(ratio(a - b, b) for a, b in pairs)[len(right.products) // 2]


def _is_right(found: Found, right: Differences, tolerance: float) -> bool:
    if found.is_exact:
        return _error(found, right) <= tolerance
    size: float = right.products.norm().item() / math.sqrt(len(right.products))
    return _error(found, right) * size <= max(INEXACT, found.admitted) * size + NOISE * right.gradient


def _broken(mode: Found, tolerance: float, random: bool) -> str | None:
    """What the products of a mode break that holds for every Hessian, smooth or not."""
    if mode.nonlinearity > tolerance:
        why = (
            "its random draws (dropout) are not the same in every product"
            if random
            else "an operation's double backward is not linear (a custom autograd.Function), or keeps a state"
        )
        return f"{mode.mode} is not linear: H(au + bv) is off by {mode.nonlinearity:.2g}: {why}"
    if mode.asymmetry > tolerance:
        why = "an operation's double backward is not the derivative of its backward (a custom autograd.Function)"
        return f"{mode.mode} is not symmetric: u'Hv and v'Hu differ by {mode.asymmetry:.2g}: {why}"
    return None


def _off(mode: Found, good: Sequence[Found], right: Differences) -> str:
    if not bool(mode.products.any()):
        what = "gives zero where the gradient changes: an operation drops its second derivative"
    else:
        what = (
            f"is {_error(mode, right):.2g} off from finite differences of the gradient: an operation's backward drops"
        )
        what += " or misstates its own derivative"
    where = "(a custom autograd.Function; .detach() or .data in a backward; a tensor saved without its graph)"
    remedy = f"; hvp={good[0].mode.partition(',')[0]!r} is right here" if good else ""
    return f"{mode.mode} {what} {where}{remedy}"


def _table(found: Mapping[str, Found | str], right: Differences) -> list[str]:
    lines = [f"{'mode':34}{'error':>9}{'nonlinear':>11}{'asymmetric':>12}"]
    for mode, f in found.items():
        if isinstance(f, str):
            lines.append(f"{mode:34}not supported by this model: {f}")
        else:
            lines.append(f"{mode:34}{_error(f, right):9.1e}{f.nonlinearity:11.1e}{f.asymmetry:12.1e}")
    return lines


def _order(right: Differences) -> str:
    size = right.products.norm().item() or 1.0
    errors = ", ".join(f"{e / size:.1e}" for e in right.errors)
    if right.order is not None:
        order = f"order {right.order:.2f}"
    else:
        order = "kinks within the larger steps" if max(right.errors) > VISIBLE * size else "no error but rounding"
    return f"differences with h = {right.steps[0]:.2g}, h / {SHRINK:g}, ...: errors {errors}: {order}"


def _agreement(exact: Sequence[Found]) -> list[str]:
    if len(exact) < 2:
        return []
    first = exact[0].products
    return [f"exact modes agree to {max(ratio(f.products - first, first) for f in exact[1:]):.1e}"]
