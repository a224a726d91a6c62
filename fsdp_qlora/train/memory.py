"""Where the GiB are: device and host memory of this process, and the memory of its machine.

All sizes are GiB (1024**3 bytes). Everything that is read at each step costs well under a
millisecond; what is slow (PSS) or must be watched between steps (the machine's peak) is read by
`HostSampler` in the background.
"""

import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import torch

GIB = 1024**3

DEVICE_FIELDS = (
    "device_allocated_gib",
    "device_reserved_gib",
    "device_peak_allocated_gib",
    "device_peak_reserved_gib",
    "device_used_gib",
    "device_total_gib",
)
PROCESS_FIELDS = (
    *DEVICE_FIELDS,
    "host_rss_gib",
    "host_pss_gib",
    "host_pinned_gib",
    "host_swap_gib",
)
MACHINE_FIELDS = (
    "host_total_gib",
    "host_available_gib",
    "host_used_gib",
    "cgroup_limit_gib",
    "cgroup_used_gib",
)


def device_memory(device: torch.device) -> dict[str, float]:
    """Device memory of this process since the last call, and start the next peak.

    Args:
        device: the card of this rank; a CPU device has no memory of its own.

    Returns:
        DEVICE_FIELDS in GiB: what torch's allocator holds now (allocated, reserved), its peaks
        since the last call, and the whole card as the driver sees it (used by every process,
        total). Zeros on a CPU.
    """
    if device.type != "cuda":
        return dict.fromkeys(DEVICE_FIELDS, 0.0)
    stats = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    sizes_bytes = (
        stats.get("allocated_bytes.all.current", 0),
        stats.get("reserved_bytes.all.current", 0),
        stats.get("allocated_bytes.all.peak", 0),
        stats.get("reserved_bytes.all.peak", 0),
        total_bytes - free_bytes,
        total_bytes,
    )
    return {name: size / GIB for name, size in zip(DEVICE_FIELDS, sizes_bytes, strict=True)}


