"""What every `MetaGradient` promises, as a class of tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from imaml._engine.report import Report
from imaml._errors import NonFiniteError
from imaml._minibatches import Minibatches
from imaml._objective.blocks import Blocks
from imaml._objective.objective import Objective
from imaml._strategies.fomaml import FOMAML
from imaml._strategies.implicit import ImplicitMAML
from imaml._strategies.maml import MAML
from imaml._strategies.meta_gradient import MetaGradient
from imaml._tasks import Task, TaskBatch
from imaml.inner import GradientDescent
from imaml.testing._models import network, small_models
from imaml.testing._quadratic import QuadraticTasks, quadratic_tasks
from imaml.testing._solver_suite import drawn
from imaml.testing._tasks import batch_of_tasks, task_batches
from imaml_solvers import Dense

Claim = Literal["maml", "fomaml", "implicit"]


def strategy_conformance(
    make: Callable[[GradientDescent], MetaGradient], *, against: Claim | None, rtol: float = 1e-6
) -> type[StrategyConformance]:
    """Make a class of tests of a strategy, for pytest to collect.

    For example `TestMine = strategy_conformance(lambda inner: Mine(inner=inner), against="maml")`.

    Args:
        make: Returns the strategy with this inner loop, and any `regularization` that is one number.
        against: What it claims to compute, checked against closed forms on quadratics and against this library on drawn
            networks: "maml" or "fomaml" with the strategy's own inner loop and regularization, "implicit" where the
            inner loop has converged. None for a meta-gradient of another kind: the interface alone is checked.
        rtol: Relative error allowed to any gradient, in the norm over all parameters.

    Returns:
        A subclass of `StrategyConformance`.
    """
    fields: dict[str, Any] = {"make": staticmethod(make), "against": against, "rtol": rtol}
    if against is None:
        fields |= dict.fromkeys(_OF_A_CLAIM)  # None is no test, and pytest collects none
    if not hasattr(make(GradientDescent(lr=0.1, steps=1)), "outer_steps"):
        fields[_OF_OUTER_STEPS] = None
    return type("StrategyConformance", (StrategyConformance,), fields)


_OF_OUTER_STEPS = "test_query_losses_along_the_way"
_OF_A_CLAIM = (
    "test_closed_forms_on_quadratics",
    "test_networks_as_this_library_does",
    "test_minibatches_as_this_library_does",
)


class StrategyConformance:
    """Tests what every correct strategy promises; `strategy_conformance` makes a subclass of it."""

    against: ClassVar[Claim | None]
    rtol: ClassVar[float]

    @staticmethod
    def make(inner: GradientDescent) -> MetaGradient:
        """The strategy under test with this inner loop."""
        raise NotImplementedError

    @drawn
    @given(problem=quadratic_tasks(), lr=st.floats(0.01, 0.5), steps=st.integers(0, 4))
    def test_closed_forms_on_quadratics(self, problem: QuadraticTasks, lr: float, steps: int) -> None:
        """The meta-gradient on quadratic losses is the closed form."""
        engine = self._engine(steps=steps, lr=lr)
        regularization = engine.regularization
        assert isinstance(regularization, Real), "`make` must set one number as `regularization`"
        regularization = float(regularization)
        if self.against == "implicit":
            # with eigenvalues in (0, 1], lr = 1 / (1 + lambda) contracts by 1 / (1 + lambda) or faster
            steps = math.ceil(40 / math.log1p(regularization))
            engine = self._engine(steps=steps, lr=1 / (1 + regularization))
            expected = problem.implicit(regularization=regularization)
        elif self.against == "maml":
            expected = problem.maml(lr=lr, steps=steps, regularization=regularization)
        else:
            expected = problem.fomaml(lr=lr, steps=steps, regularization=regularization)
        self._assert_close(engine.value_and_grad(problem.objective(), problem.tasks)[1], expected)

    @drawn
    @given(model=small_models(), tasks=task_batches(), head_only=st.booleans())
    def test_networks_as_this_library_does(self, model: nn.Sequential, tasks: TaskBatch, head_only: bool) -> None:
        """Second derivatives that change along the inner loop, and parameters that do not adapt."""
        engine = self._engine()
        reference = self._reference(engine)
        objective = self._objective(model, head_only=head_only)
        expected_loss, expected = reference.value_and_grad(objective, tasks)
        loss, got = engine.value_and_grad(objective, tasks)
        torch.testing.assert_close(loss, expected_loss, rtol=self.rtol, atol=0)
        self._assert_close(got, expected)

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_a_query_loss_of_the_initial_parameters(self, chunk_size: int | None) -> None:
        """Its derivative by them is added to the meta-gradient that it has where they are constants."""
        model, _, tasks = _problem()
        adapt = list(self._objective(model).adapted)
        constants = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine = self._engine(chunk_size=chunk_size)

        def loss(output: Tensor, target: Tensor, initial: dict[str, Tensor], adapted: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(output, target) + _interaction(adapted, initial)

        def with_constants(output: Tensor, target: Tensor, adapted: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(output, target) + _interaction(adapted, {n: constants[n] for n in adapt})

        expected_loss, expected = engine.value_and_grad(
            Objective(model, F.cross_entropy, adapt=adapt, outer_loss=with_constants), tasks
        )
        objective = Objective(model, F.cross_entropy, adapt=adapt, outer_loss=loss)
        for task in tasks:
            adapted = engine.adapt(objective, task.support)
            initial = {n: constants[n].clone().requires_grad_() for n in adapt}
            with torch.enable_grad():
                value = _interaction(adapted, initial)
            direct = torch.autograd.grad(value, list(initial.values()))
            for name, gradient in zip(initial, direct, strict=True):
                expected[name] = expected[name] + gradient / len(tasks)
        got_loss, got = engine.value_and_grad(objective, tasks)
        torch.testing.assert_close(got_loss, expected_loss, rtol=1e-10, atol=0)
        self._assert_close(got, expected)

    def test_query_losses_along_the_way(self) -> None:
        """The sum over `outer_steps`, where a strategy has them, has the gradients of engines with fewer steps."""
        _, objective, tasks = _problem()
        weights = {0: 0.5, 1: -0.25, 3: 1.5}
        engine = dataclasses.replace(self._engine(), outer_steps=weights)  # type: ignore[call-arg]
        parts = [(w, *self._engine(steps=step).value_and_grad(objective, tasks)) for step, w in weights.items()]
        loss, got = engine.value_and_grad(objective, tasks)
        torch.testing.assert_close(loss, torch.stack([w * each for w, each, _ in parts]).sum(), rtol=1e-10, atol=0)
        self._assert_close(got, {n: torch.stack([w * g[n] for w, _, g in parts]).sum(0) for n in got})
        with torch.no_grad():
            torch.testing.assert_close(engine(objective, tasks).loss, loss, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_minibatches_as_this_library_does(self, chunk_size: int | None) -> None:
        """Every inner step sees the batch of its number, in a list of tasks and in a `TaskBatch`."""
        model, _, tasks = _problem()
        engine, objective = self._engine(chunk_size=chunk_size), self._objective(model)
        batches = [batch_of_tasks(3, examples, 6, seed=seed).support for seed, examples in enumerate((4, 5, 3))]
        moving = TaskBatch(support=Minibatches(batches), query=tasks.query)
        loss, expected = self._reference(engine).value_and_grad(objective, moving)
        for given_tasks in (moving, list(moving)):
            got_loss, got = engine.value_and_grad(objective, given_tasks)
            torch.testing.assert_close(got_loss, loss, rtol=self.rtol, atol=0)
            self._assert_close(got, expected)

    @drawn
    @given(model=small_models(), tasks=task_batches(tasks=4))
    def test_chunks_do_not_matter(self, model: nn.Sequential, tasks: TaskBatch) -> None:
        """The numbers do not depend on how many tasks run at once."""
        objective = self._objective(model)
        loss, expected = self._engine(chunk_size=1).value_and_grad(objective, tasks)
        for size in (None, 3):
            got_loss, got = self._engine(chunk_size=size).value_and_grad(objective, tasks)
            torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
            self._assert_close(got, expected)

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_recomputed_blocks_do_not_matter(self, chunk_size: int | None) -> None:
        """The numbers are those of the model whose activations are kept; the report names the blocks."""
        model, _, tasks = _problem()
        engine = self._engine(chunk_size=chunk_size)
        loss, expected = engine.value_and_grad(self._objective(model), tasks)
        recomputed = self._objective(model, recompute=[nn.Linear, nn.Tanh])
        got_loss, got = engine.value_and_grad(recomputed, tasks)
        torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
        self._assert_close(got, expected)
        assert engine(recomputed, tasks).report.recomputed == ("Linear.forward", "Tanh.forward")

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_the_same_minibatch_in_every_step_is_a_support_set(self, chunk_size: int | None) -> None:
        """The numbers are those of tasks whose support sets are fixed."""
        _, objective, tasks = _problem()
        engine = self._engine(chunk_size=chunk_size)
        loss, expected = engine.value_and_grad(objective, tasks)
        same = TaskBatch(support=Minibatches([tasks.support] * engine.inner.steps), query=tasks.query)
        for given_tasks in (same, list(same)):
            got_loss, got = engine.value_and_grad(objective, given_tasks)
            torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
            self._assert_close(got, expected)

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_an_inner_loop_goes_on_from_a_state(self, chunk_size: int | None) -> None:
        """In two calls it ends where it does in one, with the minibatches of the steps that are left."""
        _, objective, tasks = _problem()
        batches = [batch_of_tasks(3, 4, 6, seed=seed).support for seed in range(3)]
        moving = TaskBatch(support=Minibatches(batches), query=tasks.query)
        with torch.no_grad():
            whole = self._engine(chunk_size=chunk_size)(objective, moving, return_state=True)
            state = self._engine(steps=2, chunk_size=chunk_size)(objective, moving, return_state=True).state
        rest = self._engine(steps=1, chunk_size=chunk_size)(objective, moving, start=state, return_state=True)
        torch.testing.assert_close(rest.report.query_loss, whole.report.query_loss, rtol=1e-10, atol=0)
        assert whole.state is not None and rest.state is not None
        assert whole.state.step == rest.state.step == 3
        for name, adapted in whole.state.parameters.items():
            torch.testing.assert_close(rest.state.parameters[name], adapted, rtol=1e-10, atol=1e-12)
        assert all(not t.requires_grad for t in rest.state.parameters.values())

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_permuted_tasks_permute_the_report(self, chunk_size: int | None) -> None:
        """Every tensor of the report has the order of the tasks; the meta-gradient has none."""
        model, _, tasks = _problem(tasks=4)
        objective = Objective(model, F.cross_entropy, metric=_accuracy)
        order = torch.tensor([2, 0, 3, 1])
        permuted = TaskBatch.stack([tasks[i] for i in order.tolist()])
        engine = self._engine(chunk_size=chunk_size)
        one, other = engine(objective, tasks).report, engine(objective, permuted).report
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if isinstance(value, Tensor):
                torch.testing.assert_close(value[..., order], getattr(other, field.name), rtol=self.rtol, atol=1e-9)
        self._assert_close(engine.value_and_grad(objective, permuted)[1], engine.value_and_grad(objective, tasks)[1])

    def test_tasks_of_different_sizes(self) -> None:
        """A ragged list is the mean over its tasks, each alone; the report follows the list."""
        _, objective, _ = _problem()
        sizes = [(2, 3), (4, 3), (2, 3), (3, 1), (2, 3)]
        tasks = [batch_of_tasks(1, *size, seed=seed)[0] for seed, size in enumerate(sizes)]
        alone = [self._engine().value_and_grad(objective, [task]) for task in tasks]
        engine = self._engine(chunk_size=2)
        losses = engine(objective, tasks).report.query_loss
        torch.testing.assert_close(losses, torch.stack([loss for loss, _ in alone]), rtol=1e-10, atol=0)
        mean = {n: torch.stack([g[n] for _, g in alone]).mean(0) for n in objective.parameters()}
        self._assert_close(engine.value_and_grad(objective, tasks)[1], mean)

    def test_a_list_of_equal_tasks_is_a_batch(self) -> None:
        """A `TaskBatch` and the list of its tasks give the same."""
        _, objective, tasks = _problem()
        engine = self._engine()
        one, other = engine(objective, tasks).report, engine(objective, list(tasks)).report
        assert isinstance(tasks[0], Task) and torch.equal(one.query_loss, other.query_loss)

    def test_unused_parameters_get_zeros_in_their_own_place(self) -> None:
        """A parameter that no loss depends on: zero for it, the same for the others, and its name in the report."""
        model, objective, tasks = _problem()
        params = dict(model.named_parameters())
        first, *others = params
        named = {first: params[first], "spare": torch.ones(3, dtype=torch.float64)} | {n: params[n] for n in others}

        def loss(values: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            used = {n: values[n] for n in params}
            return F.cross_entropy(torch.func.functional_call(model, used, (batch[0],)), batch[1])

        with_spare, engine = Objective.from_function(loss, named), self._engine()
        _, expected = engine.value_and_grad(objective, tasks)
        _, got = engine.value_and_grad(with_spare, tasks)
        assert (got.pop("spare") == 0).all()
        self._assert_close(got, expected)
        assert engine(with_spare, tasks).report.unused == ("spare",)

    def test_backward_delivers_value_and_grad(self) -> None:
        """`result.loss` is 0-dim and carries the gradient of `value_and_grad`; a call alone does not touch `.grad`."""
        model, objective, tasks = _problem()
        engine = self._engine()
        loss, gradient = engine.value_and_grad(objective, tasks)
        assert not any(t.requires_grad for t in (loss, *gradient.values()))
        assert all(gradient[n].shape == p.shape and gradient[n].dtype == p.dtype for n, p in model.named_parameters())
        result = engine(objective, tasks)
        assert result.loss.ndim == 0 and result.loss.item() == loss.item()
        assert all(p.grad is None for p in model.parameters()), "`.grad` was set before backward"
        result.loss.backward()
        assert all(torch.equal(_grad(p), gradient[n]) for n, p in model.named_parameters())

    def test_gradients_scale_and_accumulate(self) -> None:
        """Like those of any loss: scaled, over two halves of the tasks, and within a larger loss."""
        model, objective, tasks = _problem(tasks=4)
        engine = self._engine()
        _, whole = engine.value_and_grad(objective, tasks)
        for half in (tasks[:2], tasks[2:]):
            (8 * engine(objective, half).loss / 2).backward()
        (8 * torch.stack([(p**2).sum() for p in model.parameters()]).sum()).backward()
        expected = {n: whole[n] + 2 * p.detach() for n, p in model.named_parameters()}
        self._assert_close({n: _grad(p) / 8 for n, p in model.named_parameters()}, expected)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_a_call_only_evaluates(self, mode: Callable[[], Any]) -> None:
        """No derivative but those of the inner loop, and the same loss."""
        _, objective, tasks = _problem()
        engine = self._engine()
        expected = engine(objective, tasks)
        with mode():
            result = engine(objective, tasks)
        assert not result.loss.requires_grad
        torch.testing.assert_close(result.loss, expected.loss.detach(), rtol=1e-10, atol=0)
        assert result.report.hvps == 0 and result.report.gradients == engine.inner.steps * len(tasks)

    @pytest.mark.parametrize("steps", [0, 3])
    def test_the_report(self, steps: int) -> None:
        """A query loss per task, a support loss per step and task, the metric, and counts."""
        model, _, tasks = _problem()
        objective = Objective(model, F.cross_entropy, metric=_accuracy)
        result = self._engine(steps=steps)(objective, tasks)
        report = result.report
        assert isinstance(report, Report) and str(report)
        assert report.support_loss.shape == (steps, len(tasks)) and report.query_loss.shape == (len(tasks),)
        assert report.query_loss.mean().item() == result.loss.item()
        assert report.metric is not None and report.metric.shape == (len(tasks),)
        assert report.gradients >= (steps + 1) * len(tasks) and report.hvps >= 0 and report.unused == ()
        tensors = [getattr(report, field.name) for field in dataclasses.fields(report)]
        assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))

    def test_adapt_is_the_inner_loop(self) -> None:
        """The query loss at what `adapt` returns is the one reported."""
        model, objective, tasks = _problem()
        engine = self._engine()
        adapted = engine.adapt(objective, tasks[1].support)
        assert list(adapted) == [n for n, _ in model.named_parameters()]
        assert not any(p.requires_grad for p in adapted.values())
        loss = F.cross_entropy(torch.func.functional_call(model, adapted, (tasks[1].query[0],)), tasks[1].query[1])
        reported = engine(objective, tasks).report.query_loss[1]
        torch.testing.assert_close(loss, reported, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("raises", [False, True])
    def test_nothing_of_the_users_is_changed(self, raises: bool) -> None:
        """Parameters, buffers, `.grad`, RNG, data: not by a call, nor by one that the user's own loss ends."""
        model, calls = network([3, 4, 2], nn.Tanh), list[None]()
        model.insert(1, nn.BatchNorm1d(4).double().eval())

        def loss(output: Tensor, target: Tensor) -> Tensor:
            calls.append(None)
            if raises and len(calls) == 3:
                raise ZeroDivisionError("the user's own")
            return F.cross_entropy(output, target)

        tasks = batch_of_tasks(3, 5, 6)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before, objective = _Snapshot.of(model, tasks), Objective(model, loss)
        if raises:
            with pytest.raises(ZeroDivisionError, match="the user's own"):
                self._engine()(objective, tasks)
        else:
            self._engine()(objective, tasks)
        before.assert_equal(_Snapshot.of(model, tasks))
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("chunk_size", [None, 1])
    @pytest.mark.parametrize("where", ["support", "query"])
    def test_nan_in_the_data_raises(self, where: str, chunk_size: int | None) -> None:
        """NonFiniteError names the task."""
        _, objective, tasks = _problem()
        getattr(tasks, where)[0][2, 0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="task 2"):
            self._engine(chunk_size=chunk_size)(objective, tasks)

    def test_float32_stays_float32(self) -> None:
        """And is near float64."""
        model, objective, tasks = _problem()
        _, expected = self._engine().value_and_grad(objective, tasks)
        single = Objective(model.float(), F.cross_entropy)
        loss, got = self._engine().value_and_grad(single, tasks.to(dtype=torch.float32))
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got.values())
        assert _relative_error({n: g.double() for n, g in got.items()}, expected) <= max(1e-4, self.rtol)

    def _engine(self, *, steps: int = 3, lr: float = 0.2, chunk_size: int | None = None) -> MetaGradient:
        return dataclasses.replace(self.make(GradientDescent(lr=lr, steps=steps)), chunk_size=chunk_size)

    def _reference(self, engine: MetaGradient) -> MetaGradient:
        """This library's own of the same claim."""
        shared = {f.name: getattr(engine, f.name) for f in dataclasses.fields(MetaGradient) if f.init}
        if self.against == "implicit":
            return ImplicitMAML(**shared, solver=Dense(), on_failure="ignore")
        return MAML(**shared) if self.against == "maml" else FOMAML(**shared)

    def _objective(
        self, model: nn.Sequential, *, head_only: bool = False, recompute: Blocks | None = None
    ) -> Objective:
        """Adapts all of the model, or its last layer, in which the loss is convex: a linear system is then regular."""
        head_only = head_only or self.against not in ("maml", "fomaml")
        adapt = [str(len(model) - 1)] if head_only else None
        return Objective(model, F.cross_entropy, adapt=adapt, recompute=recompute)

    def _assert_close(self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        error = _relative_error(got, expected)
        assert error <= self.rtol, f"relative error {error:.3g} of the meta-gradient"


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    tensors: list[Tensor]
    flags: list[Any]

    @classmethod
    def of(cls, model: nn.Module, tasks: TaskBatch) -> _Snapshot:
        parameters = list(model.parameters())
        tensors = [*parameters, *map(_grad, parameters), *model.buffers(), *tasks.support, *tasks.query]
        flags: list[Any] = [(m.training, set(vars(m))) for m in model.modules()]
        flags += [(type(p), p.requires_grad, p._version) for p in parameters]
        return cls([t.detach().clone() for t in (*tensors, torch.get_rng_state())], flags)

    def assert_equal(self, after: _Snapshot) -> None:
        assert self.flags == after.flags
        assert all(torch.equal(a, b) for a, b in zip(self.tensors, after.tensors, strict=True))


def _problem(tasks: int = 3) -> tuple[nn.Sequential, Objective, TaskBatch]:
    model = network([3, 4, 2], nn.Tanh)
    return model, Objective(model, F.cross_entropy), batch_of_tasks(tasks, 5, 6)


def _interaction(adapted: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Tensor:
    """A function of the parameters before and after adaptation that is no sum of functions of each."""
    return torch.stack([(adapted[n] * initial[n]).cos().sum() for n in initial]).sum()


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).double().mean()


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter received no `.grad`"
    return parameter.grad


def _relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert set(got) == set(expected)
    one, other = (torch.cat([tensors[n].flatten() for n in expected]) for tensors in (got, expected))
    return float((one - other).norm() / other.norm())
