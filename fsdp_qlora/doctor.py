"""`python -m fsdp_qlora doctor`: what works on this machine, how fast it is, and what to do.

GPUs, kernels and collectives are tried in ranks: processes that may crash or hang, and that alone
import torch. A rank prints what it finds at once, and its heartbeat names the task under way, so
that what it found before a crash or a hang counts.

Shape letters: M rows, O out features, I in features.
"""

import dataclasses
import importlib.util
import itertools
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
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, cli, hardware
from fsdp_qlora.cli import flag
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import hooks, supervise
from fsdp_qlora.distributed.env import child_env, find_port
from fsdp_qlora.distributed.supervise import RanksExit, RankSpec
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError, one_line
from fsdp_qlora.hardware import GIB

USAGE = """usage: python -m fsdp_qlora doctor [options]

Checks packages, GPUs, memory and disks, tries 4-bit matmuls, lets ranks meet, measures
speeds, and reports of each whether it works or what to do. `plan` uses the speeds.
Exit code 0: training works here; 3: something keeps it from working; 5: bytes or results are
wrong."""
OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEAST_HOST_GIB, LEAST_DISK_GIB, LEAST_SHM_GIB, SLOW_MBS = 4, 5, 1, 100
CACHE = "choose another with FSDP_QLORA_CACHE=DIR"
NO_P2P = "export NCCL_P2P_DISABLE=1, or start one rank (--world_size 1)"
NUM_CPU_RANKS = 2
MARK = "doctor: "  # of a finding among the lines that a rank prints
TOGETHER = ("meet", "gather")
ON_CPU = ("4-bit", "speed", *TOGETHER)
ON_GPUS = ("device", "4-bit", "kernels", "speed", "meet", "host link", "gather", "from others")
COLLECTIVE_S, MIN_S, NUM_GATHERS = 60.0, 0.3, 10
DISK_BYTES, LINK_BYTES, PEER_BYTES = 2**27, 2**28, 2**26
# Kind of device -> size of a square matmul, bytes of a copy, bytes of each rank in a gather.
SIZES = {"cuda": (8192, 2**29, 2**27), "cpu": (2048, 2**28, 2**24)}
SUSTAINED_SHARE = 0.62  # of a large matmul, over a whole step: H200, 490 of 790 TFLOP/s
# Relative: of weights in float32, of a matmul in 16 bit, of the code (NF4 0.09, FP4 0.12).
MAX_ERRORS = (1e-5, 0.01, 0.15)


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
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
        text = f"{self.value}; {self.remedy}" if self.remedy else self.value
        return one_line(f"{self.status:<8} {self.name:<24} {text}")


def main(argv: list[str]) -> int:
    """Check this machine and print what was found.

    Args:
        argv: see USAGE.

    Returns:
        0, or the code of what keeps training from working.

    Raises:
        UserError: bad options, all at once.
    """
    options, findings = cli.parse(argv, DoctorOptions, USAGE), []
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


def examine(options: DoctorOptions) -> Iterator[Finding]:
    """Do every check.

    Args:
        options: of the command line.

    Yields:
        The findings, as they are made.
    """
    yield from attempt("packages", packages, "see the message", ENVIRONMENT)
    yield from attempt("host", host, "see the message")
    places = {"cache": (hardware.machine_file().parent, CACHE)}
    places["output"] = (Path(options.output_dir), "choose another with --output_dir DIR")
    for name, (place, elsewhere) in {} if options.quick else places.items():
        yield from attempt(f"disk of {name}", partial(disk, name, place, elsewhere), elsewhere)
    try:
        num_gpus = hardware.count_gpus(os.environ)
    except UserError as error:
        yield Finding(error.got, error.rule, error.remedy, PROBLEM, error.code)
        return
    if num_gpus:
        yield from run_ranks("cuda", num_gpus, ON_GPUS[: 1 if options.quick else None], os.environ)
        return
    yield Finding("GPUs", "none: ranks compute on the CPU")
    if not options.quick:
        yield from run_ranks("cpu", NUM_CPU_RANKS, ON_CPU, os.environ)


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
    if path.exists():
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
        value = f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"[:200]
        findings.append(Finding(name, value, remedy, PROBLEM, code))
    return findings


