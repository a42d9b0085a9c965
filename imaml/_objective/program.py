"""How a loss is evaluated: through a model, or as a function of named parameters."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml._objective.buffers import BufferPolicy, Statistics, check_buffers, statistics
from imaml._objective.faithful import Survey
from imaml._objective.meta import with_meta
from imaml._tasks import Batch

Parameters = Mapping[str, Tensor]


class ModelProgram:
    """`loss(model(input), target)`, with the model used as it is."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        outer_loss: Callable[..., Any] | None,
        metric: Callable[..., Any] | None,
        buffers: BufferPolicy | None,
    ) -> None:
        self.model, self.loss, self.outer_loss, self.metric, self.buffers = model, loss, outer_loss, metric, buffers
        self._inner, self._outer = with_meta(loss), with_meta(outer_loss or loss)

    def parameters(self) -> dict[str, Tensor]:
        _reshard(self.model)
        return dict(self.model.named_parameters())

    def first_names(self) -> dict[str, str]:
        """Every name of a parameter, to the first: a tied one has several."""
        first = {p: n for n, p in self.model.named_parameters()}
        return {n: first[p] for n, p in self.model.named_parameters(remove_duplicate=False)}

    def trainable(self, parameter: Tensor) -> bool:
        return parameter.requires_grad

    def constants(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def double(self) -> ModelProgram:
        # deepcopy wants storage, which compressed sparse tensors have not
        sparse = {id(b): b.detach().clone() for b in self.model.buffers() if b.layout is not torch.strided}
        try:
            model, loss, outer_loss = copy.deepcopy((self.model, self.loss, self.outer_loss), sparse)
        except (RuntimeError, TypeError) as error:
            raise TypeError(
                f"{type(self.model).__name__} or its loss cannot be copied ({error}). Expected a module that "
                "copy.deepcopy accepts: make tensors it keeps besides parameters and buffers leaves, with .detach()."
            ) from error
        for module in (model, loss, outer_loss):
            if isinstance(module, nn.Module):
                module.double()
        return ModelProgram(model, loss, outer_loss, self.metric, self.buffers)

    def check(self) -> None:
        if self.buffers is None:
            check_buffers(self.model)

    def survey(self) -> Survey:
        return Survey.of(self.model)

    def statistics(self) -> list[str]:
        return statistics(self.model) if self.buffers == "update" else []

    def evaluate(
        self,
        values: Parameters,
        meta: Mapping[str, Any],
        batch: Batch,
        survey: Survey | None,
        *,
        metric: bool,
        outer: bool,
    ) -> tuple[Any, Any]:
        survey = survey or self.survey()
        with survey.restored():  # afterwards: a loss may read what the forward pass has set on the model
            output = self._output(values, batch, survey)
            figure = self.metric(output, batch[1]) if metric and self.metric else None
            return self.judge(output, meta, batch, outer=outer), figure

    def judge(self, output: Any, meta: Mapping[str, Any], batch: Batch, *, outer: bool) -> Any:
        return (self._outer if outer else self._inner)(output, batch[1], meta=meta)

    def predict(
        self, values: Parameters, batch: Batch, survey: Survey | None = None, *, recording: bool = False
    ) -> Any:
        survey = survey or self.survey()
        with survey.restored():
            return self._output(values, batch, survey, recording=recording)

    def _output(self, values: Parameters, batch: Batch, survey: Survey, *, recording: bool = False) -> Any:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"A model's batch must be (input, target). Got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
                + ": for other batches use Objective.from_function."
            )
        inputs = batch[0]
        is_many = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")  # a named tuple is one thing
        args = () if isinstance(inputs, dict) else tuple(inputs) if is_many else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else None
        policy = nullcontext() if self.buffers is None or recording else Statistics(self.buffers)
        with survey.guarded(), policy:
            return functional_call(self.model, survey.by_place(values), args, kwargs, tie_weights=False)


def _reshard(model: nn.Module) -> None:
    """Let FSDP forget the parameters that it has gathered, and show its shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


class FunctionProgram:
    """`loss(params, batch)`."""

    def __init__(
        self,
        params: dict[str, Tensor],
        loss: Callable[..., Any],
        outer_loss: Callable[..., Any] | None,
        metric: Callable[..., Any] | None,
    ) -> None:
        self.params, self.loss, self.outer_loss, self.metric = params, loss, outer_loss, metric
        self._inner, self._outer = with_meta(loss), with_meta(outer_loss or loss)

    def parameters(self) -> dict[str, Tensor]:
        return self.params

    def first_names(self) -> dict[str, str]:
        return {name: name for name in self.params}

    def double(self) -> FunctionProgram:
        params = {n: t.detach().clone() for n, t in self.params.items()}
        params = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in params.items()}
        return FunctionProgram(params, self.loss, self.outer_loss, self.metric)

    def trainable(self, parameter: Tensor) -> bool:
        return True

    def constants(self) -> dict[str, Tensor]:
        return {}

    def check(self) -> None:
        pass

    def statistics(self) -> list[str]:
        return []

    def survey(self) -> None:
        return None

    def evaluate(
        self,
        values: Parameters,
        meta: Mapping[str, Any],
        batch: Batch,
        survey: Survey | None,
        *,
        metric: bool,
        outer: bool,
    ) -> tuple[Any, Any]:
        named = {name: values.get(name, tensor) for name, tensor in self.params.items()}
        loss = (self._outer if outer else self._inner)(named, batch, meta=meta)
        return loss, self.metric(named, batch) if metric and self.metric else None
