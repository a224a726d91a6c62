"""What `doctor` measures on one device: products, memory, links; and whether kernels are right.

Shape letters: M rows, O out features, I in features, B batch, T tokens, H heads, D head size.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from fsdp_qlora import hardware
from fsdp_qlora.config import PRECISIONS
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY
from fsdp_qlora.hardware import versions
from fsdp_qlora.model import host
from fsdp_qlora.model.quantize import FORMATS, GROUP_SIZE, NESTED_BLOCK, Fields, Format, dynamic_map
from fsdp_qlora.train.doctor.findings import Finding, first_line, ok, problem, warning
from fsdp_qlora.training.memory import GIB

MIB = 2**20
BF16_CAPABILITY = (8, 0)
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 512 * MIB, "cpu": 256 * MIB}
PIN_BYTES, LINK_BYTES, PEER_BYTES = GIB, 256 * MIB, 64 * MIB
MIN_S = 0.3
# Of a large product, over a whole step: H200, 490 of 790 TFLOP/s (see hardware).
SUSTAINED_SHARE = 0.62
FREE_SHARE = 0.85  # of a card that nothing else uses; the rest is the driver's
MAX_WEIGHT_ERROR = 1e-5  # of the largest weight, in float32
MAX_PRODUCT_ERROR = 0.01  # in bf16, relative
MAX_CODE_ERROR = 0.15  # of a 4-bit code on normal weights: NF4 0.09, FP4 0.12
CODES = {
    # QLoRA, arXiv 2305.14314, appendix E.
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # Sign, two bits of exponent, one of mantissa, over the largest; bitsandbytes' table.
    "fp4": tuple(
        sign * value / 192 for sign in (1, -1) for value in (0, 1, 128, 192, 64, 96, 32, 48)
    ),
}


def label(device: torch.device) -> str:
    """What findings call a device: "CPU" or "card 0"."""
    return "CPU" if device.type == "cpu" else f"card {device.index}"


def card_name(device: torch.device) -> str:
    """The name under which hardware looks for the speeds of a device."""
    return hardware.CPU.name if device.type == "cpu" else torch.cuda.get_device_name(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on cards that have no products of it."""
    has_bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.bfloat16 if has_bf16 else torch.float16


