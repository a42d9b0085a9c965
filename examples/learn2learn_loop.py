"""A loop that was written for learn2learn: the sampler and the split of a task stay, `clone` and `adapt` go."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective, Task

WAYS, SHOTS, META_BATCH, ADAPTATION_STEPS, FAST_LR = 5, 1, 8, 3, 0.01


def sample() -> tuple[Tensor, Tensor]:
    """In place of `tasksets.train.sample()`: 2 * SHOTS points of each class, which 4 of 32 coordinates tell apart."""
    data = torch.randn(WAYS, 2 * SHOTS, 32)
    data[..., :4] += 5 * torch.randn(WAYS, 1, 4)
    return data.flatten(0, 1), torch.arange(WAYS).repeat_interleave(2 * SHOTS)


def split(batch: tuple[Tensor, Tensor]) -> Task:
    """What `fast_adapt` began with: every other example is for adaptation, the rest for evaluation."""
    data, labels = batch
    adaptation = torch.arange(len(data)) % 2 == 0
    return Task(support=(data[adaptation], labels[adaptation]), query=(data[~adaptation], labels[~adaptation]))


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """The share of right answers."""
    return (predictions.argmax(dim=1) == targets).float().mean()


def main(iterations: int = 100) -> list[float]:
    """Train; returns the accuracy after adaptation at every iteration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, WAYS))
    # was: maml = l2l.algorithms.MAML(model, lr=FAST_LR, first_order=False)
    engine = MAML(inner=GradientDescent(lr=FAST_LR, steps=ADAPTATION_STEPS))  # first_order=True is FOMAML(...)
    objective = Objective(model, F.cross_entropy, metric=accuracy)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    accuracies = []
    for _ in range(iterations):
        opt.zero_grad()
        result = engine(objective, [split(sample()) for _ in range(META_BATCH)])
        result.loss.backward()  # the mean over the tasks: p.grad.data.mul_(1.0 / META_BATCH) goes too
        opt.step()
        accuracies.append(result.report.metric.mean().item())
    return accuracies


if __name__ == "__main__":
    history = main()
    print(f"accuracy after adaptation: {history[0]:.1%} at first, {sum(history[-10:]) / 10:.1%} in the end")
