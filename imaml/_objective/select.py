"""Choosing parameters by name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase


def select(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that match any pattern, in the order of `names`.

    A pattern is a full name (`head.weight`), the name of a module (`head`, every parameter below it), or a shell
    pattern (`*.bias`).

    Returns:
        The chosen names.

    Raises:
        TypeError: `patterns` is a single string, or holds something else than strings.
        ValueError: A pattern matches no name.
    """
    if isinstance(patterns, str):
        raise TypeError(f"Expected a list of parameter names. Got the string {patterns!r}: write [{patterns!r}].")
    names = tuple(names)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"Expected parameter names. Got {pattern!r}.")
        matched = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)}
        if not matched:
            close = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
            raise ValueError(f"No parameter is called {pattern!r}. Close to it: {', '.join(close) or 'none'}.")
        chosen |= matched
    return tuple(n for n in names if n in chosen)
