"""What a function can reach, and whether that has changed: what a loss uses besides its arguments."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from inspect import getattr_static
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn

_MOST = 10_000
"""Objects looked at, the nearest first: a loss that holds a trainer may hold a data set with it."""
_DATA = 1_000
"""A container of more entries is data, and is not looked into."""
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_VALUES = (Tensor, *_PLAIN)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_DICTIONARIES = (dict, OrderedDict, defaultdict)


def modules_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, each once, in the order of `model.modules()`, which takes several times as long."""
    found: dict[nn.Module, None] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            pending += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def parameters_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, as `model.named_parameters()` has them, which takes several times as long."""
    if type(model).named_parameters is not nn.Module.named_parameters:  # FSDP gives them other names
        return dict(model.named_parameters())
    modules, named, pending = set[nn.Module](), dict[nn.Parameter, str](), [("", model)]
    while pending:
        prefix, module = pending.pop()
        if module in modules:
            continue
        modules.add(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                named.setdefault(parameter, prefix + name)
        children = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
        pending += reversed(children)
    return {name: parameter for parameter, name in named.items()}


def buffers_in(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model by name; names take time, and many models have none."""
    return dict(model.named_buffers()) if any([module._buffers for module in modules_in(model)]) else {}


@dataclass(frozen=True)
class Reach:
    """What functions can reach, when it was looked at."""

    modules: list[nn.Module]
    """Each module once, the outer ones first."""
    values: list[Any]
    """What was met on the way: objects, plain values as they were, and of a tensor which it was, in which version."""

    @classmethod
    def of(cls, functions: Iterable[Callable[..., Any] | None], arguments: Collection[Tensor] = ()) -> Reach:
        """What functions hold: themselves, by attributes, closures, defaults, arguments bound, or global names.

        Functions that they call by a global name are followed, methods to their object, objects to the methods and
        attributes of their class, modules to their forward pass, and lists, tuples, sets, deques and dictionaries of at
        most 1,000 entries to what they contain. Weak references, other mappings, and the classes and global names of
        installed packages are not. No code of the user's runs.

        Args:
            functions: Functions, methods, modules or other callables.
            arguments: Tensors that the functions are given others for, so that nobody asks which they are.

        Returns:
            What they reach.
        """
        found: dict[int, nn.Module] = {}
        pending: deque[Any] = deque(f for f in functions if f is not None)
        seen: dict[int, Any] = {id(t): t for t in arguments}  # with the objects, whose addresses would be used again
        values: list[Any] = []
        most = _MOST + len(seen)
        while pending and len(seen) < most:
            item = pending.popleft()
            kind = type(item)
            if issubclass(kind, _VALUES):
                if not issubclass(kind, Tensor):
                    values.append(item)
                elif id(item) not in seen:
                    values.append(_as_it_is_now(item))
                continue
            values.append(item)
            if id(item) in seen:
                continue
            seen[id(item)] = item
            if issubclass(kind, nn.Module):
                found[id(item)] = item
                pending.extendleft(item._modules.values())
                values += (item.training, *item._forward_pre_hooks.values(), *item._forward_hooks.values())
                own = (*item._parameters.values(), *item._buffers.values())
                values += [_as_it_is_now(t) for t in own if t is not None and id(t) not in seen]
            pending += _held_by(item, kind)
        return cls(list(found.values()), values if len(seen) < most else [object()])

    def is_as(self, earlier: Reach) -> bool:
        """Whether nothing has changed since, as far as it was looked at; False where there was too much to look at."""
        return len(self.values) == len(earlier.values) and all(map(_is_same, self.values, earlier.values))


def modules_of(functions: Iterable[Callable[..., Any] | None]) -> list[nn.Module]:
    """The modules that functions can reach, each once, the outer ones first."""
    return Reach.of(functions).modules


def _as_it_is_now(tensor: Tensor) -> tuple[Any, int]:
    return ref(tensor), 0 if tensor.is_inference() else tensor._version


def _is_same(new: Any, old: Any) -> bool:
    if new is old:
        return True
    kind = type(new)
    if kind is not type(old):
        return False
    if kind is tuple and len(new) == 2 and type(new[0]) is ref:
        return type(old[0]) is ref and new[0]() is old[0]() is not None and new[1] == old[1]
    return kind in _PLAIN and bool(new == old or new != new and old != old)  # noqa: PLR0124


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what its closure holds now: the variable of a loop, say, is another one later."""
    if type(function) is partial:
        return partial(as_it_is(function.func), *function.args, **function.keywords)
    if type(function) is not FunctionType or not function.__closure__:
        return function
    cells = []
    for cell in function.__closure__:
        try:
            cells.append(CellType(cell.cell_contents))
        except ValueError:  # not assigned yet
            cells.append(cell)
    found = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _held_by(item: Any, kind: type) -> Iterator[Any]:
    # By type(item), since isinstance asks the object itself for its class, and proxies answer with anything.
    if issubclass(kind, nn.Module):
        yield from (value for name, value in vars(item).items() if name not in _OF_EVERY_MODULE)
        yield getattr_static(kind, "forward", None)
        yield kind
    elif kind is FunctionType:
        yield from _held_by_function(item)
    elif kind is MethodType:
        yield from (item.__self__, item.__func__)
    elif kind in (staticmethod, classmethod):
        yield item.__func__
    elif kind is partial:
        yield from (item.func, *item.args, *item.keywords.values())
    elif kind in _DICTIONARIES:
        yield from item.values() if len(item) <= _DATA else ()
    elif kind in _CONTAINERS:
        yield from item if len(item) <= _DATA else ()
    elif issubclass(kind, type):
        if not _is_installed(item.__module__):
            own = (base for base in item.__mro__ if not _is_installed(base.__module__))
            yield from (value for base in own for value in vars(base).values())
    elif kind is not ModuleType:
        yield from getattr_static(item, "__dict__", None) and vars(item).values() or ()
        slots = (vars(base).get("__slots__", ()) for base in kind.__mro__ if not _is_installed(base.__module__))
        for name in (name for names in slots for name in ((names,) if isinstance(names, str) else names)):
            member = getattr_static(kind, name, None)
            if type(member) is MemberDescriptorType:
                with suppress(AttributeError):  # not set
                    yield member.__get__(item)
        yield kind


@cache
def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package, which holds nothing of the user's."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("imaml", "imaml_solvers"):
        return True
    path = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield function.__dict__.get("__wrapped__")
    if _is_installed(function.__module__):
        return
    names = list(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if type(value) is ModuleType and not _is_installed(value.__name__):
            yield from (vars(value).get(attribute) for attribute in names)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
