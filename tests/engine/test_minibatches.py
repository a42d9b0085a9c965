"""Another batch in each inner step, against one graph over all steps in plain torch."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    AdamW,
    GradientDescent,
    ImplicitMAML,
    InnerOptimizer,
    MetaGradient,
    Minibatches,
    NewtonCG,
    Objective,
    RMSprop,
    Task,
    TaskBatch,
    TorchOptimizer,
)
from tests.engine.unrolled_training import (
    EXAMPLES,
    UPDATES,
    Values,
    close,
    make_data,
    make_model,
    make_weights,
    train,
    weighted,
)

STEPS = 7
SETTINGS: dict[str, InnerOptimizer] = {
    "gradient descent": GradientDescent(lr=0.05, steps=STEPS),
    "nesterov": GradientDescent(lr=0.05, steps=STEPS, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adam": Adam(lr=0.05, steps=STEPS, betas=(0.8, 0.9), eps=1e-3),
    "adamw": AdamW(lr=0.05, steps=STEPS, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2),
    "rmsprop": RMSprop(lr=0.05, steps=STEPS, alpha=0.7, eps=1e-3, momentum=0.5),
}
QUERY = make_data(6, seed=3)


class Noisy:
    """A map-style data set whose examples are drawn anew whenever they are asked for."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        self.x, self.y = make_data(examples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4, dtype=torch.float64) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[i] + 0.1 * noise, self.y[i]


def _batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return [make_data(3 + k % 2, seed=10 + k) for k in range(steps)]


def _drawn_by_step(step: int) -> tuple[Tensor, Tensor]:
    return make_data(4, seed=20 + step)


def _collate(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in examples]) * 2, torch.stack([y for _, y in examples])


def _of_dict() -> Minibatches:
    x, y = make_data()
    return Minibatches.of({"x": x, "y": y}, batch_size=4).map(lambda batch: (batch["x"], batch["y"]))


SOURCES: dict[str, Callable[[], Minibatches]] = {
    "a list": lambda: Minibatches(_batches()),
    "a function": lambda: Minibatches(_drawn_by_step),
    "tensors": lambda: Minibatches.of(make_data(), batch_size=4, seed=5),
    "tensors, full batches": lambda: Minibatches.of(make_data(), batch_size=4, drop_last=True),
    "tensors as they stand": lambda: Minibatches.of(make_data(), batch_size=4, shuffle=False),
    "a dict of tensors": _of_dict,
    "a data set": lambda: Minibatches.of(TensorDataset(*make_data()), batch_size=4, seed=5),
    "a data set with random augmentation": lambda: Minibatches.of(Noisy(), batch_size=4),
    "a data set with its collate function": lambda: Minibatches.of(Noisy(), batch_size=4, collate_fn=_collate),
    "a list of examples": lambda: Minibatches.of(list(zip(*make_data(), strict=True)), batch_size=4),
}


def _objective(model: nn.Module, **options: Any) -> Objective:
    return Objective(model, F.cross_entropy, **options)


def _weighted(model: nn.Module, **options: Any) -> tuple[Objective, dict[str, Tensor]]:
    meta = {"w": make_weights()}
    return Objective(model, weighted, outer_loss=F.cross_entropy, meta=meta, **options), meta


def _with_indices(**options: Any) -> Minibatches:
    return Minibatches.of(make_data(), batch_size=4, seed=5, indices=True, **options)


def _expected(model: nn.Module, meta: Values, source: Minibatches, name: str, **options: Any) -> tuple[Tensor, Values]:
    batches = [source.at(k) for k in range(STEPS)]
    return train(model, meta, batches, QUERY, UPDATES[name], **options)[:2]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["gradient descent", "adamw"])
