"""What is measured on query sets, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is measured on query sets, and how it is written."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    percent: bool

    @property
    def scale(self) -> int:
        """Factor from a value to its axis in a figure."""
        return 100 if self.percent else 1

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} (%)" if self.percent else self.name

    def text(self, value: float) -> str:
        """One value, such as "97.3 %"."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"

    def interval(self, mean: float, interval: float) -> str:
        """A mean and the half-width of its interval, such as "97.3 ± 0.4 %"."""
        return f"{100 * mean:.1f} ± {100 * interval:.1f} %" if self.percent else f"{mean:.3f} ± {interval:.3f}"


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The fraction of examples whose largest logit is that of their class."""
    return (output.argmax(-1) == target).to(output.dtype).mean()


ACCURACY = Metric(name="accuracy", function=accuracy, percent=True)
MSE = Metric(name="MSE", function=F.mse_loss, percent=False)
