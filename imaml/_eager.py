"""What a model asks of torch that no second derivative survives: recomputation and compilation, both switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from imaml._torch import is_compiled, without_checkpoints


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within it, `torch.utils.checkpoint` calls its function and keeps what it saves; compiled modules run as written.

    A checkpointed function is recomputed in the backward pass, when the model has its own parameters again: without a
    word, the derivatives would be those of a mixture of two models.
    """
    with ExitStack() as stack:
        if any(is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_checkpoints())
        yield
