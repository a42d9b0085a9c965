"""Tasks whose adapted parameters and meta-gradients are known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from imaml._objective.objective import Objective
from imaml._tasks import TaskBatch
from imaml.testing._draws import generator, normal, seeds
from imaml.testing._spectra import rotated, spectra

_SPLIT = 1
"""Parameter "first" holds this many entries, "second" the others: two, so that a mix-up of names shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticTasks:
    """Holds tasks whose adapted parameters and meta-gradients are known in closed form.

    Their losses are quadratics 1/2 phi' H phi - b' phi for the support and for the query set of every task, in float64.

    Formula: with S = H_support and b of the support set, v = H_query phi - b_query at the adapted phi, and lambda the
    regularization, the proximal solution is phi* = (S + lambda)^-1 (b + lambda theta), with d phi* / d theta = lambda
    (S + lambda)^-1.

    Meta-gradients are returned by parameter name, as `MetaGradient.value_and_grad` does: compare them with
    `torch.testing.assert_close`.
    """

    theta: Tensor
    """The meta-parameters, `(n,)`."""
    tasks: TaskBatch
    """Support and query sets are `(H, b)`, `(tasks, n, n)` and `(tasks, n)`; every eigenvalue is within [-1, 1]."""

    def objective(self) -> Objective:
        """A new objective on fresh leaves "first" and "second", which together are theta."""
        return Objective.from_function(_loss, {n: p.requires_grad_() for n, p in self._named(self.theta).items()})

    def solution(self, *, regularization: float) -> Tensor:
        """phi* of every task, `(tasks, n)`."""
        rhs = self.tasks.support[1] + regularization * self.theta
        phi: Tensor = torch.linalg.solve(self._matrix(regularization), rhs.unsqueeze(-1)).squeeze(-1)
        return phi

    def jacobian(self, *, regularization: float) -> Tensor:
        """The derivative of phi* by theta for every task, `(tasks, n, n)`."""
        inverse: Tensor = torch.linalg.inv(self._matrix(regularization))
        return regularization * inverse

    def implicit(self, *, regularization: float) -> dict[str, Tensor]:
        """The implicit meta-gradient at phi*, the mean over tasks of lambda (S + lambda)^-1 v."""
        phi = self.solution(regularization=regularization)
        return self._pulled_back(self.jacobian(regularization=regularization), phi)

    def maml(self, *, lr: float, steps: int, regularization: float = 0.0) -> dict[str, Tensor]:
        """The exact meta-gradient through `steps` steps of gradient descent on support loss and proximal term."""
        # phi' = phi - lr (S phi - b + lambda (phi - theta)), and its derivative by theta
        phi, jacobian = self._start()
        matrix, b = self._matrix(regularization), self.tasks.support[1]
        for _ in range(steps):
            phi = phi - lr * ((matrix @ phi.unsqueeze(-1)).squeeze(-1) - b - regularization * self.theta)
            jacobian = jacobian - lr * (matrix @ jacobian - regularization * self._start()[1])
        return self._pulled_back(jacobian, phi)

    def fomaml(self, *, lr: float, steps: int, regularization: float = 0.0) -> dict[str, Tensor]:
        """The first-order meta-gradient, the mean over tasks of v, after the same inner loop."""
        phi, identity = self._start()
        matrix, b = self._matrix(regularization), self.tasks.support[1]
        for _ in range(steps):
            phi = phi - lr * ((matrix @ phi.unsqueeze(-1)).squeeze(-1) - b - regularization * self.theta)
        return self._pulled_back(identity, phi)

    def _matrix(self, regularization: float) -> Tensor:
        matrix: Tensor = self.tasks.support[0] + regularization * self._start()[1]
        return matrix

    def _start(self) -> tuple[Tensor, Tensor]:
        n = len(self.theta)
        identity = torch.eye(n, dtype=torch.float64, device="cpu")
        return self.theta.expand(len(self.tasks), n), identity.expand(len(self.tasks), n, n)

    def _pulled_back(self, jacobian: Tensor, phi: Tensor) -> dict[str, Tensor]:
        hessian, b = self.tasks.query
        v = hessian @ phi.unsqueeze(-1) - b.unsqueeze(-1)
        return self._named((jacobian.mT @ v).squeeze(-1).mean(0))

    @staticmethod
    def _named(flat: Tensor) -> dict[str, Tensor]:
        return {"first": flat[:_SPLIT].clone(), "second": flat[_SPLIT:].clone()}


def _loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    phi = torch.cat([params["first"], params["second"]])
    hessian, b = batch
    return phi @ (hessian @ phi) / 2 - b @ phi


def quadratic_tasks(
    n: int | None = None, *, tasks: int | None = None, condition: float = 100.0, indefinite: bool = False
) -> st.SearchStrategy[QuadraticTasks]:
    """Draw small problems with closed forms, see `QuadraticTasks`.

    Args:
        n: Number of parameters, >= 2; None draws 2 to 5.
        tasks: Number of tasks; None draws 1 to 3.
        condition: Most that the condition number of a support Hessian is.
        indefinite: Support Hessians have eigenvalues of both signs. S + lambda is positive definite for lambda > 1.

    Returns:
        A hypothesis strategy.

    Raises:
        ValueError: `n` or `condition` out of range.
    """
    if n is not None and n < 2:
        raise ValueError(f"`n` must be >= 2, for two parameters. Got {n}.")
    sizes = st.integers(2, 5) if n is None else st.just(n)
    counts = st.integers(1, 3) if tasks is None else st.just(tasks)
    spectra(2, condition=condition)  # checks it
    return _quadratic_tasks(sizes, counts, condition, indefinite)


@st.composite
def _quadratic_tasks(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int],
    counts: st.SearchStrategy[int],
    condition: float,
    indefinite: bool,
) -> QuadraticTasks:
    n, count, source = draw(sizes), draw(counts), generator(draw(seeds))

    def quadratics(eigenvalues: st.SearchStrategy[list[float]]) -> tuple[Tensor, Tensor]:
        hessians = torch.stack([rotated(draw(eigenvalues), source) for _ in range(count)])
        return hessians, normal(source, count, n)

    support = quadratics(spectra(n, condition=condition, largest=1.0, indefinite=indefinite))
    query = quadratics(spectra(n, condition=10.0, largest=1.0))
    return QuadraticTasks(theta=normal(source, n), tasks=TaskBatch(support=support, query=query))
