"""`imaml train --track`: what the program tells its callbacks."""

import json
import os
import signal

import pytest

from imaml.cli import _train as train
from imaml.cli import main

TINY = ["train", "--dataset", "sinusoid", "--meta-batch", "2", "--val-tasks", "2", "--eval-tasks", "5", "--steps", "4"]


@pytest.fixture
def calls(monkeypatch):
    """What is told to a stand-in for TensorBoard, which fails or acts as its `at` says."""
    noted = []

    class Stub:
        at = {}

        def __init__(self, folder):
            noted.append(("made", folder))

        def _note(self, method, *args):
            noted.append((method, *args))
            self.at.get((method, *args[-1:]), lambda: None)()

        def start(self, config, step):
            self._note("start", config["strategy"], step)

        def log(self, record):
            self._note("log", record.step)

        def end(self, result):
            noted.append(("end", None if result is None else result["steps"]))

    monkeypatch.setitem(train._TRACKERS, "tensorboard", Stub)
    return noted, Stub.at


def tracked(out, *options):
    return main([*TINY, "--out", str(out), "--track", "tensorboard", *options])


def fail():
    raise RuntimeError("the service is away")


def test_a_training_is_followed_from_its_start_to_its_test(tmp_path, calls):
    assert tracked(tmp_path) == 0
    steps = [("log", step) for step in range(1, 5)]
    assert calls[0] == [("made", tmp_path), ("start", "maml", 0), *steps, ("end", 4)]


def test_a_run_that_goes_on_is_followed_as_before(tmp_path, calls):
    noted, at = calls
    at["log", 2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert tracked(tmp_path) == 130
    assert noted[-1] == ("end", None)
    noted.clear()
    at.clear()
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert noted == [("made", tmp_path), ("start", "maml", 2), ("log", 3), ("log", 4), ("end", 4)]
    assert main(["train", "--resume", "--out", str(tmp_path), "--track"]) == 0  # or no longer
    assert len(noted) == 5


def test_a_run_is_not_lost_with_what_follows_it(tmp_path, calls, capsys):
    noted, at = calls
    at["log", 2] = fail
    assert tracked(tmp_path) == 0
    assert [call for call in noted if call[0] in ("log", "end")] == [("log", 1), ("log", 2)]
    said = "Stub failed and is left out (RuntimeError: the service is away)."
    assert said in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


def test_what_cannot_start_is_said_before_anything_is_trained(tmp_path, calls, capsys):
    calls[1]["start", 0] = fail
    assert tracked(tmp_path) == 2
    error = capsys.readouterr().err
    assert "Stub cannot follow the training (RuntimeError: the service is away)" in error and error.count("\n") == 1
    assert not (tmp_path / "metrics.jsonl").exists()
    calls[1].clear()
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0


def test_an_error_of_the_training_ends_what_follows_it(tmp_path, calls, capsys):
    assert tracked(tmp_path, "--inner-lr", "1e30") == 2
    assert calls[0][-1] == ("end", None)


def test_a_missing_package_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train._TRACKERS, "wandb", missing)
    assert main([*TINY, "--out", str(tmp_path / "run"), "--track", "wandb"]) == 2
    assert capsys.readouterr().err == "imaml: WandB needs wandb\n"
    assert not (tmp_path / "run").exists()


def missing(folder):
    raise ImportError("WandB needs wandb")
