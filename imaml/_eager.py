"""What a model asks of torch that no second derivative survives: recomputation and compilation, both switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

_checkpoint: Any = torch.utils.checkpoint


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within it, `torch.utils.checkpoint` calls its function and keeps what it saves; compiled modules run as written.

    A checkpointed function is recomputed in the backward pass, when the model has its own parameters again: without a
    word, the derivatives would be those of a mixture of two models.
    """
    with ExitStack() as stack:
        if any(_is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_checkpoints())
        yield


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


class _Plain:
    """In place of `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of the generator that prepares a recomputation."""
    yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    before = _checkpoint.CheckpointFunction, _checkpoint._checkpoint_without_reentrant_generator
    _checkpoint.CheckpointFunction, _checkpoint._checkpoint_without_reentrant_generator = _Plain, _plain
    try:
        yield
    finally:
        _checkpoint.CheckpointFunction, _checkpoint._checkpoint_without_reentrant_generator = before
