"""Every guard of a forward pass, with its reason: a model runs as written, on given parameters, and stays as it is.

A model is looked through once a call, so that an evaluation pays for what it needs, and an ordinary one for little.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imaml._objective.blocks import Blocks, blocks_of
from imaml._objective.buffers import BufferPolicy, Constants, HeldBuffers, Statistics, power_iterations
from imaml._objective.exact import ExactDerivatives
from imaml._objective.reach import Reach, buffers_in, modules_in, parameters_in
from imaml._objective.recompute import Conditions, Swapped, begin, end, lean_attention, name_of, recompute
from imaml._torch import give_back, is_compiled, is_sharded, recompute_by_torch, take_over

# The guards are classes: a generator as a context manager takes three times the calls, in every evaluation.

_OF_EVERY_MODULE = nn.Module().__dict__.keys()


class _Sharded(threading.local):
    def __init__(self) -> None:
        self.open: list[tuple[Conditions, Survey]] = []


_sharded = _Sharded()
"""The evaluations of a thread that are of a sharded model."""


def _recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What becomes of a checkpoint of the model or of the loss, and of a module that is to be recomputed."""
    if not _sharded.open or not torch.is_grad_enabled():
        return recompute(function, *args, **kwargs)
    evaluation, survey = _sharded.open[-1]
    survey.recomputed.add(name_of(function))
    return recompute_by_torch(evaluation.again, partial(function, **kwargs), *args)


class faithful:  # noqa: N801
    """Within it a loss of any kind has its true derivatives, of the parameters that it is given.

    - Operations whose derivatives torch gets wrong are replaced: `ExactDerivatives`.
    - `torch.utils.checkpoint` recomputes with the parameters of the evaluation. Torch's own recomputation comes in the
      backward pass, when the model has its own parameters again: without a word, the derivatives would be those of a
      mixture of two models.
    - Attention whose second derivatives are wanted is cut up into slices, where it is large.
    """

    is_active = False

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._mode: Any = ExactDerivatives()

    def __enter__(self) -> None:
        self._mode.__enter__()
        take_over(_recompute, lean_attention)
        begin(self)
        if self._survey.is_sharded:
            _sharded.open.append((self, self._survey))

    def __exit__(self, *error: Any) -> None:
        if self._survey.is_sharded:
            _sharded.open.pop()
        end(self)
        give_back()
        self._mode.__exit__(*error)

    def recomputes(self, name: str) -> bool:
        """See `Conditions`."""
        return self._survey.recomputes(name)

    @contextmanager
    def again(self) -> Iterator[None]:
        """For a block that is recomputed."""
        with faithful(self._survey), self._survey.held.copied():
            yield


@dataclass(frozen=True)
class Survey:
    """What a model needs in a forward pass, as it is at the start of a call.

    With 301 modules an inner step then makes fewer Python calls than `functional_call` and the loss alone, which look
    for tied weights each time: `python -m benchmarks.calls`.
    """

    places: Mapping[str, list[tuple[dict[str, Any], str]]]
    """Where the tensor of a name stands: in every module that has it, once in each. (`functional_call` swaps by name,
    and where two names mean one place it puts back what it has put there itself.)"""
    is_compiled: bool
    """Whether a module is compiled; a compiled one has no second derivative."""
    norms: list[Any]
    """Every spectral_norm that iterates; its vectors are kept, or each evaluation would see others."""
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    """Attributes of every module, and how they were."""
    blocks: list[nn.Module]
    """Modules whose calls are recomputed."""
    is_sharded: bool
    """Whether parameters are spread over processes: a block's are gathered by hooks, and cannot be its inputs. Torch's
    own checkpoint is then right, since the model has the parameters of an evaluation until its derivatives are taken.
    """
    constants: Constants = field(default_factory=lambda: Constants({}))
    """Copies of the model's buffers."""
    held: HeldBuffers = field(default_factory=lambda: HeldBuffers([]))
    """Buffers of other modules, of which a block that is recomputed sees copies too."""
    reach: list[Reach] = field(default_factory=list)
    """What the losses and the model can reach besides their arguments."""
    only: frozenset[str] | None = None
    """Names of the blocks that are recomputed; None: every block."""
    recomputed: set[str] = field(default_factory=set)
    """Names of what was recomputed so far, checkpoints of the model and the loss among them."""

    @classmethod
    def of(cls, model: nn.Module | None, recomputed: Blocks = ()) -> Survey:
        """Look a model through, if there is one."""
        if model is None:
            return cls({}, False, [], [], [], False)
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("The parameters of a scripted module cannot be swapped. Expected the original nn.Module.")
        modules = modules_in(model)
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in modules:
            for members in (module._parameters, module._buffers):
                for name, tensor in members.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((members, name))
        named: dict[str, Tensor] = {**parameters_in(model), **buffers_in(model)}
        return cls(
            places={name: places[id(tensor)] for name, tensor in named.items()},
            is_compiled=any(is_compiled(module) for module in modules),
            norms=[norm for _, _, norm in power_iterations(model)],
            attributes=[
                (m.__dict__, {n: m.__dict__[n] for n in m.__dict__.keys() - _OF_EVERY_MODULE}) for m in modules
            ],
            blocks=blocks_of(model, recomputed),
            is_sharded=is_sharded(named.values()),
        )

    @property
    def recomputes_any(self) -> bool:
        """Whether anything is, as far as it is known."""
        return bool(self.blocks or self.recomputed) and not self.is_sharded

    def recomputing(self, model: nn.Module | None, blocks: Blocks) -> Survey:
        """The survey with more modules whose calls are recomputed; it remembers names with this one."""
        if model is None:
            raise ValueError(
                "`recompute` names modules. Expected an objective of a model. Got one of a function: call "
                "imaml.recompute in it."
            )
        return replace(self, blocks=list(dict.fromkeys([*self.blocks, *blocks_of(model, blocks)])))

    def recomputes(self, name: str) -> bool:
        """See `Conditions`."""
        if self.is_sharded:
            raise ValueError(
                f"{name} is to be recomputed by imaml.recompute, of which the hooks of a model that is sharded over "
                "processes know nothing. Expected torch.utils.checkpoint.checkpoint in its place."
            )
        if self.only is not None and name not in self.only:
            return False
        self.recomputed.add(name)
        return True

    def running(self, values: Mapping[str, Tensor], policy: BufferPolicy | None) -> Running:
        """Within it the model has these parameters and buffers by name, and runs as written."""
        return Running(self, values, policy)

    def before(self, module: nn.Module) -> dict[str, Any] | None:
        """The attributes of a module as they were, if it has hooks that may set some."""
        if not module._forward_pre_hooks:
            return None
        return next(before for attributes, before in self.attributes if attributes is module.__dict__)

    def restore(self) -> None:
        """Take from all modules what an evaluation has set as an attribute: a weight made by a hook, an output."""
        for attributes, before in self.attributes:
            for name in attributes.keys() - _OF_EVERY_MODULE:
                value = attributes[name]
                if value is not before.get(name) and isinstance(value, Tensor):
                    del attributes[name]
                    if name in before:
                        attributes[name] = before[name]


