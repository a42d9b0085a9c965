"""Models whose forward pass asks a tensor whether it requires grad take the same branch vectorised as one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Objective, verify
from tests.engine.cases import CLASSES, classification, oracle_setting
from tests.oracles import ORACLES, relative_error

INNER = GradientDescent(lr=0.1, steps=2)
QUESTIONS = {
    "requires_grad": lambda x: x.requires_grad,
    "is_leaf": lambda x: not x.is_leaf,
    "grad_fn": lambda x: x.grad_fn is not None,
}


class Asking(nn.Module):
    """Has a branch without derivative, for inference."""

    def __init__(self, question):
        super().__init__()
        self.first, self.second, self.question = nn.Linear(4, 5), nn.Linear(5, CLASSES), question
        self.answers = []

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.answers.append(self.question(x))
        return self.second(x if self.answers[-1] else x.detach().round())


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_the_meta_gradient_is_that_of_one_task_at_a_time(strategy, chunk_size, question):
    torch.manual_seed(0)
    model, tasks = Asking(QUESTIONS[question]).double(), classification((4,))
    objective = Objective(model, F.cross_entropy)
    solver = {"solver": Dense()} if strategy is ImplicitMAML else {}
    engine = strategy(inner=INNER, chunk_size=chunk_size, **solver)
    _, found = engine.value_and_grad(objective, tasks)
    assert all(model.answers)
    _, expected = ORACLES[type(engine)](oracle_setting(engine, model, objective, tasks))
    assert relative_error(found, expected) <= 1e-10


def test_verification_agrees():
    torch.manual_seed(0)
    objective = Objective(Asking(QUESTIONS["requires_grad"]).double(), F.cross_entropy)
    assert verify.meta_gradient(MAML(inner=INNER), objective, classification((4,))).status == "passed"


def test_a_tensor_that_needs_no_gradient_says_so_inside_vmap():
    answers = []

    class OfInput(nn.Linear):
        def forward(self, x):
            answers.append(x.requires_grad)
            return super().forward(x)

    FOMAML(inner=INNER)(Objective(OfInput(4, CLASSES).double(), F.cross_entropy), classification((4,)))
    assert answers and not any(answers)


SETTINGS = {
    "default": {},
    "one by one": {"chunk_size": 1},
    "rebuilt": {"linearize": False},
    "checkpoints": {"checkpoints": 1},
    "slices": {"microbatch_size": 2},
    "forward-over-reverse": {"hvp": "forward-over-reverse"},
    "on disk": {"storage": "disk"},
}


class AskingBody(nn.Module):
    """Asks what comes out of a body that does not adapt."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.head(1.5 * hidden if hidden.requires_grad and self.body.weight.requires_grad else hidden)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_does_not_adapt_but_is_learned_requires_grad_in_every_setting(setting):
    torch.manual_seed(0)
    model, tasks = AskingBody().double(), classification((4,))
    objective = Objective(model, F.cross_entropy, adapt=["head"])
    engine = MAML(inner=INNER, **SETTINGS[setting])
    _, found = engine.value_and_grad(objective, tasks)
    _, expected = ORACLES[MAML](oracle_setting(engine, model, objective, tasks))
    assert relative_error(found, expected) <= 1e-10


def test_a_meta_parameter_requires_grad_in_every_setting():
    scale, tasks = torch.ones((), dtype=torch.float64, requires_grad=True), classification((4,))

    def loss(output, target, meta):
        return F.cross_entropy(output * meta["scale"], target) if meta["scale"].requires_grad else output.mean()

    torch.manual_seed(0)
    objective = Objective(nn.Linear(4, CLASSES).double(), loss, meta={"scale": scale})
    losses = [MAML(inner=INNER, **setting)(objective, tasks).loss for setting in SETTINGS.values()]
    for value in losses[1:]:
        torch.testing.assert_close(value, losses[0])
