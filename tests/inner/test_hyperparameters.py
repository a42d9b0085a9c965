"""Hyper-parameters of the inner loop: which forms are taken, what each means, and what is said of the others."""

import pytest
import torch
import torch.nn.functional as F

from imaml import FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, RMSprop
from imaml._hyper import is_off
from tests.inner import cases, unrolled
from tests.inner.cases import close

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
SHAPES = {n: p.shape for n, p in cases.make_model().named_parameters()}
PER_STEP = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)


def per_entry(name):
    """Another rate for each entry of a parameter."""
    return torch.linspace(0.02, 0.1, SHAPES[name].numel(), dtype=torch.float64).view(SHAPES[name])


# name: the library's lr without meta-parameters, and lr(parameter, step) by hand
NUMBERS = {
    "tensor": (torch.tensor(0.07, dtype=torch.float64), lambda name, k: 0.07),
    "one in a list": ([0.07], lambda name, k: 0.07),
    "integers": (dict.fromkeys(NAMES, torch.tensor(1)), lambda name, k: 1),
    "float32": (torch.tensor(0.25), lambda name, k: 0.25),
    "tuple per step": ((0.02, 0.05, 0.1), lambda name, k: PER_STEP[k]),
    "tensor per step": (PER_STEP, lambda name, k: PER_STEP[k]),
    "tensors per step": (list(PER_STEP), lambda name, k: PER_STEP[k]),
    "per entry": ({n: per_entry(n) for n in NAMES}, lambda name, k: per_entry(name)),
    "lists per parameter": (
        {n: (0.02, 0.05, 0.1) if n == "2.weight" else [0.03] for n in NAMES},
        lambda name, k: PER_STEP[k] if name == "2.weight" else 0.03,
    ),
    "entries per step": (
        {n: [rate * per_entry(n) for rate in PER_STEP] for n in NAMES},
        lambda name, k: PER_STEP[k] * per_entry(name),
    ),
    "broadcast over entries": (
        {n: PER_STEP.view(3, *(1 for _ in SHAPES[n])) if n == "0.weight" else per_entry(n) for n in NAMES},
        lambda name, k: PER_STEP[k] if name == "0.weight" else per_entry(name),
    ),
    "rows of entries per step": (
        {n: PER_STEP.view(3, 1, 1) * per_entry(n)[:1] if n == "0.weight" else 0.05 for n in NAMES},
        lambda name, k: PER_STEP[k] * per_entry(name)[:1] if name == "0.weight" else 0.05,
    ),
    "one step for all": (
        {n: per_entry(n).unsqueeze(0) if n == "0.weight" else 0.05 for n in NAMES},
        lambda name, k: per_entry(name) if name == "0.weight" else 0.05,
    ),
}


@pytest.mark.parametrize("learned", [False, True], ids=["number", "function"])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_form_means_the_same_as_an_unrolled_loop(name, learned):
    lr, by_hand = NUMBERS[name]
    model, tasks = cases.make_model(), cases.make_tasks()
    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss, loss, dict(model.named_parameters()), {}, tasks, unrolled.sgd(), 3, lr=lambda meta, n, k: by_hand(n, k)
    )
    engine = MAML(inner=GradientDescent(lr=(lambda meta: lr) if learned else lr, steps=3))
    close(engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1], expected)


def test_two_hyperparameters_may_share_a_meta_parameter_and_have_one_alone():
    model, tasks = cases.make_model(), cases.make_tasks()
    meta = {"both": cases.random(), "alone": cases.random(3, shift=-2.0)}
    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss,
        loss,
        dict(model.named_parameters()),
        meta,
        tasks,
        unrolled.sgd(),
        3,
        lr=lambda meta, name, k: (meta["both"] + meta["alone"][k]).exp(),
        damping=lambda meta: meta["both"].exp(),
    )
    inner = GradientDescent(lr=lambda meta: (meta["both"] + meta["alone"]).exp(), steps=3)
    for chunk_size in (None, 1):
        engine = MAML(inner=inner, regularization=lambda meta: meta["both"].exp(), chunk_size=chunk_size)
        close(engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1], expected)


@pytest.mark.parametrize("by_name", [False, True], ids=["for all", "by name"])
def test_a_list_of_learned_tensors_is_one_per_step(by_name):
    model, tasks = cases.make_model(), cases.make_tasks()
    meta = {n: cases.random(shift=shift) for n, shift in (("first", -3.0), ("second", -2.0))}
    loss = cases.plain_loss(model)
    expected = unrolled.meta_gradient(
        loss,
        loss,
        dict(model.named_parameters()),
        meta,
        tasks,
        unrolled.sgd(),
        2,
        lr=lambda meta, name, k: meta[("first", "second")[k]].exp(),
    )

    def lr(meta):
        per_step = [meta["first"].exp(), meta["second"].exp()]
        return dict.fromkeys(NAMES, per_step) if by_name else per_step

    engine = MAML(inner=GradientDescent(lr=lr, steps=2))
    close(engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1], expected)


