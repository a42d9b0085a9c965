"""The start of a user's module for `imaml bench` and `imaml verify`: small problems."""

FACTORY = """
import torch
from torch import nn
from torch.nn import functional as F
from imaml import MAML, GradientDescent, ImplicitMAML, NewtonCG, Objective, Task, TaskBatch, bilevel

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    def batch():
        return torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    return Objective(model, F.mse_loss), TaskBatch(support=batch(), query=batch())

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Linear(2, 32), nn.Linear(32, 2)
    def forward(self, x):
        return x + self.back(torch.tanh(self.wide(x)))

def deep():
    torch.manual_seed(0)
    def batch():
        return torch.randn(2, 300, 2), torch.randn(2, 300, 2)
    return Objective(nn.Sequential(*(Layer() for _ in range(4))), F.mse_loss), TaskBatch(support=batch(), query=batch())

def with_unused():
    objective, tasks = make()
    return Objective(objective.model, F.mse_loss, meta={"log_lr": torch.tensor(-2.0, requires_grad=True)}), tasks

def ridge():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3), torch.randn(12)
    def fit(inner, meta, batch):
        return (batch[0] @ inner["w"] - batch[1]).square().mean()
    def loss(inner, meta, batch):
        return fit(inner, meta, batch) + meta["log_decay"].exp() * inner["w"].square().sum()
    meta = {"log_decay": torch.tensor(-2.0, requires_grad=True)}
    problem = bilevel(loss, fit, inner={"w": torch.zeros(3)}, meta=meta)
    return problem, [Task(support=(x[:6], y[:6]), query=(x[6:], y[6:]))]
"""
