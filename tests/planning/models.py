"""Small models whose memory is predicted, each unlike the others in what it holds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import Objective, TaskBatch
from imaml.models import MLP, Conv4

TASKS = 6


class Recurrent(nn.Module):
    """An LSTM, which cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Attentive(nn.Module):
    """A transformer layer with a LayerNorm, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


def near(output: Tensor, target: Tensor, initial: dict[str, Tensor], adapted: dict[str, Tensor]) -> Tensor:
    """A loss of the adapted parameters and of the distance that they have gone."""
    return F.mse_loss(output, target) + sum((adapted[n] - initial[n]).square().sum() for n in initial)


def labels(n: int) -> Tensor:
    return torch.randint(3, (TASKS, n))


def problem(name: str) -> tuple[Objective, TaskBatch]:
    torch.manual_seed(0)
    if name == "mlp":
        support, query = ((torch.randn(TASKS, n, 1), torch.randn(TASKS, n, 1)) for n in (10, 4))
        return Objective(MLP(), F.mse_loss), TaskBatch(support=support, query=query)
    if name == "many queries":
        support, query = ((torch.randn(TASKS, n, 1), torch.randn(TASKS, n, 1)) for n in (2, 150))
        return Objective(MLP(), F.mse_loss), TaskBatch(support=support, query=query)
    if name == "initial":
        support, query = ((torch.randn(TASKS, n, 1), torch.randn(TASKS, n, 1)) for n in (10, 4))
        return Objective(MLP(), F.mse_loss, outer_loss=near), TaskBatch(support=support, query=query)
    if name.startswith("tokens"):
        support, query = ((torch.randint(30, (TASKS, n, 7)), labels(n)) for n in (3, 5))
        recompute = [nn.TransformerEncoderLayer] if "recomputed" in name else []
        objective = Objective(Attentive(), F.cross_entropy, recompute=recompute)
        return objective, TaskBatch(support=support, query=query)
    if name == "lstm":
        support, query = ((torch.randn(TASKS, n, 4, 4), labels(n)) for n in (3, 4))
        return Objective(Recurrent(), F.cross_entropy), TaskBatch(support=support, query=query)
    support, query = ((torch.randn(TASKS, n, 1, 14, 14), labels(n)) for n in (3, 9))
    model = Conv4(3, channels=8, image_size=14)
    return Objective(model, F.cross_entropy, adapt=["head"] if name == "head" else None), TaskBatch(
        support=support, query=query
    )
