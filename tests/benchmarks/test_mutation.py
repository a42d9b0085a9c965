"""What `make mutation` breaks, and the tests that it runs, are there: an entry that matches nothing breaks nothing."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "benchmarks/mutation/pyproject.toml").read_text())["tool"]["mutmut"]
SELECTION = SETTINGS["pytest_add_cli_args_test_selection"]
TESTS = [argument.removeprefix("--ignore=") for argument in SELECTION if "tests/" in argument]


@pytest.mark.parametrize("pattern", SETTINGS["source_paths"] + SETTINGS["only_mutate"])
def test_every_module_that_is_to_be_broken_exists(pattern):
    assert [*ROOT.glob(pattern), *(ROOT / "solvers").glob(pattern)]


@pytest.mark.parametrize("path", TESTS)
def test_every_test_file_exists(path):
    assert (ROOT / path).exists()


def test_every_word_that_leaves_tests_out_stands_in_one():
    files = [file for path in TESTS for file in [ROOT / path, *(ROOT / path).glob("**/*.py")] if file.is_file()]
    text = "\n".join(file.read_text() for file in files).lower()
    words = set(re.findall(r"\w+", SELECTION[SELECTION.index("-k") + 1])) - {"not", "and", "or"}
    assert words and {word for word in words if word not in text} == set()
