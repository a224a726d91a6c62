"""What the ranks of `doctor` try: GPUs, 4-bit formats, kernels, links, collectives, speeds.

A rank appends JSON lines to a file, one before each task and one for each finding, so that what it
found before a crash or a hang counts.

Shape letters: M rows, O out features, I in features, B batch, T tokens, H heads, D head size.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora import hardware
from fsdp_qlora.distributed import world as worlds
from fsdp_qlora.doctor.command import MIB, PROBLEM, TOGETHER, WARNING, Finding, attempt, limited
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY
from fsdp_qlora.hardware import GIB
from fsdp_qlora.model import streaming
from fsdp_qlora.model.quantize import FORMATS, Format

NO_P2P = "export NCCL_P2P_DISABLE=1, or start one rank (--world_size 1)"
COLLECTIVE_S, MIN_S = 60.0, 0.3
LINK_BYTES, PEER_BYTES = 256 * MIB, 64 * MIB
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 512 * MIB, "cpu": 256 * MIB}
GATHER_BYTES = {"cuda": 128 * MIB, "cpu": 16 * MIB}
NUM_GATHERS = {"cuda": 20, "cpu": 2}
SUSTAINED_SHARE = 0.62  # of a large matmul, over a whole step: H200, 490 of 790 TFLOP/s
# Relative: of weights in float32, of a matmul in 16 bit, of the code (NF4 0.09, FP4 0.12).
MAX_ERRORS = (1e-5, 0.01, 0.15)


@dataclasses.dataclass
class TrialRank:
    """This process, and the device that it tries.

    Attributes:
        number, size: this rank, and how many there are.
        device: torch.device.
        dtype: bfloat16, or float16 on GPUs without matmuls of it.
        device_name: under which hardware looks for its speeds.
        flip: (rank, byte) to spoil before it is sent, so that the test has something to find.
        world: the ranks, once they have met.
    """

    number: int
    size: int
    device: torch.device
    dtype: torch.dtype
    device_name: str
    flip: tuple[int, int] | None = None
    world: Any = None

    def name(self, task: str) -> str:
        """What findings call a task: of all ranks together, or of this rank's device."""
        if task in TOGETHER:
            return f"{self.size} {'CPU ranks' if self.device.type == 'cpu' else 'GPUs'} {task}"
        return f"{'CPU' if self.device.type == 'cpu' else f'GPU {self.number}'} {task}"


def main(text: str) -> None:
    """Do all tasks of a job as the rank that the environment names, then leave at once.

    Args:
        text: the job as JSON, see `run_ranks`.
    """

    job, number, size = json.loads(text), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank = TrialRank(
        number, size, torch.device("cpu"), torch.bfloat16, hardware.CPU.name, job["flip"]
    )
    with Path(job["place"], f"{number}.jsonl").open("w", buffering=1) as out:
        if job["kind"] == "cuda":
            remedy = "update the driver, or install the build of torch for it (pytorch.org)"
            failed = attempt("GPUs in torch", lambda: use_gpu(rank), remedy, ENVIRONMENT)
            out.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in failed)
            job["tasks"] = [] if failed else job["tasks"]
        for index, task in enumerate(job["tasks"]):
            out.write(json.dumps({"begins": index}) + "\n")
            rows = do_task(rank, task)
            out.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        out.write(json.dumps({"begins": None}) + "\n")
    os._exit(DONE)  # a peer may hold the group


def use_gpu(rank: TrialRank) -> list[Finding]:
    """Give a rank its GPU.

    Args:
        rank: gets device, dtype, device_name.

    Returns:
        Nothing; a failure is raised.
    """

    rank.device = torch.device("cuda", rank.number)
    torch.cuda.set_device(rank.device)
    rank.device_name = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability() < hardware.FIRST_WITH_BF16:
        rank.dtype = torch.float16
    return []


