"""The picture of the README: what is in it, and that it is the one of the results that are checked in."""

from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.picture import CURVES, LIBRARIES, PICTURE, RESULTS, STEPS, WORKLOAD, draw, peaks, write
from benchmarks.summary import Figure, read

PINS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
IS_PINNED = f"matplotlib=={version('matplotlib')}" in PINS


def test_every_curve_goes_from_one_step_to_the_last_and_libraries_to_sixteen():
    figures = read(RESULTS)
    for curve in CURVES:
        assert tuple(peaks(figures, curve.method)) == STEPS
    for library in LIBRARIES:
        assert tuple(peaks(figures, library)) == STEPS[:3]


def test_the_libraries_are_where_the_loop_is():
    """The caption says within 6 %."""
    loop, *others = (peaks(read(RESULTS), method) for method in (CURVES[0].method, *LIBRARIES))
    assert all(abs(found[k] / loop[k] - 1) <= 0.06 for found in others for k in found)


def test_lines_and_labels_have_the_values_of_the_rows():
    methods = [curve.method for curve in CURVES] + list(LIBRARIES)
    figures = [Figure(workload=WORKLOAD, steps=k, method=m, bytes=k * 200_000_000) for m in methods for k in STEPS]
    figures.append(Figure(workload="W4", steps=1, method="imaml MAML", bytes=7))
    (axes,) = draw(figures).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([200, 800, 3200, 12800])] * len(methods)
    assert sum("12,800 MB" in text.get_text() for text in axes.texts) == len(CURVES)


def test_the_picture_is_small_and_the_same_each_time(tmp_path):
    for name in ("one.svg", "other.svg"):
        write(read(RESULTS), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert PICTURE.stat().st_size < 60_000


@pytest.mark.skipif(not IS_PINNED, reason="The picture was drawn by the pinned matplotlib.")
def test_the_picture_is_that_of_the_results(tmp_path):
    write(read(RESULTS), tmp_path / "memory.svg")
    assert (tmp_path / "memory.svg").read_text() == PICTURE.read_text(), "Draw it anew: python -m benchmarks.picture"
