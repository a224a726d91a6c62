"""What `doctor` looks at without a card: packages, memory, disk, hub."""

import contextlib
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fsdp_qlora import hardware
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY
from fsdp_qlora.hardware import find_cgroup
from fsdp_qlora.train.doctor.findings import Finding, ok, problem, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GIB, MIB = 2**30, 2**20
PACKAGE = "fsdp_qlora"
NEWEST_PYTHON = (3, 13)
OPTIONAL = {
    "hqq": "--train_type hqq_lora",
    "flash-attn": "faster attention on cards",
    "liger-kernel": "faster norms on cards",
    "datasets": "data sets of the hub",
}
LEAST_FREE_GIB = 4
LEAST_DISK_GIB = 5
LEAST_SHM_GIB = 1
BUSY_SHARE = 0.5
DISK_BYTES = 256 * MIB
BLOCK_BYTES = 8 * MIB
DISK_S = 4.0
SLOW_MBS = 100
HUB = "https://huggingface.co"
HUB_S = 3.0
YES = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Check:
    """A check of the host.

    Attributes:
        name: of its finding when it fails.
        look: gives findings.
        code: exit code when it cannot be done.
    """

    name: str
    look: Callable[[], Iterator[Finding]]
    code: int = 0


def checks(output_dir: Path, num_cards: int, is_quick: bool) -> list[Check]:
    """What is looked at, in order.

    Args:
        output_dir: of the runs to come.
        num_cards: of this machine.
        is_quick: leave out what is measured.
    """
    every = [
        Check("python", python, ENVIRONMENT),
        Check("packages", packages, ENVIRONMENT),
        Check("host memory", memory),
        Check("limits", lambda: limits(num_cards)),
        Check("hub", hub),
    ]
    return (
        every
        if is_quick
        else [*every, Check("disk", lambda: disks(output_dir)), Check("load", load)]
    )


def python() -> Iterator[Finding]:
    """The version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        yield warning("python", f"{version} is newer than what is tested", f"use 3.11 to {newest}")
    else:
        yield ok("python", version)


def requirements() -> list[str]:
    """What the project needs, as its pyproject.toml has it, or the metadata of its installation.

    Returns:
        Requirements such as "torch>=2.11"; those of extras end in a marker.
    """
    path = PROJECT_DIR / "pyproject.toml"
    if not path.is_file():
        return metadata.requires(PACKAGE) or []
    table = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {})
    marked = [f"{text}; extra == '{name}'" for name, texts in extras.items() for text in texts]
    return [*table["dependencies"], *marked]


def packages() -> Iterator[Finding]:
    """Whether the packages are there, in the range that is wanted, and agree with one another."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requirements()]
    found: dict[str, str] = {}
    for need in wanted:
        is_extra = need.marker is not None
        if is_extra and need.name not in OPTIONAL:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[need.name] = metadata.version(need.name)
        yield from _out_of_range(need, found.get(need.name), is_extra)
    yield ok("packages", ", ".join(f"{name} {version}" for name, version in found.items()))
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in found]
    if absent:
        yield ok("packages", f"optional, not installed: {', '.join(absent)}")
    for name in found:
        yield from _disagreements(name)


def _out_of_range(need: "Requirement", version: str | None, is_extra: bool) -> Iterator[Finding]:
    """Whether a package is there, unless it may be absent, and in the wanted range."""
    remedy, code = f"pip install '{need.name}{need.specifier}'", 0 if is_extra else ENVIRONMENT
    if version is None and not is_extra:
        yield problem(need.name, f"not installed; want {need.specifier}", remedy, code)
    elif version is not None and not need.specifier.contains(version, prereleases=True):
        yield problem(need.name, f"{version}; want {need.specifier}", remedy, code)


def _disagreements(name: str) -> Iterator[Finding]:
    """What a package itself needs, and is absent or of another version."""
    from packaging.requirements import Requirement

    for need in map(Requirement, metadata.requires(name) or []):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            value = f"wants {need.name}{need.specifier}, found {version or 'none'}"
            yield warning(name, value, f"pip install '{need.name}{need.specifier}'")


def memory() -> Iterator[Finding]:
    """Memory of the machine, limit of the container, swap."""
    import psutil

    now, cgroup = psutil.virtual_memory(), find_cgroup()
    free_gib = now.available / GIB
    value = f"{now.total / GIB:.1f} GiB, {free_gib:.1f} free"
    if cgroup.limit_gib is not None:
        used_gib = cgroup.used_gib() or 0.0
        free_gib = min(free_gib, cgroup.limit_gib - used_gib)
        value += f"; the container may use {cgroup.limit_gib:.1f}, uses {used_gib:.1f}"
    if free_gib < LEAST_FREE_GIB:
        remedy = "end other programs, or raise the container's limit"
        yield warning("host memory", value, f"{remedy}: an offloaded 7B takes about 7 GiB")
    else:
        yield ok("host memory", value)
    swap = psutil.swap_memory()
    value = f"{swap.total / GIB:.1f} GiB, {swap.used / GIB:.1f} in use" if swap.total else "none"
    if swap.used > max(GIB, swap.total / 4):
        yield warning("swap", value, "end other programs: what is swapped out slows every step")
    else:
        yield ok("swap", value)


