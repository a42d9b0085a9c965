"""The Python of docs/testing.md is a test file that passes."""

import re
from pathlib import Path

import hypothesis
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"

pytest_plugins = ["pytester"]


@pytest.fixture
def _few_examples():
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile("few", hypothesis.settings.get_profile(before), max_examples=10)
    hypothesis.settings.load_profile("few")
    yield
    hypothesis.settings.load_profile(before)


@pytest.mark.usefixtures("_few_examples")
def test_the_python_of_the_page_is_a_test_file_that_passes(pytester):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    pytester.makepyfile("\n".join(blocks))
    passed, skipped, failed = pytester.inline_run("-q", "-p", "no:cacheprovider").listoutcomes()
    assert not (failed or skipped)
    names = " ".join(report.nodeid for report in passed)
    assert all(name in names for name in re.findall(r"^(?:def )?([tT]est\w+)", "\n".join(blocks), re.MULTILINE))