def test_every_source(source: str, name: str) -> None:
    model, minibatches = make_model(), SOURCES[source]()
    loss, gradients = _expected(model, {}, SOURCES[source](), name)
    task = Task(support=minibatches, query=QUERY)
    got_loss, got = MAML(inner=SETTINGS[name], checkpoints=2).value_and_grad(_objective(model), [task])
    assert (got_loss - loss).abs() <= 1e-12
    close(got, gradients)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoints": 0},
        {"checkpoints": 2},
        {"storage": "disk"},
        {"linearize": True},
        {"linearize": 1},
        {"linearize": 3, "checkpoints": 1},
        {"hvp": "forward-over-reverse"},
        {"regularization": 0.3},
        {"truncate": 3},
        {"microbatch_size": 3},
        {"recompute": [nn.Tanh]},
        {"chunk_size": 1},
        {"chunk_size": "auto"},
    ],
    ids=str,
)
def test_a_weight_for_every_example(name: str, options: dict[str, Any]) -> None:
    model, source = make_model(), _with_indices()
    objective, meta = _weighted(model)
    damping = options.get("regularization", 0.0)
    constant = STEPS - options["truncate"] if "truncate" in options else 0
    loss, gradients = _expected(model, meta, source, name, damping=damping, constant=constant)
    engine = MAML(inner=SETTINGS[name], **options)
    got_loss, got = engine.value_and_grad(objective, [Task(support=source, query=QUERY)])
    assert (got_loss - loss).abs() <= 1e-12
    close(got, gradients)


def test_products_by_finite_differences_see_the_batch_of_the_step() -> None:
    model, source = make_model(), _with_indices()
    objective, meta = _weighted(model)
    gradients = _expected(model, meta, source, "gradient descent")[1]
    engine = MAML(inner=SETTINGS["gradient descent"], hvp="finite-difference")
    close(engine.value_and_grad(objective, [Task(support=source, query=QUERY)])[1], gradients, 1e-5)


def test_compiled_derivatives_see_the_batch_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    model, source = make_model(), _with_indices()  # the last batch of an epoch has another shape
    objective, meta = _weighted(model)
    gradients = _expected(model, meta, source, "gradient descent")[1]
    engine = MAML(inner=SETTINGS["gradient descent"], compile=True, compile_budget=600.0)
    for _ in range(2):
        close(engine.value_and_grad(objective, [Task(support=source, query=QUERY)])[1], gradients, 1e-9)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 3}, {"recompute": [nn.Tanh]}], ids=str)
def test_the_first_order_gradient_is_that_at_what_torchs_own_training_reaches(options: dict[str, Any]) -> None:
    model, source = make_model(), SOURCES["a data set with random augmentation"]()
    engine = FOMAML(inner=SETTINGS["adamw"], **options)
    _, gradients, phi = train(
        model, {}, [source.at(k) for k in range(STEPS)], QUERY, UPDATES["adamw"], second_order=False
    )
    close(engine.value_and_grad(_objective(model), [Task(support=source, query=QUERY)])[1], gradients)
    adapted = engine.adapt(_objective(model), source)
    trained = make_model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for k in range(STEPS):
        optimizer.zero_grad()
        x, y = source.at(k)
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    close(adapted, {n: p.detach() for n, p in trained.named_parameters()})
    close(adapted, phi)


def test_a_call_without_derivatives_and_one_with_backward_agree() -> None:
    model, source = make_model(), SOURCES["tensors"]()
    engine, task = MAML(inner=SETTINGS["adam"]), Task(support=source, query=QUERY)
    loss, gradients = _expected(model, {}, source, "adam")
    with torch.no_grad():
        assert (engine(_objective(model), [task]).loss - loss).abs() <= 1e-12
    result = engine(_objective(model), [task])
    result.loss.backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
    batches = [source.at(k) for k in range(STEPS)]
    firsts = [train(model, {}, batches[:k], batches[k], UPDATES["adam"])[0] for k in range(STEPS)]
    assert (result.report.support_loss[:, 0] - torch.stack(firsts)).abs().max() <= 1e-12


# Many tasks


def _tasks(number: int = 3, *, of_dataset: bool = False) -> list[Task]:
    def source(i: int) -> Minibatches:
        data = make_data(seed=30 + i)
        return Minibatches.of(TensorDataset(*data) if of_dataset else data, batch_size=4, seed=i)

    return [Task(support=source(i), query=make_data(6, seed=40 + i)) for i in range(number)]


def _mean_of(model: nn.Module, tasks: list[Task], name: str = "adam") -> Values:
    found = [
        train(model, {}, [task.support.at(k) for k in range(STEPS)], task.query, UPDATES[name])[1] for task in tasks
    ]
    return {n: torch.stack([one[n] for one in found]).mean(0) for n in found[0]}


