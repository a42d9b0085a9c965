"""The outer optimiser by name, and meta-gradients that are clipped."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from imaml import MAML, GradientDescent, NonFiniteError, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import CheckpointError, Plan, RunFolder, Trainer

PLAN = Plan(steps=3, meta_batch=2, eval_every=9, val_tasks=2, meta_lr=0.01)
CLASSES = [
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
]
REFUSED = ("LBFGS", "SparseAdam")


def make_trainer(plan):
    torch.manual_seed(1)
    model = MLP(hidden=(4,))
    if plan.optimizer == "muon":  # for matrices alone
        model = torch.nn.Sequential(torch.nn.Linear(1, 4, bias=False), torch.nn.Tanh(), torch.nn.Linear(4, 1, False))
    objective = Objective(model, F.mse_loss, metric=F.l1_loss)
    engine = MAML(inner=GradientDescent(lr=0.02, steps=1))
    return Trainer(model=model, objective=objective, engine=engine, episodes=Sinusoid(shots=5, seed=3), plan=plan)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_every_class_of_torch_optim_trains_by_its_name_in_any_case(name):
    trainer = make_trainer(replace(PLAN, optimizer=name.upper()))
    assert type(trainer.optimizer) is getattr(torch.optim, name)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    list(trainer)
    after = list(trainer.model.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_options_reach_the_class():
    plan = replace(PLAN, optimizer="AdamW", optimizer_options={"weight_decay": 0.5, "betas": [0.8, 0.9]})
    group = make_trainer(plan).optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.8, 0.9))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, r"class of torch\.optim, such as .*adam.*Got 'adamm'"),
        ("optimizer", {}, r"class of torch\.optim"),
        ("LBFGS", {}, r"LBFGS cannot be used: it evaluates the loss again"),
        ("sparseadam", {}, r"SparseAdam cannot be used: it takes sparse gradients"),
        ("sgd", {"momentun": 0.9}, r"of SGD may be momentum\. Got 'momentun'"),
        ("sgd", {"qqq": 1}, r"of SGD may be dampening, .*weight_decay\. Got 'qqq'"),
        ("adam", {"lr": 0.1}, r"cannot have lr: the learning rate is `meta_lr`"),
        ("adam", {"capturable": True}, r"cannot have capturable: no CUDA graph"),
        ("adam", {"differentiable": True}, r"cannot have differentiable"),
        ("adam", {"weight_decay": "lots"}, r"a number, True or False as weight_decay\. Got 'lots'"),
        ("adam", {"betas": (0.9, 1.5)}, r"Adam with betas=\(0\.9, 1\.5\) cannot be made: Invalid beta"),
        ("adam", {"betas": 0.9}, r"Adam with betas=0\.9 cannot be made"),
    ],
)
def test_a_choice_that_cannot_be_used_is_refused_with_the_reason(name, options, message):
    with pytest.raises(ValueError, match=message):
        Plan(optimizer=name, optimizer_options=options).make_optimizer([torch.nn.Parameter(torch.zeros(1, 1))])


def test_a_class_that_refuses_the_model_says_so():
    plan = replace(PLAN, optimizer="muon")
    trainer = make_trainer(plan)
    with pytest.raises(ValueError, match=r"torch\.optim\.Muon with no options cannot be made: .*2D"):
        Trainer(model=MLP(hidden=(4,)), objective=trainer.objective, engine=trainer.engine, episodes=None, plan=plan)


def test_a_long_meta_gradient_is_scaled_down_and_a_short_one_is_not():
    plan = replace(PLAN, optimizer="sgd", schedule="constant", steps=1)
    moves = {}
    for clip in (None, 1e9, 0.01):
        trainer = make_trainer(replace(plan, clip_norm=clip))
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        (record,) = trainer
        moves[clip] = before - torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), record
    free, long, short = (moves[clip][0] for clip in (None, 1e9, 0.01))
    norm = free.norm().item() / 0.01
    assert norm > 0.1
    torch.testing.assert_close(long, free)
    torch.testing.assert_close(short, free * (0.01 / norm), rtol=1e-3, atol=1e-7)
    assert moves[None][1].gradient_norm is None and "gradient_norm" not in moves[None][1].to_json()
    assert moves[1e9][1].gradient_norm == moves[0.01][1].gradient_norm == pytest.approx(norm, rel=1e-3)


def test_a_norm_that_overflows_is_an_error():
    trainer = make_trainer(replace(PLAN, clip_norm=1.0))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    with pytest.raises(NonFiniteError, match=r"norm of the meta-gradient of step 1 is inf.*clipped to 1\.0"):
        trainer._clip(1.0)


def test_a_run_begun_before_there_was_a_choice_was_with_adam(tmp_path):
    began = {"strategy": "maml", "plan": {"steps": 3}}
    folder = RunFolder.create(tmp_path, began)
    folder.save(make_trainer(PLAN))
    now = {"strategy": "maml", "plan": {"steps": 3, "optimizer": "adam", "optimizer_options": {}, "clip_norm": None}}
    assert folder.read(make_trainer(PLAN), now) is None
    for name, value, what in (
        ("optimizer", "sgd", r"optimizer is adam there\. Got sgd"),
        ("optimizer_options", {"weight_decay": 0.1}, r"weight_decay is None there\. Got 0\.1"),
        ("clip_norm", 1.0, r"clip_norm is None there\. Got 1\.0"),
    ):
        with pytest.raises(CheckpointError, match=what):
            folder.read(make_trainer(PLAN), {**now, "plan": {**now["plan"], name: value}})


def test_an_option_left_out_on_resume_is_a_difference_and_a_tuple_is_a_list(tmp_path):
    config = {"optimizer": "adam", "optimizer_options": {"eps": 0.1, "betas": (0.5, 0.6)}}
    folder = RunFolder.create(tmp_path, config)
    assert folder.holds(config)
    assert not folder.holds({"optimizer": "adam", "optimizer_options": {"betas": (0.5, 0.6)}})
