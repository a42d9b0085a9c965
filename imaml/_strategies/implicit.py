"""Implicit MAML: the meta-gradient from the stationary point alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from imaml._curvature.curvature import Curvature
from imaml._curvature.product import Graph, HvpMode, check_mode
from imaml._engine.problem import Problem
from imaml._engine.report import Pullback, Report
from imaml._errors import SolverError, SolverWarning, warn
from imaml._numbers import check_integer, check_number
from imaml._strategies.damping import AdaptiveDamping
from imaml._strategies.error_bound import careful_eigenvalue, relative_bound, solution_error
from imaml._strategies.implicit_costs import ImplicitCosts
from imaml._strategies.meta_gradient import MetaGradient
from imaml._strategies.warm_start import WarmStart
from imaml.inner._hyper import Hyper, check_hyper
from imaml.planning._costs import Costs
from imaml_solvers import CG, LinearOperator, LinearSolver, Solution, Status


@dataclass(frozen=True, kw_only=True)
class ImplicitMAML(MetaGradient):
    r"""Computes the meta-gradient from the adapted parameters alone, whichever way the inner loop found them.

    Formula: $(I + H / \lambda)^{-1} v$, with $v$ the gradient of $L_{query}$ and $H$ the Hessian of $L_{support}$, both
    at the adapted parameters $\phi$. A matrix-free solver solves the system.

    It is exact when $\phi$ is the stationary point of $L_{support} + \lambda/2 \, |\phi - \theta|^2$ and the solve
    converged: `report.stationarity` and `report.solver_status` say how far both hold.

    With one lambda per parameter, $\Lambda = \mathrm{diag}(\lambda)$, the result is $\Lambda (H + \Lambda)^{-1} v$,
    computed from the symmetric system $I + \Lambda^{-1/2} H \Lambda^{-1/2}$.

    Other parameters that require grad and meta-parameters $\eta$ get $\partial_\eta L_{query} - (\partial_\eta \nabla
    L_{support})^\top (H + \Lambda)^{-1} v$. A learned lambda gets $-(\phi - \theta)^\top (H + \Lambda)^{-1} v$.

    Damping: `damping=delta` solves $(A + \delta I) u = v$, with $A = I + H / \lambda$ (symmetric as above for one
    lambda per parameter; $H$ without a proximal term). It makes an indefinite system definite, where delta exceeds its
    most negative eigenvalue, without a larger lambda, which would hold the inner loop back. The price is a bias,
    $u_\delta - u = -\delta (A + \delta I)^{-1} u$: the part of $u$ along an eigenvalue $a$ of $A$ is divided by
    $1 + \delta / a$. So flat directions ($a = 1$) shrink by $1 + \delta$, and what is left turns towards $v$, which it
    equals but for its length for a large delta. Adam does not see the length; the direction is what is biased. It is
    $1 / (1 + \delta)$ of the undamped result for $(1 + \delta) \lambda$ in the same $\phi$, and every other derivative
    above has $(H + (1 + \delta) \Lambda)^{-1} v$ likewise. `report.undamped_residual` is $|v - A u| / |v|$, which is 0
    without a bias. The published code of Rajeswaran et al. solves $(1 + c) I + H / (\lambda + d)$, with its option
    `cg_damping` as $c$, and $d = 10$. That is $\lambda / (\lambda + d)$ times $A + \delta I$ for
    $\delta = (1 + c) (\lambda + d) / \lambda - 1$, such as 11 for its $\lambda = 2$ and $c = 1$.

    With `damping="auto"` a task whose solver meets negative curvature is solved anew, with four times delta, at least
    0.1, until it does not; `report.damping` says where that ends. The next call begins with the largest of these, or
    with 0.9 of where this one began if no task had to raise it; the first one with 0. Levenberg and Marquardt adapt
    delta by how well a quadratic model predicts the decrease of a loss; a query gradient is no step on one, so that
    curvature decides here. Results then depend on the calls before, not on chunks. Copies of the engine begin anew.

    Bilevel problems: `regularization=None` is for those whose support loss is strongly convex by itself. The system is
    H, and phi does not depend on theta, whose meta-gradient is zero.

    Error bound: `report.error_bound` bounds the relative error $|u - u^*| / |u^*|$ of each task's $u$ against the $u^*$
    of the exact $\phi^*$ and the exact solve. With $R = b - A x$ the residual of the solution $x$ as a function of
    $\phi$, $u - u^*$ comes from $A^{*-1} R^*$. The bound is $5 \, (|R(\phi)| + |R(\phi')|) / \mu$, relative to what it
    leaves of $|u|$. Here $\phi'$ is one point as far away as $\phi^*$ may be, $|gradient| / (\lambda \mu)$, and $\mu$ a
    lower estimate of the smallest eigenvalue of $A$ from CG's own coefficients. $A$ is the undamped one: the bias of
    damping is within the bound, which is infinite where $A$ is seen to be indefinite. The 5 was measured, not proved:
    see docs/numerics.md.

    Cost per task: K + 1 gradients for the inner loop and the query, one for the stationarity (free with
    reverse-over-reverse linearised once), and the solver's Hessian-vector products. The error bound takes two gradients
    (one of them free likewise) and one product, and 10 more where the solver has no estimate of mu. Damping takes one
    product, for its residual.

    Memory: one product and a few vectors `(n,)`, whatever K.

    Not for few inner steps far from stationarity, where it differs from `MAML`, nor for small lambda on non-convex
    losses, where $I + H / \lambda$ is indefinite: see `damping` and `curvature`.

    Source: Rajeswaran et al. 2019, eq. 6.

    Args:
        inner: See `MetaGradient`, as for `chunk_size`.
        regularization: lambda > 0: one number, one per adapted parameter by name, or a function of the objective's
            meta-parameters that returns either. None: no proximal term.
        damping: delta >= 0, relative to the identity in A, or "auto", for solvers that see negative curvature: CG and
            Neumann by a BREAKDOWN, others by their smallest eigenvalue or by that of 10 Lanczos steps.
        solver: Any `LinearSolver`; it solves all tasks of a chunk at once.
        hvp: See `MAML`.
        curvature: "hessian", or "ggn": the generalised Gauss-Newton matrix J' (d2 L / dz2) J in place of H, with z the
            model's output and J = dz / dphi. Positive semi-definite where the loss is convex in z (cross entropy,
            squared error), so that CG works with any lambda; equal to H where z is linear in the adapted parameters.
            Elsewhere the meta-gradient is an approximation that leaves out the curvature of the model, small where the
            support set is fitted. Needs `Objective(model, loss)`. A product costs about three forward passes. `hvp`
            then serves only the derivative of parameters that do not adapt, which stays exact.
        linearize: Keep the graph of the gradient during a solve, so that a product costs about one gradient less; False
            rebuilds it in every product and holds nothing between them, as the other modes and microbatches always do.
        solver_dtype: The dtype of the solver's vectors and sums, such as torch.float64 for a model in float32; products
            are computed in the model's. None: that of the parameters, at least float32.
        warm_start: Start a solve from the task's solution in an earlier call, where its support set is the same, as in
            bilevel problems or with few tasks that recur: fewer products where little has changed since. Keeps a vector
            `(n,)` of every task that the engine has solved, of the last ones where they exceed 1 GiB; costs two
            products. The solve starts at zero all the same where the residual there is the smaller one. With a `start`
            that has a solution it starts from that one as it stands, for one product, and the engine keeps none.
        curvature_batches: How many of the next batches stand for the whole, where the support sets are `Minibatches`:
            the stationarity, H and the mixed product are those of their mean. None: all examples of the source.
        on_failure: What a solve that failed leads to: "raise" a `SolverError`, "warn" once per engine, or "ignore". The
            last good iterate is used, and the report has every task's status either way.
        error_bound: Fill `report.error_bound`, for one displaced evaluation, and with damping
            `report.undamped_residual`, for one product. No bound with "ggn", whose own error it could not see.
    """

    _manages_without_second_derivatives: ClassVar[bool] = True  # by finite differences
    _costs: ClassVar[type[Costs] | None] = ImplicitCosts
    _without_path: ClassVar[str] = (
        "neither a loss nor `regularization` uses it, and the stationary point does not depend on how the inner loop "
        "gets there; MAML differentiates step sizes"
    )

    regularization: Hyper | None = 2.0
    damping: float | Literal["auto"] = 0.0
    solver: LinearSolver = CG(max_steps=20, rtol=1e-4)
    hvp: HvpMode = "auto"
    curvature: Literal["hessian", "ggn"] = "hessian"
    linearize: bool = True
    solver_dtype: torch.dtype | None = None
    warm_start: bool = False
    curvature_batches: int | None = None
    on_failure: Literal["raise", "warn", "ignore"] = "warn"
    error_bound: bool = True
    _solutions: WarmStart = field(default_factory=WarmStart, init=False, repr=False, compare=False)
    _adaptive: AdaptiveDamping = field(default_factory=AdaptiveDamping, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_mode(self.hvp)
        if self.regularization is not None:
            check_hyper("regularization", self.regularization, must="> 0 for implicit differentiation")
        if self.damping != "auto" and check_number("`damping`, unless 'auto',", self.damping) < 0:
            raise ValueError(f"`damping` must be >= 0, or 'auto'. Got {self.damping}: leave it out for none.")
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"`solver` must be a LinearSolver such as CG(max_steps=5). Got {self.solver!r}.")
        if self.curvature not in ("hessian", "ggn"):
            raise ValueError(f"`curvature` must be 'hessian' or 'ggn'. Got {self.curvature!r}.")
        if self.warm_start and not self.solver._uses_x0:
            raise ValueError(
                f"warm_start=True needs a solver that can use a start, such as CG. Got {type(self.solver).__name__}."
            )
        if self.solver_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"`solver_dtype` must be torch.float32 or torch.float64. Got {self.solver_dtype}.")
        if self.curvature_batches is not None:
            check_integer("`curvature_batches`, unless None,", self.curvature_batches, least=1)
        if self.on_failure not in ("raise", "warn", "ignore"):
            raise ValueError(f"`on_failure` must be 'raise', 'warn' or 'ignore'. Got {self.on_failure!r}.")

    def pull_back(self, problem: Problem) -> Pullback:
        self._check(problem)
        phi = problem.adapt()
        query = problem.judge(phi)
        weights = problem.damping
        root = query.adapted.new_ones(()) if weights is None else weights.sqrt()
        weight = root / root.mean()  # 1 for a single lambda, where the system is I + H / lambda itself
        rhs = query.adapted.div_(weight)
        if problem.support.source is not None:
            problem.record.curvature_batches = self.curvature_batches
        at_the_end = problem.at_the_end(self.curvature_batches)
        curvature, gradient = self._curvature(at_the_end, phi)
        stationarity, slope = gradient.norm(dim=-1), gradient / root if self._has_bound else None
        del gradient
        shift = 0.0 if weights is None else 1.0
        op = _system(curvature, root, shift)
        solution, damping = self._solve_damped(problem, curvature, root, shift, rhs)
        residual = solution.residual_norm
        if damping is not None and self.error_bound and bool((damping > 0).any()):
            residual = (rhs - op.mv(solution.x)).norm(dim=-1)
        mu = careful_eigenvalue(solution, op, rhs, 0.0 if damping is None else damping) if self._has_bound else None
        shared, hyper = query.shared, problem.hyper
        if shared is not None:
            pulled = solution.x * weight / root.square()  # (H + Lambda)^-1 v
            mixed = curvature.product(pulled, mixed=True)[1]
            shared = shared if mixed is None else shared - mixed
            if "regularization" in hyper.learned:
                hyper.add({"regularization": (problem.theta - phi) * pulled}, 0)
        del curvature, op  # a graph may hang on it, and the error bound needs another

        def look(displacement: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
            there = displacement.div_(root).add_(phi)
            v = problem.query_gradient(there).adapted.div_(weight)
            curvature, gradient = self._curvature(at_the_end, there)
            return gradient.div_(root), lambda: v.sub_(_system(curvature, root, shift).mv(solution.x))

        bound = None
        if mu is not None and slope is not None:
            error = solution_error(mu, rhs, residual, slope, (root * phi).norm(dim=-1), look)
            bound = relative_bound(error * weight.max(), (solution.x * weight).norm(dim=-1), solution.status)
        norm = rhs.norm(dim=-1)
        size = norm.where(norm > 0, 1)
        outcome = problem.outcome(
            query,
            stationarity=stationarity,
            solver_status=solution.status,
            solver_steps=solution.num_steps,
            solver_residual=solution.residual_norm / size,
            damping=damping,
            undamped_residual=None if damping is None or not self.error_bound else residual / size,
            error_bound=bound,
        )
        theta = solution.x * weight if shift else torch.zeros_like(solution.x)
        return Pullback(theta, shared, outcome, solution)

    def _solve_damped(
        self, problem: Problem, curvature: Curvature, root: Tensor, shift: float, rhs: Tensor
    ) -> tuple[Solution, Tensor | None]:
        """The solution of (A + delta I) x = b, and delta of every task; None without damping."""
        if self.damping == "auto":
            op = _system(curvature, root, shift)
            return self._adaptive.solve(self.solver, partial(self._solve, problem), op, rhs)
        solution = self._solve(problem, _system(curvature, root, shift + self.damping), rhs)
        return solution, torch.full_like(solution.residual_norm, self.damping) if self.damping else None

    def _solve(self, problem: Problem, op: LinearOperator, rhs: Tensor) -> Solution:
        dtype = self.solver_dtype or rhs.dtype
        if not self.warm_start:
            return _cast(self.solver.solve(op, rhs.to(dtype)), rhs.dtype)
        start = _carried(problem)
        if start is not None:  # as it stands: the residual on a minibatch says little of it
            return _cast(self.solver.solve(op, rhs.to(dtype), x0=start.expand_as(rhs).to(dtype)), rhs.dtype)
        start = self._solutions.of(problem.support.batch, rhs)
        if start is not None:
            worse = (rhs - op.mv(start)).norm(dim=-1, keepdim=True) > rhs.norm(dim=-1, keepdim=True)
            start = start.masked_fill(worse, 0).to(dtype)
        return _cast(self.solver.solve(op, rhs.to(dtype), x0=start), rhs.dtype)

    def _keep(self, problem: Problem, pullback: Pullback) -> None:
        if self.warm_start and pullback.solution is not None and _carried(problem) is None:
            self._solutions.keep(problem.support.batch, pullback.solution)

    @property
    def _without_folder(self) -> dict[str, tuple[str, str]]:
        found = super()._without_folder
        if self.warm_start:
            found["warm_start"] = ("False", "the solutions of earlier calls are the engine's, and in no folder")
        if self.damping == "auto":
            found["damping"] = ("a number", "what it has adapted to in earlier calls is the engine's, and in no folder")
        return found

    @property
    def _may_rebuild(self) -> bool:
        """Whether a solve keeps a graph that it could do without."""
        keeps = self.hvp in ("auto", "reverse-over-reverse") and self.microbatch_size is None  # the others never do
        return keeps and self.linearize and self.curvature == "hessian"

    @property
    def _graph(self) -> Graph:
        """What a solve keeps of the graph of the gradient."""
        return Graph.KEPT if self.linearize or self.curvature == "ggn" else Graph.REBUILT

    @property
    def _has_bound(self) -> bool:
        """Whether the report has an error bound."""
        return self.error_bound and self.curvature == "hessian" and self.regularization is not None

    def _check(self, problem: Problem) -> None:
        objective = problem.snapshot.objective
        if self.curvature == "ggn" and objective.model is None:
            raise ValueError(
                "curvature='ggn' needs to know the model's output. Expected Objective(model, loss). Got an objective "
                "from a function: use curvature='hessian'."
            )
        if problem.damping is None and self.regularization is not None:
            raise ValueError(
                "`regularization` must be > 0 for implicit differentiation. Got 0 from its function: return a positive "
                "value, or pass regularization=None for no proximal term."
            )
        learns_nothing = len(objective.parameters()) == len(objective.adapted) and not objective.takes_initial
        if problem.damping is None and learns_nothing:
            raise ValueError(
                "Without a proximal term the stationary point does not depend on the initialisation, and its "
                "meta-gradient is zero. Expected `regularization` > 0, or other parameters or `meta` to learn. Got "
                f"regularization={self.regularization}."
            )
        if problem.damping is not None and bool((problem.damping <= 0).any()):
            raise ValueError(
                f"`regularization` must be > 0 for implicit differentiation. Got {problem.damping.min().item():g}: let "
                "its function return a positive value, such as exp of a meta-parameter."
            )

    def _curvature(self, problem: Problem, phi: Tensor) -> tuple[Curvature, Tensor]:
        """The support loss's curvature, and the gradient of the inner objective, both after the inner loop."""
        steps = problem.inner.steps
        curvature = problem.curvature(phi, steps, self.hvp, self._graph, gauss_newton=self.curvature == "ggn")
        return curvature, problem.gradient(phi, steps, curvature.take_gradient())

    def state_dict(self) -> dict[str, float]:
        """See `MetaGradient`: where `damping="auto"` begins; not the solutions of `warm_start`."""
        return {"damping": self._adaptive.delta} if self.damping == "auto" else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """See `MetaGradient`."""
        self._adaptive.delta = state.get("damping", 0.0)

    def _look_at(self, report: Report) -> None:
        if self.damping == "auto" and report.damping is not None:
            self._adaptive.learn(report.damping)
        if report.solver_status is None or self.on_failure == "ignore":
            return
        statuses = {i: Status(s) for i, s in enumerate(report.solver_status.tolist()) if i not in report.skipped}
        failed = [i for i, status in statuses.items() if status not in (Status.CONVERGED, Status.BUDGET_SPENT)]
        if not failed:
            return
        first = statuses[failed[0]]
        message = (
            f"{len(failed)} of {len(statuses)} linear solves failed, the first that of task {failed[0]}: {first.name}. "
            f"{first.message} "
            + (
                "Without a proximal term the system is H itself, which must be positive definite, or get `damping`."
                if self.regularization is None
                else "A larger `regularization`, or `damping`, raises the smallest eigenvalue of I + H / lambda."
            )
        )
        if self.on_failure == "raise":
            raise SolverError(message)
        if SolverWarning not in self._memory.said:
            self._memory.said.add(SolverWarning)
            warn(f"{message} This is said once; see report.solver_status.", SolverWarning)


def _carried(problem: Problem) -> Tensor | None:
    """The solution of the state that a call goes on from, which comes before those that the engine keeps."""
    return None if problem.start is None else problem.start.solution


def _system(curvature: Curvature, root: Tensor, shift: float) -> LinearOperator:
    """`shift` I + Lambda^-1/2 H Lambda^-1/2, for vectors of any dtype."""
    scaled = curvature.scaled(root).computed_in(root.dtype)
    return scaled.shifted(shift) if shift else scaled


def _cast(solution: Solution, dtype: torch.dtype) -> Solution:
    """The solution with its tensors of floating-point numbers in `dtype`."""
    mu = solution.smallest_eigenvalue
    return replace(
        solution,
        x=solution.x.to(dtype),
        residual_norm=solution.residual_norm.to(dtype),
        smallest_eigenvalue=None if mu is None else mu.to(dtype),
    )
