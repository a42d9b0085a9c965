"""The program `imaml`: meta-train a model, compare the strategies, verify, measure or plan meta-gradients."""

import sys
from collections.abc import Sequence

USER_ERRORS = (OSError, ImportError, ValueError, FloatingPointError)
"""What a wrong option, file or hyper-parameter raises: one line on stderr instead of a traceback."""


def main(args: Sequence[str] | None = None) -> int:
    """Run `imaml train`, `imaml compare`, `imaml verify`, `imaml bench` or `imaml plan`.

    Args:
        args: Command line without the program's name; None: that of the process.

    Returns:
        The exit code: 0, 1 where a verification failed, 2 after an error of the user's, 130 after Ctrl-C.
    """
    try:
        from imaml.cli import (
            _bench,
            _bench_options,
            _command_line,
            _compare,
            _options,
            _plan,
            _plan_options,
            _train,
            _verify,
        )
    except ModuleNotFoundError as error:
        print(f"imaml: the program needs {error.name}: pip install 'imaml[train]'", file=sys.stderr)
        return 2
    try:
        options = _command_line.parse(sys.argv[1:] if args is None else args)
        if isinstance(options, _options.Verify):
            return _verify.verify(options)
        if isinstance(options, _bench_options.Bench):
            return _bench.bench(options)
        if isinstance(options, _plan_options.Predict):
            return _plan.plan(options)
        return _train.train(options) if isinstance(options, _options.Train) else _compare.compare(options)
    except USER_ERRORS as error:
        print(f"imaml: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("imaml: interrupted", file=sys.stderr)
        return 130
