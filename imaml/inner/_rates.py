"""What an update is given besides state and gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imaml._losses.layout import Layout
from imaml._objective.meta import MetaParameters


@dataclass(frozen=True, eq=False)
class Rates(Mapping[str, float | Tensor]):
    """Holds every hyper-parameter at one step by name, and the meta-parameters that the optimiser names in `meta`.

    A hyper-parameter, such as `at["lr"]`, is a number, or a tensor that broadcasts against `(tasks, n)`.

    Args:
        by_name: The hyper-parameters.
        layout: Which parameters a row of a vector holds, and where; None where a vector is a block of the whole.
        named: The meta-parameters that the optimiser names.
    """

    by_name: Mapping[str, float | Tensor]
    layout: Layout | None = None
    named: MetaParameters = MetaParameters({})

    def __getitem__(self, name: str) -> float | Tensor:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @classmethod
    def of(cls, at: Mapping[str, float | Tensor]) -> Rates:
        """A plain dictionary of hyper-parameters as such an object; these are what they are."""
        return at if isinstance(at, Rates) else cls(at)

    @property
    def meta(self) -> dict[str, Any]:
        """The meta-parameters that the optimiser names: a tensor each, or a dictionary of tensors for a group."""
        return _Named(self.named.like_given({}))

    def views(self, flat: float | Tensor) -> dict[str, Any]:
        """The parts of a vector by parameter name.

        Args:
            flat: A part of the state or the gradient, `(tasks, n)`; or a hyper-parameter, as it is at the step.

        Returns:
            Views `(tasks, *shape)`, in the dtype of the vector; of a hyper-parameter what broadcasts against these.
        """
        layout = self._whole()
        if not isinstance(flat, Tensor) or flat.ndim == 1 and len(flat) == 1:
            return dict.fromkeys(layout.names, flat)
        return dict(zip(layout.names, layout.views(flat, cast=False), strict=True))

    def flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """The vector `(tasks, n)` of one tensor `(tasks, *shape)` for each parameter, by name: the way back."""
        layout = self._whole()
        if named.keys() != set(layout.names):
            raise ValueError(f"Expected one tensor for each of {list(layout.names)}. Got {list(named)}.")
        tensors = [named[name] for name in layout.names]
        return layout.gather(tensors, torch.empty(len(tensors[0]), 0, device=tensors[0].device))

    def _whole(self) -> Layout:
        if self.layout is None:
            raise ValueError(
                "The parameters by name are not known here. Expected the `at` that an engine gives to `update`, in an "
                "optimiser that is not `is_elementwise`. Got a plain dictionary, or the entries of a block."
            )
        return self.layout

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """What has one of these names and is a tensor; the name of a meta-parameter begins with "meta."."""
        found = {n: v for n, v in self.by_name.items() if n in names and isinstance(v, Tensor)}
        return found | {f"{META}{n}": t for n, t in self.named.flat().items() if f"{META}{n}" in names}

    def replaced(self, tensors: Mapping[str, Tensor]) -> Rates:
        """What there is, with others in the place of tensors of these names."""
        others = {n.removeprefix(META): t for n, t in tensors.items() if n not in self.by_name}
        mine = {n: tensors.get(n, v) for n, v in self.by_name.items()}
        return replace(self, by_name=mine, named=MetaParameters(self.named.like_given(others)))

    def part(self, part: Callable[[Tensor], Tensor]) -> Rates:
        """What an elementwise update needs for a block of the entries; `part` takes it from a tensor."""
        mine = {n: part(v) if isinstance(v, Tensor) else v for n, v in self.by_name.items()}
        return replace(self, by_name=mine, layout=None)


META = "meta."
"""What the name of a meta-parameter begins with among those of hyper-parameters, which are names of attributes."""


class _Named(dict[str, Any]):
    """Meta-parameters by name, with a sentence for what is missing."""

    def __missing__(self, name: str) -> None:
        raise ValueError(
            f"`at.meta` has no {name!r}. Got {sorted(self) or 'none'}: return the names of the meta-parameters that "
            "`update` reads, keys of Objective(..., meta={...}), from the optimiser's property `meta`."
        )
