import numpy as np
import pytest
import torch

from imaml.data import Omniglot
from imaml.data._files import write_arrays

SPLITS = ("train", "val", "test")
CHARACTERS = 60


@pytest.fixture
def packed(tmp_path):
    """A small file whose first row of pixels is the number of the character, and second row the drawer's."""
    images = np.zeros((CHARACTERS, 20, 28, 28), dtype=np.uint8)
    numbers = (np.arange(64)[:, None] >> np.arange(28)) & 1
    images[:, :, 0] = numbers[:CHARACTERS, None]
    images[:, :, 1] = numbers[None, :20]
    images[:, :, 0, 20] = 1
    path = tmp_path / "packed.npz"
    evaluation = np.arange(CHARACTERS) % 3 == 0
    write_arrays(path, {"images": np.packbits(images.reshape(CHARACTERS, 20, -1), -1), "is_evaluation": evaluation})
    return path


def identities(images):
    """Which character each image shows, whichever way it is turned, and how often it is turned.

    Of the four turns back, only the right one leaves all but the two upper rows blank, by pixel (0, 20).
    """
    turned = torch.stack([torch.rot90(images[..., 0, :, :], -k, dims=(-2, -1)) for k in range(4)])
    numbers = (turned[..., 0, :].long() << torch.arange(28)).sum(-1)
    blank = turned[..., 2:, :].sum((-2, -1)) == 0
    turns = blank.long().argmax(0)
    return numbers.gather(0, turns[None])[0] - 2**20, turns


def test_read_from_the_packed_file(data_folder):
    source = Omniglot(path=data_folder / "omniglot28.npz")
    with np.load(data_folder / "omniglot28.npz") as stored:
        bits = np.unpackbits(stored["images"], axis=-1).reshape(1623, 20, 28, 28)
    assert source.images.dtype == np.uint8
    np.testing.assert_array_equal(source.images, bits * 255)
    images, _ = source.batch("test", 0, 2).query
    assert images.unique().tolist() == [0, 1]
    assert 0.05 < images.mean() < 0.25, "ink must be 1 on a ground of 0"


def test_read_from_the_grey_file(data_folder):
    grey = Omniglot(path=data_folder / "omniglot28_gray4.npz").images
    with np.load(data_folder / "omniglot28_gray4.npz") as stored:
        byte = stored["images"][700, 3, 100]
    assert grey.reshape(1623, 20, -1)[700, 3, 200:202].tolist() == [17 * (byte // 16), 17 * (byte % 16)]
    black = Omniglot(path=data_folder / "omniglot28.npz").images
    overlap = np.corrcoef(grey[::50].ravel(), black[::50].ravel())[0, 1]
    assert grey.max() == 255 and overlap > 0.7


@pytest.mark.parametrize("split, sizes", [("random", (1100, 100, 423)), ("original", (864, 100, 659))])
def test_the_splits_of_the_real_characters(data_folder, split, sizes):
    source = Omniglot(path=data_folder / "omniglot28.npz", split=split)
    classes = [source.classes(name) for name in SPLITS]
    assert tuple(map(len, classes)) == sizes
    assert sorted(np.concatenate(classes)) == list(range(1623)), "a class in two splits, or in none"
    if split == "original":
        with np.load(data_folder / "omniglot28.npz") as stored:
            assert stored["is_evaluation"][classes[2]].all() and stored["is_evaluation"].sum() == 659


@pytest.mark.parametrize("split", ["random", "original"])
def test_the_characters_in_the_tasks_of_two_splits_are_disjoint(packed, split):
    source = Omniglot(path=packed, split=split, ways=4, queries=1)
    seen = {}
    for name in SPLITS:
        batch = source.batch(name, 0, 150)
        seen[name] = set(
            torch.cat([identities(pair[0])[0] for pair in (batch.support, batch.query)]).flatten().tolist()
        )
        assert seen[name] == set(source.classes(name).tolist())
    assert sum(map(len, seen.values())) == CHARACTERS == len(set.union(*seen.values()))


def test_the_seed_moves_tasks_but_not_splits(packed):
    one, other = Omniglot(path=packed, ways=2), Omniglot(path=packed, ways=2, seed=1)
    assert not torch.equal(one.batch("train", 0, 4).support[0], other.batch("train", 0, 4).support[0])
    assert all(np.array_equal(one.classes(name), other.classes(name)) for name in SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_rotations_are_classes_in_every_split(packed, split):
    batch = Omniglot(path=packed, ways=4, shots=2, queries=3).batch(split, 0, 100)
    (characters, turns), (query_characters, query_turns) = (
        [values.unflatten(1, (4, -1)) for values in identities(pair[0])] for pair in (batch.support, batch.query)
    )
    assert turns.unique().tolist() == [0, 1, 2, 3]
    assert (turns == turns[..., :1]).all() and (query_turns == turns[..., :1]).all()
    assert any(len(set(task.tolist())) > 1 for task in turns[..., 0]), "all classes of a task turn together"
    assert (query_characters == characters[..., :1]).all()
    assert all(len(set(task.tolist())) == 4 for task in characters[..., 0]), "a character competes with itself"


def test_without_rotations_all_stand_upright(packed):
    batch = Omniglot(path=packed, rotations=False, ways=4).batch("train", 0, 20)
    assert not identities(batch.support[0])[1].any()


def test_wrong_split_is_refused():
    with pytest.raises(ValueError, match="`split` must be 'random' or 'original'. Got 'background'"):
        Omniglot(split="background")


def test_the_original_split_needs_both_kinds(tmp_path):
    path = tmp_path / "background.npz"
    write_arrays(path, {"images": np.zeros((30, 20, 98), np.uint8), "is_evaluation": np.zeros(30, bool)})
    with pytest.raises(
        ValueError, match=r"only one kind in .*background\.npz: add the other archive, or use split='random'"
    ):
        Omniglot(path=path, split="original").batch("train", 0, 1)
    assert len(Omniglot(path=path).classes("test")) == 8


def test_files_are_read_at_the_first_use(tmp_path):
    source = Omniglot(path=tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        source.batch("train", 0, 1)
