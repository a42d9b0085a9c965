"""What a meta-gradient must equal, by plain loops over tasks and steps that share no code with the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml._curvature.casts import Casts
from imaml._losses.layout import Layout
from imaml._minibatches import Minibatches
from imaml._objective.buffers import HeldBuffers
from imaml._objective.faithful import Survey
from imaml._objective.meta import MetaParameters
from imaml._objective.objective import Objective
from imaml._tasks import Task
from imaml._torch import tree_leaves, tree_map
from imaml.inner import GradientDescent, InnerOptimizer
from imaml.inner._hyper import Hyperparameters, is_off

Values = dict[str, Tensor]


@contextmanager
def draws(seed: int) -> Iterator[None]:
    """Fixed random numbers within, and the global generators untouched after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Reference:
    """The bilevel problem that a meta-gradient belongs to, in float64."""

    objective: Objective
    tasks: Sequence[Task]
    inner: InnerOptimizer
    damping: Mapping[str, float]
    """lambda of every adapted parameter, where it is not learned."""
    learned_damping: Callable[[dict[str, Any]], Any] | None = None
    """lambda as a function of the meta-parameters."""
    outer_steps: Mapping[int, Any] | None = None
    """Weights of the query losses after some inner steps, as `MAML.outer_steps` has them; None: at the end alone."""
    curvature_batches: int | None = None
    """How many minibatches stand for their source after the inner loop; None: all."""
    delta: float = 0.0
    """What is added to the linear system, as a multiple of its identity, by what claims to be damped."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the adapted parameters."""
        return self.objective.adapted

    @property
    def steps(self) -> int:
        """Inner steps."""
        return self.inner.steps

    @property
    def lr(self) -> float:
        """Step size of plain gradient descent."""
        assert isinstance(self.inner.lr, Real)
        return float(self.inner.lr)

    @property
    def is_plain(self) -> bool:
        """Whether known mistakes can be looked for: the inner loop is plain gradient descent, nothing in it learned."""
        inner = self.inner
        if self.outer_steps is not None or self.objective.takes_initial:
            return False
        if not isinstance(inner, GradientDescent) or not isinstance(inner.lr, Real) or inner.stationarity is not None:
            return False
        if type(inner).update is not GradientDescent.update or type(inner).start is not GradientDescent.start:
            return False
        return is_off(inner.momentum) and is_off(inner.weight_decay) and self.learned_damping is None

    def values(self) -> Values:
        """The parameters that receive meta-gradients, detached."""
        return {n: p.detach() for n, p in self.objective.parameters().items()}

    def only(self, task: int) -> Reference:
        """The problem of one task alone."""
        return replace(self, tasks=[self.tasks[task]])

    def loss(
        self,
        values: Mapping[str, Tensor],
        batch: Any,
        *,
        step: int | None = None,
        outer: bool = False,
        survey: Survey | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The support loss, or the query loss; data and buffers are copies, and attention has second derivatives.

        Args:
            values: All parameters by name.
            batch: A support or a query set.
            step: The inner step whose batch is meant, of minibatches; None: the mean over their source.
            outer: Whether the loss is that of the query set.
            survey: What the model needs; None: looked at anew, and nothing is recomputed.
            initial: The parameters before the inner loop, for a query loss that takes them; None: `values`.

        Returns:
            The loss, 0-dim.
        """
        if isinstance(batch, Minibatches):
            batches = self._of_source(batch) if step is None else [batch.at(step)]
            sizes = torch.tensor([_examples(one) for one in batches], dtype=torch.float64)
            losses = [self.loss(values, one, outer=outer, survey=survey) for one in batches]
            return torch.stack([weight * loss for weight, loss in zip(sizes / sizes.sum(), losses, strict=True)]).sum()
        survey = survey or replace(self.objective.survey(), only=frozenset())  # nothing recomputed, as the engine may
        batch = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, batch)  # a loss may set requires_grad
        with sdpa_kernel(SDPBackend.MATH), HeldBuffers.of(self.objective.held()).copied():
            values = dict(values) | self.objective.constants()
            return self.objective.evaluate(values, batch, outer=outer, survey=survey, initial=initial)[0]

    def _of_source(self, source: Minibatches) -> list[Any]:
        """The batches that stand for a source as a whole."""
        if self.curvature_batches is not None:
            steps = range(self.steps, self.steps + self.curvature_batches)
            return [source.at(k % source.length if source.length else k) for k in steps]
        if source.length_of_all is None:
            raise ValueError(
                "The mean over a source of minibatches without an end is not known. Expected a sequence of batches or "
                "Minibatches.of(dataset, ...). Got a function of the step."
            )
        return [source.of_all(i) for i in range(source.length_of_all)]

    def value(self, loss: Callable[[Mapping[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """A loss without derivatives, evaluated as if there were: it may ask what requires grad, and differentiate."""
        with torch.enable_grad():
            return loss({n: t.detach().requires_grad_() for n, t in values.items()}).detach()

    def inner_loss(
        self, values: Mapping[str, Tensor], centre: Mapping[str, Tensor], batch: Any, step: int | None = None
    ) -> Tensor:
        """The support loss plus the proximal term about `centre`."""
        loss = self.loss(values, batch, step=step)
        for name, weight in self.damping_at(centre).items():
            if isinstance(weight, Tensor) or weight:
                loss = loss + (weight / 2 * (values[name] - centre[name]).square()).sum()
        return loss

    def damping_at(self, values: Mapping[str, Tensor]) -> Mapping[str, float | Tensor]:
        """Lambda of every adapted parameter at these values of the meta-parameters."""
        if self.learned_damping is None:
            return self.damping
        found = self.learned_damping(self.objective.meta.like_given(values))
        return found if isinstance(found, Mapping) else dict.fromkeys(self.adapted, found)

    def identity_at(self, values: Values) -> Mapping[str, float | Tensor]:
        """What the identity of the linear system (I + H / lambda) u = v is in units of H: lambda, or 1 without it."""
        if self.learned_damping is None and not any(self.damping.values()):
            return dict.fromkeys(self.adapted, 1.0)
        weights = self.damping_at(values)
        return {n: w.detach() if isinstance(w, Tensor) else w for n, w in weights.items()}

    def adapt(self, start: Values, batch: Any) -> Values:
        """All parameters after the inner loop, detached."""
        *_, last = self.along(start, batch)
        return last

    def along(self, start: Values, batch: Any) -> Iterator[Values]:
        """All parameters before the inner loop and after each of its steps, detached."""
        adapted = {n: start[n] for n in self.adapted}
        layout, given = Layout.of(adapted), self.inner.hyperparameters
        meta = MetaParameters(self.objective.meta.like_given(start))
        steps = {n: (h, self.steps) for n, h in given.items()}
        hyper = Hyperparameters.of(steps, meta, layout, flat(adapted), names=self.inner.meta)
        state = self.inner.start(flat(adapted).unsqueeze(0))
        values = start | unflat(state[0].squeeze(0), adapted)
        yield values
        for step in range(self.steps):
            leaves = {n: t.detach().requires_grad_() for n, t in values.items()}
            wanted = [leaves[n] for n in self.adapted]
            with torch.enable_grad():
                inner = self.inner_loss(leaves, start, batch, step)
            grads = torch.autograd.grad(inner, wanted, allow_unused=True, materialize_grads=True)
            gradient = layout.flatten(grads)
            if self.inner.stationarity is not None and gradient.norm() <= self.inner.stationarity:
                break
            at = hyper.at(step)
            state = self.inner.update(state, self.inner.clipped(gradient.unsqueeze(0), at), step, at)
            values = values | unflat(state[0].squeeze(0), adapted)
            yield values

    def after_adaptation(self, start: Values) -> Tensor:
        """Mean query loss after the inner loop: what exact MAML differentiates."""
        return torch.stack([self._outer_loss(start, task) for task in self.tasks]).mean()

    def _outer_loss(self, start: Values, task: Task) -> Tensor:
        """The query loss of a task after the inner loop, or the weighted sum of several on the way."""
        if self.outer_steps is None:
            return self.query_loss(self.adapt(start, task.support), task, start)
        meta, terms = self.objective.meta.like_given(start), list[Tensor]()
        for step, values in enumerate(self.along(start, task.support)):
            if (weight := self.outer_steps.get(step)) is not None:
                terms.append((weight(meta) if callable(weight) else weight) * self.query_loss(values, task, start))
        return torch.stack([term.reshape(()) for term in terms]).sum()

    def query_loss(self, values: Values, task: Task, initial: Values | None = None) -> Tensor:
        """The query loss of a task at these parameters, adapted from the initial ones if it takes these; detached."""
        return self.value(lambda leaves: self.loss(leaves, task.query, outer=True, initial=initial or leaves), values)

    def rounding(self) -> float:
        """The relative rounding error of the coarsest dtype that the losses of the first task compute in."""
        task, values = self.tasks[0], self.values()
        with draws(0), Casts() as casts:
            self.gradient(lambda v: self.loss(v, task.support, step=0) + self.loss(v, task.query, outer=True), values)
        return max((torch.finfo(dtype).eps / 2 for dtype in casts.dtypes), default=0.0)

    def gradient(self, loss: Callable[[Values], Tensor], values: Values) -> Values:
        """First derivatives by every parameter; zeros where the loss does not depend on one."""
        leaves = {n: t.detach().requires_grad_() for n, t in values.items()}
        with torch.enable_grad():
            value = loss(leaves)
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(leaves, grads, strict=True))


def _examples(batch: Any) -> int:
    """What a batch counts in a mean: its examples, or 1 where its tensors do not agree on how many these are."""
    sizes = {t.shape[:1] for t in tree_leaves(batch) if isinstance(t, Tensor)}
    return 1 if len(sizes) != 1 or () in sizes else sizes.pop().numel()


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """One vector of all values, in their order."""
    return torch.cat([t.detach().reshape(-1) for t in values.values()])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> Values:
    """The named tensors that a vector holds."""
    parts = vector.split([t.numel() for t in like.values()])
    return {n: part.view(t.shape) for (n, t), part in zip(like.items(), parts, strict=True)}


def moved(values: Values, direction: Values, step: float) -> Values:
    """Values + step * direction."""
    return {n: t + step * direction[n] for n, t in values.items()}
