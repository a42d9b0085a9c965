"""Models sharded over two processes, by FSDP2 and by tensor parallelism, and the same whole."""

import dataclasses
import warnings
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import imaml
from imaml import (
    CG,
    FOMAML,
    MAML,
    MINRES,
    Adam,
    Dense,
    GradientDescent,
    ImplicitMAML,
    Neumann,
    Nystrom,
    Objective,
    TaskBatch,
    TorchOptimizer,
)
from tests.pages import python, read

INNER = GradientDescent(lr=0.1, steps=2, momentum=0.5)
IMPLICIT = {"inner": GradientDescent(lr=[0.1, 0.2], steps=2), "hvp": "finite-difference", "error_bound": False}
FIRST_ORDER = {
    "FOMAML": FOMAML(inner=INNER),
    "FOMAML, one norm": FOMAML(inner=imaml.NormalizedDescent(lr=0.05, steps=2, momentum=0.3, max_grad_norm=0.1)),
    "FOMAML, signs": FOMAML(inner=imaml.Lion(lr=0.05, steps=2, weight_decay=0.1)),
    "FOMAML, Adam": FOMAML(inner=Adam(lr=0.05, steps=2, weight_decay=0.1), regularization=0.5),
    "FOMAML, early stop": FOMAML(inner=GradientDescent(lr=0.1, steps=5, stationarity=1.5), microbatch_size=2),
}
SECOND_ORDER = {
    "CG": ImplicitMAML(solver=CG(max_steps=3), **IMPLICIT),
    "MINRES": ImplicitMAML(solver=MINRES(max_steps=3), **IMPLICIT),
    "Neumann": ImplicitMAML(solver=Neumann(max_steps=3, step_size=0.5), **IMPLICIT),
    "auto": ImplicitMAML(inner=INNER, solver=CG(max_steps=3)),
}
ENGINES = FIRST_ORDER | SECOND_ORDER


def make_model():
    """Rows that two processes cannot share evenly, and one row for both."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
    return nn.Sequential(*layers).double()


def fsdp():
    model, mesh = make_model(), init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel():
    """The last layer is left whole, on both."""
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(make_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


BUILDS = {"whole": make_model, "FSDP": fsdp, "TP": tensor_parallel}


def make_tasks(number=2):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TaskBatch(
        support=(draw(number, 4, 3), draw(number, 4, 1)),
        query=(draw(number, 5, 3), draw(number, 5, 1)),
    )


def whole(named):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items() if t is not None}


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def gradients(build, engine, adapt, group):
    objective = Objective(BUILDS[build](), F.mse_loss, adapt=adapt, metric=F.l1_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, found = ENGINES[engine].value_and_grad(objective, make_tasks())
    return {"loss": loss, **whole(found)}


CASES = [("FSDP", engine, None) for engine in ENGINES if engine != "CG"] + [("TP", "FOMAML", None), ("TP", "CG", None)]
CASES += [(build, "CG", ("2",)) for build in ("FSDP", "TP")]


def report(build, group):
    """Every entry is a plain tensor."""
    engine = ImplicitMAML(inner=INNER, solver=CG(max_steps=3), hvp="finite-difference")
    found = engine(Objective(BUILDS[build](), F.mse_loss, metric=F.l1_loss), make_tasks()).report
    names = ("query_loss", "support_loss", "metric", "stationarity", "solver_status", "error_bound")
    entries = {name: getattr(found, name) for name in names}
    assert not any(isinstance(entry, DTensor) for entry in entries.values())
    return entries, (found.hvp_mode, found.gradients, found.hvps, found.unused)


def minibatches(build, group):
    """Of a mean over three batches of two, three and four examples, where a linear system is solved."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batches = [(draw(2, n, 3), draw(2, n, 1)) for n in (2, 3, 4)]
    tasks = TaskBatch(support=imaml.Minibatches(batches), query=make_tasks().query)
    objective, implicit = Objective(BUILDS[build](), F.mse_loss), ImplicitMAML(solver=CG(max_steps=3), **IMPLICIT)
    return [whole(engine.value_and_grad(objective, tasks)[1]) for engine in (ENGINES["FOMAML"], implicit)]


