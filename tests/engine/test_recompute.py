"""Blocks that are recomputed in derivatives of every order: `Objective(recompute=...)`, `imaml.recompute`, torch."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import imaml
from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.measure import peak_memory
from tests.oracles import relative_error

F64 = torch.float64
INNER = GradientDescent(lr=0.01, steps=3)
ENGINES = {
    "MAML": MAML(inner=INNER),
    "MAML, one by one": MAML(inner=INNER, chunk_size=1),
    "MAML, graphs kept": MAML(inner=INNER, linearize=True),
    "MAML, graphs rebuilt": MAML(inner=INNER, linearize=False),
    "MAML, one graph": MAML(inner=INNER, linearize=1),
    "MAML, checkpoints": MAML(inner=INNER, checkpoints=1, chunk_size=2),
    "MAML, forward-over-reverse": MAML(inner=INNER, hvp="forward-over-reverse"),
    "MAML, Adam on disk": MAML(inner=Adam(lr=0.01, steps=3), storage="disk"),
    "MAML, slices": MAML(inner=INNER, microbatch_size=2),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(inner=INNER, solver=CG(max_steps=3), on_failure="ignore"),
    "ImplicitMAML, rebuilt": ImplicitMAML(inner=INNER, solver=CG(max_steps=3), on_failure="ignore", linearize=False),
    "ImplicitMAML, Gauss-Newton": ImplicitMAML(
        inner=INNER, solver=CG(max_steps=3), on_failure="ignore", curvature="ggn"
    ),
}


class Block(nn.Module):
    """Attention-like: a product of its inputs, a normalisation, a tied weight, a buffer, and a keyword."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.norm, self.tied = nn.Linear(4, 4), nn.LayerNorm(4), tied
        self.register_buffer("scale", torch.tensor(0.9))

    def forward(self, h, mask=None, *, power=1):
        found = self.norm(self.first(h) * self.tied(h).tanh())
        found = found if mask is None else found * mask
        return h + found.pow(power) * self.scale, {"power": power, "mean": found.mean(-1, keepdim=True)}


class Network(nn.Module):
    def __init__(self, call=None):
        super().__init__()
        tied = nn.Linear(4, 4)
        self.enter, self.blocks, self.leave = (
            nn.Linear(3, 4),
            nn.ModuleList(Block(tied) for _ in range(3)),
            nn.Linear(4, 2),
        )
        self.call = call or (lambda block, *args, **kwargs: block(*args, **kwargs))

    def forward(self, x):
        h, mask = self.enter(x), torch.tensor([1.0, 0.5, 1.0, 2.0], dtype=x.dtype)
        for power, block in enumerate(self.blocks, start=1):
            h, other = self.call(block, h, mask, power=power)
            h = h + 0.1 * other["mean"]
        return self.leave(h)


def network(call=None, seed=0):
    torch.manual_seed(seed)
    return Network(call).double()


