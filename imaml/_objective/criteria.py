"""What an objective is judged by: its losses, and a metric that is never differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Criteria:
    """Functions of an output and a target, or of parameters and a batch."""

    loss: Callable[..., Any]
    outer_loss: Callable[..., Any] | None
    """The loss of the query set, where it is another."""
    metric: Callable[..., Any] | None

    def __post_init__(self) -> None:
        """Raise TypeError unless they can be called."""
        for name in ("loss", "outer_loss", "metric"):
            function = getattr(self, name)
            if not callable(function) and (name == "loss" or function is not None):
                raise TypeError(f"`{name}` must be callable. Got {type(function).__name__}.")

    @cached_property
    def _with_meta(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return _taking_meta(self.loss), _taking_meta(self.outer_loss or self.loss)

    def judge(self, subject: Any, target: Any, meta: Mapping[str, Any], *, outer: bool) -> Any:
        """The loss, unchecked.

        Args:
            subject: What is judged: an output, or parameters.
            target: What it is judged by.
            meta: The meta-parameters, which a loss gets only if it has an argument of that name.
            outer: Whether the loss is that of the query set.

        Returns:
            What it returns.
        """
        return self._with_meta[outer](subject, target, meta=meta)


def check_loss(loss: Any) -> Tensor:
    """The loss; raises TypeError unless it is a floating-point tensor, ValueError unless it is a scalar."""
    checked = check_scalar("loss", loss)
    if not checked.is_floating_point():
        raise TypeError(f"The loss must be a real floating-point tensor. Got {checked.dtype}.")
    return checked


def check_scalar(name: str, value: Any) -> Tensor:
    """The value; raises TypeError unless it is a tensor, ValueError unless it is a scalar."""
    if not isinstance(value, Tensor):
        raise TypeError(f"The {name} must return a tensor. Got {type(value).__name__}.")
    if value.ndim != 0:
        raise ValueError(
            f"The {name} must be a scalar (0-dim) tensor. Got shape {tuple(value.shape)}: reduce it, e.g. by .mean()."
        )
    return value


@dataclass(frozen=True)
class _WithoutMeta:
    """A function that does not take the meta-parameters."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, meta: Mapping[str, Any]) -> Any:
        return self.function(*args)


def _taking_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that takes the keyword `meta`."""
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        takes = "meta" in inspect.signature(target).parameters
    except ValueError:  # some built-in functions have no signature
        takes = False
    return function if takes else _WithoutMeta(function)
