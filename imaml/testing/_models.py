"""Small networks of the kinds that people train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import nn

from imaml.testing._draws import generator, normal, seeds

SMOOTH: tuple[Callable[[], nn.Module], ...] = (nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU)
KINKED: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.LeakyReLU)
NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "batch": lambda width: nn.BatchNorm1d(width, track_running_stats=False),
    "group": lambda width: nn.GroupNorm(1, width),
}


def small_models(
    *,
    inputs: int = 3,
    outputs: int = 2,
    kinks: bool = False,
    normalizations: Sequence[str] = tuple(NORMALIZATIONS),
    tied: bool = True,
    frozen: bool = True,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[nn.Sequential]:
    """Draw fully connected networks from `(examples, inputs)` to `(examples, outputs)`, as plain modules.

    Drawn are the depth (1 to 3 hidden layers), the width (3 to 5), the activation, the normalisation and the values of
    all parameters. The defaults fit those of `task_batches`: `@given(small_models(), task_batches())`.

    Args:
        inputs: Numbers in an example.
        outputs: Numbers in an output.
        kinks: May draw ReLU and LeakyReLU too, of which finite differences across the kink are honestly off.
        normalizations: Among which to draw: "none", "layer", "batch" (batch statistics, no running ones), "group".
        tied: May draw models of three hidden layers of which two share their weight.
        frozen: May draw models of which one hidden layer does not require grad.
        dtype: Dtype of the parameters.

    Returns:
        A hypothesis strategy.

    Raises:
        ValueError: An unknown normalisation.
    """
    if not normalizations or not set(normalizations) <= set(NORMALIZATIONS):
        raise ValueError(f"`normalizations` must be among {', '.join(NORMALIZATIONS)}. Got {tuple(normalizations)}.")
    return _small_models(inputs, outputs, kinks, tuple(normalizations), tied, frozen, dtype)


@st.composite
def _small_models(
    draw: st.DrawFn,
    inputs: int,
    outputs: int,
    kinks: bool,
    normalizations: tuple[str, ...],
    tied: bool,
    frozen: bool,
    dtype: torch.dtype,
) -> nn.Sequential:
    depth, width = draw(st.integers(1, 3)), draw(st.integers(3, 5))
    activation = draw(st.sampled_from(SMOOTH + KINKED if kinks else SMOOTH))
    normalization = draw(st.sampled_from(normalizations))
    model = network([inputs, *[width] * depth, outputs], activation, normalization, draw(seeds), dtype)
    hidden = [module for module in model if isinstance(module, nn.Linear)][:-1]
    if tied and depth == 3 and draw(st.booleans()):
        hidden[2].weight = hidden[1].weight
    if frozen and draw(st.booleans()):
        draw(st.sampled_from(hidden)).requires_grad_(False)
    return model


def network(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module],
    normalization: str = "none",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear layers between these sizes; every entry of a parameter is random, the affine normalisation's too."""
    layers: list[nn.Module] = []
    with torch.device("meta"):  # where torch's own initialisation draws nothing
        for fan_in, width in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(fan_in, width), NORMALIZATIONS[normalization](width), activation()]
        model = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1])).to(dtype)
    model.to_empty(device="cpu")
    source = generator(seed)
    with torch.no_grad():
        for module in model:
            for name, parameter in module.named_parameters():
                noise = normal(source, *parameter.shape, dtype=dtype)
                is_matrix, is_scale = parameter.ndim == 2, name == "weight"
                parameter.copy_(noise * parameter.shape[1] ** -0.5 if is_matrix else is_scale + 0.3 * noise)
    return model
