"""Modules that are worth recomputing: which are found, what is predicted of them, and where they are used."""

import copy
import pickle
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.measure import peak_memory
from imaml.planning import _planner
from imaml.planning._candidates import _candidates, worth_recomputing
from tests.oracles import relative_error
from tests.planning.models import problem

TASKS = 3
INNER = GradientDescent(lr=0.01, steps=3)
SOLVE = {"solver": CG(max_steps=3, rtol=0.0), "on_failure": "ignore"}


class Residual(nn.Module):
    """A block of a class of the user's own."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(2, channels) for _ in range(2))

    def forward(self, x):
        h = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(h)))


class Pictures(nn.Module):
    def __init__(self, block=Residual, blocks=4):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(block(4) for _ in range(blocks))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True) for _ in range(3)
        )

    def forward(self, tokens, mask):
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=mask)
        return {"logits": self.head(h.mean(1))}


def of_output(output, target):
    return F.cross_entropy(output["logits"], target)


def pictures(model=None):
    torch.manual_seed(0)
    support, query = ((torch.randn(TASKS, n, 1, 8, 8), torch.randint(3, (TASKS, n))) for n in (3, 3))
    return Objective(model or Pictures(), F.cross_entropy), TaskBatch(support=support, query=query)


def tokens():
    torch.manual_seed(0)
    sets = []
    for n in (3, 2):
        words = {"tokens": torch.randint(30, (TASKS, n, 12)), "mask": torch.zeros(TASKS, n, 12, dtype=torch.bool)}
        sets.append((words, torch.randint(3, (TASKS, n))))
    return Objective(Tokens(), of_output), TaskBatch(support=sets[0], query=sets[1])


MODELS = {"residual blocks": (pictures, Residual), "a transformer": (tokens, nn.TransformerEncoderLayer)}
ENGINES = {
    "MAML": MAML(inner=INNER),
    "MAML, Adam": MAML(inner=Adam(lr=0.01, steps=3, eps=0.01), regularization=0.1),
    "ImplicitMAML": ImplicitMAML(inner=INNER, **SOLVE),
    "FOMAML": FOMAML(inner=INNER),
}


def measured(engine, objective, tasks):
    engine.value_and_grad(objective, tasks)  # what torch sets up once
    return peak_memory(lambda: engine.value_and_grad(objective, tasks))


def recomputing(forecast):
    return [setting for setting in forecast.settings if "recompute" in setting.options]


def plain(forecast):
    return [setting for setting in forecast.settings if "recompute" not in setting.options]


def leanest(settings):
    return min(settings, key=lambda setting: setting.peak_bytes)


@cache
def planned(model, name):
    objective, tasks = MODELS[model][0]()
    return objective, tasks, ENGINES[name].plan(objective, tasks)


@pytest.mark.parametrize(
    ("model", "name"),
    [*(("residual blocks", name) for name in ENGINES), *(("a transformer", name) for name in ("MAML", "ImplicitMAML"))],
)
def test_peaks_of_recomputing_settings(model, name):
    objective, tasks, forecast = planned(model, name)
    block, settings = MODELS[model][1], recomputing(forecast)
    assert {setting.options["recompute"] for setting in settings} == {(block,)}
    for setting in settings[::10]:
        assert setting.peak_bytes == pytest.approx(measured(setting.engine, objective, tasks), rel=0.05), setting.name
        report = setting.engine(objective, tasks).report
        assert report.gradients == setting.gradients and report.hvps <= setting.hvps
        assert report.recomputed == (f"{block.__name__}.forward",)


@pytest.mark.parametrize(("model", "name"), [("residual blocks", "ImplicitMAML"), ("a transformer", "MAML")])
def test_they_are_recommended_where_nothing_else_fits_and_stay_within_the_limit(name, model):
    objective, tasks, free = planned(model, name)
    assert free.best in plain(free) and free.best.rank == min(setting.rank for setting in free.settings)
    lean, leaner = leanest(plain(free)), leanest(recomputing(free))
    assert leaner.peak_bytes < 0.95 * lean.peak_bytes
    forecast = ENGINES[name].plan(objective, tasks, memory=(lean.peak_bytes + leaner.peak_bytes) // 2)
    assert forecast.best in recomputing(forecast) and forecast.best.name.startswith("recompute=[")
    assert measured(forecast.recommended, objective, tasks) <= forecast.memory
    assert measured(lean.engine, objective, tasks) > forecast.memory
    assert forecast.recommended(objective, tasks).report.recomputed


@pytest.mark.parametrize("name", ENGINES)
def test_they_give_the_same_numbers(name):
    objective, tasks, forecast = planned("residual blocks", name)
    objective, tasks = objective.double(), tasks.to(dtype=torch.float64)
    expected = replace(ENGINES[name], chunk_size=1).value_and_grad(objective, tasks)[1]
    for setting in recomputing(forecast)[::5]:
        assert relative_error(setting.engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12


def test_what_a_recomputed_gradient_and_product_cost():
    objective, tasks, forecast = planned("residual blocks", "MAML")
    settings = {setting.name: setting for setting in recomputing(forecast)}
    rebuilt, kept = (settings[f"recompute=[Residual], linearize={k}, chunk_size=1"] for k in (False, True))
    assert rebuilt.gradient_equivalents == pytest.approx(TASKS * (4 * 4 / 3 + 3 * 4))
    assert kept.gradient_equivalents == pytest.approx(TASKS * (4 * 4 / 3 + 3 * (5 - 4 / 3)))
    said = MAML(inner=INNER, linearize=False, chunk_size=1, recompute=[Residual]).plan(objective, tasks)
    assert said.settings[0].gradient_equivalents == rebuilt.gradient_equivalents
    ggn = ImplicitMAML(inner=INNER, curvature="ggn", error_bound=False, chunk_size=1, **SOLVE).plan(objective, tasks)
    [leaner] = recomputing(ggn)
    assert leaner.gradient_equivalents == pytest.approx(TASKS * (5 * 4 / 3 + 3 * (5 - 4 / 3)))


@pytest.mark.parametrize("model", ["mlp", "tokens", "lstm", "conv"])
def test_a_model_without_blocks_that_save_memory_has_no_such_settings(model):
    objective, tasks = problem(model)
    assert [*worth_recomputing(MAML(inner=INNER), objective, tasks)] == []
    assert recomputing(FOMAML(inner=INNER).plan(objective, tasks)) == []


class Honoured(Residual):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_what_is_recomputed_already_or_cannot_be_is_not_looked_for():
    objective, tasks = pictures()
    assert [*worth_recomputing(MAML(inner=INNER), objective, tasks)]

    def loss(params, batch):
        return torch.func.functional_call(objective.model, params, batch[:1]).square().mean()

    cases = [
        (MAML(inner=INNER, recompute=[]), objective),
        (MAML(inner=INNER, recompute=["blocks.0"]), objective),
        (MAML(inner=INNER, compile=True), objective),
        (MAML(inner=INNER), Objective(objective.model, F.cross_entropy, recompute=["blocks.0"])),
        (MAML(inner=INNER), pictures(Pictures(Honoured))[0]),
        (MAML(inner=INNER), Objective.from_function(loss, dict(objective.model.named_parameters()))),
    ]
    for engine, other in cases:
        assert not list(worth_recomputing(engine, other, tasks))
    assert recomputing(FOMAML(inner=INNER, recompute=[]).plan(objective, tasks)) == []


class Hidden(Residual):
    """Takes a part of its input by another way than its arguments."""

    box = {}

    def forward(self, x):
        found = super().forward(x + 0.1 * self.box.get("h", x))
        self.box["h"] = x
        return found


class Writes(Residual):
    def forward(self, x):
        return super().forward(x.mul_(0.5)) + 0.0


class Moody(Residual):
    """Draws from Python's own random numbers, which nobody replays."""

    def forward(self, x):
        return super().forward(x) * random.random()


