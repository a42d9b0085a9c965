"""How docstrings begin: with words that stand by themselves, and those of public names with one whole sentence."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import imaml
import imaml.data
import imaml.inner
import imaml.measure
import imaml.models
import imaml.nn
import imaml.planning
import imaml.testing
import imaml.text
import imaml.training
import imaml.verify
import imaml_solvers

ROOMS = (
    imaml,
    imaml.data,
    imaml.inner,
    imaml.measure,
    imaml.models,
    imaml.nn,
    imaml.planning,
    imaml.testing,
    imaml.text,
    imaml.training,
    imaml.verify,
    imaml_solvers,
)
POINTING = re.compile(r"(Of|That|Those|Likewise|The same)\b")
"""Words that say nothing to whoever has not read what stands above them."""
ENTRY = re.compile(r"(?m)^ +\*{0,2}\w+: (.*)$")
"""An argument, or an exception, with the words that describe it."""


def docstrings(source):
    """The docstrings of modules, classes, functions and attributes, with their lines."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                if isinstance(statement.value.value, str):
                    yield statement.lineno, statement.value.value


def pointing(source):
    """The beginnings of docstrings, and of what they say of an argument, that do not stand by themselves."""
    return [
        (line, words)
        for line, text in docstrings(source)
        for words in (text.strip(), *ENTRY.findall(text))
        if POINTING.match(words)
    ]


@pytest.mark.parametrize("package", [imaml, imaml_solvers], ids=lambda package: package.__name__)
def test_no_docstring_begins_by_pointing_at_another(package):
    root = Path(package.__file__).parent
    files = {file.relative_to(root): pointing(file.read_text(encoding="utf-8")) for file in sorted(root.rglob("*.py"))}
    assert len(files) > 10
    assert {file: found for file, found in files.items() if found} == {}


def test_a_docstring_that_points_at_another_would_be_found():
    source = '''
class Layout:
    """Where parameters lie."""

    size: int
    """Of the adapted parameters."""

    def split(self, size):
        """Split.

        Args:
            size: That of a part.
        """

    def offset(self):
        """Offset of a part."""
'''
    assert [words for _, words in pointing(source)] == ["Of the adapted parameters.", "That of a part."]


def public(module):
    """The classes and functions that a module has for users, by name."""
    names = (name for name in vars(module) if not name.startswith("_"))
    found = {name: getattr(module, name) for name in names}
    kinds = (inspect.isclass, inspect.isfunction)
    return {
        f"{module.__name__}.{name}": value
        for name, value in found.items()
        if any(kind(value) for kind in kinds) and value.__module__.partition(".")[0] in ("imaml", "imaml_solvers")
    }


PUBLIC = {name: value for module in ROOMS for name, value in public(module).items()}


def is_led_by_a_sentence(text):
    """Whether the first line is one whole sentence, which nothing but an empty line may follow."""
    first, *rest = (text or "").splitlines() or [""]
    whole = first[:1].isupper() and first.endswith(".") and len(first.split()) > 2
    return whole and re.search(r"[.!?] [A-Z`]", first) is None and (not rest or not rest[0].strip())


def test_the_public_names_are_found():
    assert {"imaml.MAML", "imaml.bilevel", "imaml.data.Glyphs", "imaml.training.Plan", "imaml_solvers.CG"} <= {*PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_leads_with_one_sentence(name):
    own = vars(PUBLIC[name])["__doc__"] if inspect.isclass(PUBLIC[name]) else PUBLIC[name].__doc__
    assert is_led_by_a_sentence(own), own


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "Rates",
        "Gradient descent, phi <- phi - lr * d, `steps` times from phi =\ntheta.",
        "Solves A x = b. Subclasses are frozen.",
        "one that begins in the middle.",
        "Solves A x = b.\nWithout an empty line.",
        "Point(x: int, y: int)",
    ],
)
def test_a_docstring_that_does_not_is_found(text):
    assert not is_led_by_a_sentence(text)