def do_task(rank: TrialRank, task: str) -> list[Finding]:
    """Do one task; its failure is a finding.

    Args:
        rank: this one.
        task: key of TASKS.
    """
    if rank.device.type == "cpu" and rank.number and task not in TOGETHER:
        return []  # the ranks share the CPU: the first one tries it
    check, remedy, code = TASKS[task]
    return attempt(rank.name(task), lambda: check(rank), remedy, code)


def describe(rank: TrialRank) -> Iterator[Finding]:
    """What a GPU is, how much of it is free, and whether this torch has kernels for it."""

    major, minor = torch.cuda.get_device_capability()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    value = f"{rank.device_name}, {total_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} free, "
    value += f"capability {major}.{minor}, driver {hardware.driver_version()}, "
    value += f"CUDA {torch.version.cuda or torch.version.hip}"
    remedy = "nvidia-smi names the programs that hold the rest: end them"
    yield limited(rank.name("device"), value, remedy, free_bytes < 0.85 * total_bytes)
    if rank.dtype == torch.float16:
        remedy = "--precision fp16_autocast or fp32"
        yield Finding(rank.name("bf16"), "has no matmuls of it", remedy, WARNING)
    torch.ones(8, device=rank.device).sum().item()  # raises where this torch has no kernels for it


def four_bit(rank: TrialRank) -> Iterator[Finding]:
    """Every 4-bit format that is installed, on this rank's device."""
    for name in ("nf4_dq", "fp4", "hqq4"):
        library = "hqq" if name == "hqq4" else "bitsandbytes"
        if name != "hqq4" or importlib.util.find_spec(library) is not None:
            check, code = partial(quantized, rank, name), ENVIRONMENT * (name != "hqq4")
            yield from attempt(rank.name(name), check, f"reinstall {library}", code)


