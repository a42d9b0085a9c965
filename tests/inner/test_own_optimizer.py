"""An inner optimiser of the user's own: what it needs, and what it must not do."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from imaml import (
    FOMAML,
    MAML,
    Adam,
    AdamW,
    GradientDescent,
    ImplicitMAML,
    InnerOptimizer,
    Objective,
    RMSprop,
    Task,
    verify,
)
from tests.inner import cases, unrolled
from tests.inner.cases import RATES, STEPS, close


@dataclass(frozen=True, kw_only=True)
class Adagrad(InnerOptimizer):
    """What a user writes."""

    @property
    def buffers(self):
        return 1

    def update(self, state, gradient, step, at):
        phi, total = state
        total = total + gradient**2
        return phi - at["lr"] * gradient / (total + 1e-3).sqrt(), total


def test_a_new_optimizer_needs_its_update_alone():
    model, tasks = cases.make_model(), cases.make_tasks()
    make_meta, lr, rates = RATES["per layer and step"]

    def adagrad(p, g, memory, k, lr):
        memory["total"] = memory.get("total", 0) + g**2
        return p - lr * g / (memory["total"] + 1e-3) ** 0.5

    loss, meta, theta = cases.plain_loss(model), make_meta(model), dict(model.named_parameters())
    expected = unrolled.meta_gradient(loss, loss, theta, meta, tasks, adagrad, STEPS, lr=rates)
    objective = Objective(model, F.mse_loss, meta=meta)
    for checkpoints in (None, 1):
        engine = MAML(inner=Adagrad(lr=lr, steps=STEPS), checkpoints=checkpoints)
        close(engine.value_and_grad(objective, tasks)[1], expected)
    assert verify.meta_gradient(engine, objective, tasks).status == "passed"


@dataclass(frozen=True, kw_only=True)
class Signs(InnerOptimizer):
    """Gradient descent that remembers signs, which have no derivative; `wrong` says what else it does."""

    wrong: str = ""

    @property
    def buffers(self):
        return 1

    def update(self, state, gradient, step, at):
        phi, _ = state
        if self.wrong == "in place":
            phi = phi.sub_(at["lr"] * gradient)
        following = phi - at["lr"] * gradient
        return following if self.wrong == "no tuple" else (following, gradient.sign().detach())


def test_an_update_may_have_buffers_without_derivative():
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    found = MAML(inner=Signs(lr=0.1, steps=3)).value_and_grad(objective, tasks)[1]
    close(found, MAML(inner=GradientDescent(lr=0.1, steps=3)).value_and_grad(objective, tasks)[1])


@pytest.mark.parametrize("chunk_size", [1, None])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [("in place", ValueError, "Signs.update changes its arguments in place"), ("no tuple", TypeError, "Got Tensor")],
)
def test_an_update_must_return_a_new_state(wrong, error, message, chunk_size):
    engine = FOMAML(inner=Signs(lr=0.1, steps=2, wrong=wrong), chunk_size=chunk_size)
    with pytest.raises(error, match=message):
        engine(Objective(cases.make_model(), F.mse_loss), cases.make_tasks())


class Changed:
    """Brings an `update` that changes the gradient first: a mixin, as clipping is often written."""

    how = staticmethod(torch.tanh)

    def update(self, state, gradient, step, at):
        return super().update(state, self.how(gradient), step, at)


@dataclass(frozen=True, kw_only=True)
class ChangedDescent(Changed, GradientDescent):
    pass


@dataclass(frozen=True, kw_only=True)
class ChangedAgain(ChangedDescent):
    """Of a class that overrides nothing itself."""


@dataclass(frozen=True, kw_only=True)
class OwnDescent(GradientDescent):
    """The `update` in the class itself."""

    def update(self, state, gradient, step, at):
        return super().update(state, torch.tanh(gradient), step, at)


@dataclass(frozen=True, kw_only=True)
class ChangedAdam(Changed, Adam):
    pass


@dataclass(frozen=True, kw_only=True)
class ChangedAdamW(Changed, AdamW):
    pass


@dataclass(frozen=True, kw_only=True)
class ChangedRMSprop(Changed, RMSprop):
    pass


def scalar_problem():
    """L = (w x)^2 / 2 at w = 1, x = 2, on support and query."""
    w, x = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 2.0))

    def loss(params, batch):
        return (params["w"] * batch).square().sum() / 2

    return Objective.from_function(loss, {"w": w.requires_grad_()}), [Task(support=x, query=x)]


@pytest.mark.parametrize("kind", [OwnDescent, ChangedDescent, ChangedAgain])
@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 3.1953), (0.9, 2.8348)])
@pytest.mark.parametrize("how", [{}, {"linearize": True}, {"checkpoints": 0}])
def test_the_update_of_a_subclass_is_differentiated_as_it_is_written(kind, momentum, expected, how):
    objective, tasks = scalar_problem()
    engine = MAML(inner=kind(lr=0.1, steps=2, momentum=momentum), **how)
    assert engine.value_and_grad(objective, tasks)[1]["w"].item() == pytest.approx(expected, abs=1e-4)


CHANGES = {
    "clip": lambda g: g.clamp(-0.3, 0.3),
    "tanh": torch.tanh,
    "rows of norm 1": lambda g: g / g.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ChangedDescent, {}),
        (ChangedDescent, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
        (ChangedAdam, {"eps": 1e-3}),
        (ChangedAdamW, {"eps": 1e-3}),
        (ChangedRMSprop, {"eps": 1e-3, "momentum": 0.5}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ", ".join(value),
)
def test_every_optimizer_with_another_update_agrees_with_one_graph_of_all_steps(kind, options, how, monkeypatch):
    monkeypatch.setattr(Changed, "how", staticmethod(CHANGES[how]))
    inner, objective, tasks = (
        kind(lr=0.05, steps=3, **options),
        Objective(cases.make_model(), F.mse_loss),
        cases.make_tasks(),
    )
    rates = {name: float(value) for name, value in inner.hyperparameters.items()}
    theta = {n: p.detach().clone().requires_grad_() for n, p in objective.parameters().items()}
    sizes, shapes = [p.numel() for p in theta.values()], [p.shape for p in theta.values()]

    def named(flat):
        return dict(zip(theta, (p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)), strict=True))

    losses = []
    for task in tasks:
        state = inner.start(torch.cat([p.reshape(-1) for p in theta.values()]).unsqueeze(0))
        for step in range(3):
            value = cases.plain_loss(objective.model)(named(state[0][0]), {}, task.support)
            gradient = torch.autograd.grad(value, state[0], create_graph=True)[0]
            state = inner.update(state, gradient, step, rates)
        losses.append(cases.plain_loss(objective.model)(named(state[0][0]), {}, task.query))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    expected = dict(zip(theta, found, strict=True))
    for engine in (MAML(inner=inner), MAML(inner=inner, chunk_size=1, checkpoints=1)):
        close(engine.value_and_grad(objective, tasks)[1], expected)


@dataclass(frozen=True, kw_only=True)
class Noisy(GradientDescent):
    """Multiplies the gradient by noise."""

    def update(self, state, gradient, step, at):
        return super().update(state, gradient * torch.rand_like(gradient), step, at)


def test_noise_of_an_update_is_the_same_whenever_its_step_is_taken_again():
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    results = []
    for how in ({}, {"checkpoints": 0}, {"linearize": True}, {"storage": "disk"}):
        torch.manual_seed(0)
        results.append(MAML(inner=Noisy(lr=0.1, steps=4), **how).value_and_grad(objective, tasks))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        close(gradients, results[0][1])
    verdict = verify.meta_gradient(MAML(inner=Noisy(lr=0.1, steps=4)), objective, tasks)
    assert verdict.status == "passed", str(verdict)
    assert verify.meta_gradient(FOMAML(inner=Noisy(lr=0.1, steps=4)), objective, tasks).status == "inconclusive"


@dataclass(frozen=True, kw_only=True)
class HalfWay(GradientDescent):
    """Starts half-way to zero, with a momentum that depends on theta too."""

    def start(self, phi):
        return phi / 2, phi.square()


def test_an_own_start_is_differentiated():
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    engine = MAML(inner=HalfWay(lr=0.1, steps=2, momentum=0.5), regularization=0.3)
    assert verify.meta_gradient(engine, objective, tasks).status == "passed"


def test_an_own_run_is_not_ignored_by_maml():
    @dataclass(frozen=True, kw_only=True)
    class Own(GradientDescent):
        def run(self, problem):
            return problem.theta

    with pytest.raises(TypeError, match="whose own `run` would be ignored"):
        MAML(inner=Own(lr=0.1, steps=1))
    FOMAML(inner=Own(lr=0.1, steps=1))(*scalar_problem())


@dataclass(frozen=True, kw_only=True)
class Detached(GradientDescent):
    def update(self, state, gradient, step, at):
        return (super().update(state, gradient, step, at)[0].detach(),)


def test_an_update_without_any_derivative_leads_to_zero():
    objective, tasks = scalar_problem()
    assert MAML(inner=Detached(lr=0.1, steps=1)).value_and_grad(objective, tasks)[1]["w"].item() == 0


@dataclass(frozen=True, kw_only=True)
class Scaled(GradientDescent):
    """Uses a tensor of somebody else's."""

    scale: torch.Tensor

    def update(self, state, gradient, step, at):
        return super().update(state, gradient * self.scale, step, at)


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_an_update_with_a_tensor_that_would_get_no_gradient_is_refused(strategy):
    objective, tasks = scalar_problem()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    options = {"on_failure": "ignore"} if strategy is ImplicitMAML else {}
    engine = strategy(inner=Scaled(lr=0.1, steps=2, scale=scale), **options)
    with pytest.raises(ValueError, match=r"Scaled.update uses what requires grad .*one of shape \(\)") as caught:
        engine(objective, tasks)
    assert "detach" in str(caught.value)
    with torch.no_grad():
        assert engine(objective, tasks).loss.isfinite()
    strategy(inner=Scaled(lr=0.1, steps=2, scale=scale.detach()), **options)(objective, tasks)
    assert scale.grad is None


