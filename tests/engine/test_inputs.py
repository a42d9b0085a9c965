"""What a task may hold besides tensors in tuples, lists and dicts, and what is said of the rest."""

import itertools
from collections import UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import imaml
from imaml import FOMAML, MAML, CompileWarning, GradientDescent, ImplicitMAML, Objective, Task, TaskBatch
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=2)
ENGINES = [MAML(inner=INNER), FOMAML(inner=INNER), ImplicitMAML(inner=INNER, warm_start=True)]


class Masked(NamedTuple):
    x: Any
    mask: Any


class Pair(NamedTuple):
    input: Any
    target: Any


@dataclass
class Registered:
    x: Any
    mask: Any


torch.export.register_dataclass(Registered)


@dataclass
class NotRegistered:
    x: Any


class Graph:
    """As of a library that knows nothing of torch's nestings."""

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        self.x, self.mask = x, mask

    def to(self, *args: Any) -> "Graph":
        return Graph(self.x.to(*args), self.mask.to(*args))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, given: Any) -> Tensor:
        return self.linear(given.x * given.mask).tanh()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, given: Any) -> Tensor:
        return self.head(self.memory(given)[1][-1])


class MaybeMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, given: Any) -> Tensor:
        return self.linear(given.x if given.mask is None else given.x * given.mask).tanh()


class TwoArguments(Model):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x * mask).tanh()


