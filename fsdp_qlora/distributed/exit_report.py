"""How a run ended: the word that a failed rank leaves, why it is the first cause; no torch."""

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fsdp_qlora import atomic, checkpoint_store, config, errors, hardware
from fsdp_qlora.checkpoint_store import LOGS, METRICS
from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import BUG, DONE, RUN_FAILED, UserError, one_line
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.rows import GibByRow
from fsdp_qlora.planning.sizes import STREAMED

MOST_ROWS, MAX_LINES = 4, 10
MEMORY, LINK = "memory", "link"
AFTERMATH = (signal.SIGABRT, signal.SIGTERM)
OWN_FAULTS = (errors.INPUT, errors.ENVIRONMENT, errors.INTEGRITY)


class RankError(NamedTuple):
    """What a rank left behind when it failed.

    Args:
        rank: global rank.
        code: exit code of the command.
        line: what the user is told, without "error: ".
        more: lines that follow it.
        kind: what a new start could answer: MEMORY ran out, LINK between GPUs does not work.
    """

    rank: int
    code: int
    line: str
    more: Sequence[str] = ()
    kind: str = ""


class RanksExit(NamedTuple):
    """How the ranks ended.

    Attributes:
        codes: as Popen gives them, by rank.
        signs: the last that was heard of each rank, before it was ended for hanging.
        ended: the ranks that had to be ended, and ended by that.
        stop: the signal that stopped the run before any rank failed.
        hung: the ranks that had stopped without leaving.
    """

    codes: Sequence[int]
    signs: Sequence[hooks.Heartbeat]
    ended: frozenset[int] = frozenset()
    stop: int | None = None
    hung: Sequence[int] = ()

    @property
    def is_done(self) -> bool:
        """Whether every rank has come to its end."""
        return not any(self.codes) and all(sign.is_last for sign in self.signs)


class ExitReport(NamedTuple):
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


class LinkError(RuntimeError):
    """What one rank sends does not reach the others, or not whole."""


def compare_memory(
    place: str, phase: str, predicted: Mapping[str, GibByRow], measured: GibByRow, there: str
) -> list[str]:
    """Say where memory ran out: what was predicted, what there was, and the largest rows.

    Args:
        place: in words that follow "on".
        phase: of the plan that was under way.
        predicted: GiB by phase and row.
        measured: GiB by row; shown beside what was predicted.
        there: what the device had, in words.
    """
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


def fail(error: Exception, cfg: config.TrainConfig, plan: plans.RunPlan | None = None) -> NoReturn:
    """Leave word of what ended this rank, then leave.

    The word goes to the supervisor, or to the terminal without one; the trace of what is no
    UserError goes to the log of the rank, or to the terminal where there is no log.

    Args:
        error: what ended the rank.
        cfg: the run.
        plan: of it, if it was made.
    """
    output_dir = (plan.cfg if plan is not None else cfg).resolved_output_dir
    rank = int(os.environ["RANK"])
    log, has_log = output_dir / LOGS / f"rank{rank}.log", (output_dir / LOGS).is_dir()
    found = _describe(error, rank, str(log) if has_log else "above")
    if not isinstance(error, UserError):
        trace = errors.redact("".join(traceback.format_exception(error)))
        with suppress(OSError), log.open("a") if has_log else nullcontext(sys.stderr) as file:
            file.write(trace)
    if hooks.is_supervised():
        try:
            write_error(output_dir, found)
        except OSError:  # a full disk does not even take the word of it
            hooks.beat(found.line, rank)
    else:
        print(*error_lines(found, plan), sep="\n", file=sys.stderr)
        _tell_torchrun(found.line, "".join(traceback.format_exception(error)))
    leave(found.code)


