"""`python -m fsdp_qlora doctor`: every check, one line each, and figures for `plan`."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fsdp_qlora import atomic, cli, hardware
from fsdp_qlora.cli import flag
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.hardware import count_gpus
from fsdp_qlora.train.doctor import jobs, machine
from fsdp_qlora.train.doctor.findings import (
    OK,
    PROBLEM,
    WARNING,
    Finding,
    ok,
    softly,
    warning,
)
from fsdp_qlora.train.doctor.jobs import Job

USAGE = """usage: python -m fsdp_qlora doctor [options]

Looks at packages, cards, memory, disks and the hub, tries the 4-bit products, lets ranks meet, and
measures; says of each whether it is fine, or what to do. `plan` reckons with what was measured.
Exit code 0: training works here; 3: something keeps it from working; 5: bytes or products are
wrong."""
ON_CARDS = ("card", "four_bit", "kernels", "speed", "join", "pin", "shared", "gather", "bytes")
ON_CPU = ("four_bit", "speed", "join", "shared", "gather", "bytes")
TOGETHER = ("join", "gather", "bytes")
BESIDE_CARDS = ("four_bit", "join", "bytes")
NUM_CPU_RANKS = 2
CARDS_S, CPU_S, QUICK_S = 180.0, 120.0, 90.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `doctor`."""

    json: bool = flag(False, "doctor", "print one JSON object")
    quick: bool = flag(False, "doctor", "measure nothing: versions, cards, memory, hub")
    output_dir: str = flag(
        "output", "doctor", "where runs are to be written", rule="printable text"
    )


def parse(argv: Sequence[str]) -> Options:
    """Read the command line.

    Args:
        argv: arguments without the verb.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    return cli.parse(argv, Options, USAGE)


def examine(options: Options) -> Iterator[Finding]:
    """Do every check.

    Args:
        options: of the command line.

    Yields:
        What is found, as it is found.
    """
    num_cards = count_gpus(os.environ)
    for check in machine.checks(Path(options.output_dir), num_cards, options.quick):
        yield from softly(check.name, check.look, "see the message", check.code)
    if not num_cards:
        yield ok("cards", "none: ranks compute on the CPU")
    elif options.quick:
        yield from jobs.run(Job("cuda", num_cards, ("card",), QUICK_S), os.environ)
    else:
        yield from on_cards(num_cards, os.environ)
    if options.quick:
        return
    tasks = BESIDE_CARDS if num_cards else ON_CPU
    found = jobs.run(Job("cpu", NUM_CPU_RANKS, tasks, CPU_S), os.environ)
    for finding in found:
        yield dataclasses.replace(finding, code=DONE) if num_cards else finding


def on_cards(num_cards: int, env: Mapping[str, str]) -> Iterator[Finding]:
    """Check the cards, and where they fail together, whether they work without peer access.

    Args:
        num_cards: of this machine.
        env: environment of the ranks.

    Yields:
        What is found.
    """
    tasks = (*ON_CARDS, "peers") if num_cards > 1 else ON_CARDS
    found = jobs.run(Job("cuda", num_cards, tasks, CARDS_S), env)
    yield from found
    crashed = tuple(f"card {i} {task}" for i in range(num_cards) for task in TOGETHER)
    failed = [
        finding
        for finding in found
        if finding.status == PROBLEM and finding.name.startswith((f"{num_cards} cards", *crashed))
    ]
    if num_cards == 1 or not failed or env.get("NCCL_P2P_DISABLE", "0") != "0":
        return
    env = {**env, "NCCL_P2P_DISABLE": "1"}
    again = jobs.run(Job("cuda", num_cards, TOGETHER, CARDS_S), env)
    if any(finding.status == PROBLEM for finding in again):
        value = "the same with NCCL_P2P_DISABLE=1: peer access is not the cause"
        yield warning("without peer access", value, "try one card: CUDA_VISIBLE_DEVICES=0")
    else:
        yield from again
        value = "with NCCL_P2P_DISABLE=1 the cards work together"
        yield warning("without peer access", value, "export NCCL_P2P_DISABLE=1")


def measured(found: Iterable[Finding]) -> dict[str, dict[str, float]]:
    """Collect speeds; of several cards of one name the slowest counts.

    Args:
        found: findings.

    Returns:
        As hardware.machine_file has it: card -> speeds.
    """
    table: dict[str, dict[str, float]] = {}
    for finding in found:
        row = table.setdefault(finding.card, {}) if finding.card else {}
        for key, value in finding.speeds.items():
            rounded = float(f"{value:.4g}")
            row[key] = min(row.get(key, rounded), rounded)
    return table


def keep(table: Mapping[str, Mapping[str, float]], path: Path) -> Finding:
    """Put speeds where `plan` finds them; cards of other machines stay in the file.

    Args:
        table: see `measured`.
        path: of hardware.machine_file.

    Returns:
        What was written, or why nothing was.
    """
    name = "measured figures"
    if not table:
        return ok(name, f"none; {path} is left as it is")
    known: dict[str, dict[str, float]] = {}
    value = f"of {', '.join(table)} are in {path}, where plan finds them"
    try:
        if path.is_file():
            hardware.with_measured([], path, None)
            known = json.loads(path.read_text(encoding="utf-8"))["cards"]
    except UserError:
        value += " (what was there could not be read)"
    rows = {card: {**known.get(card, {}), **speeds} for card, speeds in table.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, {"cards": {**known, **rows}})
    except OSError as error:
        return warning(
            name, f"{path}: {error.strerror}", "choose another with FSDP_QLORA_CACHE=DIR"
        )
    return ok(name, value)


def main(argv: list[str]) -> int:
    """Look at this machine and say what was found.

    Args:
        argv: see USAGE.

    Returns:
        0, or the code of what keeps training from working.

    Raises:
        UserError: a bad option.
    """
    options = parse(argv)
    found: list[Finding] = []
    if not options.json and not options.quick and sys.stderr.isatty():
        print("measuring, about a minute ...", file=sys.stderr)

    def tell(finding: Finding) -> None:
        found.append(finding)
        if not options.json:
            print(finding.line(), flush=True)

    for finding in examine(options):
        tell(finding)
    table = measured(found)
    tell(keep(table, hardware.machine_file()))
    counts = {status: sum(f.status == status for f in found) for status in (PROBLEM, WARNING, OK)}
    code = max(finding.code for finding in found)
    if options.json:
        rows = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"code": code, "cards": table, "findings": rows}, indent=1))
    else:
        print(f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} fine")
    return code
