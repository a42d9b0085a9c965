"""What is verified: an engine, or a function of another library, called on a float64 copy of the user's problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imaml._errors import PrecisionWarning, SolverWarning
from imaml._minibatches import batch_at
from imaml._objective.buffers import HeldBuffers
from imaml._objective.foreign import check_reached
from imaml._objective.objective import Objective
from imaml._strategies.meta_gradient import MetaGradient
from imaml._tasks import Task, TaskBatch
from imaml._torch import tree_leaves
from imaml.verify._claims import name_of
from imaml.verify._reference import Reference, draws, flat

Tasks = TaskBatch | Sequence[Task]
Subject = MetaGradient | Callable[[Objective, Any], Any]


def in_double(tasks: Tasks) -> Tasks:
    """The tasks in float64; labels keep their integer dtype."""
    if isinstance(tasks, TaskBatch):
        return tasks.to(dtype=torch.float64)
    moved = [TaskBatch.stack([task]).to(dtype=torch.float64)[0] for task in tasks]
    if not moved:
        raise ValueError("Expected at least one task. Got an empty list.")
    return moved


def call(subject: Subject, objective: Objective, tasks: Tasks, seed: int) -> tuple[Tensor, bool]:
    """The meta-gradient of the subject.

    Returns:
        One float64 vector in the order of `objective.parameters()`, and whether it came in float64.

    Raises:
        TypeError: Not a dict of tensors by parameter name, nor one tensor.
        ValueError: Wrong names or shapes, or NaN.
    """
    with draws(seed), torch.enable_grad(), warnings.catch_warnings():
        for category in (SolverWarning, PrecisionWarning):  # the verdict says more
            warnings.simplefilter("ignore", category)
        if isinstance(subject, MetaGradient):
            result: Any = subject.value_and_grad(objective, tasks)[1]
        else:
            result = subject(objective, tasks)
    like = objective.parameters()
    vector = _flat(result, like, name_of(subject))
    if not bool(vector.isfinite().all()):
        raise ValueError(
            f"{name_of(subject)} returned NaN or infinite values: use a smaller inner step size, or look for an "
            "operation with an infinite derivative such as sqrt at 0."
        )
    return vector.double(), vector.dtype == torch.float64


def _flat(result: Any, like: Mapping[str, Tensor], name: str) -> Tensor:
    size = sum(p.numel() for p in like.values())
    if isinstance(result, Tensor):
        if result.shape != (size,):
            raise ValueError(
                f"{name} must return ({size},), the gradients of {len(like)} parameters in order. Got "
                f"{tuple(result.shape)}: flatten and concatenate one gradient per parameter, zeros for unused ones."
            )
        return result.detach()
    if not isinstance(result, Mapping):
        raise TypeError(f"{name} must return a dict of gradients by name, or one tensor. Got {type(result).__name__}.")
    if set(result) != set(like):
        raise ValueError(
            f"{name} must return one gradient per parameter. Missing: {sorted(set(like) - set(result)) or 'none'}; "
            f"unknown: {sorted(map(str, set(result) - set(like))) or 'none'}. Return zeros for unused parameters."
        )
    for key, parameter in like.items():
        gradient = result[key]
        if not isinstance(gradient, Tensor) or gradient.shape != parameter.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(
                f"{name} must return a gradient of shape {tuple(parameter.shape)} for {key!r}. Got {got}: return zeros "
                "for unused parameters."
            )
    return flat({key: result[key] for key in like})


def evaluated(objective: Objective, task: Task) -> list[float]:
    """Support and query loss at the objective's own parameters."""
    values = objective.parameters() | objective.constants()
    pairs = ((batch_at(task.support, 0), False), (task.query, True))
    with HeldBuffers.of(objective.held()).copied():
        return [objective.evaluate(values, batch, outer=outer)[0].item() for batch, outer in pairs]


