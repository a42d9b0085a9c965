"""Hyper-parameters of the inner loop: which forms are taken, what each means, and what is said of the others."""

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import (
    FOMAML,
    MAML,
    Adam,
    Dense,
    GradientDescent,
    ImplicitMAML,
    NewtonCG,
    NonFiniteError,
    Objective,
    RMSprop,
    TaskBatch,
    TorchOptimizer,
)
from imaml.inner._hyper import is_off
from imaml.measure import peak_memory
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
    "vectors per step": (
        {n: PER_STEP if SHAPES[n].numel() > 4 else PER_STEP[:1] for n in NAMES},
        lambda name, k: PER_STEP[k if SHAPES[name].numel() > 4 else 0],
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
            r"^`lr\['0\.bias'\]` must be a number, of the parameter's shape \(4,\), or for each inner step of shape "
            r"\(3,\), or \(3, 4\), where dimensions may be 1\. Got \(3, 2\)\.$",
        ),
        (
            lambda meta: dict.fromkeys(NAMES, 0.1) | {"0.bias": [0.1, 0.2]},
            r"`lr\['0\.bias'\]`.*sequence of 3.*Got 2\.$",
        ),
        (
            lambda meta: {"a": torch.ones(()), "b": 0.1},
            r"^`lr` must be one value for all parameters, or a dictionary.*a group of values with other names, "
            r"\['a', 'b'\], where \['0\.weight'.*\] adapt: choose one",
        ),
        (lambda meta: meta["none"], r"^`lr` asks for the meta-parameter 'none'\. Got none: name it in Objective"),
        (lambda meta: [0.1, float("inf"), 0.1], r"^`lr` must be finite\. Got tensor\("),
    ],
)
def test_values_that_do_not_fit(lr, message):
    objective = Objective(cases.make_model(), F.mse_loss)
    with pytest.raises(ValueError, match=message):
        FOMAML(inner=GradientDescent(lr=lr, steps=3))(objective, cases.make_tasks())


def _of_width(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, width)).double()
    x, y = torch.randn(2, 2, 5, 3).double(), torch.randn(2, 2, 5, width).double()
    return model, TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def _gradient(model, tasks, lr, **options):
    engine = MAML(inner=GradientDescent(lr=lr, steps=3, **options))
    return engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1]


@pytest.mark.parametrize("learned", [False, True], ids=["number", "function"])
def test_a_vector_that_may_be_of_steps_or_of_entries_beside_one_of_steps_is_refused(learned):
    model, tasks = _of_width(3)
    names = [n for n, _ in model.named_parameters()]

    def given(value):
        rates = dict.fromkeys(names, PER_STEP) | {"2.bias": value}
        return (lambda meta: rates) if learned else rates

    with pytest.raises(
        ValueError,
        match=r"^`lr\['2\.bias'\]` may be one value per inner step, as `lr\['0\.weight'\]` is, or one per entry of the "
        r"parameter, which has as many\. Expected shape \(3, 1\) for one per step, or \(1, 3\) for one per entry\. Got "
        r"\(3,\)\.$",
    ):
        _gradient(model, tasks, given(PER_STEP))
    per_step = _gradient(model, tasks, PER_STEP)
    for value in (PER_STEP.unsqueeze(1), list(PER_STEP)):
        close(_gradient(model, tasks, given(value)), per_step)
    per_entry = _gradient(model, tasks, dict.fromkeys(names, list(PER_STEP)) | {"2.bias": [PER_STEP] * 3})
    close(_gradient(model, tasks, given(PER_STEP.unsqueeze(0))), per_entry)
    assert not torch.allclose(per_entry["2.bias"], per_step["2.bias"], rtol=1e-3)


@pytest.mark.parametrize("of", ["lr", "momentum", "weight_decay"])
def test_a_tensor_of_the_parameters_shape_is_one_value_an_entry_whatever_its_size(of):
    """Meta-SGD, for a layer with as many outputs as there are steps."""
    model, tasks = _of_width(3)
    entries = {n: torch.linspace(0.02, 0.1, p.numel()).double().view(p.shape) for n, p in model.named_parameters()}
    found, expected = (
        _gradient(model, tasks, **{"lr": 0.1} | {of: {n: as_form(v) for n, v in entries.items()}})
        for as_form in (lambda v: v, lambda v: [v] * 3)
    )
    close(found, expected)


