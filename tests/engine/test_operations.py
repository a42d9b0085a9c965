"""Layers with operations that have no second derivative, no forward AD, or no batching rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import Attention, classification
from tests.oracles import model_loss, relative_error, setting, unrolled

INNER = GradientDescent(lr=0.2, steps=3)


class OnceDifferentiable(torch.autograd.Function):
    """tanh, as a fused kernel would give it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class OldStyle(torch.autograd.Function):
    """The same with forward(ctx, ...), which no transform of torch.func takes."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(function, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), Activation(function), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("adapt", [None, ["0"]], ids=["all", "first"])
@pytest.mark.parametrize(
    ("function", "chunk_size"), [(OnceDifferentiable, None), (OnceDifferentiable, 1), (OldStyle, 1)], ids=str
)
def test_auto_turns_to_finite_differences_and_says_so(function, chunk_size, adapt):
    tasks = classification((4,))
    options = dict(inner=INNER, chunk_size=chunk_size)
    implicit = dict(solver=CG(max_steps=5, rtol=0.0), **options)
    for engine in (MAML(**options), ImplicitMAML(**implicit), ImplicitMAML(linearize=False, **implicit)):
        expected = engine.value_and_grad(Objective(network(torch.tanh), F.cross_entropy, adapt=adapt), tasks)[1]
        objective = Objective(network(function.apply), F.cross_entropy, adapt=adapt)
        report = engine(objective, tasks).report
        assert report.hvp_mode == "finite-difference" and "finite-difference" in str(report)
        assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-6


def test_an_operation_that_only_later_tasks_have():
    """Tasks of other sizes, of which the first has none that is differentiable once."""
    short, long = (classification((4,), tasks=1, support=n)[0] for n in (4, 8))
    objective = Objective(network(lambda x: OldStyle.apply(x) if len(x) > 4 else torch.tanh(x)), F.cross_entropy)
    for engine in (MAML(inner=INNER), MAML(inner=INNER, linearize=False), ImplicitMAML(inner=INNER)):
        expected = engine.value_and_grad(Objective(network(torch.tanh), F.cross_entropy), [short, long])[1]
        assert relative_error(engine.value_and_grad(objective, [short, long])[1], expected) <= 1e-6


def test_an_operation_that_only_later_steps_have():
    """The data decide, not the shapes."""
    tasks, means, bound = classification((4,), tasks=1), [], torch.inf

    def changing(x):
        means.append(x.detach().abs().mean())
        return OldStyle.apply(x) if means[-1] > bound else torch.sinh(x) / torch.cosh(x)

    engine = MAML(inner=INNER, chunk_size=1, linearize=True)
    objective = Objective(network(changing), F.cross_entropy)
    expected = engine.value_and_grad(objective, tasks)[1]
    assert means[0] < means[1]
    bound = (means[0] + means[1]) / 2
    assert engine(objective, tasks).report.hvp_mode == "finite-difference"
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-6


def test_an_error_of_the_models_own_is_raised_at_once():
    """It is no reason to run task by task, which would only meet it again."""
    seen = []

    def broken(x):
        seen.append(x)
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        FOMAML(inner=INNER)(Objective(network(broken), F.cross_entropy), classification((4,)))
    assert len(seen) == 1


def test_first_order_strategies_need_no_second_derivative():
    tasks = classification((4,))
    expected = FOMAML(inner=INNER).value_and_grad(Objective(network(torch.tanh), F.cross_entropy), tasks)[1]
    got = FOMAML(inner=INNER).value_and_grad(Objective(network(OnceDifferentiable.apply), F.cross_entropy), tasks)[1]
    assert relative_error(got, expected) <= 1e-14


@pytest.mark.parametrize("hvp", ["reverse-over-reverse", "forward-over-reverse"])
@pytest.mark.parametrize("strategy", [MAML, ImplicitMAML])
@pytest.mark.parametrize("function", [OnceDifferentiable, OldStyle])
def test_an_exact_mode_that_was_asked_for_refuses(function, strategy, hvp):
    objective = Objective(network(function.apply), F.cross_entropy)
    with pytest.raises(RuntimeError, match=f"(?s)hvp='{hvp}'.*hvp='auto'.*finite-difference") as caught:
        strategy(inner=INNER, hvp=hvp, chunk_size=1)(objective, classification((4,)))
    assert caught.value.__cause__ is not None


def test_a_loss_without_forward_over_reverse():
    tasks, model = classification((4,)), network(torch.tanh)

    def huber(output, y):
        return F.huber_loss(output, F.one_hot(y, 3).double(), delta=0.3)

    with pytest.raises(RuntimeError, match="(?s)hvp='forward-over-reverse'.*hvp='auto'"):
        MAML(inner=INNER, hvp="forward-over-reverse")(Objective(model, huber), tasks)
    engine = MAML(inner=INNER)
    assert engine(Objective(model, huber), tasks).report.hvp_mode == "reverse-over-reverse"
    _, expected = unrolled(setting(engine, tasks, model_loss(model, huber), dict(model.named_parameters())))
    assert relative_error(engine.value_and_grad(Objective(model, huber), tasks)[1], expected) <= 1e-10


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "reverse-over-reverse", "finite-difference"])
def test_attention_works_in_every_mode(hvp, chunk_size):
    model, tasks = Attention(is_causal=True).double(), classification((5, 4))
    objective = Objective(model, F.cross_entropy)
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
    _, expected = unrolled(setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters())))
    tolerance = 1e-6 if hvp == "finite-difference" else 1e-10
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= tolerance
    assert engine(objective, tasks).report.hvp_mode == ("reverse-over-reverse" if hvp == "auto" else hvp)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU])
def test_recurrent_networks_task_by_task(build):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = build(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, tasks = Last().double(), classification((3, 4))
    engine = MAML(inner=INNER, chunk_size=1)
    _, expected = unrolled(setting(engine, tasks, model_loss(model, F.cross_entropy), dict(model.named_parameters())))
    assert relative_error(engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1], expected) <= 1e-10


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "reverse-over-reverse"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_constants_in_the_loss(hvp, chunk_size):
    """What is neither parameter nor data has no tangent: torch's forward AD of `mse_loss` may refuse it."""
    model = nn.Linear(4, 3).double()
    model.register_buffer("shift", torch.randn(3).double())

    def loss(output, y):
        return F.mse_loss(output, model.shift.expand_as(output)) + F.cross_entropy(output, y)

    tasks = classification((4,))
    engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
    _, expected = unrolled(setting(engine, tasks, model_loss(model, loss), dict(model.named_parameters())))
    try:
        _, got = engine.value_and_grad(Objective(model, loss), tasks)
    except RuntimeError as error:
        assert hvp == "forward-over-reverse" and "hvp='auto'" in str(error)
    else:
        assert relative_error(got, expected) <= 1e-10
