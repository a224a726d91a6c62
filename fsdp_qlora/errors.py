"""What a user is told when something is wrong, and the exit codes of every command."""

import os
from collections.abc import Sequence

from fsdp_qlora.redaction import redact

DONE = 0
BUG = 1
INPUT = 2
ENVIRONMENT = 3
RUN_FAILED = 4
INTEGRITY = 5
SIGINT = 130
SIGTERM = 143

MAX_LINE_CHARS = 300


def one_line(text: str) -> str:
    """Return `text` with line breaks and unprintable characters (terminal codes too) escaped.

    Args:
        text: any text, also one with lone surrogates.

    Returns:
        The same text, safe to print as a single line.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def said(text: str) -> str:
    """Return `text` as one safe line, without secrets (redaction.py).

    Args:
        text: of a fault; it may hold what the user wrote, or what a library said.
    """
    return one_line(redact(text, os.environ))


class UserError(Exception):
    """A fault the user can repair; printed as one line "got: rule; remedy", never as a traceback.

    Args:
        got: the offending value, with its place (flag, file:line, row).
        rule: what is allowed instead.
        remedy: what to do next.
        code: exit code of the command, one of the constants above.
        others: further faults found in the same check, printed behind this one.
    """

    def __init__(
        self,
        got: str,
        rule: str,
        remedy: str,
        code: int = INPUT,
        others: Sequence["UserError"] = (),
    ) -> None:
        super().__init__(got, rule, remedy, code, others)
        self.got, self.rule, self.remedy, self.code = got, rule, remedy, code
        self.others = tuple(others)

    def __str__(self) -> str:
        """Return the fault in at most 300 characters, then " | " and the next one, if any."""
        got, rest = said(self.got), said(f": {self.rule}; {self.remedy}")
        space = max(MAX_LINE_CHARS - len(rest), 40)
        if len(got) > space:  # of a path the end counts, of a value the beginning
            got = f"{got[: space // 3]}...{got[space // 3 + 3 - space :]}"
        line = got + rest
        line = line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 3] + "..."
        return " | ".join([line, *map(str, self.others)])


def join(faults: Sequence[UserError]) -> UserError:
    """Return one error that tells all `faults` at once.

    Args:
        faults: at least one error; the first gives the exit code.

    Returns:
        An error whose text is the texts of all faults, separated by " | ".
    """
    first = faults[0]
    return UserError(first.got, first.rule, first.remedy, first.code, faults[1:])


def classify(error: Exception, who: str, trace: str) -> tuple[int, str]:
    """Exit code and line for an exception that is not a UserError.

    Args:
        error: what ended the rank.
        who: the rank, and where it was.
        trace: where the trace is, such as the path of a log.

    Returns:
        One of the codes above, and what the user is told.
    """
    text = said(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")[:160]
    line = f"{who}: {text}; the trace is in {trace}"
    return (RUN_FAILED if isinstance(error, RuntimeError | OSError) else BUG), line
