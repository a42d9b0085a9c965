"""Every page: lines of a width that can be read side by side, links that lead somewhere, commands that exist."""

import re
from pathlib import Path

import pytest

from imaml.cli import main
from tests.pages import ROOT, read

WIDTH = 120
ELSEWHERE = {".venv", ".rivals", ".rivals-jax", "build", "dist", "runs", "node_modules"}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"))
    if not ELSEWHERE & set(path.relative_to(ROOT).parts)
)
OTHERS = (
    "Makefile",
    ".ci/run",
    "pyproject.toml",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/**/*.py"))),
)
GENERATED = re.compile(r"benchmarks/results/(jax|rivals|rivals-two-threads|plan|scaling|memory|storage)/")
"""Pages that a benchmark writes: their tables are as wide as what was measured."""
COMMANDS = {"train", "compare", "bench", "plan", "verify"}


def too_long(lines):
    return [f"{number}: {line[:60]} ..." for number, line in enumerate(lines, start=1) if len(line) > WIDTH]


def test_the_pages_are_found():
    assert {"README.md", "CHANGELOG.md", "docs/README.md", "docs/guide.md", "docs/layers.md"} <= {*PAGES}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_no_line_is_too_long(page):
    lines = read(page).splitlines()
    if GENERATED.match(page):
        lines = [line for line in lines if not line.startswith("|")]
    assert not too_long(lines)


def anchors(text):
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", text))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"(?s)```.*?```", "", read(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[\w+\]: (\S+)$", text)
    for link in links:
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_has_every_page_of_the_folder():
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", read("docs/README.md")))
    assert linked == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}


def test_the_architecture_is_short_and_has_every_room_and_page():
    text = read("docs/architecture.md")
    assert len(text.splitlines()) < 120
    rooms = {file.parent.name for file in ROOT.glob("imaml/*/__init__.py")}
    assert len(rooms) > 10
    assert {room for room in rooms if f"{room}/`" not in text} == set()
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"architecture.md"}
    assert {page for page in pages if f"({page}" not in text} == set()


def missing(text):
    """The Python files that a page names, by their path in the checkout or in the package, and that are not there."""
    named = re.findall(r"`([\w/]+\.py)`", text)
    return [path for path in named if not any((ROOT / root / path).exists() for root in ("", "imaml", "solvers"))]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_file_that_a_page_names_exists(page):
    assert missing(read(page)) == []


def test_a_file_that_does_not_exist_would_be_found():
    assert missing("`imaml/measure.py`, `_engine/run.py` and `imaml/_fomaml.py`") == ["imaml/_fomaml.py"]


def commands():
    """The program's commands in fenced blocks of all pages, with what follows on continued lines."""
    for page in PAGES:
        for language, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", read(page)):
            if language not in ("", "sh"):
                continue
            for command, options in re.findall(r"(?m)^imaml (\w+)(.*?)(?:#.*)?$", block.replace("\\\n", " ")):
                yield page, command, options


def test_every_option_of_a_command_on_a_page_exists(capsys):
    found = list(commands())
    assert {command for _, command, _ in found} == COMMANDS
    known = {}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known[command] = capsys.readouterr().out
    for page, command, options in found:
        for option in re.findall(r"--[a-z-]+", options):
            assert option in known[command], f"{page}: imaml {command} has no {option}"
