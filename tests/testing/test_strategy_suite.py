"""The strategy suite fails for every broken strategy, in the test meant for it."""

import pytest
import torch

from imaml import GradientDescent, Objective
from imaml.testing._tasks import batch_of_tasks
from tests.testing import broken_strategies
from tests.testing.running import run_suite

IMPORT = "from tests.testing import broken_strategies"
CAUGHT_BY = {
    "FirstOrder": "test_closed_forms_on_quadratics",
    "SumOverTasks": "test_closed_forms_on_quadratics",
    "OneStepTooFew": "test_closed_forms_on_quadratics",
    "NoProximalTermInTheInnerLoop": "test_closed_forms_on_quadratics",
    "OtherSystem": "test_closed_forms_on_quadratics",
    "ForgetsTheFixedParameters": "test_networks_as_this_library_does",
    "ForgetsTheInitialParameters": "test_a_query_loss_of_the_initial_parameters",
    "ForgetsTheOuterSteps": "test_query_losses_along_the_way",
    "HessianAtTheLastStateOnly": "test_networks_as_this_library_does",
    "ReversedReport": "test_tasks_of_different_sizes",
    "WritesGrad": "test_nothing_of_the_users_is_changed",
    "MovesTheModel": "test_nothing_of_the_users_is_changed",
    "DrawsFromTheGlobalGenerator": "test_nothing_of_the_users_is_changed",
    "DifferentiatesUnderNoGrad": "test_without_gradients_a_call_only_evaluates",
    "SwallowsNaN": "test_nan_in_the_data_raises",
    "WrongWhereBlocksAreRecomputed": "test_recomputed_blocks_do_not_matter",
    "TheFirstMinibatchInEveryStep": "test_minibatches_as_this_library_does",
    "ForgetsTheState": "test_an_inner_loop_goes_on_from_a_state",
    "HalvesBackward": "test_backward_delivers_value_and_grad",
}


def test_every_broken_strategy_is_listed():
    here = broken_strategies.__name__
    assert {n for n, v in vars(broken_strategies).items() if getattr(v, "__module__", "") == here} == set(CAUGHT_BY)


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_broken_strategy_runs(name):
    """So that it fails by its defect, and not by an error of its own."""
    strategy = getattr(broken_strategies, name)(inner=GradientDescent(lr=0.1, steps=3))
    strategy(Objective(torch.nn.Linear(3, 2).double(), torch.nn.functional.cross_entropy), batch_of_tasks(3, 5, 6))


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_broken_strategy_fails(tmp_path, name):
    claim = "implicit" if issubclass(getattr(broken_strategies, name), broken_strategies.ImplicitMAML) else "maml"
    failed, _ = run_suite(
        tmp_path,
        "strategy",
        f"lambda inner: broken_strategies.{name}(inner=inner), against={claim!r}",
        imports=IMPORT,
        only=CAUGHT_BY[name],
    )
    assert failed == {CAUGHT_BY[name]}


def test_chunk_sizes_that_matter_are_caught(tmp_path):
    failed, _ = run_suite(
        tmp_path,
        "strategy",
        "lambda inner: broken_strategies.SumOverTasks(inner=inner), against=None",
        imports=IMPORT,
        only="test_chunks_do_not_matter",
    )
    assert failed
