"""A PyTorch Lightning module: automatic optimisation works, as `result.loss` is a loss like any other."""

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from imaml import MAML, GradientDescent, MetaGradient, Objective, TaskBatch
from imaml.data import Sinusoid
from imaml.models import MLP


class MetaLearner(lightning.LightningModule):
    """Meta-learns the initial parameters of a regression model."""

    def __init__(self, model: nn.Module, engine: MetaGradient) -> None:
        super().__init__()
        self.model, self.engine = model, engine
        self.objective = Objective(model, F.mse_loss)

    def training_step(self, tasks: TaskBatch, index: int) -> Tensor:
        """A step of the outer loop; Lightning calls backward, clips, accumulates and steps."""
        result = self.engine(self.objective, tasks)
        self.log("train_loss", result.loss, batch_size=len(tasks))
        return result.loss

    def validation_step(self, tasks: TaskBatch, index: int) -> None:
        """Query loss after adaptation; without gradients a call only evaluates."""
        self.log("query_loss", self.engine(self.objective, tasks).loss, batch_size=len(tasks))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimiser, or a pair with schedulers."""
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def loader(split: str, batches: int, tasks: int) -> DataLoader:
    """Batches of tasks; `batch_size=None`, as each item is a batch already."""
    return DataLoader([Sinusoid().batch(split, i, tasks) for i in range(batches)], batch_size=None)


def main(steps: int = 50) -> tuple[float, float]:
    """Train on sinusoids; returns the query loss on unseen ones before and after."""
    torch.manual_seed(0)
    learner = MetaLearner(MLP(), MAML(inner=GradientDescent(lr=0.01, steps=3)))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=10.0, accelerator="cpu", **quiet
    )
    validation = loader("val", 1, 100)
    before = trainer.validate(learner, validation, verbose=False)[0]["query_loss"]
    trainer.fit(learner, loader("train", 2 * steps, 8), validation)
    return before, trainer.callback_metrics["query_loss"].item()


if __name__ == "__main__":
    print("query loss on unseen sinusoids: {:.2f} before, {:.2f} after".format(*main()))