@pytest.mark.parametrize("chunk_size", [None, 1, 2, "auto"])
@pytest.mark.parametrize("stacks", [False, True])
def test_tasks_with_minibatches_each(chunk_size: int | None, stacks: bool) -> None:
    model, tasks = make_model(), _tasks(of_dataset=stacks)
    given: Any = TaskBatch.stack(tasks) if stacks else tasks
    for options in ({}, {"microbatch_size": 3}, {"linearize": 2}):
        engine = MAML(inner=SETTINGS["adam"], chunk_size=chunk_size, **options)
        close(engine.value_and_grad(_objective(model), given)[1], _mean_of(model, tasks))


def test_a_list_of_tasks_with_minibatches_and_without() -> None:
    model, tasks = make_model(), _tasks(2)
    fixed = [Task(support=make_data(5, seed=s), query=make_data(4, seed=s + 1)) for s in (50, 60)]
    as_sources = [Task(support=Minibatches([task.support] * STEPS), query=task.query) for task in fixed]
    mixed = [tasks[0], fixed[0], tasks[1], fixed[1]]
    expected = _mean_of(model, [tasks[0], as_sources[0], tasks[1], as_sources[1]])
    result = MAML(inner=SETTINGS["adam"])(_objective(model), mixed)
    result.loss.backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    alone = [MAML(inner=SETTINGS["adam"])(_objective(model), [task]).report.query_loss for task in mixed]
    assert (result.report.query_loss - torch.cat(alone)).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_minibatches_of_stacked_tensors(chunk_size: int | None) -> None:
    model, tasks, size = make_model(), 3, 4
    data = [torch.stack(parts) for parts in zip(*(make_data(seed=30 + i) for i in range(tasks)), strict=True)]
    query = tuple(torch.stack(parts) for parts in zip(*(make_data(6, seed=40 + i) for i in range(tasks)), strict=True))
    source = Minibatches.of((data[0], data[1]), batch_size=size, seed=3, tasks=True, indices=True)
    x, (y, indices) = source.at(1)
    assert x.shape == (tasks, size, 4) and y.shape == indices.shape == (tasks, size)
    assert torch.equal(y[2], data[1][2][indices[2]]) and torch.equal(indices[0], indices[2])
    objective, meta = _weighted(model)
    batch = TaskBatch(support=source, query=query)
    found = [
        train(
            model,
            meta,
            [(x[i], (y[i], w[i])) for x, (y, w) in map(source.at, range(STEPS))],
            (query[0][i], query[1][i]),
            UPDATES["adamw"],
        )[1]
        for i in range(tasks)
    ]
    expected = {n: torch.stack([one[n] for one in found]).mean(0) for n in found[0]}
    engine = MAML(inner=SETTINGS["adamw"], chunk_size=chunk_size)
    close(engine.value_and_grad(objective, batch)[1], expected)
    close(engine.value_and_grad(objective, list(batch))[1], expected)


def test_a_task_batch_with_minibatches_is_sliced_indexed_and_moved() -> None:
    tasks = _tasks(4)
    batch = TaskBatch.stack(tasks)
    assert len(batch) == 4
    for i, task in enumerate(batch):
        assert isinstance(task, Task)
        for mine, theirs in zip(task.support.at(3), tasks[i].support.at(3), strict=True):
            assert torch.equal(mine, theirs)
    half = batch[1:3]
    assert len(half) == 2 and torch.equal(half.support.at(5)[0][1], tasks[2].support.at(5)[0])
    single = batch.to(dtype=torch.float32)
    assert single.support.at(0)[0].dtype == single.query[0].dtype == torch.float32
    assert single.support.at(0)[1].dtype == torch.int64
    assert tasks[0].support.at(0)[0].dtype == torch.float64
    moved = tasks[0].support.to("cpu", dtype=torch.float32)
    assert moved.at(2)[0].dtype == torch.float32 and moved.of_all(0)[0].dtype == torch.float32
    assert batch.at(2).support[0].shape == (4, 3, 4)
    assert tasks[0].at(2).support[0].shape == (3, 4) and tasks[0].at(2).at(5).query is tasks[0].query


