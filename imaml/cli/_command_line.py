"""From the command line to options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro

from imaml.cli import _presets
from imaml.cli._assignments import REGISTRY
from imaml.cli._bench_options import Bench
from imaml.cli._config_file import ConfigFile
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
    """Read the command line and the file of --config twice: for what the defaults depend on, then with these defaults.

    Args:
        args: Command line without the program's name.

    Returns:
        The options of the chosen subcommand.

    Raises:
        OSError: The file cannot be read.
        SystemExit: After --help, or a flag that does not parse.
        ValueError: The file has something else than options of the subcommand.
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
            registry=REGISTRY,
            description="Meta-learning with exact, first-order and implicit meta-gradients.",
        )
    command, *flags = args
    asked = [flag for flag in flags if flag not in ("-h", "--help")]
    first = _parse(command, asked, _COMMANDS[command]())
    file = None if first.file is None else ConfigFile.read(first.file)
    if file is not None:
        first = _parse(command, asked, file.onto(_COMMANDS[command]()))
    default = defaults(first)
    return _parse(command, flags, default if file is None else file.onto(default))


def defaults(options: Options) -> Options:
    """What holds where nothing is given, for the dataset, the strategy and the run folder of these options."""
    if isinstance(options, Verify | Bench | Predict):
        return type(options)()
    if isinstance(options, Compare):
        return _presets.compare(options.episodes.dataset)
    if options.resume:
        return Train.from_config(RunFolder(options.folder).config, out=options.out)
    return _presets.train(options.episodes.dataset, options.strategy)


def _parse(command: str, flags: Sequence[str], default: T) -> T:
    return tyro.cli(
        type(default),
        args=flags,
        default=default,
        prog=f"imaml {command}",
        registry=REGISTRY,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
