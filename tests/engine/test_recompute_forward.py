"""Recomputed blocks in forward-over-reverse, which `hvp="auto"` takes for them where the modes agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from imaml import CG, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._curvature import derivatives
from imaml._curvature.exact_products import ForwardOverReverse
from imaml._curvature.product import Graph, Sum
from imaml.measure import peak_memory
from tests.losses import curvature, loss_of
from tests.oracles import relative_error

F64 = torch.float64
INNER = GradientDescent(lr=0.05, steps=2)


class WithoutForwardMode(torch.autograd.Function):
    """x^3, twice differentiable backwards alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, c):
        return 3 * ctx.saved_tensors[0] ** 2 * c


class StraightThrough(torch.autograd.Function):
    """A step whose derivative is taken for that of tanh backwards, and for nothing forwards."""

    @staticmethod
    def forward(x):
        return x.sign() * 0.5 + x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, c):
        return (1 - ctx.saved_tensors[0].tanh() ** 2) * c

    @staticmethod
    def jvp(ctx, t):
        return torch.zeros_like(t)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def model(*functions):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), Calls(f), nn.Linear(4, 4)) for f in functions]
    return nn.Sequential(nn.Linear(3, 4), *blocks, nn.Linear(4, 2)).double()


def tasks(number=2, examples=5):
    torch.manual_seed(1)
    x, y = torch.randn(2, number, examples, 3, dtype=F64), torch.randn(2, number, examples, 2, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def run(engine, function_model, **options):
    result = engine(Objective(function_model, F.mse_loss, **options), tasks())
    grads = torch.autograd.grad(result.loss, list(function_model.parameters()))
    return result.report, dict(zip(dict(function_model.named_parameters()), grads, strict=True))


SMOOTH = {
    "tanh": torch.tanh,
    "silu": F.silu,
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "without forward mode": WithoutForwardMode.apply,
    "its input": lambda x: x,
    "a view": lambda x: x.view(x.shape),
    "expanded": lambda x: x.mean(-1, keepdim=True).expand(*x.shape),
    "a checkpoint in a block": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", SMOOTH)
def test_auto_is_forward_over_reverse_with_the_numbers_of_reverse_over_reverse(name, chunk_size):
    if name == "without forward mode" and chunk_size is None:
        pytest.skip("vmap has no rule for it, which another test says")
    net = model(SMOOTH[name], torch.tanh)
    settings = {"inner": INNER, "chunk_size": chunk_size, "linearize": False}
    expected = run(MAML(hvp="reverse-over-reverse", **settings), net)[1]
    for engine in (
        MAML(**settings),
        MAML(hvp="forward-over-reverse", **settings),
        MAML(microbatch_size=2, **settings),
    ):
        report, found = run(engine, net, recompute=[nn.Sequential])
        assert report.hvp_mode == "forward-over-reverse" and "Sequential.forward" in report.recomputed
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("outside", [F.silu, lambda x: F.group_norm(x, 2)], ids=["silu", "group norm"])
@pytest.mark.parametrize("long", [1, 2**40])
def test_formulas_that_want_a_recorded_pass_outside_a_block(monkeypatch, outside, long):
    """The pass is repeated, and what leaves have handed out by then is not added twice."""
    monkeypatch.setattr("imaml._curvature.product.LONG", long)
    net = nn.Sequential(
        *model(torch.tanh), Calls(outside) if outside is F.silu else nn.Tanh(), nn.Linear(2, 2)
    ).double()
    settings = {"inner": INNER, "chunk_size": 1, "linearize": False}
    expected = run(MAML(hvp="reverse-over-reverse", **settings), net)[1]
    found = run(MAML(**settings), net, recompute=["1"])[1]
    assert relative_error(found, expected) < 1e-12


def test_a_backward_pass_that_is_no_transpose_keeps_reverse_over_reverse():
    """A sweep wants the transpose of the derivative of the gradient, as differentiating the loop gives it."""
    net = model(StraightThrough.apply)
    settings = {"inner": INNER, "chunk_size": 1, "linearize": False}
    expected = run(MAML(hvp="reverse-over-reverse", **settings), net)[1]
    report, found = run(MAML(**settings), net, recompute=[nn.Sequential])
    assert report.hvp_mode == "reverse-over-reverse" and relative_error(found, expected) < 1e-12
    forward = run(MAML(hvp="forward-over-reverse", **settings), net, recompute=[nn.Sequential])[1]
    assert relative_error(forward, expected) > 1e-3  # what would come of it


def test_the_modes_are_compared_once_for_an_engine_and_an_objective(monkeypatch):
    compared, agree = [], derivatives._agree
    monkeypatch.setattr(derivatives, "_agree", lambda *args: compared.append(1) or agree(*args))
    engine, objective = MAML(inner=INNER, linearize=False), Objective(model(torch.tanh), F.mse_loss, recompute=["1"])
    for _ in range(2):
        engine.value_and_grad(objective, tasks())
        engine.value_and_grad(objective, tasks(number=3))
    assert len(compared) == 1
    engine.value_and_grad(Objective(objective.model, lambda *args: F.mse_loss(*args), recompute=["1"]), tasks())
    assert len(compared) == 1
    engine.value_and_grad(Objective(model(torch.sin), F.mse_loss, recompute=["1"]), tasks())
    assert len(compared) == 2
    for plain in (MAML(inner=INNER, hvp="reverse-over-reverse"), MAML(inner=INNER, linearize=True)):
        plain.value_and_grad(objective, tasks())
    MAML(inner=INNER).value_and_grad(Objective(model(torch.tanh), F.mse_loss), tasks())
    assert len(compared) == 2


def test_results_repeat_bit_for_bit_from_the_first_call_on():
    engine, objective = MAML(inner=INNER, linearize=False), Objective(model(torch.tanh), F.mse_loss, recompute=["1"])
    first, second = (engine.value_and_grad(objective, tasks())[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=Adam(lr=0.01, steps=3), linearize=False),
        MAML(inner=GradientDescent(lr=0.05, steps=3, momentum=0.9), checkpoints=1),
        MAML(inner=INNER, regularization=0.5, linearize=False),
        ImplicitMAML(inner=INNER, solver=CG(max_steps=4), linearize=False, on_failure="ignore"),
        ImplicitMAML(inner=INNER, solver=CG(max_steps=4), microbatch_size=2, on_failure="ignore"),
    ],
    ids=["Adam", "momentum, checkpoints", "proximal", "implicit", "implicit, slices"],
)
@pytest.mark.parametrize("dtypes", [(F64, F64), (torch.float32, F64)], ids=["one dtype", "two dtypes"])
def test_sweeps_and_solves_along_blocks(engine, dtypes):
    net = model(torch.tanh, torch.sin)
    net[1].to(dtypes[0])
    casts = Calls(lambda x: x.to(dtypes[0])), Calls(lambda x: x.double())
    net = nn.Sequential(net[0], casts[0], net[1], casts[1], net[2], net[3])
    objective = Objective(net, F.mse_loss, adapt=["2.0.weight", "2.2.weight", "4", "5"])
    expected = engine.value_and_grad(objective, tasks())[1]
    objective = Objective(net, F.mse_loss, adapt=["2.0.weight", "2.2.weight", "4", "5"], recompute=["2", "4"])
    found = engine.value_and_grad(objective, tasks())[1]
    assert relative_error(found, expected) < (1e-12 if dtypes[0] == F64 else 1e-5)


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
@pytest.mark.parametrize("long", [1, 2**40])
def test_a_product_is_added_to_a_vector_of_ones_own(monkeypatch, mode, long):
    monkeypatch.setattr("imaml._curvature.product.LONG", long)
    batch = tasks(2)
    loss, phi = loss_of(Objective(model(torch.tanh), F.mse_loss, recompute=["1"]), batch.support, tasks=2)
    torch.manual_seed(2)
    w, total = torch.randn_like(phi), torch.randn_like(phi)
    h = curvature(loss, phi, mode=mode, graph=Graph.REBUILT)
    alone, before = h.product(w)[0], total.clone()
    both, _ = h.product(w, into=total)
    assert both is total
    torch.testing.assert_close(total, before + alone, rtol=1e-12, atol=1e-12)


def test_a_sum_takes_each_part_once():
    batch = tasks(2)
    loss, phi = loss_of(Objective(model(torch.tanh), F.mse_loss), batch.support, tasks=2)
    part, total = loss.whole, Sum(torch.zeros_like(phi), 2.0)
    hooks = total.hooks(part, lambda found: found)
    for view, hook in zip(part.views(torch.ones_like(phi)), hooks, strict=True):
        for _ in range(2):
            assert not hook(view).any() and hook(view).shape == view.shape
        break
    assert total.has_begun
    total.add(torch.ones_like(phi), part)
    torch.testing.assert_close(total.vector, 2 * torch.ones_like(phi))


def test_products_are_handed_out_block_by_block():
    """A leaf's product is added as soon as its block is done: none waits for the others."""
    torch.manual_seed(0)
    wide = [nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh()) for _ in range(16)]
    x = torch.randn(1, 4, 256)
    loss, phi = loss_of(Objective(nn.Sequential(*wide), F.mse_loss, recompute=[nn.Sequential]), (x, x))
    product, w, total = ForwardOverReverse(loss.whole, phi, 0), torch.randn_like(phi), torch.zeros_like(phi)
    product(w, into=Sum(total))
    vector = phi.numel() * 4
    assert peak_memory(lambda: product(w, into=Sum(total))) < 0.5 * vector


