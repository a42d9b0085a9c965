"""The model card of a training: what was trained, on what, how, how well, and how to load it."""

from __future__ import annotations

import json
from typing import Any

from imaml._engine.files import replace_file
from imaml.cli._experiment import flag
from imaml.cli._metric import Metric
from imaml.cli._options import Train
from imaml.cli._result import NAMES
from imaml.training import Evaluation, RunFolder, Trainer

_TASKS = {
    "sinusoid": "Regression of sine curves",
    "glyphs": "Characters in the typefaces that matplotlib ships",
    "omniglot": "Handwritten characters of Omniglot (Lake et al. 2015)",
    "banking77": "Messages of bank customers by intent, BANKING77 (Casanueva et al. 2020)",
}
_INPUTS = {
    "sinusoid": "x = torch.linspace(-5.0, 5.0, 10)[:, None]",
    "glyphs": "x = torch.rand(5, 1, 28, 28)",
    "omniglot": "x = torch.rand(5, 1, 28, 28)",
    "banking77": 'x = load_minilm({ways})[0](["Where is my card?", "Top up"])',
}
_MEANING = {
    "sinusoid": "`y` is what it predicts for `x`, of shape `(points, 1)`",
    "glyphs": "`y` are the logits of images, with 1 for ink",
    "omniglot": "`y` are the logits of images, with 1 for ink",
    "banking77": "`y` are the logits of messages, which the frozen layers encode",
}


def write_card(options: Train, trainer: Trainer, folder: RunFolder, metric: Metric, test: Evaluation) -> None:
    """Write `README.md` in the run folder.

    Args:
        options: From the command line.
        trainer: At the end of its plan.
        folder: Where `save_model` was.
        metric: How it is judged.
        test: The result.

    Raises:
        OSError: It cannot be written.
    """
    text = _card(options, trainer, folder, metric, test)
    replace_file(folder.path / "README.md", lambda stream: stream.write(text.encode()))


def _card(options: Train, trainer: Trainer, folder: RunFolder, metric: Metric, test: Evaluation) -> str:
    kind, name = options.episodes.dataset, NAMES[options.strategy]
    model = type(trainer.model).__name__
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    skipped = f"; {test.skipped} that were not finite are left out" if test.skipped else ""
    return f"""---
library_name: imaml
tags: [meta-learning, few-shot, {options.strategy}]
datasets: [{kind}]
metrics: [{metric.name.lower()}]
---

# {model}, meta-trained by {name} on {kind}

The parameters of this model ({model}, {size:,} parameters) are a start from which few gradient steps learn a new task.
They are not a solution of any task: adapt them to the support set of yours first, as in training.

## Result

Test {metric.name} **{metric.interval(test.mean, test.interval)}**: mean and 95 % interval over {test.tasks} unseen \
tasks{skipped}.
It was trained for {trainer.step} meta-steps in {trainer.seconds / 60:.1f} minutes. `result.json` has the versions and \
the
processor, `metrics.jsonl` and `curve.png` the way there.

## Load it

```python
{_imports(kind)}
model = load_model({json.dumps(str(folder.path))})
{_INPUTS[kind].format(ways=options.episodes.ways)}
y = model({"**x" if kind == "banking77" else "x"})
```

Here {_MEANING[kind]}. What this needs comes with
`pip install 'imaml[{"train,text" if kind == "banking77" else "train"}]'`.
Any reader of safetensors finds the tensors in `model.safetensors`.

## Data

{_TASKS[kind]}. Training, validation and test share no {"task" if kind == "sinusoid" else "class"}.

{_table({**vars(options.episodes), "data": None})}

## Strategy

{_table({"strategy": options.strategy, **vars(options.engine)})}

## Plan

{_table(vars(options.plan))}
"""


def _imports(kind: str) -> str:
    lines = ["from imaml.training import load_model"]
    lines = [*lines, "from imaml.text import load_minilm"] if kind == "banking77" else ["import torch", *lines]
    return "\n".join(lines) + "\n"


def _table(options: dict[str, Any]) -> str:
    """The options that are given, as those of the command line."""
    rows = [f"| `{flag(name)}` | {_shown(value)} |" for name, value in options.items() if value is not None]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
