"""A run outlives its terminal: when nobody reads what it prints any more, it goes on in silence."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class Steady:
    """A text stream that prints into nowhere once its reader has gone (EPIPE, EIO).

    Args:
        stream: stdout or stderr of this process.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, as the stream does."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, as the stream does."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Make both streams steady; a decorator too."""
    out, err = cast(TextIO, Steady(sys.stdout)), cast(TextIO, Steady(sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