def pinned_gib(device: torch.device) -> float:
    """GiB of page-locked host memory that torch's own pinned allocator holds in this process."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB


def read_kib(path: Path, key: str) -> int:
    """The value of one `Key:  N kB` line of a /proc file.

    Args:
        path: file such as /proc/self/status or /proc/self/smaps_rollup.
        key: the word before the colon.

    Returns:
        N in KiB; 0 where the file or the line is missing (other systems, old kernels).
    """
    try:
        text = path.read_text()
    except OSError:
        return 0
    found = re.search(rf"^{re.escape(key)}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def pss_gib(proc: Path = Path("/proc/self")) -> float:
    """Proportional set size of this process in GiB: pages shared by N processes count 1/N.

    The sum over ranks is what the run really holds. The kernel walks every page for it (tenths of
    a second for tens of GiB), so it does not belong in a step: see HostSampler.
    """
    return read_kib(proc / "smaps_rollup", "Pss") * 1024 / GIB


@dataclass(frozen=True)
class Cgroup:
    """The control group that bounds this process (a container, a Slurm job), v1 or v2.

    Attributes:
        limit_gib: the tightest limit from the group up to the root; None when there is none.
        used_path: file with the bytes the group uses, page cache included; None when not found.
        stat_path: file with the page cache among them.
    """

    limit_gib: float | None = None
    used_path: Path | None = None
    stat_path: Path | None = None

    def used_gib(self) -> float | None:
        """GiB in use less the page cache that the kernel would drop first; None without a group."""
        if self.used_path is None or self.stat_path is None:
            return None
        try:
            used_bytes = int(self.used_path.read_text())
            stat = self.stat_path.read_text()
        except (OSError, ValueError):
            return None
        cache = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
        return max(0, used_bytes - (int(cache[1]) if cache else 0)) / GIB


def find_cgroup(proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> Cgroup:
    """Find the memory control group of this process.

    Inside a container the group's own path is often not mounted: then the nearest parent that is
    speaks for it, at last the root of the mount.

    Args:
        proc: the process's directory under /proc.
        root: where control groups are mounted.

    Returns:
        The group, or an empty Cgroup on systems without one.
    """
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return Cgroup()
    rows = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for controllers, mount, limit_name, used_name in (
        ("memory", root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("", root, "memory.max", "memory.current"),
    ):
        paths = [path for _, names, path in rows if controllers in names.split(",")]
        if not paths:
            continue
        group = mount / paths[0].strip("/")
        groups = [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]
        used = [place for place in groups if (place / used_name).is_file()]
        limits = [read_limit_gib(place / limit_name) for place in groups]
        if used:
            limit_gib = min((limit for limit in limits if limit is not None), default=None)
            return Cgroup(limit_gib, used[0] / used_name, used[0] / "memory.stat")
    return Cgroup()


def read_limit_gib(path: Path) -> float | None:
    """A control group's limit in GiB; None for "max", v1's huge number, or a missing file."""
    try:
        limit = path.read_text().strip()
    except OSError:
        return None
    is_limit = limit.isdigit() and int(limit) < 2**60
    return int(limit) / GIB if is_limit else None


def machine_memory(cgroup: Cgroup | None = None) -> dict[str, float | None]:
    """Memory of the machine, all processes together.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        MACHINE_FIELDS in GiB; used = total - available, so shared memory and pinned pages count
        and page cache does not. The cgroup fields are None where there is no limit.
    """
    cgroup = find_cgroup() if cgroup is None else cgroup
    machine = psutil.virtual_memory()
    total_gib, available_gib = machine.total / GIB, machine.available / GIB
    sizes = (
        total_gib,
        available_gib,
        total_gib - available_gib,
        cgroup.limit_gib,
        cgroup.used_gib(),
    )
    return dict(zip(MACHINE_FIELDS, sizes, strict=True))


def process_memory(device: torch.device, sampler: "HostSampler | None" = None) -> dict[str, float]:
    """Device and host memory of this process; starts the next device peak.

    Args:
        device: the device of this rank.
        sampler: where PSS was measured last; without one it is measured now (slow).

    Returns:
        PROCESS_FIELDS in GiB.
    """
    return {
        **device_memory(device),
        "host_rss_gib": psutil.Process().memory_info().rss / GIB,
        "host_pss_gib": pss_gib() if sampler is None else sampler.pss_gib,
        "host_pinned_gib": pinned_gib(device),
        "host_swap_gib": read_kib(Path("/proc/self/status"), "VmSwap") * 1024 / GIB,
    }


def memory_now(device: torch.device) -> dict[str, float | None]:
    """PROCESS_FIELDS and MACHINE_FIELDS in GiB, all measured now; starts the next device peak."""
    return {**process_memory(device), **machine_memory()}


@dataclass
class HostSampler:
    """Watches host memory from a thread: this process's PSS, and the machine's peak use.

    Use as a context manager, around the load and around the training, so that no peak between
    two steps is missed.

    Attributes:
        interval_s: seconds between two looks at the machine.
        pss_share: most of the time that measuring PSS may take, as a share of one core.
        pss_gib: PSS of this process when it was measured last.
        peak_used_gib: the most host memory that all processes used together since the start.
    """

    interval_s: float = 0.5
    pss_share: float = 0.005
    pss_gib: float = 0.0
    peak_used_gib: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _next_pss_s: float = 0.0

    def __enter__(self) -> "HostSampler":
        """Take the first sample, then go on in the background."""
        self.sample()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the last sample and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._next_pss_s = 0.0
        self.sample()

    def sample(self) -> None:
        """Look once: the machine always, PSS when its share of the time allows it."""
        machine = psutil.virtual_memory()
        self.peak_used_gib = max(self.peak_used_gib, (machine.total - machine.available) / GIB)
        began_s = time.monotonic()
        if began_s < self._next_pss_s:
            return
        self.pss_gib = pss_gib()
        ended_s = time.monotonic()
        self._next_pss_s = ended_s + max(4.0, (ended_s - began_s) / self.pss_share)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.sample()
