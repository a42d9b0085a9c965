"""Flags in a file: TOML or YAML, in sections like those of the options or without."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from imaml.cli._option_types import FromFile, converted, hints, sections
from imaml.training._optimizer import near

T = TypeVar("T", bound=FromFile)


@dataclass(frozen=True)
class ConfigFile:
    """What a file says, by the names of flags with underscores.

    Args:
        path: The file.
        content: Values, those of a section as a dict.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a file.

        Args:
            path: It ends with .toml, .yaml or .yml.

        Returns:
            What it says, not yet compared with any options.

        Raises:
            ImportError: It is YAML, and pyyaml is not installed.
            OSError: It cannot be read.
            ValueError: It is not what its name says.
        """
        loaders: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _load_yaml, ".yml": _load_yaml}
        if path.suffix not in loaders:
            raise ValueError(f"--config needs a file that ends with {', '.join(loaders)}. Got {path}.")
        try:
            content = loaders[path.suffix](path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold names with values. Got {type(content).__name__}.")
        return cls(path, content)

    def onto(self, options: T) -> T:
        """The options, with those of the file in the place of theirs.

        Args:
            options: What a command has without the file.

        Returns:
            New ones.

        Raises:
            ValueError: A name is none of the command's, or in another section than its own; or a value is of another
                type, or out of range. The message names the file.
        """
        changes: dict[str, dict[str, Any]] = {}
        kinds = {section: hints(kind) for section, kind in sections(type(options)).items()}
        for name, value in self.content.items():
            name = _plain(name)
            if name in kinds and name and isinstance(value, dict):
                for inner, one in value.items():
                    self._add(changes, kinds, name, _plain(inner), one)
                continue
            own = next((section for section, found in kinds.items() if name in found), None)
            if own is None:
                known = [name for found in kinds.values() for name in found] + [section for section in kinds if section]
                raise ValueError(f"{self.path}: there is no option {name}. Expected {near(name, known)}.")
            self._add(changes, kinds, own, name, value)
        try:
            parts = {
                section: replace(getattr(options, section), **values) for section, values in changes.items() if section
            }
            return replace(options, **changes.get("", {}), **parts)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _add(
        self, changes: dict[str, dict[str, Any]], kinds: dict[str, dict[str, Any]], section: str, name: str, value: Any
    ) -> None:
        where = f"{self.path}: {name} in [{section}]" if section else f"{self.path}: {name}"
        if name not in kinds[section]:
            raise ValueError(
                f"{self.path}: there is no option {name} in [{section}]. Expected {near(name, kinds[section])}."
            )
        if name in changes.setdefault(section, {}):
            raise ValueError(f"{where} stands there twice. Leave one out.")
        try:
            changes[section][name] = converted(value, kinds[section][name])
        except TypeError as error:
            raise ValueError(f"{where} must be {error}. Got {value!r}.") from error


def _plain(name: object) -> str:
    return str(name).replace("-", "_")


def _load_yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("A file of YAML needs pyyaml: pip install 'imaml[yaml]', or write TOML.") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes 1e-3 as a number, which YAML 1.1 wants as 1.0e-3."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
