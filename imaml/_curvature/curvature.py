"""Which HVP mode a model gets, decided at the first product and kept for the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

from torch import Tensor

from imaml._curvature.compiled import CompiledLoss, CompiledProduct
from imaml._curvature.exact_products import Accumulated, ForwardOverReverse, Graph, Product, ReverseOverReverse
from imaml._curvature.finite_difference import FiniteDifference
from imaml._losses.chunk import ChunkLoss
from imaml._losses.gradient import Gradient
from imaml._losses.microbatch import Microbatched
from imaml._torch import LACKS_SECOND_DERIVATIVE

T = TypeVar("T")
HvpMode = Literal["auto", "forward-over-reverse", "reverse-over-reverse", "finite-difference"]
"""`auto` is reverse-over-reverse, the fastest exact mode in eager torch, or finite differences for a model that has an
operation without second derivatives."""


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(HvpMode):
        raise ValueError(f"`hvp` must be one of {', '.join(get_args(HvpMode))}. Got {mode!r}.")


class Curvature:
    """The Hessian of the support loss of a chunk at `phi`."""

    def __init__(self, loss: ChunkLoss | Microbatched, phi: Tensor, step: int, *, mode: HvpMode, graph: Graph) -> None:
        self._loss, self._phi, self._step, self._context = loss, phi, step, loss.context
        self._asked = mode
        self._mode = (self._context.hvp_mode or "reverse-over-reverse") if mode == "auto" else mode
        self._product: Product = self._or_finite_difference(lambda: self._build(graph))
        if self._product.gradient is not None:
            self._context.hvp_mode = self._context.hvp_mode or self._mode

    def take_gradient(self) -> Gradient | None:
        """The support loss and its gradient at phi, where the mode has it at no cost; it is kept no longer."""
        gradient, self._product.gradient = self._product.gradient, None
        return gradient

    def product(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        """H w `(tasks, n)` and, if `mixed`, the derivative of g' w by the fixed parameters, summed over tasks."""
        self._context.hvps += self._loss.tasks
        result = self._or_finite_difference(lambda: self._product(w, mixed=mixed))
        if isinstance(result, FiniteDifference):
            self._product = result
            result = result(w, mixed=mixed)
        self._context.hvp_mode = self._context.hvp_mode or self._mode
        return result

    def _build(self, graph: Graph) -> Product:
        if self._mode == "finite-difference":
            return FiniteDifference(self._loss, self._phi, self._step)
        parts = self._loss.parts
        if len(parts) > 1:
            at, mode = (self._phi, self._step), self._mode  # a reference to self would keep all of it until collected
            return Accumulated(parts, lambda part: _rebuilt(part, *at, mode))
        return self._exact(parts[0][1], graph)

    def _exact(self, loss: ChunkLoss, graph: Graph) -> Product:
        if graph == "rebuild" or self._mode == "forward-over-reverse":
            return _rebuilt(loss, self._phi, self._step, self._mode)
        self._context.gradients += self._loss.tasks
        if isinstance(loss, CompiledLoss) and loss.is_compiled:
            return CompiledProduct(loss, self._phi, self._step, with_gradient=True)
        return ReverseOverReverse(loss, self._phi, self._step, graph)

    def _or_finite_difference(self, compute: Callable[[], T]) -> T | FiniteDifference:
        """The result; or finite differences, where `auto` meets an operation without second derivatives."""
        try:
            return compute()
        except RuntimeError as error:
            if not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
                raise
            if self._asked != "auto":
                raise RuntimeError(
                    f"hvp={self._asked!r} met an operation that does not support it ({error}). Use hvp='auto', another "
                    "exact mode, or 'finite-difference', which needs first derivatives only."
                ) from error
            self._mode = self._context.hvp_mode = "finite-difference"
            return FiniteDifference(self._loss, self._phi, self._step)


def _rebuilt(loss: ChunkLoss, phi: Tensor, step: int, mode: str) -> Product:
    """An exact product that leaves nothing behind."""
    if mode == "forward-over-reverse":
        return ForwardOverReverse(loss, phi, step)
    if isinstance(loss, CompiledLoss) and loss.is_compiled:
        return CompiledProduct(loss, phi, step, with_gradient=False)
    return ReverseOverReverse(loss, phi, step, "rebuild")
