"""Which training texts do harm? A weight for each, and the exact gradient of the held-out loss through the training.

A small GPT-2 learns to predict the words of bank customers' messages. Some of the texts that it learns from have their
words shuffled, some are in a made-up language, and two are there many times. The meta-gradient by the weights, through
every step of AdamW, finds them; training anew without what it finds gives a better model. docs/tutorial-data-weights.md
tells the story.

    pip install 'imaml[train,text]'
    python examples/data_weights.py [--data FOLDER] [--out FILE] [--smoothness]
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import MAML, InnerState, Minibatches, Objective, Task
from imaml.data import Banking77
from imaml.inner import AdamW, warmup_cosine

KINDS = ("clean", "shuffled", "other language", "copies")
LENGTH, IGNORED = 24, -100
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"
CIPHER = str.maketrans(VOWELS + CONSONANTS, VOWELS[2:] + VOWELS[:2] + CONSONANTS[7:] + CONSONANTS[:7])

Tokens = tuple[Tensor, Tensor]
"""What a model sees and what it is to predict, `(texts, tokens)` each, where `IGNORED` stands after the end."""
Maker = Callable[[int], nn.Module]
"""Makes a model, of a seed."""
Encoder = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained on what; the defaults take some minutes on one thread."""

    texts: int = 512
    corrupted: int = 50
    """Texts of each kind of corruption."""
    copied: int = 2
    """Texts that the copies are of."""
    heldout: int = 1024
    """Texts whose loss the meta-gradient is of, and as many others for the test."""
    steps: int = 128
    batch_size: int = 32
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps_root: float = 1e-6
    embedding: float | None = 1.0
    """Standard deviation of the embeddings at first; None: as transformers has it, 0.02, with the head tied to them."""
    checkpoints: int = 32
    seeds: int = 3
    """Trainings that are pulled back, from other parameters and in another order each."""
    retrainings: int = 3
    """Trainings on each choice of texts."""


USUAL: dict[str, dict[str, Any]] = {
    "embeddings of 0.02": {"embedding": None},
    "eps_root of 1e-9": {"eps_root": 1e-9},
    "betas of 0.9 and 0.95": {"betas": (0.9, 0.95)},
}
"""How language models are trained as a rule, which is less smooth."""


def corpus(setting: Setting, path: Path | None) -> tuple[list[str], Tensor, list[str], list[str]]:
    """Texts to train on, the kind of each, and texts held out for the meta-gradient and for the test."""
    rng, n = random.Random(0), setting.corrupted
    by_intent = Banking77(encoder=lambda texts: {}, shots=1, path=path).messages
    texts = [" ".join(text.split()) for group in by_intent.values() for text in group]
    texts = [text for text in texts if 4 <= len(words(text)) <= LENGTH - 1]
    rng.shuffle(texts)
    train, rest = texts[: setting.texts], texts[setting.texts :]
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in train[:n]]
    foreign = [text.lower().translate(CIPHER) for text in train[n : 2 * n]]
    originals = train[3 * n : 3 * n + setting.copied]  # these stay, as clean texts
    copies = [originals[i % len(originals)] for i in range(n)]
    kinds = [KINDS.index(kind) for kind in KINDS[1:] for _ in range(n)] + [0] * (len(train) - 3 * n)
    train = [*shuffled, *foreign, *copies, *train[3 * n :]]
    return train, torch.tensor(kinds), rest[: setting.heldout], rest[setting.heldout : 2 * setting.heldout]


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def padded(texts: Sequence[list[int]]) -> Tokens:
    """Token numbers, the first of which is given and the others are to be predicted."""
    rows = torch.full((len(texts), LENGTH + 1), IGNORED)
    for row, text in zip(rows, texts, strict=True):
        row[: min(len(text), LENGTH + 1)] = torch.tensor(text[: LENGTH + 1])
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


