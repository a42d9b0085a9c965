import numpy as np
import pytest
import torch

from imaml.data import FewShot, ImageSet
from imaml.data._few_shot import random_splits

CLASSES, EXAMPLES = 30, 8
SPLITS = {"train": np.arange(15), "val": np.arange(15, 20), "test": np.arange(20, CLASSES)}


class Toy(FewShot):
    """Images whose pixels tell class and example."""

    def _load(self):
        images = np.zeros((CLASSES, EXAMPLES, 2, 3), dtype=np.uint8)
        images[..., 0, 0] = np.arange(CLASSES)[:, None]
        images[..., 1, 2] = np.arange(EXAMPLES)
        return ImageSet(images, SPLITS)


class Turned(Toy):
    def _load(self):
        images, splits = super()._load()
        square = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 0)))
        square[..., 0, 2] = 255
        return ImageSet(square, splits)

    def _quarter_turns(self, generator):
        return generator.integers(4, size=self.ways)


def test_shapes_dtypes_and_labels():
    batch = Toy(ways=4, shots=2, queries=3).batch("train", 0, 6)
    for (images, labels), examples in ((batch.support, 2), (batch.query, 3)):
        assert images.shape == (6, 4 * examples, 1, 2, 3) and images.dtype == torch.float32
        assert labels.dtype == torch.int64
        expected = [way for way in range(4) for _ in range(examples)]
        assert labels.tolist() == [expected] * 6


def test_255_is_ink_of_1():
    assert Turned(ways=4).shots == 1
    images = Turned(ways=4, queries=1).batch("train", 0, 1).support[0]
    assert images.amax() == 1.0


@pytest.mark.parametrize("split", SPLITS)
def test_a_task_holds_distinct_classes_of_its_split_and_disjoint_examples(split):
    batch = Toy(ways=5, shots=3, queries=5).batch(split, 0, 200)
    classes, examples = (
        torch.cat([(images[:, :, 0, *pixel] * 255).round().long().unflatten(1, (5, -1)) for images in images], dim=2)
        for images, pixel in (((batch.support[0], batch.query[0]), pixel) for pixel in ((0, 0), (1, 2)))
    )
    assert (classes == classes[:, :, :1]).all(), "a label names two classes"
    assert all(len(set(task.tolist())) == 5 for task in classes[:, :, 0])
    assert set(classes.flatten().tolist()) == set(SPLITS[split].tolist()), "never drawn, or of another split"
    assert (examples.sort(dim=2).values == torch.arange(EXAMPLES)).all(), "support and query overlap"
    # Neither the label of a class nor the examples that serve as support are fixed.
    assert classes[:, 0, 0].unique().numel() == len(SPLITS[split])
    assert examples[:, :, 0].unique().numel() == EXAMPLES


def test_a_class_is_turned_as_a_whole_and_by_every_angle():
    batch = Turned(ways=5, shots=2, queries=2).batch("train", 0, 40)
    images = torch.cat([pair[0].unflatten(1, (5, 2)) for pair in (batch.support, batch.query)], dim=2)[:, :, :, 0]
    # The bright corner of the upright image is the upper right one; a turn carries it counterclockwise.
    corners = images[..., [0, 0, 2, 2], [2, 0, 0, 2]].argmax(dim=-1)
    assert (corners == corners[:, :, :1]).all()
    assert corners.unique().tolist() == [0, 1, 2, 3]
    turns = corners[:, :, 0]
    assert any(len(set(task.tolist())) > 1 for task in turns), "all classes of a task turn together"
    for task, turn in zip(images.flatten(0, 1), turns.flatten(), strict=True):
        upright = torch.rot90(task, -int(turn), dims=(-2, -1))
        assert (upright[:, 0, 0] == upright[0, 0, 0]).all() and (upright[:, 0, 2] == 1).all()


def test_too_many_ways_or_examples_are_refused():
    with pytest.raises(ValueError, match="`ways` must be at most 5, the classes in split 'val'. Got 6"):
        Toy(ways=6, queries=1).batch("val", 0, 1)
    with pytest.raises(ValueError, match="`shots \\+ queries` must be at most 8, the images of a class. Got 9"):
        Toy(shots=4, queries=5).batch("train", 0, 1)
    with pytest.raises(ValueError, match="`ways` must be at least 2. Got 1"):
        Toy(ways=1)
    with pytest.raises(ValueError, match="must be one of"):
        Toy().classes("training")


def test_random_splits_deal_every_class_once_and_always_alike():
    pool = np.arange(100, 200)
    dealt = random_splits(pool, {"val": 10, "test": 30}, "train")
    assert {name: len(classes) for name, classes in dealt.items()} == {"val": 10, "test": 30, "train": 60}
    assert sorted(np.concatenate(list(dealt.values()))) == list(pool)
    assert not np.array_equal(np.concatenate(list(dealt.values())), pool)
    again = random_splits(pool, {"val": 10, "test": 30}, "train")
    assert all(np.array_equal(dealt[name], again[name]) for name in dealt)