def test_an_update_that_is_set_later_is_differentiated_as_it_is_written():
    @dataclass(frozen=True, kw_only=True)
    class Late(GradientDescent):
        pass

    def update(self, state, gradient, step, at):
        return GradientDescent.update(self, state, gradient.tanh(), step, at)

    Late.update = update
    inner = GradientDescent(lr=0.1, steps=2)
    object.__setattr__(inner, "update", lambda *args: update(inner, *args))
    objective, tasks = scalar_problem()
    for each in (Late(lr=0.1, steps=2), inner):
        assert MAML(inner=each).value_and_grad(objective, tasks)[1]["w"].item() == pytest.approx(3.1953, abs=1e-4)


@dataclass(frozen=True, kw_only=True)
class Mixing(GradientDescent):
    """Takes one norm of the gradients of all tasks."""

    def update(self, state, gradient, step, at):
        return super().update(state, gradient / gradient.norm(), step, at)


@pytest.mark.parametrize("strategy", [MAML, FOMAML])
def test_an_update_that_mixes_tasks_is_refused(strategy):
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    with pytest.raises(ValueError, match=r"Mixing.update mixes tasks.*dim=-1"):
        strategy(inner=Mixing(lr=0.1, steps=2))(objective, tasks)
    strategy(inner=Mixing(lr=0.1, steps=2), chunk_size=1)(objective, tasks)


def test_an_update_that_is_no_function_of_its_arguments_is_not_said_to_mix_tasks():
    generator, calls = torch.Generator(), []

    @dataclass(frozen=True, kw_only=True)
    class Noise(GradientDescent):
        def update(self, state, gradient, step, at):
            noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            return super().update(state, gradient + noise, step, at)

    @dataclass(frozen=True, kw_only=True)
    class Counts(GradientDescent):
        def update(self, state, gradient, step, at):
            calls.append(step)
            return super().update(state, gradient / len(calls), step, at)

    for kind in (Noise, Counts):
        FOMAML(inner=kind(lr=0.1, steps=2))(Objective(cases.make_model(), F.mse_loss), cases.make_tasks())
