"""What exact MAML costs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from math import isqrt
from typing import Any

import torch

from imaml._curvature.product import Graph
from imaml._engine.problem import Problem
from imaml._strategies.point import Point
from imaml._strategies.schedule import Sweep, sweep
from imaml._strategies.storage import most_on_device
from imaml._strategies.tape import Tape
from imaml.inner._inner_problem import State
from imaml.planning._account import Use
from imaml.planning._costs import ChunkUse, Costs, Facts, Stages, Work

_MOVED = {"device": 0.0, "cpu": 0.1, "disk": 1.0}
"""What storing a byte of a state and reading it back costs, in bytes of a graph."""


class MAMLCosts(Costs):
    """K inner steps, of which the last are differentiated, the last first.

    On the way there it holds the states before each of them, or m of these, and the graphs of the last; on the way back
    what is left of them, the cotangents of the state and of the gradient, and one Hessian-vector product.
    """

    def variants(self, device: torch.device) -> list[dict[str, Any]]:
        """All graphs, some or none; and of the states all, few or none on the device, or all elsewhere."""
        tape: Tape = self.engine._tape(graphs=0)
        if self.engine.linearize is not None:
            return [{}]
        without: Collection[str] = self.engine._without_graphs
        some = [] if "microbatch_size" in without else [{"linearize": m} for m in _some(tape.steps)]
        if {"checkpoints", "storage"}.intersection(without):
            return [*some, {}]
        found: list[dict[str, Any]] = [{}] if without else [{"linearize": True}, *some, {"linearize": False}]
        fewer = [m for m in (isqrt(tape.steps), 1, 0) if m < tape.steps - 1]
        found += [{"checkpoints": m} for m in dict.fromkeys(fewer)]
        elsewhere = ("disk",) if device.type == "cpu" else ("cpu", "disk")
        return found + [{"storage": where} for where in elsewhere if tape.steps > 1]

    @property
    def numbers_of_graphs(self) -> list[int]:
        """See `Costs`."""
        most = self.engine._tape(graphs=self.engine.inner.steps)
        is_open = self.engine.linearize is None and most.graphs > 0
        return [most.graphs, *_some(most.graphs), 0] if is_open else [0]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Another exact mode of products, which the stages of a forecast do not tell apart."""
        return [{"hvp": "forward-over-reverse"}]

    @property
    def _tape(self) -> Tape:
        tape: Tape = self.engine._tape(graphs=self.graphs)
        return tape

    def _measure(self, problem: Problem, stages: Stages) -> None:
        tape = self._tape
        if tape.steps == 0:
            return
        last, mode = problem.inner.steps - 1, self.engine.hvp
        state = problem.optimizer.start(stages.before)
        if tape.graphs and stages.missing("kept"):
            with stages.account.stage("kept"):
                point, gradient = Point.with_gradient(problem, state, last, mode)
                following = problem.update(state, gradient, last)
                del gradient
            _pull_back(point, stages, "kept product")
            del point, following
        if tape.by_states and stages.missing("rebuilt"):
            problem.settle(mode)
            with stages.account.stage("rebuilt"):
                point = Point(problem, state, last, mode).evaluated()
            _pull_back(point, stages, "rebuilt product")
            del point

    def peak(self, chunk: ChunkUse) -> float:
        """See the class."""
        tape = self._tape
        if tape.steps == 0:
            return max(self.inner_peak(chunk), self.query_peak(chunk))
        counts = sweep(tape.by_states, tape.checkpoints)
        cotangents = chunk["query"].held + chunk.vector * chunk.facts.damped
        outer = self._of_outer_steps(chunk, counts, cotangents)
        peaks = self._with_graphs(chunk, counts, cotangents) if tape.graphs else []
        return max(peaks + outer + (self._with_states(chunk, counts, cotangents) if tape.by_states else []))

    def _of_outer_steps(self, chunk: ChunkUse, counts: Sweep, cotangents: float) -> list[float]:
        """At the query losses before the end: what is left of graphs and states, phi among these."""
        tape, swept = self._tape, cotangents + self._of_buffers(chunk)[1]
        left = [self._given(chunk)] * (tape.by_states > 0)
        left += [self._always(chunk) + self._stored(chunk, counts.at[step]) for step in range(1, tape.by_states)]
        if tape.graphs:  # the buffers of the state are gone with the graph
            phi = self._below_graphs(chunk, counts) - self._of_buffers(chunk)[1]
            left += [phi + graphs * chunk["kept"].held for graphs in range(tape.graphs)]
        steps = [step - tape.first for step in self.engine.outer_steps or ()]
        return [left[step] + swept + chunk["query"].peak for step in steps if step < tape.steps]

    @property
    def _judges_the_end(self) -> bool:
        return self.engine.outer_steps is None or self.engine.inner.steps in self.engine.outer_steps

    def _with_graphs(self, chunk: ChunkUse, counts: Sweep, cotangents: float) -> list[float]:
        """On the way to the end and at the last step, then at the one before; the first graph holds its state too."""
        tape, product, state, fetched = self._tape, chunk["kept product"], self._state(chunk), chunk.facts.fetched
        graph = chunk["kept"].plus(Use(fetched, fetched))  # which holds the batch of its step
        zeros, buffers = self._of_buffers(chunk)
        theta, before = chunk.theta * chunk.facts.damped, self._below_graphs(chunk, counts)
        if tape.by_states < 2:  # the state at hand is the first
            theta *= tape.first > 0
        # The last graph has the batch at hand, and that of step 0 the one that stands for all.
        before -= fetched * (1 + (tape.by_states == 0))
        left = before + tape.graphs * graph.held - state
        return [
            before + theta + (tape.graphs - 1) * graph.held + graph.peak,
            before + tape.graphs * graph.held - buffers + chunk["query"].peak * self._judges_the_end,
            left + cotangents + zeros + product.peak,
            left - graph.held + cotangents + buffers + chunk.vector + product.peak if tape.graphs > 1 else 0,
        ]

    def _below_graphs(self, chunk: ChunkUse, counts: Sweep) -> float:
        """What is held of the steps before those with graphs, and the state that these begin with."""
        by_states = self._tape.by_states
        stored = self._given(chunk) if by_states < 2 else self._always(chunk) + self._stored(chunk, counts.forward)
        return stored + self._state(chunk) * (by_states > 0)

    def _with_states(self, chunk: ChunkUse, counts: Sweep, cotangents: float) -> list[float]:
        """As `_with_graphs`, without graphs: before a step is differentiated, the one before still has its state."""
        step, point, product = chunk["step"], chunk["rebuilt"], chunk["rebuilt product"]
        tape, (zeros, buffers) = self._tape, self._of_buffers(chunk)
        gradient, given, always = chunk.vector * chunk.facts.needs_gradient, self._given(chunk), self._always(chunk)
        stepping = always + chunk.theta * chunk.facts.damped
        stored = partial(self._stored, chunk)
        peaks = [given + step.peak, stepping + stored(counts.forward) + step.peak]
        if tape.graphs == 0:
            peaks += [
                always + stored(counts.forward) + self.query_peak(chunk) * self._judges_the_end,
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

    def once(self, chunk: ChunkUse) -> float:
        """A product by finite differences, which the first is compared with."""
        return chunk.vector if self.engine.hvp == "finite-difference" else 0.0

    def _state(self, chunk: ChunkUse) -> float:
        return chunk.vector * (1 + self._buffers)

    def _stored(self, chunk: ChunkUse, states: int) -> float:
        """What these take on the device."""
        return self._state(chunk) * most_on_device(self._tape.storage, chunk.facts.device, states)

    def _always(self, chunk: ChunkUse) -> float:
        """What is held from the first to the last of the steps that are differentiated."""
        return self._given(chunk) if self._tape.first else 0

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
        """K gradients, those of recomputed steps and of the query losses, and K products."""
        judged = 1 if self.engine.outer_steps is None else len(self.engine.outer_steps)
        tape, once, anew = self._tape, facts.product(Graph.ONCE), facts.product(Graph.REBUILT)
        gradients = tape.first + tape.graphs + sweep(tape.by_states, tape.checkpoints).steps + judged
        if facts.needs_gradient:
            gradients, anew = gradients + tape.by_states, once
        equivalents = facts.gradient * gradients + tape.graphs * once + tape.by_states * anew
        state = facts.adapted * facts.dtype.itemsize * (1 + self._buffers)
        transfer = _MOVED[tape.storage] * tape.most_states * state
        return Work(gradients=gradients, hvps=tape.steps, equivalents=equivalents, judged=judged, transfer=transfer)


def _some(steps: int) -> list[int]:
    """Numbers of graphs worth trying between all and none."""
    found = dict.fromkeys((steps // 2, steps // 4, 1))
    return [graphs for graphs in found if 0 < graphs < steps]


def _pull_back(point: Point, stages: Stages, name: str) -> None:
    """One step of the sweep, from cotangents that it gives back."""
    cotangents: State = tuple(torch.ones_like(part) for part in point.state)
    with stages.account.stage(name):
        cotangents, w, rates = point.pull_through_update(cotangents)
        point.problem.hyper.add(rates, point.problem.first + point.step)
        product = point.add_product(cotangents, w, mixed=bool(point.problem.snapshot.shared))
    del cotangents, w, rates, product
