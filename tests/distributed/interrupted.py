"""The program, of whose processes the second gets a Ctrl-C after two steps."""

import os
import signal
import sys

from imaml.cli import main
from imaml.training import Trainer

advance = Trainer._advance


def advance_and_interrupt(trainer):
    record = advance(trainer)
    if trainer.ranks.rank == 1 and record.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return record


Trainer._advance = advance_and_interrupt
sys.exit(main())
