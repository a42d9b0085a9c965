"""A small regression problem, every inner optimiser, and every way to say its step size."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import Adam, AdamW, GradientDescent, RMSprop, TaskBatch
from tests.inner import unrolled

STEPS = 4
# name: the library's, torch's if there is an equal one, and the same by hand
OPTIMIZERS = {
    "gradient descent": (GradientDescent, torch.optim.SGD, {}, unrolled.sgd()),
    "momentum": (GradientDescent, torch.optim.SGD, {"momentum": 0.8}, unrolled.sgd(0.8)),
    "nesterov": (
        GradientDescent,
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        unrolled.sgd(0.8, True, 0.1),
    ),
    "adam": (Adam, torch.optim.Adam, {"weight_decay": 0.1}, unrolled.adam(decay=0.1)),
    "adam, other betas": (
        Adam,
        torch.optim.Adam,
        {"betas": (0.5, 0.7), "eps": 1e-3},
        unrolled.adam((0.5, 0.7), 1e-3),
    ),
    "adamw": (AdamW, torch.optim.AdamW, {"weight_decay": 0.2}, unrolled.adam(decay=0.2, decoupled=True)),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"weight_decay": 0.1}, unrolled.rmsprop(decay=0.1)),
    "rmsprop, momentum": (
        RMSprop,
        torch.optim.RMSprop,
        {"alpha": 0.6, "momentum": 0.5},
        unrolled.rmsprop(0.6, momentum=0.5),
    ),
    "adamw, eps_root": (AdamW, None, {"eps_root": 1e-3}, unrolled.adam(decay=0.01, decoupled=True, root=1e-3)),
    "rmsprop, eps_root": (RMSprop, None, {"eps_root": 1e-3}, unrolled.rmsprop(root=1e-3)),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_tasks(tasks=2, examples=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tasks, 2 * examples, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(tasks, 2 * examples, 2, generator=generator, dtype=torch.float64)
    return TaskBatch(support=(x[:, :examples], y[:, :examples]), query=(x[:, examples:], y[:, examples:]))


def plain_loss(model):
    return lambda phi, meta, batch: F.mse_loss(functional_call(model, phi, (batch[0],)), batch[1])


def random(*shape, scale=0.2, shift=-3.0):
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
    return value.requires_grad_()


def per_parameter(model):
    return {f"log_lr {n}": random(*p.shape) for n, p in model.named_parameters()}


# name: the meta-parameters of a model, the library's lr, and lr(meta, parameter, step) by hand
RATES = {
    "number": (lambda model: {}, 0.05, lambda meta, name, k: 0.05),
    "scalar": (
        lambda model: {"log_lr": random()},
        lambda meta: meta["log_lr"].exp(),
        lambda meta, name, k: meta["log_lr"].exp(),
    ),
    "per step": (
        lambda model: {"log_lr": random(STEPS)},
        lambda meta: meta["log_lr"].exp(),
        lambda meta, name, k: meta["log_lr"][k].exp(),
    ),
    "per parameter": (
        per_parameter,
        lambda meta: {n.removeprefix("log_lr "): t.exp() for n, t in meta.items()},
        lambda meta, name, k: meta[f"log_lr {name}"].exp(),
    ),
    "per layer and step": (
        lambda model: {"log_lr": random(4, STEPS)},
        lambda meta: {
            "0.weight": list(meta["log_lr"][0].exp()),
            "0.bias": meta["log_lr"][1].exp().unsqueeze(1),
            "2.weight": meta["log_lr"][2].exp().view(STEPS, 1, 1),
            "2.bias": meta["log_lr"][3].exp().unsqueeze(1).expand(STEPS, 2),
        },
        lambda meta, name, k: meta["log_lr"].exp()[["0.weight", "0.bias", "2.weight", "2.bias"].index(name), k],
    ),
}


def close(got, expected, rtol=1e-10):
    assert set(got) == set(expected)
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)
        assert (got[name] - value).abs().max().item() <= rtol * scale, name
