"""How much Python an evaluation takes: counts, which are the same on every machine."""

import pytest
import torch

from benchmarks.calls import deep, evaluation, mlp, way
from imaml import FOMAML, GradientDescent


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)


def test_a_model_of_many_modules_costs_no_more_calls_than_functional_call_and_the_loss():
    ours, bare = evaluation(deep())
    assert ours <= bare


def test_an_inner_step_of_a_small_model_costs_few():
    ours, bare = evaluation(mlp())
    assert ours <= 2.5 * bare


def test_the_way_from_a_call_to_the_model_is_short():
    files, frames, _ = way(FOMAML(inner=GradientDescent(lr=0.1, steps=1), chunk_size=1))
    assert files <= 28 and frames <= 28
