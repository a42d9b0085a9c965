"""The outer optimiser, by the name of its class in torch.optim."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

OptimizerOptions = dict[str, bool | int | float | str | tuple[float, ...]]

_REFUSED = {
    "lbfgs": "it evaluates the loss again and again within a step, and a meta-step has one meta-gradient",
    "sparseadam": "it takes sparse gradients, and meta-gradients are dense",
}
_WITHOUT_USE = {
    "lr": "the learning rate is `meta_lr`, and follows `schedule`",
    "differentiable": "nothing differentiates the outer steps",
    "capturable": "no CUDA graph is captured",
}


def check_name(name: str) -> None:
    """Look at a choice before there are options or parameters.

    Args:
        name: A class of torch.optim, in lower case.

    Raises:
        ValueError: There is none of this name, or it cannot be used here.
    """
    classes = _classes()
    if name in _REFUSED:
        raise ValueError(f"`optimizer` {classes[name].__name__} cannot be used: {_REFUSED[name]}. Choose another.")
    if name not in classes:
        raise ValueError(f"`optimizer` must be a class of torch.optim, such as {near(name, classes)}. Got {name!r}.")


def make_optimizer(name: str, options: OptimizerOptions, parameters: Iterable[nn.Parameter], *, lr: float) -> Optimizer:
    """Make the optimiser.

    Args:
        name: As of `check_name`.
        options: Its options.
        parameters: What it changes.
        lr: Its first learning rate.

    Returns:
        The optimiser.

    Raises:
        ValueError: An option is not one of its own, is of no use here, or has a value that the class refuses; or it
            refuses the parameters.
    """
    kind: Any = _classes()[name]
    own = inspect.signature(kind).parameters
    known = own.keys() - {"params", *_WITHOUT_USE}
    for option, value in options.items():
        if option in _WITHOUT_USE:
            raise ValueError(f"`optimizer_options` cannot have {option}: {_WITHOUT_USE[option]}. Got {value}.")
        if option not in known:
            raise ValueError(f"`optimizer_options` of {kind.__name__} may be {near(option, known)}. Got {option!r}.")
        if isinstance(value, str) and "str" not in str(own[option].annotation):
            raise ValueError(f"`optimizer_options` needs a number, True or False as {option}. Got {value!r}.")
    try:
        made: Optimizer = kind(parameters, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = " ".join(f"{option}={value}" for option, value in options.items()) or "no options"
        raise ValueError(f"torch.optim.{kind.__name__} with {given} cannot be made: {error}") from error
    return made


def near(name: str, names: Iterable[str]) -> str:
    """The names that are like one that is not among them; all where none is."""
    listed = sorted(names)
    return ", ".join(get_close_matches(name, listed, n=3, cutoff=0.5) or listed)


def _classes() -> dict[str, type[Optimizer]]:
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
