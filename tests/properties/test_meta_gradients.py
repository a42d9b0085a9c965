"""Relations that hold for every meta-gradient, over drawn models, tasks, steps, step sizes, lambdas and dtypes."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.testing import small_models, task_batches
from tests.oracles import ORACLES, finite_difference, model_loss, relative_error, setting

few = settings(max_examples=8)
tasks_of_kind = {
    F.cross_entropy: task_batches(),
    F.mse_loss: task_batches(kind="regression"),
}


@st.composite
def problems(draw, strategies=(MAML, FOMAML, ImplicitMAML)):
    """An engine, a model and what it adapts, a loss and tasks.

    Implicit MAML adapts the head, in which these losses are convex: its system is far from singular.
    """
    strategy, model = draw(st.sampled_from(strategies)), draw(small_models())
    loss = draw(st.sampled_from(list(tasks_of_kind)))
    inner = GradientDescent(lr=draw(st.floats(0.01, 0.3)), steps=draw(st.integers(0, 4)))
    implicit = strategy is ImplicitMAML
    engine = strategy(
        inner=inner, regularization=draw(st.floats(0.2 * implicit, 3.0)), **({"solver": Dense()} if implicit else {})
    )
    head_only = implicit or draw(st.booleans())
    objective = Objective(model, loss, adapt=[str(len(model) - 1)] if head_only else None)
    return engine, model, objective, draw(tasks_of_kind[loss]), loss


@settings(max_examples=24)
@given(problems())
def test_is_that_of_the_oracle(problem):
    engine, model, objective, tasks, loss = problem
    theta = dict(model.named_parameters())
    _, expected = ORACLES[type(engine)](setting(engine, tasks, model_loss(model, loss), theta, objective.adapted))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-9


@settings(max_examples=16)
@given(problems([MAML]))
def test_is_the_slope_of_the_query_loss(problem):
    """No second derivative is taken on the other side."""
    engine, model, objective, tasks, loss = problem
    given_setting = setting(engine, tasks, model_loss(model, loss), dict(model.named_parameters()), objective.adapted)
    source = torch.Generator().manual_seed(7)
    direction = {n: torch.randn(p.shape, generator=source, dtype=p.dtype) for n, p in given_setting.theta.items()}
    coarse, fine = (finite_difference(given_setting, direction, h) for h in (1e-5, 5e-6))
    _, gradient = engine.value_and_grad(objective, tasks)
    slope = sum((gradient[n] * d).sum() for n, d in direction.items())
    scale = sum(g.norm() * direction[n].norm() for n, g in gradient.items())
    assert abs(slope - fine) <= 1e-6 * scale + 1e-9 + abs(coarse - fine)
    assert abs(coarse - fine) <= 1e-3 * scale + 1e-6  # else the differences tell nothing


@few
@given(problems([MAML]))
def test_gradcheck_of_the_loss(problem):
    """`result.loss` as a function of the tensors that it came from."""
    engine, model, _, tasks, loss = problem
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}

    def query_loss(*values):
        def of_params(named, batch):
            return loss(functional_call(model, named, (batch[0],)), batch[1])

        return engine(Objective.from_function(of_params, dict(zip(params, values, strict=True))), tasks).loss

    assert torch.autograd.gradcheck(query_loss, tuple(params.values()), atol=1e-6, rtol=1e-4, fast_mode=True)


VARIANTS = st.fixed_dictionaries({
    "hvp": st.sampled_from(["forward-over-reverse", "reverse-over-reverse", "finite-difference"]),
    "chunk_size": st.sampled_from([None, 1, 2]),
    "checkpoints": st.sampled_from([None, 0, 1, 2]),
    "linearize": st.sampled_from([False, True, 1, 2]),
})  # fmt: skip


@settings(max_examples=24)
@given(problems([MAML, ImplicitMAML]), VARIANTS)
def test_modes_chunks_and_checkpoints_do_not_matter(problem, options):
    engine, _, objective, tasks, _ = problem
    known = {f.name for f in dataclasses.fields(engine)}
    if isinstance(engine, MAML) and options["checkpoints"] is not None and options["linearize"] is True:
        options |= {"linearize": None}  # an error together
    variant = dataclasses.replace(engine, **{k: v for k, v in options.items() if k in known})
    tolerance = 1e-4 if options["hvp"] == "finite-difference" else 1e-9
    expected = engine.value_and_grad(objective, tasks)[1]
    assert relative_error(variant.value_and_grad(objective, tasks)[1], expected) <= tolerance


@settings(max_examples=16)
@given(problems(), st.randoms(use_true_random=False))
def test_permuted_tasks_and_parameters_permute_the_result(problem, random):
    engine, model, objective, tasks, loss = problem
    order, names = list(range(len(tasks))), [n for n, p in model.named_parameters() if p.requires_grad]
    random.shuffle(order)
    random.shuffle(names)
    theta = dict(model.named_parameters())

    def of_params(named, batch):
        return loss(functional_call(model, named, (batch[0],)), batch[1])

    permuted = Objective.from_function(of_params, {n: theta[n] for n in names}, adapt=objective.adapted)
    tasks_permuted = TaskBatch.stack([tasks[i] for i in order])
    _, expected = engine.value_and_grad(objective, tasks)
    assert relative_error(engine.value_and_grad(permuted, tasks_permuted)[1], expected) <= 1e-9
    one, other = engine(objective, tasks).report, engine(permuted, tasks_permuted).report
    torch.testing.assert_close(one.query_loss[order], other.query_loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(one.support_loss[:, order], other.support_loss, rtol=1e-9, atol=0)


@settings(max_examples=16)
@given(problems(), st.floats(0.3, 3.0))
def test_a_scaled_loss_is_a_scaled_step_and_a_scaled_query_loss(problem, c):
    """c L + lambda/2 |d|^2 = c (L + lambda/c /2 |d|^2): a step of c lr, and c times the query loss."""
    engine, model, objective, tasks, loss = problem
    scaled = Objective(model, lambda output, target: c * loss(output, target), adapt=objective.adapted)
    equivalent = dataclasses.replace(
        engine,
        inner=dataclasses.replace(engine.inner, lr=c * engine.inner.lr),
        regularization=engine.regularization / c,
    )
    value, gradient = equivalent.value_and_grad(objective, tasks)
    got_value, got = engine.value_and_grad(scaled, tasks)
    torch.testing.assert_close(got_value, c * value, rtol=1e-9, atol=0)
    assert relative_error(got, {n: c * g for n, g in gradient.items()}) <= 1e-9


@few
@given(problems(), st.sampled_from([None, 1]))
def test_float32_is_near_float64(problem, chunk_size):
    engine, model, objective, tasks, loss = problem
    engine = dataclasses.replace(engine, chunk_size=chunk_size)
    single = Objective(copy.deepcopy(model).float(), loss, adapt=objective.adapted)
    _, got = engine.value_and_grad(single, tasks.to(dtype=torch.float32))
    assert all(g.dtype == torch.float32 for g in got.values())
    expected = engine.value_and_grad(objective, tasks)[1]
    assert relative_error({n: g.double() for n, g in got.items()}, expected) <= 1e-3
