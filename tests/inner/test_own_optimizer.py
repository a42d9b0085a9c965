"""An inner optimiser of the user's own: what it needs, and what it must not do."""

from dataclasses import dataclass

import pytest
import torch.nn.functional as F

from imaml import FOMAML, MAML, GradientDescent, InnerOptimizer, Objective, verify
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
    with pytest.raises((error, RuntimeError) if chunk_size is None and wrong == "in place" else error) as caught:
        engine(Objective(cases.make_model(), F.mse_loss), cases.make_tasks())
    assert chunk_size is None or message.split()[-1] in str(caught.value)
