"""Models sharded over two processes against the same model whole."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from imaml import CG, GradientDescent, ImplicitMAML, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from tests.distributed import sharded
from tests.distributed.launch import on_two_ranks


@pytest.fixture(scope="module")
def found():
    return on_two_ranks(sharded.FUNCTIONS, seconds=120)


def solved(outcomes):
    """Those of an implicit gradient; the test is skipped where an old torch has been refused."""
    if torch.__version__ < "2.13" and all(isinstance(o, tuple) and "or a newer torch" in str(o[1]) for o in outcomes):
        pytest.skip(outcomes[0][1])
    return outcomes


def assert_equal(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("build", "engine", "adapt"), sharded.CASES)
def test_the_meta_gradient_is_that_of_the_whole_model(found, build, engine, adapt):
    tolerance = 1e-12 if engine in sharded.FIRST_ORDER else 1e-7
    if torch.__version__ < "2.13" and "one norm" in engine:
        tolerance = 1e-6  # norms of DTensors over two ranks are off by 3e-8 in torch 2.9
    for ours in solved(found[f"{build}, {engine}, {adapt}"]):
        assert_equal(ours, sharded.gradients("whole", engine, adapt, None), tolerance)


def test_products_by_finite_differences_are_close_to_exact_ones(found):
    exact = sharded.gradients("whole", "auto", None, None)
    assert_equal(solved(found["FSDP, auto, None"])[0], exact, 1e-6)


@pytest.mark.parametrize(("build", "way", "engine", "buffers"), sharded.RECOMPUTING)
def test_blocks_are_recomputed_in_first_derivatives(found, build, way, engine, buffers):
    outcomes = solved(found[f"recomputing, {(build, way, engine, buffers)}"])
    if way == "imaml":
        assert all("Expected torch.utils.checkpoint.checkpoint" in message for _, message in outcomes)
        return
    expected, _, calls, _ = sharded.recomputing("whole", "none", engine, buffers, None)
    for grads, names, its_calls, is_still in outcomes:
        assert_equal(grads, expected, 1e-12 if engine == "FOMAML" else 1e-7)
        assert is_still
        assert (its_calls > calls) == bool(names) == (way != "none")


@pytest.mark.parametrize("build", ["FSDP", "TP"])
def test_minibatches_are_those_of_the_whole_model(found, build):
    expected = sharded.minibatches("whole", None)
    for ours in solved(found[f"minibatches, {build}"]):
        assert_equal(ours[0], expected[0], 1e-12)
        assert_equal(ours[1], expected[1], 1e-7)


@pytest.mark.parametrize("build", ["FSDP", "TP"])
def test_the_report_is_that_of_the_whole_model(found, build):
    entries, facts = sharded.report("whole", None)
    for ours, theirs in solved(found[f"report, {build}"]):
        assert_equal(ours, entries, 1e-5)
        assert theirs == facts


@pytest.mark.parametrize("build", ["FSDP", "TP"])
def test_training_evaluating_and_adapting(found, build):
    losses, parameters = sharded.trained("whole", None)
    for ours, theirs in found[f"trained, {build}"]:
        assert_equal(ours, losses, 1e-12)
        assert_equal(theirs, parameters, 1e-12)
    for ours in found[f"adapted, {build}"]:
        assert_equal(ours, sharded.adapted("whole", None), 1e-12)


@pytest.mark.parametrize("build", ["FSDP", "TP"])
def test_parameters_and_their_grad_are_put_back(found, build):
    assert found[f"untouched, {build}"] == [(True, True)] * 2


@pytest.mark.parametrize("build", ["FSDP", "TP"])
def test_a_task_that_is_not_finite_is_skipped_by_all(found, build):
    loss, skipped = sharded.not_finite("whole", None)
    for ours, theirs in found[f"not_finite, {build}"]:
        assert_equal(ours, loss, 1e-12)
        assert theirs == skipped == (1,)


def test_why_there_are_no_exact_products(found):
    """If this fails, torch's FSDP has learned to differentiate twice."""
    for message, flags in found["second_derivatives"]:
        assert "not have been used in the graph" in message
        assert not any(flags)


def test_the_loop_of_the_page_is_that_of_the_whole_model(found):
    torch.manual_seed(0)
    model = MLP(activation=nn.Tanh)
    start = parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inner, solver = GradientDescent(lr=0.01, steps=5), CG(max_steps=3)
    engine = ImplicitMAML(inner=inner, solver=solver, hvp="finite-difference", on_failure="ignore")
    for step in range(3):
        optimizer.zero_grad()
        engine(Objective(model, F.mse_loss), Sinusoid().batch("train", step, 4)).loss.backward()
        optimizer.step()
    moved = parameters_to_vector(model.parameters()).detach()
    for ours in solved(found["the_page"]):
        difference = parameters_to_vector(ours.values()) - moved
        assert difference.norm() <= 1e-3 * (moved - start).norm()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("MAML", "Expected FOMAML or ImplicitMAML.*Got MAML"),
        ("a function", "Expected Objective\\(model, loss\\)"),
        ("exact", "Expected hvp='finite-difference'"),
        ("ggn", "Expected curvature='hessian'. Got 'ggn'"),
        ("solver", "Expected CG, MINRES or Neumann without a preconditioner. Got Dense"),
        ("preconditioner", "Expected CG, MINRES or Neumann without a preconditioner. Got CG"),
        ("inner", "Expected an inner optimiser such as GradientDescent or Adam. Got TorchOptimizer"),
        ("rates", "Expected `lr` as a number for all parameters"),
        ("LAMB", "Expected an optimiser that needs no parameter as a whole"),
        ("Muon", "Expected an optimiser that needs no parameter as a whole"),
        ("meta", "Expected no meta-parameters. Got \\['log_lr'\\]"),
        ("initial", "Expected an outer loss of the model's output. Got one that takes `initial` or `adapted`"),
        ("FSDP1", "Expected torch.distributed.fsdp.fully_shard"),
        ("dealt out", "Expected the same tasks on all of them"),
        ("group", "Expected group=None"),
        ("start", "an inner loop that starts at them and whose end is not kept"),
        ("state", "an inner loop that starts at them and whose end is not kept"),
    ],
)
def test_what_a_sharded_model_cannot_have(found, what, message):
    for messages in found["refused"]:
        assert re.search(message, messages[what])
