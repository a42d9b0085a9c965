"""The start of a user's module for `imaml bench` and `imaml verify`: a small problem."""

FACTORY = """
import torch
from torch import nn
from torch.nn import functional as F
from imaml import MAML, GradientDescent, ImplicitMAML, NewtonCG, Objective, TaskBatch

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    def batch():
        return torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    return Objective(model, F.mse_loss), TaskBatch(support=batch(), query=batch())
"""