def test_one_step_or_a_parameter_of_one_entry_leaves_nothing_to_choose():
    model, tasks = _of_width(1)
    names = [n for n, _ in model.named_parameters()]
    for steps in (1, 3):
        one = torch.full((1,), 0.1, dtype=torch.float64)
        engine, other = (
            MAML(inner=GradientDescent(lr=lr, steps=steps), regularization=weight)
            for lr, weight in ((dict.fromkeys(names, one), dict.fromkeys(names, 2 * one)), (0.1, 0.2))
        )
        found, expected = (e.value_and_grad(Objective(model, F.mse_loss), tasks)[1] for e in (engine, other))
        close(found, expected)


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (lambda meta: meta["rates"], ValueError, r"a group of values with other names, \['a', 'b'\]"),
        (
            lambda meta: meta["rates.a"],
            ValueError,
            r"'rates\.a'\. Got \['c', 'rates'\], 'rates' a group of \['a', 'b'\].*\['group'\]",
        ),
        (
            lambda meta: meta["rates"]["d"],
            ValueError,
            r"'d'\. Got \['c', 'rates'\], 'rates' a group of \['a', 'b'\]: name",
        ),
        (lambda meta: dict.fromkeys(NAMES, meta["rates"]), TypeError, r"`lr\['0\.weight'\]`.*a group.*\['a', 'b'\]"),
        (lambda meta: [meta["rates"]] * 3, TypeError, r"^`lr` must be.*a group of them, \['a', 'b'\]: choose one"),
    ],
)
def test_a_group_of_tensors_where_one_is_expected_is_named(lr, error, message):
    meta = {"rates": {"a": cases.random(), "b": cases.random()}, "c": cases.random()}
    with pytest.raises(error, match=message):
        FOMAML(inner=GradientDescent(lr=lr, steps=3))(
            Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks()
        )


def test_an_error_of_a_function_that_takes_a_group_for_a_tensor_says_that_it_is_one():
    meta = {"rates": {"a": cases.random()}}
    with pytest.raises(AttributeError, match="exp") as caught:
        FOMAML(inner=GradientDescent(lr=lambda meta: meta["rates"].exp(), steps=3))(
            Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks()
        )
    assert caught.value.__notes__ == [
        "With one argument the function of `lr` gets the meta-parameters, and not the step.",
        "In the dictionary that the function of `lr` gets, each of ['rates'] is a dictionary itself.",
    ]
    with pytest.raises(TypeError) as caught:  # a schedule without its first argument
        FOMAML(inner=GradientDescent(lr=lambda step: 0.1 / (step + 1), steps=3))(
            Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
        )
    assert "not the step" in caught.value.__notes__[0]


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


@pytest.mark.parametrize("of", ["lr", "regularization"])
def test_a_tensor_that_would_not_be_learned_is_refused(of):
    captured = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    meta = {"a": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)}
    for function in (lambda meta: captured.exp(), lambda meta: captured.exp() * meta["a"].exp(), lambda meta: captured):
        given = {"lr": 0.1, "regularization": 0.1} | {of: function}
        engine = MAML(inner=GradientDescent(lr=given["lr"], steps=2), regularization=given["regularization"])
        with pytest.raises(ValueError, match=f"`{of}` depends on a tensor that requires grad and is not in the"):
            engine(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())
    detached = GradientDescent(lr=lambda meta: captured.detach().exp() * meta["a"].exp(), steps=2)
    MAML(inner=detached)(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())


