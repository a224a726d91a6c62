"""Memory of this machine as the kernel tells it: control groups, limits, whom it killed."""

import re
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


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


@dataclass(frozen=True)
class Cgroup:
    """The control group that bounds this process (a container, a Slurm job), v1 or v2.

    Attributes:
        limit_gib: the tightest limit from the group up to the root; None when there is none.
        used_path: file with the bytes the group uses, page cache included; None when not found.
        stat_path: file with the page cache among them.
        events_path: file that counts the processes killed for want of memory.
    """

    limit_gib: float | None = None
    used_path: Path | None = None
    stat_path: Path | None = None
    events_path: Path | None = None

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
    for controllers, mount, limit_name, used_name, events_name in (
        (
            *("memory", root / "memory", "memory.limit_in_bytes"),
            *("memory.usage_in_bytes", "memory.oom_control"),
        ),
        ("", root, "memory.max", "memory.current", "memory.events"),
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
            place = used[0]
            files = (place / used_name, place / "memory.stat", place / events_name)
            return Cgroup(limit_gib, *files)
    return Cgroup()


def read_limit_gib(path: Path) -> float | None:
    """A control group's limit in GiB; None for "max", v1's huge number, or a missing file."""
    try:
        limit = path.read_text().strip()
    except OSError:
        return None
    is_limit = limit.isdigit() and int(limit) < 2**60
    return int(limit) / GIB if is_limit else None


def oom_kills(cgroup: Cgroup, vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has killed because memory ran out.

    Args:
        cgroup: whose processes count; those of the whole machine where it does not say.
        vmstat: the machine's counters.

    Returns:
        Their number since the group, or the machine, began; 0 where nobody counts.
    """
    for path in (cgroup.events_path, vmstat):
        try:
            text = path.read_text() if path else ""
        except OSError:
            continue
        found = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
        if found:
            return int(found[1])
    return 0


def limit_gib(cgroup: Cgroup | None = None) -> float | None:
    """GiB that this process and all others here may use together.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        Memory of the machine, or the tighter limit of the control group; None: not known.
    """
    cgroup = find_cgroup() if cgroup is None else cgroup
    total_gib = read_kib(Path("/proc/meminfo"), "MemTotal") / 1024**2
    limits = [limit for limit in (total_gib, cgroup.limit_gib) if limit]
    return min(limits, default=None)


def used_gib(cgroup: Cgroup | None = None) -> float | None:
    """GiB that are in use now, page cache left out, where `limit_gib` is the limit.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        Of the machine, or of the control group if that has the tighter limit; None: not known.
    """
    cgroup = find_cgroup() if cgroup is None else cgroup
    meminfo = Path("/proc/meminfo")
    total_kib, free_kib = (read_kib(meminfo, key) for key in ("MemTotal", "MemAvailable"))
    if cgroup.limit_gib is not None and cgroup.limit_gib < total_kib / 1024**2:
        return cgroup.used_gib()
    return (total_kib - free_kib) / 1024**2 if total_kib else None
