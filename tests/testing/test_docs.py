"""The Python of docs/testing.md is a test file that passes."""

import re
from pathlib import Path

import hypothesis
import pytest

from tests.testing.running import run_file

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture
def _few_examples():
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile("few", hypothesis.settings.get_profile(before), max_examples=10)
    hypothesis.settings.load_profile("few")
    yield
    hypothesis.settings.load_profile(before)


@pytest.mark.usefixtures("_few_examples")
def test_the_python_of_the_page_is_a_test_file_that_passes(tmp_path):
    text = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    failed, passed = run_file(tmp_path, text)
    assert not failed
    assert {name.partition("::")[0] for name in passed} == set(
        re.findall(r"^(?:def )?([tT]est\w+)", text, re.MULTILINE)
    )