def trained(build, group):
    """Parameters after two meta-steps, with forward passes of the user's between, which leave FSDP's gathered."""
    model, tasks = BUILDS[build](), make_tasks()
    optimizer, engine = torch.optim.SGD(model.parameters(), lr=0.5), FOMAML(inner=INNER)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            model(tasks.support[0][0])
            losses.append(engine(Objective(model, F.mse_loss), tasks).loss)
            model(tasks.support[0][0])
        result = engine(Objective(model, F.mse_loss), tasks)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.detach())
    return torch.stack(losses), whole(dict(model.named_parameters()))


def adapted(build, group):
    support = tuple(t[0] for t in make_tasks().support)
    return whole(ENGINES["FOMAML"].adapt(Objective(BUILDS[build](), F.mse_loss), support))


def untouched(build, group):
    """Whether parameters, `.grad` and a graph that saved them are as before, after a call and after a failed one."""
    model, tasks = BUILDS[build](), make_tasks()
    objective = Objective(model, F.mse_loss)
    F.mse_loss(model(tasks.support[0][0]), tasks.support[1][0]).backward()
    before = [(p.detach().clone(), p.grad, p.grad.clone()) for p in model.parameters()]
    regret = sum((local(p).requires_grad_() ** 2).sum() for p in model.parameters())
    FOMAML(inner=INNER)(objective, tasks)
    tasks.query[1][1] = torch.nan
    try:
        FOMAML(inner=INNER)(objective, tasks)
    except FloatingPointError:
        regret.backward()
    rows = list(zip(model.parameters(), before, strict=True))
    grads = all(p.grad is grad and torch.equal(local(grad), local(copy)) for p, (_, grad, copy) in rows)
    return all(torch.equal(local(p), local(copy)) for p, (copy, _, _) in rows), grads


def not_finite(build, group):
    tasks = make_tasks()
    tasks.query[1][1] = torch.nan
    result = FOMAML(inner=INNER, on_nonfinite="skip")(Objective(BUILDS[build](), F.mse_loss), tasks)
    return result.loss, result.report.skipped


class Block(nn.Module):
    """A layer, statistics and a random mask, recomputed by itself if it is told how; counts its calls."""

    def __init__(self, inputs, outputs, how):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.Dropout(0.3)
        self.how, self.calls = how, 0

    def inside(self, x, *, power):
        self.calls += 1
        return self.drop(self.norm(self.layer(x)).tanh() ** power)

    def forward(self, x):
        return self.how(self.inside, x, power=1)


def plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


def with_reentry(function, *args, **kwargs):
    return checkpoint(partial(function, **kwargs), *args, use_reentrant=True)


def within_another(function, *args, **kwargs):
    return checkpoint(partial(checkpoint, function, use_reentrant=False), *args, use_reentrant=False, **kwargs)


WAYS = {
    "none": (plainly, None),
    "recompute": (plainly, [Block]),
    "checkpoint": (partial(checkpoint, use_reentrant=False), None),
    "reentrant": (with_reentry, None),
    "nested": (within_another, ["0"]),
    "imaml": (imaml.recompute, None),
}


def recomputing(build, way, engine, buffers, group):
    """The meta-gradient, the report and how often a block was called, at the running statistics and after the call."""
    how, names = WAYS[way]
    torch.manual_seed(0)
    model = nn.Sequential(Block(3, 6, how), Block(6, 5, how), nn.Linear(5, 1)).double()
    mesh = None if build == "whole" else init_device_mesh("cpu", (2,))
    if build == "FSDP":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif build == "TP":
        plan = {"0.layer": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, mesh, plan | {"1.layer": RowwiseParallel(input_layouts=Replicate())})
    objective = Objective(model, F.mse_loss, buffers=buffers, recompute=names)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    result = dataclasses.replace(ENGINES[engine], chunk_size=1)(objective, make_tasks())  # the masks of one by one
    result.loss.backward()
    grads = {"loss": result.loss.detach(), **whole({n: p.grad for n, p in model.named_parameters()})}
    still = all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    return grads, result.report.recomputed, model[0].calls, still


RECOMPUTING = [("FSDP", way, "FOMAML", "batch") for way in WAYS] + [
    ("FSDP", "recompute", "FOMAML", "frozen"),
    ("FSDP", "recompute", "MINRES", "batch"),
    ("TP", "recompute", "FOMAML", "batch"),
    ("TP", "checkpoint", "FOMAML", "frozen"),
]


