"""Two gloo processes that train together, against one."""

import pytest
import torch

from tests.distributed import training


@pytest.mark.parametrize("name", ["curve", "curve_with_a_rank_without_tasks"])
def test_the_curve_and_the_parameters_are_those_of_one_process(found, name):
    *expected, drawn = training.FUNCTIONS[name](None)
    first, second = found[name]
    assert_close(first[:3], expected)
    assert [(*record[:3], record[4]) for record in second[0]] == [(*record[:3], record[4]) for record in first[0]]
    assert second[1] == first[1]
    for mine, others in zip(first[2], second[2], strict=True):
        assert torch.equal(mine, others)
    assert first[3] + second[3] == drawn and first[3] > second[3] > 0


def test_the_clock_of_rank_0_ends_the_run_and_rules_the_learning_rate(found):
    first, second = found["clocks_that_differ"]
    assert first == second
    assert first[-1][0] >= 0.5 > first[-2][0]
    assert first[-1][2]


def test_what_fails_at_first_on_one_rank_fails_on_all(found):
    first, second = found["one_rank_cannot_begin"]
    assert first == ("ValueError", "Another process cannot begin. Its own message says why.")
    assert second == ("OSError", "no data")


def assert_close(ours, theirs):
    """Nested numbers to 1e-12, all else exactly."""
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-12)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_close(value, theirs[key])
    elif isinstance(ours, (list, tuple)):
        for mine, other in zip(ours, theirs, strict=True):
            assert_close(mine, other)
    else:
        assert ours == theirs
