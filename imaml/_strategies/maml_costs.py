"""What exact MAML costs."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from imaml._curvature.product import Graph
from imaml._engine.problem import Problem
from imaml._strategies.point import Point
from imaml._strategies.schedule import sweep
from imaml._strategies.storage import most_on_device
from imaml._strategies.tape import Tape
from imaml.inner._inner_problem import State
from imaml.planning._costs import ChunkUse, Costs, Facts, Stages, Work

_MOVED = {"device": 0.0, "cpu": 0.1, "disk": 1.0}
"""What storing a byte of a state and reading it back costs, in bytes of a graph."""


class MAMLCosts(Costs):
    """K inner steps, of which the last are differentiated, the last first.

    On the way there it holds the states before each of them, or m of these, or the graphs as well; on the way back what
    is left of them, the cotangents of the state and of the gradient, and one Hessian-vector product.
    """

    def variants(self, device: torch.device) -> list[dict[str, Any]]:
        """Kept graphs, or states: all of them, few or none on the device, or all elsewhere."""
        tape: Tape = self.engine._tape(keeps_graphs=True)
        if self.engine.linearize is not None or self.engine._without_graphs.keys() & {"checkpoints", "storage"}:
            return [{}]
        found: list[dict[str, Any]] = [{"linearize": True}, {"linearize": False}] if tape.keeps_graphs else [{}]
        fewer = [m for m in (isqrt(tape.steps), 1, 0) if m < tape.steps - 1]
        found += [{"checkpoints": m} for m in dict.fromkeys(fewer)]
        elsewhere = ("disk",) if device.type == "cpu" else ("cpu", "disk")
        return found + [{"storage": where} for where in elsewhere if tape.steps > 1]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Another exact mode of products, which the stages of a forecast do not tell apart."""
        return [{"hvp": "forward-over-reverse"}]

    @property
    def _tape(self) -> Tape:
        tape: Tape = self.engine._tape(keeps_graphs=self.keeps_graphs)
        return tape

    def _measure(self, problem: Problem, stages: Stages) -> None:
        tape = self._tape
        if tape.steps == 0:
            return
        last, mode = problem.inner.steps - 1, self.engine.hvp
        state = problem.optimizer.start(stages.before)
        if tape.keeps_graphs and stages.missing("kept"):
            with stages.account.stage("kept"):
                point, gradient = Point.with_gradient(problem, state, last, mode)
                following = problem.update(state, gradient, last)
                del gradient
            _pull_back(point, stages, "kept product")
            del point, following
        if not tape.keeps_graphs and stages.missing("rebuilt"):
            with stages.account.stage("rebuilt"):
                point = Point.at(problem, state, last, mode)
            _pull_back(point, stages, "rebuilt product")
            del point

    def peak(self, chunk: ChunkUse) -> float:
        """See the class."""
        if self._tape.steps == 0:
            return max(self.inner_peak(chunk), self.query_peak(chunk))
        cotangents = chunk["query"].held + chunk.vector * chunk.facts.damped
        peaks = self._with_graphs if self._tape.keeps_graphs else self._with_states
        return max(peaks(chunk, cotangents))

    def _with_graphs(self, chunk: ChunkUse, cotangents: float) -> list[float]:
        """On the way to the end and at the last step, then at the one before; the first graph holds the first state."""
        steps, graph, product = self._tape.steps, chunk["kept"], chunk["kept product"]
        given, (zeros, buffers) = self._given(chunk), self._of_buffers(chunk)
        left = given + steps * graph.held - self._state(chunk)
        return [
            given + (steps - 1) * graph.held + graph.peak,
            given + steps * graph.held + chunk["query"].peak,
            left + cotangents + zeros + product.peak,
            left - graph.held + cotangents + buffers + chunk.vector + product.peak if steps > 1 else 0,
        ]

    def _with_states(self, chunk: ChunkUse, cotangents: float) -> list[float]:
        """As `_with_graphs`, without graphs: before a step is differentiated, the one before still has its state."""
        step, point, product = chunk["step"], chunk["rebuilt"], chunk["rebuilt product"]
        tape, (zeros, buffers) = self._tape, self._of_buffers(chunk)
        counts = sweep(tape.steps, tape.checkpoints)
        gradient, given = chunk.vector * chunk.facts.needs_gradient, self._given(chunk)
        always = given if tape.first else 0
        stepping = always + chunk.theta * chunk.facts.damped

        def stored(states: int) -> float:
            """Bytes of these on the device."""
            return self._state(chunk) * most_on_device(tape.storage, chunk.facts.device, states)

        peaks = [
            given + step.peak,
            stepping + stored(counts.forward) + step.peak,
            always + stored(counts.forward) + self.query_peak(chunk),
            always + stored(counts.forward) + cotangents + zeros + max(point.peak, point.held + product.peak),
        ]
        if tape.steps > 1:
            before = cotangents + buffers + gradient
            peaks += [
                always + stored(counts.point) + before + chunk.vector + point.peak,
                always + stored(counts.reverse) + before + point.held + product.peak,
            ]
            if counts.again is not None:
                peaks.append(stepping + stored(counts.again) + before + chunk.vector + step.peak)
        peaks.append(given + cotangents + buffers + gradient + point.held + product.peak)
        return peaks

    def _state(self, chunk: ChunkUse) -> float:
        return chunk.vector * (1 + self._buffers)

    def _given(self, chunk: ChunkUse) -> float:
        """The state before the first step that is differentiated."""
        return self._state(chunk) if self._tape.first else chunk.theta + chunk.vector * self._buffers

    def _of_buffers(self, chunk: ChunkUse) -> tuple[float, float]:
        """Cotangents of the optimiser's buffers: one vector of zeros for all of them, and later one for each."""
        return chunk.vector * (self._buffers > 0), chunk.vector * self._buffers

    @property
    def _buffers(self) -> int:
        buffers: int = self.engine.inner.buffers
        return buffers

    def work(self, facts: Facts) -> Work:
        """K + 1 gradients, those of recomputed steps, and K products."""
        tape, steps = self._tape, self._tape.steps
        with_gradient = tape.keeps_graphs or facts.needs_gradient
        advances = 0 if tape.keeps_graphs else sweep(steps, tape.checkpoints).steps
        gradients = tape.first + advances + steps * with_gradient + 1
        equivalents = gradients + steps * facts.product(Graph.ONCE if with_gradient else Graph.REBUILT)
        state = facts.adapted * facts.dtype.itemsize * (1 + self._buffers)
        transfer = _MOVED[tape.storage] * tape.most_states * state
        return Work(gradients=gradients, hvps=steps, equivalents=equivalents, transfer=transfer)


def _pull_back(point: Point, stages: Stages, name: str) -> None:
    """One step of the sweep, from cotangents that it gives back."""
    cotangents: State = tuple(torch.ones_like(part) for part in point.state)
    with stages.account.stage(name):
        cotangents, w = point.pull_through_update(cotangents)
        product = point.curvature.product(w, mixed=bool(point.problem.snapshot.shared))
    del cotangents, w, product
