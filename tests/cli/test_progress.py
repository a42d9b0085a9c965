"""What a training shows: its bars, and below the first one speed and memory."""

import mmap
import re
import resource
import sys
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from imaml import MAML, GradientDescent, Objective
from imaml.cli._memory_now import memory_now, resident
from imaml.cli._metric import Metric
from imaml.cli._progress import progress
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import Plan, Trainer


def shown(steps, *, terminal, width=140):
    model = MLP(hidden=(2,))
    objective = Objective(model, F.mse_loss, metric=F.mse_loss)
    trainer = Trainer(
        model=model,
        objective=objective,
        engine=MAML(inner=GradientDescent(lr=0.001, steps=steps)),
        episodes=Sinusoid(seed=0),
        plan=Plan(steps=1, meta_batch=1, val_tasks=1, eval_tasks=1),
    )
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, record=True)
    with progress(console, trainer, Metric(name="error", function=F.mse_loss, percent=False), label="maml") as show:
        is_followed = trainer.follow is not None
        for record in trainer:
            show(record)
    assert trainer.follow is None
    return is_followed, stream.getvalue(), console.export_text()


@pytest.mark.parametrize(("steps", "terminal", "expected"), [(120, True, True), (5, True, False), (120, False, False)])
def test_a_long_inner_loop_has_a_bar_of_its_own_on_a_terminal(steps, terminal, expected):
    is_followed, text, _ = shown(steps, terminal=terminal)
    assert is_followed == expected == ("inner steps, backward" in text and "120 of 120" in text)


@pytest.mark.parametrize("width", [80, 140])
def test_on_a_terminal_step_loss_speed_time_left_and_memory_are_shown(width):
    text = shown(5, terminal=True, width=width)[2]
    for part in (r"step 1 loss \d+\.\d{3} error", r"val ", r"[\d.]+(e[+]\d+)? steps/s", r"left"):
        assert re.search(part, text), part
    now, peak = re.search(r"memory ([\d,]+) MB, peak ([\d,]+) MB", text).groups()
    assert 20 < int(now.replace(",", "")) <= int(peak.replace(",", ""))
    assert shown(5, terminal=False)[2].count("\n") == 1 and "memory" not in shown(5, terminal=False)[2]


def test_resident_memory_follows_what_is_held():
    before, _ = resident()
    if before is None:
        pytest.skip("The system does not tell what is resident.")
    with mmap.mmap(-1, 2**25) as held:  # pages of its own: an allocator gives out what it still holds from before
        held.write(bytes([1]) * len(held))
        now, peak = resident()
    assert now - before > 0.8 * 2**25 and peak >= now


def test_where_the_system_tells_less_the_peak_is_that_of_resource(tmp_path, monkeypatch):
    now, peak = resident(tmp_path / "none")
    unit = 1 if sys.platform == "darwin" else 1024
    assert now is None and 0 <= unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**26
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  2000 kB\n")
    assert resident(tmp_path / "status")[0] is None
    (tmp_path / "status").write_text("VmHWM:\t  3000 kB\nVmRSS:\t  2000 kB\n")
    assert resident(tmp_path / "status") == (2_048_000, 3_072_000)
    monkeypatch.setattr("imaml.cli._memory_now.resident", lambda: (None, 2_500_000_000))
    assert memory_now(torch.device("cpu")) == "memory peak 2,500 MB"
    monkeypatch.setattr("imaml.cli._memory_now.resident", lambda: (None, None))
    assert memory_now(torch.device("cpu")) == "memory unknown"


def test_the_memory_of_a_device_stands_behind(monkeypatch):
    monkeypatch.setattr("imaml.cli._memory_now.resident", lambda: (4_000_000, 5_000_000))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 6_000_000)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7_000_000)
    assert memory_now(torch.device("cuda", 0)) == "memory 4 MB, peak 5 MB; cuda 6 MB, peak 7 MB"
