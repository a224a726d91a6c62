"""What works on this machine, and how fast: `python -m fsdp_qlora doctor`."""

import dataclasses
import importlib.util
import json
import mmap
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import atomic, cli, config, hardware
from fsdp_qlora.distributed import hooks, launch
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError, brief, printable
from fsdp_qlora.hardware import FIRST_WITH_BF16, GIB
from fsdp_qlora.model.disk import NUM_READERS, Span

if TYPE_CHECKING:
    import torch

    from fsdp_qlora.distributed.world import World

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEAST_HOST_GIB, LEAST_DISK_GIB, LEAST_SHM_GIB, SLOW_MBS = 4, 5, 1, 100
REMEDIES: dict[str, str] = cli.TABLE["remedies"]  # by check or task, and others
SEE, CACHE, OUTPUT = (REMEDIES[name] for name in ("see", "cache", "output"))
MARK = "doctor: "  # of a finding among the lines that a rank prints
TOGETHER, OPTIONAL_TASKS = ("meet", "gather"), ("hqq4", "speed")  # runs do without the latter
ON_CPU = ("nf4_dq", "fp4", "hqq4", "speed", *TOGETHER)
# Task -> module without which it is left out.
OPTIONAL = {"hqq4": "hqq", "flash_attn": "flash_attn", "liger_kernel": "liger_kernel"}
COLLECTIVE_S, MIN_S, NUM_GATHERS, NUM_CPU_RANKS = 60.0, 0.3, 10, 2
DISK_BYTES, LINK_BYTES = 2**27, 2**28
# Kind of device -> size of a square matmul, bytes of a copy, bytes of each rank in a gather.
SIZES = {"cuda": (8192, 2**29, 2**27), "cpu": (2048, 2**28, 2**24)}
GAIN_SHARE = 0.85  # of what a large matmul gains in 8 bit, by a step: H200, 1.5 of 1.76
SUSTAINED_SHARE = 0.78  # of a large matmul, by those of a step: H200, 640 of 820 TFLOP/s
# Relative: of weights in float32, of a matmul in 16 bit, of the code (NF4 0.09, FP4 0.12).
MAX_ERRORS = (1e-5, 0.01, 0.15)


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Checks packages, GPUs, memory, disks, tries 4-bit matmuls, lets ranks meet, measures speeds.

    It reports of each whether it works or what to do. `plan` uses the speeds. Exit code 0: training
    works here; 3: something keeps it from working; 5: bytes or results are wrong.
    """

    json: bool = cli.flag(False, "doctor", "print one JSON object")
    quick: bool = cli.flag(False, "doctor", "measure nothing: versions, GPUs, memory")
    output_dir: str = cli.flag("output", "doctor", "where runs will be written", rule=config.TEXT)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        value: what was found.
        remedy: what to do about it; "" when it is OK.
        code: exit code of the command, where this keeps training from working as it is.
        device: whose speeds were measured, as the driver calls it; "" = none.
        speeds: some of hardware.SPEEDS, of that device.
    """

    name: str
    value: str
    remedy: str = ""
    code: int = DONE
    device: str = ""
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def status(self) -> str:
        """OK, WARNING or PROBLEM."""
        return PROBLEM if self.code else WARNING if self.remedy else OK

    def line(self) -> str:
        """The finding in one line of printable text."""
        text = f"{self.value}; {self.remedy}" if self.remedy else self.value
        return printable(f"{self.status:<8} {self.name:<24} {text}")


Check = Callable[[], Iterable[Finding]]


