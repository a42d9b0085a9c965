"""JAX beside this library: the pipe between the processes, the programs in JAX, and the page with the goals."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import against_jax, one
from benchmarks.goals import Goal
from benchmarks.pipes import Process, cpu_seconds
from benchmarks.reference import flat, reference
from benchmarks.rivals import METHODS, environment
from benchmarks.rivals.jax import Elsewhere
from benchmarks.workloads import WORKLOADS
from imaml.measure import Timing
from tests.pages import ROOT

STAND_IN = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.pipes import serve_call

def prepare():
    print("printed by the prepared call")
    return lambda: sum(range(200_000))

def save(path, found):
    open(path, "w").write(str(found))

serve_call(prepare, save, memory=lambda _: {{"bytes": 12}}, fail=lambda _: 1 / 0, end=lambda _: sys.exit(3))
"""
IN_JAX = ["JAX", "JAX, forward-over-reverse", "JAX, leanest", "JAX, implicit"]
NEEDS_JAX = pytest.mark.skipif(
    "jax" not in environment.versions(),
    reason="JAX has no environment of its own here: `python -m benchmarks.rivals.environment` makes it",
)


@pytest.fixture
def process():
    """A process that answers as JAX's does, in plain Python."""
    started = Process([sys.executable, "-c", STAND_IN.format(root=str(ROOT))], timeout=60.0)
    yield started
    started.close()


def test_a_process_answers_for_its_calls(process, tmp_path):
    first, later = process.ask("first"), process.ask("call 3")
    assert first.keys() == later.keys() == {"cpu", "wall"}
    assert min(*first.values(), *later.values()) > 0
    assert process.ask("memory") == {"bytes": 12}
    file = tmp_path / "with a blank"
    assert process.ask(f"gradient {file}") == {}
    assert file.read_text() == str(sum(range(200_000)))


def test_what_fails_there_is_raised_here_and_the_process_goes_on(process):
    with pytest.raises(RuntimeError, match="^ZeroDivisionError: division by zero$"):
        process.ask("fail")
    with pytest.raises(RuntimeError, match="^KeyError: 'nonsense'$"):
        process.ask("nonsense")
    assert process.ask("memory") == {"bytes": 12}


def test_a_process_that_ends_is_told_by_its_exit_code(process):
    for _ in range(2):  # while it is asked, and when it is gone
        with pytest.raises(RuntimeError, match="exit code 3"):
            process.ask("end")


def test_an_answer_that_does_not_come_is_not_waited_for():
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    with pytest.raises(RuntimeError, match=r"took more than 0\.2 s"):
        process.ask("anything")


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
def test_the_time_of_started_processes_counts(ended):
    if not ended and not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells the processor time of a process that still runs")
    program = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        started.stdout.readline()
        if ended:
            started.communicate(b"\n")
        spent = cpu_seconds() - before
        started.kill()
    assert 0.4 < spent < 30


class Counting:
    """In the place of a method's process: each call takes a known time."""

    def __init__(self, cpu, gradient, failure=None):
        self.cpu, self.vector, self.failure, self.turns, self.closed = cpu, gradient, failure, [], False

    def fail(self):
        raise RuntimeError(self.failure)

    def start(self):
        if self.failure:
            self.fail()
        return {"cpu": 10 * self.cpu, "wall": 0.0}

    def seconds(self, calls=1):
        self.turns.append(calls)
        return {"cpu": self.cpu * len(self.turns), "wall": 0.0}

    def gradient(self):
        return torch.tensor(self.vector)

    def peak_memory(self):
        return 5_000_000

    def close(self):
        self.closed = True


@pytest.fixture
def rows(monkeypatch):
    made = []

    def started(method, workload, steps, cache):
        kinds = {"imaml MAML": (2.0, [3.0, 4.0]), "JAX": (1.0, [3.0, 4.5])}
        cpu, gradient = kinds.get(method, (1.0, [0.0, 0.0]))
        made.append(Counting(cpu, gradient, None if method in kinds else "it is not there"))
        return made[-1]

    monkeypatch.setattr(against_jax, "started", started)
    found = against_jax.Turns("tiny", 1, ["imaml MAML", "JAX", "create_graph loop"], 8.4).measure(3, 60.0)
    assert [process.turns for process in made if process.turns] == [[1, 1, 4, 4, 4], [1, 1, 8, 8, 8]]
    assert all(process.closed for process in made)
    return found


def test_the_methods_take_turns_and_what_fails_has_a_reason(rows):
    ours, jax, loop = rows
    assert (ours["cpu"], jax["cpu"], ours["spread"], ours["rounds"]) == (8.0, 4.0, 4.0, 3)
    assert (ours["first_cold"], ours.get("first_warm"), jax["first_warm"]) == (20.0, None, 10.0)
    assert ours["off_jax"] == pytest.approx(0.5 / (9 + 20.25) ** 0.5) and jax["off_jax"] == 0.0
    assert loop == {"method": "create_graph loop", "reason": "it is not there"}