def describe(device: torch.device) -> Iterator[Finding]:
    """What a card is, whether this torch has kernels for it, and how much of it is free.

    Args:
        device: a card.
    """
    name, known = label(device), versions(device)
    major, minor = torch.cuda.get_device_capability(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    value = f"{known['card']}, {total_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} free, "
    value += f"capability {major}.{minor}, driver {known['driver']}, CUDA {known['cuda']}"
    if free_bytes < FREE_SHARE * total_bytes:
        yield warning(name, value, "nvidia-smi names the programs that hold the rest: end them")
    else:
        yield ok(name, value)
    if not has_kernels((major, minor), torch.cuda.get_arch_list()):
        value = f"torch {torch.__version__} has no kernels for sm_{major}{minor}"
        remedy = "install its build for another CUDA: pip install torch --index-url "
        remedy += "https://download.pytorch.org/whl/cu126 (older cards; pytorch.org lists all)"
        yield problem(name, value, remedy, ENVIRONMENT)
    if (major, minor) < BF16_CAPABILITY:
        usable = [word for word in PRECISIONS if "bf16" not in word]
        yield warning(f"{name} bf16", "has no products of it", f"--precision {' or '.join(usable)}")


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build of torch runs on a card.

    Args:
        capability: of the card.
        architectures: that torch was built for: "sm_86" runs on 8.6 to 8.9, "compute_80" on 8.0
            and all later ones.
    """
    for text in architectures:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", text):
            major, minor = int(found[2]), int(found[3])
            is_same = major == capability[0] and minor <= capability[1]
            if is_same or (found[1] == "compute" and (major, minor) <= capability):
                return True
    return False


def four_bit(
    device: torch.device, name: str = "nf4_dq", fmt: Format | None = None
) -> Iterator[Finding]:
    """Pack a weight, unpack it, multiply with it, and compare with the same in float64.

    Args:
        device: where.
        name: row of FORMATS.
        fmt: the row itself, should it not be that of the table.
    """
    row, where = fmt or FORMATS[name], f"{label(device)} {name}"
    if name.startswith("hqq") and importlib.util.find_spec("hqq") is None:
        return
    generator = torch.Generator().manual_seed(0)
    weight_OI = (torch.randn(256, 512, generator=generator) * 0.02).bfloat16()
    x_MI = torch.randn(64, 512, generator=generator)
    arrays = row.pack(weight_OI.to(device))
    exact_OI = reference(name, {key: array.cpu() for key, array in arrays.items()})
    exact_OI = exact_OI.view(weight_OI.shape)
    packed, dtype = arrays.pop("weight"), compute_dtype(device)

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        constants = row.constants(arrays, dtype)
        return row.unpack(packed, constants, weight_OI.shape, dtype)

    x_MI = x_MI.to(dtype)
    product = (x_MI.to(device) @ unpack(dtype).t()).cpu().double()
    product_error = _relative(product, x_MI.double() @ exact_OI.t())
    off_OI = (unpack(torch.float32).cpu().double() - exact_OI).abs()
    weight_error = float(off_OI.max() / exact_OI.abs().max())
    code_error = _relative(exact_OI, weight_OI.double())
    value = f"weights off by {weight_error:.0e}, product by {product_error:.1e}, "
    value += f"rounding to 4 bits {code_error:.2f}"
    is_good = weight_error <= MAX_WEIGHT_ERROR and product_error <= MAX_PRODUCT_ERROR
    if is_good and code_error <= MAX_CODE_ERROR:
        yield ok(where, value)
    else:
        library = "hqq" if name.startswith("hqq") else "bitsandbytes"
        code = 0 if library == "hqq" else INTEGRITY
        yield problem(where, f"wrong: {value}", f"pip install --upgrade {library}", code)


def reference(name: str, fields: Fields) -> torch.Tensor:
    """Decode the fields of one linear in float64, without the libraries' kernels.

    Args:
        name: row of FORMATS.
        fields: what its `pack` gave, on the host; whole blocks.

    Returns:
        The weights, flat.

    Source: see model.quantize.
    """
    high, low = fields["weight"] >> 4, fields["weight"] & 15
    if name.startswith("hqq"):
        nibbles = torch.cat((high, low)).view(-1, GROUP_SIZE).double()
        zero, scale = (fields[key].double().unsqueeze(1) for key in ("zero", "scale"))
        return ((nibbles - zero) * scale).view(-1)
    code = torch.tensor(CODES[name[:3]], dtype=torch.float64)
    nibbles = torch.stack((high, low), 1).view(-1, GROUP_SIZE).long()
    if "absmax" in fields:
        absmax = fields["absmax"].double()
    else:
        nested = fields["nested_absmax"].double().repeat_interleave(NESTED_BLOCK)
        offset = fields["offset"].double().repeat_interleave(NESTED_BLOCK)
        steps = dynamic_map(torch.device("cpu")).double()[fields["qabsmax"].long()]
        absmax = steps * nested[: steps.numel()] + offset[: steps.numel()]
    return (code[nibbles] * absmax.unsqueeze(1)).view(-1)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def flash_attention(device: torch.device) -> Iterator[Finding]:
    """Whether flash-attn, where it is installed, is right; a run would choose it."""
    if importlib.util.find_spec("flash_attn") is None:
        return
    name = f"{label(device)} flash-attn"
    if torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        yield warning(name, "runs on cards from capability 8.0 on", "--attn sdpa")
        return
    q_BTHD, k_BTHD, v_BTHD = torch.randn(3, 2, 128, 4, 64, device=device).bfloat16()
    try:
        from flash_attn import flash_attn_func

        found = flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True)
    except Exception as error:  # built for another torch, as a rule
        remedy = (
            "build it for this torch (pip install --force-reinstall flash-attn), or --attn sdpa"
        )
        yield problem(name, first_line(error), remedy, ENVIRONMENT)
        return
    q, k, v = (t.double().cpu().transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield _judged(name, found.double().cpu().transpose(1, 2), exact, "--attn sdpa")


def liger(device: torch.device) -> Iterator[Finding]:
    """Whether Liger's kernels, where they are installed, are right; a run would choose them."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    name, size = f"{label(device)} liger", 1024
    try:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        x_MI = torch.randn(64, size, device=device).to(compute_dtype(device))
        norm = LigerRMSNorm(size, eps=1e-6).to(device=device, dtype=x_MI.dtype)
        with torch.no_grad():
            found = norm(x_MI).double().cpu()
    except Exception as error:  # Triton needs a C compiler, and knows newer cards only
        remedy = "install a C compiler (Triton needs one), or --liger off"
        yield problem(name, first_line(error), remedy, ENVIRONMENT)
        return
    x = x_MI.double().cpu()
    exact = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    yield _judged(name, found, exact, "--liger off")


def _judged(name: str, found: torch.Tensor, exact: torch.Tensor, without: str) -> Finding:
    error = _relative(found, exact)
    if error <= MAX_PRODUCT_ERROR:
        return ok(name, f"right within {error:.1e}")
    return problem(name, f"wrong by {error:.1e}", without, INTEGRITY)


def rate(work: Callable[[], object], device: torch.device) -> float:
    """How often a second something can be done.

    Args:
        work: puts something on the device's queue.
        device: where.
    """
    work()
    num = 1
    while True:
        _wait(device)
        began_s = time.perf_counter()
        for _ in range(num):
            work()
        _wait(device)
        seconds = time.perf_counter() - began_s
        if seconds >= MIN_S:
            return num / seconds
        num = int(num * min(max(2, 1.2 * MIN_S / max(seconds, 1e-6)), 64))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(device: torch.device) -> Iterator[Finding]:
    """Speed of a large product; the plan reckons with what a whole step keeps of it."""
    size, dtype = PRODUCT_SIZE[device.type], compute_dtype(device)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    tflops = 2 * size**3 * rate(lambda: torch.mm(left, right, out=out), device) / 1e12
    kept = tflops * SUSTAINED_SHARE
    value = f"{tflops:.3g} TFLOP/s ({size} x {size}); {kept:.3g} expected over a step"
    name = f"{label(device)} {str(dtype).rpartition('.')[2]}"
    yield ok(name, value, card_name(device), bf16_tflops=kept)


def bandwidth(device: torch.device) -> Iterator[Finding]:
    """Speed of a device's own memory, read and written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gbs = 2 * source.numel() * rate(lambda: target.copy_(source), device) / 1e9
    yield ok(f"{label(device)} memory", f"{gbs:,.3g} GB/s", card_name(device), memory_gbs=gbs)


def host_links(
    device: torch.device, memory: host.HostBytes, seconds: float, in_step: Callable[[], None]
) -> Iterator[Finding]:
    """Speed between pinned host memory and a card, each way, all cards at once.

    Args:
        device: a card.
        memory: pinned.
        seconds: it took to pin it.
        in_step: waits for the other ranks.
    """
    pinned = memory.bytes[:LINK_BYTES]
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    name = label(device)
    yield ok(f"{name} pinning", f"{memory.pinned_bytes / GIB:.0f} GiB in {seconds:.2f} s")
    in_step()
    to_gbs = LINK_BYTES * rate(lambda: there.copy_(pinned, non_blocking=True), device) / 1e9
    in_step()
    from_gbs = LINK_BYTES * rate(lambda: pinned.copy_(there, non_blocking=True), device) / 1e9
    value = f"{to_gbs:.3g} GB/s to the card, {from_gbs:.3g} back, all cards at once"
    yield ok(f"{name} host link", value, card_name(device), host_link_gbs=to_gbs)


def has_peers(device: torch.device) -> bool:
    """Whether a device reads the memory of every other card, and NCCL is not told to do without."""
    if device.type == "cpu":
        return True
    others = (i for i in range(torch.cuda.device_count()) if i != device.index)
    is_told = os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")
    return not is_told and all(torch.cuda.can_device_access_peer(device, i) for i in others)


def peer_copies(device: torch.device) -> Iterator[Finding]:
    """Copy from every other card and compare the bytes; consumer cards are known to fail here.

    Args:
        device: a card.
    """
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    speeds, wrong, without = [], [], []
    for other in others:
        source = torch.randint(0, 256, (PEER_BYTES,), dtype=torch.uint8, device=f"cuda:{other}")
        target = torch.empty(PEER_BYTES, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(other)
        speeds.append(PEER_BYTES * rate(partial(target.copy_, source), device) / 1e9)
        if not torch.equal(target.cpu(), source.cpu()):
            wrong.append(str(other))
        if not torch.cuda.can_device_access_peer(device, other):
            without.append(str(other))
    if not others:
        return
    name = f"{label(device)} from others"
    access = f"no peer access to {', '.join(without)}" if without else "peer access"
    value = f"{min(speeds):.3g} GB/s at least, {access}"
    if wrong:
        remedy = "switch the IOMMU (ACS) off in the BIOS, or export NCCL_P2P_DISABLE=1"
        value = f"bytes from card {', '.join(wrong)} arrive changed; {value}"
        yield problem(name, value, remedy, INTEGRITY)
    else:
        yield ok(name, f"bytes exact, {value}")
