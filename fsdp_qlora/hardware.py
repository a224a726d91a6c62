"""What this machine has: GPUs with their speeds, host memory and the limits on it. No torch."""

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from fsdp_qlora.atomic import GIB, cache_dir
from fsdp_qlora.errors import ENVIRONMENT, UserError, one_line_of

if TYPE_CHECKING:
    import torch

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU, or the share of the processor that a CPU rank has.

    Attributes:
        name: as in GPUS, or as the driver calls it.
        memory_gib: that torch can use; inf where the driver does not report it.
        bf16_tflops: sustained over a whole training step, well below the data sheet.
        memory_gbs: bandwidth of its memory, GB/s.
        host_link_gbs: from the host, GB/s, all GPUs at once.
        peer_gbs: from another GPU, GB/s; 0: through the host.
        is_measured: the speeds are from `machine_file`.
        measured_gains: which gains are too, blanks between them.
        has_bf16: matmuls of bfloat16 run on its tensor cores.
        network_gbs: from its machine to another, GB/s, all GPUs of the machine together.
        dense_tflops: of its data sheet.
        disk_gbs: read from the disk of its machine, GB/s; an assumption where nobody measured it.
        fp8_gain, int8_gain, fp16_gain: see `gain`.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    memory_gbs: float
    host_link_gbs: float
    peer_gbs: float = 0.0
    is_measured: bool = False
    measured_gains: str = ""
    has_bf16: bool = True
    network_gbs: float = 1.25
    dense_tflops: float = 0.0
    fp8_gain: float = 0.0
    int8_gain: float = 0.0
    fp16_gain: float = 1.0
    disk_gbs: float = 1.5

    def gain(self, matmul: str) -> float:
        """How much faster large frozen matmuls are; 0: they do not run.

        Args:
            matmul: `--matmul`.
        """
        gain = getattr(self, f"{matmul}_gain", None)
        return 1.0 if gain is None else gain * self.has_bf16

    def known_gain(self, matmul: str) -> float:
        """The same, 0 where it is a prediction; those of fp8 are not: H200s were measured."""
        is_known = matmul in ("bf16", "fp8") or f"{matmul}_gain" in self.measured_gains
        return self.gain(matmul) * is_known


