"""What a user is told when something is wrong, the exit codes of every command, and no secrets."""

import os
import re
import signal
from collections.abc import Sequence

DONE, BUG, INPUT, ENVIRONMENT, RUN_FAILED, INTEGRITY = range(6)  # exit codes
SIGNALED = 128  # and the number of the signal that ended a command
SIGINT, SIGTERM = SIGNALED + signal.SIGINT, SIGNALED + signal.SIGTERM
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")

MAX_LINE_CHARS = 300
Faults = Sequence["UserError"]
REDACTED = "[secret]"
# A name may begin like a token: only what is as long as one and has no word in it counts.
SECRETS = (
    re.compile(r"\b(?:hf_|sk-|gh[po]_|glpat-)[A-Za-z0-9]{16,}"),
    re.compile(r"\bgithub_pat_\w{8,}|\bAKIA[A-Z0-9]{12,}|\bAIza[\w-]{20,}"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=[?&])[a-z_]*(token|key|secret|password)=[^\s&'\"]+"),
)
SECRET_NAMES = re.compile(
    r"TOKEN(?!IZER|S)|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY"
)
MIN_SECRET_CHARS = 8


def redact(text: str, patterns: Sequence[re.Pattern] = SECRETS) -> str:
    """Replace what looks like a secret, and the values of variables that are named like one.

    Args:
        text: any text.
        patterns: what a secret looks like.

    Returns:
        The text with REDACTED in their place.
    """
    values = [value for name, value in os.environ.items() if SECRET_NAMES.search(name.upper())]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= MIN_SECRET_CHARS and not value.startswith("/"):  # a file with a token
            text = text.replace(value, REDACTED)
    for pattern in patterns:
        text = pattern.sub(REDACTED, text)
    return text


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


def printable(text: str) -> str:
    """Return `text` safe to print as a single line, without secrets."""
    return one_line(redact(text))


class UserError(Exception):
    """Something a user can put right: one line with value, rule and remedy, never a traceback.

    Args:
        got: the offending value, with its place (flag, file:line, row).
        rule: what is allowed instead.
        remedy: what to do next.
        code: exit code of the command, one of the constants above.
        others: further faults found in the same check, printed behind this one.
    """

    def __init__(
        self, got: str, rule: str, remedy: str, code: int = INPUT, others: Faults = ()
    ) -> None:
        super().__init__(got, rule, remedy, code, others)
        self.got, self.rule, self.remedy, self.code = got, rule, remedy, code
        self.others = tuple(others)

    def __str__(self) -> str:
        """Return the fault in at most 300 characters, then " | " and the next one, if any."""
        got, rest = printable(self.got), printable(f": {self.rule}; {self.remedy}")
        space = max(MAX_LINE_CHARS - len(rest), 40)
        if len(got) > space:  # of a path the end counts, of a value the beginning
            got = f"{got[: space // 3]}...{got[space // 3 + 3 - space :]}"
        line = got + rest
        line = line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 3] + "..."
        return " | ".join([line, *map(str, self.others)])


def join(faults: Faults, code: int | None = None) -> UserError:
    """Return one error that reports all `faults` at once.

    Args:
        faults: at least one error; the first gives the exit code.
        code: exit code in place of that one.

    Returns:
        An error whose text is the texts of all faults, separated by " | ".
    """
    every = [fault for one in faults for fault in (one, *one.others)]
    first, *rest = [UserError(one.got, one.rule, one.remedy, one.code) for one in every]
    return UserError(first.got, first.rule, first.remedy, code or first.code, rest)


def is_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    name, text = type(error).__name__, str(error)
    by_text = isinstance(error, RuntimeError) and any(word in text for word in OUT_OF_MEMORY)
    return name in ("OutOfMemoryError", "MemoryError") or by_text


class Stopped(KeyboardInterrupt):
    """A rank leaves because a signal asked for it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = SIGNALED + number  # of the command

    def __str__(self) -> str:
        """One line for the user."""
        return f"stopped by {signal.Signals(self.code - SIGNALED).name}; --resume DIR goes on"
