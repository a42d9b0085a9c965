"""Predicted over measured peaks of meta-gradients: how far `MetaGradient.plan` is off.

    python -m benchmarks.plan_errors [--models NAME ...] [--out FOLDER]

Every prediction comes from a plan of its own, and is held against `imaml.measure.peak_memory` of a call of
`value_and_grad`. Writes `results.jsonl` and `README.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import Transformer
from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, MetaGradient, Objective, TaskBatch
from imaml.measure import peak_memory
from imaml.models import MLP, Conv4

LR = 0.01
Problem = tuple[Objective, TaskBatch]
Recompute = Sequence[str | type[nn.Module]]


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(16, 64, num_layers=2, batch_first=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cells(x)[0][:, -1])
        return logits


class Residual(nn.Module):
    """Convolutions with GroupNorm, GELU, average pooling and skip connections."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, channels, 3, padding=1), nn.Linear(channels, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.avg_pool2d(x + block(x), 2)
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


def _tasks(tasks: int, support: int, queries: int, draw: Callable[[int, int], Tensor]) -> TaskBatch:
    both = ((draw(tasks, n), torch.randint(5, (tasks, n))) for n in (support, queries))
    return TaskBatch(support=next(both), query=next(both))


def sinusoids() -> Problem:
    def curve(n: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(16, n, 1) - 5
        return x, x.sin()

    return Objective(MLP(), F.mse_loss), TaskBatch(support=curve(10), query=curve(10))


def images(queries: int, adapt: list[str] | None = None) -> Problem:
    tasks = _tasks(6, 5, 5 * queries, lambda t, n: torch.randn(t, n, 1, 28, 28))
    return Objective(Conv4(5), F.cross_entropy, adapt=adapt), tasks


def tokens(layers: int = 2, recompute: Recompute = ()) -> Problem:
    tasks = _tasks(6, 8, 8, lambda t, n: torch.randint(1000, (t, n, 32)))
    model = Transformer(vocabulary=1000, width=64, layers=layers)
    return Objective(model, F.cross_entropy, recompute=recompute), tasks


def sequences() -> Problem:
    return Objective(LSTM(), F.cross_entropy), _tasks(6, 5, 10, lambda t, n: torch.randn(t, n, 8, 16))


def pictures(recompute: Recompute = ()) -> Problem:
    tasks = _tasks(6, 5, 15, lambda t, n: torch.randn(t, n, 3, 16, 16))
    return Objective(Residual(), F.cross_entropy, recompute=recompute), tasks


MODELS: dict[str, Callable[[], Problem]] = {
    "MLP, sinusoids": sinusoids,
    "Conv4, 1 query": lambda: images(1),
    "Conv4, 15 queries": lambda: images(15),
    "Conv4, head adapts": lambda: images(5, ["head.*"]),
    "transformer": tokens,
    "LSTM": sequences,
    "GroupNorm, skips": pictures,
    "transformer, recomputed": lambda: tokens(3, [nn.TransformerEncoderLayer]),
    "GroupNorm, recomputed": lambda: pictures(["blocks.*"]),
}


def engines(*, slices: bool) -> Iterator[tuple[str, MetaGradient]]:
    """What is predicted, by name.

    Args:
        slices: Whether the loss is a mean over independent examples.

    Yields:
        Engines.
    """
    solve = {"solver": CG(max_steps=4, rtol=0.0), "on_failure": "ignore"}
    settings: list[tuple[type[MetaGradient], int, dict[str, Any]]] = [
        (MAML, 5, {}),
        *((MAML, 1, {"chunk_size": chunk, "linearize": False}) for chunk in (1, 4)),
        *((MAML, 5, {"chunk_size": chunk, "linearize": keep}) for chunk in (2, 6) for keep in (False, True)),
        (MAML, 16, {"chunk_size": 1, "linearize": True}),
        (MAML, 32, {"chunk_size": 1, "checkpoints": 4}),
        (MAML, 8, {"chunk_size": 4, "checkpoints": 2}),
        (MAML, 8, {"chunk_size": 4, "storage": "disk"}),
        (FOMAML, 5, {}),
        *((FOMAML, 5, {"chunk_size": chunk}) for chunk in (1, 6)),
        *((ImplicitMAML, 5, {"chunk_size": chunk, "linearize": keep}) for chunk in (1, 6) for keep in (False, True)),
    ]
    if slices:
        settings += [(MAML, 5, {"chunk_size": 4, "microbatch_size": 2})]
        settings += [(FOMAML, 5, {"chunk_size": 1, "microbatch_size": 3})]
    for kind, steps, options in settings:
        name = ", ".join([kind.__name__, f"K={steps}", *(f"{key}={value}" for key, value in options.items())])
        more = solve if kind is ImplicitMAML else {}
        yield name, kind(inner=GradientDescent(lr=LR, steps=steps), **options, **more)
    for options in ({"linearize": False}, {"linearize": True}, {"linearize": False, "checkpoints": 1}):
        name = ", ".join(["MAML, K=5, Adam, chunk_size=4", *(f"{key}={value}" for key, value in options.items())])
        yield name, MAML(inner=Adam(lr=LR, steps=5), chunk_size=4, **options)


@dataclass(frozen=True, kw_only=True)
class Row:
    model: str
    setting: str
    predicted: int
    measured: int
    gradients: int
    hvps: int
    """What the prediction took."""

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def measure(name: str) -> Iterator[Row]:
    torch.manual_seed(0)
    objective, tasks = MODELS[name]()
    FOMAML(inner=GradientDescent(lr=LR, steps=1)).value_and_grad(objective, tasks)  # what torch sets up once
    for setting, engine in engines(slices=not name.startswith("Conv4")):
        size = engine.chunk_size
        few = tasks[: 3 * size] if isinstance(size, int) else tasks  # from the third chunk on nothing is added
        forecast = engine.plan(objective, few)
        predicted = next(each.peak_bytes for each in forecast.settings if not each.options)

        def call(engine: MetaGradient = engine, few: TaskBatch = few) -> None:
            engine.value_and_grad(objective, few)

        measured = peak_memory(call)
        yield Row(
            model=name,
            setting=setting,
            predicted=predicted,
            measured=measured,
            gradients=forecast.gradients,
            hvps=forecast.hvps,
        )


def table(rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    within = sum(abs(row.ratio - 1) <= 0.02 for row in rows)
    lines = [
        "# Predicted and measured peaks",
        "",
        "    python -m benchmarks.plan_errors",
        "",
        f"torch {torch.__version__}, CPU. Peak MB (10^6 bytes) of one `value_and_grad` by the allocator's own\n"
        "account, and as `MetaGradient.plan` predicts it from stages of one to three tasks.",
        "",
        f"{len(rows)} settings, {within} of them within 2 %. The worst: {worst.model}, {worst.setting}, "
        f"{100 * (worst.ratio - 1):+.1f} %.",
        "",
        "| model | setting | predicted | measured | predicted / measured |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        sizes = f"{row.predicted / 1e6:.3g} | {row.measured / 1e6:.3g}"
        lines.append(f"| {row.model} | {row.setting} | {sizes} | {row.ratio:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.models:
        for row in measure(name):
            print(f"{row.ratio:.3f}  {row.model}: {row.setting}", flush=True)
            rows.append(row)
    worst = sorted(rows, key=lambda row: -abs(row.ratio - 1))[:5]
    print("Worst: " + "; ".join(f"{row.model}, {row.setting}: {row.ratio:.3f}" for row in worst))
    lines = (json.dumps(asdict(row) | {"ratio": row.ratio}) + "\n" for row in rows)
    (options.out / "results.jsonl").write_text("".join(lines))
    (options.out / "README.md").write_text(table(rows))


if __name__ == "__main__":
    main()
