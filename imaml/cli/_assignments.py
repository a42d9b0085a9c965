"""Options of the outer optimiser on the command line, as name=value."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from imaml.training._optimizer import OptimizerOptions

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def assignments(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How tyro reads and shows `OptimizerOptions`; None for any other type."""
    if info.type != OptimizerOptions:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=_read,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=to_flags,
    )


def to_flags(options: OptimizerOptions) -> list[str]:
    """The arguments that give these options."""
    return [f"{name}={_text(value)}" for name, value in options.items()]


def _read(args: Sequence[str]) -> dict[str, Any]:
    options = {}
    for arg in args:
        name, equals, text = arg.partition("=")
        if not (name and equals):
            raise ValueError(f"Expected NAME=VALUE, such as weight_decay=0.01. Got {arg}.")
        options[name.replace("-", "_")] = _value(text)
    return options


def _value(text: str) -> Any:
    """A number, True or False in any case, numbers with commas between them, or else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    numbers = isinstance(value, tuple | list) and all(isinstance(one, int | float) for one in value)
    return value if numbers or isinstance(value, int | float | str) else text


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(repr, value)) + ("," if len(value) == 1 else "")
    return value if isinstance(value, str) and _value(value) == value else repr(value)
