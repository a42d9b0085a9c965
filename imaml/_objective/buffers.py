"""What happens to buffers that a model updates in training mode: running statistics, and spectral_norm's vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imaml._objective.reach import buffers_in, modules_in
from imaml._torch import inside_transform, is_spectral_norm

BufferPolicy = Literal["batch", "frozen", "update"]
"""`batch`: normalise by batch statistics. `frozen`: by the running statistics, as in eval mode. `update`: as `batch`,
and carry the running statistics of every task through its inner loop."""


def check_policy(policy: str | None) -> None:
    """Raise ValueError for an unknown policy."""
    if policy is not None and policy not in get_args(BufferPolicy):
        raise ValueError(f"`buffers` must be None, 'batch', 'frozen' or 'update'. Got {policy!r}.")


def check_buffers(model: nn.Module) -> None:
    """Raise ValueError where a module would update buffers of which no policy says what becomes."""
    tracking = [m for m in modules_in(model) if m.training and getattr(m, "track_running_stats", False)]
    for name, module in model.named_modules() if tracking else ():
        if module in tracking:
            raise ValueError(
                f"{type(module).__name__} {name!r} updates running statistics in training mode, which would leak "
                "from task to task. Say what becomes of them by Objective(..., buffers='batch'), 'frozen' or 'update'; "
                "or build it with track_running_stats=False (batch statistics), or call .eval() on it (fixed "
                "statistics)."
            )
    for name, module, _ in power_iterations(model):
        if module.training:
            layer = name.partition(".parametrizations")[0]
            raise ValueError(
                f"spectral_norm of {layer!r} updates its vectors in training mode, and torch's derivatives leave out "
                "that they depend on the weight. Fix them during a call by "
                "Objective(..., buffers='batch') or 'frozen', or call .eval() on it."
            )


def statistics(model: nn.Module) -> list[str]:
    """Names of the buffers that normalisation layers update in training mode, the first of a shared one."""
    moving = {
        buffer
        for module in modules_in(model)
        if module.training and getattr(module, "track_running_stats", False)
        for buffer in module.buffers(recurse=False)
    }
    return [name for name, buffer in model.named_buffers() if buffer in moving]


@dataclass
class HeldBuffers:
    """The buffers of modules that a loss holds: an evaluation sees copies of them."""

    places: list[tuple[dict[str, Tensor | None], str, Tensor, bool]]
    """Where each stands, its name there, the buffer itself, and whether it may be written to without a new version."""
    _kept: list[Tensor] = field(default_factory=list)
    _afresh: bool = False

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> HeldBuffers:
        """The buffers of some modules."""
        return cls(
            [
                (module._buffers, name, buffer, bool(getattr(module, "track_running_stats", False)))
                for module in modules
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]
        )

    def copies(self, *, afresh: bool) -> list[Tensor]:
        """Give the modules copies: new ones if asked, or where the last evaluation has changed the others."""
        if afresh or not self._kept:
            copies = [buffer.detach().clone() for _, _, buffer, _ in self.places]
        else:
            copies = self._kept
        self._kept, self._afresh = [], afresh
        for (place, name, _, _), copy in zip(self.places, copies, strict=True):
            place[name] = copy
        return copies

    def put_back(self, copies: list[Tensor], *, failed: bool) -> None:
        """Give the modules their buffers again; copies that a failing evaluation may have written to are not kept."""
        for place, name, buffer, _ in self.places:
            place[name] = buffer
        if failed or self._afresh:
            return
        pairs = zip(copies, self.places, strict=True)
        if not any(differ(c, b) if silent else c._version > 0 for c, (_, _, b, silent) in pairs):
            self._kept = copies

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Within it the modules have new copies."""
        copies = self.copies(afresh=True)
        try:
            yield
        finally:
            self.put_back(copies, failed=False)


@dataclass
class Constants:
    """Copies of a model's buffers, so that a forward pass cannot change the model; made anew where one has changed."""

    buffers: Mapping[str, Tensor]
    _copies: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | None) -> Constants:
        """Copies of the buffers of a model, if there is one."""
        constants = cls({} if model is None else buffers_in(model))
        constants._copies = constants._copied()
        return constants

    def fresh(self) -> dict[str, Tensor]:
        """Copies that nothing has written to."""
        if not self.buffers:
            return {}
        if inside_transform():
            return self._copied()
        if any(map(differ, self._copies.values(), self.buffers.values())):
            self._copies = self._copied()
        return self._copies

    def _copied(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.buffers.items()}


def differ(copy: Tensor, buffer: Tensor) -> bool:
    """Whether a copy was written to, be it through `.data` or by batch_norm, which raise no version."""
    return copy._version > 0 or (copy.layout is torch.strided and not torch.equal(copy, buffer))


def power_iterations(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every spectral_norm of more than a vector, with the module in whose training mode it updates."""
    if not any([m._forward_pre_hooks or hasattr(m, "n_power_iterations") for m in modules_in(model)]):
        return
    for name, module in model.named_modules():
        for norm in (module, *module._forward_pre_hooks.values()):
            if is_spectral_norm(norm):
                yield name, module, norm


class Statistics(TorchFunctionMode):
    """Within it, normalisation that would update running statistics follows a policy, and updates nothing."""

    def __init__(self, policy: BufferPolicy) -> None:
        super().__init__()
        self._replaced = _FROZEN if policy == "frozen" else _BATCH

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what replaces it."""
        return self._replaced.get(func, func)(*args, **(kwargs or {}))


def _frozen_batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if mean is not None:
        kwargs["training"] = False
    return F.batch_norm(x, mean, var, *args, **kwargs)


def _batch_norm_by_batch(x: Tensor, mean: Tensor | None, var: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs["training"]:
        mean = var = None
    return F.batch_norm(x, mean, var, *args, **kwargs)


def _frozen_instance_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs["running_mean"] is not None:
        kwargs["use_input_stats"] = False
    return F.instance_norm(x, *args, **kwargs)


def _instance_norm_by_batch(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs["use_input_stats"]:
        kwargs["running_mean"] = kwargs["running_var"] = None
    return F.instance_norm(x, *args, **kwargs)


_Replaced = Mapping[Callable[..., Any], Callable[..., Any]]
_FROZEN: _Replaced = {F.batch_norm: _frozen_batch_norm, F.instance_norm: _frozen_instance_norm}
_BATCH: _Replaced = {F.batch_norm: _batch_norm_by_batch, F.instance_norm: _instance_norm_by_batch}
