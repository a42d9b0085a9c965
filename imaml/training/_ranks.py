"""The processes that share a training: what each of them draws, and what they must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """This process among those of a group.

    Every method is a collective of a few numbers, called by all ranks in the same order; a process alone does without.

    Args:
        group: The ranks; None: this process alone.
        device: Where the numbers travel; nccl needs its own.
    """

    def __init__(self, group: ProcessGroup | None, device: torch.device | str) -> None:
        self.group = group
        self.device = device
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def rows(self, tasks: int) -> range:
        """This rank's rows of a batch; a rank may have none."""
        return range(self.rank, tasks, self.size)

    def gather(self, rows: Tensor, tasks: int) -> Tensor:
        """Join what every rank has for its `rows` of a batch of `tasks`: `(tasks, ...)`, in float64, exact."""
        whole = torch.zeros(tasks, *rows.shape[1:], dtype=torch.float64, device=rows.device)
        whole[self.rank :: self.size] = rows.double()
        return self._sum(whole)

    def first(self, value: float) -> float:
        """The value of rank 0, such as its clock's."""
        return self._sum(self._number(value if self.rank == 0 else 0.0)).item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some rank."""
        return self._sum(self._number(flag)).item() > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends on all ranks at once, and fails on all where it fails on one.

        Raises:
            ValueError: It failed on another rank; the error of a rank that fails is raised there.
        """
        try:
            yield
        except Exception:
            self.any(True)
            raise
        if self.any(False):
            raise ValueError("Another process cannot begin. Its own message says why.")

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _sum(self, values: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values
