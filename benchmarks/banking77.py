"""References for MiniLM on BANKING77, 5-way 1-shot.

    python -m benchmarks.banking77 {memory,centroid} DATA [--out FOLDER]

memory: of one meta-gradient of one task in 10 inner steps, the peak of the allocator's own account above what the call
found; the last two layers and the head adapt, or the head alone, with the layers learned through it. centroid: accuracy
of the nearest support message by the cosine of MiniLM's sentence vectors, on the 600 test tasks of `imaml train`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective
from imaml.data import Banking77
from imaml.measure import peak_memory
from imaml.text import LastLayers, load_minilm

WAYS, QUERIES, TASKS = 5, 2, 600
INNER = GradientDescent(lr=0.15, steps=10)
IMPLICIT = {"inner": INNER, "regularization": 1.0, "solver": CG(max_steps=2, rtol=0.0), "on_failure": "ignore"}
ADAPT = {"all": None, "head": ["head"]}
ENGINES: dict[str, MetaGradient] = {
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(**IMPLICIT, error_bound=False),
    "ImplicitMAML, linearize=False": ImplicitMAML(**IMPLICIT, error_bound=False, linearize=False),
    "MAML": MAML(inner=INNER),
    "MAML, checkpoints=3": MAML(inner=INNER, checkpoints=3),
}


@torch.no_grad()
def nearest_centroid(episodes: Banking77, model: LastLayers) -> dict[str, float]:
    """Mean accuracy over the test tasks and the half-width of its 95 % interval."""
    found = []
    for index in range(TASKS // 20):
        tasks = episodes.batch("test", index, 20)
        for task in (tasks[i] for i in range(len(tasks))):
            (support, _), (query, labels) = task.support, task.query
            centroids = F.normalize(model.features(**support).unflatten(0, (WAYS, -1)).mean(1), dim=-1)
            found.append(((model.features(**query) @ centroids.T).argmax(-1) == labels).double().mean())
    accuracy = torch.stack(found)
    return {"mean": accuracy.mean().item(), "interval": 1.96 * accuracy.std().item() / TASKS**0.5, "tasks": TASKS}


def peaks(episodes: Banking77, model: LastLayers) -> dict[str, dict[str, float]]:
    """Peak MiB by what adapts and by strategy."""
    tasks, found = episodes.batch("train", 0, 1), {}
    for label, adapt in ADAPT.items():
        objective = Objective(model, F.cross_entropy, adapt=adapt)
        found[label] = {}
        for name, engine in ENGINES.items():
            engine(objective, tasks)  # what is only loaded or looked at once
            peak = peak_memory(lambda engine=engine, objective=objective: engine(objective, tasks).loss.backward())
            found[label][name] = round(peak / 2**20, 1)
            model.zero_grad()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "centroid"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/banking77"))
    options = parser.parse_args()
    encoder, model = load_minilm(WAYS)
    episodes = Banking77(encoder=encoder, path=options.data, ways=WAYS, queries=QUERIES)
    result = (peaks if options.what == "memory" else nearest_centroid)(episodes, model)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.what}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