def limits(num_cards: int) -> Iterator[Finding]:
    """Locked memory a process may have, and the size of /dev/shm.

    Args:
        num_cards: of this machine.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft / MIB:,.0f} MiB"
    yield ok("memlock", value + ("" if num_cards else " (no card: nothing is pinned)"))
    path = Path("/dev/shm")
    if not path.is_dir():
        yield warning("/dev/shm", "is not there", "mount a tmpfs on it: NCCL and workers use it")
        return
    total_gib = shutil.disk_usage(path).total / GIB
    if total_gib < LEAST_SHM_GIB and num_cards > 1:
        remedy = "docker run --shm-size=8g: cards without peer access talk through it"
        yield warning("/dev/shm", f"{total_gib:.2f} GiB", remedy)
    else:
        yield ok("/dev/shm", f"{total_gib:.2f} GiB")


def load() -> Iterator[Finding]:
    """Whether other programs are at work, which makes all figures smaller."""
    busy, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    value = f"{busy:.1f} programs at work on {num_cores} cores"
    if busy > BUSY_SHARE * num_cores:
        yield warning("load", value, "figures may be low: end them and measure again")
    else:
        yield ok("load", value)


def hub() -> Iterator[Finding]:
    """Whether the Hugging Face hub answers; without it local models and data do."""
    from huggingface_hub import get_token

    token = "a token is set" if get_token() else "no token (gated models such as Llama need one)"
    local = "local models and data only"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in YES:
        yield ok("hub", f"offline by HF_HUB_OFFLINE: {local}; {token}")
        return
    address = os.environ.get("HF_ENDPOINT", "") or HUB
    answers: list[str] = []  # name look-ups know no time limit: a thread that may stay behind
    thread = threading.Thread(target=lambda: answers.append(_head(address)), daemon=True)
    thread.start()
    thread.join(HUB_S + 0.5)
    place, answer = urlsplit(address).hostname or "the hub", (answers or ["no answer in time"])[0]
    is_there = answer.startswith("answers")
    yield ok("hub", f"{place} {answer}{'' if is_there else f': {local}'}; {token}")


def _head(address: str) -> str:
    """Ask for a page; an error of the server is an answer, too."""
    began_s = time.monotonic()
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_S) as reply:
            status = reply.status
    except urllib.error.HTTPError as error:
        status = error.code
    except Exception as error:  # addresses may hold a password: no more of the error than its kind
        reason = getattr(error, "reason", None)
        return f"cannot be reached ({type(reason if reason else error).__name__})"
    seconds = time.monotonic() - began_s
    return f"answers in {seconds:.2f} s" + (f" with {status}" if status >= 400 else "")


def disks(output_dir: Path) -> Iterator[Finding]:
    """Room and speed of the disks of the caches and of the output.

    Args:
        output_dir: of the runs to come.
    """
    caches = ("cache", hardware.machine_file().parent, "FSDP_QLORA_CACHE=DIR")
    outputs = ("output", output_dir, "--output_dir DIR")
    seen: dict[int, str] = {}
    for name, wanted, option in (caches, outputs):
        place = wanted.expanduser().absolute()
        while not place.is_dir():
            place = place.parent
        device = place.stat().st_dev
        if device in seen and os.access(place, os.W_OK):
            yield ok(f"disk of {name}", f"{wanted}: that of the {seen[device]}")
            continue
        seen[device] = name
        yield disk(f"disk of {name}", wanted, place, option)


def disk(name: str, wanted: Path, place: Path, option: str) -> Finding:
    """Write a file, read it back from the disk, and compare; nothing is left behind.

    Args:
        name: of the finding.
        wanted: what the user knows.
        place: the directory to write to, which is there.
        option: how to choose another one.
    """
    elsewhere = f"choose another with {option}"
    free_gib = shutil.disk_usage(place).free / GIB
    try:
        write_s, read_s, nbytes = _write_and_read(place)
    except OSError as error:
        return problem(name, f"{wanted}: {error.strerror}, {free_gib:.1f} GiB free", elsewhere)
    if not read_s:
        value = f"{wanted}: what was written is not what was read"
        return problem(name, value, f"check the disk, {elsewhere}", INTEGRITY)
    write_mbs, read_mbs = nbytes / write_s / 1e6, nbytes / read_s / 1e6
    value = (
        f"{wanted}: writes {write_mbs:,.0f} MB/s, reads {read_mbs:,.0f}, {free_gib:.0f} GiB free"
    )
    if min(write_mbs, read_mbs) < SLOW_MBS:
        return warning(name, value, f"slow: loading a 7B reads 13 GB; {elsewhere}")
    if free_gib < LEAST_DISK_GIB:
        return warning(name, value, f"a 7B in 4 bit takes 4 GiB: make room, or {elsewhere}")
    return ok(name, value)


def _write_and_read(place: Path) -> tuple[float, float, int]:
    """(seconds of writing, of reading or 0 when the bytes differ, bytes); stops when it is slow."""
    block, num = os.urandom(BLOCK_BYTES), 0
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        began_s = time.perf_counter()
        while num * BLOCK_BYTES < DISK_BYTES and time.perf_counter() < began_s + DISK_S:
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
            num += 1
        os.fsync(file.fileno())
        write_s = time.perf_counter() - began_s
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began_s = time.perf_counter()
        is_same = all(_read(file, BLOCK_BYTES) == block for _ in range(num))
        read_s = time.perf_counter() - began_s
    return write_s, read_s if is_same else 0.0, num * BLOCK_BYTES


def _read(file, nbytes: int) -> bytes:
    parts = []
    while nbytes and (part := file.read(nbytes)):
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
