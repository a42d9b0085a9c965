"""Files are data: nothing in them is executed, and no archive is extracted."""

import ast
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import imaml
import imaml_solvers
from imaml.cli import main
from imaml.data import _files
from imaml.training import CheckpointError, load_checkpoint
from tests.survival.runs import options

SOURCES = [path for package in (imaml, imaml_solvers) for path in sorted(Path(package.__file__).parent.rglob("*.py"))]
NEEDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "os.system"}
NO_METHODS = {"extractall", "extract", "unpack_archive"}


def faults(source: str) -> list[str]:
    """Calls that would execute what a file holds, or write where it says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        needed = NEEDS.get(name)
        unsafe = needed is not None and given.get(needed[0]) is not needed[1]
        if unsafe or name in NEVER or name.rpartition(".")[2] in NO_METHODS:
            found.append(ast.unparse(node))
    return found


def test_no_source_unpickles_extracts_or_evaluates():
    assert len(SOURCES) > 100
    assert {path.name: found for path in SOURCES if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.load(stream)",
        "archive.extractall(path)",
        "shutil.unpack_archive(path)",
        "exec(text)",
    ],
)
def test_the_search_finds(source):
    assert faults(source) == [source]


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_torch(path, content):
    torch.save(content, path)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def write_arrays(path, content):
    with path.open("wb") as stream:
        np.savez(stream, images=np.array([content], dtype=object))


@pytest.mark.parametrize(
    ("write", "read", "error"),
    [
        (write_torch, load_checkpoint, CheckpointError),
        (write_pickle, load_checkpoint, CheckpointError),
        (write_arrays, _files.read_arrays, ValueError),
        (write_pickle, _files.read_arrays, ValueError),
    ],
)
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, write, read, error):
    mark = tmp_path / "executed"
    write(tmp_path / "file", Malicious(mark))
    with pytest.raises(error):
        read(tmp_path / "file")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()


def test_no_file_names_what_is_imported(tmp_path, monkeypatch, capsys):
    """A factory is imported where it is on the command line, and nowhere else."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('imported')")
    before = list(sys.path)
    assert main(options(Path("run"), steps=1)) == 0
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps({**config, "problem": "evil:make"}))
    assert main(["train", "--resume", "--out", "run"]) == 0
    config["engine"]["problem"] = "evil:make"
    Path("run/config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", "--out", "run"]) == 2
    assert "another version" in capsys.readouterr().err
    assert sys.path == before and "evil" not in sys.modules
