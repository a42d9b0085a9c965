"""The engines of a user's own problem that `imaml bench` and `imaml plan` look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from imaml import ImplicitMAML, MetaGradient
from imaml.cli._experiment import applies, build_engine, check_adapt, check_given, field_of, given
from imaml.cli._factory import Made
from imaml.cli._options import EngineOptions, Strategy
from imaml.inner import InnerSolver
from imaml.verify._claims import name_of

DEFAULTS: dict[Strategy, EngineOptions] = {
    "maml": EngineOptions(inner_lr=0.01, inner_steps=5),
    "fomaml": EngineOptions(inner_lr=0.01, inner_steps=5),
    "imaml": EngineOptions(inner_lr=0.01, inner_steps=5, regularization=2.0, cg_steps=5),
}
_OF_THE_PROBLEM = ("regularization", "microbatch_size", "recompute", "hvp", "on_nonfinite", "compile", "compile_budget")
"""What the strategies have in common, and the problem's own engine passes on to the others."""


def engines(
    made: Made, strategies: tuple[Strategy, ...], options: EngineOptions
) -> Iterator[tuple[Strategy, MetaGradient | str]]:
    """Every strategy for a problem: its own engine as it is, the others with its inner loop and what they share.

    Args:
        made: The problem.
        strategies: Which.
        options: Hold for every strategy that has them, whatever the problem's own engine says.

    Yields:
        A strategy with its engine, or with the reason why the problem's inner loop is not for it.

    Raises:
        ValueError: There is no strategy, an option is out of range or for none of them, the problem brings something
            else than an engine, or none of the strategies takes the inner loop.
    """
    check_adapt(options)
    check_given(options, strategies)
    if not (made.subject is None or isinstance(made.subject, MetaGradient)):
        raise ValueError(
            "Expected an engine, such as MAML(inner=...), as the third value of the problem. Got the function "
            f"{name_of(made.subject)}, which only `imaml verify` takes: leave it out."
        )
    reasons: list[str] = []
    for strategy in strategies:
        own = {name: value for name, value in given(options).items() if applies(name, strategy)}
        engine = build_engine(strategy, replace(DEFAULTS[strategy], **own))
        if isinstance(made.subject, MetaGradient):
            kept = _kept(engine, made.subject, own)
            try:
                engine = replace(engine, **kept)
            except (TypeError, ValueError) as error:
                reasons.append(str(error))
                if len(reasons) == len(strategies):
                    raise ValueError(reasons[0]) from error
                yield strategy, reasons[-1]
                continue
        yield strategy, engine


def _kept(engine: MetaGradient, subject: MetaGradient, own: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine takes over from the problem's own."""
    names = {field.name for field in fields(engine) if field.init} & {field.name for field in fields(subject)}
    if type(engine) is not type(subject):
        names &= set(_OF_THE_PROBLEM)
        if isinstance(engine, ImplicitMAML) and not subject.regularization:
            names.discard("regularization")  # it needs one
    names -= {field_of(name) for name in own}
    return {name: getattr(subject, name) for name in names} | {"inner": _inner(subject.inner, own)}


def _inner(inner: InnerSolver, own: Mapping[str, Any]) -> InnerSolver:
    changes = {name: own[f"inner_{name}"] for name in ("lr", "steps") if f"inner_{name}" in own}
    if "lr" in changes and not hasattr(inner, "lr"):
        raise ValueError(
            f"--inner-lr does not apply to the {type(inner).__name__} of the problem. Got {changes['lr']}: leave it "
            "out."
        )
    return replace(inner, **changes)