class _Forward:
    """The forward pass of a block, as a function of what its hooks have set on it too.

    A hook, such as that of the older weight_norm and spectral_norm and of pruning, makes a weight before each forward
    pass. When the block is recomputed, the module has the one again that it had before the evaluation.
    """

    def __init__(self, module: nn.Module, before: Mapping[str, Any] | None) -> None:
        self._module, self._before, self._forward = module, before, module.forward
        self.__qualname__ = name_of(module.forward)

    def __call__(self, made: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the module returns for the arguments, with these attributes."""
        with Swapped([(self._module.__dict__, name, tensor) for name, tensor in made.items()]):
            return self._forward(*args, **kwargs)

    def recomputed(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's own `forward`."""
        made = {}
        if self._before is not None:
            own = self._module.__dict__.items()
            made = {n: t for n, t in own if isinstance(t, Tensor) and t is not self._before.get(n)}
        return _recompute(self, made, *args, **kwargs)


class Running:
    """A forward pass: given tensors in the places of the model's own, compiled modules as written, norms as they are.

    - A compiled module has no second derivative.
    - spectral_norm would change its vectors, and each evaluation would see others.
    - Normalisation layers follow the objective's policy for buffers.
    """

    is_active = False

    def __init__(self, survey: Survey, values: Mapping[str, Tensor], policy: BufferPolicy | None) -> None:
        self._survey, self._values, self._policy = survey, values, policy
        self._swapped = Swapped(
            [
                *((members, key, value) for name, value in values.items() for members, key in survey.places[name]),
                *((norm.__dict__, "n_power_iterations", 0) for norm in survey.norms),
                *((b.__dict__, "forward", _Forward(b, survey.before(b)).recomputed) for b in survey.blocks),
            ]
        )
        self._modes: list[Any] = [Statistics(policy)] if policy is not None else []

    def __enter__(self) -> None:
        if self._survey.is_compiled:
            self._modes.append(torch.compiler.set_stance("force_eager"))
        for mode in self._modes:
            mode.__enter__()
        self._swapped.__enter__()
        begin(self)
        if self._survey.is_sharded:
            _sharded.open.append((self, self._survey))

    def __exit__(self, *error: Any) -> None:
        if self._survey.is_sharded:
            _sharded.open.pop()
        end(self)
        self._swapped.__exit__()
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def recomputes(self, name: str) -> bool:
        """See `Conditions`."""
        return self._survey.recomputes(name)

    @contextmanager
    def again(self) -> Iterator[None]:
        """For a block that is recomputed, when the model has its own parameters again."""
        try:
            values = {**self._values, **self._survey.constants.fresh()}  # a block may have written to those it had
            with faithful(self._survey), self._survey.held.copied(), Running(self._survey, values, self._policy):
                yield
        finally:
            self._survey.restore()
