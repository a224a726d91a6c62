"""Why a run ended, in one line for the user, and what its exit code is; no torch."""

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdp_qlora import hardware
from fsdp_qlora.errors import (
    DONE,
    ENVIRONMENT,
    INPUT,
    INTEGRITY,
    MAX_LINE_CHARS,
    RUN_FAILED,
    UserError,
)
from fsdp_qlora.plan.rows import Table
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.train import failure
from fsdp_qlora.train.failure import LOGS, MAX_LINES, METRICS, RankError
from fsdp_qlora.train.heartbeat import Sign
from fsdp_qlora.train.processes import Ending

AFTERMATH = (signal.SIGABRT, signal.SIGTERM)
OWN_FAULTS = (INPUT, ENVIRONMENT, INTEGRITY)


@dataclass(frozen=True)
class Verdict:
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


def judge(
    ending: Ending, output_dir: Path, way_on: str, num_kills: int, plan: RunPlan | None
) -> Verdict:
    """Find out why a run ended: the first cause, not what its peers say of it.

    Args:
        ending: of the ranks.
        output_dir: directory of the run.
        way_on: how to continue, in words; "" when nothing can be continued.
        num_kills: processes that the kernel has killed meanwhile, because memory ran out.
        plan: of the run, if it was made.
    """
    if ending.is_done:
        return Verdict(DONE, is_final=True)
    if ending.stop is not None:
        name = signal.Signals(ending.stop).name
        line = f"stopped by {name}{_at(ending.signs)}; "
        line += way_on or f"what was recorded is in {output_dir}"
        return Verdict(128 + ending.stop, [line], is_final=True)
    if ending.hung:
        return Verdict(RUN_FAILED, [_hung(ending, output_dir, way_on)])
    failed = [
        rank
        for rank, (code, sign) in enumerate(zip(ending.codes, ending.signs, strict=True))
        if rank not in ending.ended and (code or not sign.is_last)
    ]
    codes, errors = ending.codes, failure.read_errors(output_dir)
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    early = [rank for rank in failed if codes[rank] == DONE]
    own = [error for error in errors if error.code in OWN_FAULTS]
    causes = own or ([] if sudden or early else errors)
    if causes:
        has_begun = any(sign.step for sign in ending.signs)
        return replace(_told(causes[0], way_on, plan), has_begun=has_begun)
    rank = (sudden or early or failed)[0]
    lines = _left(rank, codes[rank], ending.signs[rank], output_dir, way_on, num_kills, plan)
    return Verdict(max(codes[rank], 0) or RUN_FAILED, lines)


def _at(signs: Sequence[Sign]) -> str:
    step = max(sign.step for sign in signs)
    return f" at step {step}" if step else ""


def _told(found: RankError, way_on: str, plan: RunPlan | None) -> Verdict:
    """By the word that a rank has left."""
    is_final = found.code in OWN_FAULTS
    first, *rest = failure.told(found, plan)
    if way_on and not is_final:
        cause, _, remedy = first.rpartition("; ")
        room = MAX_LINE_CHARS - len(_joined(remedy, way_on)) - 2
        first = _joined(cause[: max(room, 40)], remedy, way_on)
    return Verdict(found.code, [first, *rest], found.kind, is_final)


def _hung(ending: Ending, output_dir: Path, way_on: str) -> str:
    """Of ranks that were alive and did nothing."""
    who = f"rank{'s' * (len(ending.hung) > 1)} {', '.join(map(str, ending.hung))}"
    sign = ending.signs[ending.hung[0]]
    rule = f"hung{sign}: no sign of life for {sign.silent_s:.0f} s"
    remedy = f"the stacks of all ranks are in {output_dir}/{LOGS}"
    return f"error: {UserError(who, rule, _joined(remedy, way_on))}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _left(
    rank: int,
    code: int,
    sign: Sign,
    output_dir: Path,
    way_on: str,
    num_kills: int,
    plan: RunPlan | None,
) -> list[str]:
    """Of a rank that ended and left no word."""
    who, log = f"rank {rank}", "see the lines above"
    if rank:
        log = f"see {output_dir}/{LOGS}/rank{rank}.log"
    if code >= 0:
        rule = f"ended with code {code}{sign}" + ", before its end" * (code == DONE)
        return [f"error: {UserError(who, rule, _joined(log, way_on))}"]
    name, is_kill = signal.Signals(-code).name, -code == signal.SIGKILL
    if not is_kill or not num_kills:
        remedy = "dmesg tells whether host memory ran out" if is_kill else log
        rule = f"was killed by {name}{sign}"
        return [f"error: {UserError(who, rule, _joined(remedy, way_on))}"]
    line, step = _last_record(output_dir)
    phase = "backward" if failure.has_begun(output_dir) else "load"
    where = f"training; {step} steps are recorded" if failure.has_begun(output_dir) else phase
    rule = f"was killed by the kernel ({name}): host memory ran out in the {where}"
    remedy = _joined("free host memory or keep less in it", way_on)
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
        lines.append(f"largest   {failure.largest(measured, predicted)}")
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
