"""`python -m fsdp_qlora doctor`: what works on this machine, how fast it is, and what to do.

Torch is not imported here: GPUs, kernels and collectives are tried in ranks (doctor/ranks.py),
processes that may crash or hang.
"""

import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, cli, hardware
from fsdp_qlora.cli import flag
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import supervise
from fsdp_qlora.distributed.env import child_env, find_port
from fsdp_qlora.distributed.supervise import RankSpec
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError, one_line
from fsdp_qlora.hardware import GIB

USAGE = """usage: python -m fsdp_qlora doctor [options]

Checks packages, GPUs, memory and disks, tries 4-bit matmuls, lets ranks meet, measures
speeds, and reports of each whether it works or what to do. `plan` uses the speeds.
Exit code 0: training works here; 3: something keeps it from working; 5: bytes or results are
wrong."""
OK, WARNING, PROBLEM = "ok", "warning", "problem"
MIB = 2**20
OPTIONAL = {
    "hqq": "--train_type hqq_lora",
    "flash-attn": "faster attention on GPUs",
    "liger-kernel": "faster norms on GPUs",
    "datasets": "data sets of the hub",
}
LEAST_HOST_GIB, LEAST_DISK_GIB, LEAST_SHM_GIB, SLOW_MBS = 4, 5, 1, 100
CACHE = "choose another with FSDP_QLORA_CACHE=DIR"
NUM_CPU_RANKS, GRACE_S = 2, 10.0
TOGETHER = ("meet", "gather")
ON_CPU = ("4-bit", "speed", *TOGETHER)
ON_GPUS = ("device", "4-bit", "kernels", "speed", "meet", "host link", "gather", "from others")
DISK_BYTES = 128 * MIB


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `doctor`."""

    json: bool = flag(False, "doctor", "print one JSON object")
    quick: bool = flag(False, "doctor", "measure nothing: versions, GPUs, memory")
    output_dir: str = flag("output", "doctor", "where runs will be written", rule="printable text")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        value: what was found.
        remedy: what to do about it; "" when it is OK.
        status: OK, WARNING or PROBLEM.
        code: exit code of the command, where this keeps training from working as it is.
        device: whose speeds were measured, as the driver calls it; "" = none.
        speeds: some of hardware.SPEEDS, of that device.
    """

    name: str
    value: str
    remedy: str = ""
    status: str = OK
    code: int = DONE
    device: str = ""
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """The finding in one line of printable text."""
        parts = [self.value, self.remedy] if self.remedy else [self.value]
        return one_line(f"{self.status:<8} {self.name:<24} {'; '.join(parts)}")


def main(argv: list[str]) -> int:
    """Check this machine and print what was found.

    Args:
        argv: see USAGE.

    Returns:
        0, or the code of what keeps training from working.

    Raises:
        UserError: bad options, all at once.
    """
    options, findings = cli.parse(argv, Options, USAGE), []
    if not options.json and not options.quick and sys.stderr.isatty():
        print("measuring, about a minute ...", file=sys.stderr)
    for finding in examine(options):
        findings.append(finding)
        print("" if options.json else finding.line() + "\n", end="", flush=True)
    speeds = measured(findings)
    findings += attempt("measured speeds", lambda: save(speeds, hardware.machine_file()), CACHE)
    counts = {word: sum(f.status == word for f in findings) for word in (PROBLEM, WARNING, OK)}
    code = max(finding.code for finding in findings)
    if options.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"code": code, "cards": speeds, "findings": rows}, indent=1))
    else:
        print(findings[-1].line())
        print(f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} fine")
    return code


