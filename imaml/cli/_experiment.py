"""From options to the things that train."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, data, text
from imaml.cli._metric import ACCURACY, MSE, Metric
from imaml.cli._options import Dataset, EngineOptions, EpisodeOptions, MachineOptions, Model, PlanOptions, Strategy
from imaml.data._banking77 import existing
from imaml.models import MLP, Conv4
from imaml.training import Episodes

_EPISODES: dict[Dataset, type[data.Episodes]] = {
    "sinusoid": data.Sinusoid,
    "glyphs": data.Glyphs,
    "omniglot": data.Omniglot,
    "banking77": data.Banking77,
}
_MODELS: dict[Dataset, Model] = {"sinusoid": "mlp", "glyphs": "conv4", "omniglot": "conv4", "banking77": "minilm"}
_ENGINES: dict[Strategy, type[MetaGradient]] = {"maml": MAML, "fomaml": FOMAML, "imaml": ImplicitMAML}
_OF_ALL = ("adapt", "inner_lr", "inner_steps")
_FIELD_OF = {"data": "path", "cg_steps": "solver"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Tasks, a model to meta-train, and how it is judged."""

    episodes: Episodes
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric

    def fresh_model(self) -> nn.Module:
        """A copy of the model with the initial parameters."""
        return deepcopy(self.model)

    def objective(self, model: nn.Module, adapt: Sequence[str] | None) -> Objective:
        """The objective of `model`, of which these parameters adapt; None: all."""
        return Objective(model, self.loss, adapt=adapt, metric=self.metric.function)


def build_experiment(options: EpisodeOptions, machine: MachineOptions) -> Experiment:
    """Make the episodes and the model.

    Args:
        options: What to learn.
        machine: Where.

    Returns:
        The experiment; data files are read when the first tasks are drawn.

    Raises:
        ValueError: An option is out of range, or does not apply to the dataset.
    """
    set_up(machine)
    kind, name = _EPISODES[options.dataset], _MODELS[options.dataset]
    if options.model not in (None, name):
        raise ValueError(f"--model must be {name} for --dataset {options.dataset}. Got {options.model}.")
    chosen = _applicable(options, kind, f"--dataset {options.dataset}", aside=("dataset", "model"))
    del chosen["dataset"]
    chosen.pop("model", None)
    torch.manual_seed(options.seed)
    model: nn.Module
    if name == "minilm":
        if options.data is not None:
            existing(options.data)  # before the model is loaded
        encoder, model = text.load_minilm(chosen["ways"])
        chosen["encoder"] = encoder.to(machine.device)
    else:
        channels = 32 if options.dataset == "glyphs" else 64  # a demo trains in a minute
        model = MLP() if name == "mlp" else Conv4(chosen["ways"], channels=channels)
    loss, metric = (F.mse_loss, MSE) if name == "mlp" else (F.cross_entropy, ACCURACY)
    return Experiment(episodes=kind(**chosen), model=model.to(machine.device), loss=loss, metric=metric)


def set_up(machine: MachineOptions) -> None:
    """Set torch's threads; raises ValueError for a number below 1 or a device that cannot be used."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    if machine.threads is not None:
        if machine.threads < 1:
            raise ValueError(f"--threads must be at least 1. Got {machine.threads}.")
        torch.set_num_threads(machine.threads)
    try:
        torch.empty(0, device=machine.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {machine.device} cannot be used: {str(error).splitlines()[0]}") from error


def build_engine(strategy: Strategy, options: EngineOptions) -> MetaGradient:
    """Make the strategy.

    Args:
        strategy: Which.
        options: `inner_lr` and `inner_steps` must be given.

    Returns:
        The engine. Failed solves of an implicit one are in its reports; it does not warn.

    Raises:
        ValueError: An option is out of range, or does not apply to the strategy.
    """
    kind = _ENGINES[strategy]
    chosen = _applicable(options, kind, f"--strategy {strategy}", aside=_OF_ALL)
    chosen.pop("adapt", None)
    chosen["inner"] = GradientDescent(lr=chosen.pop("inner_lr"), steps=chosen.pop("inner_steps"))
    if strategy == "imaml":
        chosen["on_failure"] = "ignore"
        chosen["error_bound"] = False  # no run shows it
    if "solver" in chosen:
        chosen["solver"] = CG(max_steps=chosen["solver"], rtol=0.0, atol=0.0)
    return kind(**chosen)


def given(options: EngineOptions | EpisodeOptions | PlanOptions) -> dict[str, Any]:
    """The options that are not left open."""
    return {name: value for name, value in vars(options).items() if value is not None}


def check_given(options: EngineOptions, strategies: Sequence[Strategy]) -> None:
    """Raise ValueError where there is no strategy, or an option is for none of them."""
    if not strategies:
        raise ValueError("--strategies needs at least one strategy. Got none.")
    for name, value in given(options).items():
        if not any(applies(name, strategy) for strategy in strategies):
            which = ", ".join(strategies)
            raise ValueError(f"{flag(name)} applies to none of {which}. Got {value}: leave it out.")


def check_adapt(options: EngineOptions) -> None:
    """Raise ValueError where `adapt` is given along with a problem, which says itself what adapts."""
    if options.adapt is not None:
        raise ValueError(
            f"--adapt does not apply: the problem's objective says what adapts. Got {' '.join(options.adapt)}: pass it "
            "to the objective, as `adapt`."
        )


def flag(name: str) -> str:
    """The command line's name of an option, such as "--inner-lr"."""
    return "--" + name.replace("_", "-")


def applies(name: str, strategy: Strategy) -> bool:
    """Whether the engine option `name` means something to `strategy`."""
    return name in _OF_ALL or field_of(name) in _names(_ENGINES[strategy])


def field_of(name: str) -> str:
    """What the option `name` is called where it is passed on."""
    return _FIELD_OF.get(name, name)


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _applicable(
    options: EngineOptions | EpisodeOptions, kind: type, chosen: str, *, aside: tuple[str, ...]
) -> dict[str, Any]:
    """The given options as fields of `kind`; those of `aside` are kept as they are."""
    known = _names(kind)
    for name, value in given(options).items():
        if field_of(name) not in known and name not in aside:
            raise ValueError(f"{flag(name)} does not apply to {chosen}. Got {value}: leave it out.")
    return {field_of(name): value for name, value in given(options).items()}
