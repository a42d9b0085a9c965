"""`imaml.verify.hvp`: right products pass on any model, each broken one fails with its cause."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import imaml
from imaml import Objective
from imaml._curvature.exact_products import ForwardOverReverse, ReverseOverReverse
from imaml._curvature.finite_difference import FiniteDifference
from imaml._losses.replay import Replay
from imaml.models import MLP, Conv4
from imaml.verify._modes import MODES, find
from imaml.verify._products import differences
from tests.engine.cases import Transformer

EXAMPLES, WIDTH, CLASSES = 6, 4, 3


def batch(*shape):
    return torch.randn(EXAMPLES, *(shape or (WIDTH,))), torch.randint(CLASSES, (EXAMPLES,))


def network(*between, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(WIDTH, 5), *between, activation(), nn.Linear(5, CLASSES))


def verify(model, adapt=None, data=None, loss=F.cross_entropy, **options):
    return imaml.verify.hvp(Objective(model, loss, adapt=adapt), None, data or batch(), **options)


def of_function(loss, *values):
    return imaml.verify.hvp(Objective.from_function(loss, {"w": torch.tensor(values)}), None, (torch.ones(1),) * 2)


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class Drops(Function):
    """sin whose backward is right, and whose double backward misses a term."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].detach().cos()


class Once(Drops):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class StraightThrough(Function):
    """sin with the gradient of x^3 / 3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].square()


class Quantised(Function):
    """x times a weight of 16 levels, in a dtype of its own, and saved as autograd does not see."""

    @staticmethod
    def forward(ctx, x, levels, scale, dtype):
        ctx.weight = levels.to(dtype) * scale.to(dtype)
        return (x.to(dtype) @ ctx.weight).to(x)

    @staticmethod
    def backward(ctx, g):
        return (g.to(ctx.weight.dtype) @ ctx.weight.T).to(g), None, None, None


class Adapter(nn.Module):
    """A frozen layer of 4 bits beside a trainable one of low rank."""

    def __init__(self, width, dtype):
        super().__init__()
        self.dtype = dtype
        weight = torch.randn(width, width) / width**0.5
        scale = weight.abs().max() / 7
        self.register_buffer("scale", scale)
        self.register_buffer("levels", (weight / scale).round().to(torch.int8))
        self.low_rank = nn.Sequential(nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False))

    def forward(self, x):
        return Quantised.apply(x, self.levels, self.scale, self.dtype) + self.low_rank(x)


def of_four_bits(dtype=torch.float32, width=WIDTH):
    torch.manual_seed(0)
    layers = (Adapter(width, dtype), nn.Tanh(), nn.LayerNorm(width), Adapter(width, dtype), nn.Linear(width, CLASSES))
    return nn.Sequential(*layers)


def tied():
    model = network(nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[4].weight = model[2].weight
    return model


SMOOTH = {
    "mlp": lambda: network(),
    "layer norm": lambda: network(nn.LayerNorm(5)),
    "batch norm": lambda: network(nn.BatchNorm1d(5, track_running_stats=False)),
    "instance norm": lambda: network(nn.Unflatten(1, (5, 1)), nn.Flatten(), nn.GroupNorm(1, 5)),
    "softplus": lambda: network(activation=nn.Softplus),
    "dropout": lambda: network(nn.Dropout(0.4)),
    "tied": tied,
}


@pytest.mark.parametrize("build", SMOOTH.values(), ids=SMOOTH)
def test_a_smooth_model_passes_with_second_order_convergence(build):
    found = verify(build())
    assert found.status == "passed", str(found)
    assert found.relative_error < 1e-10 and found.resolution < 1e-6 and found.cause is None
    rows = [line for line in found.details if line.startswith(("reverse", "forward", "finite"))]
    assert len(rows) == 4 and not any("not supported" in row for row in rows)
    order = float(str(found).split(": order ")[1].split()[0])
    assert order == pytest.approx(2, abs=0.1)


def test_relu_convolution_and_attention_pass():
    assert verify(MLP(WIDTH, CLASSES)).status == "passed"
    assert verify(Conv4(CLASSES, channels=4), data=batch(1, 28, 28)).status == "passed"
    assert verify(Transformer(), data=batch(5, WIDTH)).status == "passed"


def test_modes_and_differences_equal_the_dense_hessian():
    model, (x, y) = network(nn.LayerNorm(5)).double(), batch()
    x, names, weights = x.double(), [n for n, _ in model.named_parameters()], [p.detach() for p in model.parameters()]

    def loss(*values):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, values, strict=True)), x), y)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    sizes = [p.numel() for p in weights]
    rows = [torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, blocks, strict=True)]
    directions = F.normalize(torch.randn(2, sum(sizes), dtype=torch.float64))
    dense = directions @ torch.cat(rows)

    def gradient(phi):
        leaves = [v.view(p.shape).requires_grad_() for v, p in zip(phi.split(sizes), weights, strict=True)]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(*leaves), leaves)])

    plain = differences(gradient, torch.cat([p.flatten() for p in weights]), directions, 1e-7)
    off = (plain.products - dense).norm().item()
    assert off <= plain.error < 1e-5 * dense.norm().item()
    for mode in MODES:
        found = find(mode, Objective(model, F.cross_entropy), (x, y), directions, 0)
        assert (found.products - dense).norm() <= (1e-12 if found.is_exact else 1e-6) * dense.norm()


def test_products_for_fixed_parameters_are_compared_too(monkeypatch):
    assert verify(network(), adapt=["2"]).status == "passed"
    original = ReverseOverReverse.__call__

    def wrong(self, w, *, mixed=False, into=None):
        adapted, fixed = original(self, w, mixed=mixed)
        return adapted, None if fixed is None else 1.01 * fixed

    monkeypatch.setattr(ReverseOverReverse, "__call__", wrong)
    assert verify(network(), adapt=["2"]).status == "failed"
    assert verify(network()).status == "passed"


def test_the_point_is_params():
    model = nn.Linear(1, 1)
    objective, data = Objective(model, lambda output, target: output.pow(3).mean()), (torch.ones(2, 1), torch.ones(2))
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert imaml.verify.hvp(objective, None, data).status == "passed"
    assert imaml.verify.hvp(objective, zero, data).status == "inconclusive"  # the Hessian of x^3 at 0 is 0
    assert imaml.verify.hvp(objective, {"weight": zero["weight"]}, data).status == "passed"
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())


def test_adapted_parameters_of_an_engine_are_a_point():
    objective, data = Objective(network(), F.cross_entropy, adapt=["2"]), batch()
    phi = imaml.MAML(inner=imaml.GradientDescent(lr=0.1, steps=3)).adapt(objective, data)
    assert imaml.verify.hvp(objective, phi, data).status == "passed"


def test_nothing_of_the_users_changes():
    model, data = network(nn.Dropout(0.5)), batch()
    state, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    first, second = (verify(model, data=data) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_mode_that_the_model_does_not_support_is_listed_and_fails_nothing():
    found = verify(network(), loss=F.huber_loss, data=(torch.randn(6, WIDTH), torch.randn(6, CLASSES)))
    assert found.status == "passed"
    assert [line for line in found.details if line.startswith("forward") and "not supported" in line]


def test_finite_differences_alone_pass_with_their_own_tolerance():
    found = verify(network(Custom(Once)))
    assert found.status == "passed" and found.tolerance == 1e-3
    assert sum("not supported" in line for line in found.details) == 3


def test_a_layer_that_computes_in_less_than_float64_passes_within_what_differences_resolve():
    found = verify(of_four_bits())
    assert found.status == "passed" and found.cause is None, str(found)
    assert found.tolerance < found.resolution and found.relative_error < 3 * found.resolution
    (row,) = [line for line in found.details if line.startswith("finite-difference")]
    assert float(row.split()[1]) < 1e-2


def test_rounding_in_sixteen_bits_is_no_failure():
    """Of the differences with short steps nothing is left, and they agree."""
    for dtype, width in itertools.product((torch.bfloat16, torch.float16), (WIDTH, 16)):
        model, data = of_four_bits(dtype, width), batch(width)
        found = verify(model, data=data)
        assert found.status == "inconclusive" and "computes in less than float64" in found.cause, str(found)
        objective, task = Objective(model, F.cross_entropy), imaml.Task(support=data, query=data)
        engine = imaml.MAML(inner=imaml.GradientDescent(lr=0.1, steps=2))
        assert imaml.verify.meta_gradient(engine, objective, [task]).status == "inconclusive"


@pytest.mark.parametrize("sign", ["off from finite differences", "is not linear"])
def test_a_broken_mode_is_found_in_less_than_float64_too(monkeypatch, sign):
    original = ReverseOverReverse.__call__

    def broken(self, w, *, mixed=False, into=None):
        product, fixed = original(self, w, mixed=mixed)
        return product * (1.01 if sign.startswith("off") else 1 + w.abs().max()), fixed

    monkeypatch.setattr(ReverseOverReverse, "__call__", broken)
    found = verify(of_four_bits())
    assert found.status == "failed" and found.cause.startswith("reverse-over-reverse") and sign in found.cause


def test_a_finite_difference_mode_alone_that_reports_a_large_error_gives_no_verdict(monkeypatch):
    original = FiniteDifference.__call__

    def coarse(self, w, *, mixed=False, into=None):
        product, fixed = original(self, w, mixed=mixed)
        self._loss.record.difference_error = 0.2
        return 1.1 * product, fixed

    monkeypatch.setattr(FiniteDifference, "__call__", coarse)
    found = verify(network(Custom(Once)))
    assert found.status == "inconclusive" and "report an error above the tolerance" in found.cause
    assert verify(network()).status == "passed"


def test_a_dropped_second_derivative_fails_and_the_right_mode_is_named():
    found = verify(network(Custom(Drops)))
    assert found.status == "failed" and found.relative_error > 0.01
    assert found.cause.startswith("reverse-over-reverse") and "drops or misstates" in found.cause
    assert "hvp='finite-difference' is right here" in found.cause
    whole = of_function(lambda p, b: Drops.apply(p["w"]).sum(), 0.3, -0.4)
    assert whole.status == "failed" and "gives zero" in whole.cause


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, b: (p["w"] * p["w"].roll(1).detach()).sum() + p["w"].pow(3).sum(),
        lambda p, b: StraightThrough.apply(p["w"].cumsum(0)).prod(),
    ],
    ids=["detach", "straight-through"],
)
def test_a_gradient_that_is_not_of_one_loss_fails(loss):
    found = of_function(loss, 0.5, -0.7, 0.9)
    assert found.status == "failed" and "not the gradient of one loss" in found.cause


MUTANTS = {
    "is not linear": lambda h, w: h * (1 + w.abs().max()),
    "is not symmetric": lambda h, w: h + 0.1 * h.roll(1, -1),
    "off from finite differences": lambda h, w: 1.001 * h,
    "gives zero": lambda h, w: 0 * h,
    "NaN or infinite": lambda h, w: h * float("nan"),
}


@pytest.mark.parametrize("mode", [ReverseOverReverse, ForwardOverReverse], ids=["reverse", "forward"])
@pytest.mark.parametrize("sign", MUTANTS)
def test_a_broken_mode_is_found_and_named(monkeypatch, mode, sign):
    original = mode.__call__

    def broken(self, w, *, mixed=False, into=None):
        product, fixed = original(self, w, mixed=mixed)
        return MUTANTS[sign](product, w), fixed

    monkeypatch.setattr(mode, "__call__", broken)
    found = verify(network())
    name = "forward-over-reverse" if mode is ForwardOverReverse else "reverse-over-reverse"
    assert found.status == "failed" and found.cause.startswith(name) and sign in found.cause


def test_masks_that_change_between_products_fail(monkeypatch):
    monkeypatch.setattr(Replay, "begin", lambda self, key: None)
    found = verify(network(nn.Dropout(0.5)))
    assert found.status == "failed" and "random draws" in found.cause


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda p, b: p["w"].sum(), "the Hessian is zero"),
        (lambda p, b: F.relu(p["w"]).square().sum(), "not twice differentiable"),
        (lambda p, b: p["w"].abs().sum() + p["w"].square().sum(), "not twice differentiable"),
    ],
    ids=["linear", "kink of the gradient", "kink of the loss"],
)
def test_no_verdict_without_resolving_power(loss, reason):
    found = of_function(loss, 0.0, 0.0, 0.0)
    assert found.status == "inconclusive" and reason in found.cause


def test_a_finite_difference_mode_spoilt_in_one_direction_passes_and_in_all_fails(monkeypatch):
    original, calls = FiniteDifference.__call__, []

    def spoilt(self, w, *, mixed=False, into=None):
        calls.append(w)
        product, fixed = original(self, w, mixed=mixed)
        return (product + 1.0 if len(calls) in bad else product), fixed

    monkeypatch.setattr(FiniteDifference, "__call__", spoilt)
    bad = {2}
    assert verify(network()).status == "passed"
    calls.clear()
    bad = {1, 2, 3, 4}
    found = verify(network())
    assert found.status == "failed" and found.cause.startswith("finite-difference")
