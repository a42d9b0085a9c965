"""The modules that a function can reach: what a loss uses besides its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_MOST = 10_000
"""Objects looked at: a loss that holds a trainer may hold a data set with it."""
_LIBRARIES = {"torch", "imaml", "imaml_solvers", "numpy", "scipy", "builtins"}
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_VALUES = (Tensor, str, bytes, int, float, complex, bool, type(None), type, ModuleType)


def modules_of(functions: Iterable[Callable[..., Any] | None]) -> list[nn.Module]:
    """The modules that functions hold: themselves, by attributes, closures, defaults, arguments bound, or global names.

    Functions that they call by a global name are followed, methods to their object, modules to their forward pass, and
    lists, tuples, sets and dictionaries to what they contain. What stands in the attributes of an imported Python
    module is not.

    Args:
        functions: Functions, methods, modules or other callables.

    Returns:
        Each module once, and those inside it too.
    """
    found: dict[int, nn.Module] = {}
    pending: list[Any] = [f for f in functions if f is not None]
    seen: dict[int, Any] = {}  # with the objects, whose addresses would be used again
    while pending and len(seen) < _MOST:
        item = pending.pop()
        if id(item) in seen or isinstance(item, _VALUES):
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            found[id(item)] = item
        pending += _held_by(item)
    return list(found.values())


def _held_by(item: Any) -> Iterator[Any]:
    if isinstance(item, nn.Module):
        yield from item._modules.values()
        yield from (value for name, value in vars(item).items() if name not in _OF_EVERY_MODULE)
        yield type(item).forward
    elif isinstance(item, FunctionType):
        if item.__module__ is None or item.__module__.partition(".")[0] not in _LIBRARIES:
            yield from _held_by_function(item)
    elif isinstance(item, MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    elif hasattr(item, "__dict__"):
        yield from vars(item).values()
        yield vars(type(item)).get("__call__")  # whose global names an object's own loss may use


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield getattr(function, "__wrapped__", None)
    for name in _names(function.__code__):
        yield function.__globals__.get(name)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
