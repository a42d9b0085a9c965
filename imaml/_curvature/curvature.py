"""The curvature of a chunk's loss at one point, as a linear operator: which products it has is decided here."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml._curvature.derivatives import Derivatives
from imaml._curvature.finite_difference import FiniteDifference
from imaml._curvature.gauss_newton import GaussNewton
from imaml._curvature.product import Graph, HvpMode, Product, Sum
from imaml._losses.gradient import Gradient
from imaml._losses.loss import Loss
from imaml._losses.slice import Slice
from imaml._torch import LACKS_SECOND_DERIVATIVE
from imaml_solvers import LinearOperator


class Curvature(LinearOperator):
    """H, or the Gauss-Newton matrix G in its place, of the losses of a chunk at `phi`; vectors are `(tasks, n)`.

    Args:
        derivatives: How the losses are differentiated.
        loss: Whose curvature it is. Where it has several slices, these are evaluated anew in every product.
        phi: The point.
        step: The inner step, which keys random draws.
        mode: How products with H are computed. Once "auto" has fallen back on finite differences, it does so for the
            whole call.
        graph: What is kept between products.
        gauss_newton: Whether products are those of G; the mixed ones are those of H in any case.
    """

    makes_new = True

    def __init__(
        self,
        derivatives: Derivatives,
        loss: Loss,
        phi: Tensor,
        step: int,
        *,
        mode: HvpMode,
        graph: Graph,
        gauss_newton: bool = False,
    ) -> None:
        self._derivatives, self._loss, self._phi, self._step, self._record = derivatives, loss, phi, step, loss.record
        self._asked, self._gauss_newton, self._tasks = mode, gauss_newton, loss.tasks
        inexact = not derivatives.has_second or self._record.mode == "finite-difference"
        self._mode: HvpMode = "finite-difference" if mode == "auto" and inexact else mode
        self._record.gauss_newton |= gauss_newton
        self._all = self._product_of_all(graph)
        if self._all is not None and self._all.gradient is not None:
            self._record.gradients += loss.tasks
            self._note(self._all)

    def take_gradient(self) -> Gradient | None:
        """The support loss and its gradient at phi, where they come at no cost; kept no longer."""
        if self._all is None:
            return None
        gradient, self._all.gradient = self._all.gradient, None
        return gradient

    def mv(self, x: Tensor) -> Tensor:
        """The product with x, a new tensor."""
        return self.product(x)[0]

    def product(self, w: Tensor, *, mixed: bool = False, into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """H w `(tasks, n)` and, if `mixed`, the derivative of g' w by the shared parameters, summed over tasks.

        Args:
            w: What is multiplied.
            mixed: Whether that is wanted.
            into: A vector of one's own, apart from w, to which H w is added, which saves one.

        Returns:
            H w, a new tensor, or `into`; and the mixed product.
        """
        if mixed and self._gauss_newton:
            # The Gauss-Newton mixed product would drop the term that a linear head on a learned body lives on.
            at = (self._derivatives, self._loss, self._phi, self._step)
            return Curvature(*at, mode=self._asked, graph=Graph.REBUILT).product(w, mixed=True, into=into)
        self._record.products += self._tasks
        total = None if into is None else Sum(into)
        try:
            if self._all is not None:
                self._note(self._all)
                return self._all(w, mixed=mixed, into=total)
            return self._by_slices(w, mixed=mixed, into=into)
        except RuntimeError as error:
            self._all = self._instead(error)
        # Not in the except block, which holds the graphs of what has failed.
        return self._all(w, mixed=mixed, into=total)

    def _note(self, product: Product) -> None:
        if not self._gauss_newton:
            self._record.mode = self._record.mode or product.mode

    def _product_of_all(self, graph: Graph) -> Product | None:
        """One product for all of the loss; None where it is a sum over slices."""
        if self._mode == "finite-difference" and not self._gauss_newton:
            return FiniteDifference(self._derivatives, self._loss, self._phi, self._step)
        if len(self._loss.slices) > 1:
            return None
        try:
            return self._product_of(self._loss.slices[0][1], graph)
        except RuntimeError as error:
            instead = self._instead(error)
        return instead

    def _product_of(self, part: Slice, graph: Graph) -> Product:
        if self._gauss_newton:
            return GaussNewton(part, self._phi, self._step, graph)
        return self._derivatives.product_of(part, self._phi, self._step, graph, self._mode)

    def _by_slices(self, w: Tensor, *, mixed: bool, into: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Slice by slice, each built and released before the next."""
        total, total_mixed = torch.zeros_like(w) if into is None else into, None
        for i, (weight, part) in enumerate(self._loss.slices):
            product, its = self._product_of(part, Graph.REBUILT), Sum(total, weight)
            self._note(product)
            try:
                _, its_mixed = product(w, mixed=mixed, into=its)
            except RuntimeError as error:
                if into is not None and (i > 0 or its.has_begun):
                    raise _half_way(error) from error
                raise
            if its_mixed is not None:
                its_mixed.mul_(weight)
                total_mixed = its_mixed if total_mixed is None else total_mixed.add_(its_mixed)
        return total, total_mixed

    def _instead(self, error: RuntimeError) -> FiniteDifference:
        """Finite differences, where `auto` meets an operation without second derivatives; else raises."""
        if self._gauss_newton or not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
            raise error
        if self._asked != "auto":
            raise RuntimeError(
                f"hvp={self._asked!r} met an operation that does not support it ({error}). Use hvp='auto', another "
                "exact mode, or 'finite-difference', which needs first derivatives only."
            ) from error
        self._mode = self._record.mode = "finite-difference"
        return FiniteDifference(self._derivatives, self._loss, self._phi, self._step)


def _half_way(error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"An operation of the model failed in a second derivative, when a part of it had been added up ({error}). "
        "Expected one whose lack of a second derivative is known before: use hvp='finite-difference'."
    )
