"""Computations that are kept in a folder: killed at any moment they go on, and end in the same bits."""

import errno
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import (
    FOMAML,
    MAML,
    Adam,
    CheckpointError,
    DivergenceError,
    GradientDescent,
    ImplicitMAML,
    Minibatches,
    Objective,
    RMSprop,
    Task,
    TaskBatch,
    TorchOptimizer,
)
from imaml._engine import journal as journal_module

STEPS = 9
ADAM = Adam(lr=0.05, steps=STEPS)
FORK = multiprocessing.get_context("fork")
CASES = {
    "all states": (MAML(inner=ADAM, linearize=False), {}),
    "few states": (MAML(inner=ADAM, checkpoints=2, regularization=0.1), {}),
    "no states": (MAML(inner=ADAM, checkpoints=0), {}),
    "on disk": (MAML(inner=ADAM, checkpoints=2, storage="disk"), {}),
    "truncated": (MAML(inner=ADAM, truncate=5, checkpoints=1, check_states=True), {}),
    "minibatches": (MAML(inner=ADAM, checkpoints=2), {"minibatches": True}),
    "dropout": (MAML(inner=ADAM, checkpoints=2), {"dropout": True}),
    "float32": (MAML(inner=ADAM, checkpoints=2), {"dtype": torch.float32}),
    "learned": (MAML(inner=RMSprop(lr=lambda meta: meta["log_lr"].exp(), steps=STEPS), checkpoints=2), {"meta": True}),
    "shared": (MAML(inner=ADAM, checkpoints=2, regularization=0.1), {"adapt": ["0"]}),
    "along the way": (MAML(inner=ADAM, checkpoints=2, outer_steps={2: 0.3, 6: 0.4, STEPS: 1.0}), {}),
    "statistics": (MAML(inner=ADAM, checkpoints=2, chunk_size=1), {"norm": True}),
    "microbatches": (MAML(inner=ADAM, checkpoints=2, microbatch_size=2), {}),
    "FOMAML": (FOMAML(inner=ADAM), {"dropout": True}),
    "implicit": (ImplicitMAML(inner=GradientDescent(lr=0.1, steps=STEPS), regularization=2.0), {}),
}


