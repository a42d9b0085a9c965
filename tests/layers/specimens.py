"""One small model for every layer of `torch.nn`, with an input that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, EXAMPLES, TASKS = 3, 4, 2


@dataclass(frozen=True)
class Specimen:
    """A layer, the shape of one example, and what is said about it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    call: Callable[[nn.Module, Tensor], Any] = lambda layer, x: layer(x)
    integer: int = 0
    """Draw integers below this as input, in place of numbers."""
    note: str = ""
    buffers: str | None = None


class Around(nn.Module):
    """A scale and a shift before the layer, a linear head after it."""

    def __init__(self, specimen: Specimen, x: Tensor) -> None:
        super().__init__()
        self.specimen, self.layer = specimen, specimen.build()
        if not specimen.integer:
            self.scale, self.shift = (nn.Parameter(0.3 * torch.randn(specimen.shape)) for _ in range(2))
        self.head: nn.Module = nn.Identity()
        state = torch.get_rng_state()
        with torch.no_grad():
            width = self.features(x.float()).shape[-1] if not specimen.integer else self.features(x).shape[-1]
        torch.set_rng_state(state)
        self.head = nn.Linear(width, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        moved = x if self.specimen.integer else x * (1 + self.scale) + self.shift
        y = self.specimen.call(self.layer, moved)
        while not isinstance(y, Tensor):
            y = y[0]
        return y.reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def simple(name: str, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Specimen:
    return Specimen(lambda: getattr(nn, name)(*args, **kwargs), shape)


LINE, PLANE, SPACE = (2, 4), (2, 4, 4), (2, 4, 4, 4)
BY_DIMENSION = {1: LINE, 2: PLANE, 3: SPACE}


def _by_dimension() -> dict[str, Specimen]:
    found: dict[str, Specimen] = {}
    for d, shape in BY_DIMENSION.items():
        for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool"):
            found[f"{kind}{d}d"] = simple(f"{kind}{d}d", shape, 2)
        found[f"LPPool{d}d"] = simple(f"LPPool{d}d", shape, 2, 2)
        for kind in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
            found[f"{kind}{d}d"] = simple(f"{kind}{d}d", shape, 1)
        found[f"ConstantPad{d}d"] = simple(f"ConstantPad{d}d", shape, 1, 0.5)
        for kind in ("Conv", "ConvTranspose"):
            found[f"{kind}{d}d"] = simple(f"{kind}{d}d", shape, 2, 2, 2)
        found[f"Dropout{d}d"] = simple(f"Dropout{d}d", shape)
        found[f"BatchNorm{d}d"] = simple(f"BatchNorm{d}d", shape, 2, track_running_stats=False)
        found[f"InstanceNorm{d}d"] = simple(f"InstanceNorm{d}d", shape, 2, affine=True)
        found[f"MaxUnpool{d}d"] = Specimen(
            lambda d=d: nn.ModuleList(
                [getattr(nn, f"MaxPool{d}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{d}d")(2)]
            ),
            shape,
            lambda layer, x: layer[1](*layer[0](x)),
        )
    for d in (2, 3):
        found[f"FractionalMaxPool{d}d"] = simple(f"FractionalMaxPool{d}d", BY_DIMENSION[d], 2, output_size=2)
    return found


def _elementwise() -> dict[str, Specimen]:
    names = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU ReLU "
        "ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink AlphaDropout Dropout"
    )
    found = {name: simple(name, (4,)) for name in names.split()}
    found["FeatureAlphaDropout"] = simple("FeatureAlphaDropout", PLANE)
    found["Threshold"] = simple("Threshold", (4,), 0.1, 0.0)
    found |= {name: simple(name, (4,), dim=-1) for name in ("GLU", "LogSoftmax", "Softmax", "Softmin")}
    found["Softmax2d"] = simple("Softmax2d", PLANE)
    return found


def _transformers() -> dict[str, Specimen]:
    options: dict[str, Any] = {"dim_feedforward": 4, "dropout": 0.0, "batch_first": True}

    def layer(kind: Any) -> nn.Module:
        return kind(2, 1, **options)

    shape = (3, 2)
    return {
        "MultiheadAttention": Specimen(
            lambda: nn.MultiheadAttention(2, 1, batch_first=True), shape, lambda layer, x: layer(x, x, x)
        ),
        "TransformerEncoderLayer": Specimen(lambda: layer(nn.TransformerEncoderLayer), shape),
        "TransformerEncoder": Specimen(lambda: nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 1), shape),
        "TransformerDecoderLayer": Specimen(
            lambda: layer(nn.TransformerDecoderLayer), shape, lambda layer, x: layer(x, x)
        ),
        "TransformerDecoder": Specimen(
            lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 1), shape, lambda layer, x: layer(x, x)
        ),
        "Transformer": Specimen(lambda: nn.Transformer(2, 1, 1, 1, **options), shape, lambda layer, x: layer(x, x)),
    }


