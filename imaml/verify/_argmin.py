"""The stationary point of an inner problem to rounding, by Newton's method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml.verify._plain_cg import NegativeCurvature, Product, solve
from imaml.verify._reference import Reference, Values, flat, unflat

NEWTON_STEPS = 100
STATIONARY = 1e-9
NEAR = 1e-5
SOLVED = 1e-13


class NoMinimum(Exception):
    """The inner problem has no minimum that can be found to rounding; the message is the reason."""


@dataclass(frozen=True)
class Anchor:
    """A second proximal term, about a point that does not move with theta: what damping adds to the inner objective."""

    at: Values
    weights: Mapping[str, float | Tensor]

    def term(self, values: Values) -> Tensor:
        """1/2 sum of weights (values - at)^2."""
        parts = [(w / 2 * (values[n] - self.at[n]).square()).sum() for n, w in self.weights.items()]
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class InnerProblem:
    """The inner objective J of one task as a function of the flat adapted parameters."""

    reference: Reference
    start: Values
    """theta, and every other parameter."""
    batch: Any
    anchor: Anchor | None = None

    @property
    def _like(self) -> Values:
        return {n: self.start[n] for n in self.reference.adapted}

    def values(self, phi: Tensor) -> Values:
        """All parameters at phi."""
        return self.start | unflat(phi, self._like)

    def derivatives(self, phi: Tensor) -> tuple[Tensor, Product]:
        """Gradient of J at phi, and Hessian-vector products there by double backward."""
        leaf = phi.detach().requires_grad_()
        with torch.enable_grad():
            others = {n: t.detach().requires_grad_() for n, t in self.start.items()}  # a loss may ask
            loss = self._objective(others | unflat(leaf, self._like))
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)

        def product(w: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(w)
            return torch.autograd.grad(gradient, leaf, w, retain_graph=True, materialize_grads=True)[0]

        return gradient.detach(), product

    def value(self, phi: Tensor) -> float:
        """J at phi."""
        return self.reference.value(lambda leaves: self._objective(dict(leaves)), self.values(phi)).item()

    def _objective(self, values: Values) -> Tensor:
        loss = self.reference.inner_loss(values, self.start, self.batch)
        return loss if self.anchor is None else loss + self.anchor.term(values)

    def minimise(self, phi: Tensor) -> Tensor:
        """The minimum that Newton's method with backtracking finds from phi.

        Stops when the gradient no longer falls, which is at rounding.

        Args:
            phi: Where to start.

        Returns:
            The iterate of the least gradient.

        Raises:
            NoMinimum: Negative curvature, or the gradient stalled above 1e-9 of its scale.
        """
        scale = self._scale(phi)
        best, least, stalls = phi, float("inf"), 0
        for _ in range(NEWTON_STEPS):
            gradient, product = self.derivatives(phi)
            size = gradient.norm().item()
            stalls = 0 if size < least / 2 else stalls + 1
            if size < least:
                best, least = phi, size
            if size <= SOLVED * scale or (least <= 1e-11 * scale and stalls) or stalls == 8:
                break
            step = self._newton_step(product, gradient, size / scale)
            phi = phi + step if size < NEAR * scale else self._line_search(phi, step, gradient)
        if not least <= STATIONARY * scale:
            raise NoMinimum(
                f"the inner problem could not be solved to rounding: its gradient stalls at {least / scale:.1g} of its "
                "scale, as happens where the stationary point lies on a kink (ReLU, max pooling) or there is none"
            )
        return best

    def _scale(self, phi: Tensor) -> float:
        gradient = flat(self.reference.gradient(lambda v: self.reference.loss(v, self.batch), self.values(phi)))
        values, damping = self.values(phi), self.reference.damping_at(self.start)
        weights = [float((w * (values[n] - self.start[n])).norm()) for n, w in damping.items()]
        return float(gradient.norm()) + math.fsum(weights) + 1e-12

    def _newton_step(self, product: Product, gradient: Tensor, size: float) -> Tensor:
        """Far from the minimum, curvature is shifted until no direction of the solve shows a negative one."""
        shift, rtol = 0.0, min(1e-2, max(size, SOLVED / 2 / size))
        while True:
            try:
                return solve(lambda w, shift=shift: product(w) + shift * w, -gradient, rtol=rtol)  # type: ignore[misc]
            except NegativeCurvature as error:
                if size < NEAR:
                    raise NoMinimum(
                        "the inner problem is not convex where it was solved (negative curvature): there the implicit "
                        "meta-gradient is not defined; use a larger `regularization`"
                    ) from error
                shift = max(4 * shift, -error.curvature)

    def _line_search(self, phi: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
        before, slope, length = self.value(phi), torch.dot(gradient, step).item(), 1.0
        while length > 1e-4 and self.value(phi + length * step) > before + 1e-4 * length * slope + 1e-13 * abs(before):
            length /= 2
        return phi + length * step
