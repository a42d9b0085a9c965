"""The user's own problem, from `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

import torch

from imaml import Objective, Task
from imaml._tasks import group
from imaml.verify._subject import Subject, Tasks


class Made(NamedTuple):
    """What a factory returned."""

    objective: Objective
    tasks: Tasks
    subject: Subject | None
    """Engine or function that is to be verified."""

    @property
    def first(self) -> Task:
        """The first task."""
        return self.tasks[0]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.objective.parameters().values())).device


def make(name: str | None) -> Made:
    """Import a factory, with the current folder on the path, and call it.

    Args:
        name: `module:function`, of a function without arguments; None where the user gave none.

    Returns:
        What it made.

    Raises:
        ValueError: It is not given, cannot be imported, fails, or returns something else.
    """
    if name is None:
        raise ValueError("Expected a problem as module:function. Got none.")
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute.isidentifier()):
        raise ValueError(f"Expected a factory as module:function, such as my_package.my_module:make. Got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # the module is the user's: it may raise anything
        raise ValueError(
            f"{module} cannot be imported ({type(error).__name__}: {error}). Run imaml in the folder that holds it, or "
            f'install it; python -c "import {module}" shows where it fails.'
        ) from error
    if not callable(factory):
        raise ValueError(f"{module} has no function {attribute!r}. Expected one that returns (objective, tasks).")
    try:
        made = factory()
    except Exception as error:  # so may the function
        raise ValueError(
            f"{name} failed ({type(error).__name__}: {error}). It is called without arguments; "
            f'python -c "import {module} as m; m.{attribute}()" shows where it fails.'
        ) from error
    return _checked(name, made)


def _checked(name: str, made: Any) -> Made:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise ValueError(
            f"{name} must return (objective, tasks) or (objective, tasks, engine_or_function). Got "
            f"{type(made).__name__}{size}."
        )
    objective, tasks, subject = (*made, None)[:3]
    if not isinstance(objective, Objective):
        raise ValueError(f"{name} must return an Objective(model, loss) first. Got {type(objective).__name__}.")
    try:
        group(tasks)
    except TypeError as error:
        raise ValueError(f"{name} returned other tasks than expected. {error}") from error
    if isinstance(subject, type):
        raise ValueError(
            f"{name} must return a strategy or a function last. Got the class {subject.__name__}: return an instance."
        )
    if subject is not None and not callable(subject):
        raise ValueError(f"{name} must return a strategy or a function last. Got {type(subject).__name__}.")
    return Made(objective, tasks, subject)
