"""The loss of a chunk of tasks as a function of flat parameters, with its first derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from numbers import Number
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml._losses.context import Context, inside_transform
from imaml._losses.foreign import check_loss
from imaml._losses.gradient import Gradient
from imaml._objective.exact import denied
from imaml._tasks import Batch
from imaml._torch import (
    TreeSpec,
    is_functorch_wrapped_tensor,
    is_out_of_memory,
    is_write_to_rows,
    sequence_number,
    tree_flatten,
    tree_leaves,
    tree_map,
    without_fallback_warning,
)

SUPPORT, QUERY, UPDATE = 0, 1, 2
"""What draws random numbers: a loss, or the inner optimiser."""
_NAMES = ("support", "query")
T = TypeVar("T")


def outside_inference(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made in inference mode, which autograd cannot save."""
    if not any(t.is_inference() for t in tree_leaves(batch)):
        return batch
    return tree_map(lambda t: t.clone() if t.is_inference() else t, batch)


def _shielded(tensor: Tensor) -> Tensor:
    """The same data, of which no graph remains at the user's tensor where a parameter is written into it."""
    return tensor if tensor.requires_grad or is_functorch_wrapped_tensor(tensor) else tensor.detach()


def _check_leaves(leaves: Sequence[Any]) -> None:
    """Raise TypeError where tensors may be hidden in an output, which would have no derivatives."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, Number, str, NoneType)):
            raise TypeError(
                "curvature='ggn' goes through the tensors of the model's output. Expected tensors, numbers, strings "
                f"and None in tuples, lists and dicts. Got {type(leaf).__name__}: return its tensors in a tuple, or "
                "use curvature='hessian'."
            )


def _rows(values: Sequence[Tensor], tasks: int) -> list[list[Tensor]]:
    """Each task's own tensors, as views, without `v[i]`, whose derivative writes zeros for all other tasks."""
    if tasks == 1:
        return [[v.squeeze(0) for v in values]]
    return [list(rows) for rows in zip(*(v.unbind() for v in values), strict=True)]


