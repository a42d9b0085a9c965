"""Runs that are stopped, lose their checkpoint, or have no room, and go on to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imaml.cli import main
from imaml.training import RunFolder, Trainer, load_checkpoint
from tests.survival.runs import differences, metrics, options, resume

STEPS = 5
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("survival") / "whole"
    assert main(options(out, steps=STEPS)) == 0
    return out


def at_step(monkeypatch, step, act):
    """Act once that step is logged."""
    log = RunFolder.log

    def log_and_act(folder, record):
        log(folder, record)
        if record.step == step:
            act()

    monkeypatch.setattr(RunFolder, "log", log_and_act)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_three_kills(tmp_path):
    """The script draws the moments; it ends with 0 where every run was that of the uninterrupted one."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solvers")]),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.survival.kill_points", "--kills", "3", "--steps", "12"]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 kills of 3 runs; 0 runs differ" in ended.stdout


def test_sigterm_ends_with_a_checkpoint_and_0_however_often_it_comes(tmp_path, whole, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: [sigterm(), sigterm()])
        assert main(options(out, steps=STEPS)) == 0
    assert capsys.readouterr().out == f"Stopped after step 3. Continue with: imaml train --out {out} --resume\n"
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 3
    assert not (out / "result.json").exists()
    assert main(resume(out)) == 0
    assert differences(out, whole) == []


def test_sigterm_in_the_test_and_before_the_first_step(tmp_path, whole, monkeypatch, capsys):
    out, evaluate, draw = tmp_path / "run", Trainer.evaluate, sys.modules["imaml.data"].Sinusoid.batch
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "evaluate",
            lambda t, split, tasks: sigterm() if split == "test" else evaluate(t, split, tasks=tasks),
        )
        assert main(options(out, steps=STEPS)) == 0
    assert capsys.readouterr().out.endswith(f"\nStopped. Continue with: imaml train --out {out} --resume\n")
    assert main(resume(out)) == 0
    assert differences(out, whole) == []
    with monkeypatch.context() as patch:
        patch.setattr("imaml.data.Sinusoid.batch", lambda *args: [sigterm(), draw(*args)][1])
        capsys.readouterr()
        assert main(options(tmp_path / "other", steps=STEPS)) == 0
        assert capsys.readouterr().out == "Stopped. Nothing was trained yet.\n"
        assert not (tmp_path / "other").exists()
        assert main([*options(out, steps=STEPS), "--inner-lr", "0.5"]) == 0
    assert capsys.readouterr().out == "Stopped. Nothing was trained yet.\n", "the folder holds another run"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("damage", ["truncated", "a bit", "malicious", "missing"])
def test_without_its_last_checkpoint_a_run_continues_from_the_one_before(tmp_path, whole, damage, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(options(out, steps=STEPS)) == 130
    path = out / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "a bit":
        at = content.index(load_checkpoint(path)["optimizer"]["state"][0]["exp_avg"].numpy().tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "malicious":
        torch.save({"model": Malicious(tmp_path / "executed")}, path)
    else:
        path.unlink()
    capsys.readouterr()
    assert main(resume(out)) == 0
    what = "missing" if damage == "missing" else "truncated or damaged"
    said = capsys.readouterr().err
    assert said == f"imaml: {path} is {what}. Continuing from the checkpoint before it, of step 3.\n"
    assert differences(out, whole) == []
    assert not (tmp_path / "executed").exists()


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "metrics.jsonl"])
def test_a_full_disk_is_one_line_and_costs_no_more_than_a_kill(tmp_path, whole, name, monkeypatch, capsys):
    """/dev/full refuses every byte as a full disk does."""
    out = tmp_path / "run"
    before = {}

    def fill():
        before.update({file.name: file.read_bytes() for file in out.iterdir()})
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at_step(patch, 3, fill)
        assert main(options(out, steps=STEPS)) == 2
    file = out / name.removesuffix(".tmp")
    how = f"Make room. Continue with: imaml train --out {out} --resume"
    assert capsys.readouterr().err == f"imaml: {file} cannot be written (No space left on device). {how}\n"
    assert not (out / "checkpoint.pt.tmp").exists()
    saved = load_checkpoint(out / "checkpoint.pt")["step"]
    assert saved == (2 if name == "checkpoint.pt.tmp" else 3)
    if name == "metrics.jsonl":
        (out / name).unlink()
        (out / name).write_bytes(before[name] + b'{"step": 4, "lo')
    assert main(resume(out)) == 0
    assert differences(out, whole) == []


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, whole, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", lambda folder, trainer: sigterm())
        assert main(options(out, steps=STEPS)) == 0
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert main([*resume(out), "--inner-lr", "0.5"]) == 2
    assert "inner_lr is 0.01 there. Got 0.5." in capsys.readouterr().err
    assert main(resume(out)) == 0
    assert differences(out, whole) == []


def test_what_a_killed_process_had_begun_is_no_run(tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    assert main(options(tmp_path / "run", steps=STEPS)) == 0
    assert differences(tmp_path / "run", whole) == []


def test_minutes_between_checkpoints(tmp_path, monkeypatch, capsys):
    saved = []
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda folder, trainer: [saved.append(trainer.step), save(folder, trainer)])
    assert main([*options(tmp_path / "run", steps=STEPS)]) == 0
    assert saved == [0, 1, 2, 3, 4, 5, 5]
    saved.clear()
    assert main([*options(tmp_path / "other", steps=STEPS), "--save-minutes", "60"]) == 0
    assert saved == [0, 5, 5]
    with pytest.raises(SystemExit):
        main([*options(tmp_path / "third"), "--save-minutes", "-1"])
    assert "`save_minutes` must not be negative. Got -1" in capsys.readouterr().err


def test_skipped_tasks_are_counted(tmp_path, monkeypatch, capsys):
    def batch(episodes, split, index, tasks, rows=None, draw=sys.modules["imaml.data"].Sinusoid.batch):
        drawn = draw(episodes, split, index, tasks, rows)
        if (split, index) in (("train", 1), ("test", 0)):
            drawn.query[0][0] = torch.nan
        return drawn

    monkeypatch.setattr("imaml.data.Sinusoid.batch", batch)
    for strategy in ("maml", "imaml"):
        assert main(options(tmp_path / strategy, strategy, STEPS)) == 2
        assert "query loss of task 0 is nan" in capsys.readouterr().err
        assert main([*resume(tmp_path / strategy), "--on-nonfinite", "skip"]) == 0
        records = metrics(tmp_path / strategy)
        assert [record.get("skipped") for record in records] == [None, 1, 0, 0, 0]
        assert all(record["metric"] > 0 for record in records)
        if strategy == "imaml":
            assert [sum(record["solver"]["status"].values()) for record in records] == [3, 2, 3, 3, 3]
        result = json.loads((tmp_path / strategy / "result.json").read_text())
        assert (result["tasks"], result["skipped"]) == (4, 1) and result["mean"] > 0
        assert "Skipped as not finite: 1 tasks of the training and 1 of the test." in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_and_no_process_is_left_by_a_training(tmp_path, whole, monkeypatch):
    def left():
        descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return sorted(os.readlink(fd) for fd in descriptors if os.path.lexists(fd)), children

    before = left()
    assert main(options(tmp_path / "run", steps=STEPS)) == 0
    at_step(monkeypatch, 3, sigterm)
    assert main(options(tmp_path / "stopped", steps=STEPS)) == 0
    monkeypatch.undo()
    assert main(resume(tmp_path / "stopped")) == 0
    assert main([*resume(tmp_path / "stopped"), "--inner-lr", "0.5"]) == 2
    assert left() == before
