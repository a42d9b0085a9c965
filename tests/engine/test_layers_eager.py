"""Models that recompute or are compiled: the derivatives are those of the model as written."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import classification
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.2, steps=2)
IMPLICIT = functools.partial(ImplicitMAML, solver=Dense())


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.options = options

    def forward(self, x):
        h = self.first(x).tanh()
        if self.options:
            h = torch.utils.checkpoint.checkpoint(lambda h: self.middle(h).tanh(), h, **self.options)
        else:
            h = self.middle(h).tanh()
        return self.last(h)


def twins(**options):
    model, plain = Network(**options).double(), Network().double()
    plain.load_state_dict(model.state_dict())
    return model, plain, classification((4,))


@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "finite-difference"])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_models_in_every_mode(use_reentrant, chunk_size, hvp) -> None:
    """A recomputation in the backward pass would see the user's parameters in place of the adapted ones."""
    model, plain, tasks = twins(use_reentrant=use_reentrant)
    for strategy in (MAML, IMPLICIT):
        engine = strategy(inner=INNER, chunk_size=chunk_size, hvp=hvp)
        expected = engine.value_and_grad(Objective(plain, F.cross_entropy), tasks)[1]
        got = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
        assert relative_error(got, expected) <= 1e-12
    engine = FOMAML(inner=INNER, chunk_size=chunk_size)
    expected = engine.value_and_grad(Objective(plain, F.cross_entropy), tasks)[1]
    assert relative_error(engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1], expected) <= 1e-12


def test_checkpoints_outside_a_call_are_as_before() -> None:
    before = dict(vars(torch.utils.checkpoint))
    model, _, tasks = twins(use_reentrant=False)
    FOMAML(inner=INNER)(Objective(model, F.cross_entropy), tasks)
    assert vars(torch.utils.checkpoint) == before


def compiled(model, how):
    if how == "in place":
        model.compile()
        return model
    if how == "a submodule":
        model.middle = torch.compile(model.middle)
        return model
    return torch.compile(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["whole", "in place", "a submodule"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_compiled_models_run_as_written(how, chunk_size) -> None:
    model, plain, tasks = twins()
    objective = Objective(compiled(model, how), F.cross_entropy)
    for strategy in (MAML, FOMAML, IMPLICIT):
        engine = strategy(inner=INNER, chunk_size=chunk_size)
        expected = engine.value_and_grad(Objective(plain, F.cross_entropy), tasks)[1]
        got = engine.value_and_grad(objective, tasks)[1]
        got = {name.replace("_orig_mod.", ""): grad for name, grad in got.items()}
        assert relative_error(got, expected) <= 1e-12
        assert engine(objective, tasks).report.hvp_mode in ("reverse-over-reverse", None)


class Wrapped(nn.Module):
    """A network, checkpointed where asked."""

    def __init__(self, network, **how):
        super().__init__()
        self.network, self.how = network, how

    def forward(self, x):
        return checkpoint(self.network, x, **self.how) if self.how else self.network(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_checkpoint_in_a_function_of_parameters_sees_these(chunk_size, use_reentrant):
    """Recomputed, it would see the module's own parameters: wrong in silence."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    engine, tasks = MAML(inner=GradientDescent(lr=0.3, steps=2), chunk_size=chunk_size), classification((4,))

    def gradients(module):
        def loss(params, batch):
            return F.cross_entropy(functional_call(module, params, (batch[0],)), batch[1])

        return engine.value_and_grad(Objective.from_function(loss, dict(module.named_parameters())), tasks)[1]

    found = gradients(Wrapped(network, use_reentrant=use_reentrant))
    assert relative_error(found, gradients(Wrapped(network))) <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_checkpoint_in_the_loss(chunk_size):
    model, tasks = nn.Linear(4, 3).double(), classification((4,))
    critic = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(False)
    engine = MAML(inner=GradientDescent(lr=0.3, steps=2), chunk_size=chunk_size)

    def gradients(apply):
        return engine.value_and_grad(Objective(model, lambda o, t: F.cross_entropy(apply(critic, o), t)), tasks)[1]

    found = gradients(functools.partial(checkpoint, use_reentrant=False))
    assert relative_error(found, gradients(lambda critic, output: critic(output))) <= 1e-12


def test_scripted_modules_in_a_model_and_in_a_loss():
    with warnings.catch_warnings(action="ignore"):  # torch means to do without them
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(False))
    tasks = classification((4,))
    for objective in (
        Objective(nn.Linear(4, 3).double(), lambda output, target: F.cross_entropy(scripted(output), target)),
        Objective(nn.Sequential(nn.Linear(4, 3).double(), scripted), F.cross_entropy),
    ):
        assert FOMAML(inner=INNER)(objective, tasks).loss.isfinite()
