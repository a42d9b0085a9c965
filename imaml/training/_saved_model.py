"""A trained model as one file of safetensors, which says what it is a model of."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isqrt
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imaml._engine.files import replace_file
from imaml._errors import CheckpointError
from imaml.data._extras import optional
from imaml.models import MLP, Conv4
from imaml.text import LastLayers, load_minilm

NAME = "model.safetensors"
_ENTRY = "imaml"
"""The metadata that says what model it is."""

_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "conv4": Conv4,
    "minilm": lambda ways, layers: load_minilm(ways, layers=layers)[1],
}
"""A file names one of these, and nothing else is made of what it says."""


def save_model(folder: str | PathLike[str], model: nn.Module) -> Path:
    """Save the parameters and buffers of a model as `model.safetensors` in a folder, in one atomic step.

    Args:
        folder: Must exist.
        model: An `MLP` with ReLU, a `Conv4`, or the `LastLayers` of MiniLM: the models of the program. Any other is
            saved by `safetensors.torch.save_model`, and made by its own code.

    Returns:
        The file.

    Raises:
        ImportError: The extra `imaml[train]` is not installed.
        OSError: It cannot be written; a file that was there is as it was.
        TypeError: It is a model of another class.
    """
    kind, arguments = _made_by(model)
    metadata = {_ENTRY: json.dumps([kind, arguments])}  # one entry: safetensors writes several in any order
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = optional("safetensors.torch", "A saved model").save(state, metadata)
    path = Path(folder) / NAME
    replace_file(path, lambda stream: stream.write(content))
    return path


def load_model(folder: str | PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model that `imaml train` trained, in evaluation mode; nothing in the file is executed.

    Args:
        folder: The run folder, or the file `model.safetensors` in it.
        device: Where the model is to be.

    Returns:
        An `MLP`, a `Conv4`, or the `LastLayers` of MiniLM, whose pretrained weights must be installed.

    Raises:
        CheckpointError: The file is damaged, or no model of the program.
        FileNotFoundError: There is none.
        ImportError: The extra `imaml[train]` is not installed, or `imaml[text]` for a MiniLM.
    """
    path = Path(folder)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no model {path}. `imaml train` writes it at the end of a run.")
    safetensors = optional("safetensors", "A saved model")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or no model: {error}. Restore it from a copy.") from error
    kind, arguments = _said(metadata.get(_ENTRY))
    if kind not in _MAKERS:
        raise CheckpointError(
            f"{path} is no model of the program. Expected one of {', '.join(_MAKERS)}. Got {kind or metadata}. Load "
            "its tensors by safetensors.torch.load_file."
        )
    try:
        model = _MAKERS[kind](**arguments)
        model.load_state_dict(state, assign=True)  # in the dtype of the file
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is a model of another version: {error}.") from error
    return model.to(device).eval()


def _said(text: str | None) -> tuple[str | None, dict[str, Any]]:
    """The name and the arguments in a file; no name where it is another's."""
    try:
        match json.loads(text or "null"):
            case [str(kind), dict(arguments)]:
                return kind, arguments
    except json.JSONDecodeError:
        pass
    return None, {}


def _made_by(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name and the arguments that make such a model again."""
    match model:
        case MLP():
            linear = [module for module in model if isinstance(module, nn.Linear)]
            if all(isinstance(module, nn.Linear | nn.ReLU) for module in model):
                return "mlp", {
                    "in_features": linear[0].in_features,
                    "out_features": linear[-1].out_features,
                    "hidden": [module.out_features for module in linear[:-1]],
                }
        case Conv4():
            convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            channels = convolution.out_channels
            return "conv4", {
                "ways": model.head.out_features,
                "channels": channels,
                "in_channels": convolution.in_channels,
                "image_size": 16 * isqrt(model.head.in_features // channels),  # all that have this head are one module
            }
        case LastLayers():
            return "minilm", {"ways": model.head.out_features, "layers": len(model.layers)}
    raise TypeError(
        f"Expected a model of the program: an MLP with ReLU, a Conv4, or the LastLayers of MiniLM. Got "
        f"{type(model).__name__}: save it by safetensors.torch.save_model, and load it by load_model of the same."
    )