def test_a_task_that_is_not_finite_is_left_out() -> None:
    model, tasks = make_model(), _tasks(4)
    x, y = make_data(seed=70)
    spoilt = Minibatches([(x.clone().fill_(torch.nan) if k == 4 else x, y) for k in range(STEPS)])
    bad = [tasks[0], Task(support=spoilt, query=QUERY), *tasks[1:]]
    engine = MAML(inner=SETTINGS["adam"], on_nonfinite="skip")
    result = engine(_objective(model), bad)
    result.loss.backward()
    assert result.report.skipped == (1,)
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, _mean_of(model, tasks))
    tasks = _tasks(3, of_dataset=True)
    alike = [tasks[0].support.at(k) for k in range(STEPS)]
    alike[4] = [torch.full_like(alike[4][0], torch.nan), alike[4][1]]
    stacked = TaskBatch.stack([tasks[0], Task(support=Minibatches(alike), query=tasks[1].query), *tasks[1:]])
    _, got = engine.value_and_grad(_objective(model), stacked)
    close(got, _mean_of(model, tasks))


# Random draws and running statistics


def test_dropout_has_one_mask_for_each_step_and_its_batch() -> None:
    """Against a graph whose masks are read off an inner loop of the engine's own."""
    torch.manual_seed(0)
    masks: list[Tensor] = []

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.rand(x.shape, dtype=x.dtype) > 0.5
            masks.append(mask)
            return x * mask

    model = nn.Sequential(nn.Linear(4, 5), Masked(), nn.Linear(5, 3)).double()
    source, engine = SOURCES["tensors"](), MAML(inner=SETTINGS["gradient descent"], checkpoints=1, chunk_size=1)
    _, got = engine.value_and_grad(_objective(model), [Task(support=source, query=QUERY)])
    drawn: list[Tensor] = []
    for mask in masks:
        if not any(torch.equal(mask, other) for other in drawn):
            drawn.append(mask)
    assert len(drawn) == STEPS + 1

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * given.pop(0)

    given = [*drawn]
    expected = train(
        nn.Sequential(model[0], Given(), model[2]),
        {},
        [source.at(k) for k in range(STEPS)],
        QUERY,
        UPDATES["gradient descent"],
    )[1]
    close(got, expected)


def test_running_statistics_follow_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    source, engine = SOURCES["tensors"](), FOMAML(inner=SETTINGS["adam"])
    objective = _objective(model, buffers="update")
    report = engine(objective, [Task(support=source, query=QUERY)]).report
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-3)
    for k in range(STEPS):
        optimizer.zero_grad()
        x, y = source.at(k)
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    for name, buffer in trained.named_buffers():
        assert (report.buffers[name] - buffer).abs().max() <= 1e-12, name


# Implicit meta-gradients


def _implicit(**options: Any) -> ImplicitMAML:
    settings = {"regularization": 1.0, "solver": CG(max_steps=200, rtol=1e-13), "error_bound": False}
    return ImplicitMAML(**({"inner": SETTINGS["gradient descent"]} | settings | options))


