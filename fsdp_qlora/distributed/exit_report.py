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

from fsdp_qlora import atomic, errors, hardware, record
from fsdp_qlora.checkpoint_store import LOGS, METRICS
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.env import is_supervised
from fsdp_qlora.distributed.supervise import RanksExit
from fsdp_qlora.errors import DONE, RUN_FAILED, UserError, one_line
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.rows import GibByRow
from fsdp_qlora.planning.run import RunPlan

MOST_ROWS = 4
MAX_LINES = 10
MEMORY, LINK = "memory", "link"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")

AFTERMATH = (signal.SIGABRT, signal.SIGTERM)
OWN_FAULTS = (errors.INPUT, errors.ENVIRONMENT, errors.INTEGRITY)


@dataclasses.dataclass(frozen=True)
class RankError:
    """What a rank left behind when it failed.

    Args:
        rank: global rank.
        code: exit code of the command.
        line: what the user is told.
        more: lines that follow it.
        kind: what a new start could answer: MEMORY ran out, LINK between GPUs does not work.
    """

    rank: int
    code: int
    line: str
    more: Sequence[str] = ()
    kind: str = ""


class LinkError(RuntimeError):
    """What one rank sends does not reach the others, or not whole."""


def is_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
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
        is_cuda: it is the memory of a GPU.
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
        place = "a GPU" if self.is_cuda else "the host, all ranks"
        said = _compared(place, self.known_phase, self.predicted, self.measured, self.there)
        return [f"out of memory in the {self.phase}", *said]


def _compared(
    place: str, phase: str, predicted: Mapping[str, GibByRow], measured: GibByRow, there: str
) -> list[str]:
    """What was predicted, what there was, and the largest rows, measured beside predicted."""
    rows, lines = predicted.get(phase, {}), []
    if rows:
        peak = max(predicted, key=lambda name: sum(predicted[name].values()))
        line = f"predicted {sum(rows.values()):.2f} GiB on {place} in the {phase}; "
        lines.append(f"{line}at the peak ({peak}) {sum(predicted[peak].values()):.2f}")
    lines.append(f"there     {there}")
    parts, known = [], measured or rows
    for name in sorted(known, key=lambda name: -known[name])[:MOST_ROWS]:
        beside = f" (predicted {rows[name]:.2f})" if measured and name in rows else ""
        parts.append(f"{name} {known[name]:.2f}{beside}")
    return [*lines, *([f"largest   {', '.join(parts)} GiB"] if parts else [])]


def fail(error: Exception, cfg: TrainConfig, plan: RunPlan | None = None) -> NoReturn:
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
    log, has_log = logs / f"rank{rank}.log", logs.is_dir()
    failure = _describe(error, rank, str(log) if has_log else "above")
    if not isinstance(error, UserError):
        with suppress(OSError), ExitStack() as stack:
            file = stack.enter_context(log.open("a")) if has_log else sys.stderr
            trace = "".join(traceback.format_exception(error))
            print(errors.redact(trace, os.environ), end="", file=file)
    if is_supervised(os.environ):
        with suppress(OSError):
            write_error(cfg.resolved_output_dir, **vars(failure))
    else:
        print(*told(failure, plan), sep="\n", file=sys.stderr)
    leave(failure.code)


