"""Draws are what they say, reproducible, and leave the global random state alone."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

from imaml import Objective
from imaml.testing import quadratic_tasks, small_models, spd_matrices, spectra, task_batches

F64 = torch.float64


@given(spectra(condition=50, largest=2.0))
def test_spectra_are_positive_sorted_and_within_the_condition(eigenvalues):
    assert eigenvalues == sorted(eigenvalues) and 1 <= len(eigenvalues) <= 8
    assert math.isclose(eigenvalues[-1], 2.0) and eigenvalues[0] >= 2.0 / 50 * (1 - 1e-12)


@given(spectra(n=4, indefinite=True))
def test_indefinite_spectra_have_both_signs(eigenvalues):
    assert len(eigenvalues) == 4 and eigenvalues[0] < 0 < eigenvalues[-1]


@pytest.mark.parametrize(
    "wanted",
    [
        lambda e: len(e) >= 3 and len(set(e)) == 1,
        lambda e: len(e) >= 4 and 1 < len(set(e)) < len(e),
        lambda e: any(0 < b / a - 1 < 1e-5 for a, b in zip(e, e[1:], strict=False)),
        lambda e: e[-1] / e[0] > 999 and len(e) > 4,
        lambda e: e[-1] < 1e-5,
    ],
    ids=["one value", "repeated", "clustered", "wide", "small"],
)
def test_every_kind_of_spectrum_is_drawn(wanted):
    find(spectra(), wanted, settings=settings(max_examples=500, derandomize=True, database=None))


@given(spd_matrices(condition=100, batch=(2, 1), largest=1.0))
def test_spd_matrices(matrix):
    assert matrix.shape[:2] == (2, 1) and matrix.dtype == F64 and torch.equal(matrix, matrix.mT)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (eigenvalues > 0.0099).all() and eigenvalues.amax().item() == pytest.approx(1.0)


@given(spd_matrices(n=3, dtype=torch.float32, condition=10))
def test_spd_matrices_of_a_size_and_dtype(matrix):
    assert matrix.shape == (3, 3) and matrix.dtype == torch.float32


@settings(max_examples=20)
@given(
    small_models(), task_batches(), task_batches(kind="regression", tasks=2, support=3, query=4, dtype=torch.float32)
)
def test_models_fit_the_tasks(model, labelled, valued):
    assert all(p.dtype == F64 and p.isfinite().all() for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    for loss, tasks in ((F.cross_entropy, labelled), (F.mse_loss, valued.to(dtype=F64))):
        value, _ = Objective(model, loss).evaluate({}, tasks[0].support)
        assert value.isfinite()
    assert len(valued) == 2 and valued.support[0].shape == (2, 3, 3) and valued.query[1].shape == (2, 4, 2)
    assert valued.support[1].dtype == torch.float32


@pytest.mark.parametrize(
    "wanted",
    [
        lambda m: len({id(p) for p in m.parameters()}) < len(list(m.named_parameters(remove_duplicate=False))),
        lambda m: any(not p.requires_grad for p in m.parameters()),
        lambda m: any(isinstance(c, nn.BatchNorm1d) for c in m),
        lambda m: any(isinstance(c, nn.GroupNorm) for c in m),
        lambda m: any(isinstance(c, nn.ReLU) for c in m),
    ],
    ids=["tied", "frozen", "BatchNorm", "GroupNorm", "ReLU"],
)
def test_every_kind_of_model_is_drawn(wanted):
    find(small_models(kinks=True), wanted, settings=settings(max_examples=500, derandomize=True, database=None))


@settings(max_examples=20)
@given(small_models(normalizations=["none"], tied=False, frozen=False, inputs=4, outputs=5, dtype=torch.float32))
def test_what_is_ruled_out_is_not_drawn(model):
    kinds = (nn.Linear, nn.Identity, nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU)
    assert all(isinstance(module, kinds) for module in model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(list(model.parameters()))
    assert model(torch.ones(2, 4)).shape == (2, 5)


EVERYTHING = st.tuples(spectra(), spd_matrices(), quadratic_tasks(), small_models(), task_batches())


def tensors(draw):
    eigenvalues, matrix, problem, model, tasks = draw
    quadratic = [problem.theta, *problem.tasks.support, *problem.tasks.query]
    return [torch.tensor(eigenvalues), matrix, *quadratic, *model.parameters(), *tasks.support, *tasks.query]


def test_draws_are_reproducible_and_leave_the_global_state_alone():
    seen = []

    @settings(max_examples=10, derandomize=True, database=None, phases=[Phase.generate])
    @given(EVERYTHING)
    def draw(drawn):
        seen.append(tensors(drawn))

    state = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), state)
    first, seen = seen, []
    torch.manual_seed(17)
    draw()
    assert len(first) == len(seen) > 1
    assert all(
        torch.equal(a, b) for one, other in zip(first, seen, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_draws_shrink_to_the_smallest():
    quick = settings(max_examples=200, derandomize=True, database=None)
    assert find(spectra(), lambda e: True, settings=quick) == [1.0]
    model = find(small_models(), lambda m: True, settings=quick)
    assert [type(module) for module in model] == [nn.Linear, nn.Identity, nn.Tanh, nn.Linear]
    assert len(find(task_batches(), lambda t: True, settings=quick)) == 1


@settings(max_examples=20)
@given(quadratic_tasks(indefinite=True), st.floats(1.1, 5.0))
def test_closed_forms_are_consistent(problem, regularization):
    """phi* is stationary, its Jacobian that of finite differences, and many steps of MAML lead to the implicit one."""
    phi = problem.solution(regularization=regularization)
    hessian, b = problem.tasks.support
    gradient = (hessian @ phi.unsqueeze(-1)).squeeze(-1) - b + regularization * (phi - problem.theta)
    assert gradient.norm() <= 1e-12 * (1 + phi.norm()) * (1 + regularization)
    steps = math.ceil(40 / -math.log1p(-(regularization - 1) / (regularization + 1)))
    limit = problem.maml(lr=1 / (1 + regularization), steps=steps, regularization=regularization)
    torch.testing.assert_close(problem.implicit(regularization=regularization), limit, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(quadratic_tasks(), st.floats(0.01, 0.5), st.integers(0, 4), st.floats(0.0, 2.0))
def test_meta_gradients_are_those_of_autograd(problem, lr, steps, regularization):
    objective = problem.objective()
    theta = objective.parameters()
    total, first = 0, {n: 0 for n in theta}
    for task in problem.tasks:
        phi = theta
        for _ in range(steps):
            proximal = sum(((phi[n] - theta[n]) ** 2).sum() for n in theta) * regularization / 2
            loss = objective.evaluate(phi, task.support)[0] + proximal
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        leaves = {n: p.detach().requires_grad_() for n, p in phi.items()}
        direct = torch.autograd.grad(objective.evaluate(leaves, task.query)[0], list(leaves.values()))
        first = {n: f + g / len(problem.tasks) for (n, f), g in zip(first.items(), direct, strict=True)}
        total = total + objective.evaluate(phi, task.query)[0] / len(problem.tasks)
    exact = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    options = {"lr": lr, "steps": steps, "regularization": regularization}
    torch.testing.assert_close(problem.maml(**options), exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(problem.fomaml(**options), first, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spectra(0), "`n` must be >= 1. Got 0"),
        (lambda: spectra(1, indefinite=True), "`n` must be >= 2, for both signs. Got 1"),
        (lambda: spectra(condition=0.5), "`condition` must be .*Got 0.5"),
        (lambda: spd_matrices(largest=0.0), "`largest` must be .*Got 0.0"),
        (lambda: quadratic_tasks(n=1), "`n` must be >= 2.*Got 1"),
        (lambda: small_models(normalizations=["weight"]), "none, layer, batch, group. Got .*weight"),
        (lambda: task_batches(kind="ranking"), "classification, regression. Got 'ranking'"),
    ],
)
def test_bad_arguments_are_named_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("missing", ["hypothesis", "pytest"])
def test_without_the_extra_the_remedy_is_named(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; import imaml.testing"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert f"imaml.testing needs {missing}: pip install 'imaml[testing]'" in run.stderr.splitlines()[-1]