@dataclass(frozen=True)
class ChunkLoss:
    """L(phi) of every task of a chunk, on its support or its query set.

    Derivatives are taken by plain autograd *outside* `vmap`, of the sum over tasks: the tasks are independent, so its
    gradient holds each task's own. Only the forward pass is vectorised, hence both derivatives of an HVP see the same
    plain operations; a `vmap` between two derivatives gives wrong second derivatives for affine normalisation layers.
    A chunk of one task runs without `vmap`, and so do all once a model turns out not to support it.
    """

    context: Context
    batch: Batch
    tasks: int
    start: int
    """Position of the first task, which keys the random draws together with the inner step."""
    kind: int
    part: tuple[int, ...] = ()
    """Which part of a chunk that was split, by its first tasks and examples; keys the random draws too."""
    writes: dict[tuple[int, ...], bool] = field(default_factory=dict, repr=False, compare=False)
    """Whether an evaluation writes to its batch, by part; of all parts of a chunk."""

    @property
    def parts(self) -> list[tuple[float, ChunkLoss]]:
        """What it is the weighted sum of: itself."""
        return [(1.0, self)]

    def check(self, phi: Tensor) -> None:
        """Nothing can be wrong with it."""

    def split(self, size: int) -> Iterator[tuple[int, ChunkLoss]]:
        """The same in groups of at most `size` tasks, each with the position of its first within this chunk."""
        if size >= self.tasks:
            yield 0, self
            return
        for first in range(0, self.tasks, size):
            part = tree_map(lambda t, first=first: t[first : first + size], self.batch)
            yield first, replace(self, batch=part, tasks=min(size, self.tasks - first), part=(*self.part, first))

    def losses(
        self, adapted: Sequence[Tensor], fixed: Sequence[Tensor], batch: Batch, step: int, *, metric: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Losses `(tasks,)` (and metric) at parameters per tensor: adapted `(tasks, *shape)`, fixed `(*shape)`."""

        def one(values: list[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            named, outer = self._named(values, fixed), self.kind == QUERY
            loss, figure = self.context.objective.evaluate(
                named, batch, metric=metric, outer=outer, survey=self.context.survey
            )
            return (loss,) if figure is None else (loss, figure.detach())

        outputs = self._evaluate(lambda: self._each(one, list(adapted), batch), step)
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def through_outputs(
        self, adapted: Sequence[Tensor], fixed: Sequence[Tensor], step: int
    ) -> tuple[list[Tensor], Tensor]:
        """The model's outputs, `(tasks, *shape)` per tensor, and the losses `(tasks,)` as a function of these."""
        outlines: list[tuple[TreeSpec, list[Any]]] = []

        def predict(values: list[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            leaves, spec = tree_flatten(
                self.context.objective.predict(self._named(values, fixed), batch, self.context.survey)
            )
            _check_leaves(leaves)
            outlines.append((spec, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        def judge(leaves: list[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            named = dict(zip(self.context.fixed_layout.names, fixed, strict=True))
            own = iter([leaf.clone() for leaf in leaves])  # a loss may write to the output
            spec, outline = outlines.pop(0)
            output = spec.unflatten([next(own) if leaf is Tensor else leaf for leaf in outline])
            return (self.context.objective.judge(output, named, batch),)

        def both() -> tuple[list[Tensor], Tensor]:
            outlines.clear()
            outputs = list(self._each(predict, list(adapted), self.batch))
            return outputs, self._each(judge, outputs, self.batch)[0]

        return self._evaluate(both, step)

    def statistics(self, phi: Tensor, step: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """The running statistics `(tasks, *shape)` after one more forward pass of every task at phi."""
        context, count = self.context, len(self.context.layout.names)

        def compute(adapted: list[Tensor], fixed: list[Tensor]) -> tuple[Tensor, ...]:
            def one(values: list[Tensor], batch: Batch) -> tuple[Tensor, ...]:
                updated = dict(zip(before, (v.clone() for v in values[count:]), strict=True))
                context.objective.record(self._named(values[:count], fixed) | updated, batch, context.survey)
                return tuple(updated.values())

            return self._evaluate(lambda: self._each(one, [*adapted, *before.values()], self.batch), step)

        found = self._without_derivatives(phi, compute)
        return {name: value.detach() for name, value in zip(before, found, strict=True)}

    def _without_derivatives(self, phi: Tensor, compute: Callable[[list[Tensor], list[Tensor]], T]) -> T:
        """What is computed of the parameters, adapted and fixed, with gradients disabled.

        Enabled where a model or a loss differentiates by itself.

        Args:
            phi: The adapted parameters.
            compute: What to compute.

        Returns:
            What `compute` returns.

        Raises:
            RuntimeError: That of the evaluation with gradients enabled, or there is not enough memory.
        """
        context, leaves = self.context, self.leaves(phi, fixed=True)  # parameters require grad here too
        if not context.needs_grad_mode:
            try:
                with torch.no_grad():
                    return compute(*leaves)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
        with torch.enable_grad():
            found = compute(*leaves)
        context.needs_grad_mode = True
        return found

    def _evaluate(self, compute: Callable[[], T], step: int) -> T:
        """What is computed in a vectorised pass where that is possible, and else one by one.

        Args:
            compute: What to compute.
            step: Of the inner loop; keys the random draws.

        Returns:
            What `compute` returns.

        Raises:
            RuntimeError: That of the tasks one by one, which tell whether it was vectorising that failed; or there is
                not enough memory.
        """
        context = self.context
        if self.tasks > 1 and context.is_vectorised:
            try:
                return self._attempt(compute, step)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
            context.is_vectorised = False
            try:
                return self._attempt(compute, step)
            except BaseException:
                context.is_vectorised = True
                raise
        return self._attempt(compute, step)

    def _attempt(self, compute: Callable[[], T], step: int) -> T:
        """What is computed; the batch, which is the user's, stays as it is.

        What a first evaluation writes to it is undone; that one and all later ones then have a copy each.

        Args:
            compute: See `_evaluate`.
            step: Likewise.

        Returns:
            What `compute` returns.

        Raises:
            ValueError: A later evaluation writes to it, where the first did not.
        """
        data, writes = tree_leaves(self.batch), self.writes.get(self.part)
        versions = [t._version for t in data]
        before = [t.clone() for t in data] if writes is None else []
        try:
            with self.draws(step), self.context.held.copied(afresh=inside_transform()):
                found = compute()
        finally:
            changed = [i for i, t in enumerate(data) if t._version != versions[i]]
            if before:
                for i in changed:
                    data[i].detach().copy_(before[i])
        self.writes[self.part] = bool(writes or changed)
        if not changed:
            return found
        if not before:
            raise ValueError(
                "The model or the loss writes to its batch in place, which it did not at first. Expected a forward "
                "pass that leaves the tasks alone. Got changed data: use e.g. x = x - 1 for x.sub_(1)."
            )
        del found, before
        return self._attempt(compute, step)

    def _each(
        self, one: Callable[[list[Tensor], Batch], tuple[Tensor, ...]], values: list[Tensor], batch: Batch
    ) -> tuple[Tensor, ...]:
        """One function of every task, stacked."""
        if self.tasks > 1 and self.context.is_vectorised:
            leaves, structure = tree_flatten(self._given(batch))  # vmap would fill the structure with other things too

            def of_leaves(values: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
                return one(values, structure.unflatten(leaves))

            # the fused attention kernels have no batching rule
            with sdpa_kernel(SDPBackend.MATH), without_fallback_warning():
                return vmap(of_leaves, randomness="different")(values, leaves)
        try:
            found = [
                one(own, self._given(tree_map(lambda t, i=i: t[i], batch)))
                for i, own in enumerate(_rows(values, self.tasks))
            ]
        except RuntimeError as error:
            if not is_write_to_rows(error):
                raise
            raise RuntimeError(
                "The model writes to its parameters in place while several tasks are evaluated one by one. Expected a "
                f"forward pass that leaves them alone. Got a write, to {self.tasks} tasks: use chunk_size=1."
            ) from error
        return tuple(torch.stack(tensors) for tensors in zip(*found, strict=True))

    def _given(self, batch: Batch) -> Batch:
        """What the model sees: a copy if it writes to it."""
        writes = self.writes.get(self.part)
        if writes is None:
            return tree_map(_shielded, batch)
        return tree_map(Tensor.clone, batch) if writes else batch

    def _named(self, adapted: Sequence[Tensor], fixed: Sequence[Tensor]) -> dict[str, Tensor]:
        context = self.context
        shared = dict(zip(context.fixed_layout.names, fixed, strict=True)) | context.fresh_constants()
        return dict(zip(context.layout.names, adapted, strict=True)) | shared

    def draws(self, step: int) -> AbstractContextManager[None]:
        """Within it, random numbers are those of the loss at this inner step."""
        return self.context.replay.at(self.kind, self.start, step, *self.part)

    def leaves(self, phi: Tensor, *, fixed: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the flat parameters as autograd leaves; the fixed ones require grad only if asked, or needed."""
        context = self.context
        adapted = [v.detach().requires_grad_() for v in context.layout.views(phi)]
        others = [t.detach().requires_grad_(fixed or context.needs_fixed) for t in context.fixed]
        return adapted, others

    @torch.enable_grad()
    def at_leaves(
        self, phi: Tensor, step: int, *, fixed: bool, metric: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
        """The leaves, as `leaves` makes them, with the losses `(tasks,)` that depend on them, and the metric."""
        context = self.context
        adapted, others = self.leaves(phi, fixed=fixed)
        hides = bool(others) and not others[0].requires_grad  # for a smaller graph; it matters to few models

        def evaluate() -> tuple[Tensor, Tensor | None]:
            return self.losses(adapted, others, self.batch, step, metric=metric)

        before, questions = sequence_number(), denied.count
        try:
            found = evaluate()
        except RuntimeError as error:
            if not hides or is_out_of_memory(error):
                raise
            found = None
        if found is None or hides and denied.count > questions:
            del found
            context.needs_fixed = True
            try:
                return self.at_leaves(phi, step, fixed=fixed, metric=metric)
            except RuntimeError:
                context.needs_fixed = False
                raise
        losses, figure = found
        key = (self.kind, self.start, *self.part, sequence_number() - before)
        if key not in context.own:
            self.check_own(losses, [*adapted, *others], lambda: evaluate()[0])
            context.own.add(key)
        return adapted, others, losses, figure

    def check_own(self, losses: Tensor, leaves: Sequence[Tensor], again: Callable[[], Tensor]) -> None:
        """Raise ValueError where losses depend on a tensor that requires grad and is not among the leaves."""
        names = self.context.objective.names
        if self.context.differentiates:
            check_loss(_NAMES[self.kind], [losses], leaves, lambda: [again()], names)

    def check_depends(self, losses: Tensor) -> None:
        """Raise unless a gradient can flow from the losses."""
        if not losses.requires_grad:
            raise ValueError(
                f"The {_NAMES[self.kind]} loss depends on no adapted parameter. Expected a loss computed from the "
                "model's output with gradients enabled: look for .detach(), .item() or torch.no_grad() in the model or "
                "the loss."
            )

    @torch.enable_grad()
    def gradient(
        self, phi: Tensor, step: int, *, fixed: bool = False, metric: bool = False, weights: Tensor | None = None
    ) -> Gradient:
        """First derivatives at phi `(tasks, n)`, of `weights` `(tasks,)` times the losses where given."""
        adapted, others, losses, figure = self.at_leaves(phi, step, fixed=fixed, metric=metric)
        wanted = adapted + others if fixed else adapted
        grads = self.differentiate(losses if weights is None else weights * losses, wanted)
        return Gradient(losses.detach(), *self.collect(grads, phi), figure)

    def differentiate(
        self, losses: Tensor, wanted: list[Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The gradient of the losses, summed over tasks; remembers which adapted parameters the support loss uses."""
        self.check_depends(losses)
        grads = torch.autograd.grad(losses.sum(), wanted, create_graph=create_graph, allow_unused=True)
        if self.kind == SUPPORT:
            names = self.context.layout.names
            self.context.used |= {n for n, g in zip(names, grads, strict=False) if g is not None}
        return grads

    def value(self, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Losses and metric at phi, without derivatives."""
        losses, figure = self._without_derivatives(
            phi, lambda adapted, fixed: self.losses(adapted, fixed, self.batch, step, metric=True)
        )
        return losses.detach(), figure

    def collect(self, grads: Sequence[Tensor | None], phi: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flatten gradients of the adapted, then any fixed parameters; None becomes zeros in its own place."""
        context = self.context
        adapted, fixed = grads[: len(context.layout.names)], grads[len(context.layout.names) :]
        context.used_fixed |= {n for n, g in zip(context.fixed_layout.names, fixed, strict=False) if g is not None}
        summed = context.fixed_layout.gather(fixed, phi[0]) if fixed else None
        return context.layout.gather(adapted, phi), summed
