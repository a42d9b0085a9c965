"""Autocast, models in half precision, and the solver's own dtype."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from tests.engine.cases import CLASSES, MODELS, classification, conv, mlp, transformer
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=3)
ENGINES = {
    "maml": MAML(inner=INNER),
    "maml, kept": MAML(inner=INNER, linearize=True),
    "fomaml": FOMAML(inner=INNER),
    "imaml": ImplicitMAML(inner=INNER, regularization=3.0, solver=CG(max_steps=3, rtol=0.0)),
    "ggn": ImplicitMAML(inner=INNER, regularization=3.0, solver=CG(max_steps=3, rtol=0.0), curvature="ggn"),
}


def flat(gradients):
    return torch.cat([g.flatten().double() for g in gradients.values()])


def error(got, expected):
    return ((flat(got) - flat(expected)).norm() / flat(expected).norm()).item()


@pytest.fixture(params=[mlp, conv, transformer], ids=lambda f: f.__name__)
def setting(request):
    torch.manual_seed(0)
    model = request.param().float()
    tasks = classification(MODELS[request.param]).to(dtype=torch.float32)
    return Objective(model, F.cross_entropy), tasks


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_forward_pass_and_nothing_else(setting, engine, dtype):
    objective, tasks = setting
    exact = engine.value_and_grad(objective.double(), tasks.to(dtype=torch.float64))[1]
    single = engine.value_and_grad(objective, tasks)[1]
    with torch.autocast("cpu", dtype=dtype):
        loss, half = engine.value_and_grad(objective, tasks)
        adapted = engine.adapt(objective, (tasks.support[0][0], tasks.support[1][0]))
    assert loss.dtype == torch.float32 and {g.dtype for g in half.values()} == {torch.float32}
    assert {p.dtype for p in adapted.values()} == {torch.float32}
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert 2 * error(single, exact) < error(half, exact) <= 40 * rounding


def test_an_outer_grad_scaler():
    model = mlp().float()
    objective, tasks = Objective(model, F.cross_entropy), classification((4,)).to(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.float16):
        expected = MAML(inner=INNER).value_and_grad(objective, tasks)[1]
        loss = MAML(inner=INNER)(objective, tasks).loss
    scaler.scale(loss).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.testing.assert_close(model[0].weight.grad, 1024 * expected["0.weight"])
    scaler.step(optimizer)
    scaler.update()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_inner_state_of_a_model_in_half_precision_is_float32(dtype):
    """200 steps, each far below the spacing of the parameter's own numbers."""
    w = torch.full((3,), 4.0, dtype=dtype, requires_grad=True)
    objective = Objective.from_function(lambda p, batch: p["w"].float().sum() * batch.mean(), {"w": w})
    tasks = TaskBatch(support=torch.ones(1, 2), query=torch.ones(1, 2))
    adapted = MAML(inner=GradientDescent(lr=1e-3, steps=200)).adapt(objective, torch.ones(2))
    assert adapted["w"].dtype == dtype
    torch.testing.assert_close(adapted["w"].float(), torch.full((3,), 3.8), atol=0.02, rtol=0)
    result = MAML(inner=GradientDescent(lr=1e-3, steps=200))(objective, tasks)
    result.loss.backward()
    assert w.grad.dtype == dtype and result.loss.dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_model_in_bfloat16(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    tasks = classification((4,))
    exact = engine.value_and_grad(Objective(model, F.cross_entropy).double(), tasks)[1]
    half = Objective(model.bfloat16(), lambda z, y: F.cross_entropy(z.float(), y))
    assert error(engine.value_and_grad(half, tasks.to(dtype=torch.bfloat16))[1], exact) <= 0.1


def quadratic(condition):
    """L = 1/2 w' A w with a spread spectrum; query b' w: the meta-gradient is a solve, of this condition or so."""
    size = 60
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    matrix = basis @ torch.logspace(0, torch.log10(torch.tensor(condition)).item(), size).double().diag() @ basis.T
    w = {"w": torch.randn(size, dtype=torch.float64)}
    b = torch.randn(size, dtype=torch.float64)

    def loss(p, batch):
        a, b = batch
        return p["w"] @ a @ p["w"] / 2 + b @ p["w"]

    zero = torch.zeros_like(b)
    tasks = TaskBatch(support=(matrix[None], zero[None]), query=(torch.zeros_like(matrix)[None], b[None]))
    exact = torch.linalg.solve(torch.eye(size).double() + matrix, b)
    params = {n: p.float().requires_grad_() for n, p in w.items()}
    return Objective.from_function(loss, params), tasks.to(dtype=torch.float32), exact


@dataclass(frozen=True, kw_only=True)
class Seen(CG):
    dtypes: list[torch.dtype] = field(default_factory=list)

    def _solve(self, op, b, x0, preconditioner):
        self.dtypes.extend((b.dtype, op.mv(b).dtype))
        return super()._solve(op, b, x0, preconditioner)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_the_solver_works_in_its_own_dtype(dtype):
    objective, tasks, exact = quadratic(10.0)
    solver = Seen(max_steps=60, rtol=1e-6)
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.15, steps=200), regularization=1.0, solver=solver, solver_dtype=dtype
    )
    loss, gradients = engine.value_and_grad(objective, tasks)
    assert set(solver.dtypes) == {dtype or torch.float32}
    assert loss.dtype == gradients["w"].dtype == torch.float32
    error = ((gradients["w"].double() - exact).norm() / exact.norm()).item()
    report = engine(objective, tasks).report
    assert error <= 1e-5 and report.solver_residual.dtype == report.error_bound.dtype == torch.float32
    assert error <= report.error_bound.item() <= 1e-3


def test_bad_solver_dtype():
    with pytest.raises(ValueError, match=r"torch.float32 or torch.float64. Got torch.float16"):
        ImplicitMAML(inner=INNER, solver_dtype=torch.float16)


def test_a_float64_solver_changes_nothing_in_float64():
    objective, tasks = Objective(mlp(), F.cross_entropy), classification((4,))
    plain, same = ImplicitMAML(inner=INNER), ImplicitMAML(inner=INNER, solver_dtype=torch.float64)
    assert relative_error(plain.value_and_grad(objective, tasks)[1], same.value_and_grad(objective, tasks)[1]) == 0