class _Reads(TorchFunctionMode):
    """Notes whether any of some tensors is computed with; to ask for a shape or a dtype is not to."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._tensors = {id(t): t for t in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`."""
        if func not in _QUESTIONS:
            self.found |= any(id(leaf) in self._tensors for leaf in tree_leaves((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


_TENSOR: Any = Tensor  # whose attributes have getters, which annotations do not say
_QUESTIONS = {
    getattr(_TENSOR, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_leaf",
        "grad_fn",
        "grad",
        "_version",
    )
} | {Tensor.is_inference}


def check_copied(reference: Reference, model: nn.Module | None, seed: int) -> None:
    """Raise TypeError where a loss computes with tensors of the original model, past the copy that is verified."""
    if model is None:
        return
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    task, values = reference.tasks[0], reference.values()
    with draws(seed), _Reads((*kept, *model.parameters(), *model.buffers())) as reads:
        reference.value(lambda leaves: reference.loss(leaves, task.support, step=0), values)
        reference.query_loss(values, task)
    if reads.found:
        raise TypeError(
            f"The loss reads {type(model).__name__} itself, of which a copy is verified. Expected a loss of the "
            "model's output. Got a function that holds the model: return what it reads from the forward pass, or make "
            "the loss a module, or a method, of what holds the model."
        )


def check_own(reference: Reference, seed: int) -> None:
    """Raise ValueError where a loss depends on a tensor that requires grad and that no derivative is taken by."""
    task, leaves = reference.tasks[0], {n: t.clone().requires_grad_() for n, t in reference.values().items()}
    for kind, batch, outer in (("support", task.support, False), ("query", task.query, True)):

        @torch.enable_grad()
        def evaluate(batch: Any = batch, outer: bool = outer) -> list[Tensor]:
            with draws(seed):
                return [reference.loss(leaves, batch, step=0, outer=outer)]

        check_reached(kind, evaluate(), leaves.values(), evaluate, reference.objective.names)


def is_random(reference: Reference, seed: int, as_given: Callable[[], object]) -> bool:
    """Whether the support or query loss draws random numbers.

    Args:
        reference: In float64.
        seed: Seed of the random numbers.
        as_given: Evaluates the losses as the user gave them, before the cast.

    Returns:
        Whether it does.

    Raises:
        TypeError: The loss cannot be evaluated in float64. Where it cannot as given either, that error comes through.
        ValueError: The loss differs between two calls with the same seed, or is not finite.
    """
    task, values = reference.tasks[0], reference.values()

    def both(s: int) -> list[float]:
        with draws(s):
            support = reference.value(lambda leaves: reference.loss(leaves, task.support, step=0), values)
            return [support.item(), reference.query_loss(values, task).item()]

    try:
        both(seed)
    except RuntimeError as error:
        with draws(seed), torch.enable_grad():
            as_given()
        raise TypeError(
            f"The model or its loss does not run in float64: {error}. Expected one that computes in the dtype of its "
            "parameters and inputs: keep constants as buffers of the model, and make no tensor of a fixed dtype."
        ) from error
    first, again, other = both(seed), both(seed), both(seed + 1)
    if any(x != x or abs(x) == float("inf") for x in first):
        raise ValueError(f"The loss is not finite: support {first[0]}, query {first[1]}. Look for NaN in task 0.")
    if first != again:
        raise ValueError(
            f"The loss is not deterministic: {first} and then {again} at the same parameters, batch and random seed. "
            "Draw its random numbers from torch's global generators, and keep no state between calls."
        )
    return first != other


def is_update_random(reference: Reference, seed: int) -> bool:
    """Whether the inner optimiser draws random numbers, where the loss draws none."""
    if reference.inner.said_of_update("is_deterministic"):
        return False

    def adapted(s: int) -> Tensor:
        with draws(s):
            return flat(reference.adapt(reference.values(), reference.tasks[0].support))

    return not torch.equal(adapted(seed), adapted(seed + 1))


def snapshot(objective: Objective) -> dict[str, Tensor]:
    """Copies of the parameters and buffers."""
    return {n: p.detach().clone() for n, p in objective.parameters().items()} | objective.constants()


def why_calls_differ(objective: Objective, before: Mapping[str, Tensor]) -> str:
    """What a subject that gives another result at its second call did not leave as it was."""
    after = snapshot(objective)
    changed = [n for n, t in before.items() if not torch.equal(t, after[n])]
    parameters = [n for n in changed if n in objective.parameters()]
    if parameters:
        return f"it changes the parameters that it is given in place ({', '.join(parameters)})"
    if changed:
        return f"it changes buffers of the model: running statistics of BatchNorm leak ({', '.join(changed)})"
    return "dropout, or another random draw, is not fixed by torch's global seed"
