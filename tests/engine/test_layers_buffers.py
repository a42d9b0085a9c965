"""Buffers that a model updates in training mode: refused, or under a policy; never changed in the user's model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import classification, mlp
from tests.oracles import ORACLES, finite_difference, model_loss, relative_error, setting, unrolled

INNER = GradientDescent(lr=0.1, steps=3)
MODES = ("auto", "forward-over-reverse", "finite-difference")
POLICIES = ("batch", "frozen", "update")


def normalised():
    """With running statistics that are not those of a fresh layer."""
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    model(torch.randn(9, 4).double())
    return model


def plain(model, policy):
    """The model without running statistics, or with fixed ones."""
    model = copy.deepcopy(model)
    for layer in (model[1], model[4]) if policy != "frozen" else ():
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return model.train(policy != "frozen")


def engine_of(strategy, **options):
    if strategy is ImplicitMAML:
        options |= {"regularization": 5.0, "solver": Dense()}
    return strategy(inner=INNER, **options)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy, strategy, chunk_size) -> None:
    model, tasks = normalised(), classification((4,))
    before = {n: b.clone() for n, b in model.named_buffers()}
    engine, other = engine_of(strategy, chunk_size=chunk_size), plain(model, policy)
    s = setting(engine, tasks, model_loss(other, F.cross_entropy), dict(model.named_parameters()))
    got = engine.value_and_grad(Objective(model, F.cross_entropy, buffers=policy), tasks)[1]
    assert relative_error(got, ORACLES[strategy](s)[1]) <= 1e-9
    assert all(module.training for module in model.modules())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_in_every_mode(policy, hvp, chunk_size) -> None:
    model, tasks = normalised(), classification((4,))
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size, checkpoints=1)
    s = setting(engine, tasks, model_loss(plain(model, policy), F.cross_entropy), dict(model.named_parameters()))
    got = engine.value_and_grad(Objective(model, F.cross_entropy, buffers=policy), tasks)[1]
    assert relative_error(got, unrolled(s)[1]) <= (1e-6 if hvp == "finite-difference" else 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("layer", [1, 4], ids=["batch norm", "instance norm"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_in_eval_mode_keeps_its_statistics_under_every_policy(policy, layer, chunk_size) -> None:
    model, tasks = normalised(), classification((4,))
    model[layer].eval()
    other = plain(model, policy)
    other[layer] = model[layer]
    engine = MAML(inner=INNER, chunk_size=chunk_size)
    s = setting(engine, tasks, model_loss(other, F.cross_entropy), dict(model.named_parameters()))
    result = engine(Objective(model, F.cross_entropy, buffers=policy), tasks)
    result.loss.backward()
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, unrolled(s)[1]) <= 1e-10
    names = {f"{5 - layer}.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(result.report.buffers) == (names if policy == "update" else set())


def trained_copy(model, support, steps):
    """The buffers of a copy that ordinary training steps have adapted."""
    model = copy.deepcopy(model)
    for _ in range(steps):
        grads = torch.autograd.grad(F.cross_entropy(model(support[0]), support[1]), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= INNER.lr * g
    return dict(model.named_buffers())


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
@pytest.mark.parametrize("options", [{}, {"checkpoints": 1}, {"linearize": False}], ids=str)
def test_update_carries_the_statistics_of_each_task_alone(options, chunk_size) -> None:
    model, tasks = normalised(), classification((4,))
    objective = Objective(model, F.cross_entropy, buffers="update")
    engine = MAML(inner=INNER, chunk_size=chunk_size, **options)
    expected = [trained_copy(model, task.support, INNER.steps) for task in tasks]
    report = engine(objective, tasks).report
    for name, buffer in model.named_buffers():
        mean = torch.stack([e[name].double() for e in expected]).mean(0)
        assert report.buffers[name].dtype == buffer.dtype
        assert torch.allclose(report.buffers[name].double(), mean, rtol=1e-12)
    with torch.no_grad():
        evaluated = engine(objective, tasks).report.buffers
    assert all(torch.allclose(evaluated[n], b, rtol=1e-12) for n, b in report.buffers.items())
    adapted = engine.adapt(objective, tasks[1].support)
    assert all(torch.allclose(adapted[n], b, rtol=1e-12) for n, b in expected[1].items())
    functional_call(model, adapted, (tasks[1].query[0],))


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_without_inner_steps_the_statistics_are_the_models_own(chunk_size) -> None:
    model, tasks = normalised(), classification((4,))
    objective, engine = (
        Objective(model, F.cross_entropy, buffers="update"),
        MAML(inner=GradientDescent(lr=0.1, steps=0), chunk_size=chunk_size),
    )
    for found in (engine(objective, tasks).report.buffers, engine.adapt(objective, tasks[1].support)):
        assert all(torch.allclose(found[n], b, rtol=1e-12) for n, b in model.named_buffers())


def test_the_mean_enters_the_model_where_it_is_loaded() -> None:
    model, tasks = normalised(), classification((4,))
    report = MAML(inner=INNER)(Objective(model, F.cross_entropy, buffers="update"), tasks).report
    model.load_state_dict(report.buffers, strict=False)
    assert torch.equal(model[1].running_var, report.buffers["1.running_var"])
    assert model[1].num_batches_tracked == 1 + INNER.steps


class Scaled(nn.Module):
    """Has a buffer that no forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0).double())

    def forward(self, x):
        return self.scale * x