def _others() -> dict[str, Specimen]:
    recurrent = {name: simple(name, (3, 2), 2, 2, batch_first=True) for name in ("RNN", "LSTM", "GRU")}
    cells = {name: simple(name, (2,), 2, 2) for name in ("RNNCell", "LSTMCell", "GRUCell")}
    return (
        recurrent
        | cells
        | {
            "Linear": simple("Linear", (4,), 4, 3),
            "Bilinear": Specimen(lambda: nn.Bilinear(4, 4, 2), (4,), lambda layer, x: layer(x, x.flip(-1))),
            "ChannelShuffle": simple("ChannelShuffle", (4, 2, 2), 2),
            "CosineSimilarity": Specimen(
                lambda: nn.CosineSimilarity(), (4,), lambda layer, x: layer(x, x.flip(-1) ** 2)
            ),
            "PairwiseDistance": Specimen(
                lambda: nn.PairwiseDistance(), (4,), lambda layer, x: layer(x, x.flip(-1) ** 2)
            ),
            "CrossMapLRN2d": simple("CrossMapLRN2d", PLANE, 2),
            "LocalResponseNorm": simple("LocalResponseNorm", PLANE, 2),
            "LayerNorm": simple("LayerNorm", (4,), 4),
            "RMSNorm": simple("RMSNorm", (4,), 4),
            "GroupNorm": simple("GroupNorm", PLANE, 1, 2),
            "Embedding": Specimen(lambda: nn.Embedding(5, 2), (3,), integer=5),
            "EmbeddingBag": Specimen(lambda: nn.EmbeddingBag(5, 2), (3,), integer=5),
            "Flatten": simple("Flatten", LINE),
            "Unflatten": simple("Unflatten", (4,), 1, (2, 2)),
            "Fold": simple("Fold", (4, 4), 3, 2),
            "Unfold": simple("Unfold", PLANE, 2),
            "PixelShuffle": simple("PixelShuffle", (4, 2, 2), 2),
            "PixelUnshuffle": simple("PixelUnshuffle", (1, 4, 4), 2),
            "Upsample": simple("Upsample", PLANE, scale_factor=2, mode="bicubic"),
            "UpsamplingBilinear2d": simple("UpsamplingBilinear2d", PLANE, scale_factor=2),
            "UpsamplingNearest2d": simple("UpsamplingNearest2d", PLANE, scale_factor=2),
            "Sequential": Specimen(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh())),
            "ModuleList": Specimen(lambda: nn.ModuleList([nn.Linear(4, 2)]), call=lambda layer, x: layer[0](x)),
            "ModuleDict": Specimen(lambda: nn.ModuleDict({"a": nn.Linear(4, 2)}), call=lambda layer, x: layer["a"](x)),
            "ParameterList": Specimen(lambda: nn.ParameterList([torch.randn(4)]), call=lambda layer, x: x * layer[0]),
            "ParameterDict": Specimen(
                lambda: nn.ParameterDict({"a": torch.randn(4)}), call=lambda layer, x: x * layer["a"]
            ),
        }
    )


