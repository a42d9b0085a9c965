"""An update that reads meta-parameters itself, up to a learned optimiser: a network with a hidden state an entry."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, InnerOptimizer, Objective, TaskBatch, verify
from imaml._losses.layout import Layout
from imaml.inner import Rates, _base
from tests.inner import cases, unrolled
from tests.inner.cases import STEPS, close

HIDDEN = 3


def features(gradient, momentum, *hidden):
    return torch.stack([gradient, gradient.abs().add(1e-3).log(), momentum, *hidden], -1)


@dataclass(frozen=True, kw_only=True)
class Learned(InnerOptimizer):
    """A small network an entry: from its gradient, momentum and hidden state to its step and next hidden state."""

    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    net: nn.Module
    meta: tuple[str, ...] = ("net", "decay")

    @property
    def buffers(self):
        return 1 + HIDDEN

    def update(self, state, gradient, step, at):
        phi, momentum, *hidden = state
        momentum = at.meta["decay"].sigmoid() * momentum + gradient
        out = functional_call(self.net, at.meta["net"], (features(gradient, momentum, *hidden),))
        return phi - at["lr"] * out[..., 0], momentum, *out[..., 1:].tanh().unbind(-1)


def make_net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3 + HIDDEN, 5), nn.Tanh(), nn.Linear(5, 1 + HIDDEN)).to(dtype)


def by_hand(net):
    def update(p, g, memory, k, at):
        hidden = memory.get("hidden", [torch.zeros_like(p)] * HIDDEN)
        memory["m"] = at["decay"].sigmoid() * memory.get("m", 0) + g
        values = {n.removeprefix("net."): t for n, t in at.items() if n.startswith("net.")}
        out = functional_call(net, values, (features(g, memory["m"], *hidden),))
        memory["hidden"] = list(out[..., 1:].tanh().unbind(-1))
        return p - at["lr"] * out[..., 0]

    return update


def learned(**changes):
    net = make_net()
    meta = {"net": dict(net.named_parameters()), "decay": cases.random(shift=0.0), "log_lr": cases.random(shift=-2.0)}
    return net, meta | changes


@pytest.mark.parametrize("block", [None, 4], ids=["whole", "in blocks"])
@pytest.mark.parametrize(
    "settings", [{}, {"checkpoints": 1}, {"chunk_size": 1, "linearize": False}, {"linearize": True}]
)
def test_meta_gradients_are_those_of_an_unrolled_loop(settings, block, monkeypatch):
    if block:
        monkeypatch.setattr(_base, "BLOCK", block)
    (net, meta), model, tasks = learned(), cases.make_model(), cases.make_tasks(3)
    flat = {f"net.{n}": p for n, p in meta["net"].items()} | {n: meta[n] for n in ("decay", "log_lr")}
    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss,
        loss,
        dict(model.named_parameters()),
        flat,
        tasks,
        by_hand(net),
        STEPS,
        lr=lambda meta, name, k: meta | {"lr": meta["log_lr"].exp()},
    )
    engine = MAML(inner=Learned(lr=lambda meta: meta["log_lr"].exp(), steps=STEPS, net=net), **settings)
    close(engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1], expected)


def test_meta_gradients_are_finite_differences():
    net, meta = learned()
    inner = Learned(lr=lambda meta, step: meta["log_lr"].exp() / (1 + step), steps=3, net=net, max_grad_norm=0.5)
    objective = Objective(cases.make_model(), F.mse_loss, meta=meta)
    found = verify.meta_gradient(MAML(inner=inner), objective, cases.make_tasks())
    assert found.status == "passed" and found.relative_error <= max(1e-8, 3 * found.resolution)


def test_a_learned_optimizer_learns():
    """Quadratics of curvatures from 0.1 to 1, which gradient descent is slow on."""
    net, curvature = make_net(torch.float32), torch.logspace(-1, 0, 6)
    decay, w = torch.zeros((), requires_grad=True), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    objective = Objective.from_function(
        lambda params, batch: (curvature * (params["w"] - batch).square()).sum() / 2,
        {"w": w},
        meta={"net": dict(net.named_parameters()), "decay": decay},
    )
    engine = MAML(inner=Learned(lr=0.3, steps=5, net=net))
    optimizer, losses = torch.optim.Adam([*net.parameters(), decay], lr=0.03), []
    for _ in range(60):
        target = torch.randn(16, 6, generator=generator)
        result = engine(objective, TaskBatch(support=target, query=target))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) / 5


@dataclass(frozen=True, kw_only=True)
class Preconditioned(InnerOptimizer):
    """A learned matrix for the rows of every weight matrix, and the size of each parameter's gradient shared."""

    @property
    def meta(self):
        return ("left", "mix")

    def update(self, state, gradient, step, at):
        phi, g = at.views(state[0]), at.views(gradient)
        lr = at.views(at["lr"])
        norms = torch.stack([t.flatten(1).square().sum(-1) for t in g.values()], -1) @ at.meta["mix"]
        norms = dict(zip(g, norms.unbind(-1), strict=True))
        moved = {}
        for name, t in g.items():
            t = at.meta["left"][name] @ t if t.ndim == 3 else t
            moved[name] = phi[name] - lr[name] * t / (1 + norms[name].view(-1, *(1,) * (t.ndim - 1)))
        return (at.flat(moved),)