class Boxed(Pictures):
    def forward(self, x):
        Hidden.box.clear()
        return super().forward(x)


@pytest.mark.parametrize("block", [Hidden, Writes, Moody])
def test_blocks_that_cannot_be_recomputed_are_left_out(block):
    objective, tasks = pictures(Boxed(block))
    engine = FOMAML(inner=INNER, chunk_size=1)
    with torch.no_grad():
        assert _candidates(engine, objective, tasks, objective.model)[0] == (block,)
    assert (block,) not in [*worth_recomputing(engine, objective, tasks)]
    assert plain(engine.plan(objective, tasks))


class Pair(nn.Module):
    """One that writes to its input, and holds one that does not."""

    def __init__(self, channels):
        super().__init__()
        self.inner = Residual(channels)

    def forward(self, x):
        return self.inner(x.mul_(0.5)) + 0.0


def test_the_next_best_takes_the_place_of_a_refused_one():
    objective, tasks = pictures(Pictures(Pair))
    forecast = FOMAML(inner=INNER, chunk_size=1).plan(objective, tasks)
    assert {setting.options["recompute"] for setting in recomputing(forecast)} == {(Residual,)}


def test_a_refusal_of_the_probe_leaves_the_candidate_out(monkeypatch):
    objective, tasks = pictures()
    look = _planner.look

    def refuses(engine, *args):
        if engine.recompute is not None:
            raise ValueError("Residual.forward is recomputed, and ...")
        return look(engine, *args)

    monkeypatch.setattr(_planner, "look", refuses)
    forecast = FOMAML(inner=INNER).plan(objective, tasks)
    assert recomputing(forecast) == [] and forecast.settings


