"""Exact MAML: the adjoint of the inner loop, written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from imaml._curvature.product import HvpMode, check_mode
from imaml._engine.chunking import Needs
from imaml._engine.problem import Problem
from imaml._engine.report import Outcome, Pullback, Report
from imaml._errors import DriftWarning, PrecisionWarning, warn
from imaml._numbers import check_integer
from imaml._strategies.adjoint import Adjoint
from imaml._strategies.drift import Drift
from imaml._strategies.growth import Growth, lost
from imaml._strategies.maml_costs import MAMLCosts
from imaml._strategies.meta_gradient import MetaGradient
from imaml._strategies.outer_steps import OuterLoss, check_outer_steps, name_of
from imaml._strategies.storage import Storage
from imaml._strategies.tape import Tape
from imaml.inner import InnerOptimizer
from imaml.inner._hyper import Hyper
from imaml.planning._costs import Costs


@dataclass(frozen=True, kw_only=True)
class MAML(MetaGradient):
    r"""Computes the exact second-order meta-gradient, through every step of the inner loop.

    Formula: $(\partial \phi_K / \partial \theta)^\top v$, with $v = \nabla L_{query}(\phi_K)$. It is exact for learned
    hyper-parameters and whatever else the losses use too.

    A reverse sweep over the inner steps computes it, never a K-step graph. Let $a$ be the cotangent of $s_{k+1} =
    U(s_k, g_k)$, with $g_k = \nabla L_{support}(\phi_k) + \Lambda (\phi_k - \theta)$ and $\phi_k$ in the optimiser's
    state $s_k$. Pull $a$ through $U$ to get its cotangents $(a, w)$ for $(s_k, g_k)$; then $a_\phi \leftarrow a_\phi +
    H_k w + \Lambda w$, one Hessian-vector product a step.

    Cost per task: K + 1 gradients and K Hessian-vector products. Where U is not linear, a step size is learned or
    gradients are clipped, the sweep evaluates K gradients again.

    Memory: one product plus the K states, `(n,)` a vector of each. With `checkpoints=m` it is at most m states, and the
    steps between them are recomputed. With `linearize=m` the last m steps have their graphs instead, for a forward and
    a backward pass less in each.

    Not for inner solvers whose steps cannot be differentiated, such as those of `torch.optim` and Newton-CG:
    `ImplicitMAML` needs their result alone.

    Source: Finn et al. 2017. Checkpoints follow the binomial schedule that minimises recomputation (Griewank & Walther
    2000, Algorithm 799); the bias of `truncate` is that of Shaban et al. 2019.

    Args:
        inner: An `InnerOptimizer`; for the rest see `MetaGradient`, as for `regularization` and `chunk_size`.
        truncate: Differentiate the last m steps only, as if the state before them were theta plus a constant: m
            products, and the states of m steps. Biased: what the earlier steps would have changed is ignored, for step
            sizes as for theta; 0 is `FOMAML`. None: all steps.
        checkpoints: How many inner states are kept at most besides theta, >= 0; None: all of them.
        storage: Where the states wait for the sweep, which reads them back bit for bit. "device": where they are.
            "cpu": in pinned memory, for parameters on a CUDA device, with copies that run beside the computation; the
            same as "device" elsewhere. "disk": in a file of the temporary folder (TMPDIR) that no name leads to, so
            that nothing is left behind, or in the `folder` of a call that has one; an OSError says how much room is
            missing. The device then holds the state at hand, whatever K.
        linearize: How many of the last steps keep their graph, so that the product there costs about one gradient less;
            True for all, False for none. The other steps are evaluated anew from their states, of which `checkpoints`
            and `storage` speak: True leaves them none. 1 is one step, although `1 == True` in Python. A graph is of the
            whole support set, so that `microbatch_size` excludes it. None, with `checkpoints` and `storage` left open:
            as many as fit into 192 MiB, and one where a product would build as much; with `chunk_size="auto"` as many
            as fit into the memory that is free; none in chunks of a given size, nor where blocks are recomputed. The
            modes other than reverse-over-reverse always evaluate anew.
        outer_steps: Weights of the query losses after so many inner steps, such as {2: 0.2, 5: 0.8}; 0 is before any,
            and K after all. What is differentiated is their weighted sum, by one sweep: a gradient for each of these,
            and not an engine. A weight is a number, or a function of the objective's meta-parameters that is learned
            with them. The metric is that at the end. None: {K: 1}.
        check_states: Compare the states that the sweep takes again with those on the way to the end, by sketches of 64
            numbers a vector, for a pass over each state. `report.drift` says how far off they are, and a `DriftWarning`
            where that is more than rounding.
        hvp: How Hessian-vector products are computed. "auto" uses "reverse-over-reverse"; "forward-over-reverse", which
            is exact too, where blocks are recomputed, no graph is kept, and both agree; or "finite-difference" where
            the model has an operation without second derivatives. The report says which. Finite differences are
            inexact, and useless in float32 for a convolutional network with ReLU: docs/numerics.md has figures.
    """

    _costs: ClassVar[type[Costs] | None] = MAMLCosts

    truncate: int | None = None
    checkpoints: int | None = None
    storage: Storage = "device"
    linearize: bool | int | None = None
    outer_steps: Mapping[int, Hyper] | None = None
    check_states: bool = False
    hvp: HvpMode = "auto"

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_mode(self.hvp)
        if not isinstance(self.inner, InnerOptimizer):
            raise TypeError(
                "MAML differentiates the steps of its inner loop. Expected GradientDescent, Adam, AdamW, RMSprop or "
                f"another InnerOptimizer. Got {self.inner!r}: use ImplicitMAML, which needs the result alone."
            )
        if type(self.inner).run is not InnerOptimizer.run:
            raise TypeError(
                "MAML differentiates `update`, step by step. Expected an inner optimiser that leaves `run` as it is. "
                f"Got {type(self.inner).__name__}, whose own `run` would be ignored: write it as `update` and `start`, "
                "or use ImplicitMAML, which needs the result alone."
            )
        if self.inner.stationarity is not None:
            raise ValueError(
                "MAML differentiates a known number of inner steps. Expected an inner loop with stationarity=None. Got "
                f"{self.inner.stationarity}: use ImplicitMAML to stop early."
            )
        if self.truncate is not None:
            check_integer("`truncate`, unless None,", self.truncate, least=0)
        if self.storage not in get_args(Storage):
            raise ValueError(f"`storage` must be one of {', '.join(get_args(Storage))}. Got {self.storage!r}.")
        if self.checkpoints is not None:
            check_integer("`checkpoints`, unless None,", self.checkpoints, least=0)
        if not isinstance(self.linearize, bool | None):
            check_integer("`linearize`, unless None, True or False,", self.linearize, least=0)
        if self.outer_steps is not None:
            found = check_outer_steps(self.outer_steps, self.inner.steps, self._tape(graphs=0).first)
            object.__setattr__(self, "outer_steps", found)
        for name, (only, reason) in self._without_graphs.items() if self.linearize else ():
            raise ValueError(
                f"linearize={self.linearize!r} keeps the graphs of inner steps, {reason}. Expected {name}={only!r}. "
                f"Got {getattr(self, name)!r}: use one of the two."
            )

    @property
    def _without_graphs(self) -> dict[str, tuple[object, str]]:
        """Options that exclude kept graphs as they are set: a number of them, or else those of all steps."""
        rules = _WITH_ALL_GRAPHS if isinstance(self.linearize, bool | None) else _WITH_GRAPHS
        return {name: rule for name, rule in rules.items() if getattr(self, name) != rule[0]}

    def _tape(self, *, graphs: int) -> Tape:
        """What the sweep keeps; `graphs` says how many, where that is left open."""
        steps = self.inner.steps if self.truncate is None else min(self.truncate, self.inner.steps)
        match self.linearize:
            case None:
                keeps = self.hvp in ("auto", "reverse-over-reverse")  # the others evaluate anew in any case
                graphs = graphs if keeps and not self._without_graphs else 0
            case True:  # by identity, which 1 does not match
                graphs = steps
            case number:
                graphs = int(number)
        return Tape(
            first=self.inner.steps - steps,
            steps=steps,
            graphs=min(graphs, steps),
            checkpoints=self.checkpoints,
            storage=self.storage,
        )

    @property
    def _without_folder(self) -> dict[str, tuple[str, str]]:
        found = super()._without_folder
        if self.linearize:
            found["linearize"] = ("None or False", "no file holds a graph")
        return found

    @property
    def _needs(self) -> Needs:
        assert isinstance(self.inner, InnerOptimizer)
        tape, most = self._tape(graphs=0), self._tape(graphs=self.inner.steps)
        stored = tape.most_states if self.storage == "device" else 0
        states = min(stored + tape.graphs, max(tape.steps - 1, 0)) * (1 + self.inner.buffers)
        return Needs(states, least=tape.graphs, most=most.graphs)

    @property
    def _hyperparameters(self) -> dict[str, Hyper]:
        weights = {} if self.outer_steps is None else self.outer_steps
        return super()._hyperparameters | {name_of(step): weight for step, weight in weights.items()}

    @property
    def _outer_losses(self) -> int | None:
        return None if self.outer_steps is None else len(self.outer_steps)

    def _outer_loss(self, problem: Problem) -> OuterLoss:
        return OuterLoss(problem, (problem.inner.steps,) if self.outer_steps is None else tuple(self.outer_steps))

    def evaluate(self, problem: Problem) -> Outcome:
        outer = problem.course.part("outer", self._outer_loss(problem))
        problem.watch = lambda phi, step: outer.value(step, phi)
        phi = problem.adapt()
        problem.finish()
        outer.value(problem.inner.steps, phi)
        outer.check()
        return outer.outcome(lists=self.outer_steps is not None)

    def pull_back(self, problem: Problem) -> Pullback:
        tape = self._tape(graphs=problem.chunking.graphs)
        if tape.by_states:
            problem.settle(self.hvp)
        course, adjoint = problem.course, problem.course.part("adjoint", Adjoint(problem))
        outer = course.part("outer", self._outer_loss(problem))
        drift = course.part("drift", Drift()) if self.check_states else None
        growth = course.part("growth", Growth())
        with tape.recorded(problem, self.hvp, drift) as (phi, points):
            if phi is not None:  # else the sweep had begun
                adjoint.begin(outer.at_the_end(phi))
                growth.begin(adjoint.state[0])
            del phi  # it would live through the sweep
            # The adjoint written out: an unrolled graph would hold all steps, and torch.utils.checkpoint, which
            # recomputes under a nested autograd.grad, can raise the peak.
            for point in points:
                step, phi = point.step, point.state[0]
                adjoint.pull_through(point)
                del point  # like phi below: they would stand beside those of the step before
                growth.see(adjoint.norm)
                if outer.add(step, phi, adjoint.state[0], adjoint.shared):
                    growth.begin(adjoint.state[0])
                del phi
                if course.progress is not None:
                    course.progress(problem.first + step, "backward")
        theta = adjoint.theta(from_start=tape.first == 0)
        outcome = outer.outcome(lists=self.outer_steps is not None)
        outcome = replace(
            outcome, growth=growth.figure(), drift=None if drift is None else drift.most_of(outcome.query_loss)
        )
        return Pullback(theta, adjoint.shared, outcome)

    def _look_at(self, report: Report) -> None:
        if report.growth is not None:
            self._say(PrecisionWarning, lost(report.growth), _grown, report.growth)
        if report.drift is not None:
            limit = torch.finfo(torch.promote_types(report.query_loss.dtype, torch.float32)).eps ** 0.5
            self._say(DriftWarning, report.drift > limit, _drifted, report.drift)

    def _say(
        self, kind: type[Warning], tasks: Tensor, what: Callable[[int, int, Tensor], str], figures: Tensor
    ) -> None:
        """Warn of the marked tasks, once: of the worst of them. NaN, of tasks that were skipped, is not marked."""
        if kind in self._memory.said or not bool(tasks.any()):
            return
        self._memory.said.add(kind)
        warn(what(int(figures.nan_to_num(0).argmax()), int(tasks.sum()), figures), kind)


def _grown(task: int, count: int, growth: Tensor) -> str:
    return (
        f"Rounding in {growth.dtype} leaves little or nothing of the meta-gradient of {count} of {len(growth)} tasks, "
        f"least of that of task {task}: on the way back through the inner loop the cotangent grew "
        f"{growth[task].item():.1g} times. Use a smaller inner step size or fewer inner steps; "
        "imaml.verify.smoothness says what helps. This is said once; see report.growth."
    )


def _drifted(task: int, count: int, drift: Tensor) -> str:
    return (
        f"The sweep took inner steps again and came to other states for {count} of {len(drift)} tasks: by "
        f"{drift[task].item():.2g} of their norm for task {task}. The meta-gradient is that of no one training. Look "
        "for a loss, model or source of batches that is no function of its arguments, or for kernels that are not "
        "deterministic: torch.use_deterministic_algorithms(True). Keep all states (checkpoints=None) to take no step "
        "again. This is said once; see report.drift."
    )


_WITH_GRAPHS: dict[str, tuple[object, str]] = {"microbatch_size": (None, "each of the whole support set")}
"""What goes with kept graphs, and why."""
_WITH_ALL_GRAPHS = _WITH_GRAPHS | {
    "storage": ("device", "all of them, where a number leaves states to put elsewhere"),
    "checkpoints": (None, "all of them, where a number leaves steps to take again"),
}
"""What goes with those of all steps."""