def test_a_slow_call_is_a_turn_and_time_that_is_over_ends_the_rounds(monkeypatch):
    process = Counting(9.0, [1.0])
    monkeypatch.setattr(against_jax, "started", lambda *_: process)
    (row,) = against_jax.Turns("tiny", 1, ["imaml MAML"], 1.0).measure(5, 0.0)
    assert process.turns == [1] and (row["cpu"], row["rounds"]) == (9.0, 1)


def test_a_process_that_dies_in_its_turn_has_a_reason(monkeypatch):
    process = Counting(9.0, [1.0])
    monkeypatch.setattr(against_jax, "started", lambda *_: process)
    monkeypatch.setattr(process, "seconds", lambda calls=1: process.fail())
    monkeypatch.setattr(process, "start", lambda: {"cpu": 1.0, "wall": 1.0})
    process.failure = "the process ended with exit code -9"
    (row,) = against_jax.Turns("tiny", 1, ["imaml MAML"], 1.0).measure(5, 60.0)
    assert row["reason"] == process.failure and process.closed


def test_the_page_has_every_row_and_the_goals(rows, tmp_path, monkeypatch):
    goal = Goal(workload="tiny", steps=1, quantity="seconds", ours="imaml MAML", theirs="JAX", factor=1.5)
    monkeypatch.setattr(against_jax, "BESIDE_JAX", (goal,))
    about = {"cpu": "a processor", "torch": "2", "jax": "0", "load": 1.0}
    run = {"workload": "tiny", "steps": 1, "about": about, "rows": rows}
    (tmp_path / "tiny-1.json").write_text(json.dumps(run))
    lines = against_jax.page(tmp_path).splitlines()
    assert "| imaml MAML | 8000 | 2.00 | 4000 | 20.0 |  | 5 | 9e-02 | 3 |" in lines
    assert "| create_graph loop | it is not there |  |  |  |  |  |  |  |" in lines
    assert "| tiny, K = 1: time of imaml MAML / JAX | 1.50 | 2.00 | **no** |" in lines


def test_what_is_measured_by_default_has_what_the_goals_compare():
    for goal in against_jax.BESIDE_JAX:
        methods = against_jax.fitting(goal.workload, None)
        assert goal.steps in against_jax.STEPS[goal.workload]
        assert goal.ours in methods and (goal.theirs is None or goal.theirs in methods), goal.title


def test_without_jax_the_reason_says_what_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "JAX", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.rivals\.environment"):
        METHODS["JAX"].prepare(WORKLOADS["tiny"].problem(1))


def test_an_environment_that_cannot_be_made_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "FOLDER", tmp_path / "rivals")
    monkeypatch.setattr(environment, "JAX", tmp_path / "jax")
    failed = subprocess.CompletedProcess([], 1, "", "first line\nno such index\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: failed)
    assert environment.install()["jax"] == "no such index"


@NEEDS_JAX
@pytest.mark.parametrize("name", IN_JAX)
def test_meta_gradients_in_jax_are_right(name):
    method = METHODS[name]
    workload = WORKLOADS["small" if "leanest" in name else "tiny"]
    problem = workload.problem(3, torch.float64)
    call = method.prepare(problem)
    try:
        exact = reference(problem, method.family)
        assert (flat(call()) - exact).norm() <= 1e-12 * exact.norm()
        assert torch.equal(call.gradient(), flat(call()))
        assert call.peak_memory() >= exact.numel() * 8
        assert call.timed(2).median > 0
    finally:
        call.close()


class StandIn(Elsewhere):
    """A call in another process, without the process."""

    def __init__(self):
        pass

    def start(self):
        return {"cpu": 7.0, "wall": 8.0}

    def timed(self, repeats):
        return Timing(median=float(repeats), spread=0.5)

    def peak_memory(self):
        return 12

    def __del__(self):
        pass


def test_each_pass_asks_the_other_process(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "changed by the last pass")
    method, workload = type("Prepared", (), {"prepare": lambda problem: StandIn()}), WORKLOADS["tiny"]
    assert one.memory(method, workload, 1, 1)["bytes"] == 12
    assert one.count(method, workload, 1, 1) == {}
    assert one.time(method, workload, 1, 3)["seconds"] == 3.0
    assert one.first(method, workload, 1, 1) == {"first": 7.0}


def test_the_first_call_is_timed_with_what_it_compiles(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "changed by what is tested")
    begun = time.process_time()
    assert 0 < one.first(METHODS["imaml FOMAML"], WORKLOADS["tiny"], 1, 1)["first"] <= time.process_time() - begun + 1
