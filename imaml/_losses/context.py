"""What every evaluation of one engine call shares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml._losses.layout import Layout
from imaml._losses.replay import Replay
from imaml._objective.buffers import HeldBuffers, differ
from imaml._objective.faithful import Survey
from imaml._objective.objective import Objective
from imaml._torch import is_traced, is_transformed
from imaml.inner._hyper import Hyper, Hyperparameters


@dataclass
class Context:
    """The objective's parameters, a snapshot of its buffers, and what the call has done so far."""

    objective: Objective
    layout: Layout
    """Of the adapted parameters."""
    like: Tensor
    """Of no entries, in the dtype and on the device of flat vectors."""
    fixed_layout: Layout
    """Of the other parameters that receive meta-gradients, the objective's `meta` among them."""
    fixed: list[Tensor]
    """Their values."""
    constants: dict[str, Tensor]
    """Copies of the model's buffers; see `fresh_constants`."""
    buffers: list[Tensor]
    """The buffers themselves."""
    survey: Survey | None
    """What the model needs in a forward pass; None without a model."""
    held: HeldBuffers
    """Those of modules that the losses and the metric hold."""
    replay: Replay
    hyper: Hyperparameters
    """Of the inner loop."""
    differentiates: bool = True
    """Whether the call is asked for derivatives, and does not only evaluate."""
    needs_fixed: bool = False
    """Whether an evaluation by the adapted parameters alone needs to know that the others require grad too: a forward
    pass asks, or differentiates by them."""
    needs_grad_mode: bool = False
    """Whether a forward pass or a loss differentiates by itself, and cannot be evaluated without gradients enabled."""
    gradients: int = 0
    """Evaluations so far, summed over tasks: one call on a chunk of 8 tasks counts 8."""
    hvps: int = 0
    hvp_mode: str | None = None
    """How Hessian-vector products were computed; None before the first."""
    hvp_error: float | None = None
    """Of those by finite differences; None before the first."""
    hvp_move: float | None = None
    """How far those move phi, in its norms; None before the first."""
    gauss_newton: bool = False
    """Whether the products were those of the Gauss-Newton matrix."""
    is_vectorised: bool = True
    """Whether chunks run under `vmap`; False once the model turned out to have an operation that cannot."""
    used: set[str] = field(default_factory=set)
    """Adapted parameters that the support loss of some task depends on."""
    used_fixed: set[str] = field(default_factory=set)
    """The others that some derivative was taken by and not found to be zero for want of a path."""
    own: set[tuple[float, ...]] = field(default_factory=set)
    """Of losses, found to depend on no tensor that is not theirs: which part of which chunk, and how many nodes."""
    graphs: set[tuple[float, ...]] = field(default_factory=set)
    """Of gradients, found to be differentiable again: which part of which chunk, and how many nodes it took."""
    statistics: list[dict[str, Tensor]] = field(default_factory=list)
    """Running statistics after the inner loop by name, `(tasks, *shape)`, of every chunk so far; none unless asked."""

    @property
    def theta(self) -> Tensor:
        """The adapted parameters as a new flat vector `(n,)`: whoever needs it for a while holds it for as long."""
        named = self.objective.parameters()
        return self.layout.flatten([named[name] for name in self.layout.names])

    def fresh_constants(self) -> dict[str, Tensor]:
        """Copies of the model's buffers, new ones where a forward pass has changed the last."""
        if inside_transform():
            return self.objective.constants()
        if any(map(differ, self.constants.values(), self.buffers)):
            self.constants = self.objective.constants()
        return self.constants

    def mark(self) -> Callable[[], None]:
        """What takes back all that a chunk adds to from here on, but what it cost."""
        take_back, chunks = self.hyper.mark(), len(self.statistics)
        move, error = self.hvp_move, self.hvp_error

        def undo() -> None:
            take_back()
            del self.statistics[chunks:]
            self.hvp_move, self.hvp_error = move, error

        return undo

    def without_path(self, through_hyper: Collection[str]) -> list[str]:
        """Learned meta-parameters, or groups of them, that no derivative was taken by.

        Args:
            through_hyper: Names of those that have one through a hyper-parameter.

        Returns:
            Their keys.
        """
        learned, reached = self.objective.meta.learned().keys(), {*through_hyper, *self.used_fixed}
        groups = {key: learned & group.keys() for key, group in self.objective.meta.groups().items()}
        return [key for key, names in groups.items() if names and not names & reached]

    def mean_statistics(self) -> dict[str, Tensor]:
        """The mean over all tasks of the running statistics after their inner loops, in their dtypes."""
        names = self.statistics[0] if self.statistics else ()
        joined = {name: torch.cat([chunk[name] for chunk in self.statistics]) for name in names}
        return {name: values.double().mean(0).to(values.dtype) for name, values in joined.items()}

    @classmethod
    def of(
        cls,
        objective: Objective,
        hyper: Mapping[str, tuple[Hyper, int]] | None = None,
        layout_of: Callable[[Mapping[str, Tensor]], Layout] = Layout.of,
        *,
        differentiates: bool = True,
    ) -> Context:
        """Check the objective in its present state, and take the snapshot.

        Args:
            objective: Model and loss.
            hyper: Hyper-parameters of the inner loop by name, each with the number of steps it may have values for.
            layout_of: From named parameters to how they lie in a flat vector.
            differentiates: Whether derivatives are asked for.

        Returns:
            The context of one call.

        Raises:
            TypeError: Not an objective.
            ValueError: The model's present state cannot be adapted, its parameters are on several devices, or a
                hyper-parameter's value does not fit.
        """
        if not isinstance(objective, Objective):
            raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
        objective.check()
        named = objective.parameters()
        adapted = {n: p for n, p in named.items() if n in objective.adapted}
        fixed = {n: p.detach() for n, p in named.items() if n not in objective.adapted}
        devices = {p.device for p in adapted.values()}
        if len(devices) > 1:
            raise ValueError(f"Adapted parameters must be on one device. Got {sorted(map(str, devices))}.")
        layout = layout_of(adapted)
        like = layout.empty(next(iter(adapted.values())))
        return cls(
            objective=objective,
            layout=layout,
            like=like,
            fixed_layout=layout_of(fixed),
            fixed=list(fixed.values()),
            constants=objective.constants(),
            buffers=[] if objective.model is None else list(objective.model.buffers()),
            survey=objective.survey(),
            held=HeldBuffers.of(objective.held()),
            replay=Replay(devices.pop()),
            hyper=Hyperparameters.of(hyper or {}, objective.meta, layout, like),
            differentiates=differentiates,
        )


def inside_transform() -> bool:
    """Whether a transform of torch.func other than `vmap` runs, or a trace."""
    # They refuse writes to outer tensors, and inner ones end with them.
    return is_traced() or is_transformed()
