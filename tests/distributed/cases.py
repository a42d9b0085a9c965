"""Problems whose tasks are shared out, for one process and for every rank alike."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Minibatches, Objective, Task
from tests.pages import python, read


def near(output, target, initial, adapted):
    return F.mse_loss(output, target) + sum((adapted[n] - initial[n]).square().sum() for n in initial)


INNER = GradientDescent(lr=0.1, steps=3)
ENGINES = {
    "MAML": MAML(inner=INNER, regularization=0.5),
    "MAML, outer steps": MAML(inner=INNER, outer_steps={0: 0.2, 2: -0.3, 3: 1.0}),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(inner=INNER, regularization=2.0, solver=CG(max_steps=50)),
}
TASKS = {"even": 4, "uneven": 5, "one rank without": 1}


def place(group):
    return (0, 1) if group is None else (group.rank(), group.size())


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_tasks(number):
    """The second half has other shapes than the first."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    sizes = [4 if i < number / 2 else 6 for i in range(number)]
    return [Task(support=(draw(n, 3), draw(n, 2)), query=(draw(5, 3), draw(5, 2))) for n in sizes]


def shard(tasks, group):
    rank, size = place(group)
    return tasks[rank::size]


def objectives():
    """All parameters adapt; the head alone does; step sizes and example weights are learned too."""
    model = make_model()
    yield "all", Objective(model, F.mse_loss)
    yield "head", Objective(model, F.mse_loss, adapt=["2"])
    yield "initial", Objective(model, F.mse_loss, outer_loss=near)
    yield "meta", Objective(model, F.mse_loss, meta={"log_lr": torch.tensor(-2.0, dtype=torch.float64)})


def gradients(engine_name, kind, tasks, group):
    objective, engine = dict(objectives())[kind], ENGINES[engine_name]
    if kind == "meta":
        outer_steps = {1: lambda meta: meta["log_lr"], 3: 1.0}
        engine = MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3), outer_steps=outer_steps)
    loss, found = engine.value_and_grad(objective, shard(make_tasks(tasks), group), group=group)
    return {"loss": loss, **found}


EQUAL = {
    f"{engine}, {kind}, {shards}": partial(gradients, engine, kind, tasks)
    for engine in ENGINES
    for kind in ("all", "head", "initial", "meta")
    for shards, tasks in TASKS.items()
    if kind != "meta" or engine == "MAML"
    if shards == "uneven" or kind != "initial" and engine != "MAML, outer steps"
}
"""The same result on every rank as in one process."""


def backward(group):
    """`.grad` after backward; the report is this rank's, the loss that of all."""
    model = make_model()
    objective = Objective(model, F.mse_loss, metric=F.l1_loss)
    result = ENGINES["MAML"](objective, shard(make_tasks(5), group), group=group)
    (2 * result.loss).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found, result.loss.detach(), result.report.query_loss, result.report.metric


def without_a_task(group):
    objective = Objective(make_model(), F.mse_loss, metric=F.l1_loss)
    report = ENGINES["MAML, outer steps"](objective, shard(make_tasks(1), group), group=group).report
    shapes = [list(entry.shape) for entry in (report.support_loss, report.outer_losses)]
    return [len(entry) for entry in (report.query_loss, report.metric)], shapes, str(report)


def windows(group):
    """Three windows of two steps, each rank with the states of its own tasks, on minibatches with example weights."""
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    data = [(draw(9, 3), draw(9, 2)) for _ in range(5)]
    tasks = [
        Task(support=Minibatches.of(each, batch_size=4, seed=i, indices=True), query=(draw(5, 3), draw(5, 2)))
        for i, each in enumerate(data)
    ]

    def loss(output, target, meta):
        return ((output - target[0]).square().mean(-1) * meta["w"][target[1]].sigmoid()).mean()

    objective = Objective(make_model(), loss, outer_loss=F.mse_loss, meta={"w": weights})
    engine, state, found = MAML(inner=Adam(lr=0.05, steps=2)), None, []
    for _ in range(3):
        weights.grad = None
        result = engine(objective, shard(tasks, group), start=state, return_state=True, group=group)
        result.loss.backward()
        state = result.state
        found += [result.loss.detach(), weights.grad]
    return found, state.parameters["0.weight"], state.step


