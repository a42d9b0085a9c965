"""The program, of whose processes the second is lost after two steps; started anew it gets a SIGTERM after three."""

import os
import signal
import sys
from pathlib import Path

from imaml.cli import main
from imaml.training import Trainer

advance = Trainer._advance
LOST = Path(sys.argv[-1]).with_suffix(".lost")


def advance_and_strike(trainer):
    record = advance(trainer)
    if trainer.ranks.rank == 1 and record.step == 2 and not LOST.exists():
        LOST.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if trainer.ranks.rank == 1 and record.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return record


Trainer._advance = advance_and_strike
sys.exit(main())
