"""`torchrun ... -m imaml train` against `imaml train`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imaml.cli import main
from imaml.training import load_checkpoint

pytest.importorskip("tyro", reason="The program needs the extra `train`.")
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--dataset", "sinusoid", "--meta-batch", "3", "--val-tasks", "3", "--eval-tasks", "5", "--eval-every", "2"]


def torchrun(*program, restarts=0):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solvers")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


def numbers(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["metric"], line["learning_rate"], *line.get("val", {}).values()] for line in lines]


def test_a_run_of_two_processes_interrupted_and_resumed_is_that_of_one(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    train = ["train", *OPTIONS, "--steps", "4"]
    interrupted = torchrun(str(Path(__file__).with_name("interrupted.py")), *train, "--out", str(two))
    assert "Stopped after step 2" in interrupted.stdout and interrupted.stdout.count("Stopped") == 1
    assert "exitcode  : 130" in interrupted.stderr
    assert load_checkpoint(two / "checkpoint.pt")["step"] == len(numbers(two)) == 2
    resumed = torchrun("-m", "imaml", "train", "--resume", "--out", str(two))
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout.count("Test MSE") == 1

    assert main([*train, "--out", str(one)]) == 0
    assert [file.name for file in sorted(two.iterdir())] == [file.name for file in sorted(one.iterdir())]
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (two, one)]
    assert results[0]["mean"] == pytest.approx(results[1]["mean"], rel=1e-5)
    assert [result["processes"] for result in results] == [2, 1]


def test_a_lost_process_is_started_anew_with_the_run_and_sigterm_of_one_ends_all_with_0(tmp_path, capsys):
    two, one = tmp_path / "two", tmp_path / "one"
    train = ["train", *OPTIONS, "--steps", "4"]
    program = str(Path(__file__).with_name("lost.py"))
    ended = torchrun(program, *train, "--save-minutes", "0", "--out", str(two), restarts=3)
    assert ended.returncode == 0
    assert ended.stdout.endswith(f"Stopped after step 3. Continue with: imaml train --out {two} --resume\n")
    assert load_checkpoint(two / "checkpoint.pt")["step"] == len(numbers(two)) == 3
    assert main([*train, "--resume", "--out", str(two)]) == main([*train, "--out", str(one)]) == 0
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
