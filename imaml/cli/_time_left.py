"""How long everything will take yet."""

from __future__ import annotations

from time import monotonic


class TimeLeft:
    """The seconds that are left of work whose parts were timed once beforehand; the clock starts here.

    What the work took so far, beside what was expected of it, corrects the estimate as other programs come and go.

    Args:
        seconds: What the work should take.
        deadline: On the clock of `time.monotonic`, when it ends at the latest; None: when it is done.
    """

    def __init__(self, seconds: float, deadline: float | None = None) -> None:
        self._expected, self._deadline = seconds, deadline
        self._began, self._done = monotonic(), 0.0

    def did(self, seconds: float) -> None:
        """Note a part as done, by the time that was expected of it."""
        self._done += seconds

    @property
    def seconds(self) -> float:
        """The estimate."""
        now = monotonic()
        pace = (now - self._began) / self._done if self._done else 1.0
        left = max(self._expected - self._done, 0.0) * pace
        return left if self._deadline is None else min(left, max(self._deadline - now, 0.0))

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{minutes}:{seconds:02}"
