"""Sparse tensors: buffers of a model work, tasks say what to pass instead."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, CompileWarning, Dense, GradientDescent, ImplicitMAML, Objective, Task, TaskBatch, verify
from tests.engine.cases import oracle_setting
from tests.oracles import ORACLES, relative_error

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta state:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)
INNER = GradientDescent(lr=0.1, steps=2)
LAYOUTS = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr}


class Graph(nn.Module):
    """A layer of a graph network, its adjacency matrix a sparse buffer."""

    def __init__(self, to_sparse, nodes=5):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.register_buffer("adjacency", to_sparse(torch.rand(nodes, nodes).double().round() + torch.eye(nodes)))

    def forward(self, x):
        return self.second(torch.tanh(torch.sparse.mm(self.adjacency, self.first(x))))


def tasks(nodes=5):
    def made():
        return (torch.randn(3, nodes, 3).double(), torch.randn(3, nodes, 2).double())

    return TaskBatch(support=made(), query=made())


def problem(layout):
    torch.manual_seed(0)
    model = Graph(LAYOUTS[layout])
    return model, Objective(model, lambda output, target: (output - target).square().mean()), tasks()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_a_sparse_buffer_works_with_default_settings(strategy, chunk_size, layout):
    model, objective, batch = problem(layout)
    solver = {"solver": Dense()} if strategy is ImplicitMAML else {}
    engine = strategy(inner=INNER, chunk_size=chunk_size, **solver)
    _, found = engine.value_and_grad(objective, batch)
    made = oracle_setting(engine, model, objective, batch)

    def loss(values, one):
        return F.mse_loss(torch.func.functional_call(model, values, (one[0],)), one[1])

    _, expected = ORACLES[strategy](type(made)(**{**vars(made), "loss": loss}))
    assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_with_a_sparse_buffer_can_be_verified_and_planned(layout):
    _, objective, batch = problem(layout)
    assert verify.meta_gradient(MAML(inner=INNER), objective, batch).status == "passed"
    assert verify.hvp(objective, None, tuple(t[0] for t in batch.support)).status == "passed"
    assert MAML(inner=INNER).plan(objective, batch).settings
    MAML(inner=INNER, chunk_size="auto")(objective, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mode_that_torch_lacks_for_sparse_tensors_is_refused_with_advice(layout):
    _, objective, batch = problem(layout)
    with pytest.raises(RuntimeError, match="Use hvp='auto'"):
        MAML(inner=INNER, hvp="forward-over-reverse")(objective, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_data_is_refused_with_advice(layout):
    sparse, y = LAYOUTS[layout](torch.eye(5).double()), torch.randn(5, 2).double()
    with pytest.raises(TypeError, match=r"of `support` must be dense.*Got torch.sparse.*sparse_coo_tensor"):
        Task(support=(sparse, y), query=(y, y))
    with pytest.raises(TypeError, match="of `query` must be dense"):
        Task(support=(y, y), query=({"a": sparse}, y))
    with pytest.raises(TypeError, match="of `support` must be dense"):
        MAML(inner=INNER).adapt(problem("coo")[1], (sparse, y))


def test_the_advice_works():
    """Indices and values as two tensors of a task, of which the model makes its matrix."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, indices, values, x):
            return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (5, 5)), self.layer(x))

    def one():
        matrix = (torch.rand(5, 5).double().round() + torch.eye(5)).to_sparse()
        return (matrix.indices(), matrix.values(), torch.randn(5, 3).double()), torch.randn(5, 2).double()

    given = [Task(support=one(), query=one()) for _ in range(3)]
    objective = Objective(Inside(), F.mse_loss)
    assert verify.meta_gradient(MAML(inner=INNER), objective, given).status == "passed"


def test_a_sparse_meta_parameter_is_refused():
    sparse = torch.eye(3).double().to_sparse().requires_grad_()
    with pytest.raises(TypeError, match="'weights' must be a dense floating-point tensor.*torch.sparse_coo"):
        Objective(nn.Linear(3, 2), F.mse_loss, meta={"weights": sparse})


def test_a_sparse_buffer_cannot_be_compiled_and_is_not():
    _, objective, batch = problem("coo")
    with pytest.warns(CompileWarning, match="cannot be compiled"):
        found = MAML(inner=INNER, compile=True, chunk_size=1).value_and_grad(objective, batch)[1]
    assert relative_error(found, MAML(inner=INNER).value_and_grad(objective, batch)[1]) <= 1e-12
