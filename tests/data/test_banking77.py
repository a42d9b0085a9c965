import csv
import hashlib
import itertools

import pytest
import torch

from imaml.data import Banking77
from imaml.data._banking77 import _FILES

SPLITS = ("train", "val", "test")
MESSAGES = 8


def encode(texts):
    """The numbers of which the messages of `folder` consist: intent and message, as two named tensors."""
    numbers = torch.tensor([[int(n) for n in text.split()] for text in texts])
    return {"intent": numbers[:, 0], "message": numbers[:, 1:]}


@pytest.fixture
def folder(tmp_path):
    """77 intents of eight messages in the published layout, out of order, five of each in the first file."""
    for name, kept in (("train.csv", range(5)), ("test.csv", range(5, MESSAGES))):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows((f"{i} {j}", f"intent {i:02}") for j in kept for i in reversed(range(77)))
    return tmp_path


def test_shapes_dtypes_and_labels(folder):
    batch = Banking77(encoder=encode, path=folder, ways=4, shots=2, queries=3).batch("train", 0, 6)
    for (inputs, labels), examples in ((batch.support, 2), (batch.query, 3)):
        assert {name: value.shape for name, value in inputs.items()} == {
            "intent": (6, 4 * examples),
            "message": (6, 4 * examples, 1),
        }
        assert labels.dtype == torch.int64
        assert labels.tolist() == [[way for way in range(4) for _ in range(examples)]] * 6


@pytest.mark.parametrize("split", SPLITS)
def test_a_task_holds_distinct_intents_of_its_split_and_disjoint_messages(folder, split):
    source = Banking77(encoder=encode, path=folder, ways=5, shots=3, queries=5)
    batch = source.batch(split, 0, 100)
    intents, messages = (
        torch.cat([pair[0][name].reshape(100, 5, -1) for pair in (batch.support, batch.query)], dim=2)
        for name in ("intent", "message")
    )
    assert (intents == intents[..., :1]).all(), "a label names two intents"
    assert all(len(set(task.tolist())) == 5 for task in intents[..., 0])
    assert {f"intent {i:02}" for i in intents.flatten().tolist()} == set(source.intents(split))
    assert (messages.sort(dim=2).values == torch.arange(MESSAGES)).all(), "support and query overlap"
    assert messages[..., :3].unique().numel() == MESSAGES, "the messages that serve as support are fixed"


def test_the_intents_of_the_splits_are_disjoint_and_the_seed_does_not_move_them(folder):
    one, other = Banking77(encoder=encode, path=folder), Banking77(encoder=encode, path=folder, seed=1)
    owned = [one.intents(split) for split in SPLITS]
    assert [len(names) for names in owned] == [42, 10, 25]
    assert len(set(itertools.chain(*owned))) == 77
    assert owned == [other.intents(split) for split in SPLITS]


def test_a_batch_depends_on_its_coordinates_alone(folder):
    def draw(*, index=3, seed=0, warm=False):
        source = Banking77(encoder=encode, path=folder, seed=seed)
        if warm:
            source.batch("train", 0, 7)
        inputs, _ = source.batch("train", index, 4).query
        return torch.stack([inputs["intent"], inputs["message"][..., 0]])

    assert torch.equal(draw(), draw(warm=True))
    assert not torch.equal(draw(), draw(index=4))
    assert not torch.equal(draw(), draw(seed=1))


def test_every_message_is_encoded_once(folder):
    seen = []

    def recorded(texts):
        seen.extend(texts)
        return encode(texts)

    source = Banking77(encoder=recorded, path=folder, queries=2)
    for index in range(30):
        source.batch("val", index, 4)
    assert len(seen) == len(set(seen)) == 10 * MESSAGES


def test_too_many_ways_or_messages_are_refused(folder):
    with pytest.raises(ValueError, match="`ways` must be at most 10, the intents in split 'val'. Got 11"):
        Banking77(encoder=encode, path=folder, ways=11).batch("val", 0, 1)
    with pytest.raises(ValueError, match=r"`shots \+ queries` must be at most 8, the messages of 'intent .*Got 9"):
        Banking77(encoder=encode, path=folder, shots=4).batch("train", 0, 1)
    with pytest.raises(ValueError, match="`ways` must be at least 2. Got 1"):
        Banking77(encoder=encode, ways=1)
    with pytest.raises(ValueError, match="must be one of"):
        Banking77(encoder=encode).intents("training")


def test_files_that_are_something_else_are_refused(folder):
    source = Banking77(encoder=encode, path=folder / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        source.batch("train", 0, 1)
    (folder / "test.csv").write_text("text,category\nhello,greeting\n")
    with pytest.raises(ValueError, match="must hold the 77 intents of BANKING77. Got 78"):
        Banking77(encoder=encode, path=folder).intents("train")
    (folder / "test.csv").write_text("text,label\nhello,greeting\n")
    with pytest.raises(ValueError, match=r"test\.csv must have columns text and category"):
        Banking77(encoder=encode, path=folder).intents("train")


def test_a_download_is_by_checksum_into_the_cache(folder, cache, monkeypatch):
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url.rpartition("/")[2], known_hash))
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((folder / fname).read_bytes())

    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert len(Banking77(encoder=encode).intents("train")) == 42
    assert sorted(path.name for path in (cache / "banking77").iterdir()) == ["test.csv", "train.csv"]
    assert [name for name, _ in asked] == ["train.csv", "test.csv"]
    assert all(known.startswith("sha256:") for _, known in asked)


def test_the_real_files(data_folder):

    path = data_folder / "banking77"
    for name, checksum in _FILES.items():
        assert checksum == "sha256:" + hashlib.sha256((path / name).read_bytes()).hexdigest()
    messages = Banking77(encoder=encode, path=path).messages
    assert len(messages) == 77 and sum(map(len, messages.values())) == 13_083
    assert "I am still waiting on my card?" in messages["card_arrival"]