def examine(options: Options) -> Iterator[Finding]:
    """Do every check.

    Args:
        options: of the command line.

    Yields:
        The findings, as they are made.
    """
    checks = {"packages": packages, "host": host}
    if not options.quick:
        checks["disk of cache"] = lambda: disk("cache", hardware.machine_file().parent, CACHE)
        elsewhere = "choose another with --output_dir DIR"
        checks["disk of output"] = lambda: disk("output", Path(options.output_dir), elsewhere)
    for name, check in checks.items():
        yield from attempt(name, check, "see the message", ENVIRONMENT * (name == "packages"))
    try:
        num_gpus = hardware.count_gpus(os.environ)
    except UserError as error:
        yield Finding(error.got, error.rule, error.remedy, PROBLEM, error.code)
        return
    if not num_gpus:
        yield Finding("GPUs", "none: ranks compute on the CPU")
    elif options.quick:
        yield from run_ranks("cuda", num_gpus, ("device",), os.environ)
    else:
        yield from gpus(num_gpus, os.environ)
    if not options.quick:
        tasks = ("4-bit", *TOGETHER) if num_gpus else ON_CPU
        for finding in run_ranks("cpu", NUM_CPU_RANKS, tasks, os.environ):
            if num_gpus:  # nothing depends on it, and the CPU is measured as a whole or not at all
                finding = dataclasses.replace(finding, code=DONE, device="", speeds={})
            yield finding


def gpus(num_gpus: int, env: Mapping[str, str]) -> Iterator[Finding]:
    """Check the GPUs, and where they fail together, whether they work without peer access.

    Args:
        num_gpus: of this machine.
        env: environment of the ranks.

    Yields:
        The findings.
    """
    findings = run_ranks("cuda", num_gpus, ON_GPUS, env)
    yield from findings
    names = (f"{num_gpus} GPUs", *(f"GPU {i} {task}" for i in range(num_gpus) for task in TOGETHER))
    has_failed = any(f.status == PROBLEM and f.name.startswith(names) for f in findings)
    if num_gpus == 1 or not has_failed or env.get("NCCL_P2P_DISABLE", "0") != "0":
        return
    again = run_ranks("cuda", num_gpus, TOGETHER, {**env, "NCCL_P2P_DISABLE": "1"})
    if any(finding.status == PROBLEM for finding in again):
        value = "the same with NCCL_P2P_DISABLE=1: peer access is not the cause"
        yield Finding("without peer access", value, "try CUDA_VISIBLE_DEVICES=0", WARNING)
    else:
        yield from again
        value = "with NCCL_P2P_DISABLE=1 the GPUs work together"
        yield Finding("without peer access", value, "export NCCL_P2P_DISABLE=1", WARNING)


def measured(findings: Iterable[Finding]) -> dict[str, dict[str, float]]:
    """Collect speeds; of several devices of one name the slowest counts.

    Args:
        findings: of all ranks.

    Returns:
        As hardware.machine_file has it: device -> speeds.
    """
    table: dict[str, dict[str, float]] = {}
    for finding in findings:
        row = table.setdefault(finding.device, {}) if finding.device else {}
        for key, value in finding.speeds.items():
            rounded = float(f"{value:.4g}")
            row[key] = min(row.get(key, rounded), rounded)
    return table


def save(table: Mapping[str, Mapping[str, float]], path: Path) -> Iterator[Finding]:
    """Write speeds where `plan` finds them; devices of other machines stay in the file.

    Args:
        table: see `measured`.
        path: of hardware.machine_file.

    Raises:
        OSError: the file cannot be written.
    """
    known, value = {}, f"of {', '.join(table)} are in {path}, where plan finds them"
    with suppress(FileNotFoundError):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["cards"]
            hardware.with_measured([], path, None)
        except (ValueError, TypeError, KeyError, UserError):
            known, value = {}, f"{value} (the old file was unreadable)"
    if table:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {device: {**known.get(device, {}), **speeds} for device, speeds in table.items()}
        atomic.write_json(path, {"cards": {**known, **rows}})
    yield Finding("measured speeds", value if table else f"none; {path} is left as it is")


