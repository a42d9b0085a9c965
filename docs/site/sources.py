"""What the library's sources define and document, read as text: neither torch nor the library is imported."""

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MODULES = (
    "imaml",
    "imaml.inner",
    "imaml_solvers",
    "imaml.verify",
    "imaml.planning",
    "imaml.nn",
    "imaml.training",
    "imaml.data",
    "imaml.models",
    "imaml.text",
    "imaml.measure",
    "imaml.testing",
)
"""The public modules, in the order in which a reader meets them."""

ORDER = ("_strategies", "_objective", "_tasks", "_minibatches", "_engine", "_errors", "inner", "imaml_solvers")
"""The rooms that `imaml` has its names from, likewise."""

PROBLEM = "docs/testing.md"
"""The page that says which members of `imaml.Problem` a strategy may use; the others are the library's own."""


@cache
def public_names(module: str) -> dict[str, str]:
    """The public names of a module, each with the path under which the reference describes it.

    What several modules have is described in one: inner optimisers and solvers in their own, the rest in `imaml`.
    """
    found = {}
    for name, origin in sorted(_exports(module).items(), key=lambda item: _rank(item[1])):
        home = next(home for home in ("imaml.inner", "imaml_solvers", *MODULES) if _exports(home).get(name) == origin)
        found[name] = f"{home}.{name}"
    return found


def summary(path: str) -> str:
    """The first sentence of the docstring of what a public path names."""
    _, docstring = _definition(_origin(path))
    return re.split(r"(?<=[.?])\s", " ".join(docstring.partition("\n\n")[0].split()), maxsplit=1)[0]


@cache
def members(path: str) -> dict[str, bool]:
    """The documented members of what a public path names, each with whether it is inherited.

    What a class has from another public one is described there, and is no member here.
    """
    own, *bases = _lineage(_origin(path))
    found = dict.fromkeys(_documented(own), False)
    for base in bases:
        found = {**dict.fromkeys(_documented(base), True), **found}
    if path == "imaml.Problem":
        may_be_used = set(re.findall(r"`(\w+)[`(]", (ROOT / PROBLEM).read_text(encoding="utf-8")))
        found = {name: inherited for name, inherited in found.items() if name in may_be_used}
    return found


def has_private_base(path: str) -> bool:
    """Whether what a public path names is a class on one that no public module has."""
    return len([*_lineage(_origin(path))]) > 1


def _origin(path: str) -> str:
    module, _, name = path.rpartition(".")
    return _exports(module)[name]


def _rank(origin: str) -> int:
    return next((ORDER.index(part) for part in origin.split(".") if part in ORDER), len(ORDER))


@cache
def _exports(module: str) -> dict[str, str]:
    """The public names of a module, each with the path where it is defined.

    They are what it imports as `name as name`; or, where it defines them, what does not begin with an underscore.
    """
    found = {}
    for alias, path in _imported(module):
        home = path.rpartition(".")[0]
        if alias.asname == alias.name and path not in MODULES:
            found[alias.name] = _origin(path) if home in MODULES else path
    return found or {name: f"{module}.{name}" for name in _definitions(module) if not name.startswith("_")}


def _imported(module: str) -> Iterator[tuple[ast.alias, str]]:
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((alias, f"{node.module}.{alias.name}") for alias in node.names)


def _lineage(origin: str) -> Iterator[str]:
    """The path of a class, and of those of its bases that no public module has, their own bases included."""
    yield origin
    module, _, _ = origin.rpartition(".")
    node, _ = _definition(origin)
    imported = {alias.name: path for alias, path in _imported(module)}
    public = {path for home in MODULES for path in _exports(home).values()}
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        name = ast.unparse(base).partition("[")[0]
        path = f"{module}.{name}" if name in _definitions(module) else imported.get(name, name)
        if path.rpartition(".")[0] not in MODULES and path.startswith("imaml") and path not in public:
            yield from _lineage(path)


def _documented(origin: str) -> list[str]:
    node, _ = _definition(origin)
    described = _described(node.body if isinstance(node, ast.ClassDef) else ())
    named = (name for name, (_, docstring) in described.items() if docstring)
    return [name for name in named if name == "__call__" or not name.startswith("_")]


def _definition(origin: str) -> tuple[ast.stmt, str]:
    module, _, name = origin.rpartition(".")
    return _definitions(module)[name]


@cache
def _definitions(module: str) -> dict[str, tuple[ast.stmt, str]]:
    return _described(_tree(module).body)


def _described(body: Sequence[ast.stmt]) -> dict[str, tuple[ast.stmt, str]]:
    """What statements define, each with its docstring: inside it, or below an assignment."""
    found: dict[str, tuple[ast.stmt, str]] = {}
    for node, after in pairwise((*body, None)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.setdefault(node.name, (node, ast.get_docstring(node) or ""))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            below = after.value if isinstance(after, ast.Expr) else None
            text = below.value if isinstance(below, ast.Constant) and isinstance(below.value, str) else ""
            found[ast.unparse(target)] = (node, inspect.cleandoc(text))
    return found


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath("solvers" if module.startswith("imaml_solvers") else "", *module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))
