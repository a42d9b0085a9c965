"""Trainings in float64, for one process and for every rank alike."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from imaml import CG, GradientDescent, ImplicitMAML, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import Plan, Trainer, _trainer
from tests.distributed.cases import place

PLAN = Plan(steps=4, meta_batch=3, eval_every=2, val_tasks=21, meta_lr=0.01)


@dataclass
class Float64:
    """Counts the tasks it draws."""

    episodes: Sinusoid
    drawn: int = 0

    def batch(self, split, index, tasks, rows=None):
        batch = self.episodes.batch(split, index, tasks, rows)
        self.drawn += len(batch)
        return batch.to(dtype=torch.float64)


def make_trainer(group, plan=PLAN):
    torch.manual_seed(1)
    model = MLP(hidden=(8,)).double()
    inner = GradientDescent(lr=0.02, steps=2)
    engine = ImplicitMAML(inner=inner, regularization=50.0, solver=CG(max_steps=2, rtol=0.0, atol=0.0))
    objective = Objective(model, F.mse_loss, metric=F.l1_loss)
    episodes = Float64(Sinusoid(shots=5, queries=7, seed=3))
    return Trainer(model=model, objective=objective, engine=engine, episodes=episodes, plan=plan, group=group)


def curve(group, plan=PLAN):
    """Every number of the records but times, the test, the parameters, and how many tasks were drawn."""
    trainer = make_trainer(group, plan)
    records = []
    for record in trainer:
        val = None if record.val is None else (record.val.mean, record.val.interval, record.val.tasks)
        records.append((record.loss, record.metric, record.learning_rate, record.solver, val))
    test = trainer.evaluate("test", tasks=7)
    parameters = [p.detach() for p in trainer.model.parameters()]
    return records, (test.mean, test.interval), parameters, trainer.episodes.drawn


def curve_with_a_rank_without_tasks(group):
    return curve(group, replace(PLAN, meta_batch=1))


def clocks_that_differ(group):
    """The seconds of every record, and the learning rates, where the clock of rank 1 runs too fast."""
    clock = _trainer.perf_counter
    if place(group)[0] == 1:
        _trainer.perf_counter = lambda: 1000 * clock()
    try:
        trainer = make_trainer(group, replace(PLAN, steps=10**6, minutes=0.5 / 60))
        return [(record.seconds, record.learning_rate, record.val is not None) for record in trainer]
    finally:
        _trainer.perf_counter = clock


def one_rank_cannot_begin(group):
    with make_trainer(group).ranks.together():
        if place(group)[0] == 1:
            raise OSError("no data")


FUNCTIONS = {f.__name__: f for f in (curve, curve_with_a_rank_without_tasks, clocks_that_differ, one_rank_cannot_begin)}
