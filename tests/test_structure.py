"""The structure of the source: what imports what, lazy imports and those for type checkers included."""

import ast
from pathlib import Path

import imaml
import imaml_solvers

ROOTS = [Path(package.__file__).parent for package in (imaml, imaml_solvers)]


def modules():
    """Every module's file by its name; a package's is that of its `__init__`."""
    found = {}
    for root in ROOTS:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source, names):
    """The modules among these that a source imports, wherever in it the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & names or {node.module}
    return found & names


def graph():
    files = modules()
    return {name: imported(path.read_text(), files.keys()) - {name} for name, path in files.items()}


def circle(arrows):
    """The names along some circle, or None: what is left when whatever imports nothing that is left is taken away."""
    left = {name: set(arrow) for name, arrow in arrows.items()}
    while ready := [name for name, arrow in left.items() if not arrow & left.keys()]:
        for name in ready:
            del left[name]
    if not left:
        return None
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :]


def test_no_module_imports_itself_in_a_circle():
    assert circle(graph()) is None


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}, "e": {"a"}}) == ["b", "d", "b"]
    names = {"a.b", "a.c", "a.d", "a"}
    source = (
        "from a import b\nif TYPE_CHECKING:\n    import a.c\ndef f():\n    from a.d import g, h\n    import elsewhere"
    )
    assert imported(source, names) == {"a.b", "a.c", "a.d"}
    assert imported("from a import version", names) == {"a"}