LINEAR_ALGEBRA = {
    "solve": lambda a: torch.linalg.solve(a, torch.ones(3, 1, dtype=a.dtype)),
    "logdet": torch.logdet,
    "slogdet": lambda a: torch.linalg.slogdet(a).logabsdet,
    "det": torch.linalg.det,
    "inverse": torch.linalg.inv,
}


@pytest.mark.parametrize("name", LINEAR_ALGEBRA)
def test_formulas_of_torchs_that_lose_tangents_are_found_out(name):
    def loss(params, batch):
        a = torch.eye(3, dtype=F64) * 3 + params["w"] + batch
        return LINEAR_ALGEBRA[name](a).square().sum() + params["w"].sin().sum()

    torch.manual_seed(0)
    params = {"w": 0.3 * torch.randn(3, 3, dtype=F64)}
    x = 0.1 * torch.randn(2, 3, 3, 3, dtype=F64)
    for chunk_size in (None, 1):
        expected, found = (
            MAML(inner=INNER, hvp=mode, chunk_size=chunk_size).value_and_grad(
                Objective.from_function(loss, params), TaskBatch(support=x[0], query=x[1])
            )[1]
            for mode in ("reverse-over-reverse", "forward-over-reverse")
        )
        assert relative_error(found, expected) < 1e-12