def evaluated(group):
    with torch.no_grad():
        return ENGINES["MAML"](Objective(make_model(), F.mse_loss), shard(make_tasks(5), group), group=group).loss


def the_same_tasks_everywhere(group):
    return ENGINES["MAML"].value_and_grad(Objective(make_model(), F.mse_loss), make_tasks(3), group=group)[1]


def mixed_dtypes(group):
    """The head is float32, the body, which does not adapt, float64 or float32, and the loss float64."""
    results = []
    for body in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(Cast(body), nn.Linear(3, 4).to(body), Cast(torch.float32), nn.Tanh(), nn.Linear(4, 2))
        objective = Objective(model, lambda output, target: F.mse_loss(output.double(), target), adapt=["4"])
        loss, found = ENGINES["MAML"].value_and_grad(objective, shard(make_tasks(1), group), group=group)
        results.append((loss.item(), found))
    return results


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def a_rank_with_nan(group):
    tasks = make_tasks(4)
    tasks[3].query[1].fill_(torch.nan)
    return ENGINES["MAML"](Objective(make_model(), F.mse_loss), shard(tasks, group), group=group).loss


def skipped(bad, group):
    """Loss, gradients, and the positions this rank skipped; "meta" learns a step size, whose derivative is a sum."""
    tasks = make_tasks(4)
    for i in bad:
        tasks[i].query[1].fill_(torch.nan)
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3), on_nonfinite="skip")
    objective, own = dict(objectives())["meta"], shard(tasks, group)
    loss, found = engine.value_and_grad(objective, own, group=group)
    with torch.no_grad():
        return loss, found, engine(objective, own, group=group).report.skipped


def skipped_on_one_rank(group):
    return skipped([3], group)


def skipped_on_a_whole_rank(group):
    return skipped([1, 3], group)


def skipped_everywhere(group):
    return skipped(range(4), group)


def a_rank_with_a_wrong_argument(group):
    tasks = make_tasks(4) if place(group)[0] == 0 else ["task"]
    return ENGINES["MAML"](Objective(make_model(), F.mse_loss), tasks, group=group).loss


def no_task(group):
    return ENGINES["MAML"](Objective(make_model(), F.mse_loss), [], group=group).loss


def other_values(group):
    engine, tasks = FOMAML(inner=INNER), shard(make_tasks(4), group)
    return engine(Objective(make_model(seed=place(group)[0]), F.mse_loss), tasks, group=group).loss


def other_names(group):
    engine, tasks = FOMAML(inner=INNER), shard(make_tasks(4), group)
    adapt = ["2"] if place(group)[0] else None
    return engine(Objective(make_model(), F.mse_loss, adapt=adapt), tasks, group=group).loss


def collectives(group):
    """The sizes of what each of three calls of one engine reduces, and the number of all-gathers."""
    objective, engine, tasks = Objective(make_model(), F.mse_loss, adapt=["2"]), MAML(inner=INNER), make_tasks(4)
    reduced, gathered, all_reduce, all_gather = [], [], dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda buffer, **options: [reduced.append(len(buffer)), all_reduce(buffer, **options)]
    dist.all_gather = lambda parts, mine, **options: [gathered.append(len(mine)), all_gather(parts, mine, **options)]
    try:
        for _ in range(3):
            engine.value_and_grad(objective, shard(tasks, group), group=group)
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
    return reduced, gathered


def the_page(group):
    """The parameters after the loop of the page, within the group that is there already."""
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    namespace = {}
    try:
        loop, _ = python(read("docs/distributed.md"))
        exec(compile(loop, "docs/distributed.md", "exec"), namespace)
    finally:
        dist.init_process_group, dist.destroy_process_group = begin, end
    return [p.detach() for p in namespace["model"].parameters()]


OTHERS = {
    function.__name__: function
    for function in (
        backward,
        without_a_task,
        evaluated,
        windows,
        the_same_tasks_everywhere,
        mixed_dtypes,
        a_rank_with_nan,
        skipped_on_one_rank,
        skipped_on_a_whole_rank,
        skipped_everywhere,
        a_rank_with_a_wrong_argument,
        no_task,
        other_values,
        other_names,
        collectives,
        the_page,
    )
}
