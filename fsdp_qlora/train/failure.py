"""What is said when a run fails: the word that a rank leaves, and why memory ran out; no torch."""

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from fsdp_qlora import atomic
from fsdp_qlora.config import Config
from fsdp_qlora.errors import RUN_FAILED, UserError, classify, one_line
from fsdp_qlora.plan import run as plans
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.redaction import redact
from fsdp_qlora.train import heartbeat
from fsdp_qlora.train.ranks import is_supervised

LOGS = "logs"
METRICS = "metrics.jsonl"
MOST_ROWS = 4
MAX_LINES = 10
MEMORY, LINK = "memory", "link"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
Rows = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RankError:
    """What a rank left behind when it failed.

    Args:
        rank: global rank.
        code: exit code of the command.
        line: what the user is told.
        more: lines that follow it.
        kind: what a new start could answer: MEMORY ran out, LINK between cards does not work.
    """

    rank: int
    code: int
    line: str
    more: Sequence[str] = ()
    kind: str = ""


class LinkError(RuntimeError):
    """What one rank sends does not reach the others, or not whole."""


def is_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a card or on the host."""
    name, text = type(error).__name__, str(error)
    by_text = isinstance(error, RuntimeError) and any(word in text for word in OUT_OF_MEMORY)
    return name in ("OutOfMemoryError", "MemoryError") or by_text


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where memory ran out.

    Args:
        phase: that was under way, in words.
        known_phase: the phase of the plan that it belongs to.
        predicted: GiB by phase and row.
        measured: GiB by row.
        is_cuda: it is the memory of a card.
        there: what the device had, in words.
    """

    phase: str
    known_phase: str
    predicted: Mapping[str, Rows]
    measured: Rows
    is_cuda: bool
    there: str

    def lines(self) -> list[str]:
        """The scene in a few lines; the first says where."""
        rows = self.predicted.get(self.known_phase, {})
        place = "a card" if self.is_cuda else "the host, all ranks"
        peak = max(self.predicted, key=lambda name: sum(self.predicted[name].values()), default="")
        lines = [f"out of memory in the {self.phase}"]
        if rows:
            lines.append(
                f"predicted {sum(rows.values()):.2f} GiB on {place} in the {self.known_phase}; at "
                f"the peak ({peak}) {sum(self.predicted[peak].values()):.2f}"
            )
        lines += [f"there     {self.there}", f"largest   {largest(self.measured, rows)}"]
        return lines


def largest(measured: Rows, predicted: Rows) -> str:
    """Return the largest rows in words, measured beside predicted.

    Args:
        measured: GiB by row; none: the predicted ones are named.
        predicted: GiB by row.
    """
    known = measured or predicted
    names = sorted(known, key=lambda name: -known[name])[:MOST_ROWS]
    parts = []
    for name in names:
        words = f"{name} {known[name]:.2f}"
        if measured and name in predicted:
            words += f" (predicted {predicted[name]:.2f})"
        parts.append(words)
    return f"{', '.join(parts)} GiB"


def fail(error: Exception, cfg: Config, plan: RunPlan | None = None) -> NoReturn:
    """Leave word of what ended this rank, then leave.

    The word goes to the supervisor, or to the terminal without one; the trace of what is no
    UserError goes to the log of the rank, or to the terminal where there is no log.

    Args:
        error: what ended the rank.
        cfg: the run.
        plan: of it, if it was made.
    """
    cfg = plan.cfg if plan is not None else cfg
    rank, logs = int(os.environ["RANK"]), cfg.resolved_output_dir / LOGS
    found = RankError(rank, RUN_FAILED, str(error), getattr(error, "__notes__", ()))
    if isinstance(error, UserError):
        found = dataclasses.replace(found, code=error.code)
    else:
        log = logs / f"rank{rank}.log"
        found = _word(error, rank, str(log) if logs.is_dir() else "above")
        with suppress(OSError), ExitStack() as stack:
            file = stack.enter_context(log.open("a")) if logs.is_dir() else None
            trace = "".join(traceback.format_exception(error))
            print(redact(trace, os.environ), end="", file=file or sys.stderr)
    if is_supervised(os.environ):
        with suppress(OSError):
            write_error(cfg.resolved_output_dir, **vars(found))
    else:
        for line in told(found, plan):
            print(line, file=sys.stderr)
    leave(found.code)


def _word(error: Exception, rank: int, trace: str) -> RankError:
    """What to say of an error that is not the user's; one for want of memory has been explained."""
    sign = heartbeat.mine(os.environ)
    who = f"rank {rank}{sign if sign is not None and sign.point else ''}"
    code, line = classify(error, who, trace)
    notes: list[str] = getattr(error, "__notes__", [])
    if not is_memory(error):
        is_cuda = isinstance(error, RuntimeError) and "CUDA error" in str(error)
        line += "; dmesg (lines with Xid) tells whether the card failed" if is_cuda else ""
        return RankError(rank, code, line, kind=LINK if isinstance(error, LinkError) else "")
    reason = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)[:120]
    place = notes[0] if notes else "out of memory"
    line = f"rank {rank}: {place} ({reason}); the trace is in {trace}"
    return RankError(rank, RUN_FAILED, line, tuple(notes[1:]), MEMORY)


def told(found: RankError, plan: RunPlan | None) -> list[str]:
    """The lines that tell of a failed rank.

    Args:
        found: what it left.
        plan: of the run, for what to change.
    """
    lines = [f"error: {one_line(found.line)}", *found.more]
    advice = plans.next_change(plan) if plan is not None and found.kind == MEMORY else ""
    if advice:
        lines.append(f"next      {advice}")
    return lines[:MAX_LINES]


def leave(code: int) -> NoReturn:
    """End this process without goodbye: the other ranks may hold it in a collective.

    Args:
        code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_error(
    output_dir: str | os.PathLike[str],
    rank: int,
    code: int,
    line: str,
    more: Sequence[str] = (),
    kind: str = "",
) -> None:
    """Leave word of a failure for the supervisor.

    Args:
        output_dir: directory of the run.
        rank: global rank of the caller.
        code: exit code that the command shall have.
        line: what the user is told, without "error: ".
        more: lines that follow it.
        kind: see RankError.
    """
    path = Path(output_dir) / LOGS / f"rank{rank}.error"
    path.parent.mkdir(parents=True, exist_ok=True)
    safe = RankError(rank, code, one_line(line), [one_line(text) for text in more], kind)
    atomic.write_json(path, dataclasses.asdict(safe))


def read_errors(output_dir: str | os.PathLike[str]) -> list[RankError]:
    """Return what failed ranks have left, the first failure first.

    Args:
        output_dir: directory of the run.
    """
    paths = (Path(output_dir) / LOGS).glob("rank*.error")
    by_time = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    return [RankError(**json.loads(path.read_text())) for path in by_time]


def clear_errors(output_dir: Path) -> None:
    """Remove what failed ranks have left, before they are started again.

    Args:
        output_dir: directory of the run.
    """
    for path in (output_dir / LOGS).glob("rank*.error"):
        path.unlink()


def has_begun(output_dir: Path) -> bool:
    """Return whether the training of a run has begun: whether it has a record.

    Args:
        output_dir: directory of the run.
    """
    return (output_dir / METRICS).exists()