def main(argv: list[str]) -> int:
    """Check this machine and print what was found.

    Args:
        argv: the options above.

    Returns:
        0, or the code of what keeps training from working.

    Raises:
        UserError: bad options, all at once.
    """
    options = cli.parse(argv, DoctorOptions, "usage: python -m fsdp_qlora doctor [options]")
    found: list[Finding] = []
    cache, output = hardware.machine_file().parent, Path(options.output_dir)
    checks: list[tuple[str, Check, str, int]] = [
        ("packages", packages, SEE, ENVIRONMENT),
        ("host", host, SEE, DONE),
        ("disk of cache", partial(disk, "cache", cache, CACHE), CACHE, DONE),
        ("disk of output", partial(disk, "output", output, OUTPUT), OUTPUT, ENVIRONMENT),
        ("GPUs", partial(devices, options.quick), SEE, ENVIRONMENT),
        ("measured speeds", partial(save, found), CACHE, DONE),
    ]
    for check in [*checks[:2], *checks[4:]] if options.quick else checks:
        with cli.Progress(f"checks {check[0]}"):
            findings = attempt(*check)
        for finding in findings:
            found.append(finding)
            print("" if options.json else finding.line() + "\n", end="", flush=True)
    code, states = max(f.code for f in found), [f.status for f in found]
    if options.json:
        rows = [{**dataclasses.asdict(finding), "status": finding.status} for finding in found]
        print(json.dumps({"code": code, "cards": measured(found), "findings": rows}, indent=1))
    else:
        counts = map(states.count, (PROBLEM, WARNING, OK))
        print("{} problems, {} warnings, {} fine".format(*counts))
    return code


def attempt(name: str, check: Check, remedy: str, code: int = DONE) -> list[Finding]:
    """Run a check whose failure is a finding too, so that it never hides the others.

    Args:
        name: of the finding, should the check fail.
        check: gives findings; those before its failure count.
        remedy: what to do about an error that does not say so itself.
        code: exit code of the command for such an error.
    """
    findings: list[Finding] = []
    try:
        findings += check()
    except UserError as error:
        findings.append(Finding(name, f"{error.got}: {error.rule}", error.remedy, error.code))
    except Exception as error:  # whatever is broken here
        findings.append(Finding(name, f"{type(error).__name__}: {brief(error)}", remedy, code))
    return findings


def measured(findings: Iterable[Finding]) -> dict[str, dict[str, float]]:
    """Collect speeds; of several devices of one name the slowest counts.

    Args:
        findings: of all ranks.

    Returns:
        As hardware.machine_file has it: device -> speeds.
    """
    table: dict[str, dict[str, float]] = {}
    for finding in findings:
        for key, value in finding.speeds.items():
            row, rounded = table.setdefault(finding.device, {}), float(f"{value:.4g}")
            row[key] = min(row.get(key, rounded), rounded)
    return table


