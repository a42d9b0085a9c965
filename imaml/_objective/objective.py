"""What is adapted and what is minimised: a model and a loss, or one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from imaml._leaves import opened
from imaml._objective.blocks import Blocks
from imaml._objective.buffers import BufferPolicy, Constants, HeldBuffers, check_policy
from imaml._objective.criteria import ADAPTED, INITIAL, META, Criteria, check_loss, check_scalar
from imaml._objective.faithful import Survey, faithful
from imaml._objective.meta import Given, MetaParameters
from imaml._objective.program import FunctionProgram, ModelProgram, Parameters, Program
from imaml._objective.reach import Reach, buffers_in, modules_in
from imaml._objective.select import select
from imaml._tasks import Batch


class Objective:
    """Says what is minimised and which parameters adapt: a model with a loss, or one function of parameters.

    `Objective(model, loss)` evaluates `loss(model(input), target)` on a batch `(input, target)`. A tuple or list
    `input` is passed as positional arguments, a dict as keyword arguments, a named tuple as one argument.
    `Objective.from_function` takes any `loss(params, batch)`.

    The model is used as it is, by reference: its parameters are read anew at every call, and it is never changed.

    Meta-gradients are computed for every adapted parameter and for every other parameter that requires grad. The
    support loss may depend on the latter, so they are meta-learned through the adaptation. The rest are constants.

    Meta-parameters are named tensors to learn besides the parameters: whatever the losses use (example weights, the
    parameters of a learned loss) or the inner optimiser (learned step sizes). They receive meta-gradients like
    parameters; one that does not require grad is a constant. A tensor that another network produced passes its gradient
    on, and needs a new objective whenever it is produced anew. A value may be a dictionary of tensors itself, such as
    `dict(network.named_parameters())`; their gradients have the names `key.name`.

    Buffers that the model updates in training mode follow a policy, without which such a model is refused. "batch":
    BatchNorm and InstanceNorm normalise by batch statistics, and their running statistics are left alone. "frozen":
    they normalise by the running statistics, as in eval mode. "update": as "batch", and the running statistics of every
    task follow its inner loop, from the model's own.

    With "update" there is one more forward pass of the support set per step. `adapt` returns the statistics with the
    parameters, and `report.buffers` has their mean over the tasks; the model changes only by
    `model.load_state_dict(report.buffers, strict=False)`.

    The vectors of spectral_norm stay as they are during a call, under any policy: a forward pass in training mode, say
    one between meta-steps, follows the weight.

    Args:
        model: Any module. `torch.utils.checkpoint` in it is honoured, and a compiled one runs uncompiled.
        loss: `(output, target) -> 0-dim floating-point tensor`, a mean over examples as a rule. One that has an
            argument named `meta` is given the meta-parameters in it, by name: `(output, target, meta)`.
        adapt: Which parameters the inner loop changes: names, module names or shell patterns (`["head"]`,
            `["*.bias"]`). None: every parameter that requires grad.
        outer_loss: The loss of the query set, where it is another than `loss`; of the same form. It may have two more
            arguments, dictionaries of the adapted parameters by name: `initial` has them before the inner loop, theta,
            and `adapted` after it. Its derivative by `initial` counts, in the meta-gradient of every strategy, as what
            a change of theta does besides moving the adapted parameters.
        meta: The meta-parameters by name, see above.
        metric: `(output, target) -> 0-dim tensor`, evaluated on the query set from the same forward pass and returned
            in `report.metric`; never differentiated. For example an accuracy.
        buffers: The policy for buffers: None, "batch", "frozen" or "update", see above.
        recompute: Modules whose activations are not kept, but computed again in derivatives of every order: names,
            shell patterns (`["layers.*"]`) or types (`[nn.TransformerEncoderLayer]`), the outermost that an entry
            matches. See `imaml.recompute`. None: no module.

    Raises:
        TypeError: `model` is not a module, `loss` is not callable, an adapted parameter is not of a real floating
            dtype, a meta-parameter no floating-point tensor.
        ValueError: No parameter to adapt, an unknown name or policy, a name in `meta` that a parameter has, or an entry
            of `recompute` that matches no module.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        adapt: Iterable[str] | None = None,
        outer_loss: Callable[..., Tensor] | None = None,
        meta: Given | None = None,
        metric: Callable[[Any, Any], Tensor] | None = None,
        buffers: BufferPolicy | None = None,
        recompute: Blocks | None = None,
    ) -> None:
        check_policy(buffers)
        criteria = Criteria(loss, outer_loss, metric)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected an nn.Module. Got {type(model).__name__}: for a function of parameters and a batch use "
                "Objective.from_function(loss, params)."
            )
        self._initialise(ModelProgram(model, buffers, () if recompute is None else recompute), criteria, adapt, meta)

    @classmethod
    def from_function(
        cls,
        loss: Callable[..., Tensor],
        params: Parameters,
        *,
        adapt: Iterable[str] | None = None,
        outer_loss: Callable[..., Tensor] | None = None,
        meta: Given | None = None,
        metric: Callable[[dict[str, Tensor], Batch], Tensor] | None = None,
    ) -> Objective:
        """Make an objective from a function of named parameters and a batch.

        Args:
            loss: `(params, batch) -> 0-dim floating-point tensor`, or `(params, batch, meta)` with an argument of that
                name; it must read every parameter from `params`.
            params: Named tensors. Leaves that require grad receive `.grad`; a tensor that another network produced
                passes the meta-gradient on to it. Tensors that do not require grad are adapted too, and
                `value_and_grad` returns their gradients.
            adapt: Which of them the inner loop changes; None: all.
            outer_loss: See the class, as for `meta`.
            meta: Named tensors to learn besides.
            metric: `(params, batch) -> 0-dim tensor`, see the class.

        Returns:
            The objective.
        """
        objective = cls.__new__(cls)
        objective._initialise(FunctionProgram(dict(params)), Criteria(loss, outer_loss, metric), adapt, meta)
        return objective

    def _initialise(
        self, program: Program, criteria: Criteria, adapt: Iterable[str] | None, meta: Given | None
    ) -> None:
        self._program, self._criteria = program, criteria
        named = program.parameters()
        self.meta = MetaParameters(meta or {})
        """The meta-parameters, as the user holds them."""
        self.meta.check([*named, *(() if program.model is None else dict(program.model.named_buffers()))])
        if adapt is None:
            chosen = {n for n, p in named.items() if program.trainable(p)}
        else:
            first_names = program.first_names()
            chosen = {first_names[n] for n in select(adapt, first_names)}
        self.adapted: tuple[str, ...] = tuple(n for n in named if n in chosen)
        """Names of the adapted parameters, in the model's order."""
        if not self.adapted:
            raise ValueError(
                f"No parameter to adapt among {len(named)}: none requires grad. Call requires_grad_(True) on some, or "
                "name them in `adapt`."
            )
        for name in self.adapted:
            _check_adaptable(name, named[name])

    @property
    def model(self) -> nn.Module | None:
        """The model; None for an objective made from a function."""
        return self._program.model

    @property
    def loss(self) -> Callable[..., Tensor]:
        """`loss(output, target)`, or `loss(params, batch)` for an objective made from a function."""
        return self._criteria.loss

    @property
    def outer_loss(self) -> Callable[..., Tensor] | None:
        """The loss of the query set, of the form of `loss`; None where it is `loss`."""
        return self._criteria.outer_loss

    @property
    def metric(self) -> Callable[..., Tensor] | None:
        """`metric(output, target)`, or `metric(params, batch)` for an objective made from a function; None without."""
        return self._criteria.metric

    def double(self) -> Objective:
        """A deep copy in float64, independent of the user's model.

        Returns:
            The copy; its loss too is copied if it is a module. Tensors in a function's closure stay as they are.

        Raises:
            TypeError: The model cannot be copied.
        """
        copied = Objective.__new__(Objective)
        copied._program, (loss, outer_loss) = self._program.double((self.loss, self.outer_loss))
        assert loss is not None
        copied._criteria = Criteria(loss, outer_loss, self.metric)
        copied.adapted, copied.meta = self.adapted, self.meta.double()
        return copied

    def parameters(self) -> dict[str, Tensor]:
        """What receives meta-gradients, as the user holds it: adapted parameters, shared ones, and those of `meta`."""
        named = self._program.parameters()
        shared = {
            n: p
            for n, p in named.items()
            if n not in self.adapted and self._program.trainable(p) and _is_learnable(n, p)
        }
        return {n: named[n] for n in self.adapted} | shared | self.meta.learned()

    def check(self) -> None:
        """Raise where the model's present state cannot be adapted without changing it."""
        self._program.check()

    def constants(self) -> dict[str, Tensor]:
        """Copies of the model's buffers, so that a forward pass cannot change the model."""
        return Constants.of(self.model).fresh()

    def others(self, learned: Collection[str]) -> dict[str, Tensor]:
        """What a loss uses by name besides what is `learned` and the buffers: as the user holds it."""
        return {n: t for n, t in (self._program.parameters() | self.meta.flat()).items() if n not in learned}

    def names(self) -> dict[int, str]:
        """What tensors that a loss may find past its arguments are called, by address."""
        held = {
            id(p): f"{n!r} of {type(m).__name__} in the loss"
            for m in reversed(self.held())
            for n, p in m.named_parameters()
        }
        own = {id(p): f"the parameter {n!r} read past the forward pass" for n, p in self._program.parameters().items()}
        return held | own | {id(t): f"the meta-parameter {n!r} read past `meta`" for n, t in self.meta.flat().items()}

    def held(self) -> list[nn.Module]:
        """The modules that the losses and the metric use besides their arguments, and the model besides its own."""
        return self._look()[0]

    def _look(self) -> tuple[list[nn.Module], list[Reach]]:
        """The modules of `held`, and all that the losses and the model can reach besides their arguments."""
        arguments = [*self._program.parameters().values(), *self.meta.flat().values()]
        if self.model is not None:
            arguments += buffers_in(self.model).values()
        losses = Reach.of((self.loss, self.outer_loss, self.metric), arguments)
        if self.model is None:
            return losses.modules, [losses]
        model, own = Reach.of([self.model], arguments), {*modules_in(self.model), *losses.modules}
        return losses.modules + [module for module in model.modules if module not in own], [losses, model]

    def statistics(self) -> list[str]:
        """Names of the buffers that follow each task's inner loop; none unless `buffers="update"`."""
        return self._program.statistics()

    def survey(self) -> Survey:
        """What the model needs in a forward pass, for the evaluations of one call."""
        held, reach = self._look()
        constants = Constants.of(self.model)
        return replace(self._program.survey(), constants=constants, held=HeldBuffers.of(held), reach=reach)

    def evaluate(
        self,
        values: Parameters,
        batch: Batch,
        *,
        metric: bool = False,
        outer: bool = False,
        survey: Survey | None = None,
        initial: Parameters | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss, and metric if asked, at `values` (which may name fewer than all parameters) on one task's batch.

        Args:
            values: Parameters and meta-parameters by name.
            batch: One task's support or query set.
            metric: Whether to evaluate the metric.
            outer: Whether the loss is that of the query set.
            survey: What the model needs, as it is; None: looked through anew.
            initial: The adapted parameters before the inner loop, for a query loss that takes them; None: `values`.

        Returns:
            The loss and the metric.
        """
        survey = survey or self.survey()
        try:
            with faithful(survey):
                subject, target = self._program.subject(self._others(values), opened(batch), survey)
                figure = self.metric(subject, target) if metric and self.metric else None
                more = self._more(values, values if initial is None else initial, outer=outer)
                loss = self._criteria.judge(subject, target, more, outer=outer)
        finally:
            survey.restore()  # not before: a loss may read what the forward pass has set on the model
        return check_loss(loss), None if figure is None else check_scalar("metric", figure)

    def predict(self, values: Parameters, batch: Batch, survey: Survey, *, recording: bool = False) -> Any:
        """The model's output on one task's batch, for an objective of a model.

        Args:
            values: Parameters by name.
            batch: One task's support set.
            survey: What the model needs.
            recording: Whether running statistics among the values are updated in place.

        Returns:
            The output, for `judge`.
        """
        try:
            with faithful(survey):
                return self._program.subject(self._others(values), opened(batch), survey, recording=recording)[0]
        finally:
            survey.restore()

    def judge(self, output: Any, values: Parameters, batch: Batch, survey: Survey) -> Tensor:
        """The support loss of an output of `predict` with the same arguments."""
        with faithful(survey):
            more = self._more(values, values, outer=False)
            loss = self._criteria.judge(output, opened(batch)[1], more, outer=False)
        return check_loss(loss)

    @property
    def takes_initial(self) -> bool:
        """Whether the query loss depends on the parameters before the inner loop by itself."""
        return INITIAL in self._criteria.taken[True]

    @property
    def takes_parameters(self) -> bool:
        """Whether the query loss takes parameters by name, before the inner loop or after it."""
        return not self._criteria.taken[True] <= {META}

    def _more(self, values: Parameters, initial: Parameters, *, outer: bool) -> dict[str, Any]:
        """What a loss takes besides an output and a target."""
        taken, more = self._criteria.taken[outer], dict[str, Any]()
        if META in taken:
            more[META] = self.meta.like_given(values)
        if not taken <= {META}:
            own = self._program.parameters()
            for name, given in ((INITIAL, initial), (ADAPTED, values)):
                if name in taken:
                    more[name] = {n: given.get(n, own[n]) for n in self.adapted}
        return more

    def _others(self, values: Parameters) -> Parameters:
        names = self.meta.flat()
        return {n: t for n, t in values.items() if n not in names} if names else values


def _is_learnable(name: str, parameter: Tensor) -> bool:
    """Whether a parameter that does not adapt gets a meta-gradient; one that requires grad must be able to."""
    able = parameter.is_floating_point() and parameter.layout is torch.strided
    if parameter.requires_grad and not able:
        raise TypeError(
            f"Parameter {name!r} requires grad and must be dense and of a real floating-point dtype to get a "
            f"meta-gradient. Got {_kind(parameter)}: {_REMEDY}, or call requires_grad_(False) on it."
        )
    return able


def _kind(parameter: Tensor) -> str:
    return str(parameter.dtype if parameter.layout is torch.strided else parameter.layout)


_REMEDY = (
    "keep a complex one as its real and imaginary part, shape (..., 2), and call torch.view_as_complex on that in the "
    "forward pass, or a sparse one as the vector of its values"
)


def _check_adaptable(name: str, parameter: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"Parameter {name!r} must be a tensor. Got {type(parameter).__name__}.")
    if is_lazy(parameter):
        raise ValueError(f"Parameter {name!r} is not initialised yet. Run one forward pass of the model first.")
    if not parameter.is_floating_point() or parameter.layout is not torch.strided:
        raise TypeError(
            f"Parameter {name!r} must be dense and of a real floating-point dtype to be adapted. Got "
            f"{_kind(parameter)}: leave it out of `adapt`, or {_REMEDY}."
        )