def _describe(error: Exception, rank: int, trace: str) -> RankError:
    """What to tell of an error; one for want of memory has been explained in its notes."""
    notes: list[str] = getattr(error, "__notes__", [])
    if isinstance(error, UserError):
        return RankError(rank, error.code, str(error), notes)
    if is_memory(error):
        reason = one_line([*str(error).splitlines(), type(error).__name__][0])[:120]
        place = notes[0] if notes else "out of memory"
        line = f"rank {rank}: {place} ({reason}); the trace is in {trace}"
        return RankError(rank, RUN_FAILED, line, notes[1:], MEMORY)
    sign = hooks.own_heartbeat(os.environ)
    who = f"rank {rank}{sign if sign is not None and sign.point else ''}"
    code, line = errors.classify(error, who, trace)
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        line += "; dmesg (lines with Xid) tells whether the GPU failed"
    return RankError(rank, code, line, kind=LINK if isinstance(error, LinkError) else "")


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
    """End this process without teardown: the other ranks may hold it in a collective.

    Args:
        code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_error(
    output_dir: Path, rank: int, code: int, line: str, more: Sequence[str] = (), kind: str = ""
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
    path = output_dir / LOGS / f"rank{rank}.error"
    path.parent.mkdir(parents=True, exist_ok=True)
    safe = RankError(rank, code, one_line(line), [one_line(text) for text in more], kind)
    atomic.write_json(path, dataclasses.asdict(safe))


def read_errors(output_dir: Path) -> list[RankError]:
    """Return what failed ranks have left, the first failure first.

    Args:
        output_dir: directory of the run.
    """
    paths = (output_dir / LOGS).glob("rank*.error")
    by_time = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    return [RankError(**json.loads(path.read_text())) for path in by_time]


def clear_errors(output_dir: Path) -> None:
    """Remove what failed ranks have left, before they are started again.

    Args:
        output_dir: directory of the run.
    """
    for path in (output_dir / LOGS).glob("rank*.error"):
        path.unlink()


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
        step = max(sign.step for sign in ended.signs)
        line = f"stopped by {signal.Signals(ended.stop).name}{f' at step {step}' if step else ''}; "
        line += how_to_resume or f"what was recorded is in {output_dir}"
        return ExitReport(128 + ended.stop, [line], is_final=True)
    if ended.hung:
        who = f"rank{'s' * (len(ended.hung) > 1)} {', '.join(map(str, ended.hung))}"
        sign = ended.signs[ended.hung[0]]
        rule = f"hung{sign}: no sign of life for {sign.silent_s:.0f} s"
        remedy = f"the stacks of all ranks are in {output_dir}/{LOGS}"
        return ExitReport(RUN_FAILED, [_line(who, rule, remedy, how_to_resume)])
    codes, signs, words = ended.codes, ended.signs, read_errors(output_dir)
    failed = [
        rank
        for rank in range(len(codes))
        if rank not in ended.ended and (codes[rank] or not signs[rank].is_last)
    ]
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    early = [rank for rank in failed if codes[rank] == DONE]
    own = [error for error in words if error.code in OWN_FAULTS]
    causes = own or ([] if sudden or early else words)
    if causes:
        has_begun = any(sign.step for sign in signs)
        return dataclasses.replace(_told(causes[0], how_to_resume, plan), has_begun=has_begun)
    rank = (sudden or early or failed)[0]
    lines = _left(ended, rank, output_dir, how_to_resume, num_kills, plan)
    return ExitReport(max(codes[rank], 0) or RUN_FAILED, lines)


def _told(found: RankError, how_to_resume: str, plan: RunPlan | None) -> ExitReport:
    """By the word that a rank has left."""
    is_final = found.code in OWN_FAULTS
    first, *rest = told(found, plan)
    if how_to_resume and not is_final:
        cause, _, remedy = first.rpartition("; ")
        room = errors.MAX_LINE_CHARS - len(_joined(remedy, how_to_resume)) - 2
        first = _joined(cause[: max(room, 40)], remedy, how_to_resume)
    return ExitReport(found.code, [first, *rest], found.kind, is_final)


def _line(who: str, rule: str, *remedies: str) -> str:
    return f"error: {UserError(who, rule, _joined(*remedies))}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _left(
    ended: RanksExit,
    rank: int,
    output_dir: Path,
    how_to_resume: str,
    num_kills: int,
    plan: RunPlan | None,
) -> list[str]:
    """Of a rank that ended and left no word."""
    who, code, sign = f"rank {rank}", ended.codes[rank], ended.signs[rank]
    log = f"see {output_dir}/{LOGS}/rank{rank}.log" if rank else "see the lines above"
    if code >= 0:
        rule = f"ended with code {code}{sign}" + ", before its end" * (code == DONE)
        return [_line(who, rule, log, how_to_resume)]
    name, is_kill = signal.Signals(-code).name, -code == signal.SIGKILL
    if not is_kill or not num_kills:
        remedy = "dmesg tells whether host memory ran out" if is_kill else log
        return [_line(who, f"was killed by {name}{sign}", remedy, how_to_resume)]
    has_begun, (line, step) = (output_dir / METRICS).exists(), _last_record(output_dir)
    where = f"training; {step} steps are recorded" if has_begun else "load"
    rule = f"was killed by the kernel ({name}): host memory ran out in the {where}"
    first = _line(who, rule, "free host memory or keep less in it", how_to_resume)
    phase = "backward" if has_begun else "load"
    return [first, *_host_lines(line.get("host", {}), phase, plan)][:MAX_LINES]


def _host_lines(host: dict[str, Any], phase: str, plan: RunPlan | None) -> list[str]:
    """What the host had, at the last record and by the plan."""
    found = plan.found if plan is not None else None
    there = f"{hardware.host_limit_gib() or 0:.2f} GiB may be used here"
    there += f", {host['host_used_gib']:.2f} in use at the last record" if host else ""
    predicted = found.host.to_dict() if found is not None else {}
    lines = _compared("the host", phase, predicted, host.get("host_rows") or {}, there)
    advice = "fewer ranks, a smaller --batch_size or --context_length, or more memory"
    if found is not None and plan is not None and plan.machine.gpus:
        advice = "fewer ranks or more memory; --weights random shows what the base itself needs"
        if found.setting.count("offloaded", "streamed"):
            advice = "--resident_layers N keeps N layers on the GPUs, --use_cpu_offload false all"
    return [*lines, f"next      {advice}"]


def _last_record(output_dir: Path) -> tuple[dict[str, Any], int]:
    """The last line of the record that tells of a step, and its number; {} and 0 without one."""
    with suppress(OSError):
        text = (output_dir / METRICS).read_bytes()
        for line in map(record.parse, reversed(text.splitlines())):
            if line is not None and "step" in line and "event" not in line:
                return line, int(line["step"])
    return {}, 0
