"""Hessian-vector products of implicit gradients of Conv4 on Glyphs to a relative residual of 1e-6, by solver.

    python -m benchmarks.preconditioning

The systems are those of `ImplicitMAML` in float64, one 5-way task each, with the query gradient for b:
after 50 meta-steps of FOMAML on 1-shot tasks and 50 inner steps on another one. Counts are of all products with A,
with those that build a preconditioner and the one that checks the residual. Then the spectrum of A, by 120 Lanczos
steps with full reorthogonalisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from imaml import (
    CG,
    FOMAML,
    MINRES,
    GradientDescent,
    ImplicitMAML,
    Jacobi,
    LinearOperator,
    LinearSolver,
    Nystrom,
    Objective,
    Solution,
    Status,
)
from imaml.data import Glyphs
from imaml.models import Conv4

META_STEPS, STEPS, LANCZOS = 50, 50, 120
PLACES = (1, 4, 10, 20, 40, 80)
STOP = {"rtol": 1e-6, "max_steps": 400}
SOLVERS: dict[str, LinearSolver] = {
    "CG": CG(**STOP),
    "MINRES": MINRES(**STOP),
    "CG, Jacobi": CG(**STOP, preconditioner=Jacobi()),
    **{f"CG, Nystrom {rank}": CG(**STOP, preconditioner=Nystrom(rank=rank, shift=1.0)) for rank in (10, 20, 40, 80)},
}


@dataclass(frozen=True)
class Case:
    name: str
    shots: int
    curvature: Literal["hessian", "ggn"]
    adapt: list[str] | None = None
    regularization: float = 0.01


CASES = [
    Case("Hessian, 1-shot", 1, "hessian"),
    Case("Gauss-Newton, 1-shot", 1, "ggn"),
    Case("Gauss-Newton, 5-shot", 5, "ggn"),
    Case("Hessian of the head, 1-shot", 1, "hessian", ["head"]),
    Case("Hessian of the head, 15-shot", 15, "hessian", ["head"]),
    Case("Hessian of the head, 15-shot", 15, "hessian", ["head"], 1e-4),
]


@dataclass(frozen=True, kw_only=True)
class Study(LinearSolver):
    """Solves the system of an engine by every solver, and returns the last solution."""

    counts: dict[str, str] = field(default_factory=dict)
    spectrum: list[str] = field(default_factory=list)

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        for name, solver in SOLVERS.items():
            products: list[None] = []

            def mv(x: Tensor, products: list[None] = products) -> Tensor:
                products.append(None)
                return op.mv(x)

            solution = solver.solve(mv, b)
            status = Status(int(solution.status))
            self.counts[name] = str(len(products)) if status == Status.CONVERGED else status.name.replace("_", " ")
        values = ritz_values(op, b)
        self.spectrum.extend([f"{values[0]:.3g}", *(f"{values[-i]:.3g}" if i <= len(values) else "-" for i in PLACES)])
        return solution


def ritz_values(op: LinearOperator, b: Tensor) -> Tensor:
    """Eigenvalues of A in the Krylov space of a random vector, in ascending order."""
    start = torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
    vectors = [F.normalize(start, dim=-1)]
    products: list[Tensor] = []
    for _ in range(min(LANCZOS, b.shape[-1])):
        products.append(op.mv(vectors[-1]))
        basis = torch.stack(vectors, -1).squeeze(0)
        rest = products[-1].squeeze(0)
        for _ in range(3):  # where the Krylov space is exhausted, what rounding left becomes another direction
            rest = F.normalize(rest - basis @ (basis.T @ rest), dim=-1)
        vectors.append(rest.unsqueeze(0))
    images = torch.stack(products, -1).squeeze(0)
    core = basis.T @ images
    return torch.linalg.eigvalsh((core + core.T) / 2)


def trained(episodes: Glyphs) -> Conv4:
    model = Conv4(episodes.ways)
    optimizer, engine = torch.optim.Adam(model.parameters()), FOMAML(inner=GradientDescent(lr=0.4, steps=5))
    objective = Objective(model, F.cross_entropy)
    for index in range(META_STEPS):
        optimizer.zero_grad()
        engine(objective, episodes.batch("train", index, 8)).loss.backward()
        optimizer.step()
    return model.double()


def study(model: Conv4, case: Case) -> Study:
    tasks = Glyphs(shots=case.shots, queries=5).batch("train", 1000, 1).to(dtype=torch.float64)
    found = Study()
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.1, steps=STEPS),
        regularization=case.regularization,
        solver=found,
        curvature=case.curvature,
        on_failure="ignore",
        error_bound=False,
    )
    engine.value_and_grad(Objective(model, F.cross_entropy, adapt=case.adapt), tasks)
    return found


def main() -> None:
    torch.manual_seed(0)
    counts = Table("A = I + H / lambda", "lambda", *SOLVERS, title="Products to a relative residual of 1e-6")
    spectra = Table("A = I + H / lambda", "lambda", "least", *(f"no. {i}" for i in PLACES), title="Eigenvalues of A")
    model = trained(Glyphs(queries=2))
    for case in CASES:
        found = study(model, case)
        counts.add_row(case.name, f"{case.regularization}", *found.counts.values())
        spectra.add_row(case.name, f"{case.regularization}", *found.spectrum)
    console = Console(width=150)
    console.print(counts, spectra)


if __name__ == "__main__":
    main()