class LanguageModel(nn.Module):
    """The logits of a causal model of transformers; nothing is masked, since what follows the end does not count."""

    def __init__(self, model: Any) -> None:
        """Takes the model as it is."""
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of each next token."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def gpt2(setting: Setting, texts: Sequence[str]) -> tuple[Maker, Encoder]:
    """A maker of models by seed, and the encoder of texts: the 1,000 most frequent words of the training texts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    frequent = Counter(word for text in texts for word in words(text)).most_common(997)
    start, end, unknown = range(3)
    numbers = {word: i for i, (word, _) in enumerate(frequent, start=3)}

    def encode(texts: Sequence[str]) -> Tokens:
        return padded([[start, *(numbers.get(word, unknown) for word in words(text)), end] for text in texts])

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"vocab_size": len(numbers) + 3, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
        tokens = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": setting.embedding is None}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
        if setting.embedding is not None:
            for embedding in (model.transformer.wte, model.transformer.wpe):
                nn.init.normal_(embedding.weight, std=setting.embedding)
        return LanguageModel(model.eval())  # without dropout

    return make, encode


def losses(logits: Tensor, target: Tensor) -> Tensor:
    """The mean cross entropy of every text by itself, `(texts,)`."""
    each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (target != IGNORED).sum(1)


def weighted_loss(logits: Tensor, target: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> Tensor:
    """The training loss: every text counts by its weight."""
    tokens, indices = target
    return (meta["weights"][indices] * losses(logits, tokens)).mean()


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The held-out loss."""
    return losses(logits, target).mean()


def auc(scores: Tensor, kinds: Tensor, kind: int) -> float:
    """How often a text of a kind has a higher score than a clean one."""
    bad, clean = scores[kinds == kind].unsqueeze(1), scores[kinds == 0]
    return ((bad > clean).double() + (bad == clean).double() / 2).mean().item()


def aucs(scores: Tensor, kinds: Tensor) -> dict[str, float]:
    """The same for every kind of corruption, by name."""
    return {name: auc(scores, kinds, kind) for kind, name in enumerate(KINDS) if kind}