def attempt(
    name: str, check: Callable[[], Iterable[Finding]], remedy: str, code: int = DONE
) -> list[Finding]:
    """Run a check whose failure is a finding too, so that it never hides the others.

    Args:
        name: of the finding, should the check fail.
        check: gives findings; those before its failure count.
        remedy: what to do about an error that does not say so itself.
        code: exit code of the command for such an error.
    """
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except UserError as error:
        value = f"{error.got}: {error.rule}"
        findings.append(Finding(name, value, error.remedy, PROBLEM, error.code))
    except Exception as error:  # whatever is broken here
        findings.append(Finding(name, _first_line(error), remedy, PROBLEM, code))
    return findings


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def packages() -> Iterator[Finding]:
    """Whether the packages are there, in the wanted ranges, and agree with one another."""
    from packaging.requirements import Requirement

    versions = {"python": platform.python_version()}
    for need in map(Requirement, _requirements()):
        found = _version(need.name)
        if need.marker is not None and (need.name not in OPTIONAL or found is None):
            continue
        if found is not None:
            versions[need.name] = found
        if found is None or not need.specifier.contains(found, prereleases=True):
            value, remedy = f"{found or 'not installed'}; want {need.specifier}", _install(need)
            code = ENVIRONMENT if need.marker is None else DONE
            yield Finding(need.name, value, remedy, PROBLEM, code)
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in versions]
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if absent:
        yield Finding("packages", f"optional, not installed: {', '.join(absent)}")
    for name in versions.keys() - {"python"}:
        for need in map(Requirement, metadata.requires(name) or []):
            found = _version(need.name)
            is_wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if is_wanted and not (found and need.specifier.contains(found, prereleases=True)):
                value = f"wants {need.name}{need.specifier}, found {found or 'none'}"
                yield Finding(name, value, _install(need), WARNING)


def _requirements() -> list[str]:
    """Of pyproject.toml, or of the installed package; those of extras end in a marker."""
    path = PROJECT_DIR / "pyproject.toml"
    if not path.is_file():
        return metadata.requires("fsdp_qlora") or []
    table = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {}).items()
    marked = [f"{text}; extra == '{name}'" for name, texts in extras for text in texts]
    return [*table["dependencies"], *marked]


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _install(need: Any) -> str:
    return f"pip install '{need.name}{need.specifier}'"


def host() -> Iterator[Finding]:
    """Host memory within the container's limit, /dev/shm, and other programs at work."""
    limit_gib, used_gib = hardware.host_limit_gib() or 0.0, hardware.host_used_gib() or 0.0
    value = f"{limit_gib:.1f} GiB, {limit_gib - used_gib:.1f} free"
    remedy = "end other programs, or raise the container's limit: an offloaded 7B takes 7 GiB"
    yield limited("host memory", value, remedy, limit_gib - used_gib < LEAST_HOST_GIB)
    is_there = Path("/dev/shm").is_dir()
    shm_gib = shutil.disk_usage("/dev/shm").total / GIB if is_there else 0.0
    remedy = "docker run --shm-size=8g: GPUs without peer access communicate through it"
    yield limited("/dev/shm", f"{shm_gib:.2f} GiB", remedy, shm_gib < LEAST_SHM_GIB)
    load, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    remedy = "speeds may be low: end them and measure again"
    value = f"{load:.1f} programs at work on {num_cores} cores"
    yield limited("load", value, remedy, load > num_cores / 2)


def limited(name: str, value: str, remedy: str, is_bad: bool) -> Finding:
    """A warning where something is bad, else OK."""
    return Finding(name, value, remedy, WARNING) if is_bad else Finding(name, value)