def test_looking_changes_nothing():
    class Normed(Residual):
        def __init__(self, channels):
            super().__init__(channels)
            self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    model = Pictures(Normed)
    calls = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    own = model.blocks[0].forward
    model.blocks[0].forward = mine = lambda x: own(x)
    objective = Objective(nn.Sequential(model, nn.Dropout(0.5)), F.cross_entropy, buffers="batch")
    tasks = pictures()[1]
    before, state = copy.deepcopy(objective.model.state_dict()), torch.get_rng_state()
    [*found] = worth_recomputing(FOMAML(inner=INNER), objective, tasks)
    assert found and calls
    assert all(torch.equal(value, before[name]) for name, value in objective.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert model.blocks[0].forward is mine
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == ["blocks.0"]


def test_layers_of_several_types_are_named_by_the_list_that_holds_them():
    kinds = [nn.Sequential(nn.Linear(8, 64), act, nn.Linear(64, 8)) for act in (nn.Tanh(), nn.GELU(), nn.Sigmoid())]
    objective = Objective(nn.Sequential(nn.Linear(2, 8), nn.Sequential(*kinds), nn.Linear(8, 1)), F.mse_loss)
    x = torch.randn(2, 50, 2)
    tasks = TaskBatch(support=(x, x[..., :1]), query=(x, x[..., :1]))
    assert next(worth_recomputing(FOMAML(inner=INNER), objective, tasks)) == ("1.*",)


@pytest.fixture
def left(monkeypatch):
    """Set what is free, for what a call may take; returns what was looked at since."""
    looks, look = [], _planner.look
    monkeypatch.setattr(_planner, "look", lambda engine, *args: looks.append(engine) or look(engine, *args))

    def left(size):
        looks.clear()
        monkeypatch.setattr(_planner, "free", lambda _: None if size is None else int(size / _planner.SHARE) + 1)
        return looks

    return left


@pytest.mark.parametrize(("model", "name"), [("residual blocks", "MAML"), ("a transformer", "ImplicitMAML")])
def test_automatic_chunks_recompute_where_nothing_fits_otherwise(name, model, left):
    objective, tasks = MODELS[model][0]()
    objective.model.eval()
    objective, tasks = objective.double(), tasks.to(dtype=torch.float64)
    engine = replace(ENGINES[name], chunk_size="auto")
    expected = replace(engine, chunk_size=1).value_and_grad(objective, tasks)[1]
    alone = replace(engine, chunk_size=1, **({"linearize": False} if name == "MAML" else {}))
    rows = alone.plan(objective, tasks)
    [own] = [setting for setting in rows.settings if not setting.options]
    for limit, recomputed in (((own.peak_bytes * 11) // 10, False), ((own.peak_bytes * 9) // 10, True)):
        looks, one = left(limit), replace(engine)
        result = one(objective, tasks)
        assert len(looks) == 1 + recomputed and bool(result.report.recomputed) == recomputed
        assert relative_error(one.value_and_grad(objective, tasks)[1], expected) <= 1e-12
        assert peak_memory(lambda one=one: one.value_and_grad(objective, tasks)) <= 1.02 * limit
        assert len(looks) == 1 + recomputed
        with torch.no_grad():
            assert torch.equal(one(objective, tasks).loss, result.loss.detach())


def test_the_leanest_of_all_where_nothing_fits_at_all(left):
    objective, tasks = pictures()
    left(1000)
    engine = MAML(inner=INNER, chunk_size="auto")
    assert engine(objective, tasks).report.recomputed


def test_automatic_chunks_of_a_model_without_blocks_go_on(left):
    objective, tasks = problem("mlp")
    looks, engine = left(1000), MAML(inner=INNER, chunk_size="auto")
    for _ in range(2):
        assert engine(objective, tasks).report.recomputed == ()
    assert len(looks) == 1


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_what_is_recomputed_besides_the_objective(name):
    objective, tasks = pictures()
    objective, tasks = objective.double(), tasks.to(dtype=torch.float64)
    engine = replace(ENGINES[name], recompute=(kind for kind in [Residual]))
    assert engine.recompute == (Residual,) and engine == replace(engine) and replace(engine, recompute=[]) != engine
    assert pickle.loads(pickle.dumps(engine)).recompute == (Residual,)
    expected = ENGINES[name].value_and_grad(objective, tasks)[1]
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12
    both = Objective(objective.model, F.cross_entropy, recompute=["stem"])
    assert engine(both, tasks).report.recomputed == ("Conv2d.forward", "Residual.forward")
    assert engine.adapt(objective, tasks[0].support)


def test_what_an_engine_cannot_recompute():
    objective, tasks = pictures()
    with pytest.raises(TypeError, match=r"`recompute` must be a list of module names or types. Got 'blocks.\*': write"):
        MAML(inner=INNER, recompute="blocks.*")
    with pytest.raises(TypeError, match="Got 3 in it"):
        MAML(inner=INNER, recompute=[Residual, 3])
    with pytest.raises(ValueError, match="`recompute` names no module by 'block'. Close to it: blocks"):
        MAML(inner=INNER, recompute=["block"])(objective, tasks)
    function = Objective.from_function(lambda params, x: params["w"].square().sum(), {"w": torch.ones(2)})
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="Got one of a function: call imaml.recompute in it"):
        MAML(inner=INNER, recompute=[Residual])(function, TaskBatch(support=x, query=x))