GAINS = ("fp8_gain", "int8_gain", "fp16_gain")
_SERIES = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
GPUS = {
    name: Device(name, **{key: table[key] for key in GAINS if key in table} | row)
    for table in _SERIES.values()
    for name, row in table.items()
    if isinstance(row, dict)
}
_BY_SIZE = {int(size): name for size, name in _TABLE["by_size"].items()}
MIN_GB, MAX_GB = 4, 512
USABLE_OF_NOMINAL = 0.975  # of a GPU's nominal GB, as torch reports it
USABLE_OF_REPORTED = 0.985  # of what the driver reports
CPU = Device("CPU", 0.0, 0.1, 20, 20)  # two cores; SmolLM2-135M: 5.5 s a step of 1,024 tokens
ENTRY = re.compile(r"(?:(?P<count>\d{1,2})\s*x\s*)?(?P<name>[\w .-]+)", re.IGNORECASE)
SIZE = re.compile(r"(?:-(\d{1,3})|\b(\d{1,3}) ?gi?b?)\b")  # in a name: A100-80, 4060 Ti 16 GB
FIRST_WITH_BF16 = (8, 0)  # Ampere; torch emulates it on older GPUs, slowly and silently
SPEEDS, DRIVERS = _TABLE["speeds"], _TABLE["drivers"]
RANK_ENV: dict[str, str] = _TABLE["rank_env"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run may use: this machine, and others like it.

    Attributes:
        gpus: one entry a rank; none: CPU ranks.
        host_gib: of memory; None: not known, and then no limit.
        num_cpu_ranks: ranks of the machine where there is no GPU.
        system_gib: of host memory in use without the run; None: as measured elsewhere.
        cpu: speeds of a CPU rank.
        num_machines: how many there are.
    """

    gpus: tuple[Device, ...]
    host_gib: float | None = None
    num_cpu_ranks: int = 1
    system_gib: float | None = None
    cpu: Device = CPU
    num_machines: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the run, on all machines."""
        return (len(self.gpus) or self.num_cpu_ranks) * self.num_machines

    @property
    def kind(self) -> str:
        """Where the ranks compute: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"

    @property
    def tflops(self) -> float:
        """Of the slowest GPU, see Device.bf16_tflops; 0 without one."""
        return min((gpu.bf16_tflops for gpu in self.gpus), default=0.0)


@functools.cache
def own_cpu() -> Device:
    """A CPU rank of this machine, by the table.

    torch multiplies bfloat16 by oneDNN from AVX-512 or AVX-NE-CONVERT on, and on Arm by
    instructions of its own; elsewhere element by element: with AVX2 20 times slower than float32.
    """
    found = re.search(r"^(?:flags|Features)\s*:(.*)", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    has = set(found[1].split()).issuperset if found else lambda words: True
    return dataclasses.replace(CPU, has_bf16=any(map(has, _TABLE["cpu_bf16"])))


def least_of(machines: Sequence[Machine]) -> Machine:
    """What every one of several machines has at least.

    Args:
        machines: with as many GPUs each.
    """
    gpus = min((m.gpus for m in machines), key=lambda own: min(gpu.memory_gib for gpu in own))
    every = [gpu for machine in machines for gpu in machine.gpus]
    low = {name: min(getattr(gpu, name) for gpu in every) for name in ("has_bf16", *GAINS)}
    low["measured_gains"] = " ".join(n for n in GAINS if all(n in g.measured_gains for g in every))
    gpus = tuple(dataclasses.replace(gpu, **low) for gpu in gpus)
    hosts = [m.host_gib for m in machines if m.host_gib is not None]
    used = [m.system_gib for m in machines if m.system_gib is not None]
    host_gib, system_gib = min(hosts, default=None), max(used, default=None)
    return dataclasses.replace(machines[0], gpus=gpus, host_gib=host_gib, system_gib=system_gib)


def parse_gpus(text: str) -> list[Device]:
    """Read the GPUs of one machine.

    Args:
        text: "24", "2x24", "2x3090", "3090+4060Ti-16G", or "none" for CPU ranks.

    Returns:
        One entry a GPU, with the speeds of the table; none for "none".

    Raises:
        UserError: an unknown GPU.
    """
    if text.strip().lower() in ("none", "cpu"):
        return []
    gpus = []
    for entry in text.split("+"):
        match = ENTRY.fullmatch(entry.strip())
        if match is None or not 1 <= int(match["count"] or 1) <= 64:
            raise UserError(f"--gpus {text}", "is no list of GPUs", "write 2x24 or 2x3090+4090")
        gpus += [_named(match["name"].strip())] * int(match["count"] or 1)
    return gpus


def _named(name: str) -> Device:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB?|GiB)?", name, re.IGNORECASE)
    if size and name not in GPUS and MIN_GB <= float(size[1]) <= MAX_GB:
        like, nominal = _of_size(float(size[1])), float(size[1])
        label = f"{nominal:g} GiB (speed of a {like.name})"
        memory_gib = round(nominal * USABLE_OF_NOMINAL, 1)
        return dataclasses.replace(like, name=label, memory_gib=memory_gib)
    if found := _rows(name, r"(sxm\d?|pcie|nvl|blackwell|generation|edition)*"):
        return found[0]
    plain, known = _plain(name), {_plain(row): row for row in reversed(GPUS)}
    letters, number = _parts(plain)
    same = [row for row in known if _parts(row) == (letters, number)]
    lower = [row for row in known if _parts(row)[0] == letters and _parts(row)[1] < number]
    near = difflib.get_close_matches(plain, same or lower, 1, 0.3 if same else 0.5)
    words = f"did you mean {known[near[0]]}" if near else _TABLE["name_a_gpu"]
    raise UserError(f"--gpus {name}", "no such GPU", f"{words}, or its GiB, as in 2x24")


def _of_size(memory_gib: float) -> Device:
    return GPUS[_BY_SIZE[max((n for n in _BY_SIZE if n <= memory_gib < math.inf), default=12)]]


def _parts(plain: str) -> tuple[str, str]:
    """What stands before the number, with a sign for each of its digits; and the number."""
    before, number = re.fullmatch(r"(\D*)(\d*).*", plain).groups()  # type: ignore[union-attr]
    return before + "#" * len(number), number


def _plain(name: str) -> str:
    """A name without maker, series, memory and signs: "NVIDIA GeForce RTX 4060 Ti" is 4060ti."""
    makers = r"nvidia|geforce|\brtx|tesla|quadro|\bamd\b|radeon( pro)?|instinct|\brx\b"
    return re.sub(rf"{makers}|gpu|hbm\de?|\W|_", "", SIZE.sub("", name.lower()))


def _rows(name: str, rest: str) -> list[Device]:
    """The rows of the table that a name means, the one whose name has no memory in it first.

    Args:
        name: by the driver, or as the user writes it.
        rest: pattern of what may stand behind the longest name of the table that it begins with.
    """
    plain, size = _plain(name), SIZE.search(name.lower())
    pattern = {_plain(known): re.escape(_plain(known)) + rest for known in GPUS}
    stems = [stem for stem, row in pattern.items() if re.fullmatch(row, plain)]
    alike = [gpu for gpu in GPUS.values() if stems and _plain(gpu.name) == max(stems, key=len)]
    alike.sort(key=lambda gpu: (SIZE.search(gpu.name.lower()) is not None, gpu.memory_gib))
    if size is None:
        return alike
    return [gpu for gpu in alike if 0.85 < gpu.memory_gib / int(size[1] or size[2]) < 1.05]


def gpu_like(name: str, memory_gib: float) -> Device:
    """A GPU by the driver's name: speeds of the nearest in the table, its memory as it is.

    Args:
        name: "NVIDIA GeForce RTX 3090".
        memory_gib: total; inf: not known.
    """
    alike = _rows(SIZE.sub("", name.lower()), r"(\D.*)?") or [_of_size(memory_gib + 1)]
    near = min(alike, key=lambda gpu: abs(gpu.memory_gib - memory_gib))
    usable_gib = round(memory_gib * USABLE_OF_REPORTED, 1)
    return dataclasses.replace(near, name=name, memory_gib=usable_gib)


def count_gpus(env: Mapping[str, str]) -> int:
    """How many GPUs a CUDA program started with `env` sees.

    Args:
        env: environment; CUDA_VISIBLE_DEVICES hides devices.

    Raises:
        UserError: the driver does not answer (code 3).
    """
    return len(find_gpus(env.get("CUDA_VISIBLE_DEVICES")))


def find_gpus(visible: str | None = None) -> list[Device]:
    """The GPUs that a CUDA program sees, less what other programs hold of them.

    NVIDIA's driver is asked through its library (NVML). Without it (AMD, some containers), and of
    GPUs in parts (MIG), torch is asked, in another process, where it is a build for GPUs and a
    driver is loaded.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None: all. A wrong number ends the list, as in CUDA.

    Returns:
        The GPUs in the order of the ranks; none without a driver.

    Raises:
        UserError: the driver, or torch, does not answer (code 3).
    """
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        handles = _nvml_handles(nvml, visible)
        modes = [_ask(nvml, nvml.nvmlDeviceGetMigMode, handle) for handle in handles]
        if "MIG-" in (visible or "") or any(mode and mode[0] for mode in modes):
            return _torch_gpus(visible)  # of parts of GPUs, CUDA alone says which it sees
        return [_nvml_gpu(nvml, handle) for handle in handles]
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return _torch_gpus(visible)
        rule = f"gives no list of GPUs ({error})"
        remedy = "repair the driver (after an update: reboot), or hide it: CUDA_VISIBLE_DEVICES="
        raise UserError("NVIDIA driver", rule, remedy, ENVIRONMENT) from error


def _nvml_handles(nvml: Any, visible: str | None) -> list[Any]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return handles
    chosen: list[Any] = []
    for entry in (word.strip() for word in visible.split(",")):
        matches = handles[int(entry) : int(entry) + 1] if entry.isdigit() else []
        if entry.startswith("GPU-"):
            matches = [h for h in handles if nvml.nvmlDeviceGetUUID(h).startswith(entry)]
        if len(matches) != 1:  # none, or a prefix of several
            break
        chosen += matches
    names = [nvml.nvmlDeviceGetUUID(handle) for handle in chosen]
    return chosen if len({*names}) == len(names) else []  # one twice: CUDA sees none


def _ask(nvml: Any, query: Any, *args: Any) -> Any:
    """What the driver answers; None of an old one, or a GPU that shares the host's memory."""
    with contextlib.suppress(nvml.NVMLError):
        return query(*args)


def _nvml_gpu(nvml: Any, handle: Any) -> Device:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    memory = memory or _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    total_gib, used_gib = (memory.total / GIB, memory.used / GIB) if memory else (math.inf, 0.0)
    gpu = gpu_like(nvml.nvmlDeviceGetName(handle), total_gib)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    has_bf16 = tuple(capability) >= FIRST_WITH_BF16 if capability else gpu.has_bf16
    free_gib = round(gpu.memory_gib - used_gib, 1)
    return dataclasses.replace(gpu, memory_gib=free_gib, has_bf16=has_bf16)


@functools.cache
def _torch_gpus(visible: str | None) -> list[Device]:
    if not has_gpu_build() or not any(Path(path).exists() for path in DRIVERS):
        return []
    env = {**os.environ} if visible is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", _TABLE["ask_torch"]]
    kinds = (OSError, subprocess.SubprocessError, ValueError)
    remedy = "see what `python -c 'import torch'` says"
    with one_line_of("torch", remedy, ENVIRONMENT, "lists no GPUs ({kind})", kinds):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        rows = json.loads(done.stdout)
    found = [(gpu_like(name, gib), round(gib, 1), has_bf16) for name, gib, has_bf16 in rows]
    return [dataclasses.replace(gpu, memory_gib=gib, has_bf16=own) for gpu, gib, own in found]


@functools.cache
def has_gpu_build() -> bool:
    """Whether the installed torch was built for GPUs (CUDA, ROCm), without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    return re.search(r"^(cuda|hip)\b.*= '", text, re.MULTILINE) is not None


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    with contextlib.suppress(Exception):  # no library, no driver
        import pynvml as nvml

        nvml.nvmlInit()
        return nvml.nvmlSystemGetDriverVersion()
    return None


def machine_file() -> Path:
    """Where `doctor` leaves what it measured.

    Its content: {"cards": {name as the driver calls it: {some of SPEEDS: number}}}.
    """
    return cache_dir() / "machine.json"


def measured_speeds() -> dict[str, dict[str, float]]:
    """Read `machine_file`.

    Returns:
        Device -> its speeds; empty where nothing was measured.

    Raises:
        UserError: the file is not what `doctor` writes (code 3).
    """
    path = machine_file()
    if not path.is_file():
        return {}
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError)
    remedy = "delete it, or run python -m fsdp_qlora doctor"
    with one_line_of(path, remedy, ENVIRONMENT, "is not what doctor writes ({kind}: {})", kinds):
        table = json.loads(path.read_text(encoding="utf-8"))["cards"].items()
        return {name: {key: float(row[key]) for key in SPEEDS if key in row} for name, row in table}


def with_measured(devices: list[Device], link_gbs: float | None = None) -> list[Device]:
    """Replace the speeds of the table by measured ones.

    Args:
        devices: from `parse_gpus` or `find_gpus`, or [CPU].
        link_gbs: speed of the link to the host, given by the user; it stands above both.

    Returns:
        The devices.

    Raises:
        UserError: see `measured_speeds`.
    """
    measured = {_plain(name): row for name, row in measured_speeds().items()}
    given: dict[str, Any] = {} if link_gbs is None else {"host_link_gbs": link_gbs}
    found = []
    for device in devices:
        row = measured.get(_plain(device.name), {})
        # The disk is that of this machine, on which a GPU was measured, or not.
        disk = measured.get("disk", {}) if row or device.name == CPU.name else {}
        speeds: dict[str, Any] = {SPEEDS[key]: value for key, value in (disk | row).items()}
        speeds |= {"measured_gains": " ".join(filter(row.__contains__, GAINS))} | given
        found.append(dataclasses.replace(device, **speeds, is_measured=bool(row)))
    return found


def _read(path: Path) -> str:
    """The text of a file of the kernel; "" where it is missing (other systems, old kernels)."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def read_kib(path: Path, key: str) -> int:
    """The value of one `Key:  N kB` line of a /proc file.

    Args:
        path: file such as /proc/self/status or /proc/self/smaps_rollup.
        key: the word before the colon.

    Returns:
        N in KiB; 0 where the file or the line is missing (other systems, old kernels).
    """
    line = re.search(rf"^{re.escape(key)}:\s+(\d+) kB", _read(path), re.MULTILINE)
    return int(line[1]) if line else 0


class Cgroup(NamedTuple):
    """The control group that bounds this process (a container, a Slurm job), v1 or v2.

    Attributes:
        limit_gib: the tightest limit from the group up to the root; None when there is none.
        used_path: file with the bytes that count against that limit, page cache included (where
            there is none: those of the own group); None when not found. memory.stat beside it says
            how many those are.
        events_path: file that counts the processes killed for want of memory.
    """

    limit_gib: float | None = None
    used_path: Path | None = None
    events_path: Path | None = None

    def used_gib(self) -> float | None:
        """GiB in use less the page cache that the kernel would drop first; None without a group."""
        if self.used_path is None:
            return None
        used, stat = _read(self.used_path).strip(), _read(self.used_path.with_name("memory.stat"))
        # In version 1 the total stands behind the group's own.
        cache = [0, *map(int, re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE))]
        return max(0, int(used) - cache[-1]) / GIB if used.isdigit() and stat else None


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
    rows = [line.split(":", 2) for line in _read(proc / "cgroup").splitlines()]
    for controller, folder, limit_name, used_name, events_name in _TABLE["cgroups"]:
        mount = root / folder
        paths = [row[2] for row in rows if len(row) > 2 and controller in row[1].split(",")]
        group = mount / (paths or [""])[0].strip("/")
        groups = [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]
        used = [place for place in groups if (place / used_name).is_file()]
        if paths and used:
            texts = {place: _read(place / limit_name).strip() for place in reversed(groups)}
            # No limit: "max", v1's huge number, or a missing file.
            limits = {p: int(n) / GIB for p, n in texts.items() if n.isdigit() and int(n) < 2**60}
            place = min(limits, key=lambda place: limits[place], default=used[0])
            return Cgroup(limits.get(place), place / used_name, used[0] / events_name)
    return Cgroup()