def _losses() -> dict[str, Specimen]:
    """The loss of the features and of something derived from them; the head then scales one number."""

    def of(name: str, call: Callable[[nn.Module, Tensor], Tensor], *args: Any, shape: Any = (4,)) -> Specimen:
        def each(layer: nn.Module, x: Tensor) -> Tensor:
            return torch.stack([call(layer, row.unsqueeze(0)) for row in x])

        return Specimen(lambda: getattr(nn, name)(*args), shape, each)

    def target(x: Tensor) -> Tensor:
        return x.new_tensor([[0.2, 0.7, 0.1, 0.4]])

    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double()
    label = torch.tensor([2])
    found = {
        name: of(name, lambda layer, x: layer(x, target(x)))
        for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss", "PoissonNLLLoss")
    }
    found |= {
        name: of(name, lambda layer, x: layer(x, label)) for name in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss")
    }
    return found | {
        "BCELoss": of("BCELoss", lambda layer, x: layer(x.sigmoid(), target(x))),
        "KLDivLoss": of("KLDivLoss", lambda layer, x: layer(x.log_softmax(-1), target(x)), None, None, "batchmean"),
        "GaussianNLLLoss": of("GaussianNLLLoss", lambda layer, x: layer(x, target(x), x.flip(-1).exp())),
        "HingeEmbeddingLoss": of("HingeEmbeddingLoss", lambda layer, x: layer(x, signs.to(x.dtype))),
        "SoftMarginLoss": of("SoftMarginLoss", lambda layer, x: layer(x, signs.to(x.dtype))),
        "MarginRankingLoss": of("MarginRankingLoss", lambda layer, x: layer(x, x.flip(-1), signs.to(x.dtype))),
        "MultiLabelMarginLoss": of("MultiLabelMarginLoss", lambda layer, x: layer(x, torch.tensor([[2, 0, -1, 1]]))),
        "MultiLabelSoftMarginLoss": of("MultiLabelSoftMarginLoss", lambda layer, x: layer(x, (signs > 0).to(x.dtype))),
        "CosineEmbeddingLoss": of("CosineEmbeddingLoss", lambda layer, x: layer(x, x.flip(-1) ** 2, torch.ones(1))),
        "TripletMarginLoss": of("TripletMarginLoss", lambda layer, x: layer(x, x.flip(-1) ** 2, x.exp())),
        "TripletMarginWithDistanceLoss": of(
            "TripletMarginWithDistanceLoss", lambda layer, x: layer(x, x.flip(-1) ** 2, x.exp())
        ),
        "CTCLoss": of(
            "CTCLoss",
            lambda layer, x: layer(
                x.transpose(0, 1).log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
            ),
            shape=(4, 3),
        ),
        "AdaptiveLogSoftmaxWithLoss": Specimen(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2]), call=lambda layer, x: layer.log_prob(x)
        ),
        "LinearCrossEntropyLoss": of("LinearCrossEntropyLoss", lambda layer, x: layer(x, label), 4, 3),
    }


SPECIMENS: dict[str, Specimen] = {**_elementwise(), **_by_dimension(), **_transformers(), **_others(), **_losses()}

WITH_STATISTICS = {
    f"{kind}{d}d, running statistics, buffers={policy!r}": Specimen(
        lambda kind=kind, d=d: getattr(nn, f"{kind}{d}d")(2, track_running_stats=True), shape, buffers=policy
    )
    for kind in ("BatchNorm", "InstanceNorm")
    for d, shape in BY_DIMENSION.items()
    for policy in ("batch", "frozen")
}

NOT_RUN: dict[str, str] = {
    "Module": "the base class",
    "Container": "the base class of containers before 2017",
    "RNNBase": "the base class of `RNN`, `LSTM` and `GRU`",
    "RNNCellBase": "the base class of the cells",
    "NLLLoss2d": "the old name of `NLLLoss`",
    "DataParallel": "not supported: adapt `model.module`",
    "SyncBatchNorm": "not supported: its kernels need CUDA and a process group; use BatchNorm",
}
"""What has no specimen, and why; the lazy layers besides, which are others once initialised."""


def inputs(specimen: Specimen) -> Tensor:
    """`(tasks, examples, *shape)`."""
    size = (TASKS, EXAMPLES, *specimen.shape)
    return torch.randint(specimen.integer, size) if specimen.integer else torch.randn(size, dtype=torch.float64)
