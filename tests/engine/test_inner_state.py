"""Inner trainings that go on from a state, against one graph over all steps in plain torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    AdamW,
    GradientDescent,
    ImplicitMAML,
    InnerOptimizer,
    InnerState,
    MetaGradient,
    Minibatches,
    NewtonCG,
    Objective,
    Pullback,
    RMSprop,
    Task,
    TaskBatch,
    TorchOptimizer,
)
from tests.engine.unrolled_training import UPDATES, Values, close, make_data, make_model, make_weights, train, weighted

STEPS, FIRST = 7, 4
SETTINGS: dict[str, InnerOptimizer] = {
    "gradient descent": GradientDescent(lr=0.05, steps=STEPS),
    "nesterov": GradientDescent(lr=0.05, steps=STEPS, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adam": Adam(lr=0.05, steps=STEPS, betas=(0.8, 0.9), eps=1e-3),
    "adamw": AdamW(lr=0.05, steps=STEPS, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2),
    "rmsprop": RMSprop(lr=0.05, steps=STEPS, alpha=0.7, eps=1e-3, momentum=0.5),
}
TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "gradient descent": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9), eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.7, eps=1e-3, momentum=0.5),
}
QUERY = make_data(6, seed=3)


def _source(seed: int = 5) -> Minibatches:
    return Minibatches.of(make_data(), batch_size=4, seed=seed, indices=True)


def _objective(model: nn.Module) -> tuple[Objective, Values]:
    meta = {"w": make_weights()}
    return Objective(model, weighted, outer_loss=F.cross_entropy, meta=meta), meta


def _plain(model: nn.Module) -> Objective:
    return Objective(model, F.cross_entropy)


def _steps(inner: Any, steps: int) -> Any:
    return replace(inner, steps=steps)


def _state(engine: MetaGradient, objective: Objective, tasks: Any, **options: Any) -> InnerState:
    with torch.no_grad():
        state = engine(objective, tasks, return_state=True, **options).state
    assert state is not None
    return state


def _gradients(result: Any, objective: Objective) -> Values:
    parameters = objective.parameters()
    for p in parameters.values():
        p.grad = None
    result.loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("options", [{}, {"checkpoints": 0}, {"linearize": 2}, {"regularization": 0.3}], ids=str)
def test_a_window_is_maml_with_the_steps_before_it_left_out(name: str, options: dict[str, Any]) -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    objective, meta = _objective(model)
    damping, batches = options.get("regularization", 0.0), [task.support.at(k) for k in range(STEPS)]
    loss, expected, phi = train(model, meta, batches, QUERY, UPDATES[name], damping=damping, constant=FIRST)
    before = MAML(inner=_steps(SETTINGS[name], FIRST), **options)
    after = MAML(inner=_steps(SETTINGS[name], STEPS - FIRST), **options)
    state = _state(before, objective, [task])
    assert state.step == FIRST and state.optimizer == type(SETTINGS[name]).__name__
    result = after(objective, [task], start=state, return_state=True)
    assert (result.loss - loss).abs() <= 1e-12
    close(_gradients(result, objective), expected)
    assert result.state is not None and result.state.step == STEPS
    close({n: t[0] for n, t in result.state.parameters.items()}, phi)
    truncated = MAML(inner=SETTINGS[name], truncate=STEPS - FIRST, **options)
    close(truncated.value_and_grad(objective, [task])[1], expected)
    close({n: t[0] for n, t in _state(truncated, objective, [task]).parameters.items()}, phi)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_windows_of_two_steps_one_after_another(name: str) -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    objective, meta = _objective(model)
    engine, state = MAML(inner=_steps(SETTINGS[name], 2)), None
    for window in range(3):
        result = engine(objective, [task], start=state, return_state=True)
        batches = [task.support.at(k) for k in range(2 * window + 2)]
        loss, expected, _ = train(model, meta, batches, QUERY, UPDATES[name], constant=2 * window)
        assert (result.loss - loss).abs() <= 1e-12
        close(_gradients(result, objective), expected)
        state = result.state
    assert state is not None and state.step == 6


@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=SETTINGS["adamw"]),
        MAML(inner=SETTINGS["adamw"], linearize=True),
        MAML(inner=SETTINGS["adamw"], checkpoints=1, storage="disk"),
        MAML(inner=SETTINGS["adamw"], truncate=0),
        FOMAML(inner=SETTINGS["adamw"]),
        ImplicitMAML(inner=SETTINGS["adamw"], regularization=0.3, on_failure="ignore"),
        ImplicitMAML(inner=SETTINGS["adamw"], regularization=0.3, on_failure="ignore", curvature_batches=2),
    ],
    ids=lambda engine: type(engine).__name__,
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_strategy_leaves_the_state_and_goes_on_from_it(engine: MetaGradient, mode: Callable[[], Any]) -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    meta = {"w": make_weights().detach()}
    objective = Objective(model, weighted, outer_loss=F.cross_entropy, meta=meta)
    batches = [task.support.at(k) for k in range(2 * STEPS)]
    damping = engine.regularization or 0.0
    with mode():
        once = engine(objective, [task], return_state=True)
        twice = engine(objective, [task], start=once.state, return_state=True)
        assert engine(objective, [task]).state is None
    assert not once.state.parameters["0.weight"].requires_grad
    for result, steps in ((once, STEPS), (twice, 2 * STEPS)):
        loss, _, phi = train(model, meta, batches[:steps], QUERY, UPDATES["adamw"], damping=damping)
        assert (result.loss - loss).abs() <= 1e-12
        close({n: t[0] for n, t in result.state.parameters.items()}, phi)
        assert result.state.step == steps and [b.shape for b in result.state.buffers] == [(1, 43), (1, 43)]
    adapted = engine.adapt(objective, task.support, start=once.state)
    close(adapted, phi)


def test_a_state_is_saved_and_loaded() -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    objective, _ = _objective(model)
    engine, file = MAML(inner=_steps(SETTINGS["adam"], 2)), io.BytesIO()
    state = _state(engine, objective, [task])
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    expected = engine.value_and_grad(objective, [task], start=state)[1]
    close(engine.value_and_grad(objective, [task], start=again)[1], expected)


def test_a_call_changes_neither_the_state_nor_what_it_shares_memory_with() -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    objective, _ = _objective(model)
    engine = MAML(inner=_steps(SETTINGS["adam"], 2))
    state = _state(engine, objective, [task])
    before = [t.clone() for t in (*state.parameters.values(), *state.buffers)]
    result = engine(objective, [task], start=state, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (*state.parameters.values(), *state.buffers), strict=True))
    assert result.state is not None
    no_step = _state(MAML(inner=_steps(SETTINGS["adam"], 0)), objective, [task], start=state)
    for one, other in ((result.state, state), (no_step, state)):
        for mine, theirs in zip(one.parameters.values(), other.parameters.values(), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()
    fresh = _state(MAML(inner=_steps(SETTINGS["adam"], 0)), objective, [task])
    assert fresh.parameters["0.weight"].data_ptr() != model[0].weight.data_ptr()
    assert torch.equal(fresh.parameters["0.weight"][0], model[0].weight)


# Many tasks


def _tasks(shapes: tuple[int, ...]) -> list[Task]:
    return [
        Task(
            support=Minibatches.of(make_data(seed=30 + i), batch_size=size, seed=i), query=make_data(size, seed=40 + i)
        )
        for i, size in enumerate(shapes)
    ]


def _expected(model: nn.Module, tasks: list[Task], steps: int, constant: int) -> tuple[Values, list[Values]]:
    found = [
        train(model, {}, [t.support.at(k) for k in range(steps)], t.query, UPDATES["adam"], constant=constant)[1:]
        for t in tasks
    ]
    return {n: torch.stack([g[n] for g, _ in found]).mean(0) for n in found[0][0]}, [phi for _, phi in found]


ALIKE, RAGGED = (4, 4, 4), (4, 3, 4, 2, 3)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("stacked", ALIKE), ("list", ALIKE), ("list", RAGGED), ("fixed", ALIKE), ("fixed", RAGGED)],
    ids=str,
)
def test_every_task_goes_on_from_its_own_state(chunk_size: int | None, kind: str, shapes: tuple[int, ...]) -> None:
    model, tasks = make_model(), _tasks(shapes)
    if kind == "fixed":  # such are grouped by shape, and come out of order
        tasks = [Task(support=task.support.at(0), query=task.query) for task in tasks]
    given: Any = TaskBatch.stack(tasks) if kind == "stacked" else tasks
    as_sources = [t if kind != "fixed" else Task(support=Minibatches([t.support] * 5), query=t.query) for t in tasks]
    objective, engine = _plain(model), MAML(inner=_steps(SETTINGS["adam"], 3), chunk_size=chunk_size)
    state = _state(engine, objective, given)
    result = MAML(inner=_steps(SETTINGS["adam"], 2), chunk_size=chunk_size)(
        objective, given, start=state, return_state=True
    )
    gradients, phis = _expected(model, as_sources, 5, 3)
    close(_gradients(result, objective), gradients)
    assert result.state is not None
    for i, phi in enumerate(phis):
        close({n: t[i] for n, t in result.state.parameters.items()}, phi)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_one_state_for_all_tasks(chunk_size: int | None) -> None:
    model, tasks = make_model(), _tasks((4, 4, 4))
    objective, engine = _plain(model), MAML(inner=_steps(SETTINGS["adam"], 2), chunk_size=chunk_size)
    state = _state(engine, objective, tasks[:1])
    alone = [engine.value_and_grad(objective, [task], start=state)[1] for task in tasks]
    expected = {n: torch.stack([one[n] for one in alone]).mean(0) for n in alone[0]}
    for given in (tasks, TaskBatch.stack(tasks)):
        result = engine(objective, given, start=state, return_state=True)
        close(_gradients(result, objective), expected)
        assert result.state is not None and len(result.state.buffers[0]) == 3


def test_the_entries_of_a_skipped_task_are_nan() -> None:
    model, tasks = make_model(), _tasks((4, 4, 4))
    x, y = make_data(4)
    spoilt = Task(support=Minibatches([(x * torch.nan, y)] * 9), query=QUERY)
    objective, engine = _plain(model), MAML(inner=_steps(SETTINGS["adam"], 2), on_nonfinite="skip")
    result = engine(objective, [tasks[0], spoilt, *tasks[1:]], return_state=True)
    state, expected = result.state, _state(engine, objective, tasks)
    assert state is not None and result.report.skipped == (1,)
    for mine, theirs in zip(
        (*state.parameters.values(), *state.buffers), (*expected.parameters.values(), *expected.buffers), strict=True
    ):
        assert mine[1].isnan().all()
        assert torch.equal(mine[[0, 2, 3]], theirs)
    again = engine(objective, [tasks[0], spoilt, *tasks[1:]], start=state)
    assert again.report.skipped == (1,)
    close(_gradients(again, objective), engine.value_and_grad(objective, tasks, start=expected)[1])


# The inner loops


def test_a_step_size_for_every_step_of_the_whole_training() -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    rates = [0.1 / (1 + k) for k in range(STEPS)]
    objective, meta = _objective(model)
    whole = MAML(inner=GradientDescent(lr=rates, steps=STEPS), truncate=3)
    state = _state(MAML(inner=GradientDescent(lr=rates[:FIRST], steps=FIRST)), objective, [task])
    part = MAML(inner=GradientDescent(lr=rates, steps=3))
    expected = whole.value_and_grad(objective, [task])[1]
    close(part.value_and_grad(objective, [task], start=state)[1], expected)
    with pytest.raises(ValueError, match="lr"):
        MAML(inner=GradientDescent(lr=rates[:3], steps=3)).value_and_grad(objective, [task], start=state)


def test_a_learned_step_size_for_every_step_of_the_whole_training() -> None:
    model, task = make_model(), Task(support=make_data(), query=QUERY)
    rates = torch.linspace(0.1, 0.02, STEPS, dtype=torch.float64, requires_grad=True)
    objective = Objective(model, F.cross_entropy, meta={"lr": rates})

    def inner(steps: int) -> GradientDescent:
        return GradientDescent(lr=lambda meta: meta["lr"], steps=steps)

    whole = MAML(inner=inner(STEPS), truncate=3).value_and_grad(objective, [task])[1]
    first = Objective(model, F.cross_entropy, meta={"lr": rates[:FIRST].detach()})
    state = _state(MAML(inner=inner(FIRST)), first, [task])
    got = MAML(inner=inner(3)).value_and_grad(objective, [task], start=state)[1]
    close(got, whole)
    assert got["lr"][:FIRST].eq(0).all() and got["lr"][FIRST:].ne(0).all()


class _FromTheta(InnerOptimizer):
    """Gradient descent with a momentum that starts at half of theta."""

    @property
    def buffers(self) -> int:
        return 1

    def start(self, phi: Tensor) -> tuple[Tensor, ...]:
        return phi, phi / 2

    def update(self, state: Any, gradient: Tensor, step: int, at: Any) -> tuple[Tensor, ...]:
        buffer = 0.9 * state[1] + gradient
        return state[0] - at["lr"] * buffer, buffer


def test_the_buffers_of_a_state_are_constants_for_an_optimiser_whose_own_start_depends_on_theta() -> None:
    model, task = make_model(), Task(support=make_data(), query=QUERY)
    objective = _plain(model)
    state = _state(MAML(inner=_FromTheta(lr=0.05, steps=FIRST)), objective, [task])
    got = MAML(inner=_FromTheta(lr=0.05, steps=3)).value_and_grad(objective, [task], start=state)[1]
    close(got, MAML(inner=_FromTheta(lr=0.05, steps=STEPS), truncate=3).value_and_grad(objective, [task])[1])
    leaves = {n: t[0].clone().requires_grad_() for n, t in state.parameters.items()}
    parts = state.buffers[0][0].split([t.numel() for t in leaves.values()])
    phi, buffers = leaves, {n: part.view(t.shape) for (n, t), part in zip(leaves.items(), parts, strict=True)}
    for _ in range(3):
        loss = F.cross_entropy(functional_call(model, phi, task.support[0]), task.support[1])
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        buffers = {n: 0.9 * buffers[n] + g for n, g in zip(phi, grads, strict=True)}
        phi = {n: p - 0.05 * buffers[n] for n, p in phi.items()}
    judged = F.cross_entropy(functional_call(model, phi, QUERY[0]), QUERY[1])
    close(got, dict(zip(leaves, torch.autograd.grad(judged, list(leaves.values())), strict=True)))


def test_an_early_stop_keeps_the_state_of_each_task_where_it_stood() -> None:
    model, tasks = make_model(), TaskBatch.stack([Task(support=make_data(seed=s), query=QUERY) for s in (1, 2, 3)])
    objective = _plain(model)
    free = FOMAML(inner=SETTINGS["nesterov"])
    norms = []
    for steps in range(STEPS):
        state = _state(replace(free, inner=_steps(free.inner, steps)), objective, tasks)
        leaves = {n: t.requires_grad_() for n, t in state.parameters.items()}
        losses = [
            F.cross_entropy(
                functional_call(model, {n: t[i] for n, t in leaves.items()}, task.support[0]), task.support[1]
            )
            for i, task in enumerate(tasks)
        ]
        grads = torch.autograd.grad(sum(losses), list(leaves.values()))
        norms.append(sum(g.square().flatten(1).sum(1) for g in grads) ** 0.5)
    limit = norms[3].median().item() + 1e-9
    stopping = FOMAML(inner=replace(SETTINGS["nesterov"], stationarity=limit))
    state = _state(stopping, objective, tasks)
    assert state.step == STEPS
    for i in range(3):
        stopped = next((k for k in range(STEPS) if norms[k][i] <= limit), STEPS)
        there = _state(replace(free, inner=_steps(free.inner, stopped)), objective, [tasks[i]])
        assert (state.parameters["0.weight"][i] - there.parameters["0.weight"][0]).abs().max() <= 1e-12
        assert (state.buffers[0][i] - there.buffers[0][0]).abs().max() <= 1e-12


def _fewer(inner: Any, steps: int) -> Any:
    if isinstance(inner, TorchOptimizer):
        return TorchOptimizer(inner.optimizer, steps=steps, options=inner.options)
    return replace(inner, steps=steps)


@pytest.mark.parametrize("inner", [TorchOptimizer(torch.optim.SGD, steps=3, lr=0.1), NewtonCG(steps=3)])
def test_an_inner_solver_goes_on_from_the_parameters(inner: Any) -> None:
    model, tasks = make_model(), TaskBatch.stack(_tasks((4, 4)))
    engine = FOMAML(inner=inner, regularization=0.5)
    state = _state(engine, _plain(model), tasks)
    assert state.buffers == () and state.step == 3
    halves = _state(FOMAML(inner=_fewer(inner, 1), regularization=0.5), _plain(model), tasks)
    again = _state(FOMAML(inner=_fewer(inner, 2), regularization=0.5), _plain(model), tasks, start=halves)
    close(again.parameters, state.parameters, 1e-10)


# Implicit meta-gradients


def test_an_implicit_meta_gradient_from_a_start_is_that_of_the_whole_inner_loop() -> None:
    model, task = make_model(), Task(support=_source(), query=QUERY)
    objective, _ = _objective(model)
    solver = CG(max_steps=200, rtol=1e-13)

    def engine(steps: int) -> ImplicitMAML:
        return ImplicitMAML(inner=_steps(SETTINGS["adam"], steps), regularization=1.0, solver=solver)

    state = _state(engine(FIRST), objective, [task])
    expected = engine(STEPS).value_and_grad(objective, [task])[1]
    close(engine(STEPS - FIRST).value_and_grad(objective, [task], start=state)[1], expected, 1e-10)
    ended = _state(engine(STEPS), objective, [task])
    close(engine(0).value_and_grad(objective, [task], start=ended)[1], expected, 1e-10)
    few = Task(support=Minibatches([task.support.at(k) for k in range(STEPS)]), query=QUERY)
    engine(0).value_and_grad(objective, [few], start=ended)  # the source has no batch for another step


def test_a_solve_starts_from_the_solution_of_the_state() -> None:
    model, tasks = make_model(), _tasks((4, 4, 4))
    engine = ImplicitMAML(
        inner=_steps(SETTINGS["adam"], 1), regularization=1.0, solver=CG(max_steps=200, rtol=1e-8), warm_start=True
    )
    cold = engine(_plain(model), tasks, return_state=True)
    assert cold.state is not None and cold.state.solution is not None and cold.state.solution.shape == (3, 43)
    still = replace(engine, inner=_steps(SETTINGS["adam"], 0), curvature_batches=None)
    same = still(_plain(model), tasks, start=cold.state, return_state=True)
    assert same.report.solver_steps is not None and cold.report.solver_steps is not None
    assert (same.report.solver_steps == 0).all() and (cold.report.solver_steps > 3).all()
    other = replace(still, warm_start=False)(_plain(model), tasks, start=cold.state)
    close(_gradients(same, _plain(model)), _gradients(other, _plain(model)), 1e-7)
    one = replace(cold.state, parameters={n: t[:1] for n, t in cold.state.parameters.items()})
    one = replace(one, buffers=tuple(b[:1] for b in one.buffers), solution=one.solution[:1])
    still.value_and_grad(_plain(model), tasks, start=one)


# A running optimiser of torch


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("steps", [0, 3])
def test_going_on_from_a_running_optimiser_of_torch(name: str, steps: int) -> None:
    model, source = make_model(), Minibatches.of(make_data(), batch_size=4, seed=5)
    optimizer = TORCH[name](model.parameters())

    def take(first: int, last: int) -> None:
        for k in range(first, last):
            optimizer.zero_grad()
            x, y = source.at(k)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    take(0, steps)
    objective = _plain(model)
    state = InnerState.of(optimizer, objective, step=steps if isinstance(optimizer, torch.optim.SGD) else None)
    assert state.step == steps
    engine = FOMAML(inner=_steps(SETTINGS[name], STEPS - steps))
    result = engine(objective, [Task(support=source, query=QUERY)], start=state, return_state=True)
    gradients = _gradients(result, objective)
    take(steps, STEPS)
    assert result.state is not None
    close({n: t[0] for n, t in result.state.parameters.items()}, {n: p.detach() for n, p in model.named_parameters()})
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(QUERY[0]), QUERY[1]).backward()
    close(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    # The optimiser has gone on too: its buffers are those of the state that the call has left.
    there = InnerState.of(optimizer, objective, step=STEPS)
    for mine, theirs in zip(result.state.buffers, there.buffers, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12


def test_a_state_of_an_optimiser_with_frozen_parameters_is_of_what_adapts() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    F.cross_entropy(model(QUERY[0]), QUERY[1]).backward()
    optimizer.step()
    state = InnerState.of(optimizer, Objective(model, F.cross_entropy, adapt=["2"]))
    assert list(state.parameters) == ["2.weight", "2.bias"] and state.buffers[0].shape == (1, 18) and state.step == 1
    assert torch.equal(state.buffers[0][0, :15].view(3, 5), optimizer.state[model[2].weight]["exp_avg"])


def test_half_precision_is_not_rounded_between_windows() -> None:
    model, task = make_model().to(torch.bfloat16), Task(support=make_data(), query=QUERY)
    task = TaskBatch.stack([task]).to(dtype=torch.bfloat16)[0]
    inner = GradientDescent(lr=1e-4, steps=4)
    whole = FOMAML(inner=inner).adapt(_plain(model), task.support)
    state = None
    for _ in range(4):
        state = FOMAML(inner=_steps(inner, 1))(_plain(model), [task], start=state, return_state=True).state
    assert state is not None
    assert state.parameters["0.weight"].dtype == torch.float32
    assert all(torch.equal(t[0].to(torch.bfloat16), whole[n]) for n, t in state.parameters.items())
    assert not torch.equal(state.parameters["0.weight"][0], model[0].weight.float())


# Bad input


def _good() -> tuple[nn.Module, Objective, Task, InnerState]:
    model = make_model()
    objective, task = _plain(model), Task(support=make_data(), query=QUERY)
    return model, objective, task, _state(MAML(inner=_steps(SETTINGS["adam"], 2)), objective, [task])


def _changed(state: InnerState, name: str) -> InnerState:
    parameters, (m, v) = state.parameters, state.buffers
    weight = parameters["0.weight"]
    return {
        "another model": replace(state, parameters={"a": weight}),
        "another shape": replace(state, parameters=parameters | {"0.weight": weight[:, :3]}),
        "no tasks": replace(state, parameters=parameters | {"0.weight": weight.new_zeros(())}),
        "another dtype": replace(state, parameters={n: p.float() for n, p in parameters.items()}),
        "other buffers": replace(state, buffers=(m,)),
        "another optimiser": replace(state, optimizer="AdamW"),
        "buffers of another dtype": replace(state, buffers=(m.float(), v)),
        "buffers of another size": replace(state, buffers=(m[:, 1:], v)),
        "buffers without tasks": replace(state, buffers=(m[0], v)),
        "a solution of another size": replace(state, solution=m[:, 1:]),
        "two tasks": replace(state, parameters={n: torch.cat([p, p]) for n, p in parameters.items()}),
        "two tasks in a buffer": replace(state, buffers=(torch.cat([m, m]), v)),
        "elsewhere": replace(state, buffers=(m.to("meta"), v)),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another model", r"another model.*which differ in \['0.bias'"),
        ("another shape", r"another model: '0.weight' must be \(tasks, 5, 4\) in torch.float64. Got \(1, 3, 4\)"),
        ("no tasks", r"'0.weight' must be \(tasks, 5, 4\)"),
        ("another dtype", r"'0.weight' must be .* in torch.float64. Got .* in torch.float32"),
        (
            "other buffers",
            r"another optimiser. Expected the 2 buffers of Adam. Got 1 of Adam.*torch.zeros\(1, 43\),\) \* 2",
        ),
        ("another optimiser", "another optimiser. Expected the 2 buffers of Adam. Got 2 of AdamW"),
        ("buffers of another dtype", r"buffers of the state must be \(tasks, 43\) in torch.float64. Got"),
        ("buffers of another size", r"buffers of the state must be \(tasks, 43\).*Got \(1, 42\)"),
        ("buffers without tasks", r"buffers of the state must be \(tasks, 43\).*Got \(43,\)"),
        ("a solution of another size", r"solution of the state must be \(tasks, 43\)"),
        ("two tasks", r"of 1 tasks, or of one.*Got \[2\] tasks"),
        ("two tasks in a buffer", r"of 1 tasks, or of one.*Got \[2\] tasks"),
        ("elsewhere", r"must be on cpu.*Got \['meta'\]"),
    ],
)
def test_a_state_that_does_not_fit(name: str, message: str) -> None:
    _, objective, task, state = _good()
    bad, engine = _changed(state, name), MAML(inner=_steps(SETTINGS["adam"], 2))
    for call in (
        lambda: engine(objective, [task], start=bad),
        lambda: engine.value_and_grad(objective, [task], start=bad),
        lambda: engine.adapt(objective, task.support, start=bad),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_state_of_another_number_of_tasks() -> None:
    _, objective, task, _ = _good()
    engine = MAML(inner=_steps(SETTINGS["adam"], 2))
    state = _state(engine, objective, [task] * 3)
    with pytest.raises(ValueError, match=r"of 2 tasks, or of one from which all start. Got \[3\] tasks"):
        engine(objective, [task] * 2, start=state)
    with pytest.raises(ValueError, match=r"of 1 tasks"):
        engine.adapt(objective, task.support, start=state)


def test_a_source_that_ends_before_the_last_step_of_a_window() -> None:
    _, objective, task, state = _good()
    short = Task(support=Minibatches([task.support] * 3), query=QUERY)
    engine = MAML(inner=_steps(SETTINGS["adam"], 2))
    with pytest.raises(ValueError, match=r"Expected 4 batches, for steps 2 to 3. Got 3"):
        engine(objective, [short], start=state)
    with pytest.raises(ValueError, match=r"Expected 6 batches, for steps 4 to 5. Got 3"):
        engine(objective, [short], start=replace(state, step=4))


@pytest.mark.parametrize("start", [{"parameters": {}}, 3, torch.zeros(3)], ids=str)
def test_what_is_no_state(start: Any) -> None:
    _, objective, task, _ = _good()
    with pytest.raises(TypeError, match=r"`start` must be an InnerState, such as `result.state`"):
        MAML(inner=_steps(SETTINGS["adam"], 2))(objective, [task], start=start)


@pytest.mark.parametrize(
    ("options", "error"), [({"step": -1}, ValueError), ({"step": 1.5}, TypeError), ({"buffers": (3,)}, TypeError)]
)
def test_what_no_state_holds(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        InnerState(parameters={"a": torch.zeros(1, 2)}, **options)


def test_optimisers_of_torch_whose_state_cannot_be_taken() -> None:
    model = make_model()
    objective = _plain(model)
    with pytest.raises(TypeError, match="Expected an optimiser of torch.optim. Got int"):
        InnerState.of(3, objective)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected an Objective"):
        InnerState.of(torch.optim.Adam(model.parameters()), model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected one of SGD, Adam, AdamW, RMSprop of torch.optim. Got Adagrad"):
        InnerState.of(torch.optim.Adagrad(model.parameters()), objective)
    with pytest.raises(ValueError, match=r"optimiser of the objective's adapted parameters. Got one without \['0"):
        InnerState.of(torch.optim.Adam(make_model().parameters()), objective)
    with pytest.raises(ValueError, match="SGD does not count its steps"):
        InnerState.of(torch.optim.SGD(model.parameters(), lr=0.1), objective)
    for optimizer in (
        torch.optim.Adam(model.parameters(), amsgrad=True),
        torch.optim.RMSprop(model.parameters(), centered=True),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.Adam(model.parameters(), maximize=True),
    ):
        with pytest.raises(ValueError, match="Expected plain"):  # before its first step too
            InnerState.of(optimizer, objective, step=0)
        F.cross_entropy(model(QUERY[0]), QUERY[1]).backward()
        optimizer.step()
        with pytest.raises(ValueError, match="Expected plain"):
            InnerState.of(optimizer, objective, step=1)
    head = torch.optim.Adam(model.parameters())
    F.cross_entropy(model[2](model[1](model[0](QUERY[0]).detach())), QUERY[1]).backward()
    for p in model[0].parameters():
        p.grad = None
    head.step()
    with pytest.raises(ValueError, match=r"have taken \[0, 1\] steps.*pass `step`"):
        InnerState.of(head, objective)
    assert InnerState.of(head, objective, step=1).step == 1


def test_a_strategy_that_takes_its_inner_loop_by_itself_leaves_no_state() -> None:
    class Own(FOMAML):
        def pull_back(self, problem: Any) -> Pullback:
            query = problem.judge(problem.step((problem.theta,), 0)[0])
            return Pullback(query.adapted, query.shared, problem.outcome(query))

    model, task = make_model(), Task(support=make_data(), query=QUERY)
    engine = Own(inner=GradientDescent(lr=0.1, steps=1))
    engine(_plain(model), [task])
    with pytest.raises(ValueError, match=r"return_state=True.*problem.adapt\(\)"):
        engine(_plain(model), [task], return_state=True)