def _tell_torchrun(line: str, trace: str = "") -> None:
    """Leave word in the file that torchrun's agent reads; source: torch.distributed.elastic."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    more = {"py_callstack": errors.redact(trace or line), "timestamp": str(int(time.time()))}
    with suppress(OSError):
        if path:
            message = {"message": errors.redact(line), "extraInfo": more}
            atomic.write_json(Path(path), {"message": message})


def end_without(lost: list[int], rule: str, out_dir: Path, rank: int, hosts: list[str]) -> NoReturn:
    """End this rank because others are lost; one rank of each host says so.

    Args:
        lost: the others; it may be among them itself.
        rule: in what way.
        out_dir: directory of the run, or none, if it has not begun.
        rank: of this process.
        hosts: by rank.
    """
    remedies = "no step is saved on this host", "start the run again"
    if (saved := checkpoint_store.latest(out_dir)) is not None:
        remedies = f"step {saved.step} is saved", f"continue with {errors.resume_of(out_dir)}"
    line = _line(", ".join(f"{hosts[i]} (rank {i})" for i in lost), rule, *remedies)
    with suppress(OSError), (out_dir / LOGS / f"rank{rank}.log").open("a") as log:
        faulthandler.dump_traceback(log)
    here = [i for i, host in enumerate(hosts) if host == hosts[rank]]
    if rank == ([i for i in here if i not in lost] or here)[0]:
        print(line, file=sys.stderr, flush=True)
    _tell_torchrun(line)
    time.sleep(2 * hooks.BEAT_S * (rank == 0))  # the others, too, have to hear of it at the store
    leave(RUN_FAILED)


def _describe(error: Exception, rank: int, trace: str) -> RankError:
    """What to tell of an error; one for want of memory has been explained in its notes."""
    notes: list[str] = getattr(error, "__notes__", [])
    if isinstance(error, UserError):
        return RankError(rank, error.code, str(error), notes)
    kind, name, text = type(error).__name__, f"rank {rank}", str(error)
    first = text.splitlines()[0] if text else ""
    if errors.is_memory(error):
        place = notes[0] if notes else "out of memory"
        line = f"{name}: {place} ({errors.printable(first or kind)[:120]}); the trace is in {trace}"
        return RankError(rank, RUN_FAILED, line, notes[1:], MEMORY)
    sign, shown = hooks.own_heartbeat(), errors.printable(f"{kind}: {first}")[:160]
    line = f"{name}{sign if sign.point else ''}: {shown}; the trace is in {trace}"
    if isinstance(error, RuntimeError) and "CUDA error" in text:
        line += "; dmesg (lines with Xid) tells whether the GPU failed"
    code = RUN_FAILED if isinstance(error, RuntimeError | OSError) else BUG
    return RankError(rank, code, line, kind=LINK if isinstance(error, LinkError) else "")


def error_lines(found: RankError, plan: plans.RunPlan | None, how_to_resume: str = "") -> list[str]:
    """Return the lines that tell of a failed rank.

    Args:
        found: what it left.
        plan: of the run, for what to change.
        how_to_resume: how to continue, in words; of a line too long for it the cause is cut.
    """
    first = f"error: {one_line(found.line)}"
    if how_to_resume and "--resume" not in first:  # its own remedy knows better
        cause, _, remedy = first.rpartition("; ")
        room = errors.MAX_LINE_CHARS - len(_joined(remedy, how_to_resume)) - 2
        first = _joined(cause[: max(room, 40)], remedy, how_to_resume)
    advice = _address_limit() if found.code not in OWN_FAULTS else ""
    if found.kind == MEMORY and plan is not None:
        advice = advice or plans.next_change(plan)
    return [first, *found.more, *([f"next      {advice}"] if advice else [])][:MAX_LINES]


def leave(code: int) -> NoReturn:
    """End this process without teardown: the other ranks may hold it in a collective.

    Args:
        code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_error(output_dir: Path, found: RankError) -> None:
    """Leave word of a failure for the supervisor.

    Args:
        output_dir: directory of the run.
        found: the failure; what cannot be printed in a line is escaped.
    """
    path = output_dir / LOGS / f"rank{found.rank}.error"
    path.parent.mkdir(parents=True, exist_ok=True)
    safe = {"line": one_line(found.line), "more": [one_line(text) for text in found.more]}
    atomic.write_json(path, found._asdict() | safe)


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