def disk(name: str, wanted: Path, elsewhere: str) -> Iterator[Finding]:
    """Write a file, read it back from the disk, and compare; nothing is left behind.

    Args:
        name: what lies there.
        wanted: a directory, which may not exist yet.
        elsewhere: how to choose another one.
    """
    name, place = f"disk of {name}", wanted.expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    free_gib, block = shutil.disk_usage(place).free / GIB, os.urandom(DISK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began_s = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            write_mbs = DISK_BYTES / (time.perf_counter() - began_s) / 1e6
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began_s = time.perf_counter()
            is_same = file.read() == block
            read_mbs = DISK_BYTES / (time.perf_counter() - began_s) / 1e6
    except OSError as error:
        yield Finding(name, f"{wanted}: {error.strerror}", elsewhere, PROBLEM)
        return
    value = (
        f"{wanted}: writes {write_mbs:,.0f} MB/s, reads {read_mbs:,.0f}, {free_gib:.0f} GiB free"
    )
    if not is_same:
        value = f"{wanted}: what was written is not what was read"
        yield Finding(name, value, f"check the disk, {elsewhere}", PROBLEM, INTEGRITY)
    else:
        is_bad = min(write_mbs, read_mbs) < SLOW_MBS or free_gib < LEAST_DISK_GIB
        remedy = f"loading a 7B reads 13 GB, its 4-bit base takes 4 GiB: {elsewhere}"
        yield limited(name, value, remedy, is_bad)


def run_ranks(
    kind: str,
    size: int,
    tasks: Sequence[str],
    env: Mapping[str, str],
    timeout_s: float = 180.0,
    flip: tuple[int, int] | None = None,
) -> list[Finding]:
    """Start ranks that do tasks; one that crashes or hangs is a finding.

    Args:
        kind: "cuda", a GPU each, or "cpu".
        size: number of ranks.
        tasks: keys of TASKS, in order.
        env: environment of the ranks.
        timeout_s: for all tasks.
        flip: see Rank.

    Returns:
        The findings of all ranks in the order of the tasks, equal ones once.
    """
    found = [str(PROJECT_DIR), *filter(None, [env.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(reversed(found))}
    own |= {} if kind == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    findings: list[tuple[int, Finding]] = []
    with tempfile.TemporaryDirectory(prefix="fsdp_qlora-doctor-") as place, ExitStack() as stack:
        port, ranks = find_port(None), []
        job = json.dumps({"place": place, "kind": kind, "tasks": tasks, "flip": flip})
        command = [sys.executable, "-m", "fsdp_qlora.doctor.ranks", job]
        for number in range(size):
            rank_env = child_env({**env, **own}, number, size, port)
            log = Path(place, f"{number}.log")
            ranks.append(supervise.start(RankSpec(number, command, rank_env, log, ())))
            stack.callback(_kill, ranks[-1])
        deadline_s, has_crashed = time.monotonic() + timeout_s, False
        while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline_s:
            if any(codes) and not has_crashed:  # the others wait for it in vain
                has_crashed, deadline_s = True, min(deadline_s, time.monotonic() + GRACE_S)
            time.sleep(0.05)
        for number, rank in enumerate(ranks):
            findings += _collect(Path(place, str(number)), rank.poll(), kind, tasks)
    findings.sort(key=lambda entry: entry[0])
    return list({finding.line(): finding for _, finding in findings}.values())


def _kill(rank: supervise.Rank) -> None:
    with suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _collect(
    path: Path, code: int | None, kind: str, tasks: Sequence[str]
) -> list[tuple[int, Finding]]:
    """(index of the task, finding) of a rank, and what ended it before its time."""
    findings: list[tuple[int, Finding]] = []
    index: int | None = -1
    rows = path.with_suffix(".jsonl")
    for line in rows.read_text().splitlines() if rows.exists() else ():
        row: dict[str, Any] = {}
        with suppress(ValueError):  # cut off by a crash
            row = json.loads(line)
        if "begins" in row:
            index = row["begins"]
        elif row and index is not None:
            findings.append((index, Finding(**row)))
    if index is None:
        return findings
    log = path.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    value = "no answer in time" if code is None else f"ended with code {code}"
    value = f"ended by {signal.Signals(-code).name}" if code and code < 0 else value
    value += f" ({log[-1][:160]})" if log else ""
    value += f"; not checked: {', '.join(tasks[index + 1 :])}" if tasks[index + 1 :] else ""
    remedy = "export NCCL_P2P_DISABLE=1, or see the driver's log (dmesg)"
    if index < 0:
        remedy = "see pytorch.org for a build that runs here"
    who = f"{'GPU' if kind == 'cuda' else 'CPU rank'} {path.name}"
    name = f"{who} {tasks[index] if index >= 0 else 'start'}"
    return [*findings, (index, Finding(name, value, remedy, PROBLEM, ENVIRONMENT))]