def make_sets(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, mask and target of the support and query sets of three tasks."""
    torch.manual_seed(seed)
    return [(torch.randn(4, 3).double(), torch.rand(4, 3).double(), torch.randn(4, 2).double()) for _ in range(6)]


def make_tasks(kind: Any) -> list[Task]:
    sets = [(kind(x, mask), y) for x, mask, y in make_sets()]
    return [Task(support=a, query=b) for a, b in zip(sets[::2], sets[1::2], strict=True)]


def by_function(model: Model) -> tuple[Objective, list[Task]]:
    """The same problem without any type: a function of a tuple of tensors."""

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        x, mask, y = batch
        return F.mse_loss(((x * mask) @ params["linear.weight"].T + params["linear.bias"]).tanh(), y)

    sets = make_sets()
    tasks = [Task(support=a, query=b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
    return Objective.from_function(loss, dict(model.named_parameters())), tasks


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("kind", [Masked, Registered, Graph])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_an_input_of_another_type_is_one_argument(engine: Any, kind: Any, chunk_size: int | None) -> None:
    model = Model()
    engine = type(engine)(inner=INNER, chunk_size=chunk_size)
    expected = engine.value_and_grad(*by_function(model))[1]
    tasks = make_tasks(kind)
    for _ in range(2):
        found = engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1]
        assert relative_error(found, expected) < 1e-12
    adapted = engine.adapt(Objective(model, F.mse_loss), tasks[0].support)
    objective, plain = by_function(model)
    assert relative_error(adapted, engine.adapt(objective, plain[0].support)) < 1e-12


@pytest.mark.parametrize("kind", [Masked, Registered])
def test_a_type_that_is_a_nesting_goes_wherever_tensors_go(kind: Any) -> None:
    model, tasks, engine = Model(), make_tasks(kind), MAML(inner=INNER)
    objective = Objective(model, F.mse_loss)
    expected = engine.value_and_grad(*by_function(model))[1]
    for found in (
        engine.value_and_grad(objective, TaskBatch.stack(tasks))[1],
        MAML(inner=INNER, microbatch_size=2).value_and_grad(objective, tasks)[1],
        MAML(inner=INNER, hvp="forward-over-reverse").value_and_grad(objective, tasks)[1],
    ):
        assert relative_error(found, expected) < 1e-12
    assert imaml.verify.meta_gradient(engine, objective, tasks).status == "passed"
    assert imaml.verify.hvp(objective, None, tasks[0].support).status == "passed"
    moved = TaskBatch.stack(tasks).to(dtype=torch.float32)
    assert isinstance(moved[0].support[0], kind) and moved[0].support[0].mask.dtype == torch.float32


def test_a_batch_may_be_a_named_tuple_of_input_and_target() -> None:
    model = Model()
    tasks = [Task(support=Pair(*t.support), query=Pair(*t.query)) for t in make_tasks(Masked)]
    found = MAML(inner=INNER).value_and_grad(Objective(model, F.mse_loss), tasks)[1]
    assert relative_error(found, MAML(inner=INNER).value_and_grad(*by_function(model))[1]) < 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_agree_with_their_unrolled_loop(enforce_sorted: bool, chunk_size: int | None) -> None:
    """Some of equal shapes and unequal lengths."""
    torch.manual_seed(0)
    model, tasks = Recurrent(), []
    for lengths in ([4, 3, 2], [5, 2, 2], [4, 4, 1], [4, 3, 2]):
        sets = []
        for _ in range(2):
            rows = [torch.randn(n, 3).double() for n in (lengths if enforce_sorted else lengths[::-1])]
            sets.append((pack_sequence(rows, enforce_sorted=enforce_sorted), torch.randn(3, 2).double()))
        tasks.append(Task(support=sets[0], query=sets[1]))
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, params, (batch[0],)), batch[1])

    total = torch.zeros(()).double()
    for task in tasks:
        phi: dict[str, Tensor] = dict(theta)
        for _ in range(INNER.steps):
            grads = torch.autograd.grad(loss(phi, task.support), list(phi.values()), create_graph=True)
            phi = {n: p - INNER.lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        total = total + loss(phi, task.query) / len(tasks)
    expected = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    objective = Objective(model, F.mse_loss)
    found = MAML(inner=INNER, chunk_size=chunk_size).value_and_grad(objective, tasks)[1]
    assert relative_error(found, expected) < 1e-12
    assert imaml.verify.hvp(objective, None, tasks[0].support).status == "passed"


@pytest.mark.parametrize("kind", [Masked, Registered])
def test_a_field_of_a_type_may_be_none(kind: Any) -> None:
    """Of tasks in a list, some with it and some without, and of a batch."""
    model, sets = MaybeMasked(), make_sets()
    objective, engine = Objective(model, F.mse_loss), MAML(inner=INNER)
    pairs = list(itertools.pairwise(sets))
    plain = [
        Task(support=(kind(a[0], torch.ones(4, 3).double()), a[2]), query=(kind(b[0], None), b[2])) for a, b in pairs
    ]
    tasks = [Task(support=(kind(a[0], None), a[2]), query=(kind(b[0], None), b[2])) for a, b in pairs]
    expected, batch = engine.value_and_grad(objective, plain)[1], TaskBatch.stack(tasks)
    for given in (tasks, batch, TaskBatch(support=batch.support, query=batch.query)):
        assert relative_error(engine.value_and_grad(objective, given)[1], expected) < 1e-12
    assert batch[0].support[0].mask is None and batch.to(dtype=torch.float32)[1].query[0].mask is None
    x, mask, y = sets[0]
    both = [tasks[0], Task(support=(kind(x, mask), y), query=(kind(x, mask), y))]
    each = [engine.value_and_grad(objective, [task])[1] for task in both]
    mean = {n: (each[0][n] + each[1][n]) / 2 for n in each[0]}
    assert relative_error(engine.value_and_grad(objective, both)[1], mean) < 1e-12


def test_an_object_stays_out_of_what_only_tensors_can_do() -> None:
    tasks, objective = make_tasks(Graph), Objective(Model(), F.mse_loss)
    engine = MAML(inner=INNER)
    expected = engine.value_and_grad(objective, tasks)[1]
    with pytest.warns(CompileWarning, match="a task holds a Graph, which is no tensor"):
        found = MAML(inner=INNER, compile=True).value_and_grad(objective, tasks)[1]
    assert relative_error(found, expected) < 1e-12
    with pytest.raises(ValueError, match="`microbatch_size` slices every tensor.*Got a Graph.*microbatch_size=None"):
        MAML(inner=INNER, microbatch_size=2).value_and_grad(objective, tasks)
    with pytest.raises(ValueError, match="Only tasks of tensors can be stacked. Got 3 tasks with a Graph each"):
        TaskBatch.stack(tasks)
    x = torch.ones(1, 4, 2)
    with pytest.raises(TypeError, match=r"Got Graph: pass a list of Task"):
        TaskBatch(support=(tasks[0].support[0], x), query=(x, x))
    for verify in (
        lambda: imaml.verify.meta_gradient(engine, objective, tasks),
        lambda: imaml.verify.hvp(objective, None, tasks[0].support),
    ):
        with pytest.raises(TypeError, match="Only tensors can be copied.*Got Graph.*register_pytree_node"):
            verify()
    with pytest.raises(ValueError, match="`support` holds no tensor.*Got Graph: pass a target beside it"):
        Task(support=tasks[0].support[0], query=tasks[0].query)


class Bare:
    pass


Y = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones(2), "Got ndarray: convert it with torch.as_tensor"),
        (np.float32(1), "Got float32: convert it with torch.as_tensor"),
        (1.5, "Got float: convert it with torch.as_tensor"),
        (True, "Got bool: convert it with torch.as_tensor"),
        ("text", "Got str: encode it as a tensor, or leave it out"),
        (UserDict(x=Y), r"Got UserDict: make a dict of it, with dict\(...\)"),
        ({1.0}, "Got set: make a tuple or list of it"),
        (NotRegistered(Y), r"Got NotRegistered: register its type once, with torch.export.register_dataclass\(Not"),
        (
            Bare(),
            r"Got Bare: register its type once.*register_pytree_node\(Bare, lambda x: \(\[x.data\], None\), lambda",
        ),
        (nn.Linear(1, 1), "Got Linear: leave it out"),
        (len, "leave it out"),
    ],
    ids=lambda leaf: type(leaf).__name__ if not isinstance(leaf, str) else "",
)
def test_what_a_model_cannot_be_given_is_named_with_its_remedy(leaf: Any, message: str) -> None:
    message = f"^Every leaf of `support` must be a tensor.*{message}"
    for make in (
        lambda: Task(support=(leaf, Y), query=(Y, Y)),
        lambda: Task(support=Pair({"x": leaf}, Y), query=(Y, Y)),
        lambda: TaskBatch(support=(leaf, Y), query=(Y, Y)),
        lambda: MAML(inner=INNER).adapt(Objective(Model(), F.mse_loss), (leaf, Y)),
    ):
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.filterwarnings("ignore:.*[Nn]ested.*")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_with_advice(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(TypeError, match="one size in each dimension. Got a nested tensor.*to_padded_tensor"):
        Task(support=(nested, Y), query=(Y, Y))


@pytest.mark.filterwarnings("ignore")  # torch means to drop them
def test_quantised_tensors_are_refused_with_advice() -> None:
    with pytest.raises(TypeError, match=r"Got torch.qint8: use .dequantize\(\)"):
        Task(support=(torch.quantize_per_tensor(Y, 0.1, 0, torch.qint8), Y), query=(Y, Y))


def test_dictionaries_of_any_class_of_torchs_nestings_are_keyword_arguments() -> None:
    model, (x, mask, y) = TwoArguments(), make_sets()[0]
    engine, objective = MAML(inner=INNER), Objective(model, F.mse_loss)
    found = [
        engine.value_and_grad(objective, [Task(support=(given, y), query=(given, y))])[1]
        for given in ((x, mask), {"x": x, "mask": mask}, defaultdict(list, x=x, mask=mask))
    ]
    assert relative_error(found[1], found[0]) < 1e-12 and relative_error(found[2], found[0]) < 1e-12
