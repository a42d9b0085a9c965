"""Errors of meta-gradients under autocast, and of a solve in each solver dtype.

    python -m benchmarks.precision

First: relative error against float64 of the meta-gradient of float32 models, K = 5, lr = 0.1, 4 tasks. Then: random
quadratics of 60 parameters in float32, whose meta-gradient is known in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hvp_accuracy import Transformer, flat
from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, Status, TaskBatch
from imaml.models import MLP, Conv4

INNER = GradientDescent(lr=0.1, steps=5)
SOLVE = {"inner": INNER, "regularization": 5.0, "solver": CG(max_steps=3, rtol=0.0), "on_failure": "ignore"}
ENGINES: dict[str, MetaGradient] = {
    "MAML": MAML(inner=INNER),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(**SOLVE),
    "ImplicitMAML, ggn": ImplicitMAML(**SOLVE, curvature="ggn"),
}


def error(got: Tensor, exact: Tensor) -> str:
    return f"{((got - exact).norm() / exact.norm()).item():.0e}"


def autocast() -> Iterator[str]:
    cases: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("MLP, tanh", MLP(4, 5, activation=nn.Tanh), (20, 4)),
        ("transformer, GELU", Transformer(), (6, 16, 4)),
        ("Conv4, BatchNorm and ReLU", Conv4(5), (5, 1, 28, 28)),
    ]
    yield "| model | strategy | float32 | autocast to float16 | autocast to bfloat16 |\n|---|---|---|---|---|"
    for name, model, shape in cases:
        labels = torch.randint(0, 5, (2, 4, shape[0]))
        tasks = TaskBatch(support=(torch.rand(4, *shape), labels[0]), query=(torch.rand(4, *shape), labels[1]))
        objective = Objective(model, F.cross_entropy)
        for label, engine in ENGINES.items():
            exact = flat(engine.value_and_grad(objective.double(), tasks.to(dtype=torch.float64))[1])
            errors = []
            for dtype in (None, torch.float16, torch.bfloat16):
                with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                    errors.append(error(flat(engine.value_and_grad(objective, tasks)[1]), exact))
            yield f"| {name} | {label} | {' | '.join(errors)} |"


def solver_dtypes() -> Iterator[str]:
    yield "| condition | solver_dtype | error | residual | status |\n|---|---|---|---|---|"
    size = 60
    for condition in (1e1, 1e3, 1e5):
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        matrix = basis @ torch.logspace(0, torch.tensor(condition).log10().item(), size).double().diag() @ basis.T
        b = torch.randn(size, dtype=torch.float64)
        exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) + matrix, b)
        objective = Objective.from_function(
            lambda p, batch: p["w"] @ batch[0] @ p["w"] / 2 + batch[1] @ p["w"],
            {"w": torch.randn(size).requires_grad_()},
        )
        nothing = torch.zeros_like(matrix)[None], torch.zeros_like(b)[None]
        tasks = TaskBatch(support=(matrix[None], nothing[1]), query=(nothing[0], b[None])).to(dtype=torch.float32)
        for dtype in (torch.float32, torch.float64):
            engine = ImplicitMAML(
                inner=GradientDescent(lr=1e-7, steps=1),
                regularization=1.0,
                solver=CG(max_steps=600, rtol=1e-7),
                solver_dtype=dtype,
                on_failure="ignore",
                error_bound=False,
            )
            found = error(engine.value_and_grad(objective, tasks)[1]["w"].double(), exact)
            report = engine(objective, tasks).report
            assert report.solver_residual is not None and report.solver_status is not None
            status = Status(int(report.solver_status)).name
            yield f"| {condition:.0e} | {dtype} | {found} | {report.solver_residual.item():.0e} | {status} |"


if __name__ == "__main__":
    torch.manual_seed(0)
    for table in (autocast(), solver_dtypes()):
        for line in table:
            print(line, flush=True)
