"""Options as a file of TOML, which gives the same options again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from imaml.cli._option_types import FromFile, hints, sections
from imaml.training import replace_file

_UNSAVED = ("file", "out", "resume")
"""What belongs to a call of the program, and not to what it does."""


def to_toml(options: FromFile, defaults: FromFile) -> str:
    """A file that gives these options again.

    Args:
        options: What a command was given.
        defaults: What the command has where nothing is given. Where these are None an option that is None is left out.

    Returns:
        TOML, with a section for each dataclass; without what a call has of its own, such as where it writes.
    """
    blocks = []
    for section, kind in sections(type(options)).items():
        ours, theirs = (getattr(one, section) if section else one for one in (options, defaults))
        values = {name: getattr(ours, name) for name in hints(kind) if section or name not in _UNSAVED}
        lines = [f"[{section}]"] if section else []
        lines += [
            f"{name} = {_toml(value)}"
            for name, value in values.items()
            if value is not None or getattr(theirs, name) is not None
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def save_toml(folder: Path, options: FromFile, defaults: FromFile) -> None:
    """Write what `to_toml` gives to `config.toml` of a folder, whole or not at all."""
    text = to_toml(options, defaults)
    replace_file(folder / "config.toml", lambda stream: stream.write(text.encode()))


def _toml(value: Any) -> str:
    """A value as TOML has it; None, which TOML does not have, as the flags write it."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case dict():
            return "{" + ", ".join(f"{_toml(name)} = {_toml(one)}" for name, one in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case _:
            escaped = re.sub(r'[\\"]', r"\\\g<0>", str(value))
            return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
