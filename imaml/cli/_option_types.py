"""The types of options: what they are, and values of a file as values of a type."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import tyro


@dataclass(frozen=True, kw_only=True)
class FromFile:
    """Options that may come from a file.

    Args:
        file: Where they are read first.
    """

    file: Annotated[
        Path | None,
        tyro.conf.arg(name="config", help="TOML or YAML file with flags; those of the command line win over it."),
    ] = None


def sections(kind: type) -> dict[str, type]:
    """The dataclasses that a command's options are made of by the names of their fields; "" is what is in none."""
    found: dict[str, type] = {"": kind}
    return found | {name: hint for name, hint in get_type_hints(kind).items() if _is_section(hint)}


def hints(kind: type) -> dict[str, Any]:
    """The types of the options that a dataclass itself has, by name."""
    found = get_type_hints(kind)
    own = {one.name: found[one.name] for one in fields(kind) if not _is_section(found[one.name])}
    return {name: hint for name, hint in own.items() if name != "file"}


def _is_section(hint: Any) -> TypeGuard[type]:
    return is_dataclass(hint)


def converted(value: Any, hint: Any) -> Any:
    """A value of a file as one of a type; a TypeError says what was expected."""
    if get_origin(hint) in (Union, UnionType):
        kinds = get_args(hint)
        if NoneType in kinds and value in (None, "None"):
            return None
        for kind in sorted(kinds, key=lambda kind: kind is float):  # an int stays one where it may
            try:
                return converted(value, kind)
            except TypeError:
                pass
    elif hint is Any:
        return value
    elif get_origin(hint) is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return value
    elif get_origin(hint) in (list, tuple):
        if isinstance(value, list):
            kind = get_origin(hint)
            return kind(converted(one, get_args(hint)[0]) for one in value)
    elif get_origin(hint) is not None:  # a mapping of names
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {name: converted(one, get_args(hint)[1]) for name, one in value.items()}
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError(described(hint))


def described(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(described(kind) for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        return f"a list of {described(get_args(hint)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path in quotes"}
    return words.get(hint, "a table of names with values")