def tasks(number=3):
    torch.manual_seed(1)
    x, y = torch.randn(2, number, 4, 3, dtype=F64), torch.randn(2, number, 4, 2, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def meta_gradient(engine, objective, batch=None):
    return engine.value_and_grad(objective, batch or tasks())[1]


def agree(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    size = max(e.norm() for e in expected.values())
    assert max((found[n] - expected[n]).norm() for n in found) <= tolerance * size


WAYS = {
    "by type": {"recompute": [Block]},
    "by name": {"recompute": ["blocks.0", "blocks.2"]},
    "by pattern": {"recompute": ["blocks.*"]},
    "nested": {"recompute": [Block, nn.Linear, "enter"]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ENGINES)
def test_recomputed_modules_have_the_derivatives_of_any(name, way):
    model = network()
    adapt = None if "Newton" in name else ["blocks", "leave"]  # the rest is learned through mixed products
    expected = meta_gradient(ENGINES[name], Objective(model, F.mse_loss, adapt=adapt))
    agree(meta_gradient(ENGINES[name], Objective(model, F.mse_loss, adapt=adapt, **WAYS[way])), expected)


CALLS = {
    "use_reentrant=False": lambda block, *args, **kwargs: checkpoint(block, *args, use_reentrant=False, **kwargs),
    "use_reentrant=True": lambda block, h, mask, power: checkpoint(
        lambda h, mask: block(h, mask, power=power), h, mask, use_reentrant=True
    ),
    "by the module": lambda block, *args, **kwargs: torch.utils.checkpoint.checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False, **kwargs
    ),
    "nested": lambda block, *args, **kwargs: checkpoint(
        lambda *args: checkpoint(block, *args, use_reentrant=False, **kwargs), *args, use_reentrant=False
    ),
    "imaml.recompute": lambda block, *args, **kwargs: imaml.recompute(block, *args, **kwargs),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ENGINES)
def test_checkpoints_of_the_model_are_honoured(name, call):
    expected = meta_gradient(ENGINES[name], Objective(network(), F.mse_loss))
    agree(meta_gradient(ENGINES[name], Objective(network(CALLS[call]), F.mse_loss)), expected)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_function_of_parameters_recomputes_what_it_says(chunk_size):
    params = {n: p.detach() for n, p in network().named_parameters()}

    def layer(h, weight, bias):
        return (h @ weight.T + bias).tanh()

    def loss(call):
        def of(params, batch):
            h = call(layer, batch[0], params["enter.weight"], bias=params["enter.bias"])
            return F.mse_loss(h @ params["leave.weight"].T, batch[1])

        return of

    names = ["enter.weight", "enter.bias", "leave.weight"]
    used = {n: params[n] for n in names}
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    plain = Objective.from_function(loss(lambda f, *args, **kwargs: f(*args, **kwargs)), used)
    agree(meta_gradient(engine, Objective.from_function(loss(imaml.recompute), used)), meta_gradient(engine, plain))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("linearize", [True, False])
def test_masks_are_drawn_again(chunk_size, linearize):
    def model():
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh()), nn.Sequential(nn.Linear(8, 2))]
        return nn.Sequential(*layers).double()

    engine = MAML(inner=INNER, chunk_size=chunk_size, linearize=linearize)

    def found(**options):
        torch.manual_seed(5)
        return meta_gradient(engine, Objective(model(), F.mse_loss, **options))

    agree(found(recompute=["0"]), found())


def test_autocast_holds_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 16), nn.Tanh()), nn.Linear(16, 2))
    engine = MAML(inner=INNER)

    def found(**options):
        with torch.autocast("cpu", torch.bfloat16):
            return meta_gradient(engine, Objective(model, F.mse_loss, **options), tasks().to(dtype=torch.float32))

    agree(found(recompute=["0"]), found(), 1e-3)  # bfloat16 rounds to 4e-3
    assert (
        relative_error(found(), meta_gradient(engine, Objective(model, F.mse_loss), tasks().to(dtype=torch.float32)))
        > 1e-4
    )


@pytest.mark.parametrize("buffers", ["batch", "frozen", "update"])
def test_running_statistics_follow_the_policy_in_blocks_too(buffers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh()), nn.Linear(5, 2)).double()
    model(torch.randn(7, 3, dtype=F64))
    before = {n: b.clone() for n, b in model.named_buffers()}
    engine = MAML(inner=INNER)
    expected = meta_gradient(engine, Objective(model, F.mse_loss, buffers=buffers))
    agree(meta_gradient(engine, Objective(model, F.mse_loss, buffers=buffers, recompute=["0"])), expected)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_spectral_and_weight_norm_are_those_of_the_evaluation():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5))
    second = nn.utils.parametrizations.weight_norm(nn.Linear(5, 2))
    model = nn.Sequential(nn.Sequential(first, nn.Tanh()), nn.Sequential(second)).double()
    engine = MAML(inner=INNER)
    expected = meta_gradient(engine, Objective(model, F.mse_loss, buffers="batch"))
    agree(meta_gradient(engine, Objective(model, F.mse_loss, buffers="batch", recompute=["0", "1"])), expected)


