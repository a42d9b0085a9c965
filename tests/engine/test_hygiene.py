"""What a long run must not do: grow, or leave files and processes behind."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, NonFiniteError, Objective, Task
from imaml._engine.remembered import Recent
from imaml._strategies import warm_start
from tests.engine.cases import CLASSES, mlp

INNER = GradientDescent(lr=0.1, steps=2)
ENGINES = {
    "MAML": MAML(inner=INNER),
    "MAML, chunks": MAML(inner=INNER, chunk_size=2, checkpoints=1, microbatch_size=4),
    "MAML, on disk": MAML(inner=INNER, storage="disk"),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(inner=INNER, regularization=2.0, warm_start=True),
    "skip": ImplicitMAML(inner=INNER, regularization=2.0, solver=CG(max_steps=5), on_nonfinite="skip"),
}


def tasks(step, nan=False):
    """Tasks that never recur, in shapes that seldom do."""
    generator = torch.Generator().manual_seed(step)

    def batch(examples):
        inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(CLASSES, (examples,), generator=generator)

    made = [Task(support=batch(3 + step % 9), query=batch(2)) for _ in range(3)]
    if nan:
        made[1].query[0][:] = torch.nan
    return made


def counts():
    """Live tensors and their bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    live = [t for t in tensors if t.layout is torch.strided]  # others, which parametrised tests hold, have no storage
    return len(live), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}.values())


@pytest.mark.parametrize("name", ENGINES)
def test_no_tensor_is_left_by_a_step_whatever_its_shapes(name, monkeypatch):
    monkeypatch.setattr(Recent, "most", 3)
    monkeypatch.setattr(warm_start, "KEPT", 4 * 1024)
    engine, model = ENGINES[name], mlp()
    objective, optimizer = Objective(model, F.cross_entropy), torch.optim.Adam(model.parameters())

    def train(steps):
        for step in steps:
            optimizer.zero_grad()
            engine(objective, tasks(step, nan=name == "skip")).loss.backward()
            optimizer.step()

    train(range(5))
    before = counts()
    train(range(5, 25))
    assert counts() == before
    assert len(engine._memory.footprints) == (3 if engine.chunk_size is None else 0)
    assert len(engine._memory.sliced(objective)) == (3 if engine.microbatch_size else 0)


def test_warm_starts_keep_the_solutions_of_the_tasks_solved_last(monkeypatch):
    n = sum(p.numel() for p in mlp().parameters())
    monkeypatch.setattr(warm_start, "KEPT", 7 * (1024 + 8 * n))
    engine, objective = (
        ImplicitMAML(inner=INNER, solver=CG(max_steps=3), warm_start=True),
        Objective(mlp(), F.cross_entropy),
    )
    for step in (1, 2, 1, 3):  # three tasks each
        engine.value_and_grad(objective, tasks(step))
    kept = engine._solutions
    assert len(kept.known) == 7
    like = torch.zeros(3, n, dtype=torch.float64)
    found = [kept.of(_stacked(tasks(step)), like) for step in (1, 2, 3)]
    assert [0 if f is None else int((f != 0).any(1).sum()) for f in found] == [3, 1, 3]
    monkeypatch.setattr(warm_start, "KEPT", 0)
    engine.value_and_grad(objective, tasks(4))
    assert len(kept.known) == 3


def _stacked(made):
    return tuple(torch.stack([task.support[i] for task in made]) for i in (0, 1))


def test_the_newest_entries_are_kept(monkeypatch):
    monkeypatch.setattr(Recent, "most", 2)
    recent = Recent()
    for key in "abac":
        recent[key] = key
    assert list(recent) == ["a", "c"]


def files():
    """Open files by where they lead."""
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))


def _is_open(fd):
    return Path(f"/proc/self/fd/{fd}").exists() or os.path.lexists(f"/proc/self/fd/{fd}")


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ENGINES)
def test_no_file_and_no_process_is_left_by_calls_or_their_errors(name):
    objective = Objective(mlp(), F.cross_entropy)
    engine = ENGINES[name]
    before = files(), children()
    for step in range(3):
        engine.value_and_grad(objective, tasks(step))
        bad = tasks(step, nan=True)
        for task in bad:
            task.query[0][:] = torch.nan
        with pytest.raises(NonFiniteError):
            engine.value_and_grad(objective, bad)
        with pytest.raises(RuntimeError):
            engine.value_and_grad(Objective(mlp(), interrupted), tasks(step))
    assert (files(), children()) == before


def interrupted(output, target):
    raise RuntimeError