def test_an_infinite_derivative_of_a_hyperparameter_is_an_error():
    meta = {"a": torch.tensor(0.0, dtype=torch.float64, requires_grad=True)}
    objective, tasks = Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks()
    for engine in (
        MAML(inner=GradientDescent(lr=lambda meta: 0.1 + meta["a"].sqrt(), steps=2)),
        ImplicitMAML(inner=GradientDescent(lr=0.1, steps=2), regularization=lambda meta: 1 + meta["a"].sqrt()),
    ):
        with pytest.raises(NonFiniteError, match="meta-parameter 'a' is not finite.*sqrt at 0"):
            engine(objective, tasks)


def test_step_sizes_are_expanded_one_step_at_a_time():
    """A rate for every layer and step takes no vector `(n,)` for every step."""
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))
    names, steps = [n for n, _ in model.named_parameters()], 12
    meta = {"log_lr": torch.full((len(names), steps), -4.0, requires_grad=True)}
    x = torch.randn(1, 4, 200)
    tasks = TaskBatch(support=(x, x), query=(x, x))

    def rates(meta):
        return {n: list(row.exp()) for n, row in zip(names, meta["log_lr"], strict=True)}

    peaks = []
    for lr, given in ((0.01, None), (rates, meta)):
        engine = MAML(inner=GradientDescent(lr=lr, steps=steps), checkpoints=2)
        objective = Objective(model, F.mse_loss, meta=given)
        engine(objective, tasks)
        peaks.append(peak_memory(lambda engine=engine, objective=objective: engine(objective, tasks)))
    theta = 4 * sum(p.numel() for p in model.parameters())
    assert peaks[1] - peaks[0] < 5 * theta


@pytest.mark.parametrize("what", [torch.optim.Adam, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)])
def test_optimisers_of_torch_are_named_with_their_wrapper(what):
    with pytest.raises(TypeError, match=r"Adam, AdamW and RMSprop.*TorchOptimizer\(torch.optim.LBFGS, steps="):
        MAML(inner=what)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MAML(inner=GradientDescent(lr=0.1, steps=1), regularization=[1.0]), TypeError, "one for all steps"),
        (
            lambda: GradientDescent(lr=nn.ParameterList([torch.ones(1)]), steps=1),
            TypeError,
            "ParameterList.*a function",
        ),
        (lambda: GradientDescent(lr={"a": lambda meta: 1.0}, steps=1), TypeError, "`lr` must be a number. Got <func"),
        (lambda: Adam(lr=0.1, steps=1, betas=0.9), ValueError, "`betas` must be two numbers. Got 0.9"),
        (lambda: Objective(cases.make_model(), F.mse_loss, meta=[1]), TypeError, "`meta` must be a dictionary"),
        (
            lambda: Objective(cases.make_model(), F.mse_loss, meta={"net": nn.Linear(1, 1)}),
            TypeError,
            r"'net'.*dict\(network.named_parameters\(\)\). Got Linear",
        ),
        (
            lambda: Objective(cases.make_model(), F.mse_loss, meta={"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}),
            ValueError,
            r"names \['a.b'\] in `meta`",
        ),
    ],
)
def test_what_is_said_of_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "`lr` must be numbers or tensors. Got None"),
        ("a", TypeError, "`lr` must be numbers or tensors. Got 'a'"),
        (float("nan"), ValueError, "`lr` must be finite. Got nan"),
        ([], TypeError, r"`lr` must be numbers or tensors. Got \[\]"),
    ],
)
def test_what_is_said_of_bad_values(value, error, message):
    with pytest.raises(error, match=message):
        FOMAML(inner=GradientDescent(lr=lambda meta: value, steps=1))(
            Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
        )


def test_the_implicit_gradient_refuses_a_lambda_of_zero_from_a_function():
    meta = {"a": torch.tensor(1.0, dtype=torch.float64, requires_grad=True)}
    engine = ImplicitMAML(inner=GradientDescent(lr=0.1, steps=1), regularization=lambda meta: 0.0)
    with pytest.raises(ValueError, match="Got 0 from its function.*regularization=None"):
        engine(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())


