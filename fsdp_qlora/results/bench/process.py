"""One program of a bench as a process: what it said and when, host memory, how it ended."""

import codecs
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from fsdp_qlora.errors import one_line

GIB = 2**30
POLL_S = 0.1
GRACE_S = 15.0
MAX_REASON_CHARS = 200
LINE_BREAK = re.compile(r"[\r\n]+")
FAULT = re.compile(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)|error): ")
LAUNCHER_FAULTS = ("ChildFailedError", "CalledProcessError", "ProcessRaisedException")

Lines = list[tuple[float, str]]


@dataclass(frozen=True)
class Launch:
    """How a program is started.

    Args:
        argv: program and arguments.
        env: what it gets besides the environment of all arms.
        cwd: directory it runs in.
    """

    argv: list[str]
    cwd: Path
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """What a program left behind.

    Args:
        code: exit code; None when it ran out of time and was ended.
        lines: (seconds since the start, text) of its output; a progress bar's states too.
        started_unix_s: when it was started.
        wall_s: how long it ran.
        host_before_gib: host memory in use by all programs when it was started.
        host_peak_gib: the most in use while it ran.
        milestone_s: seconds from the start until the milestone held something; None for never.
    """

    code: int | None
    lines: Lines
    started_unix_s: float
    wall_s: float
    host_before_gib: float
    host_peak_gib: float
    milestone_s: float | None


def run(
    launch: Launch, env: dict[str, str], log: Path, timeout_s: float, milestone: Path | None = None
) -> Ran:
    """Run a program to its end, and end it when its time is over or this process is stopped.

    Args:
        launch: the program.
        env: its whole environment, less `launch.env`.
        log: gets all its output, as it is.
        timeout_s: after which it is ended, with all processes it has started.
        milestone: file whose first bytes are waited for, to within `POLL_S`.

    Returns:
        What it left.
    """
    host_before_gib = host_peak_gib = used_gib()
    milestone_s = None
    lines: Lines = []
    started_unix_s, began_s = time.time(), time.perf_counter()
    process = subprocess.Popen(
        launch.argv,
        cwd=launch.cwd,
        env={**env, **launch.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process only, which ends that one
    )
    assert process.stdout is not None
    reader = threading.Thread(
        target=_read, args=(process.stdout, log, lines, began_s), daemon=True, name="bench-log"
    )
    reader.start()
    try:
        while process.poll() is None and time.perf_counter() - began_s < timeout_s:
            host_peak_gib = max(host_peak_gib, used_gib())
            if milestone is not None and milestone_s is None and _has_bytes(milestone):
                milestone_s = time.perf_counter() - began_s
            time.sleep(POLL_S)
        code = process.poll()
    finally:
        end(process)
    reader.join(GRACE_S)
    wall_s = time.perf_counter() - began_s
    return Ran(code, lines, started_unix_s, wall_s, host_before_gib, host_peak_gib, milestone_s)


def used_gib() -> float:
    """Host memory in use by all programs, GiB: shared memory counts, page cache does not."""
    machine = psutil.virtual_memory()
    return (machine.total - machine.available) / GIB


def end(process: subprocess.Popen) -> None:
    """End a program, and what it has started, if it still runs.

    Args:
        process: asked first (SIGTERM), then made to (SIGKILL).
    """
    if process.poll() is not None:
        return
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def last_word(lines: Sequence[tuple[float, str]]) -> str:
    """Find the line that says why a program ended.

    Args:
        lines: of `Ran`.

    Returns:
        The last line that names an error (launchers only repeat that a rank failed), or else the
        last line; at most 200 characters.
    """
    texts = [text for _, text in lines]
    faults = [
        text
        for text in texts
        if FAULT.match(text) and not any(word in text for word in LAUNCHER_FAULTS)
    ]
    last = [*texts, *faults][-1] if texts else "it said nothing"
    return one_line(last.strip())[:MAX_REASON_CHARS]


def _has_bytes(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


def _read(stream: IO[bytes], log: Path, lines: Lines, began_s: float) -> None:
    """Copy a program's output into its log, and note when each line was said.

    A progress bar writes its carriage return before the text: the time is that of the text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, rest_s = "", 0.0
    with log.open("wb") as file:
        while chunk := os.read(stream.fileno(), 2**16):
            now_s = time.perf_counter() - began_s
            file.write(chunk)
            file.flush()
            *whole, new = LINE_BREAK.split(rest + decoder.decode(chunk))
            for index, text in enumerate(whole):
                is_old = index == 0 and text == rest
                lines += [(rest_s if is_old else now_s, text)] if text.strip() else []
            rest, rest_s = new, now_s
    lines += [(rest_s, rest)] if rest.strip() else []