@pytest.mark.parametrize("rate", ["number", "scalar", "per parameter", "per layer and step"])
@pytest.mark.parametrize("settings", [{}, {"checkpoints": 1, "chunk_size": 1}])
def test_an_update_of_named_parameters_and_meta_parameters_of_any_shape(settings, rate):
    make_meta, lr, rates = cases.RATES[rate]
    model, tasks = cases.make_model(), cases.make_tasks()
    left = {"0.weight": cases.random(4, 4, shift=0.1), "2.weight": cases.random(2, 2, shift=0.1)}
    own = make_meta(model)
    mix = cases.random(4, 4, shift=0.1)
    meta = own | {"left": left, "mix": mix}

    def prepare(grads, meta, k):
        norms = torch.stack([g.square().sum() for g in grads.values()]) @ meta["mix"]
        return {
            n: (meta[f"left.{n}"] @ g if g.ndim == 2 else g) / (1 + norm)
            for (n, g), norm in zip(grads.items(), norms, strict=True)
        }

    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss,
        loss,
        dict(model.named_parameters()),
        own | {f"left.{n}": t for n, t in left.items()} | {"mix": mix},
        tasks,
        unrolled.sgd(),
        STEPS,
        lr=rates,
        prepare=prepare,
    )
    found = lr if rate != "per parameter" else lambda meta: lr({n: meta[n] for n in own})
    engine = MAML(inner=Preconditioned(lr=found, steps=STEPS), **settings)
    close(engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1], expected)


@dataclass(frozen=True, kw_only=True)
class Scaled(GradientDescent):
    """Uses a meta-parameter, unless it says otherwise."""

    meta: tuple[str, ...] = ("scale",)
    reads: str | None = "scale"

    def update(self, state, gradient, step, at):
        scale = 1.0 if self.reads is None else at.meta[self.reads]
        return super().update(state, gradient * scale, step, at)


def quadratic(**meta):
    """L = scale (w - x)^2 / 2, where the scale is a meta-parameter too."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    batch = torch.tensor([[3.0], [2.0]], dtype=torch.float64)

    def loss(params, batch, meta):
        return meta["scale"] * ((params["w"] - batch) ** 2).sum() / 2

    return Objective.from_function(loss, {"w": w}, meta=meta), TaskBatch(support=batch, query=batch)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_meta_parameter_of_a_loss_a_rate_and_an_update_gets_the_sum(chunk_size):
    objective, tasks = quadratic(scale=torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
    inner = Scaled(lr=lambda meta: 0.1 * meta["scale"], steps=2)
    engine = MAML(inner=inner, regularization=lambda meta: meta["scale"], chunk_size=chunk_size)
    assert verify.meta_gradient(engine, objective, tasks).status == "passed"


def test_a_meta_parameter_that_is_not_learned_is_read_too():
    constant, tasks = quadratic(scale=torch.tensor(0.7, dtype=torch.float64))
    found = MAML(inner=Scaled(lr=0.1, steps=2)).value_and_grad(constant, tasks)[1]
    plain = MAML(inner=GradientDescent(lr=0.07, steps=2)).value_and_grad(constant, tasks)[1]
    close(found, plain)


def test_a_task_that_is_skipped_leaves_nothing_behind():
    """Where it starts, its loss has a gradient and no second derivative: that is found after the sweep."""
    net, meta = learned()
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    objective = Objective.from_function(
        lambda params, batch: (params["w"] - batch).abs().pow(1.5).sum(),
        {"w": w},
        meta=meta,
        outer_loss=lambda params, batch: params["w"].square().sum(),
    )
    support = torch.tensor([[3.0, 1.0], [1.0, -2.0], [0.5, 2.0]], dtype=torch.float64)
    tasks = TaskBatch(support=support, query=support)
    inner = Learned(lr=lambda meta, step: meta["log_lr"].exp(), steps=2, net=net)
    engine = MAML(inner=inner, on_nonfinite="skip")
    assert engine(objective, tasks).report.skipped == (1,)
    found = engine.value_and_grad(objective, tasks)[1]
    close(found, MAML(inner=inner).value_and_grad(objective, [tasks[0], tasks[2]])[1])


class Half(nn.Module):
    """Parameters in bfloat16, which adapt in float32."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(()).bfloat16())

    def forward(self, x):
        return x @ self.w + self.b


