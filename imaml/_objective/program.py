"""What a loss judges: the output of a model, or named parameters themselves."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imaml._objective.blocks import Blocks, blocks_of, listed
from imaml._objective.buffers import BufferPolicy, check_buffers, statistics
from imaml._objective.faithful import Survey
from imaml._objective.reach import modules_in, parameters_in
from imaml._tasks import Batch

Parameters = Mapping[str, Tensor]
Losses = tuple[Callable[..., Any] | None, ...]


class Program(ABC):
    """From named parameters and a batch to what a loss judges."""

    model: nn.Module | None = None

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name, as the user holds them."""

    @abstractmethod
    def subject(self, values: Parameters, batch: Batch, survey: Survey, *, recording: bool = False) -> tuple[Any, Any]:
        """What is judged, and what by, at these parameters; `recording`: running statistics among them are updated."""

    @abstractmethod
    def double(self, losses: Losses) -> tuple[Program, Losses]:
        """Copies in float64, of the losses too where they hold tensors."""

    def first_names(self) -> dict[str, str]:
        """Every name of a parameter, to the first: a tied one has several."""
        return {name: name for name in self.parameters()}

    def trainable(self, parameter: Tensor) -> bool:
        """Whether a parameter that nobody has chosen is to be learned."""
        return True

    def check(self) -> None:  # noqa: B027
        """Raise ValueError where a forward pass in the present state would change it."""

    def statistics(self) -> list[str]:
        """Names of the buffers that follow each task's inner loop."""
        return []

    def survey(self) -> Survey:
        """What a forward pass needs."""
        return Survey.of(None)


class ModelProgram(Program):
    """A model, used as it is, on batches `(input, target)`."""

    model: nn.Module

    def __init__(self, model: nn.Module, buffers: BufferPolicy | None, recompute: Blocks) -> None:
        blocks = listed(recompute)
        blocks_of(model, blocks)
        self.model, self.buffers, self.recompute = model, buffers, blocks

    def parameters(self) -> dict[str, Tensor]:
        """See `Program`."""
        _reshard(self.model)
        return {**parameters_in(self.model)}

    def subject(self, values: Parameters, batch: Batch, survey: Survey, *, recording: bool = False) -> tuple[Any, Any]:
        """See `Program`: the output."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"A model's batch must be (input, target). Got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
                + ": for other batches use Objective.from_function."
            )
        inputs = batch[0]
        is_many = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")  # a named tuple is one thing
        args = () if isinstance(inputs, dict) else tuple(inputs) if is_many else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        with survey.running(values, None if recording else self.buffers):
            return self.model(*args, **kwargs), batch[1]

    def double(self, losses: Losses) -> tuple[Program, Losses]:
        """See `Program`."""
        # deepcopy wants storage, which compressed sparse tensors have not
        sparse = {id(b): b.detach().clone() for b in self.model.buffers() if b.layout is not torch.strided}
        try:
            model, losses = copy.deepcopy((self.model, losses), sparse)
        except (RuntimeError, TypeError) as error:
            raise TypeError(
                f"{type(self.model).__name__} or its loss cannot be copied ({error}). Expected a module that "
                "copy.deepcopy accepts: make tensors it keeps besides parameters and buffers leaves, with .detach()."
            ) from error
        for module in (model, *losses):
            if isinstance(module, nn.Module):
                module.double()
        return ModelProgram(model, self.buffers, self.recompute), losses

    def first_names(self) -> dict[str, str]:
        """See `Program`."""
        first = {p: n for n, p in self.model.named_parameters()}
        return {n: first[p] for n, p in self.model.named_parameters(remove_duplicate=False)}

    def trainable(self, parameter: Tensor) -> bool:
        """See `Program`."""
        return parameter.requires_grad

    def check(self) -> None:
        """See `Program`."""
        if self.buffers is None:
            check_buffers(self.model)

    def statistics(self) -> list[str]:
        """See `Program`."""
        return statistics(self.model) if self.buffers == "update" else []

    def survey(self) -> Survey:
        """See `Program`."""
        return Survey.of(self.model, self.recompute)


def _reshard(model: nn.Module) -> None:
    """Let FSDP forget the parameters that it has gathered, and show its shards."""
    # Another thread may be importing it, and have got half way.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:
        for module in modules_in(model):
            if isinstance(module, kind):
                module.reshard()


class FunctionProgram(Program):
    """Named parameters, for a loss that is a function of them and of a batch."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params

    def parameters(self) -> dict[str, Tensor]:
        """See `Program`."""
        return self.params

    def subject(self, values: Parameters, batch: Batch, survey: Survey, *, recording: bool = False) -> tuple[Any, Any]:
        """See `Program`: the parameters."""
        return {name: values.get(name, tensor) for name, tensor in self.params.items()}, batch

    def double(self, losses: Losses) -> tuple[Program, Losses]:
        """See `Program`; tensors in a function's closure stay as they are."""
        params = {n: t.detach().clone() for n, t in self.params.items()}
        params = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in params.items()}
        return FunctionProgram(params), losses