def refused(group):
    """Messages, by what is refused."""
    model, tasks = fsdp(), make_tasks()
    objective = Objective(model, F.mse_loss)
    log_lr = torch.zeros((), dtype=torch.float64, requires_grad=True)
    dealt = make_tasks(4)[group.rank() :: 2]
    params = dict(model.named_parameters())
    rates = {name: 0.1 for name in params}
    old = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    wrong = {
        "MAML": (MAML(inner=INNER), objective, tasks),
        "a function": (FOMAML(inner=INNER), Objective.from_function(lambda p, b: p["0.bias"].sum(), params), tasks),
        "exact": (ImplicitMAML(inner=INNER, hvp="reverse-over-reverse"), objective, tasks),
        "ggn": (ImplicitMAML(inner=INNER, curvature="ggn"), objective, tasks),
        "solver": (ImplicitMAML(inner=INNER, solver=Dense()), objective, tasks),
        "preconditioner": (ImplicitMAML(inner=INNER, solver=CG(preconditioner=Nystrom(rank=2))), objective, tasks),
        "inner": (FOMAML(inner=TorchOptimizer(torch.optim.SGD, lr=0.1, steps=2)), objective, tasks),
        "rates": (FOMAML(inner=GradientDescent(lr=rates, steps=2)), objective, tasks),
        "LAMB": (FOMAML(inner=imaml.LAMB(lr=0.1, steps=2)), objective, tasks),
        "Muon": (FOMAML(inner=imaml.Muon(lr=0.1, steps=2)), objective, tasks),
        "meta": (FOMAML(inner=INNER), Objective(model, F.mse_loss, meta={"log_lr": log_lr}), tasks),
        "initial": (
            FOMAML(inner=INNER),
            Objective(model, F.mse_loss, outer_loss=lambda output, target, initial: F.mse_loss(output, target)),
            tasks,
        ),
        "FSDP1": (FOMAML(inner=INNER), Objective(old, F.mse_loss), tasks),
        "dealt out": (FOMAML(inner=INNER), objective, dealt),
    }
    messages = {}
    state = imaml.InnerState(parameters={})
    for name, options in {"start": {"start": state}, "state": {"return_state": True}}.items():
        try:
            FOMAML(inner=INNER)(objective, tasks, **options)
        except ValueError as error:
            messages[name] = str(error)
    for name, (engine, its_objective, its_tasks) in wrong.items():
        try:
            messages[name] = str(engine(its_objective, its_tasks))
        except ValueError as error:
            messages[name] = str(error)
    try:
        FOMAML(inner=INNER)(objective, dealt, group=group)
    except ValueError as error:
        messages["group"] = str(error)
    return messages


def second_derivatives(group):
    """Why there are no exact products: what FSDP says to a gradient with a graph, and whether one comes by backward."""
    model, (x, y) = fsdp(), (t[0] for t in make_tasks().support)
    try:
        torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()), create_graph=True)
        message = ""
    except RuntimeError as error:
        message = str(error)
    model = fsdp()
    F.mse_loss(model(x), y).backward(create_graph=True)
    return message, [p.grad.requires_grad for p in model.parameters()]


def the_page(group):
    """The parameters after the second loop of the page, within the group that is there already."""
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    namespace = {}
    try:
        exec(compile(python(read("docs/distributed.md"))[1], "docs/distributed.md", "exec"), namespace)
    finally:
        dist.init_process_group, dist.destroy_process_group = begin, end
    return whole(dict(namespace["model"].named_parameters()))


SHARDED, BOTH = ("FSDP", "TP"), (report, trained, adapted, untouched, not_finite, minibatches)
FUNCTIONS = {f"{build}, {engine}, {adapt}": partial(gradients, build, engine, adapt) for build, engine, adapt in CASES}
FUNCTIONS |= {f"{function.__name__}, {build}": partial(function, build) for function in BOTH for build in SHARDED}
FUNCTIONS |= {f"recomputing, {case}": partial(recomputing, *case) for case in RECOMPUTING}
FUNCTIONS |= {"refused": refused, "second_derivatives": second_derivatives, "the_page": the_page}
