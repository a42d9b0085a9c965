"""LoRA adapters of peft on a small transformer: they adapt, alone or with other layers meta-learned through them."""

import peft
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from imaml import MAML, GradientDescent, Objective, TaskBatch

WAYS, WORDS, LENGTH = 3, 40, 6
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def build() -> peft.PeftModel:
    """A transformer, pretrained in real life, with LoRA adapters in its attention; only they require grad."""
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=WAYS, **SIZES)).eval()
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"]))


def draw(tasks: int, examples: int = 9) -> TaskBatch:
    """Texts of random words; a task has its own key word for each class, somewhere in every text of the class."""
    keys = torch.rand(tasks, WORDS).argsort(-1)[:, :WAYS]
    labels = torch.arange(examples).remainder(WAYS).expand(tasks, -1)

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        words, place = torch.randint(WORDS, (tasks, examples, LENGTH)), torch.randint(LENGTH, (tasks, examples, 1))
        return {"input_ids": words.scatter(-1, place, keys.gather(-1, labels).unsqueeze(-1))}, labels

    return TaskBatch(support=batch(), query=batch())


def adapters(model: peft.PeftModel) -> Objective:
    """The adapters adapt; what else requires grad is meta-learned through them."""
    return Objective(model, lambda output, labels: F.cross_entropy(output.logits, labels), adapt=["*lora_*"])


def main(learn: tuple[str, ...] = (), steps: int = 30) -> tuple[list[float], set[str]]:
    """Train, adapters and layers with a name in `learn`; returns the query losses and which parameters changed."""
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or any(part in name for part in learn))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objective = adapters(model)
    engine = MAML(inner=GradientDescent(lr=2.0, steps=3))
    optimizer = torch.optim.Adam(objective.parameters().values(), lr=1e-2)
    tasks, losses = draw(4), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(engine(objective, tasks).loss)
        losses[-1].backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    return torch.stack(losses).tolist(), changed


if __name__ == "__main__":
    for learn in ((), ("LayerNorm", "classifier")):
        losses, changed = main(learn)
        print(f"{len(changed)} tensors learned: query loss {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")
