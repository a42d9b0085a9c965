import pickle

import pytest
import torch

from imaml.training import CheckpointError, load_checkpoint, replace_file, save_checkpoint


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(3.0)}, "step": 4, "config": {"lr": 0.1}})
    state = load_checkpoint(path)
    assert torch.equal(state["model"].pop("w"), torch.arange(3.0))
    assert state == {"model": {}, "step": 4, "config": {"lr": 0.1}}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(stream):
        stream.write(b"half of the new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    replace_file(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("keep", [0, 10, 300, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*truncated"):
        load_checkpoint(path)


def test_nothing_but_plain_values_is_unpickled(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": pickle.Pickler}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match=r"Expected a dict\. Got Tensor"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint.pt")