def test_buffers_that_are_no_statistics_do_not_follow_the_inner_loop() -> None:
    objective = Objective(nn.Sequential(Scaled(), *normalised()), F.cross_entropy, buffers="update")
    report = MAML(inner=INNER)(objective, classification((4,))).report
    assert set(report.buffers) == {
        f"{i}.{n}" for i in (2, 5) for n in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_a_model_that_is_a_normalisation_layer_itself() -> None:
    model, tasks = nn.BatchNorm1d(3).double(), classification((3,))
    report = MAML(inner=INNER)(Objective(model, F.cross_entropy, buffers="update"), tasks).report
    expected = torch.stack([trained_copy(model, t.support, INNER.steps)["running_var"] for t in tasks]).mean(0)
    assert torch.allclose(report.buffers["running_var"], expected, rtol=1e-12)


@pytest.mark.parametrize("policy", ["batch", "frozen"])
def test_other_policies_return_no_buffers(policy) -> None:
    objective, tasks = Objective(normalised(), F.cross_entropy, buffers=policy), classification((4,))
    assert FOMAML(inner=INNER)(objective, tasks).report.buffers == {}
    assert set(FOMAML(inner=INNER).adapt(objective, tasks[0].support)) == set(objective.adapted)


def test_without_a_policy_the_refusal_names_the_ways_out() -> None:
    ways_out = (
        r"Objective\(\.\.\., buffers='batch'\), 'frozen' or 'update'; "
        r"or build it with track_running_stats=False \(batch statistics\), or call \.eval\(\) on it "
        r"\(fixed statistics\)\.$"
    )
    model, tasks = normalised(), classification((4,))
    for layer, name in ((1, "BatchNorm1d '1'"), (4, "InstanceNorm1d '4'")):
        with pytest.raises(ValueError, match=f"^{name} updates running statistics.* Say .* {ways_out}"):
            MAML(inner=INNER)(Objective(model, F.cross_entropy), tasks)
        model[layer].eval()
    MAML(inner=INNER)(Objective(model, F.cross_entropy), tasks)


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="'batch', 'frozen' or 'update'. Got 'keep'"):
        Objective(normalised(), F.cross_entropy, buffers="keep")


def test_a_float64_copy_keeps_the_policy() -> None:
    objective = Objective(normalised().float(), F.cross_entropy, buffers="batch").double()
    assert MAML(inner=INNER)(objective, classification((4,))).loss.dtype == torch.float64


HOOKED = {
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral_norm": lambda: spectral_norm(nn.Linear(6, 6)),
}


def around(layer):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", MODES)
@pytest.mark.parametrize("name", HOOKED)
def test_spectral_norm(name, hvp, chunk_size) -> None:
    model, tasks = around(HOOKED[name]()), classification((4,))
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
    ways_out = r"Fix .* Objective\(\.\.\., buffers='batch'\) or 'frozen', or call \.eval\(\) on it\.$"
    with pytest.raises(ValueError, match=f"^spectral_norm of '2' updates its vectors.*{ways_out}"):
        engine(Objective(model, F.cross_entropy), tasks)
    for policy in POLICIES:
        before = {n: b.clone() for n, b in model.named_buffers()}
        grads = engine.value_and_grad(Objective(model, F.cross_entropy, buffers=policy), tasks)[1]
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
        assert all(module.training for module in model.modules())
        still = copy.deepcopy(model).eval()
        s = setting(engine, tasks, model_loss(still, F.cross_entropy), dict(model.named_parameters()))
        direction = {n: torch.randn_like(p) for n, p in s.theta.items()}
        slope = sum((grads[n] * d).sum() for n, d in direction.items())
        assert slope == pytest.approx(finite_difference(s, direction).item(), rel=1e-6, abs=1e-8)
        copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_weights_made_by_hooks_are_as_before(strategy) -> None:
    model, tasks = around(weight_norm(nn.Linear(6, 6))), classification((4,))
    before = model[2].weight
    engine_of(strategy)(Objective(model, F.cross_entropy), tasks)
    assert model[2].weight is before


class Average(nn.Module):
    """Subtracts a moving average that it writes to as code for vector quantisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4).double())

    def forward(self, x):
        self.average.data.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x - self.average


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_a_write_that_raises_no_version_leaks_to_no_other_step_or_task(strategy) -> None:
    model = nn.Sequential(Average(), nn.Linear(4, 3).double())
    objective, tasks = Objective(model, F.cross_entropy), list(classification((4,)))
    engine = engine_of(strategy, chunk_size=1)
    losses = engine(objective, tasks).report.query_loss
    torch.testing.assert_close(engine(objective, tasks[::-1]).report.query_loss.flip(0), losses)
    x, y = tasks[0].query
    adapted = engine.adapt(objective, tasks[0].support)
    torch.testing.assert_close(F.cross_entropy(functional_call(copy.deepcopy(model), adapted, (x,)), y), losses[0])
    assert not model[0].average.any()


def test_a_sparse_buffer() -> None:
    model, tasks = mlp(), classification((4,))
    expected = MAML(inner=INNER, chunk_size=1)(Objective(model, F.cross_entropy), tasks).loss
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    assert MAML(inner=INNER, chunk_size=1)(Objective(model, F.cross_entropy), tasks).loss == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", [MAML, ImplicitMAML])
def test_forward_over_reverse_with_dropout(strategy, policy) -> None:
    model, tasks = nn.Sequential(*normalised(), nn.Dropout(0.4)), classification((4,))
    found = []
    for hvp in ("forward-over-reverse", "auto"):
        torch.manual_seed(0)
        engine = engine_of(strategy, hvp=hvp)
        found.append(engine.value_and_grad(Objective(model, F.cross_entropy, buffers=policy), tasks)[1])
    assert relative_error(*found) <= 1e-10
