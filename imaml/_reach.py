"""The modules that a function can reach: what a loss uses besides its arguments."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_MOST = 10_000
"""Objects looked at, the nearest first: a loss that holds a trainer may hold a data set with it."""
_LIBRARIES = {"torch", "imaml", "imaml_solvers", "numpy", "scipy", "builtins"}
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_VALUES = (Tensor, str, bytes, int, float, complex, bool, type(None))


def modules_of(functions: Iterable[Callable[..., Any] | None]) -> list[nn.Module]:
    """The modules that functions hold: themselves, by attributes, closures, defaults, arguments bound, or global names.

    Functions that they call by a global name are followed, methods to their object, objects to the methods and
    attributes of their class, modules to their forward pass, and lists, tuples, sets, deques and dictionaries to what
    they contain. Weak references are not.

    Args:
        functions: Functions, methods, modules or other callables.

    Returns:
        Each module once, and those inside it too.
    """
    found: dict[int, nn.Module] = {}
    pending: deque[Any] = deque(f for f in functions if f is not None)
    seen: dict[int, Any] = {}  # with the objects, whose addresses would be used again
    while pending and len(seen) < _MOST:
        item = pending.popleft()
        if id(item) in seen or isinstance(item, _VALUES):
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            found[id(item)] = item
            pending.extendleft(item._modules.values())
        pending += _held_by(item)
    return list(found.values())


def _held_by(item: Any) -> Iterator[Any]:
    if isinstance(item, nn.Module):
        yield from (value for name, value in vars(item).items() if name not in _OF_EVERY_MODULE)
        yield getattr_static(type(item), "forward", None)
        yield type(item)
    elif isinstance(item, FunctionType):
        if not _is_of_library(item.__module__):
            yield from _held_by_function(item)
    elif isinstance(item, MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, (staticmethod, classmethod)):
        yield item.__func__
    elif isinstance(item, partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
        yield from item
    elif isinstance(item, type):
        if not _is_of_library(item.__module__):
            yield from (
                value for base in item.__mro__ if not _is_of_library(base.__module__) for value in vars(base).values()
            )
    elif not isinstance(item, ModuleType):
        yield from getattr(item, "__dict__", {}).values()
        slots = (name for base in type(item).__mro__ for name in getattr(base, "__slots__", ()))
        yield from (getattr_static(item, name, None) and getattr(item, name, None) for name in slots)
        yield type(item)


def _is_of_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield getattr(function, "__wrapped__", None)
    names = list(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if isinstance(value, ModuleType) and not _is_of_library(value.__name__):
            yield from (vars(value).get(attribute) for attribute in names)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
