"""What requires grad, is used, and would get no gradient is refused; leaves that a loss makes are its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, NewtonCG, Objective, Task, TaskBatch, bilevel, verify
from tests.engine.cases import CLASSES, classification, mlp, problem
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=2)
ENGINES = {
    "maml": MAML(inner=INNER),
    "one by one": MAML(inner=INNER, chunk_size=1),
    "graphs kept": MAML(inner=INNER, linearize=True),
    "slices": MAML(inner=INNER, microbatch_size=2),
    "no steps": MAML(inner=GradientDescent(lr=0.1, steps=0)),
    "fomaml": FOMAML(inner=INNER),
    "implicit": ImplicitMAML(inner=INNER, on_failure="ignore"),
    "newton": ImplicitMAML(inner=NewtonCG(steps=2), on_failure="ignore"),
    "gauss-newton": ImplicitMAML(inner=INNER, curvature="ggn"),
}
each_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def weighting():
    return nn.Linear(CLASSES, CLASSES).double()


@each_engine
@pytest.mark.parametrize("place", ["support", "query"])
def test_a_network_that_the_loss_calls_is_refused_unless_it_is_learned(engine, place):
    network, model, tasks = weighting(), mlp(), classification((4,))

    def uses(output, target):
        return F.cross_entropy(network(output), target)

    given = (uses, None) if place == "support" else (F.cross_entropy, uses)
    objective = Objective(model, given[0], outer_loss=given[1])
    if place == "support" and engine.inner.steps == 0:
        place = "query"
    with pytest.raises(ValueError, match=f"The {place} loss uses what requires grad .*'weight' of Linear in the loss"):
        engine(objective, tasks)
    with torch.no_grad():
        assert engine(objective, tasks).loss.isfinite()
    assert engine.adapt(objective, (tasks.support[0][0], tasks.support[1][0])).keys() == set(objective.adapted)
    network.requires_grad_(False)
    engine(objective, tasks).loss.backward()
    assert model[0].weight.grad is not None and network.weight.grad is None


def test_a_tensor_that_another_network_made_is_refused_too():
    network, (model, _, tasks) = weighting(), problem()
    shift = network(torch.ones(CLASSES, dtype=torch.float64))
    objective = Objective(model, lambda output, target: F.cross_entropy(output + shift, target))
    with pytest.raises(ValueError, match=r"one of shape \(3, 3\)"):
        MAML(inner=INNER)(objective, tasks)
    with pytest.raises(ValueError, match="uses what requires grad"):  # before anything is compiled
        MAML(inner=INNER, compile=True)(objective, tasks)
    MAML(inner=INNER)(Objective(model, lambda o, t: F.cross_entropy(o + shift.detach(), t)), tasks)


def test_the_own_parameters_of_a_model_are_refused_where_they_are_not_those_that_adapt():
    model, _, tasks = problem()

    def decay():
        return sum(p.square().sum() for p in model.parameters())

    objective = Objective(model, lambda output, target: F.cross_entropy(output, target) + 0.01 * decay())
    with pytest.raises(ValueError, match=r"the parameter '.*' read past the forward pass"):
        MAML(inner=INNER)(objective, tasks)


def test_a_meta_parameter_is_refused_where_it_is_not_taken_from_the_argument():
    model, _, tasks = problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    past = Objective(model, lambda o, t: F.cross_entropy(o * scale, t), meta={"scale": scale})
    with pytest.raises(ValueError, match="the meta-parameter 'scale' read past `meta`"):
        MAML(inner=INNER)(past, tasks)
    MAML(inner=INNER)(
        Objective(model, lambda o, t, meta: F.cross_entropy(o * meta["scale"], t), meta={"scale": scale}), tasks
    )


class Unregistered(nn.Module):
    """Keeps a tensor that is no parameter."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = mlp(), torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)

    def forward(self, x):
        return self.body(x) * self.scale


