"""Inner states off the device: the same bits, memory flat in K, nothing left behind."""

import errno
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, Adam, DivergenceError, GradientDescent, Objective, RMSprop, Task
from imaml._strategies import storage as storage_module
from imaml._strategies.storage import InPinnedMemory, store
from tests.engine.cases import problem, transformer
from tests.engine.test_memory import flat, peaks
from tests.engine.test_memory import problem as larger_problem

STEPS = 7
INNER = GradientDescent(lr=0.1, steps=STEPS, momentum=0.9)
OFF = ("cpu", "disk")


def equal(engine, reference, objective, tasks):
    ours, theirs = (e.value_and_grad(objective, tasks) for e in (engine, reference))
    return torch.equal(ours[0], theirs[0]) and all(torch.equal(g, theirs[1][n]) for n, g in ours[1].items())


@pytest.fixture
def files(monkeypatch, tmp_path):
    """The temporary files that were made; their folder."""
    made, make = [], storage_module.TemporaryFile
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage_module, "TemporaryFile", lambda **options: made.append(make(**options)) or made[-1])
    return SimpleNamespace(made=made, folder=tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoints": 0}, {"checkpoints": 2}, {"truncate": 3, "checkpoints": 1}, {"truncate": 0}, {"chunk_size": 2}],
    ids=str,
)
def test_the_same_bits_as_on_the_device(options):
    _, objective, tasks = problem()
    for inner in (INNER, Adam(lr=0.01, steps=STEPS)):
        reference = MAML(inner=inner, linearize=False, **options)
        for storage in OFF:
            assert equal(MAML(inner=inner, storage=storage, **options), reference, objective, tasks)


