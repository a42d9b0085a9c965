"""What docs/migrating.md gives as *after* has the meta-gradient that the loop *before* had, written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.oracles import relative_error
from tests.pages import read, sections

PAGE = sections(read("docs/migrating.md"))
COMMON, LEARN2LEARN, HIGHER, EXPLICIT, IMPLICIT = PAGE
TASKS = 4


@pytest.fixture
def page():
    """The names that the page's Python has after its first block; the optimiser leaves the parameters as they are."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}
    for letter, examples in (("s", 5), ("q", 6)):
        names[f"x{letter}"] = torch.randn(TASKS, examples, 4, dtype=torch.float64)
        names[f"y{letter}"] = torch.randint(3, (TASKS, examples))
    run(names, PAGE[COMMON][0])
    return names


def run(names, *blocks):
    for block in blocks:
        exec(compile(block, "docs/migrating.md", "exec"), names)


def meta_step(page):
    """What the page's loops end with, for a block that stops at the engine."""
    page["engine"](page["objective"], page["tasks"]).loss.backward()


def found(page):
    return {name: parameter.grad for name, parameter in page["model"].named_parameters()}


def by_hand(page, *, adapted=None, first_order=False, rates=None, step=None):
    """The mean query loss after three steps `p - rate * g`, or `step`, of the adapted parameters."""
    losses = []
    theta = dict(page["model"].named_parameters())
    for x, y, x_query, y_query in zip(*(page[name] for name in ("xs", "ys", "xq", "yq")), strict=True):
        phi = {name: theta[name] for name in adapted or theta}
        state = {}
        for k in range(3):
            loss = F.cross_entropy(functional_call(page["model"], theta | phi, x), y)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=not first_order)
            for (name, p), g in zip(list(phi.items()), grads, strict=True):
                phi[name] = step(p, g, k, state.setdefault(name, {})) if step else p - (rates or RATES)[name] * g
        losses.append(F.cross_entropy(functional_call(page["model"], theta | phi, x_query), y_query))
    return torch.stack(losses).mean()


RATES = dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 0.1)


def expected(page, loss):
    theta = dict(page["model"].named_parameters())
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def test_every_block_of_the_page_is_run_here():
    assert [len(blocks) for blocks in PAGE.values()] == [1, 5, 3, 1, 1]


def test_learn2learn_maml(page):
    run(page, PAGE[LEARN2LEARN][0])
    assert relative_error(found(page), expected(page, by_hand(page))) <= 1e-10


def test_learn2learn_first_order(page):
    run(page, PAGE[LEARN2LEARN][1])
    meta_step(page)
    exact, first_order = (expected(page, by_hand(page, first_order=flag)) for flag in (False, True))
    assert relative_error(found(page), first_order) <= 1e-10 < 1e-3 < relative_error(exact, first_order)


def test_learn2learn_anil(page):
    run(page, PAGE[LEARN2LEARN][0], PAGE[LEARN2LEARN][2])
    page["optimizer"].zero_grad()
    meta_step(page)
    assert relative_error(found(page), expected(page, by_hand(page, adapted=["2.weight", "2.bias"]))) <= 1e-10


def test_learn2learn_meta_sgd(page):
    run(page, PAGE[LEARN2LEARN][3])
    meta_step(page)
    rates = {name: torch.full_like(p, 0.1, requires_grad=True) for name, p in page["model"].named_parameters()}
    loss = by_hand(page, rates=rates)
    of_rates = torch.autograd.grad(loss, list(rates.values()), retain_graph=True)
    assert relative_error(found(page), expected(page, loss)) <= 1e-10
    grads = {name.removeprefix("rate."): rate.grad for name, rate in page["rates"].items()}
    assert relative_error(grads, dict(zip(rates, of_rates, strict=True))) <= 1e-10


def test_learn2learn_test_time(page):
    run(page, PAGE[LEARN2LEARN][0], PAGE[LEARN2LEARN][4])
    phi = dict(page["model"].named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(functional_call(page["model"], phi, page["xs"][0]), page["ys"][0])
        grads = torch.autograd.grad(loss, list(phi.values()))
        phi = {name: p - 0.1 * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    torch.testing.assert_close(page["prediction"], functional_call(page["model"], phi, page["xq"][0]))


def test_higher_sums_over_tasks(page):
    run(page, PAGE[HIGHER][0])
    assert relative_error(found(page), expected(page, TASKS * by_hand(page))) <= 1e-10


def test_higher_adam(page):
    def step(p, g, k, state):
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g.square()
        m, v = state["m"] / (1 - 0.9 ** (k + 1)), state["v"] / (1 - 0.999 ** (k + 1))
        return p - 0.01 * m / (v.sqrt() + 1e-8)

    run(page, PAGE[HIGHER][1])
    meta_step(page)
    assert relative_error(found(page), expected(page, by_hand(page, step=step))) <= 1e-10


def test_higher_learned_step_size(page):
    run(page, PAGE[HIGHER][2])
    meta_step(page)
    lr = page["lr"].detach().double().requires_grad_()  # 0.1 in float32
    loss = by_hand(page, rates=dict.fromkeys(RATES, lr))
    by_lr = torch.autograd.grad(loss, lr, retain_graph=True)[0]
    assert relative_error(found(page), expected(page, loss)) <= 1e-10
    torch.testing.assert_close(page["lr"].grad, by_lr.float())


def test_torchopt_explicit(page):
    run(page, PAGE[EXPLICIT][0])
    assert relative_error(found(page), expected(page, by_hand(page))) <= 1e-10


def test_torchopt_implicit(page, capsys):
    run(page, PAGE[IMPLICIT][0])
    theta = nn.utils.parameters_to_vector(page["model"].parameters()).detach()
    tasks = zip(*(page[name] for name in ("xs", "ys", "xq", "yq")), strict=True)
    total = torch.stack([implicit(page["model"], theta, *task) for task in tasks]).mean(0)
    got = nn.utils.parameters_to_vector(found(page).values())
    assert (got - total).norm() <= 1e-10 * total.norm()
    assert "4 CONVERGED" in capsys.readouterr().out


def implicit(model, theta, x, y, x_query, y_query):
    """One task: sixteen steps on the loss with its proximal term, and conjugate gradients on (I + H / 2) u = v."""

    def loss(flat, inputs, labels):
        named = {n: p.shape for n, p in model.named_parameters()}
        parts = flat.split([shape.numel() for shape in named.values()])
        values = {n: part.view(shape) for (n, shape), part in zip(named.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, values, inputs), labels)

    phi = theta.clone().requires_grad_()
    for _ in range(16):
        objective = loss(phi, x, y) + 0.5 * 2.0 * (phi - theta).square().sum()
        phi = (phi - 0.1 * torch.autograd.grad(objective, phi)[0]).detach().requires_grad_()
    v = torch.autograd.grad(loss(phi, x_query, y_query), phi)[0]
    gradient = torch.autograd.grad(loss(phi, x, y), phi, create_graph=True)[0]
    return conjugate_gradients(lambda p: p + torch.autograd.grad(gradient, phi, p, retain_graph=True)[0] / 2.0, v)


def conjugate_gradients(product, b, *, steps=20, rtol=1e-4):
    """The textbook's, from zero: Hestenes & Stiefel 1952."""
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(steps):
        if r.norm() <= rtol * b.norm():
            break
        ap = product(p)
        alpha = r.dot(r) / p.dot(ap)
        x, following = x + alpha * p, r - alpha * ap
        p, r = following + following.dot(following) / r.dot(r) * p, following
    return x