def test_a_tensor_that_a_model_does_not_register_is_refused():
    with pytest.raises(ValueError, match=r"one of shape \(3,\)"):
        MAML(inner=INNER)(Objective(Unregistered(), F.cross_entropy), classification((4,)))


def test_a_bilevel_loss_is_looked_at_too():
    weight, x = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)

    def loss(inner, meta, batch):
        return (batch * weight * inner["w"] - meta["m"]).square().mean()

    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    made = bilevel(loss, loss, inner={"w": torch.zeros(3, dtype=torch.float64)}, meta={"m": m})
    with pytest.raises(ValueError, match=r"one of shape \(3,\)"):
        ImplicitMAML(inner=NewtonCG(steps=3), regularization=None)(made, [Task(support=x, query=x)])


@pytest.mark.parametrize("as_list", [False, True])
def test_data_that_requires_grad_is_refused(as_list):
    _, objective, tasks = problem()
    tasks.query[0].requires_grad_()
    given = list(tasks) if as_list else tasks
    with pytest.raises(ValueError, match=r"Got one in `query`, of shape .*meta"):
        MAML(inner=INNER)(objective, given)
    with torch.no_grad():
        MAML(inner=INNER)(objective, given)
    assert tasks.query[0].grad is None


def test_a_metric_may_use_what_it_likes():
    network, (model, plain, tasks) = weighting(), problem()
    objective = Objective(model, F.cross_entropy, metric=lambda output, target: network(output).mean())
    found = MAML(inner=INNER).value_and_grad(objective, tasks)[1]
    assert relative_error(found, MAML(inner=INNER).value_and_grad(plain, tasks)[1]) <= 1e-12
    assert network.weight.grad is None


def test_a_loss_that_makes_leaves_of_its_own_is_evaluated_once_more_and_not_refused():
    calls = []

    def smooth(output, target):
        at = output.detach().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(at, target), at)[0]
        calls.append(at)
        return F.cross_entropy(output, target) + (slope * output).sum() + 0 * at.sum()

    model, _, tasks = problem(tasks=1)
    FOMAML(inner=GradientDescent(lr=0.1, steps=0), chunk_size=1)(Objective(model, smooth), tasks)
    assert len(calls) == 2


def test_verification_refuses_for_a_function_of_another_library_as_well():
    network, (model, _, tasks) = weighting(), problem()
    objective = Objective(model, lambda output, target: F.cross_entropy(network(output), target))

    def plain(objective, tasks):
        return {n: torch.zeros_like(p) for n, p in objective.parameters().items()}

    with pytest.raises(ValueError, match="uses what requires grad"):
        verify.meta_gradient(plain, objective, tasks, against="maml", inner=INNER)
    with pytest.raises(ValueError, match="uses what requires grad"):
        verify.hvp(objective, None, (tasks.support[0][0], tasks.support[1][0]))


def test_a_tensor_used_at_a_later_step_only_is_found():
    scale, steps = torch.ones((), dtype=torch.float64, requires_grad=True), []

    def later(output, target):
        steps.append(output)
        return F.cross_entropy(output * scale if len(steps) > 2 else output, target)

    model, _, tasks = problem(tasks=1)
    with pytest.raises(ValueError, match=r"one of shape \(\)"):
        FOMAML(inner=GradientDescent(lr=0.1, steps=5), chunk_size=1)(Objective(model, later), tasks)


def test_a_task_batch_is_not_changed_by_a_refusal():
    network, tasks = weighting(), classification((4,))
    before = TaskBatch(support=tuple(t.clone() for t in tasks.support), query=tuple(t.clone() for t in tasks.query))
    with pytest.raises(ValueError, match="uses what requires grad"):
        MAML(inner=INNER)(Objective(mlp(), lambda o, t: F.cross_entropy(network(o), t)), tasks)
    for a, b in zip((*tasks.support, *tasks.query), (*before.support, *before.query), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
