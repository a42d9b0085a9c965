"""The table of docs/layers.md: every layer of `torch.nn` through all strategies and modes of Hessian-vector products.

`python -m tests.layers.table [NAME ...]` prints the rows of these layers, and writes all into the page where no name is
given. Each strategy is compared with its oracle in float64, for the tasks vectorised together and one by one.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, Report, TaskBatch
from imaml._curvature.curvature import HvpMode
from tests.layers.specimens import (
    CLASSES,
    EXAMPLES,
    NOT_RUN,
    SPECIMENS,
    TASKS,
    WITH_STATISTICS,
    Around,
    Specimen,
    inputs,
)
from tests.oracles import ORACLES, model_loss, relative_error, setting

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
INNER, ONE_STEP = GradientDescent(lr=0.1, steps=2), GradientDescent(lr=0.1, steps=1)
MODES = ("auto", "forward-over-reverse", "finite-difference")
EXACT, INEXACT, SAME = 1e-8, 1e-4, 1e-12
BLOCK = "as a block"
COLUMNS = ("Layer", *(f"`{mode}`" for mode in MODES), BLOCK, "Notes")
SOLVER = CG(max_steps=40, rtol=1e-11)
LAZY = "as the other once a forward pass has initialised it; refused before"
RANDOM, NO_ORACLE, DIFFERENCES = "random", "no oracle", "differences"
"""Words that the page explains."""
Gradients = dict[str, Tensor]


def layers() -> list[str]:
    """Every module class of `torch.nn`."""
    return [n for n, c in vars(nn).items() if isinstance(c, type) and issubclass(c, nn.Module)]


def row(name: str) -> str:
    """A line of the table."""
    if name in NOT_RUN:
        return _line(name, *("–" for _ in (*MODES, BLOCK)), NOT_RUN[name])
    if name.startswith("Lazy"):
        return _line(name, *("–" for _ in (*MODES, BLOCK)), LAZY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial((SPECIMENS | WITH_STATISTICS)[name])
        cells, parts = zip(*(_cell(trial, mode) for mode in MODES), strict=True)
    block, said = as_a_block(name)
    notes = [note for part in (*parts, said) for note in part] + trial.notes
    return _line(name, *cells, block, "; ".join(dict.fromkeys(notes)))


def as_a_block(name: str) -> tuple[str, list[str]]:
    """What `MAML` does with the layer as a block of `Objective(recompute=...)`, and what is to be said about it."""
    specimen, notes = (SPECIMENS | WITH_STATISTICS)[name], list[str]()
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(specimen)
        for chunk_size in (None, 1):
            try:
                found.add(trial.recomputed(MAML(inner=ONE_STEP, chunk_size=chunk_size)))
            except (RuntimeError, ValueError, TypeError) as error:
                found.add("refused")
                notes.append(_brief(error))
    return next(word for word in ("WRONG", "refused", "falls back", "same", "–", "exact") if word in found), notes


def _line(name: str, *cells: str) -> str:
    head, _, options = name.partition(", ")
    return "| " + " | ".join([f"`{head}`" + (f", {options}" if options else ""), *cells]) + " |"


def _cell(trial: Trial, mode: HvpMode) -> tuple[str, list[str]]:
    """What one mode does, and what is to be said about it."""
    notes: list[str] = []
    found = set()
    for chunk_size in (None, 1):
        engines: list[MetaGradient] = [
            MAML(inner=INNER, hvp=mode, chunk_size=chunk_size),
            ImplicitMAML(inner=INNER, hvp=mode, chunk_size=chunk_size, regularization=20.0, solver=SOLVER),
        ]
        if mode == "auto":
            engines.append(FOMAML(inner=INNER, chunk_size=chunk_size))
        for engine in engines:
            try:
                found.add(trial.verdict(engine))
            except (RuntimeError, ValueError, TypeError) as error:
                found.add("refused")
                notes.append(_brief(error))
    worst = next(word for word in ("WRONG", "refused", DIFFERENCES, "works") if word in found)
    is_asked_for = worst == DIFFERENCES and mode == "finite-difference"
    return "works" if is_asked_for else worst, notes


class Trial:
    """A layer in a model, with tasks, and what each strategy has to return."""

    def __init__(self, specimen: Specimen) -> None:
        torch.manual_seed(0)
        x, labels = inputs(specimen), torch.randint(CLASSES, (TASKS, EXAMPLES))
        self._specimen, self._model = specimen, Around(specimen, x[0]).double()
        self._tasks = TaskBatch(support=(x, labels), query=(x.flip(1), labels))
        before = torch.get_rng_state()
        self._model(x[0])
        self.is_random = not torch.equal(before, torch.get_rng_state())
        self.notes = [RANDOM] if self.is_random else []
        self._expected: dict[type[MetaGradient], Gradients] = {}

    def verdict(self, engine: MetaGradient) -> str:
        """Whether an engine is right."""
        objective = Objective(self._model, F.cross_entropy, buffers=self._specimen.buffers)
        seeded = self.is_random and isinstance(engine, MAML)
        self._model.train(not self.is_random or seeded)
        if seeded:
            return _compare_slope(engine, objective, self._tasks)
        report = self._run(engine, objective)
        try:
            expected = self._oracle(engine)
        except RuntimeError:  # the oracle differentiates twice
            self.notes = [NO_ORACLE]
            if isinstance(engine, MAML):
                return _compare_slope(engine, objective, self._tasks)
            return _verdict(0.0, report.hvp_mode)
        error = relative_error({n: p.grad for n, p in self._model.named_parameters()}, expected)
        return _verdict(error, report.hvp_mode)

    def recomputed(self, engine: MAML) -> str:
        """Whether the layer as a block leads to what it leads to otherwise, in training mode, with the same draws."""
        is_container = isinstance(self._model.layer, (nn.ModuleList, nn.ModuleDict))
        names = ["layer.*"] if is_container else ["layer"]  # a container is not called
        (plain, expected), (report, found) = (self._training(engine, blocks) for blocks in (None, names))
        error = relative_error(found, expected)
        if not report.recomputed:
            return "–"
        is_exact = report.hvp_mode != "finite-difference"
        if not is_exact and plain.hvp_mode != "finite-difference":
            return "falls back"
        if error > (SAME if is_exact else INEXACT):
            return "WRONG"
        return "exact" if is_exact else "same"

    def _training(self, engine: MAML, blocks: list[str] | None) -> tuple[Report, Gradients]:
        torch.manual_seed(1)
        objective = Objective(self._model.train(), F.cross_entropy, buffers=self._specimen.buffers, recompute=blocks)
        report = self._run(engine, objective)
        return report, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._model.named_parameters()}

    def _run(self, engine: MetaGradient, objective: Objective) -> Report:
        self._model.zero_grad()
        result = engine(objective, self._tasks)
        result.loss.backward()
        return result.report

    def _oracle(self, engine: MetaGradient) -> Gradients:
        kind = type(engine)
        if kind not in self._expected:
            loss = model_loss(_plain(self._model, self._specimen), F.cross_entropy)
            s = setting(engine, self._tasks, loss, dict(self._model.named_parameters()))
            self._expected[kind] = ORACLES[kind](s)[1]
        return self._expected[kind]


def _verdict(error: float, mode: str | None) -> str:
    found = DIFFERENCES if mode == "finite-difference" else "works"
    return found if error <= (EXACT if found == "works" else INEXACT) else "WRONG"


def _compare_slope(engine: MAML, objective: Objective, tasks: TaskBatch) -> str:
    def seeded() -> tuple[Tensor, Gradients]:
        torch.manual_seed(1)
        return engine.value_and_grad(objective, tasks)

    grads = seeded()[1]
    mode = engine(objective, tasks).report.hvp_mode
    parameters = objective.parameters()
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    values = []
    for shift in (1e-6, -2e-6, 1e-6):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(direction[n], alpha=shift)
        values.append(seeded()[0])
    slope = sum((grads[n] * d).sum() for n, d in direction.items())
    measured = (values[0] - values[1]) / 2e-6
    error = abs(slope - measured) / abs(measured)
    return _verdict(float(error) * EXACT / INEXACT, mode)


def _plain(model: nn.Module, specimen: Specimen) -> nn.Module:
    """The same model for an oracle that knows no policy."""
    if specimen.buffers is None:
        return model
    other = copy.deepcopy(model).train(specimen.buffers != "frozen")
    if specimen.buffers != "frozen":
        layer = other.layer
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return other


def _brief(error: Exception) -> str:
    """The operation that has no forward derivative, or how torch's message begins."""
    text = re.sub(r"\s+", " ", str(error)).replace("|", "/")
    if operation := re.search(r"forward AD with (?:aten::)?(\w+)", text):
        return f"no jvp: {operation.group(1)}"
    met = re.search(r"does not support it \((.*)", text)
    return shorten(met.group(1) if met else text, 44, placeholder=" ...")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    lines = []
    for name in names or [*sorted(layers()), *WITH_STATISTICS]:
        lines.append(row(name))
        print(lines[-1], flush=True)
    if not names:
        head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        before, _, _ = PAGE.read_text().partition(head[0])
        PAGE.write_text(before + "\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
