"""How a run ended: the word that a failed rank leaves, why it is the first cause; no torch."""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from fsdp_qlora import atomic, hardware
from fsdp_qlora.config import Config
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.env import is_supervised
from fsdp_qlora.distributed.hooks import Heartbeat
from fsdp_qlora.distributed.supervise import RanksExit
from fsdp_qlora.errors import (
    DONE,
    ENVIRONMENT,
    INPUT,
    INTEGRITY,
    MAX_LINE_CHARS,
    RUN_FAILED,
    UserError,
    classify,
    one_line,
    redact,
)
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.rows import GibByRow, Table
from fsdp_qlora.planning.run import RunPlan

LOGS = "logs"
METRICS = "metrics.jsonl"
MOST_ROWS = 4
MAX_LINES = 10
MEMORY, LINK = "memory", "link"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")

AFTERMATH = (signal.SIGABRT, signal.SIGTERM)
OWN_FAULTS = (INPUT, ENVIRONMENT, INTEGRITY)


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
    predicted: Mapping[str, GibByRow]
    measured: GibByRow
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


def largest(measured: GibByRow, predicted: GibByRow) -> str:
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
    sign = hooks.own_heartbeat(os.environ)
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


@dataclasses.dataclass(frozen=True)
class ExitReport:
    """What is said of a run that has ended.

    Attributes:
        code: of the command.
        lines: for the user; the first says why, the others where memory went.
        kind: of the failure, see RankError.
        is_final: to start again would not help.
        has_begun: a step was under way.
    """

    code: int
    lines: Sequence[str] = ()
    kind: str = ""
    is_final: bool = False
    has_begun: bool = True


def diagnose_exit(
    ended: RanksExit, output_dir: Path, how_to_resume: str, num_kills: int, plan: RunPlan | None
) -> ExitReport:
    """Find out why a run ended: the first cause, not what its peers say of it.

    Args:
        ended: of the ranks.
        output_dir: directory of the run.
        how_to_resume: how to continue, in words; "" when nothing can be continued.
        num_kills: processes that the kernel has killed meanwhile, because memory ran out.
        plan: of the run, if it was made.
    """
    if ended.is_done:
        return ExitReport(DONE, is_final=True)
    if ended.stop is not None:
        name = signal.Signals(ended.stop).name
        line = f"stopped by {name}{_at(ended.signs)}; "
        line += how_to_resume or f"what was recorded is in {output_dir}"
        return ExitReport(128 + ended.stop, [line], is_final=True)
    if ended.hung:
        return ExitReport(RUN_FAILED, [_hung(ended, output_dir, how_to_resume)])
    failed = [
        rank
        for rank, (code, sign) in enumerate(zip(ended.codes, ended.signs, strict=True))
        if rank not in ended.ended and (code or not sign.is_last)
    ]
    codes, errors = ended.codes, read_errors(output_dir)
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    early = [rank for rank in failed if codes[rank] == DONE]
    own = [error for error in errors if error.code in OWN_FAULTS]
    causes = own or ([] if sudden or early else errors)
    if causes:
        has_begun = any(sign.step for sign in ended.signs)
        return dataclasses.replace(_told(causes[0], how_to_resume, plan), has_begun=has_begun)
    rank = (sudden or early or failed)[0]
    lines = _left(rank, codes[rank], ended.signs[rank], output_dir, how_to_resume, num_kills, plan)
    return ExitReport(max(codes[rank], 0) or RUN_FAILED, lines)


def _at(signs: Sequence[Heartbeat]) -> str:
    step = max(sign.step for sign in signs)
    return f" at step {step}" if step else ""


def _told(found: RankError, how_to_resume: str, plan: RunPlan | None) -> ExitReport:
    """By the word that a rank has left."""
    is_final = found.code in OWN_FAULTS
    first, *rest = told(found, plan)
    if how_to_resume and not is_final:
        cause, _, remedy = first.rpartition("; ")
        room = MAX_LINE_CHARS - len(_joined(remedy, how_to_resume)) - 2
        first = _joined(cause[: max(room, 40)], remedy, how_to_resume)
    return ExitReport(found.code, [first, *rest], found.kind, is_final)


