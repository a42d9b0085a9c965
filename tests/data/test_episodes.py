"""What every distribution of tasks promises, on each of them."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from imaml.data import FewShot, ImageSet, Sinusoid


class Toy(FewShot):
    """Images whose pixels tell the class, the example and (by the bright corner) the turn."""

    def _load(self):
        images = np.zeros((30, 8, 3, 3), dtype=np.uint8)
        images[:, :, 1, 1] = np.arange(30)[:, None]
        images[:, :, 0, 1] = np.arange(8)
        return ImageSet(images, {"train": np.arange(15), "val": np.arange(15, 20), "test": np.arange(20, 30)})


EPISODES = [Sinusoid(seed=3), Toy(ways=5, shots=2, queries=3, seed=3)]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True))


def tensors(batch):
    return batch.support, batch.query


@pytest.fixture(params=EPISODES, ids=lambda episodes: type(episodes).__name__)
def episodes(request):
    return request.param


def test_a_batch_depends_on_its_coordinates_alone(episodes):
    def draw(source=episodes, split="train", index=4):
        return tensors(source.batch(split, index, 6))

    reference = draw()
    episodes.batch("train", 0, 2)
    assert equal(draw(), reference)
    assert equal(draw(pickle.loads(pickle.dumps(episodes))), reference)
    assert not equal(draw(index=5), reference)
    assert not equal(draw(split="val"), reference)
    assert not equal(draw(source=type(episodes)(shots=episodes.shots, queries=episodes.queries, seed=4)), reference)


def test_the_tasks_of_a_batch_differ(episodes):
    support = episodes.batch("train", 0, 6).support[0]
    assert len(support.flatten(1).unique(dim=0)) == 6


@given(tasks=st.integers(1, 12), ranks=st.integers(1, 4), strided=st.booleans(), which=st.sampled_from(EPISODES))
def test_ranks_draw_the_rows_of_one_batch(tasks, ranks, strided, which):
    whole = tensors(which.batch("train", 7, tasks))
    for rank in range(min(ranks, tasks)):
        rows = range(rank, tasks, ranks) if strided else slice(rank * tasks // ranks, (rank + 1) * tasks // ranks)
        positions = list(range(tasks)[rows] if isinstance(rows, slice) else rows)
        if positions:
            part = tensors(which.batch("train", 7, tasks, rows=rows))
            assert equal(part, torch.utils._pytree.tree_map(lambda t, p=positions: t[p], whole))


def test_the_global_random_state_plays_no_part(episodes):
    reference = tensors(episodes.batch("train", 0, 3))
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert equal(tensors(episodes.batch("train", 0, 3)), reference)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("split, index, tasks, rows, error, words", [
    ("training", 0, 1, None, ValueError, "'train', 'val', 'test'"),
    ("train", -1, 1, None, ValueError, "`index` must be at least 0"),
    ("train", 1.0, 1, None, TypeError, "`index` must be an integer"),
    ("train", 0, 0, None, ValueError, "`tasks` must be at least 1"),
    ("train", 0, True, None, TypeError, "`tasks` must be an integer"),
    ("train", 0, 4, slice(4, 8), ValueError, "`rows` must select at least one of 4 tasks"),
    ("train", 0, 4, range(2, 5), ValueError, "`rows` must lie in a batch of 4 tasks"),
    ("train", 0, 4, range(-1, 2), ValueError, "`rows` must lie in a batch of 4 tasks"),
])  # fmt: skip
def test_wrong_coordinates_are_refused(episodes, split, index, tasks, rows, error, words):
    with pytest.raises(error, match=words):
        episodes.batch(split, index, tasks, rows)


@pytest.mark.parametrize("field, value, error", [
    ("shots", 0, ValueError), ("queries", 0, ValueError), ("seed", -1, ValueError), ("shots", 1.5, TypeError),
])  # fmt: skip
def test_wrong_fields_are_refused(episodes, field, value, error):
    with pytest.raises(error, match=f"`{field}` must be .* Got {value}"):
        type(episodes)(**{field: value})
