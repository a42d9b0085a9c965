import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import CheckpointError, Plan, RunFolder, Trainer, save_checkpoint

PLAN = Plan(steps=6, meta_batch=3, eval_every=2, val_tasks=4, meta_lr=0.01)
INNER = GradientDescent(lr=0.02, steps=2)
CONFIG = {"strategy": "maml", "plan": {"steps": 6, "minutes": None}}
TIMES = ("milliseconds", "seconds")


def make_trainer(plan=PLAN, engine=None):
    torch.manual_seed(1)
    model = MLP(hidden=(8,))
    objective = Objective(model, F.mse_loss, metric=F.l1_loss)
    engine = engine or MAML(inner=INNER)
    return Trainer(
        model=model, objective=objective, engine=engine, episodes=Sinusoid(shots=5, queries=7, seed=3), plan=plan
    )


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_the_steps_are_those_of_adam_on_the_batches_in_order():
    trainer = make_trainer()
    twin = make_trainer()
    optimizer = torch.optim.Adam(twin.model.parameters())
    records = list(trainer)
    for step, record in enumerate(records):
        tasks = twin.episodes.batch("train", step, 3)
        loss, gradients = twin.engine.value_and_grad(twin.objective, tasks)
        assert record.loss == pytest.approx(loss.item())
        for name, parameter in twin.model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.param_groups[0]["lr"] = record.learning_rate
        optimizer.step()
    for ours, theirs in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.step for record in records if record.val] == [2, 4, 6]
    assert records[0].learning_rate == 0.01
    assert records[3].learning_rate == pytest.approx(0.005)


def adapting():
    """An engine that remembers something from call to call: small lambdas make systems indefinite."""
    return ImplicitMAML(inner=INNER, regularization=0.01, damping="auto", solver=CG(max_steps=20), on_failure="ignore")


@pytest.mark.parametrize("engine", [lambda: MAML(inner=INNER), adapting], ids=["MAML", "damping that adapts"])
def test_a_loop_taken_up_again_and_a_state_loaded_elsewhere_continue_bit_for_bit(tmp_path, engine):
    whole = list(make_trainer(engine=engine()))
    trainer = make_trainer(engine=engine())
    begun = [next(iter(trainer)) for _ in range(3)]
    assert engine is not adapting or trainer.engine.state_dict()["damping"] > 0
    other = make_trainer(engine=engine())
    other.load_state_dict(deepcopy(trainer.state_dict()))
    for continued in (list(other), list(trainer)):
        assert without_times(r.to_json() for r in begun + continued) == without_times(r.to_json() for r in whole)


def test_the_clock_ends_a_run():
    trainer = make_trainer(replace(PLAN, steps=10**9, minutes=0.2 / 60))
    records = list(trainer)
    assert 0 < len(records) < 10**6
    assert records[-1].seconds >= 0.2 > records[-2].seconds
    assert records[-1].val is not None
    assert trainer.plan.learning_rate(records[-2].seconds / 0.2) < PLAN.meta_lr


def test_more_inner_steps_in_evaluation_are_taken():
    trainer = make_trainer(replace(PLAN, eval_inner_steps=7))
    as_trained = make_trainer(engine=MAML(inner=replace(INNER, steps=7)))
    assert trainer.evaluate("val", tasks=5) == as_trained.evaluate("val", tasks=5)
    assert trainer.evaluate("val", tasks=5) != make_trainer().evaluate("val", tasks=5)


def test_records_of_an_implicit_strategy_tell_of_its_solves():
    engine = ImplicitMAML(
        inner=INNER, regularization=50.0, solver=CG(max_steps=2, rtol=0.0, atol=0.0), on_failure="ignore"
    )
    record = next(iter(make_trainer(engine=engine)))
    assert record.solver["status"] == {"budget_spent": 3}
    assert record.solver["steps"] == 2
    assert 0 < record.solver["residual"] < 1
    assert next(iter(make_trainer(engine=FOMAML(inner=INNER)))).solver is None


def test_a_run_folder_restores_model_optimizer_and_metrics(tmp_path):
    whole = make_trainer()
    expected = [record.to_json() for record in whole]
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    trainer = make_trainer()
    for record in trainer:
        folder.log(record)
        if record.step == 3:
            folder.save(trainer)
        if record.step == 5:
            break
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the process was killed here
    restored = make_trainer()
    folder.restore(restored, CONFIG)
    assert restored.step == 3
    assert [record["step"] for record in folder.metrics()] == [1, 2, 3]
    for record in restored:
        folder.log(record)
    assert without_times(folder.metrics()) == without_times(expected)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, restored.model.state_dict()[name])


def test_a_checkpoint_of_another_configuration_names_what_differs(tmp_path):
    folder = RunFolder.create(tmp_path, CONFIG)
    trainer = make_trainer()
    folder.save(trainer)
    other = {"strategy": "imaml", "plan": {"steps": 7, "minutes": 3.0}}
    with pytest.raises(
        CheckpointError, match=r"strategy is maml there\. Got imaml; steps is 6 there\. Got 7\."
    ) as error:
        folder.restore(trainer, other, free=("minutes",))
    assert "minutes" not in str(error.value)
    save_checkpoint(folder.path / "checkpoint.pt", {"config": CONFIG, "model": {}})
    with pytest.raises(CheckpointError, match=r"another version.*optimizer"):
        folder.restore(trainer, CONFIG)


def test_a_folder_in_use_or_out_of_reach_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(NotADirectoryError, match=r"run folder .*file/run cannot be written"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(FileNotFoundError, match=r"no run to resume"):
        RunFolder(tmp_path).config  # noqa: B018
    (tmp_path / "config.json").write_text(json.dumps(CONFIG)[:-4])
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        RunFolder(tmp_path).config  # noqa: B018