def save(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Write speeds where `plan` finds them; devices of other machines stay in the file.

    Args:
        findings: of all ranks.

    Raises:
        OSError: the file cannot be written.
    """
    path, table, note = hardware.machine_file(), measured(findings), ""
    if not table:
        yield Finding("measured speeds", f"none; {path} is left as it is")
        return
    try:
        known = hardware.measured_speeds()
    except UserError:
        known, note = {}, " (the old file was unreadable)"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {device: known.get(device, {}) | speeds for device, speeds in table.items()}
    atomic.write_json(path, {"cards": known | rows})
    value = f"of {', '.join(table)} are in {path}, where plan finds them{note}"
    yield Finding("measured speeds", value)


def packages() -> Iterator[Finding]:
    """Whether the packages are there, in the wanted ranges."""
    from packaging.requirements import Requirement

    own = [need for need in map(Requirement, _requirements()) if need.name != config.PACKAGE]
    versions = {need.name: _version(need.name) for need in own}
    there = [name for name, version in versions.items() if version]
    named = [f"{name} {versions[name]}" for name in there]
    value = ", ".join([f"python {platform.python_version()}", *named])
    absent = ", ".join(name for name in versions if name not in there) or "none"
    yield Finding("packages", f"{value}; not installed: {absent}")
    for need in own:
        found, wanted = versions[need.name], need.specifier
        is_needed = need.marker is None or need.marker.evaluate({"extra": ""})
        if not (wanted.contains(found, prereleases=True) if found else not is_needed):
            value = f"{config.PACKAGE} wants {wanted or 'it'}, found {found or 'none'}"
            remedy = f"pip install '{need.name}{wanted}'"
            yield Finding(need.name, value, remedy, ENVIRONMENT * is_needed)


def _requirements() -> list[str]:
    """Of pyproject.toml, or of the installed package; those of extras end in a marker."""
    if not (table := config.own_project()):
        return (metadata.requires(config.PACKAGE) or []) if _version(config.PACKAGE) else []
    extras = table["optional-dependencies"].items()
    marked = [f"{text}; extra == '{name}'" for name, texts in extras for text in texts]
    return [*table["dependencies"], *marked]


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def host() -> Iterator[Finding]:
    """Host memory within the container's limit, and /dev/shm."""
    limit_gib = hardware.host_limit_gib()
    free_gib = limit_gib - hardware.host_used_gib()
    value = f"{limit_gib:.1f} GiB, {free_gib:.1f} free"
    yield Finding("host memory", value, REMEDIES["host"] * (free_gib < LEAST_HOST_GIB))
    shm_gib = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0
    yield Finding("/dev/shm", f"{shm_gib:.2f} GiB", REMEDIES["shm"] * (shm_gib < LEAST_SHM_GIB))


def disk(name: str, wanted: Path, elsewhere: str) -> Iterator[Finding]:
    """Write a file, read it back from the disk, and compare; nothing is left behind.

    Args:
        name: what lies there.
        wanted: a directory, which may not exist yet.
        elsewhere: how to choose another one.

    Raises:
        OSError: nothing can be written there.
        UserError: other bytes are read than were written (code 5).
    """
    place, block = wanted.expanduser().absolute(), os.urandom(DISK_BYTES)
    while not place.is_dir():
        place = place.parent
    began_s = time.perf_counter()
    with tempfile.TemporaryFile(dir=place) as file, mmap.mmap(-1, DISK_BYTES) as memory:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        span = Span(Path(f"/proc/self/fd/{file.fileno()}"), 0, DISK_BYTES)
        with ThreadPoolExecutor(NUM_READERS) as pool, memoryview(memory) as view:
            read_s = time.perf_counter()
            span.read(view, pool)
            read_s = time.perf_counter() - read_s
            is_same = view == block
    mbs, gbs = 2 * DISK_BYTES / 1e6 / (time.perf_counter() - began_s), DISK_BYTES / 1e9 / read_s
    free_gib = shutil.disk_usage(place).free / GIB
    if not is_same:
        rule, remedy = "reads other bytes than were written", f"check it, {elsewhere}"
        raise UserError(str(wanted), rule, remedy, INTEGRITY)
    how = "" if span.is_direct else " through the page cache"
    value = f"{wanted}: writes and reads {mbs:,.0f} MB/s, reads {gbs:.3g} GB/s{how}, "
    value += f"{free_gib:.0f} GiB free"
    is_bad = mbs < SLOW_MBS or free_gib < LEAST_DISK_GIB
    remedy = f"loading a 7B reads 13 GB, its 4-bit base takes 4 GiB: {elsewhere}" * is_bad
    speeds = {"disk_gbs": gbs} if name == "cache" else {}
    yield Finding(f"disk of {name}", value, remedy, DONE, config.DISK * bool(speeds), speeds)


def devices(is_quick: bool) -> Iterator[Finding]:
    """Try every GPU, or the processor, in ranks: processes that may crash or hang.

    They alone import torch.

    Args:
        is_quick: nothing is tried, the GPUs are named only.

    Raises:
        UserError: the driver does not answer.
    """
    num_gpus = hardware.count_gpus(os.environ)
    if num_gpus:
        yield from run_ranks("cuda", num_gpus, [*TASKS][: 1 if is_quick else None], os.environ)
        return
    yield Finding("GPUs", "none: ranks compute on the CPU")
    yield from [] if is_quick else run_ranks("cpu", NUM_CPU_RANKS, ON_CPU, os.environ)


def run_ranks(
    kind: str, size: int, tasks: Sequence[str], env: Mapping[str, str], timeout_s: float = 180.0
) -> list[Finding]:
    """Start ranks that do tasks; one that crashes or hangs is a finding.

    A rank prints what it finds at once, and its heartbeat names the task under way, so that what
    it found before a crash or a hang counts.

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
        stops[:] = [signal.SIGKILL] * (time.monotonic() > deadline_s)

    with tempfile.TemporaryDirectory(prefix="doctor-") as place, hooks.open_board() as file:
        board, port = file.fileno(), launch.find_port(None)
        own = {hooks.BOARD: str(board)} | ({} if kind == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
        command = [sys.executable, "-P", "-m", "fsdp_qlora.doctor", kind, *tasks]
        logs = [Path(place, f"{i}.log") for i in range(size)]
        envs = [launch.child_env({**env, **own}, i, size, port) for i in range(size)]
        specs = [launch.RankSpec(i, command, envs[i], logs[i], (board,)) for i in range(size)]
        ended = launch.run_ranks(specs, launch.start, stops, hooks.Watch(board, limit_s=0), poll)
        texts = [log.read_text(errors="replace").strip().splitlines() for log in logs]
    who, found = "GPU" if kind == "cuda" else "CPU rank", list[Finding]()
    for i, lines in enumerate(texts):
        words = [line for line in lines if not line.startswith(MARK)]
        marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        found += [Finding(**json.loads(line)) for line in marked]
        code, sign = ended.codes[i], ended.signs[i]
        if sign.is_last or i in ended.ended:  # those wait in vain for the one that crashed
            continue
        value = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        value = "no answer in time" if ended.stop is not None else value
        value += f" ({words[-1][:160]})" if words else ""
        rest, remedy = tasks, REMEDIES["device"]
        if sign.point:
            rest, remedy = tasks[tasks.index(sign.point) + 1 :], REMEDIES["crash"]
        value += f"; not checked: {', '.join(rest)}" if rest else ""
        found.append(Finding(f"{who} {i} {sign.point or 'start'}", value, remedy, ENVIRONMENT))
    return list({finding.line(): finding for finding in found}.values())


def do_tasks(kind: str, *tasks: str) -> None:
    """Do tasks as the rank that the environment names, print what is found, then leave at once.

    Args:
        kind, tasks: see `run_ranks`.
    """
    import torch

    from fsdp_qlora.distributed.world import World

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)
    one, every = (f"GPU {rank}", f"{size} GPUs") if kind == "cuda" else ("CPU", f"{size} CPU ranks")
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else hardware.CPU.name
    for task in tasks:
        hooks.beat(task, rank)
        is_absent = importlib.util.find_spec(OPTIONAL.get(task, "torch")) is None
        if is_absent or (kind == "cpu" and rank and task not in TOGETHER):
            continue  # the ranks share the CPU: the first one tries it
        check, remedy = TASKS[task], REMEDIES.get(task, REMEDIES["peers"])
        code = DONE if task in OPTIONAL_TASKS else ENVIRONMENT
        world, who = World(rank, size, rank, size, device), every if task in TOGETHER else one
        for finding in (findings := attempt(task, partial(check, world), remedy, code)):
            own = {"name": f"{who} {finding.name}", "device": name if finding.speeds else ""}
            print(MARK + json.dumps({**dataclasses.asdict(finding), **own}), flush=True)
        if task == "device" and findings[-1].code:
            break
    hooks.beat(hooks.DONE, rank)
    os._exit(DONE)  # a peer may hold the group


def dtype_of(device: "torch.device") -> "torch.dtype":
    """What a run would compute in: bfloat16, or float16 on GPUs, float32 on CPUs without it."""
    import torch

    if device.type == "cpu":
        return torch.bfloat16 if hardware.own_cpu().has_bf16 else torch.float32
    is_old = torch.cuda.get_device_capability(device) < FIRST_WITH_BF16
    return torch.float16 if is_old else torch.bfloat16


def describe(world: "World") -> Iterator[Finding]:
    """What a GPU is, how much of it is free, and whether this torch has kernels for it."""
    import torch

    torch.cuda.set_device(world.device)
    major, minor = torch.cuda.get_device_capability()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    value = f"{torch.cuda.get_device_name()}, {total_bytes / GIB:.1f} GiB, "
    value += f"{free_bytes / GIB:.1f} free, capability {major}.{minor}, "
    value += f"driver {hardware.driver_version()}, CUDA {torch.version.cuda or torch.version.hip}"
    yield Finding("device", value, REMEDIES["gpu"] * (free_bytes < 0.85 * total_bytes))
    if dtype_of(world.device) == torch.float16:
        yield Finding("bf16", "has no matmuls of it", "--precision fp16_autocast or fp32")
    torch.ones(8, device=world.device).sum().item()  # raises where torch has no kernels for it


def quantized(name: str, world: "World", fmt: Any = None) -> Iterator[Finding]:
    """Quantize a weight, multiply with it, and compare with its decoding on the CPU.

    Args:
        name: row of quantize.FORMATS.
        world: whose device this rank has.
        fmt: another row, for the test.
    """
    import torch

    from fsdp_qlora.model.quantize import FORMATS

    generator, row, device = torch.Generator().manual_seed(0), fmt or FORMATS[name], world.device
    half = dtype_of(device)
    weight_OI = (torch.randn(256, 512, generator=generator) * 0.02).bfloat16()
    x_MI = torch.randn(64, 512, generator=generator).to(half)
    fields = row.quantize(weight_OI.to(device))

    def decoded(row: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
        own = {key: field.to(device) for key, field in fields.items()}
        return row.dequantize(own.pop("weight"), row.constants(own), weight_OI.shape, dtype)

    exact_OI = decoded(FORMATS[name], "cpu", torch.float32).double()
    product = x_MI.to(device) @ decoded(row, device, half).t(), x_MI.double() @ exact_OI.t()
    weights = decoded(row, device, torch.float32), exact_OI
    pairs = weights, product, (exact_OI, weight_OI.double())
    errors = [float((got.cpu().double() - want).norm() / want.norm()) for got, want in pairs]
    value = "weights off by {:.0e}, matmul by {:.1e}, rounding to 4 bits {:.2f}".format(*errors)
    if all(error <= limit for error, limit in zip(errors, MAX_ERRORS, strict=True)):
        yield Finding(name, value)
        return
    library, code = ("hqq", DONE) if name.startswith("hqq") else ("bitsandbytes", INTEGRITY)
    yield Finding(name, f"wrong: {value}", f"pip install --upgrade {library}", code)


def kernel(name: str, world: "World") -> Iterator[Finding]:
    """Whether flash-attn or Liger runs; where they are installed, a run would choose them."""
    import torch

    x = torch.randn(2, 128, 4, 64, device=world.device).to(dtype_of(world.device))
    if name == "flash_attn":
        y = import_module(name).flash_attn_func(x, x, x, causal=True)
    else:
        y = import_module(f"{name}.transformers").LigerRMSNorm(64).to(x)(x)
    y.sum().item()
    yield Finding(name, "runs")


def rate(work: Callable[[], object], num: int = 0) -> float:
    """How often a second something can be done, its work on the device included.

    Args:
        work: puts something on the device's queue.
        num: how often to do it; 0: for MIN_S.
    """
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=len(os.sched_getaffinity(0)))
    return 1 / (timer.timeit(num) if num else timer.blocked_autorange(min_run_time=MIN_S)).mean


def speed(world: "World") -> Iterator[Finding]:
    """Speed of matmuls and memory of this rank's device; a CPU with all its cores."""
    import torch

    size, nbytes, _ = SIZES[world.device.type]
    left, right = torch.randn(2, size, size, device=world.device).to(dtype_of(world.device))
    out, kind = torch.empty_like(left), str(left.dtype).rpartition(".")[2]
    tflops = 2 * size**3 * rate(lambda: torch.mm(left, right, out=out)) / 1e12
    sustained = tflops * SUSTAINED_SHARE
    value = f"{tflops:.3g} TFLOP/s ({size} x {size}); {sustained:.3g} expected over a step"
    yield Finding(kind, value, speeds={"bf16_tflops": sustained})
    for way, work in _frozen_matmuls(left, right):
        gain = GAIN_SHARE * rate(work) * 2 * size**3 / 1e12 / tflops
        value = f"frozen matmuls {gain:.3g}x as fast over a step as in {kind}"
        yield Finding(f"--matmul {way}", value, speeds={f"{way}_gain": gain})
    source, target = torch.ones(2, nbytes, dtype=torch.uint8, device=world.device)
    gbs = 2 * nbytes * rate(lambda: target.copy_(source)) / 1e9
    yield Finding("memory", f"{gbs:,.3g} GB/s", speeds={"memory_gbs": gbs})


def _frozen_matmuls(x: "torch.Tensor", y: "torch.Tensor") -> Iterator[tuple[str, Callable]]:
    """What `--matmul` can do on this GPU, and such a product x y^T, the codes of x included."""
    import torch

    from fsdp_qlora.model import matmul, skeleton

    def product(code: matmul.Code, pair: matmul.Pair) -> Any:
        return matmul.multiply(matmul.quantize_rows([x], code), pair, True)

    has_kernels = x.is_cuda and matmul.triton_kernels()
    major = torch.cuda.get_device_capability(x.device)[0] if has_kernels else 0
    for way, code in matmul.CODES.items():
        if major in skeleton.MAJORS[way]:
            codes, scales = matmul.quantize_rows([y], code._replace(block=0))
            yield way, partial(product, code, (codes, scales[:, 0]))
    if major in skeleton.MAJORS["fp16"]:
        yield "fp16", partial(matmul.plus_product, None, x, y.half().t())


def meet(world: "World") -> Iterator[Finding]:
    """Let the ranks meet and sum a megabyte."""
    from fsdp_qlora.distributed import world as worlds

    worlds.check_links(worlds.join(timeout_s=COLLECTIVE_S))
    by = "gloo" if world.device.type == "cpu" else "NCCL"
    yield Finding("meet", f"over {by}, sums are right")


def host_link(world: "World") -> Iterator[Finding]:
    """Pin memory, and measure the link from the host to the GPU, all GPUs at once."""
    import torch

    from fsdp_qlora.model import placement

    memory = placement.private(LINK_BYTES, pin=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=world.device)
    gbs = LINK_BYTES * rate(partial(there.copy_, memory.bytes, non_blocking=True)) / 1e9
    value = f"{gbs:.3g} GB/s to the GPU, all GPUs at once; pinned {LINK_BYTES // 2**20} MiB"
    yield Finding("host link", value, speeds={"host_link_gbs": gbs})


def gather(world: "World") -> Iterator[Finding]:
    """All-gather quantized bytes in float32, as FSDP does: whether they stay exact, how fast."""
    import torch

    nbytes = SIZES[world.device.type][2]

    def planted(number: int) -> torch.Tensor:  # every NaN, which careless copies rewrite
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    flat = planted(world.rank).to(world.device).view(torch.float32)
    received = world.share(flat).view(torch.uint8).cpu()
    wrong = [i for i in range(world.size) if not torch.equal(received[i], planted(i))]
    world.barrier()
    own_gbs = nbytes * (world.size - 1) * rate(lambda: world.share(flat), NUM_GATHERS) / 1e9
    others = set(range(world.size if world.device.type == "cuda" else 0)) - {world.rank}
    own_peers = os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0")
    own_peers &= all(torch.cuda.can_device_access_peer(world.rank, i) for i in others)
    every_wrong, gbs, peers = zip(*world.gather_objects((wrong, own_gbs, own_peers)), strict=True)
    if wrong_of := sorted({i for numbers in every_wrong for i in numbers}):
        value = f"bytes of rank {', '.join(map(str, wrong_of))} arrive changed"
        yield Finding("gather", value, REMEDIES["peers"], INTEGRITY)
    elif world.size > 1:
        value = f"bytes exact, {min(gbs):.3g} GB/s into each"
        value += "" if all(peers) else ", through the host (no peer access)"
        yield Finding("gather", value, speeds={"card_link_gbs": min(gbs) * all(peers)})


TASKS: dict[str, Callable[["World"], Iterator[Finding]]] = {
    "device": describe,
    **{name: partial(quantized, name) for name in ("nf4_dq", "fp4", "hqq4")},
    **{name: partial(kernel, name) for name in ("flash_attn", "liger_kernel")},
    **{"speed": speed, "meet": meet, "host link": host_link, "gather": gather},
}


if __name__ == "__main__":
    do_tasks(*sys.argv[1:])
