import errno
import os
import pickle
import resource
from contextlib import contextmanager

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


class Killed(BaseException):
    """Where a kill would have struck."""


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("blow", range(6))
def test_whichever_system_call_is_the_last_one_of_two_checkpoints_is_whole(tmp_path, monkeypatch, blow, links):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    calls = []

    def counted(call):
        def count_and_call(*args, **keywords):
            if len(calls) == blow:
                raise Killed
            calls.append(call)
            return call(*args, **keywords)

        return count_and_call

    def no_links(*args):
        raise OSError(errno.EPERM, "no links")

    with monkeypatch.context() as patch:
        for name in ("fsync", "unlink", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(os, "link", counted(os.link) if links else no_links)
        try:
            save_checkpoint(path, {"step": 3})
        except Killed:
            pass
    whole = [load_checkpoint(file)["step"] for file in (path, tmp_path / "checkpoint.previous.pt") if file.exists()]
    assert (whole == [3, 2]) if blow >= 4 else (2 in whole)
    assert path.exists() or not links


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10_000, 200_000, 399_000])
def test_a_disk_that_ends_within_a_checkpoint_leaves_both_as_they_were(tmp_path, size):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    with pytest.raises(OSError) as error, files_of_at_most(size):
        save_checkpoint(path, {"step": 3, "w": torch.zeros(100_000)})
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert load_checkpoint(path) == {"step": 2}
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt") == {"step": 1}
