"""The README's Python runs as it stands, in order, in one namespace."""

import re
from pathlib import Path

import pytest

from imaml.cli import main

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert all(p.grad is not None for p in namespace["model"].parameters())
    assert namespace["result"].report.metric.shape == (2,)


def test_every_option_of_a_command_in_the_readme_exists(capsys):
    commands = re.findall(r"^imaml (train|compare)(.*?)(?:#.*)?$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command, options in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", options):
            assert option in known, f"imaml {command} has no {option}"
