"""Run jobs at full size and keep what they find, as the gallery shows it: `python examples/gallery.py siren`.

A job is a script beside this one with two functions. `main()` solves the problem and returns its results by name.
`picture(results)` draws them. Kept are the picture and those results that are numbers or short texts.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from imaml.cli._environment import environment

RESULTS = Path(__file__).parent / "results"


def rounded(value: float | int | str) -> float | int | str:
    """A number to the four digits that its table shows."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def keep(job: str, folder: Path = RESULTS, **sizes: Any) -> dict[str, Any]:
    """Run a job, of other sizes where they are given, and write `job.json` and `job.png`."""
    module = importlib.import_module(job)
    start = time.perf_counter()
    results = module.main(**sizes)
    where = environment()
    record = {
        "command": f"python examples/gallery.py {job}",
        "seconds": round(time.perf_counter() - start),
        "threads": where["threads"],
        "processor": where["cpu"],
        "torch": where["torch"].partition("+")[0],
        "numbers": {name: rounded(value) for name, value in results.items() if isinstance(value, float | int | str)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    module.picture(results).savefig(folder / f"{job}.png", dpi=110, bbox_inches="tight")
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that the times of two machines can be compared
    for name in sys.argv[1:]:
        for what, value in keep(name)["numbers"].items():
            print(f"{what:40} {value}")