class Experiment:
    """The corpus, and trainings on it."""

    def __init__(self, setting: Setting, path: Path | None, dtype: torch.dtype = torch.float32) -> None:
        """Reads and corrupts the texts."""
        self.setting, self.dtype = setting, dtype
        self.texts, self.kinds, heldout, test = corpus(setting, path)
        self._make, encode = gpt2(setting, self.texts)
        self.train, self.heldout, self.test = encode(self.texts), encode(heldout), encode(test)
        self.inner = AdamW(
            lr=warmup_cosine(setting.lr, warmup=setting.steps // 8, total=setting.steps),
            steps=setting.steps,
            betas=setting.betas,
            eps_root=setting.eps_root,
            weight_decay=0.1,
        )
        self.engine = MAML(inner=self.inner, checkpoints=setting.checkpoints, chunk_size=1)

    def objective(self, weights: Tensor, model: nn.Module) -> Objective:
        """The weighted loss of the training texts, and the plain one of those held out."""
        return Objective(model, weighted_loss, outer_loss=plain_loss, meta={"weights": weights})

    def model(self, seed: int) -> nn.Module:
        """A model to train."""
        return self._make(seed).to(self.dtype)

    def ones(self) -> Tensor:
        """Weights at which all texts count alike."""
        return torch.ones(len(self.texts), dtype=self.dtype, requires_grad=True)

    def task(self, seed: int) -> Task:
        """Batches of training texts with their indices, in an order that the seed says, and the held-out texts."""
        texts = Minibatches.of(self.train, batch_size=self.setting.batch_size, seed=seed, indices=True)
        return Task(support=texts, query=self.heldout)

    def meta_gradient(self, weights: Tensor, seed: int) -> Tensor:
        """The derivative of the held-out loss by every weight, through the whole training; > 0 where a text harms."""
        self.engine(self.objective(weights, self.model(seed)), [self.task(seed)]).loss.backward()
        assert weights.grad is not None
        return weights.grad

    def scores(self, seed: int) -> dict[str, Tensor]:
        """What ranks the texts, by the meta-gradient and by what is cheaper; more is worse."""
        model, weights = self.model(seed), self.ones()
        last = replace(self.engine, truncate=1, checkpoints=None)
        result = last(self.objective(weights, model), [self.task(seed)], return_state=True)
        result.loss.backward()
        assert weights.grad is not None and result.state is not None
        return {
            "meta-gradient": self.meta_gradient(self.ones(), seed),
            "last step": weights.grad,
            "one more step": self.one_more_step(model, result.state),
            "loss": self.losses_after(model, result.state),
        }

    def one_more_step(self, model: nn.Module, state: InnerState) -> Tensor:
        """The derivative through one further step, which is on all texts at once: a first-order influence of each."""
        inner = replace(self.inner, steps=1, lr=self.setting.lr / 10)
        engine = MAML(inner=inner, chunk_size=1, microbatch_size=64)
        inputs, targets = self.train
        everything = inputs, (targets, torch.arange(len(self.texts)))
        weights = self.ones()
        objective = self.objective(weights, model)
        engine(objective, [Task(support=everything, query=self.heldout)], start=state).loss.backward()
        assert weights.grad is not None
        return weights.grad

    @torch.no_grad()
    def losses_after(self, model: nn.Module, state: InnerState) -> Tensor:
        """The loss of every training text after the training."""
        adapted = {name: value[0] for name, value in state.parameters.items()}
        parts = zip(*(part.split(64) for part in self.train), strict=True)
        return torch.cat([losses(torch.func.functional_call(model, adapted, x), target) for x, target in parts])

    @torch.no_grad()
    def test_loss(self, kept: Tensor, seed: int) -> float:
        """The loss of unseen texts after a training on some of the texts."""
        data = tuple(part[kept] for part in self.train)
        texts = Minibatches.of(data, batch_size=self.setting.batch_size, seed=seed, indices=True, drop_last=True)
        objective = self.objective(torch.ones(len(data[0]), dtype=self.dtype), self.model(seed))
        return self.engine(objective, [Task(support=texts, query=self.test)]).loss.item()


def rounded(values: Tensor) -> list[float]:
    """Numbers of four digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def main(setting: Setting, path: Path | None = None) -> dict[str, Any]:
    """Find corrupted texts, and train without them."""
    experiment = Experiment(setting, path)
    kinds, n = experiment.kinds, len(experiment.texts)
    ranked = [experiment.scores(seed) for seed in range(setting.seeds)]
    scores = {name: n * each if name == "meta-gradient" else each for name, each in ranked[0].items()}
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "examples": {name: experiment.texts[int((kinds == kind).nonzero()[-1])] for kind, name in enumerate(KINDS)},
        "kinds": kinds.tolist(),
        "scores": {name: rounded(each) for name, each in scores.items()},
        "auc": {name: [aucs(each[name], kinds) for each in ranked] for name in scores},
    }
    bad = kinds != 0
    kept = {"all texts": torch.ones(n, dtype=torch.bool)}
    generator = torch.Generator().manual_seed(0)
    orders = {"at random": torch.rand(n, generator=generator)} | ranked[0]
    for name, order in orders.items():
        kept[name] = torch.ones(n, dtype=torch.bool).index_fill(0, order.topk(int(bad.sum())).indices, False)
    kept["meta-gradient, its sign"] = ranked[0]["meta-gradient"] < 0
    kept["all that is corrupted"] = ~bad
    found["retrained"] = {
        name: {
            "texts": int(which.sum()),
            "corrupted": int((which & bad).sum()),
            "loss": [experiment.test_loss(which, 100 + seed) for seed in range(setting.retrainings)],
        }
        for name, which in kept.items()
    }
    return found


def smoothness(setting: Setting, path: Path | None = None) -> dict[str, Any]:
    """What a meta-gradient is worth in trainings that are less smooth, and whether what it found helps them too."""
    all_usual = {name: value for change in USUAL.values() for name, value in change.items()}
    found: dict[str, Any] = {}
    helpful: Tensor | None = None
    for name, change in {"as above": {}, **USUAL, "all three": all_usual}.items():
        single, double = (
            Experiment(replace(setting, **change), path, dtype) for dtype in (torch.float32, torch.float64)
        )
        gradient, exact = (each.meta_gradient(each.ones(), 0) for each in (single, double))
        helpful = gradient < 0 if helpful is None else helpful  # in the first training, which is the smooth one
        seeds = range(100, 100 + setting.retrainings)
        found[name] = {
            "auc": aucs(gradient, single.kinds),
            "spread": (len(gradient) * gradient[single.kinds == 0]).std().item(),
            "error": ((gradient - exact).norm() / exact.norm()).item(),
            "all texts": [single.test_loss(torch.ones_like(helpful), seed) for seed in seeds],
            "helpful texts": [single.test_loss(helpful, seed) for seed in seeds],
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.csv and test.csv; left out: it is downloaded")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--smoothness", action="store_true", help="compare trainings that are smooth and less smooth")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoothness:
        result = smoothness(Setting(), options.data)
        for name, of in result.items():
            print(f"{name:22} {of}")
    else:
        result = main(Setting(), options.data)
        for method, per_seed in result["auc"].items():
            means = {kind: sum(each[kind] for each in per_seed) / len(per_seed) for kind in KINDS[1:]}
            print(f"{method:16}", *(f"{kind}: AUC {mean:.3f}  " for kind, mean in means.items()))
        for choice, of in result["retrained"].items():
            mean = sum(of["loss"]) / len(of["loss"])
            print(f"{choice:24} {of['texts']:4} texts, {of['corrupted']:3} corrupted: test loss {mean:.4f}")
    if options.out:
        options.out.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
