"""The losses of a chunk of tasks on a slice of their examples, as a function of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Number
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor

from imaml._losses.attempts import Attempts, Writes
from imaml._losses.record import Record
from imaml._losses.replay import Role
from imaml._losses.snapshot import Snapshot
from imaml._objective.attention import MathAttention
from imaml._objective.exact import denied
from imaml._objective.foreign import check_reached
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
    vectorised,
)

T = TypeVar("T")
One = Callable[[Sequence[Tensor], Batch], tuple[Tensor, ...]]
"""A function of one task's own tensors and of its batch."""


@dataclass(frozen=True, eq=False)
class Slice:
    """L(phi) of every task of a chunk, on some of the examples of its support or its query set.

    Derivatives are taken by plain autograd *outside* `vmap`, of the sum over tasks: the tasks are independent, so its
    gradient holds each task's own. Only the forward pass is vectorised, hence both derivatives of an HVP see the same
    plain operations; a `vmap` between two derivatives gives wrong second derivatives for affine normalisation layers
    (docs/numerics.md). The gradient for shared parameters then takes no `(tasks, m)` memory either.

    A chunk of one task runs without `vmap`, and so do all once a model turns out not to support it.
    """

    snapshot: Snapshot
    record: Record
    batch: Batch
    tasks: int
    start: int
    """Position of the first task, which keys the random draws together with the inner step."""
    role: Role
    part: tuple[int, ...] = ()
    """Which part of a chunk that was split, by its first tasks and examples; keys the random draws too."""
    writes: Writes = field(default_factory=dict, repr=False)

    @cached_property
    def _flat(self) -> tuple[list[Tensor], TreeSpec]:
        return tree_flatten(self.batch)

    @cached_property
    def _rows(self) -> list[Batch]:
        return _each_task(self.batch, self.tasks)

    def of_tasks(self, first: int, tasks: int) -> Slice:
        """The slice of some of the tasks."""
        batch = tree_map(lambda t: t[first : first + tasks], self.batch)
        return replace(self, batch=batch, tasks=min(tasks, self.tasks - first), part=(*self.part, first))

    def losses(
        self, adapted: Sequence[Tensor], shared: Sequence[Tensor], batch: Batch, step: int, *, metric: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Losses `(tasks,)` (and metric) at parameters per tensor, as `leaves` makes them."""
        given, outer = self.snapshot, self.role is Role.QUERY
        own, before = shared[: len(given.shared)], shared[len(given.shared) :]
        initial = dict(zip(given.layout.names, before, strict=True)) if before else None

        def one(values: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            named, survey = self._named(values, own), given.survey
            loss, figure = given.objective.evaluate(
                named, batch, metric=metric, outer=outer, survey=survey, initial=initial
            )
            return (loss,) if figure is None else (loss, figure.detach())

        outputs: tuple[Tensor, ...] = ()
        for attempt in self._attempts(step):
            outputs = ()
            with attempt:
                outputs = self._each(one, adapted, batch)
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def through_outputs(
        self, adapted: Sequence[Tensor], shared: Sequence[Tensor], step: int
    ) -> tuple[list[Tensor], Tensor]:
        """The model's outputs, `(tasks, *shape)` per tensor, and the losses `(tasks,)` as a function of these."""
        given = self.snapshot
        outlines: list[tuple[TreeSpec, list[Any]]] = []

        def predict(values: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            output = given.objective.predict(self._named(values, shared), batch, given.survey)
            leaves, spec = tree_flatten(output)
            _check_leaves(leaves)
            outlines.append((spec, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        def judge(leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
            own = iter([leaf.clone() for leaf in leaves])  # a loss may write to the output
            spec, outline = outlines.pop(0)
            output = spec.unflatten([next(own) if leaf is Tensor else leaf for leaf in outline])
            return (
                given.objective.judge(
                    output, dict(zip(given.shared_layout.names, shared, strict=True)), batch, given.survey
                ),
            )

        outputs: tuple[Tensor, ...] = ()
        losses: tuple[Tensor, ...] = ()
        for attempt in self._attempts(step):
            outputs = losses = ()
            outlines.clear()
            with attempt:
                outputs = self._each(predict, adapted, self.batch)
                losses = self._each(judge, (), self.batch, stacked=outputs)
        return list(outputs), losses[0]

    def statistics(self, phi: Tensor, step: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """The running statistics `(tasks, *shape)` after one more forward pass of every task at phi."""
        given, count = self.snapshot, len(self.snapshot.layout.names)

        def compute(adapted: list[Tensor], shared: list[Tensor]) -> tuple[Tensor, ...]:
            def one(values: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
                updated = dict(zip(before, (v.clone() for v in values[count:]), strict=True))
                named = self._named(values[:count], shared) | updated
                given.objective.predict(named, batch, given.survey, recording=True)
                return tuple(updated.values())

            found: tuple[Tensor, ...] = ()
            for attempt in self._attempts(step):
                found = ()
                with attempt:
                    found = self._each(one, adapted, self.batch, stacked=list(before.values()))
            return found

        found = self._without_derivatives(phi, compute)
        return {name: value.detach() for name, value in zip(before, found, strict=True)}

    def value(self, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Losses at phi and, of a query set, the metric, without derivatives."""
        is_query = self.role is Role.QUERY
        losses, figure = self._without_derivatives(
            phi, lambda adapted, shared: self.losses(adapted, shared, self.batch, step, metric=is_query)
        )
        return losses.detach(), figure

    def _without_derivatives(self, phi: Tensor, compute: Callable[[list[Tensor], list[Tensor]], T]) -> T:
        """What is computed of the parameters, adapted and shared, with gradients disabled.

        Enabled where a model or a loss differentiates by itself.

        Args:
            phi: The adapted parameters.
            compute: What to compute.

        Returns:
            What `compute` returns.

        Raises:
            RuntimeError: The evaluation with gradients enabled fails too, or there is not enough memory.
        """
        leaves = self.leaves(phi, shared=True)  # parameters require grad here too
        if not self.record.needs_grad_mode:
            try:
                with torch.no_grad():
                    return compute(*leaves)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
        with torch.enable_grad():
            found = compute(*leaves)
        self.record.needs_grad_mode = True
        return found

    def _attempts(self, step: int) -> Attempts:
        key = (self.role, self.start, step, *self.part)
        return Attempts(self.snapshot, self.record, self._flat[0], key, self.part, self.writes, self.tasks > 1)

    def _each(
        self, one: One, values: Sequence[Tensor], batch: Batch, *, stacked: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """One function of every task, stacked: of values as `leaves` makes them, and of `(tasks, *shape)` each."""
        writes = self.writes.get(self.part)
        if self.tasks > 1 and self.record.is_vectorised:
            leaves, structure = self._flat if batch is self.batch else tree_flatten(batch)
            count = len(values) + len(stacked)
            with MathAttention():
                outputs = vectorised(
                    lambda rows: one(rows[:count], structure.unflatten(rows[count:])),
                    [*values, *stacked, *_given(leaves, writes)],
                    self.tasks,
                )
            return tuple(outputs)
        rows = self._rows if batch is self.batch else _each_task(batch, self.tasks)
        # not `v[i]`, whose derivative writes zeros for all other tasks
        own = [v.unbind() if self.tasks > 1 else (v,) for v in values] + [v.unbind() for v in stacked]
        found = []
        try:
            for i, row in enumerate(rows):
                found.append(one([parts[i] for parts in own], _given(row, writes)))
        except RuntimeError as error:
            if not is_write_to_rows(error):
                raise
            raise RuntimeError(
                "The model writes to its parameters in place while several tasks are evaluated one by one. Expected a "
                f"forward pass that leaves them alone. Got a write, to {self.tasks} tasks: use chunk_size=1."
            ) from error
        # Copies: a loss may be a view of what it is given, and gradients are added up in place.
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    def _named(self, adapted: Sequence[Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor]:
        """What one task is evaluated with, by name; the model's own where none are given."""
        given = self.snapshot
        named = dict(zip(given.layout.names, adapted, strict=False))
        named |= zip(given.shared_layout.names, shared, strict=False)
        return named | given.constants.fresh()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector `(tasks, n)` by parameter: `(tasks, *shape)`, or `(*shape)` of a single task.

        Autograd would go from `(1, *shape)` to the model's `(*shape)` before anything else, and come back to it last,
        so that a gradient that is complete would wait for all others.

        Args:
            flat: The vector.

        Returns:
            One for each adapted parameter.
        """
        return self.snapshot.layout.views(flat.squeeze(0) if self.tasks == 1 else flat)

    def leaves(self, phi: Tensor, *, shared: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters as autograd leaves.

        Args:
            phi: The adapted parameters of each task.
            shared: Whether the others require grad, which they also do if needed.

        Returns:
            Views of phi; and what all tasks have in common, `(*shape)` each: the shared parameters, followed for a
            query loss that takes them by the adapted parameters before the inner loop.
        """
        adapted = [v.detach().requires_grad_() for v in self.views(phi)]
        requires = shared or self.record.needs_shared
        initial = self.snapshot.initial if self.role is Role.QUERY else []
        return adapted, [t.detach().requires_grad_(requires) for t in (*self.snapshot.shared, *initial)]

    def at_leaves(
        self, phi: Tensor, step: int, *, shared: bool, metric: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
        """The leaves, as `leaves` makes them, with the losses `(tasks,)` that depend on them, and the metric."""
        record, batch = self.record, self.batch
        adapted, others = self.leaves(phi, shared=shared)
        hides = bool(others) and not others[0].requires_grad  # for a smaller graph; it matters to few models
        before, questions, found = sequence_number(), denied.count, None
        with torch.enable_grad():
            try:
                found = self.losses(adapted, others, batch, step, metric=metric)
            except RuntimeError as error:
                if not hides or is_out_of_memory(error):
                    raise
        if found is None or hides and denied.count > questions:
            del found
            record.needs_shared = True
            try:
                return self.at_leaves(phi, step, shared=shared, metric=metric)
            except RuntimeError:
                record.needs_shared = False
                raise
        losses, figure = found
        if self.snapshot.differentiates:
            key = (self.role, self.start, *self.part, sequence_number() - before)
            if key not in record.own:
                with torch.enable_grad():
                    self.check_own(
                        losses, [*adapted, *others], lambda: self.losses(adapted, others, batch, step, metric=metric)[0]
                    )
                record.own.add(key)
        return adapted, others, losses, figure

    def check_own(self, losses: Tensor, leaves: Sequence[Tensor], again: Callable[[], Tensor]) -> None:
        """Raise ValueError where losses depend on a tensor that requires grad and is not among the leaves."""
        if self.snapshot.differentiates:
            check_reached(str(self.role), [losses], leaves, lambda: [again()], self.snapshot.objective.names)

    def check_depends(self, losses: Tensor) -> None:
        """Raise unless a gradient can flow from the losses."""
        if not losses.requires_grad:
            raise ValueError(
                f"The {self.role} loss depends on no adapted parameter. Expected a loss computed from the model's "
                "output with gradients enabled: look for .detach(), .item() or torch.no_grad() in the model or the "
                "loss."
            )

    def collect(self, grads: Sequence[Tensor | None], phi: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flatten gradients of the adapted, then any shared parameters; None becomes zeros in its own place."""
        given, count = self.snapshot, len(self.snapshot.layout.names)
        return given.layout.gather(grads[:count], phi), self.collect_shared(grads[count:])

    def collect_shared(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Flatten gradients of the shared parameters, if there are any; remembers which ones have a path."""
        grads = grads[: len(self.snapshot.shared)]
        if not grads:
            return None
        layout = self.snapshot.shared_layout
        self.record.used_shared |= {n for n, g in zip(layout.names, grads, strict=False) if g is not None}
        return layout.gather(grads, self.snapshot.like)

    def collect_initial(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Flatten what follows the gradients of the shared parameters, `(n,)`: those by the initial ones, if any."""
        grads = grads[len(self.snapshot.shared) :]
        return self.snapshot.layout.gather(grads, self.snapshot.like) if grads else None


def _given(batch: Batch, writes: bool | None) -> Batch:
    """What the model sees: a copy if it writes to it."""
    if writes is None:
        return tree_map(_shielded, batch)
    return tree_map(Tensor.clone, batch) if writes else batch


def _shielded(tensor: Tensor) -> Tensor:
    """Share the data, so that no graph remains at the user's tensor where a parameter is written into it."""
    return tensor if tensor.requires_grad or is_functorch_wrapped_tensor(tensor) else tensor.detach()


def _each_task(batch: Batch, tasks: int) -> list[Batch]:
    return [tree_map(lambda t, i=i: t[i], batch) for i in range(tasks)]


def outside_inference(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made in inference mode, which autograd cannot save."""
    if not any(t.is_inference() for t in tree_leaves(batch)):
        return batch
    return tree_map(lambda t: t.clone() if t.is_inference() else t, batch)


def _check_leaves(leaves: Sequence[Any]) -> None:
    """Raise TypeError where tensors may be hidden in an output, which would have no derivatives."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, Number, str, NoneType)):
            raise TypeError(
                "curvature='ggn' goes through the tensors of the model's output. Expected tensors, numbers, strings "
                f"and None in tuples, lists and dicts. Got {type(leaf).__name__}: return its tensors in a tuple, or "
                "use curvature='hessian'."
            )
