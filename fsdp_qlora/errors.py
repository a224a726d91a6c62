"""What a user is told when something is wrong, the exit codes of every command, and no secrets."""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import sys
import threading
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

DONE, BUG, INPUT, ENVIRONMENT, RUN_FAILED, INTEGRITY = range(6)  # exit codes
SIGNALED = 128  # and the number of the signal that ended a command
SIGINT, SIGTERM = SIGNALED + signal.SIGINT, SIGNALED + signal.SIGTERM
MAX_LINE_CHARS, MOST_CHARS = 300, 9999  # of a fault as it is shown, and as it is looked through
Faults = Sequence["UserError"]
REDACTED = "[secret]"
MIN_SECRET_CHARS = 8


def read_table(place: str, name: str = "") -> dict[str, Any]:
    """Read the words and figures that a module keeps in TOML beside it.

    Args:
        place: `__file__` of the module.
        name: of the TOML file; "": that of the module.
    """
    path = Path(place).with_name(name) if name else Path(place).with_suffix(".toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


_TABLE = read_table(__file__)
SECRETS = tuple(map(re.compile, _TABLE["secrets"]))


@functools.lru_cache(1)
def _secret_values(env: tuple[tuple[str, str], ...]) -> list[str]:
    """The secrets in an environment, in every form in which a text may have them."""
    patterns = (re.compile(_TABLE["url_password"]), *SECRETS[:5])
    found = {text for _, value in env for row in patterns for text in row.findall(value)}
    for name, value in ((name.upper(), value) for name, value in env):
        if re.search(_TABLE["secret_names"], name) and not re.search(_TABLE["plain_names"], name):
            found |= {value, *value.splitlines(), *re.findall(_TABLE["pieces"], value)}
    plain = re.compile(_TABLE["plain_values"])
    found = {value.strip() for value in found if not plain.fullmatch(value.strip())}
    found |= {form(value) for value in found for form in (quote, quote_plus, unquote)}
    found |= {form(value)[1:-1] for value in found for form in (repr, json.dumps)}
    return sorted((v for v in found if len(v) >= MIN_SECRET_CHARS), key=len, reverse=True)


def redact(text: str) -> str:
    """Replace what looks like a secret, and the values of variables that are named like one.

    Args:
        text: any text.

    Returns:
        The text with REDACTED in their place.
    """
    for value in _secret_values(tuple(os.environ.items())):
        text = text.replace(value, REDACTED)
    for pattern in SECRETS:
        text = pattern.sub(REDACTED, text)
    return text


def redact_tracebacks() -> None:
    """Let no traceback that ends this process, or a thread of it, show a secret."""

    def show(kind: type[BaseException], error: BaseException | None, *_: object) -> None:
        if error is not None and not issubclass(kind, SystemExit):
            sys.stderr.write(redact("".join(traceback.format_exception(error))))

    sys.excepthook, threading.excepthook = show, lambda args: show(*args[:2])


def brief(error: BaseException, num_chars: int = 120) -> str:
    """Return the beginning of an error's first line: without secrets first, then cut."""
    return one_line(redact(str(error)).strip().partition("\n")[0])[:num_chars]


def one_line(text: str) -> str:
    """Return `text` with line breaks and unprintable characters (terminal codes too) escaped.

    Args:
        text: any text, also one with lone surrogates.

    Returns:
        The same text, safe to print as a single line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, most: int) -> str:
    """Return a text, its end as three points where it has more than so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


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
        whole, rest = self.got, printable(f": {self.rule}; {self.remedy}"[:MOST_CHARS])
        got = printable(whole if len(whole) < MOST_CHARS else whole[:2000] + whole[-2000:])
        space = max(MAX_LINE_CHARS - len(rest), 40)
        if len(got) > space:  # of a path the end counts, of a value the beginning
            got = f"{got[: space // 3]}...{got[space // 3 + 3 - space :]}"
        return " | ".join([cut(got + rest, MAX_LINE_CHARS), *map(str, self.others)])


@contextlib.contextmanager
def one_line_of(
    got: object, remedy: str, code: int = INPUT, rule: str = "{}", kinds: Any = OSError
) -> Iterator[None]:
    """Make one line for the user of an error of the system, or of a library.

    Args:
        got: file or directory at work.
        remedy, code: see UserError.
        rule: {} stands for what the error says, {kind} for the name of its type.
        kinds: of errors; Exception for code that may raise anything.

    Raises:
        UserError: the block has raised such an error.
    """
    try:
        yield
    except kinds as error:
        why = getattr(error, "strerror", None) or str(error)
        why = brief(error) if kinds is Exception else why
        rule = rule.replace("{}", why).replace("{kind}", type(error).__name__)
        raise UserError(str(got), rule, remedy, code) from error


def join(faults: Faults, code: int | None = None) -> UserError:
    """Return one error that reports all `faults` at once.

    Args:
        faults: at least one error; the first gives the exit code.
        code: exit code in place of that one.

    Returns:
        An error whose text is the texts of all faults, separated by " | ".
    """
    every = [fault for one in faults for fault in (one, *one.others)]
    rows = Counter((one.got, one.rule, one.remedy, one.code) for one in every)
    numbered = {row: f"{row[0]} ({num} times)" if num > 1 else row[0] for row, num in rows.items()}
    first, *rest = [UserError(got, *row[1:]) for row, got in numbered.items()]
    return UserError(first.got, first.rule, first.remedy, code or first.code, rest)


def refuse(faults: Faults, code: int | None = None) -> None:
    """Raise `join(faults)`, if there are any; see there."""
    if faults:
        raise join(faults, code)


def is_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, RuntimeError | OSError | ImportError):
        return name == "OutOfMemoryError" or any(word in text for word in _TABLE["out_of_memory"])
    return name in ("OutOfMemoryError", "MemoryError")


def resume_of(run_dir: object) -> str:
    """Write the option that goes on with a run, for a shell."""
    return f"--resume {shlex.quote(str(run_dir))}"


class Stopped(KeyboardInterrupt):
    """A rank leaves because a signal asked for it.

    Args:
        number: of the signal.
        run_dir: output directory of the run, once it can go on.
    """

    def __init__(self, number: int, run_dir: object = "DIR") -> None:
        super().__init__(number)
        self.run_dir = run_dir
        self.code = SIGNALED + number  # of the command

    def __str__(self) -> str:
        """One line for the user."""
        name = signal.Signals(self.code - SIGNALED).name
        return f"stopped by {name}; {resume_of(self.run_dir)} goes on"