def oom_kills(cgroup: Cgroup, vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has killed because memory ran out.

    Args:
        cgroup: whose processes count; those of the whole machine where it does not say.
        vmstat: the machine's counters.

    Returns:
        Their number since the group, or the machine, began; 0 where nobody counts.
    """
    texts = [_read(path) for path in (cgroup.events_path, vmstat) if path]
    counts = [re.search(r"^oom_kill (\d+)", text, re.MULTILINE) for text in texts]
    return next((int(count[1]) for count in counts if count), 0)


def host_limit_gib(cgroup: Cgroup | None = None) -> float:
    """GiB that this process and all others here may use together.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        Memory of the machine, or the tighter limit of the control group.
    """
    limit_gib = (find_cgroup() if cgroup is None else cgroup).limit_gib
    total_gib = psutil.virtual_memory().total / GIB
    return min(total_gib, limit_gib or total_gib)


def host_used_gib(cgroup: Cgroup | None = None) -> float:
    """GiB of `host_limit_gib` that are in use now, page cache left out.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        Of the machine, or of the control group if that has the tighter limit; what the machine
        has not left of that counts as used.
    """
    cgroup = find_cgroup() if cgroup is None else cgroup
    limit_gib, host = host_limit_gib(cgroup), psutil.virtual_memory()
    used_gib = cgroup.used_gib() if limit_gib < host.total / GIB else None
    return max(used_gib or 0.0, limit_gib - host.available / GIB)


def pss_gib() -> float:
    """Proportional set size of this process in GiB: pages shared by N processes count 1/N.

    The sum over ranks is what the run really holds. The kernel walks every page for it (tenths of
    a second for tens of GiB), so it does not belong in a step: see training.memory.HostSampler.
    """
    return read_kib(Path("/proc/self/smaps_rollup"), "Pss") * 1024 / GIB


def release_freed_memory() -> None:
    """Give the system back what this process has freed; glibc keeps it for itself otherwise.

    Reading a tokenizer of 262,144 tokens leaves 0.4 GiB of it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def machine_memory(cgroup: Cgroup | None = None) -> dict[str, float | None]:
    """Memory of the machine, or of the control group with a tighter limit, all processes together.

    Args:
        cgroup: from find_cgroup (looked up when None).

    Returns:
        In GiB; used = total - available, so shared memory and pinned pages count and page cache
        does not. The cgroup fields are None where there is no limit.
    """
    cgroup = find_cgroup() if cgroup is None else cgroup
    limit_gib, used_gib = host_limit_gib(cgroup), host_used_gib(cgroup)
    return {
        "host_total_gib": limit_gib,
        "host_available_gib": limit_gib - used_gib,
        "host_used_gib": used_gib,
        "cgroup_limit_gib": cgroup.limit_gib,
        "cgroup_used_gib": cgroup.used_gib(),
    }


def versions(device: "torch.device") -> dict[str, str]:
    """What this run runs on: packages, Python, system, and the GPU with its driver.

    Args:
        device: the device of this rank.

    Returns:
        Name -> version; packages that are not installed are left out.
    """
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _TABLE["packages"]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    if device.type == "cuda":
        import torch

        facts |= {"cuda": str(torch.version.cuda), "card": torch.cuda.get_device_name(device)}
        facts["num_cards"] = str(torch.cuda.device_count())
        facts["driver"] = driver_version() or "unknown"
    return facts
