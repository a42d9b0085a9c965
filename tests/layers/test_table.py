"""The table of layers: complete, nothing wrong in it, and current on a sample."""

from pathlib import Path

import pytest
import torch

from tests.layers.specimens import SPECIMENS, WITH_STATISTICS
from tests.layers.table import BLOCK, COLUMNS, PAGE, as_a_block, layers, row

ROWS = {
    name.strip().replace("`", "", 2): line
    for line in PAGE.read_text().partition("## The table")[2].splitlines()
    if line.startswith("| `") and (name := line.split(" | ")[0].removeprefix("| "))
}
SAMPLE = [
    "Linear",
    "CrossMapLRN2d",
    "HuberLoss",
    "Dropout",
    "LazyLinear",
    "BatchNorm1d, running statistics, buffers='frozen'",
]


PINS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
IS_PINNED = f"torch=={torch.__version__.partition('+')[0]}" in PINS


@pytest.mark.skipif(not IS_PINNED, reason="The table is of the pinned torch.")
def test_every_layer_has_a_row() -> None:
    assert sorted(ROWS) == sorted([*layers(), *WITH_STATISTICS])


def test_nothing_is_wrong() -> None:
    assert not [name for name, line in ROWS.items() if "WRONG" in line]


@pytest.mark.parametrize("name", SAMPLE)
def test_rows_are_current(name) -> None:
    assert row(name) == ROWS[name]


@pytest.mark.skipif(not IS_PINNED, reason="The table is of the pinned torch.")
@pytest.mark.parametrize("name", [*SPECIMENS, *WITH_STATISTICS])
def test_every_layer_is_as_a_block_what_the_table_says(name) -> None:
    assert as_a_block(name)[0] == ROWS[name].split(" | ")[COLUMNS.index(BLOCK)]
