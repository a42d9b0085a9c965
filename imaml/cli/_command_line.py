"""From the command line to options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro

from imaml.cli import _presets
from imaml.cli._bench_options import Bench
from imaml.cli._options import Compare, Train, Verify
from imaml.cli._plan_options import Predict
from imaml.training import RunFolder

Options = Train | Compare | Verify | Bench | Predict
T = TypeVar("T", bound=Options)
_COMMANDS: dict[str, type[Options]] = {
    "train": Train,
    "compare": Compare,
    "verify": Verify,
    "bench": Bench,
    "plan": Predict,
}


def parse(args: Sequence[str]) -> Options:
    """Read the command line twice: for what the defaults depend on, then with these defaults.

    Args:
        args: Command line without the program's name.

    Returns:
        The options of the chosen subcommand.

    Raises:
        SystemExit: After --help, or a flag that does not parse.
    """
    if not args or args[0] not in _COMMANDS:
        tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Compare, tyro.conf.subcommand("compare")]
            | Annotated[Verify, tyro.conf.subcommand("verify")]
            | Annotated[Bench, tyro.conf.subcommand("bench")]
            | Annotated[Predict, tyro.conf.subcommand("plan")],
            args=args or ["--help"],
            prog="imaml",
            description="Meta-learning with exact, first-order and implicit meta-gradients.",
        )
    command, *flags = args
    first = _parse(command, [flag for flag in flags if flag not in ("-h", "--help")], _COMMANDS[command]())
    if isinstance(first, Verify | Bench | Predict):
        return _parse(command, flags, type(first)())
    if isinstance(first, Compare):
        return _parse(command, flags, _presets.compare(first.episodes.dataset))
    if first.resume:
        return _parse(command, flags, Train.from_config(RunFolder(first.folder).config, out=first.out))
    return _parse(command, flags, _presets.train(first.episodes.dataset, first.strategy))


def _parse(command: str, flags: Sequence[str], default: T) -> T:
    return tyro.cli(
        type(default),
        args=flags,
        default=default,
        prog=f"imaml {command}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