def packages() -> Iterator[Finding]:
    """Whether the packages are there, in the wanted ranges, and agree with one another."""
    from packaging.requirements import Requirement

    versions, absent = {"python": platform.python_version()}, []
    for need in map(Requirement, _requirements()):
        (found, is_right), is_extra = _version(need), need.marker is not None
        if is_extra and not found:
            absent.append(need.name)
            continue
        versions |= {need.name: found} if found else {}
        if not is_right:
            value, remedy = f"{found or 'not installed'}; want {need.specifier}", _install(need)
            yield Finding(need.name, value, remedy, PROBLEM, DONE if is_extra else ENVIRONMENT)
    value = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("packages", f"{value}; optional, not installed: {', '.join(absent) or 'none'}")
    for name in list(versions)[1:]:
        for need in map(Requirement, metadata.requires(name) or []):
            found, is_right = _version(need)
            if not is_right and (need.marker is None or need.marker.evaluate({"extra": ""})):
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


def _version(need: Any) -> tuple[str, bool]:
    """The installed version of a requirement, "" for none, and whether it is as required."""
    with suppress(metadata.PackageNotFoundError):
        found = metadata.version(need.name)
        return found, need.specifier.contains(found, prereleases=True)
    return "", False


def _install(need: Any) -> str:
    return f"pip install '{need.name}{need.specifier}'"