def _at(model: nn.Module, meta: Values, phi: Values, batch: Any, damping: float = 1.0) -> Values:
    """The implicit meta-gradient at phi by a dense Hessian of the loss on one batch."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    meta = {n: t.detach().requires_grad_() for n, t in meta.items()}
    leaf = torch.cat([t.flatten() for t in phi.values()]).requires_grad_()

    def named(vector: Tensor) -> Values:
        parts = vector.split([t.numel() for t in theta.values()])
        return {n: part.view(t.shape) for (n, t), part in zip(theta.items(), parts, strict=True)}

    def support(vector: Tensor) -> Tensor:
        return weighted(torch.func.functional_call(model, named(vector), (batch[0],)), batch[1], meta)

    hessian = torch.autograd.functional.hessian(support, leaf)
    judged = F.cross_entropy(torch.func.functional_call(model, named(leaf), (QUERY[0],)), QUERY[1])
    (v,) = torch.autograd.grad(judged, leaf)
    u = torch.linalg.solve(hessian + damping * torch.eye(len(v)).double(), v)
    (gradient,) = torch.autograd.grad(support(leaf), leaf, create_graph=True)
    (mixed,) = torch.autograd.grad(gradient, meta["w"], u)
    return named((damping * u).detach()) | {"w": -mixed}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"linearize": False},
        {"microbatch_size": 3},
        {"hvp": "forward-over-reverse"},
        {"error_bound": True},
        {"recompute": [nn.Tanh]},
        {"inner": TorchOptimizer(torch.optim.Adam, steps=5, lr=0.05)},
        {"inner": NewtonCG(steps=2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("curvature_batches", [None, 1, 2])
def test_the_curvature_is_that_of_the_mean_over_the_source(
    options: dict[str, Any], curvature_batches: int | None
) -> None:
    model, source = make_model(), _with_indices()
    objective, meta = _weighted(model)
    engine = _implicit(curvature_batches=curvature_batches, **options)
    task = Task(support=source, query=QUERY)
    result = engine(objective, [task], return_state=True)
    result.loss.backward()
    assert result.state is not None
    phi = {n: t[0] for n, t in result.state.parameters.items()}
    steps = engine.inner.steps
    x, y = make_data()
    batches = [source.at(k) for k in range(steps, steps + (curvature_batches or 0))]
    which = torch.cat([batch[1][1] for batch in batches]) if batches else torch.arange(EXAMPLES)
    expected = _at(model, meta, phi, (x[which], (y[which], which)))
    got = {n: p.grad for n, p in (*model.named_parameters(), ("w", meta["w"])) if p.grad is not None}
    close(got, expected, 1e-10)
    report = result.report
    assert report.curvature_batches == curvature_batches
    assert (f"curvature of {curvature_batches} minibatches" in str(report)) == (curvature_batches is not None)
    leaves = {n: t.requires_grad_() for n, t in phi.items()}
    mean = weighted(torch.func.functional_call(model, leaves, (x[which],)), (y[which], which), meta)
    pairs = zip(torch.autograd.grad(mean, list(leaves.values())), leaves.values(), model.parameters(), strict=True)
    norm = sum((g + t.detach() - p.detach()).square().sum() for g, t, p in pairs) ** 0.5
    assert report.stationarity is not None and (report.stationarity[0] - norm).abs() <= 1e-12


def test_the_curvature_by_finite_differences_is_that_of_the_mean_too() -> None:
    model, source = make_model(), _with_indices()
    objective, meta = _weighted(model)
    for batches in (None, 1):
        task = Task(support=source, query=QUERY)
        exact = _implicit(curvature_batches=batches).value_and_grad(objective, [task])[1]
        engine = _implicit(curvature_batches=batches, hvp="finite-difference", solver=CG(max_steps=200, rtol=1e-8))
        close(engine.value_and_grad(objective, [task])[1], exact, 1e-5)


def test_gauss_newton_is_that_of_the_mean() -> None:
    model, source = make_model(), _with_indices()
    objective, _ = _weighted(model)
    x, y = make_data()
    result = _implicit(curvature="ggn")(objective, [Task(support=source, query=QUERY)], return_state=True)
    assert result.state is not None
    result.loss.backward()
    full = Task(support=(x, (y, torch.arange(EXAMPLES))), query=QUERY)
    there = _implicit(curvature="ggn", inner=GradientDescent(lr=0.05, steps=0))
    expected = there.value_and_grad(objective, [full], start=replace(result.state, buffers=(), optimizer=None))[1]
    del expected["w"]
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-10)


def test_the_mean_over_a_source_for_stacked_tasks() -> None:
    model, tasks = make_model(), _tasks(3)
    engine = _implicit(chunk_size=2)
    alone = [engine.value_and_grad(_objective(model), [task])[1] for task in tasks]
    expected = {n: torch.stack([one[n] for one in alone]).mean(0) for n in alone[0]}
    close(engine.value_and_grad(_objective(model), TaskBatch.stack(tasks))[1], expected, 1e-10)


def test_a_source_without_an_end_needs_a_number_of_batches() -> None:
    model, task = make_model(), Task(support=Minibatches(_drawn_by_step), query=QUERY)
    with pytest.raises(ValueError, match=r"without an end.*curvature_batches=m"):
        _implicit().value_and_grad(_objective(model), [task])
    _implicit(curvature_batches=2).value_and_grad(_objective(model), [task])


def test_curvature_batches_of_a_sequence_begin_again_at_its_end() -> None:
    model, batches = make_model(), _batches()
    engine = _implicit(curvature_batches=2)
    short = Task(support=Minibatches(batches), query=QUERY)
    long = Task(support=Minibatches([*batches, *batches[:2]]), query=QUERY)
    expected = engine.value_and_grad(_objective(model), [long])[1]
    close(engine.value_and_grad(_objective(model), [short])[1], expected)


def test_a_warm_start_knows_a_task_by_its_first_batch() -> None:
    model, task = make_model(), Task(support=SOURCES["tensors"](), query=QUERY)
    engine = _implicit(warm_start=True, solver=CG(max_steps=200, rtol=1e-6))
    first, second = (engine(_objective(model), [task]).report for _ in range(2))
    assert first.solver_steps is not None and second.solver_steps is not None
    assert second.solver_steps[0] < first.solver_steps[0]


# The order of `Minibatches.of`


def test_an_epoch_has_every_example_once_in_an_order_of_seed_and_step_alone() -> None:
    source = _with_indices()
    for epoch in range(3):
        seen = torch.cat([source.at(3 * epoch + k)[1][1] for k in range(3)])
        assert sorted(seen.tolist()) == list(range(EXAMPLES))
    orders = {tuple(source.at(k)[1][1].tolist()) for k in (0, 3, 6)}
    assert len(orders) == 3
    backwards, again = _with_indices(), _with_indices()
    there = [backwards.at(k)[1][1] for k in reversed(range(9))]
    assert all(torch.equal(a, again.at(k)[1][1]) for k, a in zip(reversed(range(9)), there, strict=True))
    other = Minibatches.of(make_data(), batch_size=4, seed=6, indices=True)
    assert not torch.equal(other.at(0)[1][1], source.at(0)[1][1])


def test_full_batches_alone_and_no_order() -> None:
    full = _with_indices(drop_last=True)
    assert {len(full.at(k)[0]) for k in range(6)} == {4}
    plain = Minibatches.of(make_data(), batch_size=4, shuffle=False, indices=True)
    assert plain.at(5)[1][1].tolist() == [8, 9, 10] and plain.at(3)[1][1].tolist() == [0, 1, 2, 3]
    assert [len(plain.of_all(i)[0]) for i in range(3)] == [4, 4, 3] and plain.length_of_all == 3


def test_draws_of_a_data_set_are_those_of_the_step_and_leave_the_users_generators() -> None:
    source = SOURCES["a data set with random augmentation"]()
    first = source.at(2)[0]

    def draws() -> tuple[float, ...]:
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002

    seed()
    again, drawn = source.at(2)[0], draws()
    seed()
    assert torch.equal(first, again) and drawn == draws()
    assert not torch.equal(source.at(5)[0], first)
    plain = Minibatches.of(Noisy(), batch_size=4, shuffle=False)  # the same examples in each epoch, drawn anew
    assert torch.equal(plain.at(3)[1], plain.at(0)[1]) and not torch.equal(plain.at(3)[0], plain.at(0)[0])


def test_indices_of_batches_that_are_no_pair() -> None:
    x, _ = make_data()
    batch, indices = Minibatches.of(x, batch_size=4, shuffle=False, indices=True).at(1)
    assert torch.equal(batch, x[4:8]) and indices.tolist() == [4, 5, 6, 7]
    pair = Minibatches.of(list(zip(*make_data(), strict=True)), batch_size=4, shuffle=False, indices=True).at(0)
    assert torch.equal(pair[0], x[:4]) and pair[1][1].tolist() == [0, 1, 2, 3]


def test_batches_are_fetched_when_a_step_needs_them() -> None:
    asked: list[int] = []

    def source(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return _drawn_by_step(step)

    engine = MAML(inner=SETTINGS["adam"], chunk_size=1, linearize=False)
    engine.value_and_grad(_objective(make_model()), [Task(support=Minibatches(source), query=QUERY)])
    there, back = [*range(1, STEPS)], [*reversed(range(STEPS - 1))]
    assert asked[-len(there + back) :] == there + back and set(asked[: -len(there + back)]) == {0}


def test_the_batches_of_a_single_task_are_not_copied() -> None:
    batches = _batches()
    batch = TaskBatch.stack([Task(support=Minibatches(batches), query=QUERY)])
    assert batch.at(2).support[0].data_ptr() == batches[2][0].data_ptr()
    assert batch.fetched(0) == 0 and TaskBatch.stack(_tasks(2)).fetched(0) == 2 * 4 * (4 + 1) * 8


def test_minibatches_say_what_they_are() -> None:
    assert repr(Minibatches(_batches())) == "Minibatches(7)"
    assert repr(_with_indices()) == "Minibatches(endless of 11 examples)"


# Bad input


def _run(source: Any, *, engine: MetaGradient | None = None, objective: Objective | None = None) -> None:
    engine = engine or MAML(inner=SETTINGS["gradient descent"], linearize=False)
    engine.value_and_grad(objective or _objective(make_model()), [Task(support=Minibatches(source), query=QUERY)])


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*make_data()), batch_size=4)


@pytest.mark.parametrize(
    "source", [lambda: iter(_batches()), lambda: (b for b in _batches()), _loader, lambda: iter(_loader())]
)
def test_an_iterator_cannot_be_asked_again(source: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"asked again.*Got .*wrap it as Minibatches\(list\(loader\)\)"):
        Minibatches(source())


@pytest.mark.parametrize("source", [TensorDataset(*make_data()), dict(zip("xy", make_data(), strict=True))])
def test_a_data_set_is_no_sequence_of_batches(source: Any) -> None:
    with pytest.raises(TypeError, match=r"batches, one a step.*Got .*make Minibatches.of\(dataset, batch_size=...\)"):
        Minibatches(source)


@pytest.mark.parametrize(
    "data",
    [tuple(t.numpy() for t in make_data()), {"x": make_data()[0].numpy()}, UserDict(x=make_data()[0])],
    ids=["arrays", "a dict of arrays", "another mapping"],
)
def test_stacked_examples_are_tensors(data: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected tensors in it. Got .*torch.as_tensor, pass dict\(...\)"):
        Minibatches.of(data, batch_size=4)


@pytest.mark.parametrize("source", [3, None, object()])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(TypeError, match="a sequence of batches or a function of the step"):
        Minibatches(source)


def test_a_source_that_ends() -> None:
    for engine in (None, FOMAML(inner=SETTINGS["adam"]), _implicit()):
        with pytest.raises(ValueError, match=r"ends before the last inner step. Expected 7 batches.*Got 5: pass more"):
            _run(_batches(5), engine=engine)

    def ends(step: int) -> Any:
        return _batches(5)[step]

    with pytest.raises(ValueError, match="no batch for inner step 5"):
        _run(ends)
    with pytest.raises(ValueError, match="ends before the last inner step"):
        FOMAML(inner=SETTINGS["adam"]).adapt(_objective(make_model()), Minibatches(_batches(5)))
    with pytest.raises(ValueError, match="ends before"):
        _run([])


def test_a_source_that_gives_another_batch_for_the_same_step() -> None:
    def drawn(step: int) -> tuple[Tensor, Tensor]:
        x, y = make_data(4)
        return x + torch.randn(4, 4, dtype=torch.float64), y

    with pytest.raises(ValueError, match=r"another batch for inner step 5 .*a function of the step"):
        _run(drawn)
    with pytest.raises(ValueError, match=r"another batch for inner step \d .*a function of the step"):
        _run(drawn, engine=MAML(inner=SETTINGS["adam"], checkpoints=0, linearize=False))
    calls: list[int] = []

    def shrinks(step: int) -> tuple[Tensor, Tensor]:
        calls.append(step)
        return make_data(4 if len(calls) < 10 else 3)

    with pytest.raises(ValueError, match="another batch"):
        _run(shrinks)

    def drawn_whole(step: int) -> tuple[Tensor, Tensor]:
        return drawn(step)

    with pytest.raises(ValueError, match="another batch"):
        _run(drawn_whole, engine=_implicit(curvature_batches=2))


def test_a_weight_per_example_needs_indices() -> None:
    def loss(output: Tensor, target: Tensor, meta: dict[str, Tensor]) -> Tensor:
        return (F.cross_entropy(output, target, reduction="none") * meta["w"][: len(target)].sigmoid()).mean()

    objective = Objective(make_model(), loss, outer_loss=F.cross_entropy, meta={"w": make_weights()})
    engine = MAML(inner=SETTINGS["adam"])
    task = Task(support=Minibatches.of(make_data(), batch_size=4), query=QUERY)
    with pytest.raises(ValueError, match=r"'w' has 11 entries, as many as.*indices=True"):
        engine.value_and_grad(objective, [task])
    said = Task(support=Minibatches.of(make_data(), batch_size=4, indices=False), query=QUERY)
    engine.value_and_grad(objective, [said])


def test_a_minibatch_that_requires_grad() -> None:
    x, y = make_data(4)
    with pytest.raises(ValueError, match=r"requires grad. Got one in `support at inner step 0`"):
        _run(lambda step: (x.clone().requires_grad_(), y))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((), ValueError, "holds no tensor"),
        ("text", TypeError, "encode it as a tensor"),
        ([1.0, 2.0], TypeError, "convert it with torch.as_tensor"),
        ((torch.eye(4).to_sparse(), torch.zeros(4)), TypeError, "must be dense"),
    ],
)
def test_what_is_no_batch(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"`support at inner step 0`.*{message}"):
        _run(lambda step: batch)


def test_minibatches_are_no_query() -> None:
    source = SOURCES["tensors"]()
    with pytest.raises(TypeError, match="`query` is one batch"):
        Task(support=source, query=source)
    with pytest.raises(TypeError, match="`query` is one batch"):
        TaskBatch(support=source, query=source)


def test_batches_of_another_number_of_tasks() -> None:
    query = tuple(t.unsqueeze(0).expand(3, *t.shape) for t in QUERY)
    source = Minibatches.of(tuple(t.unsqueeze(0).expand(2, *t.shape) for t in make_data()), batch_size=4, tasks=True)
    with pytest.raises(ValueError, match="the same number of tasks"):
        MAML(inner=SETTINGS["adam"]).value_and_grad(_objective(make_model()), TaskBatch(support=source, query=query))


def test_tasks_that_cannot_be_stacked() -> None:
    tasks = _tasks(2)
    with pytest.raises(ValueError, match="all have minibatches"):
        TaskBatch.stack([tasks[0], Task(support=make_data(4), query=QUERY)])
    other = Task(support=Minibatches.of(make_data(), batch_size=3), query=tasks[1].query)
    with pytest.raises(ValueError, match="one shape"):
        TaskBatch.stack([tasks[0], other]).at(0)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(_batches())


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (_Stream(), {}, TypeError, "map-style"),
        (iter([1]), {}, TypeError, "map-style"),
        (make_data(), {"collate_fn": _collate}, TypeError, "leave it out"),
        (TensorDataset(*make_data()), {"tasks": True}, TypeError, r"TaskBatch\.stack"),
        ((torch.zeros(3), torch.zeros(4)), {}, ValueError, "one number of examples"),
        (torch.zeros(()), {}, ValueError, "in dimension 0"),
        (torch.zeros(3), {"tasks": True}, ValueError, "in dimension 1"),
        ([], {}, ValueError, "at least one batch"),
        (torch.zeros(0, 3), {}, ValueError, "at least one batch"),
        (make_data(3), {"drop_last": True}, ValueError, "at least one batch of 4"),
        (make_data(), {"batch_size": 0}, ValueError, "`batch_size`"),
        (make_data(), {"batch_size": 2.5}, TypeError, "`batch_size`"),
        (make_data(), {"seed": -1}, ValueError, "`seed`"),
    ],
)
def test_what_minibatches_cannot_be_of(
    dataset: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Minibatches.of(dataset, **({"batch_size": 4} | options))


@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (1.5, TypeError)])
def test_what_is_no_number_of_curvature_batches(number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`curvature_batches`"):
        _implicit(curvature_batches=number)