def problem(*, minibatches=False, dropout=False, dtype=torch.float64, meta=False, adapt=None, norm=False, tasks=2):
    """A small model and two tasks; always the same."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3 if dropout else 0.0), nn.Linear(4, 2)]
    model = nn.Sequential(*([nn.BatchNorm1d(3)] if norm else []), *layers).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / 2)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, y, xq, yq = drawn(tasks, 12, 3), drawn(tasks, 12, 2), drawn(tasks, 5, 3), drawn(tasks, 5, 2)
    support = Minibatches.of((x, y), batch_size=5, seed=3, tasks=True) if minibatches else (x[:, :6], y[:, :6])
    learned = {"log_lr": torch.tensor(-3.0, dtype=dtype, requires_grad=True)} if meta else None
    objective = Objective(model, F.mse_loss, adapt=adapt, meta=learned, buffers="update" if norm else None)
    return objective, TaskBatch(support=support, query=(xq, yq))


def outcome(engine, options, **call):
    """All that a call gives, in plain tensors."""
    objective, tasks = problem(**options)
    result = engine(objective, tasks, return_state=True, **call)
    result.loss.backward()
    report = {n: t for n, t in vars(result.report).items() if isinstance(t, torch.Tensor)}
    return {
        "loss": result.loss.detach(),
        "counts": torch.tensor([result.report.gradients, result.report.hvps]),
        "random": torch.get_rng_state(),
        **{f"grad {n}": p.grad for n, p in objective.parameters().items()},
        **{f"report {n}": t for n, t in report.items()},
        **{f"state {n}": t for n, t in result.state.parameters.items()},
        **{f"buffer {i}": t for i, t in enumerate(result.state.buffers)},
        **{f"statistic {n}": t for n, t in result.report.buffers.items()},
    }


def same(ours, theirs):
    return [
        n for n in theirs if not torch.equal(ours[n].view(-1).view(torch.uint8), theirs[n].view(-1).view(torch.uint8))
    ]


def killed(engine, options, folder, after):
    """A process that is killed when it has done so many steps; the exit code."""

    def run():
        done = 0

        def kill(step, direction):
            nonlocal done
            done += 1
            if done == after:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.manual_seed(5)
        outcome(engine, options, folder=folder, progress=kill)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("case", CASES)
def test_a_killed_process_is_gone_on_from_to_the_same_bits(case, tmp_path):
    engine, options = CASES[case]
    torch.manual_seed(5)
    expected, told = outcome(replace(engine), options), []
    backwards = engine.truncate or STEPS if isinstance(engine, MAML) else 0
    for after in sorted({1, 5, STEPS, STEPS + max(backwards - 2, 0)}):
        folder = tmp_path / str(after)
        assert killed(engine, options, folder, after) == -signal.SIGKILL
        assert (folder / "imaml-computation.json").exists()
        torch.manual_seed(77)  # another state than that of the process that was killed
        before = len(told)
        found = outcome(replace(engine), options, folder=folder, progress=lambda *step: told.append(step))
        assert same(found, expected) == []
        assert list(folder.iterdir()) == []
        chunks = 2 if engine.chunk_size == 1 else 1
        assert len(told) - before < chunks * (STEPS + backwards) or after < 6, "it began anew"


def test_one_that_is_killed_again_and_again_comes_to_an_end(tmp_path):
    engine, options = CASES["dropout"]
    torch.manual_seed(5)
    expected = outcome(replace(engine), options)
    kills = 0
    while killed(engine, options, tmp_path / "one", 8) == -signal.SIGKILL:
        kills += 1
        assert kills < 8
    assert kills >= 2
    for _ in range(kills):
        assert killed(engine, options, tmp_path / "other", 8) == -signal.SIGKILL
    torch.manual_seed(77)
    assert same(outcome(replace(engine), options, folder=tmp_path / "other"), expected) == []


class Stop(Exception):
    """Ends a call as a kill would, in this process."""


def stopping(after):
    told = []

    def progress(step, direction):
        told.append((step, direction))
        if len(told) == after:
            raise Stop

    return progress


def ragged():
    objective, batch = problem(tasks=5)
    sizes = (3, 5, 3, 5, 3)
    tasks = [Task(support=tuple(t[:n] for t in batch[i].support), query=batch[i].query) for i, n in enumerate(sizes)]
    return objective, tasks


@pytest.mark.parametrize("after", [4, 20, 40, 50])
def test_chunks_that_are_done_are_not_computed_again(after, tmp_path):
    objective, tasks = ragged()
    engine = MAML(inner=ADAM, checkpoints=2, chunk_size=2)  # of 2, 1 and 2 tasks
    expected = engine(objective, tasks, return_state=True)
    with pytest.raises(Stop):
        engine(objective, tasks, return_state=True, folder=tmp_path, progress=stopping(after))
    told = []
    result = replace(engine)(objective, tasks, return_state=True, folder=tmp_path, progress=lambda *a: told.append(a))
    done = after // (2 * STEPS)
    assert len(told) <= 2 * STEPS * (3 - done)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.report.support_loss, expected.report.support_loss)
    assert (result.report.gradients, result.report.hvps) == (expected.report.gradients, expected.report.hvps)
    for name, parameter in result.state.parameters.items():
        assert torch.equal(parameter, expected.state.parameters[name])


def test_a_training_that_goes_on_from_a_state(tmp_path):
    objective, tasks = problem(minibatches=True)
    engine = MAML(inner=ADAM, checkpoints=2)
    state = engine(objective, tasks, return_state=True).state
    expected, folder = engine.value_and_grad(objective, tasks, start=state), tmp_path / "a" / "b"
    told = []
    with pytest.raises(Stop):
        engine.value_and_grad(objective, tasks, start=state, folder=str(folder), progress=stopping(12))
    with pytest.raises(CheckpointError, match=r"start\.type is InnerState there\. Got none"):
        engine.value_and_grad(objective, tasks, folder=folder)
    found = engine.value_and_grad(
        objective, tasks, start=state, folder=folder, progress=lambda step, _: told.append(step)
    )
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(g, expected[1][n]) for n, g in found[1].items())
    assert min(told) == STEPS and max(told) < 2 * STEPS, "steps are counted through the whole training"


def test_calls_without_derivatives_and_skipped_tasks(tmp_path):
    objective, tasks = problem()
    engine = MAML(inner=ADAM, outer_steps={2: 0.3, STEPS: 1.0})
    with torch.no_grad():
        expected = engine(objective, tasks)
        with pytest.raises(Stop):
            engine(objective, tasks, folder=tmp_path, progress=stopping(8))
        found = engine(objective, tasks, folder=tmp_path)
    assert torch.equal(found.report.outer_losses, expected.report.outer_losses)
    tasks.support[0][1] = torch.nan
    skipping = MAML(inner=ADAM, checkpoints=2, on_nonfinite="skip")
    expected = skipping(objective, tasks)
    for after in (5, STEPS + 14):
        with pytest.raises(Stop):
            skipping(objective, tasks, folder=tmp_path, progress=stopping(after))
        found = skipping(objective, tasks, folder=tmp_path)
        assert torch.equal(found.loss, expected.loss) and found.report.skipped == (1,)
        assert found.report.gradients == expected.report.gradients


def interrupted(folder, engine=None, **options):
    engine = engine or MAML(inner=ADAM, checkpoints=2)
    objective, tasks = problem(**options)
    with pytest.raises(Stop):
        engine.value_and_grad(objective, tasks, folder=folder, progress=stopping(14))
    return engine, objective, tasks


def test_another_computation_is_refused_by_what_differs(tmp_path):
    engine, objective, tasks = interrupted(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    others = {
        "engine.inner.lr is 0.05 there. Got 0.06": (MAML(inner=Adam(lr=0.06, steps=STEPS), checkpoints=2), tasks),
        "engine.checkpoints is 2 there. Got 3": (MAML(inner=ADAM, checkpoints=3), tasks),
        r"tasks.0.query is": (engine, TaskBatch(support=tasks.support, query=tuple(t + 1 for t in tasks.query))),
        "engine.type is MAML there. Got FOMAML": (FOMAML(inner=ADAM), tasks),
    }
    for message, (other, batch) in others.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            other.value_and_grad(objective, batch, folder=tmp_path)
        assert "remove its files imaml-*" in str(caught.value)
    with torch.no_grad():
        objective.model[0].weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"parameters\.0\.weight is torch.float64"):
        engine.value_and_grad(objective, tasks, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"parameters\.0\.weight is"):
        engine.value_and_grad(problem(dtype=torch.float32)[0], tasks.to(dtype=torch.float32), folder=tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_source_that_gives_another_batch_after_the_interruption_is_an_error(tmp_path):
    objective, batch = problem(tasks=1)
    batches = [tuple(t[0, i : i + 4] for t in batch.support) for i in (0, 1, 2)]
    task = Task(support=Minibatches(lambda step: batches[step % 3]), query=batch[0].query)
    engine = MAML(inner=ADAM, checkpoints=2)
    with pytest.raises(Stop):
        engine.value_and_grad(objective, [task], folder=tmp_path, progress=stopping(14))
    batches[1] = batches[2]
    with pytest.raises(ValueError, match="gave another batch for inner step"):
        engine.value_and_grad(objective, [task], folder=tmp_path)


def test_files_of_others_stay_and_damaged_ones_are_named(tmp_path):
    mine = tmp_path / "imaml-notes.txt"
    mine.write_text("mine")
    engine, objective, tasks = interrupted(tmp_path)
    [progress] = tmp_path.glob("imaml-progress.pt")
    content = progress.read_bytes()
    progress.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"imaml-progress\.pt is truncated, damaged.*begin anew"):
        engine.value_and_grad(objective, tasks, folder=tmp_path)
    progress.write_bytes(content)
    (tmp_path / "imaml-state-3.pt.tmp").write_bytes(b"half a file")
    states = sorted(tmp_path.glob("imaml-state-*.pt"))
    assert states
    whole = states[0].read_bytes()
    states[0].write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(CheckpointError, match=states[0].name):
        engine.value_and_grad(objective, tasks, folder=tmp_path)
    states[0].write_bytes(whole)
    engine.value_and_grad(objective, tasks, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["imaml-notes.txt"]


def test_a_full_disk_says_what_room_is_missing_and_loses_nothing(tmp_path, monkeypatch):
    objective, tasks = problem()
    engine, told = MAML(inner=ADAM, checkpoints=2, storage="disk"), []
    expected = engine.value_and_grad(objective, tasks)

    def full(path, content, **options):
        if "state" in path.name and len(told) > 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(path, content, **options)

    save = journal_module.save_tensors
    size = 3 * 8 * 2 * sum(p.numel() for p in objective.parameters().values())  # three vectors of two tasks
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "save_tensors", full)
        with pytest.raises(OSError, match=f"{size * 6:,} bytes, 2 states of {size:,} and four more") as caught:
            engine.value_and_grad(objective, tasks, folder=tmp_path, progress=lambda *a: told.append(a))
    assert caught.value.errno == errno.ENOSPC
    found = engine.value_and_grad(objective, tasks, folder=tmp_path)
    assert torch.equal(found[0], expected[0])


def test_a_computation_that_ends_in_an_error_of_its_own_leaves_no_files(tmp_path):
    objective, tasks = problem()
    with pytest.raises(DivergenceError):
        MAML(inner=GradientDescent(lr=1e9, steps=STEPS))(objective, tasks, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_states_lie_in_the_folder_once_and_notes_are_few(tmp_path, monkeypatch):
    """No temporary file beside it; about 3 sqrt(K) notes, and never more states than kept ones and those between."""
    monkeypatch.setattr("imaml._strategies.storage.TemporaryFile", None)
    notes, most, write = [], [], journal_module.Journal.note_chunk
    monkeypatch.setattr(journal_module.Journal, "note_chunk", lambda self, note: [notes.append(1), write(self, note)])
    objective, tasks = problem()
    engine = MAML(inner=Adam(lr=0.01, steps=64), checkpoints=8, storage="disk")
    engine.value_and_grad(
        objective, tasks, folder=tmp_path, progress=lambda *a: most.append(len([*tmp_path.glob("*state*")]))
    )
    assert 8 <= len(notes) <= 3 * 8 + 4
    assert 8 <= max(most) <= 12


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (MAML(inner=ADAM, linearize=True), "linearize=True excludes: no file holds a graph"),
        (MAML(inner=ADAM, linearize=2), "linearize=2 excludes"),
        (MAML(inner=ADAM, chunk_size="auto"), "chunk_size='auto' excludes.*Expected a number or None"),
        (FOMAML(inner=ADAM, compile=True), "compile=True excludes"),
        (ImplicitMAML(inner=ADAM, warm_start=True), "warm_start=True excludes"),
        (ImplicitMAML(inner=ADAM, damping="auto"), "damping='auto' excludes"),
    ],
)
def test_what_cannot_be_kept(engine, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        engine.value_and_grad(*problem(), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        MAML(inner=ADAM)(*problem(), folder=tmp_path / "file")
    with pytest.raises(TypeError, match="`progress` must be a function"):
        MAML(inner=ADAM)(*problem(), progress=3)


@pytest.mark.parametrize("options", [{}, {"checkpoints": 1}, {"linearize": True}, {"truncate": 3, "linearize": False}])
def test_progress_is_told_of_each_step_once_in_each_direction(options):
    told = []
    MAML(inner=ADAM, **options)(*problem(), progress=lambda *step: told.append(step))
    backwards = options.get("truncate", STEPS)
    assert told == [(k, "forward") for k in range(STEPS)] + [
        (k, "backward") for k in reversed(range(STEPS - backwards, STEPS))
    ]


def test_a_call_that_takes_no_step_needs_no_batch_past_the_end_of_its_source(tmp_path):
    objective, tasks = problem()
    once = TaskBatch(support=Minibatches([tasks.support]), query=tasks.query)
    state = MAML(inner=replace(ADAM, steps=1))(objective, once, return_state=True).state
    still = MAML(inner=replace(ADAM, steps=0))
    kept = still(objective, once, start=state, folder=tmp_path / "run").loss
    torch.testing.assert_close(kept, still(objective, once, start=state).loss)


def test_progress_is_told_once_of_steps_that_tasks_take_one_by_one():
    told, inner = [], TorchOptimizer(torch.optim.SGD, steps=3, lr=0.1)
    FOMAML(inner=inner)(*problem(), progress=lambda *step: told.append(step))
    assert told == [(k, "forward") for k in range(3)]
