"""The tables of docs/results.md and docs/performance.md beside other libraries have the figures of the rows."""

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
OVER_STEPS = {f"K = {k}": k for k in (1, 4, 5, 10, 16, 32, 50, 64)}
W1, W3 = ({title: (name, k) for title, k in OVER_STEPS.items()} for name in ("W1", "W3"))
BESIDE = {
    "sinusoids, 25 tasks, K = 5": ("W1", 5),
    "Conv4, 32 tasks, K = 5": ("W2", 5),
    "transformer above, K = 4": ("W3", 4),
    "transformer, K = 4": ("W3", 4),
    "transformer, K = 16": ("W3", 16),
}
W2 = {f"{name}, {title}": (name, k) for name in ("W2", "W2-15", "W2-20") for title, k in OVER_STEPS.items()}
TABLES = [
    ("docs/results.md", "Beside other libraries", 0, BESIDE, ""),
    ("docs/results.md", "Beside other libraries", 1, BESIDE, ""),
    ("docs/performance.md", "Sinusoids, W1", 0, W1, "ms"),
    ("docs/performance.md", "Conv4, W2", 0, W2, "s"),
    ("docs/performance.md", "Transformers, W3 and W4", 0, W3, "s"),
    ("docs/performance.md", "W3: memory", 0, {title.removeprefix("K = "): at for title, at in W3.items()}, "MB"),
]
"""Page, heading, which table below it, what its columns are, and the unit of figures without one."""
UNITS = {"ms": ("seconds", 1e-3), "s": ("seconds", 1.0), "MB": ("bytes", 1e6)}


def cells(page, heading, number, columns, default):
    """Each cell with a figure, and where it belongs: `(method, workload, steps, figure, unit)`."""
    below = re.split(r"(?m)^#+ ", read(page).partition(f"# {heading}\n")[2])[0]
    table = re.findall(r"(?m)(?:^\|.*\n)+", below)[number]
    head, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines())
    for name, *found in rows:
        for column, text in zip(head[1:], found, strict=True):
            if text:
                figure, _, unit = text.replace(",", "").partition(" ")
                yield NAMES[name], *columns[column], figure, unit or default


CELLS = [cell for table in TABLES for cell in cells(*table)]
ROWS = {(f.method, f.workload, f.steps): f for f in read_rows(RESULTS)}


def test_no_table_is_empty():
    assert all(len(list(cells(*table))) > 15 for table in TABLES)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_a_figure_is_that_of_the_rows(cell):
    method, workload, steps, figure, unit = cell
    quantity, scale = UNITS[unit]
    digits = len(figure.partition(".")[2])
    assert f"{getattr(ROWS[method, workload, steps], quantity) / scale:.{digits}f}" == figure