def _hung(ended: RanksExit, output_dir: Path, how_to_resume: str) -> str:
    """Of ranks that were alive and did nothing."""
    who = f"rank{'s' * (len(ended.hung) > 1)} {', '.join(map(str, ended.hung))}"
    sign = ended.signs[ended.hung[0]]
    rule = f"hung{sign}: no sign of life for {sign.silent_s:.0f} s"
    remedy = f"the stacks of all ranks are in {output_dir}/{LOGS}"
    return f"error: {UserError(who, rule, _joined(remedy, how_to_resume))}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _left(
    rank: int,
    code: int,
    sign: Heartbeat,
    output_dir: Path,
    how_to_resume: str,
    num_kills: int,
    plan: RunPlan | None,
) -> list[str]:
    """Of a rank that ended and left no word."""
    who, log = f"rank {rank}", "see the lines above"
    if rank:
        log = f"see {output_dir}/{LOGS}/rank{rank}.log"
    if code >= 0:
        rule = f"ended with code {code}{sign}" + ", before its end" * (code == DONE)
        return [f"error: {UserError(who, rule, _joined(log, how_to_resume))}"]
    name, is_kill = signal.Signals(-code).name, -code == signal.SIGKILL
    if not is_kill or not num_kills:
        remedy = "dmesg tells whether host memory ran out" if is_kill else log
        rule = f"was killed by {name}{sign}"
        return [f"error: {UserError(who, rule, _joined(remedy, how_to_resume))}"]
    line, step = _last_record(output_dir)
    phase = "backward" if has_begun(output_dir) else "load"
    where = f"training; {step} steps are recorded" if has_begun(output_dir) else phase
    rule = f"was killed by the kernel ({name}): host memory ran out in the {where}"
    remedy = _joined("free host memory or keep less in it", how_to_resume)
    return [f"error: {UserError(who, rule, remedy)}", *_host_scene(line, phase, plan)][:MAX_LINES]


def _host_scene(line: dict[str, Any], phase: str, plan: RunPlan | None) -> list[str]:
    """What the host had, at the last record and by the plan."""
    found, lines = (plan.found if plan is not None else None), []
    limit_gib = hardware.host_limit_gib()
    if found is not None:
        table: Table = found.host
        lines.append(
            f"predicted {table.total_gib(phase):.2f} GiB on the host in the {phase}, all programs; "
            f"at the peak ({table.peak_phase}) {table.peak_gib:.2f}"
        )
    host = line.get("host", {})
    used = f", {host['host_used_gib']:.2f} in use at the last record" if host else ""
    lines.append(f"there     {limit_gib or 0:.2f} GiB may be used here{used}")
    predicted = found.host.to_dict()[phase] if found is not None else {}
    measured = host.get("host_rows") or {}
    if measured or predicted:
        lines.append(f"largest   {largest(measured, predicted)}")
    advice = "fewer ranks, a smaller --batch_size or --context_length, or more memory"
    if found is not None and plan is not None and plan.machine.gpus:
        advice = "fewer ranks or more memory; --weights random shows what the base itself needs"
        if found.setting.count("offloaded", "streamed"):
            advice = "--resident_layers N keeps N layers on the cards, --use_cpu_offload false all"
    return [*lines, f"next      {advice}"]


def _last_record(output_dir: Path) -> tuple[dict[str, Any], int]:
    """The last line of the record that tells of a step, and its number; {} and 0 without one."""
    try:
        text = (output_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}, 0
    for line in map(_read_line, reversed(text.splitlines())):
        if "step" in line and "event" not in line:
            return line, int(line["step"])
    return {}, 0


def _read_line(text: str) -> dict[str, Any]:
    """A line of the record; {} for one that was not written to its end."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
