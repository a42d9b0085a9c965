"""Optimisers that mix coordinates or step along signs: forward by hand, backward like an unrolled loop."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imaml
from imaml import (
    FOMAML,
    LAMB,
    MAML,
    Adam,
    InnerOptimizer,
    Lion,
    Muon,
    NormalizedDescent,
    Objective,
    SignDescent,
    TorchOptimizer,
    verify,
)
from imaml.inner import _base
from tests.inner import cases, unrolled
from tests.inner.cases import STEPS, close


def sign_descent(mu):
    def update(p, g, memory, k, at):
        memory["m"] = mu * memory.get("m", 0) + (1 - mu) * g
        return p - at["lr"] * torch.sign(memory["m"]) - at["lr"] * at["decay"] * p

    return update


def lion(p, g, memory, k, at):
    m = memory.get("m", torch.zeros_like(p))
    memory["m"] = 0.99 * m + 0.01 * g
    return p - at["lr"] * (torch.sign(0.9 * m + 0.1 * g) + at["decay"] * p)


def lamb(p, g, memory, k, at):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    u = memory["m"] / (1 - 0.9**k) / ((memory["v"] / (1 - 0.999**k) + 1e-4) ** 0.5 + 1e-6) + at["decay"] * p
    return p - at["lr"] * (p**2).sum().sqrt() / (u**2).sum().sqrt() * u


def normalised(momentum=False):
    """What is common to all parameters."""
    means = {}

    def prepare(grads, meta, k):
        if momentum:
            if k == 0:
                means.clear()
            mu = LEARNED["mu"](meta)
            means.update({n: mu * means.get(n, 0) + (1 - mu) * g for n, g in grads.items()})
            grads = dict(means)
        norm = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
        return {n: g / (norm + 1e-8) for n, g in grads.items()}

    return prepare


def plain(p, g, memory, k, at):
    return p - at["lr"] * g


def newton_schulz(x, steps=5):
    if len(x) > len(x.T):
        return newton_schulz(x.T, steps).T
    x = x / (x**2).sum().sqrt()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * torch.linalg.matrix_power(x @ x.T, 2) @ x
    return x


def muon(nesterov=True, wide=False, embedding=None):
    adamw = unrolled.adam(decay=0.01, decoupled=True, root=1e-4)

    def update(p, g, memory, k, at):
        if p.ndim != 2 or p.shape == embedding:
            return adamw(p, g, memory, k, at["adamw_lr"])
        mu = at["mu"]
        memory["m"] = mu * memory.get("m", 0) + (1 - mu) * g
        o = newton_schulz(mu * memory["m"] + (1 - mu) * g if nesterov else memory["m"])
        scale = 0.2 * max(p.shape) ** 0.5 if wide else max(1, p.shape[0] / p.shape[1]) ** 0.5
        return p - at["lr"] * at["decay"] * p - at["lr"] * scale * o

    return update


LEARNED = {
    "lr": lambda meta: meta["lr"].exp(),
    "adamw_lr": lambda meta: meta["adamw_lr"].exp(),
    "decay": lambda meta: meta["decay"].exp(),
    "mu": lambda meta: meta["mu"].sigmoid(),
}
WIDE = {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
MUON = {"lr": "lr", "decay": "weight_decay", "mu": "momentum", "adamw_lr": "adamw_lr"}
# name: the class, its options, its learned hyper-parameters by ours, an update by hand, and what it does to all grads
OPTIMIZERS = {
    "sign": (SignDescent, {}, {"lr": "lr", "decay": "weight_decay"}, sign_descent(0.0), None),
    "sign, momentum": (SignDescent, {"momentum": 0.7}, {"lr": "lr", "decay": "weight_decay"}, sign_descent(0.7), None),
    "lion": (Lion, {}, {"lr": "lr", "decay": "weight_decay"}, lion, None),
    "lamb": (LAMB, {"eps_root": 1e-4}, {"lr": "lr", "decay": "weight_decay"}, lamb, None),
    "normalised": (NormalizedDescent, {}, {"lr": "lr"}, plain, normalised()),
    "normalised, momentum": (NormalizedDescent, {}, {"lr": "lr", "mu": "momentum"}, plain, normalised(momentum=True)),
    "muon": (Muon, {"adamw_eps_root": 1e-4}, MUON, muon(), None),
    "muon, wide": (Muon, {"adamw_eps_root": 1e-4} | WIDE, MUON, muon(nesterov=False, wide=True), None),
    "muon, others": (Muon, {"adamw_eps_root": 1e-4, "others": ["2"]}, MUON, muon(embedding=(2, 4)), None),
}


def learned(names):
    return {name: cases.random(shift=-0.5 if name == "mu" else -2.0) for name in names}


def inner_of(name, *, steps=STEPS, **more):
    kind, options, names, *_ = OPTIMIZERS[name]
    return kind(steps=steps, **{ours: LEARNED[n] for n, ours in names.items()}, **options, **more)


def test_every_public_optimiser_has_its_case():
    public = [v for v in vars(imaml).values() if inspect.isclass(v) and issubclass(v, InnerOptimizer)]
    concrete = {v for v in public if not inspect.isabstract(v)}
    known = {kind for kind, *_ in (*OPTIMIZERS.values(), *cases.OPTIMIZERS.values())}
    assert concrete == known, (
        f"{', '.join(sorted(v.__name__ for v in concrete - known))}: write the update in plain PyTorch, for one "
        "parameter, and add it to OPTIMIZERS here."
    )


@pytest.mark.parametrize("settings", [{}, {"checkpoints": 1}, {"chunk_size": 1, "linearize": False}, {"linearize": 2}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_those_of_an_unrolled_loop(name, settings):
    _, _, names, update, prepare = OPTIMIZERS[name]
    model, tasks, meta = cases.make_model(), cases.make_tasks(3), learned(names)
    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss,
        loss,
        dict(model.named_parameters()),
        meta,
        tasks,
        update,
        STEPS,
        lr=lambda meta, parameter, k: {n: LEARNED[n](meta) for n in names},
        **({} if prepare is None else {"prepare": prepare}),
    )
    engine = MAML(inner=inner_of(name), **settings)
    close(engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1], expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_elementwise_update_is_pulled_back_in_blocks_and_others_whole(name, monkeypatch):
    monkeypatch.setattr(_base, "BLOCK", 4)
    test_meta_gradients_are_those_of_an_unrolled_loop(name, {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_finite_differences(name):
    inner = inner_of(name, steps=3, max_grad_norm=0.5)
    objective = Objective(cases.make_model(), F.mse_loss, meta=learned(OPTIMIZERS[name][2]))
    found = verify.meta_gradient(MAML(inner=inner, regularization=0.1), objective, cases.make_tasks())
    assert found.status == "passed" and found.relative_error <= max(1e-8, 3 * found.resolution)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_an_entry_and_a_step(name):
    """Meta-SGD and a schedule."""
    model = cases.make_model()
    meta = {"log_lr": {n: cases.random(*p.shape) for n, p in model.named_parameters()}}
    kind, options, *_ = OPTIMIZERS[name]
    lr = lambda meta, step: {n: t.exp() / (1 + step) for n, t in meta["log_lr"].items()}  # noqa: E731
    objective = Objective(model, F.mse_loss, meta=meta)
    engine = MAML(inner=kind(steps=3, lr=lr, **options))
    assert verify.meta_gradient(engine, objective, cases.make_tasks()).status == "passed"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_finite_at_zero_gradients(name):
    kind, options, *_ = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # a dead layer: its gradients are zero exactly
        model[2].bias.zero_()
    engine = MAML(inner=kind(lr=0.05, steps=3, **options))
    grads = engine.value_and_grad(Objective(model, F.mse_loss), cases.make_tasks())[1]
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert bool(grads["2.bias"].any())


@pytest.mark.parametrize("name", ["sign", "lion"])
def test_steps_along_signs_take_no_gradient_in_the_sweep(name):
    kind, options, *_ = OPTIMIZERS[name]
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    inner = kind(lr=0.05, steps=3, weight_decay=0.1, **options)
    loss, found = MAML(inner=inner, linearize=False).value_and_grad(objective, tasks)
    assert MAML(inner=inner, linearize=False)(objective, tasks).report.gradients == 4 * len(tasks)
    first_order = FOMAML(inner=inner).value_and_grad(objective, tasks)[1]
    close(found, {n: (1 - 0.05 * 0.1) ** 3 * g for n, g in first_order.items()})


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}])
def test_muon_is_that_of_torch_but_for_its_bfloat16(shape, options):
    torch.manual_seed(0)
    model = nn.Linear(*reversed(shape), bias=False)
    x, y = torch.randn(7, shape[1]), torch.randn(7, shape[0])
    objective = Objective(model, F.mse_loss)
    shared = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.3} | options
    ours = FOMAML(inner=Muon(steps=4, **shared)).adapt(objective, (x, y))["weight"]
    theirs = FOMAML(inner=TorchOptimizer(torch.optim.Muon, steps=4, options=shared)).adapt(objective, (x, y))["weight"]
    moved = (theirs - model.weight).norm()
    assert (ours - theirs).norm() <= 0.02 * moved and moved > 0.1


def test_muon_makes_singular_values_near_one():
    torch.manual_seed(0)
    matrix = torch.randn(2, 6, 4, dtype=torch.float64)
    values = torch.linalg.svdvals(Muon(lr=0.1, steps=1)._orthogonal(matrix))
    assert values.shape == (2, 4) and values.min() > 0.6 and values.max() < 1.3


def test_lamb_is_adam_with_steps_as_long_as_the_parameters():
    model, task = cases.make_model(), cases.make_tasks()[0]
    with torch.no_grad():
        model[2].bias.zero_()
    objective, before = Objective(model, F.mse_loss), dict(model.named_parameters())
    lamb, adam = (FOMAML(inner=kind(lr=0.1, steps=1, eps=1e-6)).adapt(objective, task.support) for kind in (LAMB, Adam))
    for name, parameter in before.items():
        step, other = lamb[name] - parameter, adam[name] - parameter
        torch.testing.assert_close(step / step.norm(), other / other.norm(), rtol=1e-10, atol=1e-12)
        length = 0.1 * parameter.norm().item() if name != "2.bias" else other.norm().item()  # from zero, as by Adam
        assert step.norm().item() == pytest.approx(length, rel=1e-10) and length > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SignDescent(lr=0.1, steps=1, momentum=1.0), ValueError, "`momentum` must be >= 0 and < 1. Got 1.0"),
        (lambda: Lion(lr=0.1, steps=1, betas=(0.9,)), ValueError, "`betas` must be two numbers"),
        (lambda: Lion(lr=0.1, steps=1, weight_decay=-1), ValueError, "`weight_decay` must be >= 0. Got -1"),
        (lambda: NormalizedDescent(lr=0.1, steps=1, eps=0.0), ValueError, "`eps` must be positive"),
        (lambda: LAMB(lr=0.1, steps=1, eps_root=-1.0), ValueError, "`eps_root` must be >= 0"),
        (lambda: Muon(lr=0.1, steps=1, adamw_lr=0.0), ValueError, "`adamw_lr` must be positive. Got 0.0"),
        (lambda: Muon(lr=0.1, steps=1, momentum=-0.1), ValueError, "`momentum` must be >= 0"),
        (lambda: Muon(lr=0.1, steps=1, ns_steps=1.5), TypeError, "`ns_steps` must be an integer"),
        (lambda: Muon(lr=0.1, steps=1, ns_coefficients=(1, 2)), ValueError, "must be three numbers"),
        (lambda: Muon(lr=0.1, steps=1, ns_coefficients=(1, 2, "a")), TypeError, "`ns_coefficients` must be a number"),
        (
            lambda: Muon(lr=0.1, steps=1, adjust_lr_fn="none"),
            ValueError,
            "one of original, match_rms_adamw. Got 'none'",
        ),
        (lambda: Muon(lr=0.1, steps=1, others="head"), TypeError, r"must be a list of names.*write \['head'\]"),
        (lambda: Muon(lr=0.1, steps=1, adamw_betas=(0.9, 2.0)), ValueError, "`adamw_betas` must be >= 0 and < 1"),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_others_that_are_not_there_are_named():
    inner = Muon(lr=0.1, steps=1, others=["head"])
    with pytest.raises(ValueError, match="No parameter is called 'head'.*0.weight"):
        FOMAML(inner=inner)(Objective(cases.make_model(), F.mse_loss), cases.make_tasks())
