"""What can be chosen: every flag of the program is a field of one of these dataclasses or of `Plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from imaml._curvature.product import HvpMode
from imaml._engine.nonfinite import OnNonfinite
from imaml._strategies.storage import Storage
from imaml.cli._option_types import FromFile
from imaml.training import CheckpointError, Plan
from imaml.training._optimizer import OptimizerOptions

Dataset = Literal["sinusoid", "glyphs", "omniglot", "banking77"]
Model = Literal["mlp", "conv4", "minilm"]
Strategy = Literal["maml", "fomaml", "imaml"]
Tracker = Literal["tensorboard", "wandb"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class EpisodeOptions:
    """What to learn. An option left at None does not apply to the dataset, or takes its default.

    Args:
        dataset: Sine curves, characters in many typefaces, handwritten characters, or messages of bank customers.
        model: sinusoid: mlp; glyphs, omniglot: conv4, with 32 and 64 channels; banking77: minilm, its last two layers
            and a head.
        data: omniglot: packed file, archive, or folder; banking77: folder with train.csv and test.csv; None downloads
            it once.
        split: omniglot: characters dealt at random, or the original background and evaluation alphabets.
        ways: glyphs, omniglot, banking77: classes of a task.
        shots: Support examples (of each class).
        queries: Query examples (of each class).
        seed: Seed of the tasks and of the initial parameters.
    """

    dataset: Dataset = "glyphs"
    model: Model | None = None
    data: Path | None = None
    split: Literal["random", "original"] | None = None
    ways: int | None = None
    shots: int = 1
    queries: int = 15
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to compute the meta-gradient. An option left at None does not apply, or takes its default.

    Args:
        adapt: What the inner loop changes: parameters or modules by name or pattern; the rest is learned through it.
        inner_lr: Step size of the inner gradient descent.
        inner_steps: Its steps.
        regularization: Weight of the proximal term.
        damping: imaml: multiple of the identity added to the linear system, or auto: raised until it is definite.
        cg_steps: imaml: conjugate gradient steps of a solve.
        checkpoints: maml: inner states kept; None keeps all.
        storage: maml: where they are kept, device, cpu, or disk (a temporary file).
        chunk_size: Tasks vectorised at once; None: as many as save 32 MiB (not on a CPU: 256); auto: as many as the
            free memory holds, so that a run repeats bit for bit only with the same memory free.
        hvp: maml, imaml: how Hessian-vector products are computed.
        curvature: imaml: the Hessian of the support loss, or its Gauss-Newton matrix.
        compile: Compile the derivatives of the losses, once for each shape: for small models without dropout.
        compile_budget: Seconds of compilation after which it runs uncompiled.
        on_nonfinite: raise an error at a task whose losses or gradient are NaN or infinite, or skip and count it.
    """

    adapt: list[str] | None = None
    inner_lr: float | None = None
    inner_steps: int | None = None
    regularization: float | None = None
    damping: float | Literal["auto"] | None = None
    cg_steps: int | None = None
    checkpoints: int | None = None
    storage: Storage | None = None
    chunk_size: int | Literal["auto"] | None = None
    hvp: HvpMode | None = None
    curvature: Literal["hessian", "ggn"] | None = None
    compile: bool | None = None
    compile_budget: float | None = None
    on_nonfinite: OnNonfinite | None = None


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where to compute.

    Args:
        device: A device of torch, such as cpu or cuda.
        threads: CPU threads; None: as torch chooses. A run repeats bit for bit with the same number.
    """

    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Train(FromFile):
    """Meta-train a model, then test it on unseen classes. Defaults follow the dataset and the strategy.

    Args:
        strategy: How the meta-gradient is computed: exact, first-order, or implicit.
        out: Run folder; None: runs/DATASET-STRATEGY.
        resume: Continue the run in the folder; other options may then be left out.
        save_minutes: What a kill can cost: minutes from one checkpoint to the next, 0 for one after every meta-step.
            Every validation writes one too.
        track: Where the curves are drawn too: tensorboard, in the run folder; wandb, as one run.
    """

    strategy: Strategy = "maml"
    out: Path | None = None
    resume: bool = False
    save_minutes: float = 1.0
    track: tuple[Tracker, ...] = ()
    episodes: EpisodeOptions = field(default_factory=EpisodeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    plan: Plan = field(default_factory=Plan)
    machine: MachineOptions = field(default_factory=MachineOptions)

    def __post_init__(self) -> None:
        if not self.save_minutes >= 0:
            raise ValueError(f"`save_minutes` must not be negative. Got {self.save_minutes}.")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out or Path("runs", f"{self.episodes.dataset}-{self.strategy}")

    @property
    def config(self) -> dict[str, Any]:
        """What the numbers of a run depend on, and where they are drawn, as plain values."""
        data = self.episodes.data
        episodes = {**asdict(self.episodes), "data": None if data is None else str(data)}
        return {
            "strategy": self.strategy,
            "episodes": episodes,
            "engine": asdict(self.engine),
            "plan": asdict(self.plan),
            "machine": asdict(self.machine),
            "track": list(self.track),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], **others: Any) -> Train:
        """The options that `config` came from; a CheckpointError if another program wrote it."""
        try:
            data = config["episodes"]["data"]
            return cls(
                strategy=config["strategy"],
                episodes=EpisodeOptions(**{**config["episodes"], "data": None if data is None else Path(data)}),
                engine=EngineOptions(**config["engine"]),
                plan=Plan(**config["plan"]),
                machine=MachineOptions(**config["machine"]),
                track=tuple(config.get("track", ())),
                **others,
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"The configuration of the run is of another version: {error}. Train anew."
            ) from error


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How long and how fast to meta-train each strategy. An option left at None takes the default of the strategy.

    Args:
        steps: Meta-steps at most.
        minutes: Wall-clock budget of everything together; None: the steps alone decide, and a busy machine finds the
            same, only later.
        meta_batch: Tasks per meta-step.
        meta_lr: Learning rate of the outer optimiser.
        optimizer: The outer optimiser: a class of torch.optim by its name, in any case.
        optimizer_options: Its options, such as weight_decay=0.01 betas=0.9,0.99.
        clip_norm: Largest Euclidean norm of a meta-gradient: a longer one is scaled down to it.
        schedule: Learning rate over the run: constant, or half a cosine to 0.
        eval_every: Meta-steps between two validations.
        val_tasks: Tasks of a validation.
        eval_tasks: Test tasks of the final evaluation.
        eval_inner_steps: Inner steps in validation and test; None: as in training.
    """

    steps: int | None = None
    minutes: float | None = None
    meta_batch: int | None = None
    meta_lr: float | None = None
    optimizer: str | None = None
    optimizer_options: OptimizerOptions | None = None
    clip_norm: float | None = None
    schedule: Literal["constant", "cosine"] | None = None
    eval_every: int | None = None
    val_tasks: int | None = None
    eval_tasks: int | None = None
    eval_inner_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Compare(FromFile):
    """Train every strategy from the same start on the same tasks, and write a report.

    Every strategy has settings of its own; an option that is given goes to each that has it.

    Args:
        strategies: Which to compare.
        out: Folder of the report, written over; None: runs/compare-DATASET.
    """

    strategies: tuple[Strategy, ...] = STRATEGIES
    out: Path | None = None
    episodes: EpisodeOptions = field(default_factory=EpisodeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)

    @property
    def folder(self) -> Path:
        """The folder of the report."""
        return self.out or Path("runs", f"compare-{self.episodes.dataset}")


