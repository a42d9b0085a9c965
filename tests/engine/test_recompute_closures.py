"""Blocks that hand on what they are given, closures that change, and modules that stand twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import imaml
from imaml import Objective, TaskBatch
from tests.engine.test_recompute import ENGINES, agree, meta_gradient

F64 = torch.float64


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)

    def forward(self, *args):
        return self.function(self.layer, *args)


class Network(nn.Module):
    def __init__(self, block, use=None):
        super().__init__()
        self.enter, self.block, self.leave = nn.Linear(4, 4), block, nn.Linear(4, 2)
        self.use = use or (lambda block, h: block(h))

    def forward(self, x):
        return self.leave(self.use(self.block, self.enter(x)))


def tasks():
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 6, 4, dtype=F64), torch.randn(2, 3, 6, 2, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def compare(engine, build, use=None, names=("block",)):
    def found(names):
        torch.manual_seed(0)
        return meta_gradient(
            ENGINES[engine], Objective(Network(build(), use).double(), F.mse_loss, recompute=names), tasks()
        )

    agree(found(names), found(None))


FORMS = {
    "its input": (lambda layer, h: h, None),
    "its input and more": (lambda layer, h: (h, layer(h).tanh()), lambda block, h: torch.mul(*block(h))),
    "a parameter": (lambda layer, h: (layer.weight, layer(h)), lambda block, h: (lambda w, y: y.tanh() @ w)(*block(h))),
    "a view": (lambda layer, h: h.view_as(h), None),
    "a part": (lambda layer, h: h[..., [0, 1]], lambda block, h: h.tanh() * block(h).sum(-1, True)),
    "a row more": (lambda layer, h: h.unsqueeze(0), lambda block, h: block(h)[0]),
    "an index alone": (lambda layer, i: layer.weight[i].mean(0), lambda block, h: h * block(torch.tensor([0, 1]))),
    "detached": (lambda layer, h: layer(h).detach() * h, None),
    "a sum": (lambda layer, a, b: layer(a).tanh() + b, lambda block, h: block(h, h.cos())),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "engine", ["MAML", "MAML, one by one", "MAML, forward-over-reverse", "MAML, graphs kept", "ImplicitMAML", "FOMAML"]
)
def test_a_cotangent_that_is_handed_on(engine, form):
    function, use = FORMS[form]
    compare(engine, lambda: Block(function), use)


class Loop(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.enter, self.leave, self.call = nn.Linear(4, 4), nn.Linear(4, 2), call
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = self.enter(x)
        for layer in self.layers:
            h = self.call(lambda h: layer(h).tanh(), h)  # noqa: B023
        return self.leave(h)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("call", [lambda f, h: checkpoint(f, h, use_reentrant=False), imaml.recompute])
@pytest.mark.parametrize("engine", ["MAML", "MAML, one by one", "FOMAML", "ImplicitMAML"])
def test_a_lambda_in_a_loop_over_layers(engine, call, learned):
    def found(call):
        torch.manual_seed(0)
        model = Loop(call).double()
        model.layers.requires_grad_(learned)
        return meta_gradient(ENGINES[engine], Objective(model, F.mse_loss), tasks())

    agree(found(call), found(lambda f, h: f(h)))


@pytest.mark.parametrize("names", [["block.0", "block.2"], ["block.2"]])
def test_a_module_by_its_second_name(names):
    def twice():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.Tanh(), layer)

    compare("MAML", twice, names=names)
