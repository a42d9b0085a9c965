"""The tutorial on weights of training data: its figures, its excerpts and its pictures are those of what ran."""

import re
from importlib.metadata import version
from statistics import mean
from textwrap import indent

import pytest

from benchmarks.data_weights import CHOICES, FOLDER, KINDS, METHODS, PICTURES, RESULT, auc, loss, read, write
from tests.pages import ROOT, python
from tests.pages import read as read_page

PAGE, EXAMPLE = "docs/tutorial-data-weights.md", "examples/data_weights.py"
IS_PINNED = f"matplotlib=={version('matplotlib')}" in read_page("constraints.txt").splitlines()
CORRUPTED = [*KINDS][1:]


def table(heading):
    """The rows below a heading, by their first cell."""
    below = re.split(r"(?m)^#+ ", read_page(PAGE).partition(f"# {heading}\n")[2])[0]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in re.findall(r"(?m)^\|.*$", below)]
    return {name: cells for name, *cells in rows[2:]}


def figures():
    """Every figure with a point that the page may have in its text."""
    result = read()
    yield from (f"{auc(result, method, kind):.2f}" for method in METHODS for kind in CORRUPTED)
    yield from (f"{loss(result, choice):.3f}" for choice in CHOICES)
    yield from (cell for row in smooth_rows().values() for cell in row)
    yield "0.02"  # what transformers has


def smooth_rows():
    """The cells of the table of trainings that are more or less smooth, by the changes of each."""
    return {
        name: [
            f"{of['spread']:.2f}",
            f"{of['error']:.0e}",
            *(f"{of['auc'][kind]:.2f}" for kind in CORRUPTED),
            *(f"{mean(of[texts]):.2f}" for texts in ("all texts", "helpful texts")),
        ]
        for name, of in read(RESULT.with_name("smoothness.json")).items()
    }


def test_the_areas_are_those_of_the_result():
    found, result = table("What finds them"), read()
    assert list(found) == list(METHODS.values())
    for method, label in METHODS.items():
        assert found[label] == [f"{auc(result, method, kind):.2f}" for kind in CORRUPTED]


def test_the_losses_are_those_of_the_result():
    found, result = table("Training without them"), read()
    assert list(found) == list(CHOICES.values())
    for choice, label in CHOICES.items():
        of = result["retrained"][choice]
        assert found[label] == [str(of["texts"]), str(of["corrupted"]), f"{loss(result, choice):.3f}"]


def test_smooth_and_rough_are_those_of_the_result():
    assert table("Train smoothly") == smooth_rows()


def test_the_text_says_what_smoothness_does():
    found = read(RESULT.with_name("smoothness.json"))
    smooth = found["as above"]
    for name, times in (("embeddings of 0.02", 14), ("all three", 8)):
        assert round(found[name]["spread"] / smooth["spread"]) == times
        assert f"{times} times" in read_page(PAGE)
    gains = [mean(of["all texts"]) - mean(of["helpful texts"]) for of in found.values()]
    assert min(gains) > 0.9 * gains[0]  # the usual training gains as much


def test_every_figure_of_the_text_is_one_of_the_result():
    text = re.sub(r"(?ms)^```.*?^```|^\|.*?$|`[^`]*`|\]\([^)]*\)", "", read_page(PAGE))
    found = re.findall(r"\d+\.\d+", text)
    assert found
    assert set(found) - set(figures()) == set()


def test_its_python_is_that_of_the_example():
    source = read_page(EXAMPLE)
    blocks = python(read_page(PAGE))
    assert len(blocks) > 2
    for block in blocks:
        assert any(indent(block, " " * columns) in source for columns in (0, 4, 8)), block


def test_its_texts_are_those_of_the_result():
    page = read_page(PAGE)
    for kind in CORRUPTED[:2]:
        assert read()["examples"][kind] in page


def test_the_pictures_are_small_and_shown():
    for name in PICTURES:
        assert (FOLDER / name).stat().st_size < 60_000
        assert f"({name})" in read_page(PAGE)


@pytest.mark.skipif(not IS_PINNED, reason="The pictures were drawn by the pinned matplotlib.")
def test_the_pictures_are_those_of_the_result(tmp_path):
    write(read(), tmp_path)
    for name in PICTURES:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "python -m benchmarks.data_weights"