@dataclass(frozen=True, kw_only=True)
class Verify(FromFile):
    """Prove meta-gradients right, or show them wrong, against finite differences in float64.

    A problem is a function without arguments that returns (objective, tasks), or (objective, tasks, engine) to verify
    that engine, or (objective, tasks, function) to verify any function(objective, tasks) that returns gradients by
    parameter name: then --strategy says what it claims to compute, --inner-lr, --inner-steps and --regularization how.
    Without a problem the library's own strategies are checked on built-in models.

    A strategy that refuses the problem is left out with the reason; where all do, that is bad input.

    Exit code: 1 if a check failed, 2 after bad input, else 0. A check without a verdict ("inconclusive") is listed with
    the reason and does not fail.

    Args:
        problem: module:function, imported with the current folder on the path.
        strategy: What to verify; imaml needs an inner loop and a solve that converge.
        tolerance: The largest relative error that passes.
        seed: Seed of the directions, of random draws, and of the built-in problems.
        smoothness: Say too whether rounding, or the inner training itself, leaves a meaningful meta-gradient of your
            problem, and what to change if not. It does not fail the command.
    """

    problem: Annotated[str | None, tyro.conf.Positional] = None
    strategy: Literal["maml", "fomaml", "imaml", "all"] = "all"
    tolerance: float = 1e-5
    seed: int = 0
    smoothness: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