@pytest.mark.parametrize(
    ("given", "off"),
    [(0, True), (0.0, True), (None, True), (0.1, False), ([0.0], False), (lambda meta: 0.0, False)],
)
def test_zero_and_none_are_off(given, off):
    assert is_off(given) is off


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (0, ValueError, r"^`lr` must be positive\. Got 0\.0\.$"),
        ({"a": [0.1, -0.1]}, ValueError, r"^`lr` must be positive\. Got -0\.1 at step 1 for 'a'\.$"),
        ({"a": 0.1, "b": "c"}, TypeError, r"^`lr` must be a number\. Got 'c'\.$"),
        ([0.1, torch.tensor([0.1, 0.0])], ValueError, r"^`lr` must be positive\. Got 0\.0 at step 1\.$"),
        (torch.tensor([0.1, float("inf")]), ValueError, r"^`lr` must be finite\. Got inf\.$"),
        (torch.tensor([0.1, -0.5, 0.2]), ValueError, r"^`lr` must be positive\. Got -0\.5\.$"),
        (
            torch.tensor(0.1, requires_grad=True),
            ValueError,
            r"^`lr` is a tensor that requires grad\. Expected a function of the meta-parameters: name the tensor in "
            r"Objective\(\.\.\., meta=\{\.\.\.\}\), and return it from a function of that dictionary\.$",
        ),
    ],
)
def test_bad_numbers_say_where_they_are(lr, error, message):
    with pytest.raises(error, match=message):
        GradientDescent(lr=lr, steps=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientDescent(lr=0.1, steps=0, momentum=0.0, weight_decay=0.0),
        lambda: RMSprop(lr=0.1, steps=1, alpha=0.0, momentum=0.0),
        lambda: Adam(lr=0.1, steps=1, betas=(0.0, 0.0), weight_decay=0.0),
        lambda: GradientDescent(lr=0.1, steps=1, stationarity=0.0),
        lambda: ImplicitMAML(inner=GradientDescent(lr=torch.zeros(0), steps=1)),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(make):
    make()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (
            lambda meta: {n: 0.1 for n in (*NAMES[1:], "3.bias", "4.bias")},
            r"^`lr` must name every adapted parameter and no other\. Missing: \['0\.weight'\]; "
            r"unknown: \['3\.bias', '4\.bias'\]\.$",
        ),
        (
            lambda meta: dict.fromkeys(NAMES[:2], 0.1),
            r"Missing: \['2\.bias', '2\.weight'\]; unknown: none\.$",
        ),
        (lambda meta: dict.fromkeys((*NAMES, "a"), 0.1), r"Missing: none; unknown: \['a'\]\.$"),
        (
            lambda meta: torch.ones(2, 3),
            r"^`lr` must be a number, or one per inner step, shape \(3,\)\. Got \(2, 3\): for one per parameter return "
            r"a dictionary by parameter name\.$",
        ),
        (lambda meta: [0.1, 0.1], r"shape \(3,\)\. Got \(2,\)"),
        (
            lambda meta: dict.fromkeys(NAMES, 0.1) | {"0.bias": torch.ones(3, 2)},
            r"^`lr\['0\.bias'\]` must be a number, of the parameter's shape \(4,\), or of shape \(3, 4\), where "
            r"dimensions may be 1, for each inner step\. Got \(3, 2\)\.$",
        ),
        (
            lambda meta: dict.fromkeys(NAMES, 0.1) | {"0.bias": [0.1, 0.2]},
            r"`lr\['0\.bias'\]`.*sequence of 3.*Got 2\.$",
        ),
        (lambda meta: meta["none"], r"^`lr` asks for the meta-parameter 'none'\. Got none: name it in Objective"),
        (lambda meta: [0.1, float("inf"), 0.1], r"^`lr` must be finite\. Got tensor\("),
    ],
)
def test_values_that_do_not_fit(lr, message):
    objective = Objective(cases.make_model(), F.mse_loss)
    with pytest.raises(ValueError, match=message):
        FOMAML(inner=GradientDescent(lr=lr, steps=3))(objective, cases.make_tasks())


def test_a_float64_copy_has_meta_parameters_of_its_own():
    grad = {"requires_grad": True}
    meta = {"a": torch.tensor(0.5, **grad), "group": {"b": torch.ones(2, **grad), "c": torch.zeros(1, **grad)}}
    copied = Objective(cases.make_model(), F.mse_loss, meta=meta).double()
    found = copied.parameters()
    for name, given in (("a", meta["a"]), ("group.b", meta["group"]["b"]), ("group.c", meta["group"]["c"])):
        assert found[name].dtype == torch.float64 and found[name].requires_grad and found[name].is_leaf
        assert torch.equal(found[name].detach().float(), given) and given.dtype == torch.float32
        with torch.no_grad():
            found[name].add_(1)
        assert not torch.equal(found[name].detach().float(), given)
