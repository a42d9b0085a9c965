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


ROOMS = ("_objective", "_losses", "_curvature", "inner", "_engine", "_sharding", "planning", "_strategies")
"""From the ground up: a room knows those before it, and the ground below them all."""
TOP = ("cli", "data", "nn", "testing", "training", "verify", "models", "text", "measure", "__main__")
"""What users of the engine are, inside this package as outside."""


def level(name):
    """How high a module lies: 0 for the ground, that of its room, or above all rooms."""
    parts = name.split(".")
    if parts[0] == "imaml_solvers" or len(parts) == 2 and parts[1].startswith("_") and parts[1] not in (*ROOMS, *TOP):
        return 0
    return ROOMS.index(parts[1]) + 1 if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS) + 1


def rising(arrows):
    """Imports that run up between rooms."""
    return [(a, b) for a, targets in arrows.items() for b in targets if level(b) > level(a)]


def test_no_room_knows_one_above_it():
    assert rising(graph()) == []


def test_an_import_that_runs_up_would_be_found():
    up = {"imaml._losses.a": {"imaml._objective.b", "imaml._engine.c"}, "imaml._torch": {"imaml.inner._d"}}
    assert rising(up) == [("imaml._losses.a", "imaml._engine.c"), ("imaml._torch", "imaml.inner._d")]
    assert rising(
        {"imaml._tasks": {"imaml.verify"}, "imaml_solvers._cg": {"imaml._errors"}, "imaml.cli": {"imaml"}}
    ) == [("imaml._tasks", "imaml.verify")]


def test_every_module_of_the_package_has_its_level():
    top = {name.split(".")[1] for name in modules() if name.startswith("imaml.")}
    ground = {name for name in top if name.startswith("_") and name not in (*ROOMS, *TOP)}
    assert top == {*ROOMS, *TOP, *ground}
    assert len(ground) <= 6, ground


def test_no_two_modules_of_the_core_have_one_name():
    files = modules().items()
    core = [path for name, path in files if level(name) <= len(ROOMS) and name.startswith("imaml.")]
    names = [path.stem.strip("_") for path in core if path.stem != "__init__"]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


COMMANDS = {"train", "compare", "verify", "bench", "plan"}
"""Modules of the program that are called like what the user types."""


def test_no_module_of_the_program_has_the_name_of_one_of_the_core():
    files = {name: path.stem.strip("_") for name, path in modules().items() if path.stem != "__init__"}
    core = {stem for name, stem in files.items() if level(name) <= len(ROOMS)}
    assert {stem for name, stem in files.items() if name.startswith("imaml.cli.")} & core <= COMMANDS


def test_no_class_of_the_program_or_its_training_has_the_name_of_one_of_the_core():
    found = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    top = ("imaml.cli.", "imaml.training.")
    twice = {c: where for c, where in found.items() if len(where) > 1 and any(w.startswith(top) for w in where)}
    assert twice.keys() == {"Episodes"}, twice  # the protocol of a source of tasks, and the base class in `data`


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
