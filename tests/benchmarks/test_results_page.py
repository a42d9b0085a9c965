"""The tables of docs/results.md beside other libraries, and the memory table of docs/performance.md, are the rows'."""

import re

import pytest

from benchmarks.picture import RESULTS
from benchmarks.summary import read as read_rows
from tests.pages import read

NAMES = {
    "`MAML`": "imaml MAML",
    "`MAML(compile=True)`": "imaml MAML, compile=True",
    "`MAML(chunk_size=1)`": "imaml MAML, chunk_size=1",
    "`MAML(checkpoints=4)`": "imaml MAML, checkpoints=4",
    "`MAML`, `checkpoints=4`": "imaml MAML, checkpoints=4",
    "`FOMAML`": "imaml FOMAML",
    "`ImplicitMAML`, 5 CG steps, `error_bound=False`": "imaml ImplicitMAML",
    "the same, `linearize=False`": "imaml ImplicitMAML, linearize=False",
    "torch.func with `vmap` outside": "torch.func, vmap outside",
    "torch.func, `vmap` outside": "torch.func, vmap outside",
    "torch.func, `vmap` inside": "torch.func, vmap inside",
    "learn2learn": "learn2learn",
    "higher": "higher",
    "TorchOpt": "TorchOpt explicit",
    "TorchOpt, explicit": "TorchOpt explicit",
    "TorchOpt, implicit": "TorchOpt implicit",
    "torch-maml": "torch-maml",
    "torch-maml with checkpoints": "torch-maml, checkpointing",
    "torch-maml, checkpointing": "torch-maml, checkpointing",
    "`create_graph` loop": "create_graph loop",
    "Betty, cg": "Betty cg",
}
COLUMNS = {
    "sinusoids, 25 tasks, K = 5": ("W1", 5),
    "Conv4, 32 tasks, K = 5": ("W2", 5),
    "transformer above, K = 4": ("W3", 4),
    "transformer, K = 4": ("W3", 4),
    "transformer, K = 16": ("W3", 16),
    **{str(k): ("W3", k) for k in (1, 4, 16, 32, 64)},
}
UNITS = {"ms": ("seconds", 1e-3), "s": ("seconds", 1.0), "MB": ("bytes", 1e6), "": ("bytes", 1e6)}


def cells():
    """Each cell with a figure, and where it belongs: `(method, workload, steps, text)`."""
    beside = read("docs/results.md").partition("## Beside other libraries")[2]
    memory = read("docs/performance.md").partition("## W3: memory")[2].partition("\n## ")[0]
    for table in re.findall(r"(?m)(?:^\|.*\n)+", beside + memory):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for name, *found in rows:
            for column, text in zip(head[1:], found, strict=True):
                if text:
                    yield NAMES[name], *COLUMNS[column], text.replace("*", "")


CELLS = list(cells())


def test_there_are_three_tables():
    assert len(CELLS) > 80 and {workload for _, workload, *_ in CELLS} == {"W1", "W2", "W3"}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell[:3])))
def test_a_figure_is_that_of_the_rows(cell):
    method, workload, steps, text = cell
    number, _, unit = text.replace(",", "").partition(" ")
    quantity, scale = UNITS[unit]
    measured = {(f.method, f.workload, f.steps): getattr(f, quantity) for f in read_rows(RESULTS)}
    digits = len(number.partition(".")[2])
    assert f"{measured[method, workload, steps] / scale:.{digits}f}" == number
