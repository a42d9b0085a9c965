"""What an objective is judged by: its losses, and a metric that is never differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

META, INITIAL, ADAPTED = "meta", "initial", "adapted"
"""Names of arguments by which a loss asks for the meta-parameters, and for parameters before and after adaptation."""


@dataclass(frozen=True)
class Criteria:
    """Functions of an output and a target, or of parameters and a batch."""

    loss: Callable[..., Any]
    outer_loss: Callable[..., Any] | None
    """The loss of the query set, where it is another."""
    metric: Callable[..., Any] | None

    def __post_init__(self) -> None:
        """Raise TypeError unless they can be called, each with what it is given."""
        for name in ("loss", "outer_loss", "metric"):
            function = getattr(self, name)
            if not callable(function) and (name == "loss" or function is not None):
                raise TypeError(f"`{name}` must be callable. Got {type(function).__name__}.")
        for name in (INITIAL, ADAPTED):
            if _arguments(self.loss).get(name) is inspect.Parameter.empty:
                raise TypeError(
                    f"`loss` has an argument `{name}`, which the loss of the query set alone is given. Expected it in "
                    "Objective(..., outer_loss=...): in the inner loop `regularization` pulls to the initial ones."
                )

    @cached_property
    def taken(self) -> tuple[frozenset[str], frozenset[str]]:
        """By which names the support loss and the query loss take more than a subject and a target.

        Only a loss of the query set that is another one takes `initial` and `adapted`: the inner loop has no use for
        these, and a loss that has an argument of such a name has had it for something else.
        """
        support = frozenset({META} & _arguments(self.loss).keys())
        outer = {META, INITIAL, ADAPTED} & _arguments(self.outer_loss).keys()
        return support, support if self.outer_loss is None else frozenset(outer)

    def judge(self, subject: Any, target: Any, more: Mapping[str, Any], *, outer: bool) -> Any:
        """The loss, unchecked.

        Args:
            subject: What is judged: an output, or parameters.
            target: What it is judged by.
            more: What the loss takes besides, by the names in `taken`.
            outer: Whether the loss is that of the query set.

        Returns:
            What it returns.
        """
        function = self.outer_loss if outer and self.outer_loss is not None else self.loss
        return function(subject, target, **more)


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


def _arguments(function: Callable[..., Any] | None) -> dict[str, Any]:
    """The defaults of a function's arguments by name, but for those of a subject and a target."""
    if function is None:
        return {}
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # some built-in functions have no signature
        return {}
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for i, p in enumerate(parameters) if i > 1 or p.kind in by_name}
