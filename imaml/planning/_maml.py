"""What exact MAML costs."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from imaml._point import Point
from imaml._problem import Problem
from imaml.inner import InnerOptimizer
from imaml.inner._base import State
from imaml.planning._costs import INEXACT, LINEARISED, REBUILT, Chunk, Costs, Facts, Stages, Work, typical_phi
from imaml.planning._schedule import sweep


class MAMLCosts(Costs):
    """K inner steps, of which the last are differentiated, the last first.

    On the way there it holds the states before each of them, or m of these, or the graphs as well; on the way back what
    is left of them, the cotangents of the state and of the gradient, and one Hessian-vector product.
    """

    def variants(self, device: torch.device) -> list[dict[str, Any]]:
        """Kept graphs, or states: all of them, few or none on the device, or all elsewhere."""
        engine, steps = self.engine, self._differentiated
        if engine.linearize is not None or engine.checkpoints is not None or engine.storage != "device":
            return [{"linearize": bool(engine.linearize)}]
        found: list[dict[str, Any]] = [{"linearize": False}]
        if engine.microbatch_size is None:
            found.insert(0, {"linearize": True})
        fewer = [m for m in (isqrt(steps), 1, 0) if m < steps - 1]
        found += [{"linearize": False, "checkpoints": m} for m in dict.fromkeys(fewer)]
        elsewhere = ("disk",) if device.type == "cpu" else ("cpu", "disk")
        return found + [{"linearize": False, "storage": where} for where in elsewhere if steps > 1]

    @property
    def _linearizes(self) -> bool:
        engine = self.engine
        if engine.linearize is not None:
            return bool(engine.linearize)
        free = engine.checkpoints is None and engine.storage == "device" and engine.microbatch_size is None
        return self.keeps_graphs and free

    @property
    def _differentiated(self) -> int:
        return int(self.engine.inner.steps - self.engine._first)

    def _measure(self, problem: Problem, stages: Stages) -> None:
        if self._differentiated == 0:
            return
        last, mode = problem.inner.steps - 1, self.engine.hvp
        state = problem.optimizer.start(typical_phi(problem))
        if self._linearizes and stages.missing("linearised"):
            with stages.account.stage("linearised"):
                point, gradient = Point.with_gradient(problem, state, last, mode)
                following = problem.update(state, gradient, last)
                del gradient
            _pull_back(point, stages, "linearised product")
            del point, following
        if not self._linearizes and stages.missing("rebuilt"):
            with stages.account.stage("rebuilt"):
                point = Point.at(problem, state, last, mode)
            _pull_back(point, stages, "rebuilt product")
            del point

    def peak(self, chunk: Chunk) -> float:
        """See the class."""
        steps, vector, state = self._differentiated, chunk.vector, chunk["step"].held if self.engine.inner.steps else 0
        if steps == 0:
            return max(self.inner_peak(chunk), self.query_peak(chunk))
        cotangents = chunk["query"].held + vector * (chunk.facts.damped + self._buffers)
        if self._linearizes:
            graph, product = chunk["linearised"], chunk["linearised product"]
            return max(
                (steps - 1) * graph.held + graph.peak,
                steps * graph.held + chunk["query"].peak,
                steps * graph.held - state + cotangents + product.peak,
            )
        plan, step, point, product = (
            sweep(steps, self.engine.checkpoints),
            chunk["step"],
            chunk["rebuilt"],
            chunk["rebuilt product"],
        )
        last = (1 + chunk.facts.needs_gradient) * vector if steps > 1 else 0  # w and the gradient of the step after
        return max(
            self._stored(plan.forward) * state + step.peak,
            self._stored(plan.forward) * state + self.query_peak(chunk),
            0 if plan.again is None else self._stored(plan.again + 1) * state + cotangents + last + step.peak,
            self._stored(plan.reverse) * state + cotangents + last + point.peak,
            self._stored(plan.reverse) * state + cotangents + point.held + product.peak,
        )

    @property
    def _buffers(self) -> int:
        assert isinstance(self.engine.inner, InnerOptimizer)
        return self.engine.inner.buffers

    def _stored(self, states: int) -> int:
        """How many of these states are on the device: away from it, one and the next."""
        return states if self.engine.storage == "device" else min(states, 1 + (self.engine.storage == "cpu"))

    def work(self, facts: Facts) -> Work:
        """K + 1 gradients, those of recomputed steps, and K products."""
        steps = self._differentiated
        inexact = facts.mode == "finite-difference"
        if self._linearizes:
            gradients, each = steps, INEXACT if inexact else LINEARISED
        else:
            again = steps if facts.needs_gradient else 0
            gradients = sweep(steps, self.engine.checkpoints).steps + again
            each = INEXACT if inexact else LINEARISED if again else REBUILT
        gradients += self.engine._first + 1
        return Work(gradients=gradients, hvps=steps, equivalents=gradients + each * steps)


def _pull_back(point: Point, stages: Stages, name: str) -> None:
    """One step of the sweep, from cotangents that it gives back."""
    cotangents: State = tuple(torch.ones_like(part) for part in point.state)
    with stages.account.stage(name):
        cotangents, w = point.pull_through_update(cotangents)
        product = point.curvature.product(w, mixed=bool(point.problem.support.context.fixed))
    del cotangents, w, product
