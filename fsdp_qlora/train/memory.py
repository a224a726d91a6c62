"""Where the GiB are: device and host memory of this process, and the memory of its machine.

All sizes are GiB (1024**3 bytes). Everything that is read at each step costs well under a
millisecond; what is slow (PSS) or must be watched between steps (the machine's peak) is read by
`HostSampler` in the background.
"""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import torch

from fsdp_qlora.hardware import GIB as GIB
from fsdp_qlora.hardware import Cgroup as Cgroup
from fsdp_qlora.hardware import find_cgroup as find_cgroup
from fsdp_qlora.hardware import read_kib as read_kib

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
PROCESS_KEYS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")  # of /proc/self/status
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


@dataclass(frozen=True)
class Peak:
    """What was held in one phase, GiB; of a CPU rank what its process has for itself alone.

    Attributes:
        allocated_gib: the most that tensors took.
        reserved_gib: the most that torch's allocator held; on a CPU the same as allocated.
        left_gib: what tensors took at its end.
    """

    allocated_gib: float = 0.0
    reserved_gib: float = 0.0
    left_gib: float = 0.0

    def highest(self, other: "Peak") -> "Peak":
        """The higher figures of two."""
        return Peak(
            max(self.allocated_gib, other.allocated_gib),
            max(self.reserved_gib, other.reserved_gib),
            max(self.left_gib, other.left_gib),
        )


class PhasePeaks:
    """The most that was held in each phase, from mark to mark, exactly: nothing is sampled.

    Attributes:
        marks: the phases that have ended since the last `take`.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin the first phase.

        Args:
            device: of this rank; of a CPU rank the process's own memory is watched.
        """
        self.marks: list[str] = []
        self._device = device
        self._peaks: dict[str, Peak] = {}
        self._read()

    def mark(self, phase: str) -> None:
        """End `phase`: what was held since the last mark belongs to it."""
        peak = self._read()
        self.marks.append(phase)
        self._peaks[phase] = peak.highest(self._peaks.get(phase, peak))

    def take(self) -> dict[str, Peak]:
        """The peaks by phase since the last call."""
        peaks, self._peaks = self._peaks, {}
        self.marks.clear()
        return peaks

    def now(self) -> Peak:
        """Of the phase that has not ended; a peak that is read here is not in its mark."""
        return self._read()

    def _read(self) -> Peak:
        if self._device.type != "cuda":
            return process_peak()
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        if "allocated_bytes" not in stats:  # nothing was allocated yet
            return Peak()
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        return Peak(allocated["peak"] / GIB, reserved["peak"] / GIB, allocated["current"] / GIB)


def process_peak(proc: Path = Path("/proc/self")) -> Peak:
    """Of this process's own pages since the last call, libraries and shared memory left out."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return Peak()
    words = {line.partition(":")[0]: line.split() for line in lines if line.endswith("kB")}
    kib = {name: int(words[name][1]) for name in PROCESS_KEYS if name in words}
    if len(kib) < len(PROCESS_KEYS):  # old kernels do not tell pages of files from others
        return Peak()
    shared = kib["RssFile"] + kib["RssShmem"]
    peak = kib["VmHWM"] - shared
    try:
        (proc / "clear_refs").write_text("5")  # the highest mark starts anew
    except OSError:
        peak = kib["RssAnon"]
    peak_gib = max(peak, kib["RssAnon"]) / 1024**2
    return Peak(peak_gib, peak_gib, kib["RssAnon"] / 1024**2)


def pinned_gib(device: torch.device) -> float:
    """GiB of page-locked host memory that torch's own pinned allocator holds in this process."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB


def pss_gib(proc: Path = Path("/proc/self")) -> float:
    """Proportional set size of this process in GiB: pages shared by N processes count 1/N.

    The sum over ranks is what the run really holds. The kernel walks every page for it (tenths of
    a second for tens of GiB), so it does not belong in a step: see HostSampler.
    """
    return read_kib(proc / "smaps_rollup", "Pss") * 1024 / GIB


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