def test_the_report_says_what_was_recomputed():
    engine = MAML(inner=INNER)
    assert engine(Objective(network(), F.mse_loss), tasks()).report.recomputed == ()
    report = engine(Objective(network(), F.mse_loss, recompute=[Block, "enter"]), tasks()).report
    assert report.recomputed == ("Block.forward", "Linear.forward") and "recomputed: Block" in str(report)
    report = engine(Objective(network(CALLS["use_reentrant=False"]), F.mse_loss), tasks()).report
    assert report.recomputed == ("Block",)
    loss = lambda params, batch: imaml.recompute(F.mse_loss, params["w"] * batch, batch)  # noqa: E731
    objective = Objective.from_function(loss, {"w": torch.ones(3)})
    x = torch.randn(2, 4, 3)
    assert engine(objective, TaskBatch(support=x, query=x)).report.recomputed == ("mse_loss",)


def test_a_block_keeps_its_inputs_alone():
    torch.manual_seed(0)
    wide = [nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh()) for _ in range(24)]
    model = nn.Sequential(*wide)
    x = torch.randn(1, 400, 64)
    batch = TaskBatch(support=(x, x), query=(x, x))
    engine = MAML(inner=GradientDescent(lr=0.1, steps=1), linearize=False)

    def peak(**options):
        objective = Objective(model, F.mse_loss, **options)
        engine.value_and_grad(objective, batch)
        return peak_memory(lambda: engine.value_and_grad(objective, batch))

    assert peak(recompute=[nn.Sequential]) < 0.5 * peak()


def test_everything_is_as_it_was_afterwards():
    model = network(CALLS["use_reentrant=False"])
    before, inner = dict(vars(torch.utils.checkpoint)), torch.utils.checkpoint.checkpoint.__wrapped__
    hook = getattr(inner, "__dynamo_disable", None)
    meta_gradient(MAML(inner=INNER), Objective(model, F.mse_loss, recompute=[Block]))
    assert dict(vars(torch.utils.checkpoint)) == before and getattr(inner, "__dynamo_disable", None) is hook
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_pass_that_fails_leaves_everything_as_it_was():
    def fails(block, *args, **kwargs):
        raise RuntimeError("no")

    model = network(fails)
    with pytest.raises(RuntimeError, match="no"):
        meta_gradient(MAML(inner=INNER), Objective(model, F.mse_loss, recompute=[Block]))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_of_the_users_own_stays():
    model = network()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.blocks[0].forward
    expected = meta_gradient(MAML(inner=INNER), Objective(model, F.mse_loss))
    agree(meta_gradient(MAML(inner=INNER), Objective(model, F.mse_loss, recompute=[Block])), expected)
    assert model.blocks[0].forward is mine


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        return c * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_an_operation_without_second_derivative_is_found_inside_a_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Sine(), nn.Linear(4, 2))).double()
    engine = MAML(inner=INNER, chunk_size=1)
    batch = tasks()
    exact = meta_gradient(engine, Objective(nn.Sequential(model[0], _Sin(), model[1][1]), F.mse_loss), batch)
    result = engine(Objective(model, F.mse_loss, recompute=["1"]), batch)
    result.loss.backward()
    assert result.report.hvp_mode == "finite-difference"
    found = [p.grad for p in model.parameters()]
    assert all(torch.allclose(f, e, rtol=1e-5, atol=1e-7) for f, e in zip(found, exact.values(), strict=True))


class _Sin(nn.Module):
    def forward(self, x):
        return x.sin()


