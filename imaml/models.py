"""The networks of the papers: plain modules, which know nothing of meta-learning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Maps `(..., in_features)` to `(..., out_features)` by fully connected layers.

    By default it is 1-40-40-1 with ReLU, as for sinusoid regression. Initialised as PyTorch does by default, like the
    network in the iMAML authors' code; the MAML authors drew weights from a normal of deviation 0.01.

    Source: Finn et al. 2017.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        hidden: Widths of the hidden layers.
        activation: Makes the module after each hidden layer.
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 1,
        hidden: Sequence[int] = (40, 40),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((in_features, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        super().__init__(*layers, nn.Linear((in_features, *hidden)[-1], out_features))


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(out_channels, track_running_stats=False),
        nn.ReLU(),
    )


class Conv4(nn.Module):
    """Classifies images by four strided 3x3 convolutions and a linear head: the Omniglot network of MAML and iMAML.

    Maps images `(batch, in_channels, image_size, image_size)` to logits `(batch, ways)`.

    Each block is [3x3 convolution of stride 2, BatchNorm, ReLU]. The head reads the flattened features, 2 x 2 x 64 for
    28 x 28 images, as in the iMAML authors' code; the MAML authors' code averages them over space. Weights are
    Xavier-uniform and biases zero, as in the MAML authors' code.

    Not for queries that arrive one at a time: BatchNorm always uses the statistics of the batch at hand and keeps none.
    The images of one forward pass, such as the query set of a task, are seen together (the transductive setting of both
    papers).

    Source: Finn et al. 2017, appendix A.1.

    Args:
        ways: Number of classes.
        channels: Channels of every block.
        in_channels: Channels of an image.
        image_size: Height and width of an image.
    """

    def __init__(self, ways: int, channels: int = 64, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        widths = (in_channels, *4 * (channels,))
        self.features = nn.Sequential(*(_block(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(channels * math.ceil(image_size / 16) ** 2, ways)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