def test_the_same_bits_where_kernels_depend_on_strides():
    """Theta, shared by the tasks, takes another kernel of attention than parameters of each task's own."""
    _, objective, tasks = problem(transformer)
    for options in ({}, {"checkpoints": 1}):
        reference = MAML(inner=INNER, linearize=False, **options)
        assert equal(MAML(inner=INNER, storage="disk", **options), reference, objective, tasks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_ragged_tasks_and_learned_step_sizes(dtype):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    objective = Objective(model, F.mse_loss, adapt=["0"], meta={"log_lr": torch.tensor(-2.0)})
    tasks = [
        Task(support=(torch.randn(n, 4, dtype=dtype), torch.randn(n, 2, dtype=dtype)), query=(x, x[:, :2]))
        for n, x in zip((3, 5, 3), torch.randn(3, 6, 4, dtype=dtype), strict=True)
    ]
    inner = RMSprop(lr=lambda meta: meta["log_lr"].exp(), steps=STEPS)
    assert equal(MAML(inner=inner, storage="disk"), MAML(inner=inner, linearize=False), objective, tasks)


def test_a_store_gives_back_what_it_got_in_the_least_room(files):
    first = (torch.randn(2, 3), torch.tensor([torch.nan, -0.0, torch.inf], dtype=torch.bfloat16), torch.arange(4))
    second = (torch.randn(3, 2).t(), torch.zeros(3, dtype=torch.bfloat16), torch.ones(1).long().expand(4))
    with store("disk", torch.device("cpu"), 2) as kept:
        kept[1], kept[4] = first, second
        kept.pop(4)
        kept[3] = second
        for expected, got in ((first, kept[1]), (second, kept.pop(3)), (first, kept.pop(1))):
            for t, back in zip(expected, got, strict=True):
                assert back.dtype == t.dtype and torch.equal(back.view(torch.uint8), t.contiguous().view(torch.uint8))
        assert files.made[0].seek(0, 2) == 2 * (24 + 6 + 32)


def test_no_graphs_are_kept_off_the_device():
    _, objective, tasks = problem()
    counts = [
        MAML(inner=Adam(lr=0.01, steps=STEPS), **options)(objective, tasks).report.gradients
        for options in ({}, {"linearize": False}, {"storage": "cpu"}, {"storage": "disk"})
    ]
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_memory_is_flat_in_the_number_of_inner_steps():
    """Of all states, one is held beside what a single step needs."""
    one, *more = peaks(MAML, steps=(1, 3, 12), storage="disk")
    assert flat(more)
    assert more[-1] <= one + 1.1 * larger_problem()[2]


class Interrupting(nn.Module):
    """Raises at one of its evaluations."""

    def __init__(self, error, at):
        super().__init__()
        self.linear, self.error, self.left = nn.Linear(3, 2).double(), error, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.linear(x)


@pytest.mark.parametrize("at", [3, STEPS + 4], ids=["in the inner loop", "in the sweep"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_is_left_behind_by_an_interrupted_call(files, error, at):
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    tasks = [Task(support=(x[0], x[0, :, :2]), query=(x[0], x[0, :, :2]))]
    engine = MAML(inner=INNER, storage="disk", chunk_size=1)
    engine.value_and_grad(Objective(Interrupting(error, 0), F.mse_loss), tasks)
    with pytest.raises(type(error)):
        engine.value_and_grad(Objective(Interrupting(error, at), F.mse_loss), tasks)
    assert len(files.made) == 2
    assert all(file.closed for file in files.made) and not list(files.folder.iterdir())


def test_a_diverging_inner_loop_closes_its_file(files):
    _, objective, tasks = problem()
    with pytest.raises(DivergenceError):
        MAML(inner=GradientDescent(lr=1e9, steps=STEPS), storage="disk")(objective, tasks)
    assert files.made and all(file.closed for file in files.made)


def test_a_full_disk_is_an_error_that_says_how_much_room_is_needed(monkeypatch, tmp_path):
    model, objective, tasks = problem()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage_module, "TemporaryFile", partial(open, "/dev/full", "r+b"))
    size = 2 * 8 * 3 * sum(p.numel() for p in model.parameters())  # phi and momentum of three tasks in float64
    for options, states in (({}, STEPS - 1), ({"checkpoints": 2}, 2), ({"truncate": 3}, 2)):
        with pytest.raises(OSError, match=f"{tmp_path}.*{size * states:,} bytes, {states} states.*TMPDIR") as caught:
            MAML(inner=INNER, storage="disk", **options)(objective, tasks)
        assert caught.value.errno == errno.ENOSPC


def test_what_cannot_be():
    with pytest.raises(ValueError, match="device, cpu, disk. Got 'gpu'"):
        MAML(inner=INNER, storage="gpu")
    for storage in OFF:
        with pytest.raises(ValueError, match=f"Expected storage='device'. Got '{storage}'"):
            MAML(inner=INNER, storage=storage, linearize=True)
    MAML(inner=INNER, storage="device", linearize=True)


@pytest.fixture
def streams(monkeypatch):
    """CUDA's streams and pinned memory replaced by none, so that the bookkeeping runs anywhere."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **options: empty(*args, **options))
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def test_pinned_memory_fetches_the_state_before_ahead(streams, monkeypatch):
    fetched, fetch = [], InPinnedMemory._fetch
    monkeypatch.setattr(InPinnedMemory, "_fetch", lambda self, step: fetched.append(step) or fetch(self, step))
    kept = InPinnedMemory(torch.device("cpu"))
    for step in (1, 4, 7):
        kept[step] = (torch.full((2,), step),)
    assert kept.pop(7)[0].tolist() == [7, 7] and fetched == [7, 4]
    kept[6] = (torch.full((2,), 6),)
    assert [kept.pop(step)[0][0].item() for step in (6, 4, 1)] == [6, 4, 1]
    assert fetched == [7, 4, 6, 4, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{}, {"checkpoints": 2}], ids=str)
def test_the_same_bits_from_pinned_memory(options):
    model, _, tasks = problem()
    objective = Objective(model.cuda(), F.cross_entropy)
    for storage in OFF:
        engine = MAML(inner=INNER, storage=storage, **options)
        assert equal(engine, MAML(inner=INNER, linearize=False, **options), objective, tasks.to("cuda"))