def test_constants_among_the_meta_parameters_receive_no_gradient():
    frozen = torch.tensor(-3.0, dtype=torch.float64)
    group = {"a": torch.tensor(0.1, dtype=torch.float64, requires_grad=True), "b": torch.ones(1, dtype=torch.float64)}

    def loss(output, target, meta):
        return meta["group"]["a"] * F.mse_loss(output, target) + 0 * meta["group"]["b"].sum()

    objective = Objective(cases.make_model(), loss, meta={"log_lr": frozen, "group": group})
    for strategy in (MAML, FOMAML, ImplicitMAML):
        engine = strategy(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=2))
        assert set(engine.value_and_grad(objective, cases.make_tasks())[1]) == {*NAMES, "group.a"}


def test_a_group_may_have_members_without_gradient():
    group = {"a": cases.random(), "unused": torch.ones(1, dtype=torch.float64, requires_grad=True)}
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["rates"]["a"].exp(), steps=2))
    found = engine.value_and_grad(Objective(cases.make_model(), F.mse_loss, meta={"rates": group}), cases.make_tasks())
    assert found[1]["rates.a"] != 0 and found[1]["rates.unused"] == 0


def test_configurations_and_objectives_can_be_copied():
    wrapped = TorchOptimizer(torch.optim.SGD, steps=2, lr=0.1)
    more = replace(wrapped, steps=5)
    assert more.steps == 5 and more.options == {"lr": 0.1} and more == TorchOptimizer(torch.optim.SGD, steps=5, lr=0.1)
    objective = Objective(cases.make_model(), F.mse_loss, meta={"a": torch.ones(1, requires_grad=True)})
    copied = pickle.loads(pickle.dumps(objective))
    assert set(copied.parameters()) == {*NAMES, "a"}


def test_an_objective_evaluates_at_its_own_values_where_none_are_given():
    scale = torch.tensor([0.5], dtype=torch.float64)

    def scaled(output, target, meta):
        return meta["a"] * meta["group"]["scale"].sum() * F.mse_loss(output, target)

    model, (x, y) = cases.make_model(), cases.make_tasks()[0].support
    objective = Objective(model, scaled, meta={"a": 3 * scale[0], "group": {"scale": scale}})
    for values, factor in (({}, 0.75), ({"a": scale[0]}, 0.25), ({"group.scale": 2 * scale}, 1.5)):
        assert objective.evaluate(values, (x, y))[0].item() == pytest.approx(factor * F.mse_loss(model(x), y).item())


@pytest.mark.parametrize("by_name", [False, True], ids=["one lambda", "by name"])
def test_a_learned_lambda_of_quadratics_in_closed_form(by_name):
    """With curvature h and support minimum b, phi = (h b + lambda theta) / (h + lambda) entry by entry."""
    start = {n: torch.randn(2, dtype=torch.float64, requires_grad=True) for n in ("first", "second")}
    curvature = {"first": torch.tensor([1.0, 2.0]).double(), "second": torch.tensor([3.0, 0.5]).double()}
    meta = {f"log {n}": cases.random(shift=shift) for n, shift in (("first", 0.5), ("second", -1.0))}

    def support(params, batch):
        return sum((curvature[n] * (w - batch) ** 2).sum() / 2 for n, w in params.items())

    def query(params, batch):
        return sum(((w + batch) ** 3).sum() for w in params.values())

    def weight(meta):
        rates = {n: meta[f"log {n}"].exp() for n in start}
        return rates if by_name else rates["first"] + rates["second"]

    batch = torch.randn(2, 2, dtype=torch.float64)
    losses = []
    for b in batch:
        given = weight(meta)
        rates = given if by_name else dict.fromkeys(start, given)
        phi = {n: (curvature[n] * b + rates[n] * w) / (curvature[n] + rates[n]) for n, w in start.items()}
        losses.append(query(phi, b))
    everything = start | meta
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(everything.values()))
    engine = ImplicitMAML(inner=NewtonCG(steps=3, solver=Dense()), regularization=weight, solver=Dense())
    objective = Objective.from_function(support, start, outer_loss=query, meta=meta)
    got = engine.value_and_grad(objective, TaskBatch(support=batch, query=batch))[1]
    close(got, dict(zip(everything, expected, strict=True)), rtol=1e-9)
