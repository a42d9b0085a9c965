"""Every guard of a forward pass, with its reason: a model runs as written, on given parameters, and stays as it is.

A model is looked through once a call, so that an evaluation pays for what it needs, and an ordinary one for little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imaml._objective.buffers import power_iterations
from imaml._objective.exact import ExactDerivatives
from imaml._torch import is_compiled, without_checkpoints

_OF_EVERY_MODULE = nn.Module().__dict__.keys()


@contextmanager
def faithful() -> Iterator[None]:
    """Within it a loss of any kind has its true derivatives, of the parameters that it is given.

    - Operations whose derivatives torch gets wrong are replaced: `ExactDerivatives`.
    - `torch.utils.checkpoint` calls its function and keeps what it saves. A checkpointed function is recomputed in the
      backward pass, when the model has its own parameters again: without a word, the derivatives would be those of a
      mixture of two models.
    """
    with ExactDerivatives(), without_checkpoints():
        yield


@dataclass(frozen=True)
class Survey:
    """What a model needs in a forward pass, as it is at the start of a call."""

    places: Mapping[str, tuple[str, ...]]
    """Under which names the tensor of a name is to be swapped.

    All names of a tied tensor, but one name only of a module that has several: `functional_call` swaps by name, and
    where two names mean one place it puts back what it has put there itself.
    """
    is_compiled: bool
    """Whether a module is compiled; a compiled one has no second derivative."""
    norms: list[Any]
    """Every spectral_norm that iterates; its vectors are kept, or each evaluation would see others."""
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    """Those of every module, and how they were."""

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Look a model through."""
        named = list(model.named_modules())
        tensors = [
            (f"{prefix}.{name}" if prefix else name, tensor)
            for prefix, module in named
            for members in (module._parameters, module._buffers)
            for name, tensor in members.items()
            if tensor is not None
        ]
        first = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        names: dict[int, list[str]] = {}
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
        modules = [module for _, module in named]
        return cls(
            places={name: tuple(names[id(tensor)]) for name, tensor in first.items()},
            is_compiled=any(is_compiled(module) for module in modules),
            norms=[norm for _, _, norm in power_iterations(model)],
            attributes=[
                (m.__dict__, {n: m.__dict__[n] for n in m.__dict__.keys() - _OF_EVERY_MODULE}) for m in modules
            ],
        )

    def by_place(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values under the names that `functional_call` takes, with `tie_weights=False`."""
        return {place: value for name, value in values.items() for place in self.places[name]}

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within it compiled modules run as written, and spectral_norm keeps its vectors."""
        iterations = [norm.n_power_iterations for norm in self.norms]
        for norm in self.norms:
            norm.n_power_iterations = 0
        try:
            if self.is_compiled:
                with torch.compiler.set_stance("force_eager"):
                    yield
            else:
                yield
        finally:
            for norm, before in zip(self.norms, iterations, strict=True):
                norm.n_power_iterations = before

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After it no module has a tensor as an attribute that was set within: a weight made by a hook, an output."""
        try:
            yield
        finally:
            for attributes, before in self.attributes:
                for name in attributes.keys() - _OF_EVERY_MODULE:
                    value = attributes[name]
                    if value is not before.get(name) and isinstance(value, Tensor):
                        del attributes[name]
                        if name in before:
                            attributes[name] = before[name]
