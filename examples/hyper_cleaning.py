"""Data hyper-cleaning (Franceschi et al. 2017): learn a weight for every training example, half of them mislabelled.

The inner problem is logistic regression on weighted examples, solved by Newton-CG; the outer loss is the cross entropy
of a small clean validation set. On the digits that come with scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from imaml import CG, ImplicitMAML, NewtonCG, Objective, Task, bilevel

TRAIN, VALID, L2 = 800, 300, 1e-3


def data(seed: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Train, validation and test set, and which training labels are wrong: half of them."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images)[order] / 16, torch.tensor(labels)[order]
    wrong = torch.arange(TRAIN) < TRAIN // 2
    y[: TRAIN // 2] = (y[: TRAIN // 2] + torch.randint(1, 10, (TRAIN // 2,))) % 10
    return [(x[a:b], y[a:b]) for a, b in ((0, TRAIN), (TRAIN, TRAIN + VALID), (TRAIN + VALID, len(y)))], wrong


def logits(inner: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of a linear model."""
    return x @ inner["weight"] + inner["bias"]


def train_loss(inner: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The inner loss: every example counts by its weight."""
    losses = F.cross_entropy(logits(inner, batch[0]), batch[1], reduction="none")
    return (meta["weights"].sigmoid() * losses).mean() + L2 * sum(p.square().sum() for p in inner.values())


def validation_loss(inner: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The outer loss."""
    return F.cross_entropy(logits(inner, batch[0]), batch[1])


def main(steps: int = 60, seed: int = 0) -> dict[str, float]:
    """Test accuracies, and how well the weights tell right labels from wrong ones."""
    torch.manual_seed(seed)
    (train, valid, test), wrong = data(seed)
    zeros = {"weight": torch.zeros(64, 10, dtype=torch.float64), "bias": torch.zeros(10, dtype=torch.float64)}
    engine = ImplicitMAML(
        inner=NewtonCG(steps=30, stationarity=1e-6),
        regularization=None,  # the inner problem is strongly convex by itself
        solver=CG(max_steps=50, rtol=1e-3),
        warm_start=True,
    )

    def problem(weights: Tensor) -> Objective:
        return bilevel(train_loss, validation_loss, inner=zeros, meta={"weights": weights})

    def accuracy(weights: Tensor) -> float:
        fitted = engine.adapt(problem(weights), train)
        return (logits(fitted, test[0]).argmax(-1) == test[1]).double().mean().item()

    weights = torch.zeros(TRAIN, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        engine(problem(weights), [Task(support=train, query=valid)]).loss.backward()
        optimizer.step()
    return {
        "all data": accuracy(torch.zeros(TRAIN, dtype=torch.float64)),
        "clean half": accuracy(torch.where(wrong, -50.0, 0.0).double()),
        "learned weights": accuracy(weights.detach()),
        "labels told apart": ((weights < 0) == wrong).double().mean().item(),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:20} {100 * value:.1f} %")