def quantized(rank: TrialRank, name: str, fmt: Format | None = None) -> Iterator[Finding]:
    """Quantize a weight, multiply with it, and compare with its decoding on the CPU.

    Args:
        rank: this one.
        name: row of quantize.FORMATS.
        fmt: another row, for the test.
    """

    generator, row = torch.Generator().manual_seed(0), fmt or FORMATS[name]
    weight_OI = (torch.randn(256, 512, generator=generator) * 0.02).bfloat16()
    x_MI = torch.randn(64, 512, generator=generator).to(rank.dtype)
    fields = row.quantize(weight_OI.to(rank.device))

    def decoded(row: Format, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        own = {key: field.to(device) for key, field in fields.items()}
        packed = own.pop("weight")
        return row.dequantize(packed, row.constants(own, dtype), weight_OI.shape, dtype)

    exact_OI = decoded(FORMATS[name], "cpu", torch.float32).double()
    weight_error = _relative(decoded(row, rank.device, torch.float32).cpu(), exact_OI)
    product_MO = (x_MI.to(rank.device) @ decoded(row, rank.device, rank.dtype).t()).cpu()
    product_error = _relative(product_MO, x_MI.double() @ exact_OI.t())
    code_error = _relative(exact_OI, weight_OI.double())
    errors = (weight_error, product_error, code_error)
    value = "weights off by {:.0e}, matmul by {:.1e}, rounding to 4 bits {:.2f}".format(*errors)
    library, code = ("hqq", DONE) if name.startswith("hqq") else ("bitsandbytes", INTEGRITY)
    if all(error <= limit for error, limit in zip(errors, MAX_ERRORS, strict=True)):
        yield Finding(rank.name(name), value)
    else:
        remedy = f"pip install --upgrade {library}"
        yield Finding(rank.name(name), f"wrong: {value}", remedy, PROBLEM, code)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def kernels(rank: TrialRank) -> Iterator[Finding]:
    """Whether flash-attn and Liger run, where they are installed; a run would choose them."""

    x_BTHD = torch.randn(2, 128, 4, 64, device=rank.device).to(rank.dtype)

    def flash() -> torch.Tensor:
        return import_module("flash_attn").flash_attn_func(x_BTHD, x_BTHD, x_BTHD, causal=True)

    def liger() -> torch.Tensor:
        module = import_module("liger_kernel.transformers.rms_norm")
        return module.LigerRMSNorm(64).to(device=rank.device, dtype=rank.dtype)(x_BTHD)

    trials = {"flash_attn": (flash, "--attn sdpa"), "liger_kernel": (liger, "--liger off")}
    for package, (trial, without) in trials.items():
        if importlib.util.find_spec(package) is not None:
            name, remedy = rank.name(package), f"reinstall it for this torch, or {without}"
            yield from attempt(name, partial(_tried, name, trial), remedy, ENVIRONMENT)


def _tried(name: str, trial: Callable[[], torch.Tensor]) -> list[Finding]:
    if not trial().isfinite().all():
        raise ArithmeticError("the results are not finite")
    return [Finding(name, "runs")]


def rate(work: Callable[[], object], device: torch.device) -> float:
    """How often a second something can be done.

    Args:
        work: puts something on the device's queue.
        device: where.
    """

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    num, seconds = 1, 0.0
    while seconds < MIN_S:
        num = int(num * min(max(2, 1.2 * MIN_S / max(seconds, 1e-6)), 64)) if seconds else 1
        wait()
        began_s = time.perf_counter()
        for _ in range(num):
            work()
        wait()
        seconds = time.perf_counter() - began_s
    return num / seconds


def speed(rank: TrialRank) -> Iterator[Finding]:
    """Speed of matmuls and memory of this rank's device; a CPU with all its cores."""

    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size, kind = MATMUL_SIZE[rank.device.type], str(rank.dtype).rpartition(".")[2]
    left, right = torch.randn(2, size, size, device=rank.device).to(rank.dtype)
    out = torch.empty_like(left)
    tflops = 2 * size**3 * rate(lambda: torch.mm(left, right, out=out), rank.device) / 1e12
    sustained = tflops * SUSTAINED_SHARE
    value = f"{tflops:.3g} TFLOP/s ({size} x {size}); {sustained:.3g} expected over a step"
    speeds = {"bf16_tflops": sustained}
    yield Finding(rank.name(kind), value, device=rank.device_name, speeds=speeds)
    source = torch.ones(COPY_BYTES[rank.device.type], dtype=torch.uint8, device=rank.device)
    target = torch.empty_like(source)
    gbs = 2 * source.numel() * rate(lambda: target.copy_(source), rank.device) / 1e9
    torch.set_num_threads(num_threads)
    speeds = {"memory_gbs": gbs}
    yield Finding(rank.name("memory"), f"{gbs:,.3g} GB/s", device=rank.device_name, speeds=speeds)


def meet(rank: TrialRank) -> Iterator[Finding]:
    """Let the ranks meet; world.join checks a sum on GPUs, this one everywhere."""

    rank.world = worlds.join(None, 0, COLLECTIVE_S)
    total = rank.world.sum_(torch.full((2**18,), rank.number + 1.0, device=rank.device))
    is_right = bool((total == rank.size * (rank.size + 1) / 2).all())
    by = "gloo" if rank.device.type == "cpu" else "NCCL"
    if all(rank.world.gather_objects(is_right)):
        yield Finding(rank.name("meet"), f"over {by}, sums are right")
    else:
        value = f"sums over {by} are wrong"
        yield Finding(rank.name("meet"), value, NO_P2P, PROBLEM, INTEGRITY)


def host_link(rank: TrialRank) -> Iterator[Finding]:
    """Pin memory, and measure the link between host and GPU, each way, all GPUs at once."""

    began_s = time.perf_counter()
    memory = streaming.private(LINK_BYTES, pin=True)
    pin_s = time.perf_counter() - began_s
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=rank.device)
    both = []
    for target, source in ((there, memory.bytes), (memory.bytes, there)):
        copy = partial(target.copy_, source, non_blocking=True)
        both.append(LINK_BYTES * rate(copy, rank.device) / 1e9)
    value = f"{both[0]:.3g} GB/s to the GPU, {both[1]:.3g} back, all GPUs at once; "
    value += f"pinned {LINK_BYTES // MIB} MiB in {pin_s:.2f} s"
    speeds = {"host_link_gbs": both[0]}
    yield Finding(rank.name("host link"), value, device=rank.device_name, speeds=speeds)


