"""The Python of docs/guide.md runs as one program, does what it says, and every option has its place on the page."""

import inspect

import pytest
import torch
from torch.nn import functional as F

import imaml
from imaml import (
    CG,
    FOMAML,
    LAMB,
    MAML,
    MINRES,
    Adam,
    AdamW,
    Dense,
    GradientDescent,
    ImplicitMAML,
    InnerState,
    Jacobi,
    Lion,
    Minibatches,
    Muon,
    Neumann,
    NewtonCG,
    NormalizedDescent,
    Nystrom,
    NystromInverse,
    Objective,
    Report,
    RMSprop,
    ScipySolver,
    SignDescent,
    TorchOptimizer,
)
from imaml.nn import chunked_cross_entropy
from tests.pages import read, run

GUIDE = "docs/guide.md"
OPTIONS = (
    *(MAML, FOMAML, ImplicitMAML, Objective, Report),
    *(GradientDescent, Adam, AdamW, RMSprop, NewtonCG, TorchOptimizer),
    *(LAMB, Lion, Muon, NormalizedDescent, SignDescent),
    *(CG, MINRES, Neumann, NystromInverse, Dense, ScipySolver, Jacobi, Nystrom),
    *(Minibatches, Minibatches.of, InnerState),
    chunked_cross_entropy,
)


@pytest.fixture(scope="module")
def guide():
    """The names that the page's program leaves."""
    torch.manual_seed(0)
    return run(GUIDE)


def test_the_python_of_the_guide_runs_and_reaches_every_parameter(guide):
    assert all(p.grad is not None for p in guide["model"].parameters())


def test_tasks_of_different_sizes_have_their_metrics(guide):
    assert guide["result"].report.metric.shape == (2,)


def test_the_training_of_the_guide_weighs_its_examples_and_goes_on(guide):
    assert guide["w"].grad.shape == (60,) and (guide["w"].grad != 0).all()
    assert guide["reached"].step == 6 and guide["running"].step == 1


def test_what_the_guide_learns_gets_a_gradient(guide):
    assert guide["log_lr"]["0.weight"].grad.shape == (32, 2)
    assert all(guide[name].grad.isfinite() for name in ("log_lambda", "log_decay"))


def test_the_gradient_of_the_envelopes_is_what_the_guide_says(guide):
    model, engine, objective = guide["model"], guide["pfedme"], guide["objective"]
    tasks = guide["clients"]
    for name, theta in model.named_parameters():
        adapted = torch.stack([engine.adapt(objective, task.support)[name] for task in tasks])
        expected = guide["lam"] * (theta.detach() - adapted.mean(0))
        torch.testing.assert_close(guide["envelopes"][name], expected, rtol=1e-3, atol=1e-4)


def test_three_batches_of_a_client_give_the_gradient_of_the_guide(guide):
    """(I - alpha H'') v, by a Hessian-vector product of plain torch."""
    model, alpha, batches = guide["model"], guide["alpha"], guide["batches"]
    theta = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}

    def loss(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x.double(),)), y)

    total = [torch.zeros_like(p) for p in theta.values()]
    for task in batches:
        (x, y), (xq, (yq, x3, y3)) = task.support, task.query
        grads = torch.autograd.grad(loss(theta, x, y), list(theta.values()))
        phi = {n: (p - alpha * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), grads, strict=True)}
        v = torch.autograd.grad(loss(phi, xq, yq), list(phi.values()))
        third = torch.autograd.grad(loss(theta, x3, y3), list(theta.values()), create_graph=True)
        products = torch.autograd.grad(third, list(theta.values()), v)
        total = [t + (a - alpha * b) / len(batches) for t, a, b in zip(total, v, products, strict=True)]
    for name, expected in zip(theta, total, strict=True):
        torch.testing.assert_close(guide["averaged"][name].double(), expected, rtol=1e-4, atol=1e-6)


def test_what_happens_along_the_way_is_in_the_report_of_the_guide(guide):
    report = guide["along"](guide["objective"], guide["tasks"]).report
    assert report.outer_losses.shape == (3, 25)
    expected = torch.tensor([0.1, 0.2, 0.7]) @ report.outer_losses
    torch.testing.assert_close(report.query_loss, expected)
    assert guide["logits"].grad.abs().sum() > 0


def test_the_single_loop_of_the_guide_goes_on_from_call_to_call(guide):
    assert guide["state"].step == 50
    assert guide["state"].solution.shape == guide["state"].parameters["w"].shape == (1, 3)
    assert guide["log_decay"].item() != -2.0


def test_the_learned_optimizer_of_the_guide_learns(guide):
    losses = guide["outer_losses"]
    assert losses[-1] < 0.99 * losses[0] and sum(losses[10:]) < sum(losses[:10])


def test_the_guide_has_the_verdicts_that_it_says(guide):
    assert guide["verified"].status == "passed"
    assert guide["refuted"].status == "failed" and "first-order" in guide["refuted"].cause


def test_the_guide_skips_the_task_that_it_says(guide):
    assert guide["others"].report.skipped == (3,)


def test_the_forecast_of_the_guide_fits(guide):
    assert guide["forecast"].recommended is not None


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_every_option_is_in_the_guide(kind):
    page = read(GUIDE)
    assert kind is Report or f"`{kind.__qualname__}`" in page
    named = [name for name in inspect.signature(kind).parameters if name not in ("model", "loss", "more")]
    assert not [name for name in named if f"`{name}`" not in page and f"`{name}=" not in page]


def test_every_solver_and_inner_loop_is_in_the_guide():
    kinds = (imaml.LinearSolver, imaml.InnerSolver, imaml.MetaGradient)
    public = [value for value in vars(imaml).values() if inspect.isclass(value) and issubclass(value, kinds)]
    concrete = [value for value in public if not inspect.isabstract(value)]
    assert {*concrete} <= {*OPTIONS}
