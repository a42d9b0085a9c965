import time

import pytest
import torch

from imaml.measure import counted, peak_memory, timed

MB = 1_000_000


@pytest.fixture(autouse=True)
def _quiet_profiler(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def megabytes(count):
    return torch.empty(count * MB, dtype=torch.uint8)


def test_what_is_returned_counts_as_held():
    assert peak_memory(lambda: [megabytes(3), megabytes(5)]) == pytest.approx(8 * MB, rel=0.01)


def test_a_temporary_peak_within_nested_calls_is_seen():
    def inner():
        kept = megabytes(2)
        megabytes(10)  # released at once
        return kept

    def outer():
        first = megabytes(4)
        second = inner()  # 4 + 2 + 10
        return first, second, megabytes(7)  # 4 + 2 + 7

    assert peak_memory(outer) == pytest.approx(16 * MB, rel=0.01)


def test_temporaries_one_after_the_other_do_not_add_up():
    assert peak_memory(lambda: [megabytes(6).zero_().numel() for _ in range(5)]) == pytest.approx(6 * MB, rel=0.01)


def test_what_was_there_before_does_not_count():
    outside = megabytes(9)
    assert peak_memory(lambda: outside.zero_()) == 0
    assert peak_memory(lambda: (outside.zero_(), megabytes(2))) == pytest.approx(2 * MB, rel=0.01)


def test_the_graph_of_a_backward_pass_is_seen():
    x = torch.ones(1000, 1000, requires_grad=True)  # 4 MB
    held = peak_memory(lambda: x.exp().exp().sum().backward())  # two saved results, and their gradients
    assert held == pytest.approx(16 * MB, rel=0.3)
    assert held > 11 * MB


def test_timed_takes_the_median_of_the_calls_after_the_first():
    durations = iter([0.2, 0.01, 0.05, 0.03])
    calls = []

    def work():
        calls.append(None)
        time.sleep(next(durations))

    timing = timed(work, repeats=3)
    assert len(calls) == 4
    assert 0.03 <= timing.median < 0.05
    assert 0.02 <= timing.spread < 0.15


def test_timed_needs_a_repeat():
    with pytest.raises(ValueError, match=r"`repeats`.*Got 0"):
        timed(lambda: None, repeats=0)


def test_operations_and_flops_of_a_matrix_product():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    counts = counted(lambda: (a @ b).exp())
    assert (counts.operations, counts.flops) == (2, 2 * 3 * 4 * 5)


def test_a_grouped_convolution_costs_what_its_parts_cost():
    """torch's own formula counts the gradient of the weight as if there were no groups."""
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((2, 6, 8, 8), (6, 3, 3, 3)))

    def together():
        torch.conv2d(x, w, groups=2, padding=1).sum().backward()

    def apart():
        halves = zip(x.chunk(2, 1), w.chunk(2), strict=True)
        sum(torch.conv2d(part, weight, padding=1).sum() for part, weight in halves).backward()

    assert counted(together).flops == counted(apart).flops == 3 * 2 * (2 * 6 * 64) * 27