def gather(rank: TrialRank) -> Iterator[Finding]:
    """All-gather quantized bytes in float32, as FSDP does: whether they stay exact, how fast."""

    nbytes = GATHER_BYTES[rank.device.type]

    def planted(
        number: int,
    ) -> torch.Tensor:  # random bytes hold every NaN, which careless copies rewrite
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    own = planted(rank.number)
    if rank.flip is not None and rank.flip[0] == rank.number:
        own[rank.flip[1]] ^= 1
    flat, seconds = own.to(rank.device).view(torch.float32), []
    received = rank.world.share(flat).view(torch.uint8).cpu()
    wrong = [i for i in range(rank.size) if not torch.equal(received[i], planted(i))]
    for _ in range(3):
        rank.world.barrier()
        began_s = time.perf_counter()
        for _ in range(num := NUM_GATHERS[rank.device.type]):
            every = rank.world.share(flat)
        float(every[-1, -1])  # waits for the device
        seconds.append((time.perf_counter() - began_s) / num)
    gbs, is_cpu = nbytes * (rank.size - 1) / min(seconds) / 1e9, rank.device.type == "cpu"
    others = [i for i in range(rank.size) if i != rank.number]
    has_peers = is_cpu or all(torch.cuda.can_device_access_peer(rank.number, i) for i in others)
    has_peers &= os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0")
    rows = rank.world.gather_objects((wrong, gbs, has_peers))
    if wrong_of := sorted({i for row in rows for i in row[0]}):
        value = f"bytes of rank {', '.join(map(str, wrong_of))} arrive changed"
        yield Finding(rank.name("gather"), value, NO_P2P, PROBLEM, INTEGRITY)
    elif others:
        gbs, has_peers = min(row[1] for row in rows), all(row[2] for row in rows)
        value = f"bytes exact, {gbs:.3g} GB/s into each"
        value += "" if has_peers else ", through the host (no peer access)"
        speeds = {"card_link_gbs": gbs if has_peers else 0.0}
        yield Finding(rank.name("gather"), value, device=rank.device_name, speeds=speeds)


def from_others(rank: TrialRank) -> Iterator[Finding]:
    """Copy from every other GPU and compare the bytes; consumer GPUs are known to fail here."""

    speeds, wrong = [], []
    for other in (i for i in range(rank.size) if i != rank.number):
        source = torch.randint(0, 256, (PEER_BYTES,), dtype=torch.uint8, device=f"cuda:{other}")
        target = torch.empty_like(source, device=rank.device)
        torch.cuda.synchronize(other)
        speeds.append(PEER_BYTES * rate(partial(target.copy_, source), rank.device) / 1e9)
        wrong += [] if torch.equal(target.cpu(), source.cpu()) else [str(other)]
    if wrong:
        remedy = "switch the IOMMU (ACS) off in the BIOS, or export NCCL_P2P_DISABLE=1"
        value = f"bytes from GPU {', '.join(wrong)} arrive changed"
        yield Finding(rank.name("from others"), value, remedy, PROBLEM, INTEGRITY)
    elif speeds:
        yield Finding(rank.name("from others"), f"bytes exact, {min(speeds):.3g} GB/s at least")


# Name -> what to do, remedy and exit code when it fails.
TASKS: dict[str, tuple[Callable[[TrialRank], Iterator[Finding]], str, int]] = {
    "device": (describe, "install a torch built for this GPU (pytorch.org)", ENVIRONMENT),
    "4-bit": (four_bit, "see the message", DONE),
    "kernels": (kernels, "see the message", DONE),
    "speed": (speed, "end other programs", DONE),
    "meet": (meet, NO_P2P, ENVIRONMENT),
    "host link": (host_link, "raise the limit (ulimit -l unlimited)", ENVIRONMENT),
    "gather": (gather, NO_P2P, ENVIRONMENT),
    "from others": (from_others, NO_P2P, DONE),
}


if __name__ == "__main__":
    main(sys.argv[1])
