"""`imaml verify`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import imaml.verify
from imaml import MAML, GradientDescent, MetaGradient, Objective
from imaml.cli._built_in import BUILT_IN, DAMPING, ENGINES, INNER, LOG_LR, problem
from imaml.cli._experiment import applies, build_engine, check_adapt, flag, given
from imaml.cli._factory import Made, make
from imaml.cli._options import STRATEGIES, Strategy, Verify
from imaml.cli._progress import say
from imaml.cli._result import NAMES
from imaml.verify import Verification
from imaml.verify._subject import Subject, Tasks

Check = tuple[str, Callable[[], Verification]]
PRODUCTS = "products"
STYLES = {"passed": "green", "failed": "bold red", "inconclusive": "yellow"}


def verify(options: Verify) -> int:
    """Run all checks and print the table, and the causes below it.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code: 1 if a check failed, else 0; one without a verdict does not fail.

    Raises:
        ValueError: Bad input, said in one sentence.
    """
    console = Console()
    made = None if options.problem is None else make(options.problem)
    engines = list(_engines(made, options)) if options.smoothness else []
    found: dict[str, Verification] = {}
    refused: dict[str, str] = {}
    for name, check in _built_in(options) if made is None else _own(made, options):
        with console.status(name):
            try:
                found[name] = check()
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"{name}: {error}") from error
            except ValueError as error:
                if made is None or name == PRODUCTS:
                    raise
                refused[name] = str(error)
    if refused and found.keys() == {PRODUCTS}:
        raise ValueError(next(iter(refused.values())))
    for name, reason in refused.items():
        say(console, f"{name} is left out: {reason}")
    console.print(_table(found))
    for name, one in found.items():
        if one.cause:
            say(console, f"{name}: {one.status}: {one.cause}.")
        if made is not None:
            for line in one.details:
                say(console, line)
    for name, engine in engines:
        if made is not None and name not in refused:
            with console.status(f"smoothness of {name}"):
                found_out = imaml.verify.smoothness(engine, made.objective, made.tasks, seed=options.seed)
            say(console, str(found_out))
    counts = [f"{n} {s}" for s in STYLES if (n := sum(one.status == s for one in found.values()))]
    say(console, ", ".join(counts))
    return int(any(one.status == "failed" for one in found.values()))


def _chosen(options: Verify) -> tuple[Strategy, ...]:
    return STRATEGIES if options.strategy == "all" else (options.strategy,)


def _refuse(options: Verify, why: str, *, but: Collection[str] = ()) -> None:
    for name, value in given(options.engine).items():
        if name not in but:
            raise ValueError(f"{flag(name)} does not apply: {why}. Got {value}: leave it out.")


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function with its name in whatever it raises."""
    name = getattr(function, "__name__", "function")

    def call(objective: Objective, tasks: Tasks) -> Any:
        try:
            return function(objective, tasks)
        except Exception as error:  # it is the user's: it may raise anything
            raise ValueError(
                f"{name} failed ({type(error).__name__}: {error}). It is called with (objective.double(), tasks), the "
                "tasks in float64 too: call it so in Python to see where it fails."
            ) from error

    call.__name__ = name
    return call


def _built_in(options: Verify) -> Iterator[Check]:
    """Every built-in model with every strategy that is chosen, and its Hessian-vector products."""
    _refuse(options, "the built-in problems have their own engines")
    settings: dict[str, Any] = {"tolerance": options.tolerance, "seed": options.seed}
    for name, kind in BUILT_IN.items():
        objective, tasks = problem(name, options.seed)
        yield f"{name}: products", partial(imaml.verify.hvp, objective, None, tasks[0].support, **settings)
        for strategy in _chosen(options):
            if strategy in kind.strategies:
                engine = build_engine(strategy, ENGINES[strategy])
                label = f"{name}: {NAMES[strategy]}"
                yield label, partial(imaml.verify.meta_gradient, engine, objective, tasks, **settings)
    if "imaml" in _chosen(options):
        objective, tasks = problem("MLP, tanh", options.seed)
        engine = build_engine("imaml", replace(ENGINES["imaml"], damping=DAMPING))
        label = f"MLP, tanh: {NAMES['imaml']}, damped"
        yield label, partial(imaml.verify.meta_gradient, engine, objective, tasks, **settings)
    if "maml" in _chosen(options):
        for name, inner in INNER.items():
            objective, tasks = problem("MLP, tanh", options.seed, log_lr=LOG_LR)
            engine = MAML(inner=inner)
            yield f"{name}: MAML", partial(imaml.verify.meta_gradient, engine, objective, tasks, **settings)


def _own(made: Made, options: Verify) -> Iterator[Check]:
    """Products at the user's model, and its meta-gradients; a strategy may refuse the problem by a ValueError."""
    check_adapt(options.engine)
    settings: dict[str, Any] = {"tolerance": options.tolerance, "seed": options.seed}
    subjects = list(_subjects(made, options))
    yield PRODUCTS, partial(imaml.verify.hvp, made.objective, None, made.first.support, **settings)
    for name, subject, claim in subjects:
        yield name, partial(imaml.verify.meta_gradient, subject, made.objective, made.tasks, **claim, **settings)


def _subjects(made: Made, options: Verify) -> Iterator[tuple[str, Subject, dict[str, Any]]]:
    """What is verified, by name, with what it claims."""
    against = {"imaml": "implicit"}.get(options.strategy, options.strategy)
    if made.subject is None:
        for strategy in _chosen(options):
            alone = options.strategy != "all"
            own = {n: value for n, value in given(options.engine).items() if alone or applies(n, strategy)}
            yield NAMES[strategy], build_engine(strategy, replace(ENGINES[strategy], **own)), {}
    elif isinstance(made.subject, MetaGradient):
        _refuse(options, "the problem brings its own engine")
        yield type(made.subject).__name__, made.subject, {} if against == "all" else {"against": against}
    else:
        engine = options.engine
        if against == "all" or engine.inner_lr is None or engine.inner_steps is None:
            raise ValueError(
                "The problem brings its own function. Say what it claims to compute by --strategy, and by which inner "
                "loop: --inner-lr, --inner-steps (and --regularization)."
            )
        _refuse(options, "the problem brings its own function", but=("inner_lr", "inner_steps", "regularization"))
        inner = GradientDescent(lr=engine.inner_lr, steps=engine.inner_steps)
        claim = {"against": against, "inner": inner, "regularization": engine.regularization}
        function = _named(made.subject)
        yield function.__name__, function, claim


def _engines(made: Made | None, options: Verify) -> Iterator[tuple[str, MetaGradient]]:
    """The strategies whose smoothness is asked for, by name."""
    if made is None or not isinstance(made.subject, MetaGradient | None):
        raise ValueError(
            "--smoothness is about the inner training of a strategy on your problem. Expected a factory that returns "
            f"(objective, tasks) or (objective, tasks, engine). Got {'none' if made is None else 'a function'}."
        )
    for name, subject, _ in _subjects(made, options):
        assert isinstance(subject, MetaGradient)
        yield name, subject


def _table(found: dict[str, Verification]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("check", "verdict"):
        table.add_column(heading)
    for heading in ("relative error", "resolution"):
        table.add_column(heading, justify="right")
    for name, one in found.items():
        numbers = (f"{one.relative_error:.1e}", f"{one.resolution:.1e}")
        table.add_row(name, Text(one.status, style=STYLES[one.status]), *numbers)
        if one.bias is not None:
            table.add_row(f"{name}: bias", Text("measured"), f"{one.bias:.1e}", "")
    return table
