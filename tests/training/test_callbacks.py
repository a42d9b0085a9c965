"""Callbacks: their order, what goes wrong in them, and what TensorBoard and W&B are told, in stand-ins for both."""

import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from imaml.training import Callbacks, Evaluation, StepRecord, TensorBoard, WandB
from tests.pages import read, sections

RESULT = {"mean": 0.5, "interval": 0.1, "tasks": 5, "skipped": 0, "steps": 3, "metric": "MSE", "config": {"a": 1}}


def record(step):
    val = Evaluation(mean=2.0, interval=0.5, tasks=4) if step == 2 else None
    solver = {"status": {"converged": 3}, "steps": 2.0, "residual": 0.25}
    return StepRecord(
        step=step, loss=1.5, metric=0.5, learning_rate=0.1, milliseconds=2.0, seconds=0.1, val=val, solver=solver
    )


class Notes:
    def __init__(self, calls, name, fails=()):
        self.calls, self.name, self.fails = calls, name, fails

    def _note(self, method, *args):
        self.calls.append((self.name, method, *args))
        if method in self.fails:
            raise OSError(f"{method} is broken")

    def start(self, config, step):
        self._note("start", config, step)

    def log(self, record):
        self._note("log", record.step)

    def end(self, result):
        self._note("end", result)


def test_the_calls_come_in_order_and_the_end_once():
    calls = []
    callbacks = Callbacks([Notes(calls, "a"), Notes(calls, "b")])
    callbacks.start({"x": 1}, 4)
    callbacks.log(record(5))
    callbacks.end(RESULT)
    callbacks.end(None)
    assert [call for call in calls if call[0] == "a"] == [
        ("a", "start", {"x": 1}, 4),
        ("a", "log", 5),
        ("a", "end", RESULT),
    ]
    assert [call[1:] for call in calls if call[0] == "b"] == [call[1:] for call in calls if call[0] == "a"]


def test_one_that_fails_on_the_way_is_left_out_and_the_others_go_on(caplog):
    calls = []
    callbacks = Callbacks([Notes(calls, "a", fails=("log",)), Notes(calls, "b", fails=("end",))])
    callbacks.start({}, 0)
    with caplog.at_level(logging.ERROR, logger="imaml"):
        for step in (1, 2):
            callbacks.log(record(step))
        callbacks.end(None)
    assert [call[:3] for call in calls if call[0] == "a"] == [("a", "start", {}), ("a", "log", 1)]
    assert [call[1] for call in calls if call[0] == "b"] == ["start", "log", "log", "end"]
    assert [r.message for r in caplog.records] == [
        "Notes failed and is left out (OSError: log is broken).",
        "Notes failed and is left out (OSError: end is broken).",
    ]


def test_one_that_cannot_start_stops_the_training_and_the_one_before_it_ends():
    calls = []
    callbacks = Callbacks([Notes(calls, "a"), Notes(calls, "b", fails=("start",)), Notes(calls, "c")])
    with pytest.raises(ValueError, match=r"Notes cannot follow the training \(OSError: start is broken\)"):
        callbacks.start({}, 0)
    assert [call[:2] for call in calls] == [("a", "start"), ("b", "start"), ("a", "end")]


@pytest.fixture
def writers(monkeypatch):
    """The writers that a stand-in for TensorBoard has made."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            self.folder, self.purge_step, self.scalars, self.texts, self.closed = folder, purge_step, [], {}, False
            made.append(self)

        def add_scalar(self, *args):
            self.scalars.append(args)

        def add_text(self, name, text):
            self.texts[name] = text

        def close(self):
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_tensorboard_gets_every_number_and_hides_steps_that_come_again(tmp_path, writers):
    callback = TensorBoard(tmp_path)
    callback.start({"strategy": "maml"}, 0)
    callback.log(record(1))
    callback.log(record(2))
    callback.end(None)
    again = TensorBoard(tmp_path)
    again.start({"strategy": "maml"}, 1)
    again.log(record(2))
    again.end(RESULT)
    first, second = writers
    assert (first.folder, first.purge_step, second.purge_step) == (str(tmp_path), None, 2)
    assert '"strategy": "maml"' in first.texts["config"] and not second.texts
    assert ("loss", 1.5, 1) in first.scalars and ("solver/status/converged", 3, 1) in first.scalars
    assert ("val/mean", 2.0, 2) in second.scalars and ("test/mean", 0.5, 3) in second.scalars
    assert "step" not in {name for name, *_ in first.scalars} and "config/a" not in {n for n, *_ in second.scalars}
    assert first.closed and second.closed and all(not name.startswith("test") for name, *_ in first.scalars)


@pytest.fixture
def runs(monkeypatch):
    """The runs of a stand-in for W&B, which keeps the steps of an id as the service does."""
    service, made = {}, []

    def init(**settings):
        steps = service.setdefault(settings["id"], [])
        run = SimpleNamespace(
            settings=settings, steps=steps, starting_step=max(steps) + 1 if steps else 0, logged=[], summary={}
        )
        run.log = lambda values, step: (steps.append(step), run.logged.append(values))
        run.finish = lambda: setattr(run, "finished", True)
        made.append(run)
        return run

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


def test_wandb_goes_on_with_its_run_and_sends_no_step_twice(tmp_path, runs):
    callback = WandB(tmp_path / "run", project="mine")
    (tmp_path / "run").mkdir()
    callback.start({"strategy": "maml"}, 0)
    for step in (1, 2, 3):
        callback.log(record(step))
    again = WandB(tmp_path / "run", project="mine")
    again.start({"strategy": "maml"}, 1)
    for step in (2, 3, 4):
        again.log(record(step))
    again.end(RESULT)
    assert runs[1].steps == [1, 2, 3, 4]
    first, second = (run.settings for run in runs)
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert first["config"] == {"strategy": "maml"} and first["id"]
    assert runs[0].logged[1]["val/mean"] == 2.0 and "step" not in runs[0].logged[1]
    assert runs[1].summary["test/mean"] == 0.5 and runs[1].finished


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [(TensorBoard, "torch.utils.tensorboard", "tensorboard"), (WandB, "wandb", "wandb")],
)
def test_without_its_package_one_says_what_to_install(tmp_path, monkeypatch, kind, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{kind.__name__} needs {package}: pip install 'imaml\[tracking\]'"):
        kind(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("default")  # those of tensorboard's own
def test_the_real_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, done, result in (((1, 2, 3), 0, None), ((2, 3, 4), 1, RESULT)):
        callback = TensorBoard(tmp_path)
        callback.start({"strategy": "maml"}, done)
        for step in steps:
            callback.log(record(step))
        callback.end(result)
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in shown.Scalars("test/mean")] == [0.5]


def test_the_callback_of_the_program_page_prints_a_step(capsys):
    (block,) = sections(read("docs/program.md"))["Curves elsewhere"]
    page: dict = {}
    exec(block, page)
    page["callbacks"].log(record(7))
    assert capsys.readouterr().out == "7 1.5\n"
