import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imaml.cli import _train as train
from imaml.cli import main
from imaml.training import RunFolder, load_checkpoint

TINY = ["train", "--dataset", "sinusoid", "--meta-batch", "2", "--val-tasks", "2", "--eval-tasks", "5"]
TIMES = ("milliseconds", "seconds")


def tiny(out, *options):
    return main([*TINY, "--steps", "5", "--eval-every", "2", "--out", str(out), *options])


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture
def interrupt_at_three(monkeypatch):
    log = RunFolder.log

    def log_and_interrupt(folder, record):
        log(folder, record)
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log", log_and_interrupt)


@pytest.mark.parametrize("strategy", ["maml", "fomaml", "imaml"])
def test_a_run_ends_with_a_result(tmp_path, strategy, capsys):
    assert tiny(tmp_path / "run", "--strategy", strategy) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tasks"] == 5 and result["steps"] == 5 and result["metric"] == "MSE"
    assert result["interval"] > 0 and result["torch"] == torch.__version__ and result["command"].startswith("imaml")
    assert result["config"] == json.loads((tmp_path / "run" / "config.json").read_text())
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [("solver" in record) for record in metrics(tmp_path / "run")] == [strategy == "imaml"] * 5
    assert f"Test MSE {result['mean']:.3f}" in capsys.readouterr().out


def test_a_compiled_run_finds_the_same_and_says_what_it_compiles(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: compiled.append(graph) or graph)
    for name, options in (("plain", ()), ("compiled", ("--compile", "True"))):
        assert tiny(tmp_path / name, "--strategy", "fomaml", *options) == 0
    assert "Compiled the step of the support loss" in capsys.readouterr().out
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(compiled) >= 2


@pytest.mark.parametrize(("name", "value"), [("storage", "disk"), ("chunk_size", "auto")])
def test_options_of_memory_reach_the_engine_and_change_no_number(tmp_path, monkeypatch, name, value):
    engines = []
    build = train.build_engine
    monkeypatch.setattr(train, "build_engine", lambda *of: engines.append(build(*of)) or engines[-1])
    assert tiny(tmp_path / "plain") == 0
    assert tiny(tmp_path / "other", "--" + name.replace("_", "-"), value) == 0
    assert [getattr(engine, name) == value for engine in engines] == [False, True]
    losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in ("plain", "other")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_classification_on_omniglot(tmp_path, data_folder, capsys):
    options = ["--dataset", "omniglot", "--data", str(data_folder / "omniglot28.npz"), "--ways", "2", "--queries", "2"]
    assert tiny(tmp_path / "run", *options) == 0
    assert 0 <= json.loads((tmp_path / "run" / "result.json").read_text())["mean"] <= 1
    assert "Test accuracy" in capsys.readouterr().out


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, interrupt_at_three, monkeypatch, capsys):
    assert tiny(tmp_path / "parts") == 130
    assert [record["step"] for record in metrics(tmp_path / "parts")] == [1, 2, 3]
    assert f"imaml train --out {tmp_path / 'parts'} --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["train", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert tiny(tmp_path / "whole") == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    parts, whole = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole"))
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value)
    results = [json.loads((tmp_path / name / "result.json").read_text())["mean"] for name in ("parts", "whole")]
    assert results[0] == results[1]


def test_a_finished_run_resumes_to_the_same_result_and_a_larger_budget_of_time_is_taken(tmp_path):
    assert tiny(tmp_path / "run") == 0
    before = metrics(tmp_path / "run")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--minutes", "5"]) == 0
    assert metrics(tmp_path / "run") == before


def test_ctrl_c_in_a_process_leaves_a_checkpoint_and_says_how_to_resume(tmp_path):
    out = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "solvers")])}
    command = [sys.executable, "-m", "imaml", *TINY, "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, complained = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, complained) == (130, "")
    assert "--resume" in printed
    steps = len(metrics(out))
    assert load_checkpoint(out / "checkpoint.pt")["step"] == steps > 0
    assert main(["train", "--resume", "--out", str(out), "--minutes", "1e-6"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "3"], "--ways does not apply to --dataset sinusoid. Got 3"),
        (["--data", "x"], "--data does not apply to --dataset sinusoid"),
        (["--strategy", "fomaml", "--cg-steps", "3"], "--cg-steps does not apply to --strategy fomaml. Got 3"),
        (["--strategy", "fomaml", "--hvp", "auto"], "--hvp does not apply to --strategy fomaml"),
        (["--strategy", "imaml", "--checkpoints", "2"], "--checkpoints does not apply to --strategy imaml"),
        (["--strategy", "fomaml", "--storage", "disk"], "--storage does not apply to --strategy fomaml"),
        (["--chunk-size", "0"], "`chunk_size`"),
        (["--strategy", "imaml", "--regularization", "0"], "`regularization`"),
        (["--inner-lr", "-1"], "`lr`"),
        (["--shots", "0"], "`shots`"),
        (["--seed", "-1"], "`seed`"),
        (["--threads", "0"], "--threads"),
        (["--device", "nowhere"], "nowhere"),
        (["--dataset", "omniglot", "--data", "nowhere.npz"], "nowhere.npz"),
        (["--inner-lr", "1e30"], "diverge"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    assert tiny(tmp_path / "run", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("imaml: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_without_the_data_and_a_network_the_option_is_named(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr("pooch.retrieve", offline)
    assert tiny(tmp_path / "run", "--dataset", "omniglot") == 2
    assert "pass their folder as `path` (--data of the program).\n" in capsys.readouterr().err


def test_folders_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert tiny(tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert tiny(tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "no run to resume" in capsys.readouterr().err


def test_resuming_with_other_options_or_a_broken_checkpoint_changes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny(out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", "--resume", "--out", str(out), "--inner-lr", "0.5", "--dataset", "sinusoid"]) == 2
    assert "inner_lr is 0.01 there. Got 0.5." in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "config.json").write_text('{"strategy": "maml"}')
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "another version" in capsys.readouterr().err
    (out / "config.json").write_bytes(before["config.json"])
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (out / name).write_bytes(before[name][:-100])
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        ([], ["train", "compare"]),
        (["train"], ["--inner-lr", "--resume", "(default: glyphs)"]),
        (["train", "--dataset", "sinusoid", "--strategy", "imaml"], ["(default: sinusoid)", "(default: imaml)"]),
        (["compare"], ["--strategies", "--inner-lr"]),
    ],
)
def test_help_shows_the_defaults_of_dataset_and_strategy(args, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*args, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines may break anywhere
    assert all(text in printed for text in shown)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--no-such-flag"], "--no-such-flag"),
        (["train", "--meta-batch", "0"], "`meta_batch` must be at least 1. Got 0."),
        (["train", "--dataset", "imagenet"], "imagenet"),
        (["dance"], "dance"),
    ],
)
def test_what_does_not_parse_is_refused(args, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
