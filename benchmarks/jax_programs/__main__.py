"""A process in JAX's environment that answers for one compiled meta-gradient (`benchmarks.pipes`).

    python -m benchmarks.jax_programs PROBLEM.npz {reverse,tangents,lean} [--threads N]

The file is what `benchmarks.rivals.jax` writes. Which way is the fastest was tried for each workload: vectorised tasks
for the MLP and one by one for Conv4 (vectorised twice the time), and steps traced one by one up to where they were no
faster than a scan.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from benchmarks.pipes import serve_call

UNROLLED = {"MLP": 10, "Conv4": 16, "Transformer": 0}
"""Up to how many inner steps are traced one by one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem")
    parser.add_argument("way", choices=("reverse", "tangents", "lean"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as it may use processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    if options.threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax
    import numpy as np

    with np.load(options.problem) as file:
        arrays = dict(file)
    about = json.loads(str(arrays.pop("about")))
    jax.config.update("jax_enable_x64", about["float64"])
    jax.config.update("jax_platforms", "cpu")
    compiled: dict[str, Any] = {}

    def prepare() -> Any:
        compiled["function"], arguments = _compiled(about, arrays, options.way)
        return lambda: jax.block_until_ready(compiled["function"](*arguments))

    def save(path: str, found: Any) -> None:
        from benchmarks.jax_programs.models import unstacked

        np.savez(path, **(found if isinstance(found, dict) else unstacked(found)))

    def memory(_: str) -> dict[str, Any]:
        """XLA's account of what a call holds besides its arguments."""
        account = compiled["function"].memory_analysis()
        return {"bytes": account.temp_size_in_bytes + account.output_size_in_bytes}

    serve_call(prepare, save, memory=memory)


def _compiled(about: dict[str, Any], arrays: dict[str, Any], way: str) -> tuple[Any, tuple[Any, ...]]:
    from functools import partial

    import jax
    import jax.numpy as jnp

    from benchmarks.jax_programs import gradients, models

    model, options = about["model"], about["options"]
    forward = {"MLP": models.mlp, "Conv4": models.conv4, "Transformer": models.transformer}[model]
    forward = partial(forward, **options)

    def loss(parameters: Any, batch: tuple[Any, Any]) -> Any:
        outputs, targets = forward(parameters, batch[0]), batch[1]
        if about["loss"] == "mse_loss":
            return jnp.mean((outputs - targets) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], 1))

    names = ("lr", "steps", "regularization", "solver_steps")
    settings = gradients.Settings(**{name: about[name] for name in names}, unrolled=about["steps"] <= UNROLLED[model])
    if about["family"] == "implicit":
        of_task = gradients.implicit(loss, settings)
    else:
        of_task = (gradients.through_the_loop if way == "reverse" else gradients.by_tangents)(loss, settings)
    mean = (gradients.vectorised if model == "MLP" else gradients.one_by_one)(of_task)
    theta = {name: jnp.asarray(arrays[f"parameters/{name}"]) for name in about["names"]}
    if way == "lean" and model == "Transformer":
        theta = models.stacked(theta)
    batches = [tuple(jnp.asarray(arrays[f"{part}/{i}"]) for i in (0, 1)) for part in ("support", "query")]
    arguments = (theta, *batches)
    return jax.jit(mean).lower(*arguments).compile(), arguments


if __name__ == "__main__":
    main()
