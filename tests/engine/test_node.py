"""The loss that a call returns: its backward scales, and cannot be differentiated again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import classification, mlp, problem

INNER = GradientDescent(lr=0.1, steps=2)
each_strategy = pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])


@each_strategy
def test_a_penalty_on_the_meta_gradient_is_refused_and_not_a_constant(strategy):
    model, objective, tasks = problem()
    result = strategy(inner=INNER)(objective, tasks)
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*Got create_graph=True"):
        torch.autograd.grad(result.loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        result.loss.backward(create_graph=True)
    assert all(p.grad is None for p in model.parameters())
    result.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nor_through_a_network_that_made_the_parameters():
    model, tasks, network = mlp(), classification((4,)), nn.Linear(2, 1).double()
    made = {n: p.detach() * network(torch.ones(2).double()) for n, p in model.named_parameters()}

    def loss(params, batch):
        return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1])

    result = MAML(inner=INNER)(Objective.from_function(loss, made), tasks)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(result.loss, network.weight, create_graph=True)


@each_strategy
def test_first_derivatives_are_scaled_and_may_be_taken_twice(strategy):
    model, objective, tasks = problem()
    engine, parameters = strategy(inner=INNER), list(model.parameters())
    expected = list(engine.value_and_grad(objective, tasks)[1].values())
    loss = engine(objective, tasks).loss
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    scaled = torch.autograd.grad(3 * loss + parameters[0].sum(), parameters)
    torch.testing.assert_close(list(once), expected)
    torch.testing.assert_close(scaled[1], 3 * expected[1])
    torch.testing.assert_close(scaled[0], 3 * expected[0] + 1)