def host() -> Iterator[Finding]:
    """Host memory within the container's limit, /dev/shm, and other programs at work."""
    limit_gib, used_gib = hardware.host_limit_gib() or 0.0, hardware.host_used_gib() or 0.0
    value = f"{limit_gib:.1f} GiB, {limit_gib - used_gib:.1f} free"
    remedy = "end other programs, or raise the container's limit: an offloaded 7B takes 7 GiB"
    yield limited("host memory", value, remedy, limit_gib - used_gib < LEAST_HOST_GIB)
    shm_gib = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0
    remedy = "docker run --shm-size=8g: GPUs without peer access communicate through it"
    yield limited("/dev/shm", f"{shm_gib:.2f} GiB", remedy, shm_gib < LEAST_SHM_GIB)
    load, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    value = f"{load:.1f} programs at work on {num_cores} cores"
    remedy = "speeds may be low: end them and measure again"
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
    place = wanted.expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    free_gib, block = shutil.disk_usage(place).free / GIB, os.urandom(DISK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            times_s = [time.perf_counter()]
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            times_s.append(time.perf_counter())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            is_same = file.read() == block
            times_s.append(time.perf_counter())
    except OSError as error:
        yield Finding(f"disk of {name}", f"{wanted}: {error.strerror}", elsewhere, PROBLEM)
        return
    write_mbs, read_mbs = (DISK_BYTES / 1e6 / (b - a) for a, b in itertools.pairwise(times_s))
    value = f"{wanted}: writes {write_mbs:,.0f} MB/s, reads {read_mbs:,.0f}, "
    value += f"{free_gib:.0f} GiB free"
    is_bad = min(write_mbs, read_mbs) < SLOW_MBS or free_gib < LEAST_DISK_GIB
    remedy = f"loading a 7B reads 13 GB, its 4-bit base takes 4 GiB: {elsewhere}"
    finding = limited(f"disk of {name}", value, remedy, is_bad)
    if not is_same:
        value, remedy = f"{wanted}: reads other bytes than were written", f"check it, {elsewhere}"
        finding = Finding(finding.name, value, remedy, PROBLEM, INTEGRITY)
    yield finding


def run_ranks(
    kind: str, size: int, tasks: Sequence[str], env: Mapping[str, str], timeout_s: float = 180.0
) -> list[Finding]:
    """Start ranks that do tasks; one that crashes or hangs is a finding.

    Args:
        kind: "cuda", a GPU each, or "cpu".
        size: number of ranks.
        tasks: keys of TASKS, in order.
        env: environment of the ranks.
        timeout_s: for all tasks.

    Returns:
        The findings, rank by rank, equal ones once.
    """
    stops: list[int] = []
    deadline_s = time.monotonic() + timeout_s

    def poll() -> None:
        if time.monotonic() > deadline_s and not stops:
            stops.append(signal.SIGKILL)

    with tempfile.TemporaryDirectory(prefix="doctor-") as place, hooks.open_board() as file:
        board, port = file.fileno(), find_port(None)
        own = {hooks.BOARD: str(board)} | ({} if kind == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
        command = [sys.executable, "-P", "-m", "fsdp_qlora.doctor", kind, *tasks]
        specs = [
            RankSpec(i, command, child_env({**env, **own}, i, size, port), log, (board,))
            for i, log in enumerate(Path(place, f"{i}.log") for i in range(size))
        ]
        watch = hooks.Watch(board, (), (), limit_s=0)
        ended = supervise.run(specs, supervise.start, stops, watch, poll)
        findings = [finding for spec in specs for finding in _collect(spec, ended, kind, tasks)]
    return list({finding.line(): finding for finding in findings}.values())


def _collect(
    spec: RankSpec, ended: RanksExit, kind: str, tasks: Sequence[str]
) -> Iterator[Finding]:
    """What a rank has found, and what ended it before its time."""
    lines = spec.log.read_text(errors="replace").strip().splitlines() if spec.log else []
    for line in (line for line in lines if line.startswith(MARK)):
        yield Finding(**json.loads(line.removeprefix(MARK)))
    code, sign = ended.codes[spec.rank], ended.signs[spec.rank]
    if sign.is_last or spec.rank in ended.ended:  # those wait in vain for the one that crashed
        return
    index = tasks.index(sign.point) if sign.point else -1
    value = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    value = "no answer in time" if ended.stop is not None else value
    words = [line for line in lines if not line.startswith(MARK)]
    value += f" ({words[-1][:160]})" if words else ""
    value += f"; not checked: {', '.join(tasks[index + 1 :])}" if tasks[index + 1 :] else ""
    remedy = "export NCCL_P2P_DISABLE=1, or see the driver's log (dmesg)"
    remedy = "see pytorch.org for a build that runs here" if index < 0 else remedy
    name = f"{'GPU' if kind == 'cuda' else 'CPU rank'} {spec.rank} {sign.point or 'start'}"
    yield Finding(name, value, remedy, PROBLEM, ENVIRONMENT)


@dataclasses.dataclass
class TrialRank:
    """This process, and the device that it tries.

    Attributes:
        number, size: this rank, and how many there are.
        device: a torch.device.
        dtype: bfloat16, or float16 on GPUs without matmuls of it.
        device_name: under which hardware looks for its speeds.
        world: the ranks, once they have met.
    """

    number: int
    size: int
    device: Any
    dtype: Any
    device_name: str = hardware.CPU.name
    world: Any = None

    def name(self, task: str) -> str:
        """What findings call a task: of all ranks together, or of this rank's device."""
        is_cpu = self.device.type == "cpu"
        if task in TOGETHER:
            return f"{self.size} {'CPU ranks' if is_cpu else 'GPUs'} {task}"
        return f"{'CPU' if is_cpu else f'GPU {self.number}'} {task}"

    def measures(self, task: str, value: str, **speeds: float) -> Finding:
        """A finding with speeds of this rank's device."""
        return Finding(self.name(task), value, device=self.device_name, speeds=speeds)


def do_tasks(kind: str, *tasks: str) -> None:
    """Do tasks as the rank that the environment names, print what is found, then leave at once.

    Args:
        kind, tasks: see `run_ranks`.
    """
    import torch

    number = int(os.environ["RANK"])
    device = torch.device(f"cuda:{number}" if kind == "cuda" else kind)
    rank = TrialRank(number, int(os.environ["WORLD_SIZE"]), device, torch.bfloat16)
    for task in tasks:
        hooks.beat(task, number)
        if kind == "cpu" and number and task not in TOGETHER:
            continue  # the ranks share the CPU: the first one tries it
        check, remedy, code = TASKS[task]
        name = "GPUs in torch" if task == "device" else rank.name(task)
        findings = attempt(name, partial(check, rank), remedy, code)
        for finding in findings:
            print(MARK + json.dumps(dataclasses.asdict(finding)), flush=True)
        if task == "device" and findings[-1].status == PROBLEM:
            break
    hooks.beat(hooks.DONE, number)
    os._exit(DONE)  # a peer may hold the group


def describe(rank: TrialRank) -> Iterator[Finding]:
    """What a GPU is, how much of it is free, and whether this torch has kernels for it."""
    import torch

    torch.cuda.set_device(rank.device)
    rank.device_name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    value = f"{rank.device_name}, {total_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} free, "
    value += f"capability {capability[0]}.{capability[1]}, driver {hardware.driver_version()}, "
    value += f"CUDA {torch.version.cuda or torch.version.hip}"
    remedy = "nvidia-smi names the programs that hold the rest: end them"
    yield limited(rank.name("device"), value, remedy, free_bytes < 0.85 * total_bytes)
    if capability < hardware.FIRST_WITH_BF16:
        rank.dtype, remedy = torch.float16, "--precision fp16_autocast or fp32"
        yield Finding(rank.name("bf16"), "has no matmuls of it", remedy, WARNING)
    torch.ones(8, device=rank.device).sum().item()  # raises where this torch has no kernels for it


def four_bit(rank: TrialRank) -> Iterator[Finding]:
    """Every 4-bit format that is installed, on this rank's device."""
    for name, library in {"nf4_dq": "bitsandbytes", "fp4": "bitsandbytes", "hqq4": "hqq"}.items():
        if library != "hqq" or importlib.util.find_spec(library) is not None:
            check, code = partial(quantized, rank, name), ENVIRONMENT * (library != "hqq")
            yield from attempt(rank.name(name), check, f"reinstall {library}", code)


def quantized(rank: TrialRank, name: str, fmt: Any = None) -> Iterator[Finding]:
    """Quantize a weight, multiply with it, and compare with its decoding on the CPU.

    Args:
        rank: this one.
        name: row of quantize.FORMATS.
        fmt: another row, for the test.
    """
    import torch

    from fsdp_qlora.model.quantize import FORMATS

    generator, row = torch.Generator().manual_seed(0), fmt or FORMATS[name]
    weight_OI = (torch.randn(256, 512, generator=generator) * 0.02).bfloat16()
    x_MI = torch.randn(64, 512, generator=generator).to(rank.dtype)
    fields = row.quantize(weight_OI.to(rank.device))

    def decoded(row: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
        own = {key: field.to(device) for key, field in fields.items()}
        codes = own.pop("weight")
        return row.dequantize(codes, row.constants(own, dtype), weight_OI.shape, dtype)

    exact_OI = decoded(FORMATS[name], "cpu", torch.float32).double()
    product_MO = (x_MI.to(rank.device) @ decoded(row, rank.device, rank.dtype).t()).cpu()
    pairs = (
        (decoded(row, rank.device, torch.float32).cpu(), exact_OI),
        (product_MO, x_MI.double() @ exact_OI.t()),
        (exact_OI, weight_OI.double()),
    )
    errors = [float((got.double() - wanted).norm() / wanted.norm()) for got, wanted in pairs]
    value = "weights off by {:.0e}, matmul by {:.1e}, rounding to 4 bits {:.2f}".format(*errors)
    finding = Finding(rank.name(name), value)
    if not all(error <= limit for error, limit in zip(errors, MAX_ERRORS, strict=True)):
        library, code = ("hqq", DONE) if name.startswith("hqq") else ("bitsandbytes", INTEGRITY)
        remedy = f"pip install --upgrade {library}"
        finding = Finding(finding.name, f"wrong: {value}", remedy, PROBLEM, code)
    yield finding


def kernels(rank: TrialRank) -> Iterator[Finding]:
    """Whether flash-attn and Liger run, where they are installed; a run would choose them."""
    import torch

    x = torch.randn(2, 128, 4, 64, device=rank.device).to(rank.dtype)
    trials: dict[str, tuple[str, Callable[[Any], torch.Tensor]]] = {
        "flash_attn": ("--attn sdpa", lambda module: module.flash_attn_func(x, x, x, causal=True)),
        "liger_kernel.transformers.rms_norm": (
            "--liger off",
            lambda module: module.LigerRMSNorm(64).to(device=rank.device, dtype=rank.dtype)(x),
        ),
    }

    def tried(name: str, remedy: str, path: str) -> Iterator[Finding]:
        is_bad = not trials[path][1](import_module(path)).isfinite().all()
        yield limited(name, "gives no finite numbers" if is_bad else "runs", remedy, is_bad)

    for path, (without, _) in trials.items():
        package = path.partition(".")[0]
        if importlib.util.find_spec(package) is not None:
            name, remedy = rank.name(package), f"reinstall it for this torch, or {without}"
            yield from attempt(name, partial(tried, name, remedy, path), remedy, ENVIRONMENT)


def rate(work: Callable[[], object], num: int = 0) -> float:
    """How often a second something can be done, its work on the device included.

    Args:
        work: puts something on the device's queue.
        num: how often to do it; 0: for MIN_S.
    """
    from torch.utils.benchmark import Timer

    num_cores = len(os.sched_getaffinity(0))
    timer = Timer("work()", globals={"work": work}, num_threads=num_cores)
    return 1 / (timer.timeit(num) if num else timer.blocked_autorange(min_run_time=MIN_S)).mean


def speed(rank: TrialRank) -> Iterator[Finding]:
    """Speed of matmuls and memory of this rank's device; a CPU with all its cores."""
    import torch

    size, nbytes, _ = SIZES[rank.device.type]
    left, right = torch.randn(2, size, size, device=rank.device).to(rank.dtype)
    out, kind = torch.empty_like(left), str(rank.dtype).rpartition(".")[2]
    tflops = 2 * size**3 * rate(lambda: torch.mm(left, right, out=out)) / 1e12
    sustained = tflops * SUSTAINED_SHARE
    value = f"{tflops:.3g} TFLOP/s ({size} x {size}); {sustained:.3g} expected over a step"
    yield rank.measures(kind, value, bf16_tflops=sustained)
    source = torch.ones(nbytes, dtype=torch.uint8, device=rank.device)
    target = torch.empty_like(source)
    gbs = 2 * nbytes * rate(lambda: target.copy_(source)) / 1e9
    yield rank.measures("memory", f"{gbs:,.3g} GB/s", memory_gbs=gbs)


def meet(rank: TrialRank) -> Iterator[Finding]:
    """Let the ranks meet and sum a megabyte."""
    from fsdp_qlora.distributed import world as worlds

    rank.world = worlds.join(None, 0, COLLECTIVE_S)
    worlds.check_links(rank.world)
    by = "gloo" if rank.device.type == "cpu" else "NCCL"
    yield Finding(rank.name("meet"), f"over {by}, sums are right")


def host_link(rank: TrialRank) -> Iterator[Finding]:
    """Pin memory, and measure the link from the host to the GPU, all GPUs at once."""
    import torch

    from fsdp_qlora.model import placement

    memory = placement.private(LINK_BYTES, pin=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=rank.device)
    gbs = LINK_BYTES * rate(partial(there.copy_, memory.bytes, non_blocking=True)) / 1e9
    value = f"{gbs:.3g} GB/s to the GPU, all GPUs at once; pinned {LINK_BYTES // 2**20} MiB"
    yield rank.measures("host link", value, host_link_gbs=gbs)


def gather(rank: TrialRank) -> Iterator[Finding]:
    """All-gather quantized bytes in float32, as FSDP does: whether they stay exact, how fast."""
    import torch

    nbytes = SIZES[rank.device.type][2]

    def planted(number: int) -> torch.Tensor:  # every NaN, which careless copies rewrite
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    flat = planted(rank.number).to(rank.device).view(torch.float32)
    received = rank.world.share(flat).view(torch.uint8).cpu()
    wrong = [i for i in range(rank.size) if not torch.equal(received[i], planted(i))]
    rank.world.barrier()
    own_gbs = nbytes * (rank.size - 1) * rate(lambda: rank.world.share(flat), NUM_GATHERS) / 1e9
    own_peers = os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0")
    for other in set(range(rank.size if rank.device.type == "cuda" else 0)) - {rank.number}:
        own_peers &= torch.cuda.can_device_access_peer(rank.number, other)
    rows = rank.world.gather_objects((wrong, own_gbs, own_peers))
    if wrong_of := sorted({i for row in rows for i in row[0]}):
        value = f"bytes of rank {', '.join(map(str, wrong_of))} arrive changed"
        yield Finding(rank.name("gather"), value, NO_P2P, PROBLEM, INTEGRITY)
    elif rank.size > 1:
        gbs, has_peers = min(row[1] for row in rows), all(row[2] for row in rows)
        value = f"bytes exact, {gbs:.3g} GB/s into each"
        value += "" if has_peers else ", through the host (no peer access)"
        yield rank.measures("gather", value, card_link_gbs=gbs if has_peers else 0.0)


def from_others(rank: TrialRank) -> Iterator[Finding]:
    """Copy from every other GPU and compare the bytes; consumer GPUs are known to fail here."""
    import torch

    speeds, wrong = [], []
    for other in sorted(set(range(rank.size)) - {rank.number}):
        source = torch.randint(0, 256, (PEER_BYTES,), dtype=torch.uint8, device=f"cuda:{other}")
        target = torch.empty_like(source, device=rank.device)
        torch.cuda.synchronize(other)
        speeds.append(PEER_BYTES * rate(partial(target.copy_, source)) / 1e9)
        wrong += [] if torch.equal(target.cpu(), source.cpu()) else [str(other)]
    if wrong:
        remedy = "switch the IOMMU (ACS) off in the BIOS, or export NCCL_P2P_DISABLE=1"
        value = f"bytes from GPU {', '.join(wrong)} arrive changed"
        yield Finding(rank.name("from others"), value, remedy, PROBLEM, INTEGRITY)
    elif speeds:
        yield Finding(rank.name("from others"), f"bytes exact, {min(speeds):.3g} GB/s at least")


# Name -> what to do, remedy and exit code when it fails.
NEW_TORCH = "update the driver, or install the build of torch for it (pytorch.org)"
TASKS: dict[str, tuple[Callable[[TrialRank], Iterator[Finding]], str, int]] = {
    "device": (describe, NEW_TORCH, ENVIRONMENT),
    "4-bit": (four_bit, "see the message", DONE),
    "kernels": (kernels, "see the message", DONE),
    "speed": (speed, "end other programs", DONE),
    "meet": (meet, NO_P2P, ENVIRONMENT),
    "host link": (host_link, "raise the limit (ulimit -l unlimited)", ENVIRONMENT),
    "gather": (gather, NO_P2P, ENVIRONMENT),
    "from others": (from_others, NO_P2P, DONE),
}


if __name__ == "__main__":
    do_tasks(*sys.argv[1:])
