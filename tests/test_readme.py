"""The README's Python runs as it stands, in order, in one namespace."""

import re

import pytest

from imaml.cli import main
from tests.pages import python, read

README = "README.md"


def test_the_python_of_the_readme_runs():
    blocks = python(read(README))
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, README, "exec"), namespace)
    assert all(p.grad is not None for p in namespace["model"].parameters())
    assert namespace["result"].report.metric.shape == (2,)


def test_every_option_of_a_command_in_the_readme_exists(capsys):
    commands = re.findall(r"^imaml (train|compare)(.*?)(?:#.*)?$", read(README), re.MULTILINE)
    assert commands
    for command, options in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", options):
            assert option in known, f"imaml {command} has no {option}"