def diagnose_exit(
    ended: RanksExit, out_dir: Path, how_to_resume: str, num_kills: int, plan: plans.RunPlan | None
) -> ExitReport:
    """Find out why a run ended: the first cause, not what its peers say of it.

    Args:
        ended: of the ranks.
        out_dir: directory of the run.
        how_to_resume: how to continue, in words; "" when nothing can be continued.
        num_kills: processes that the kernel has killed meanwhile, because memory ran out.
        plan: of the run, if it was made.
    """
    codes, signs = ended.codes, ended.signs
    if ended.is_done:
        return ExitReport(DONE, is_final=True)
    if ended.stop is not None:
        step = max(sign.step for sign in signs)
        line = f"stopped by {signal.Signals(ended.stop).name}{f' at step {step}' if step else ''}; "
        line += how_to_resume or f"what was recorded is in {out_dir}"
        return ExitReport(errors.SIGNALED + ended.stop, [line], is_final=True)
    if ended.hung:
        who = f"rank{'s' * (len(ended.hung) > 1)} {', '.join(map(str, ended.hung))}"
        sign = signs[ended.hung[0]]
        rule = f"hung{sign}: no sign of life for {sign.silent_s:.0f} s"
        remedy = f"the stacks of all ranks are in {out_dir}/{LOGS}"
        return ExitReport(RUN_FAILED, [_line(who, rule, remedy, how_to_resume)])
    words, is_last = read_errors(out_dir), [sign.is_last for sign in signs]
    failed = [i for i in range(len(codes)) if i not in ended.ended and (codes[i] or not is_last[i])]
    words += [RankError(i, codes[i], signs[i].point) for i in failed if " " in signs[i].point]
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    early = [rank for rank in failed if codes[rank] == DONE]
    own = [error for error in words if error.code in OWN_FAULTS]
    causes = own or ([] if sudden or early else words)
    if causes:
        lines = error_lines(causes[0], plan, "" if own else how_to_resume)
        has_begun = any(sign.step for sign in signs)
        return ExitReport(causes[0].code, lines, causes[0].kind, bool(own), has_begun)
    rank = (sudden or early or failed)[0]
    who, code, sign = f"rank {rank}", codes[rank], signs[rank]
    remedy = f"see {out_dir}/{LOGS}/rank{rank}.log" if rank else "see the lines above"
    if -code == signal.SIGKILL and num_kills:
        rule, more = _killed_by_kernel(out_dir, plan)
        first = _line(who, rule, "free host memory or keep less in it", how_to_resume)
        return ExitReport(RUN_FAILED, [first, *more][:MAX_LINES])
    rule = f"ended with code {code}{sign}" + ", before its end" * (code == DONE)
    rule = f"was killed by {signal.Signals(-code).name}{sign}" if code < 0 else rule
    remedy = "dmesg tells whether host memory ran out" if -code == signal.SIGKILL else remedy
    first = _line(who, rule, remedy, _address_limit(), how_to_resume)
    return ExitReport(max(code, 0) or RUN_FAILED, [first])


def _address_limit() -> str:
    """What `ulimit -v` leaves a process, in words; "": it is unlimited."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    words = f"ulimit -v leaves a process {limit / atomic.GIB:.2f} GiB of addresses; raise it"
    return "" if limit == resource.RLIM_INFINITY else words


def _line(who: str, rule: str, *remedies: str) -> str:
    return f"error: {UserError(who, rule, _joined(*remedies))}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _killed_by_kernel(output_dir: Path, plan: plans.RunPlan | None) -> tuple[str, list[str]]:
    """Why a rank was killed, and what the host had, at the last record and by the plan."""
    last: dict[str, Any] = {}
    where, phase, path = "load", "load", output_dir / METRICS
    if path.exists():
        rows = filter(None, map(atomic.parse_json, path.read_bytes().splitlines()))
        last = ([row for row in rows if "step" in row and "event" not in row] or [{}])[-1]
        where, phase = f"training; {last.get('step', 0)} steps are recorded", "backward"
    found, host = plan.found if plan is not None else None, last.get("host", {})
    there = f"{hardware.host_limit_gib():.2f} GiB may be used here"
    there += f", {host['host_used_gib']:.2f} in use at the last record" if host else ""
    kind = "cpu"
    if found is not None and plan is not None and plan.machine.gpus:
        kind = "offloaded" if found.setting.count("offloaded", *STREAMED) else "gpu"
    predicted = found.host.to_dict() if found is not None else {}
    more = compare_memory("the host", phase, predicted, host.get("host_rows") or {}, there)
    rule = f"was killed by the kernel (SIGKILL): host memory ran out in the {where}"
    return rule, [*more, f"next      {plans.WORDS['host_full'][kind]}"]
