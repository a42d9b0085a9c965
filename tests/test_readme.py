"""The README: its length, its Python as it stands, and the figures that it has from the results."""

import re

import torch

from benchmarks.picture import RESULTS
from benchmarks.summary import read as read_rows
from tests.pages import ROOT, read, run

README, WORDS = "README.md", 700


def test_the_readme_is_short():
    words = len(read(README).split())
    assert words <= WORDS, f"{words} words: what is more than {WORDS} belongs to docs/"


def test_the_python_of_the_readme_runs():
    namespace = run(README)
    assert all(p.grad is not None for p in namespace["model"].parameters())
    report = namespace["result"].report
    assert all(part is not None for part in (report.query_loss, report.stationarity, report.solver_status))
    assert torch.isfinite(report.error_bound).all()


def test_a_call_changes_no_parameter_or_buffer_as_the_readme_says():
    namespace = run(README)
    model = namespace["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    namespace["engine"](namespace["objective"], namespace["tasks"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_sweep_takes_the_time_that_the_readme_says():
    factor = float(re.search(r"`MAML` takes (\d\.\d) times as long", read(README))[1])
    seconds = {(f.method, f.steps): f.seconds for f in read_rows(RESULTS) if f.workload == "W3"}
    for steps in (4, 16):
        measured = seconds["imaml MAML", steps] / seconds["create_graph loop", steps]
        assert round(measured, 1) == factor


def test_the_commands_of_the_readme_are_targets():
    targets = re.findall(r"^make (\w+)", read(README), re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"(?m)^{target}: env", makefile) for target in targets)