class Hidden(nn.Module):
    """A block whose input comes by another way than its arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.box = {}

    def forward(self, x):
        self.box["h"] = self.first(x)
        return self.second(checkpoint(self.inside, x, use_reentrant=False))

    def inside(self, x):
        return self.box["h"].tanh()


def test_a_block_that_reads_what_requires_grad_by_another_way_is_refused():
    with pytest.raises(ValueError, match=r"Hidden.inside is recomputed, and uses what requires grad.*pass the tensor"):
        meta_gradient(MAML(inner=INNER), Objective(Hidden().double(), F.mse_loss))


def test_a_block_that_writes_to_its_input_is_refused():
    def writes(block, h, mask, power):
        return checkpoint(lambda h: block(h.mul_(1.0), mask, power=power), h, use_reentrant=False)

    with pytest.raises(ValueError, match="changes a tensor in place"):
        meta_gradient(MAML(inner=INNER, chunk_size=1), Objective(network(writes), F.mse_loss))


def test_a_checkpoint_with_contexts_is_refused():
    def contexts(block, *args, **kwargs):
        both = lambda: (torch.enable_grad(), torch.enable_grad())  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, context_fn=both, **kwargs)

    with pytest.raises(ValueError, match="context_fn"):
        meta_gradient(MAML(inner=INNER), Objective(network(contexts), F.mse_loss))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["blocs.*"], ValueError, r"names no module by 'blocs.\*'. Close to it: blocks"),
        ([nn.Conv2d], ValueError, "names no module by .*Conv2d"),
        ("blocks.0", TypeError, r"write \['blocks.0'\]"),
        (Block, TypeError, "must be a list"),
        ([3], TypeError, "module names or types. Got 3"),
        (3, TypeError, "must be a list of module names or types. Got 3"),
    ],
)
def test_what_names_no_module_is_refused_at_once(given, error, words):
    with pytest.raises(error, match=words):
        Objective(network(), F.mse_loss, recompute=given)


def test_outputs_may_be_complex_integers_and_other_things():
    torch.manual_seed(0)
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)

    def block(x):
        return {"complex": torch.view_as_complex(x.sin()), "index": x.argmax(), "words": "none", "real": x.cos()}

    def twice(call):
        found = call(block, x)
        assert found["words"] == "none" and found["index"].dtype == torch.int64
        value = found["complex"].abs().square().sum() + found["real"].prod() + found["index"]
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(twice(imaml.recompute), twice(lambda f, x: f(x)), rtol=1e-12, atol=1e-12)


def test_outside_of_an_objective_it_works_too():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=F64, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def twice(call):
        first = torch.autograd.grad(call(lambda x: layer(x).tanh(), x).sum(), wanted, create_graph=True)
        return torch.autograd.grad([g.square().sum() for g in first], wanted)

    for found, expected in zip(twice(imaml.recompute), twice(lambda f, x: f(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(imaml.recompute(layer, x), layer(x))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("way", ["hook", "attribute"])
def test_an_activation_that_leaves_a_block_by_another_way_is_refused(way, chunk_size):
    """The loss would depend on it without a gradient, and nobody would see that."""
    seen = {}

    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.leave = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
            if way == "hook":
                self.block[0].register_forward_hook(lambda module, args, output: seen.update(h=output))

        def forward(self, x):
            h = self.block(x)
            return self.leave(h)

    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    model = Leaks()
    if way == "attribute":
        model.block[0] = Keeps(3, 4)

    def loss(output, target):
        hidden = seen["h"] if way == "hook" else model.block[0].kept
        return F.mse_loss(output, target) + 0.1 * hidden.square().mean()

    engine = MAML(inner=INNER, chunk_size=chunk_size)
    engine.value_and_grad(Objective(model.double(), loss), tasks())
    with pytest.raises(ValueError, match="an activation inside .*, which is recomputed"):
        engine.value_and_grad(Objective(model, loss, recompute=["block"]), tasks())


def test_what_is_named_may_come_from_a_generator_or_be_nothing():
    objective = Objective(network(), F.mse_loss, recompute=(name for name in ["blocks.*"]))
    engine = MAML(inner=INNER)
    for _ in range(2):
        assert engine(objective, tasks()).report.recomputed == ("Block.forward",)
    assert engine(Objective(network(), F.mse_loss, recompute=None), tasks()).report.recomputed == ()
