"""How much Python an evaluation takes: counts, which are the same on every machine."""

import pytest
import torch

from benchmarks.calls import before_the_model, deep, evaluation, mlp, product
from imaml import FOMAML, GradientDescent


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)


def test_a_model_of_many_modules_costs_no_more_calls_than_functional_call_and_the_loss():
    ours, bare = evaluation(deep())
    assert ours <= min(bare, 2500)


def test_an_inner_step_of_a_small_model_costs_few():
    ours, bare = evaluation(mlp())
    assert ours <= 1.15 * bare


def test_the_way_from_a_call_to_the_model_is_short():
    files, frames = before_the_model(FOMAML(inner=GradientDescent(lr=0.1, steps=1), chunk_size=1))
    assert files <= 10 and frames <= 15


def test_a_product_of_a_linear_solve_passes_few_files():
    files, frames = product(linearize=True)
    assert files <= 6 and frames <= 9