def test_views_are_in_the_dtype_of_the_state():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Looking(GradientDescent):
        def update(self, state, gradient, step, at):
            views = at.views(gradient)
            seen.append({n: (tuple(v.shape), v.dtype, v._base is not None) for n, v in views.items()})
            assert torch.equal(at.flat(views), gradient)
            return super().update(state, gradient, step, at)

    x = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    y = torch.randn(2, 4, 2, dtype=torch.bfloat16)
    tasks = TaskBatch(support=(x, y), query=(x, y))
    FOMAML(inner=Looking(lr=0.1, steps=1))(Objective(Half(), F.mse_loss), tasks)
    assert seen[0] == {"w": ((2, 3, 2), torch.float32, True), "b": ((2,), torch.float32, True)}


def test_rates_are_a_mapping_of_hyperparameters():
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(())})
    at = Rates({"lr": 0.1, "momentum": torch.arange(7.0), "decay": torch.ones(1)}, layout)
    assert dict(at)["lr"] == 0.1 and "lr" in at and len(at) == 3 and at.get("none") is None
    assert at.views(at["lr"]) == {"a": 0.1, "b": 0.1} and at.views(at["decay"])["b"].shape == (1,)
    assert at.views(at["momentum"])["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    with pytest.raises(ValueError, match=r"one tensor for each of \['a', 'b'\]. Got \['a'\]"):
        at.flat({"a": torch.zeros(1, 2, 3)})
    for other in (Rates({"lr": 0.1}), at.part(lambda t: t)):
        with pytest.raises(ValueError, match="by name are not known here.*`is_elementwise`"):
            other.views(torch.zeros(1, 7))


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        (lambda: Scaled(lr=0.1, steps=2, meta="scale"), TypeError, "`meta` of Scaled must be a tuple.*Got 'scale'"),
        (lambda: Scaled(lr=0.1, steps=2, meta=(3,)), TypeError, r"must be a tuple of names. Got \(3,\)"),
        (
            lambda: Scaled(lr=0.1, steps=2, meta=("scale", "group.a")),
            ValueError,
            r"`meta` names 'group.a'. Expected keys.*Got \['group', 'scale'\], 'group' a group of \['a'\]",
        ),
        (
            lambda: Scaled(lr=0.1, steps=2, meta=("scale",), reads="group"),
            ValueError,
            r"`at.meta` has no 'group'. Got \['scale'\]: return the names.*property `meta`",
        ),
    ],
)
def test_what_is_said_of_names(inner, error, message):
    one = torch.ones((), dtype=torch.float64)
    objective, tasks = quadratic(scale=one, group={"a": one})
    with pytest.raises(error, match=message):
        MAML(inner=inner())(objective, tasks)


def test_a_meta_parameter_that_an_update_names_and_does_not_use_is_an_error():
    model, tasks = cases.make_model(), cases.make_tasks()
    objective = Objective(model, F.mse_loss, meta={"scale": cases.random(shift=1.0)})
    read, unread = (MAML(inner=Scaled(lr=0.1, steps=2, reads=reads)) for reads in ("scale", None))
    read(objective, tasks)
    read.plan(objective, tasks)
    for call in (unread, unread.plan, MAML(inner=Scaled(lr=0.1, steps=0)), FOMAML(inner=read.inner)):
        with pytest.raises(ValueError, match="'scale' is zero"):
            call(objective, tasks)
    with pytest.raises(ValueError, match="'scale' is zero.*MAML"):
        ImplicitMAML(inner=Scaled(lr=0.1, steps=2))(objective, tasks)


def test_a_tensor_that_is_read_past_meta_is_an_error_that_says_where_to_find_it():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    @dataclass(frozen=True, kw_only=True)
    class Past(GradientDescent):
        def update(self, state, gradient, step, at):
            return super().update(state, gradient * scale, step, at)

    objective, tasks = quadratic(scale=scale)
    with pytest.raises(ValueError, match=r"the meta-parameter 'scale'.*optimiser's property `meta`.*`at.meta`"):
        MAML(inner=Past(lr=0.1, steps=1))(objective, tasks)


def test_one_task_alone_has_the_same_rows():
    (net, meta), model, tasks = learned(), cases.make_model(), cases.make_tasks()
    objective, engine = Objective(model, F.mse_loss, meta=meta), FOMAML(inner=Learned(lr=0.1, steps=2, net=net))
    with torch.no_grad():
        together = engine(objective, tasks).report.query_loss
        alone = [engine(objective, [task]).report.query_loss[0] for task in tasks]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0)
