"""SIGTERM and SIGINT while a run trains: the step is finished and saved before the rank leaves."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALED = 128  # exit code of a command that a signal ended, less the signal's number


class Stopped(KeyboardInterrupt):
    """A rank leaves because a signal asked for it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        """One line for the user."""
        return f"stopped by {signal.Signals(self.number).name}; --resume DIR goes on"

    @property
    def code(self) -> int:
        """Exit code of the command."""
        return SIGNALED + self.number


class StopFlag:
    """What the handlers of a rank leave for the loop.

    Outside `deferred` a signal raises Stopped at once: nothing would be lost.

    Attributes:
        number: of the first signal; 0 = none came.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_deferred = False

    def install(self) -> None:
        """Take over both signals."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and self._is_deferred:
            os._exit(SIGNALED + number)  # asked twice: the checkpoint before stays as it is
        self.number = self.number or number
        if not self._is_deferred:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While steps are taken, a signal waits for the end of the step."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
