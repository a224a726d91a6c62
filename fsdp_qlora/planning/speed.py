"""A first estimate of time: seconds of an optimizer step by what they are spent on.

Source: the project's limits.md, section 2 (operations and bytes of a step); the three shares below
were measured on two H200 (recipes/*.md).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.hardware import Device
from fsdp_qlora.planning.limits import FORMATS
from fsdp_qlora.planning.memory import num_offloaded
from fsdp_qlora.planning.sizes import Setting, Sizes

MATMULS = "compute"
DEQUANTISE = "dequantisation"
HOST_LINK = "host link"
PEER_LINK = "GPU-to-GPU link"
LAUNCHES = "launch overhead"
BOUNDS = (MATMULS, DEQUANTISE, HOST_LINK, PEER_LINK, LAUNCHES)

UNPACK_SHARE = 0.4  # of memory bandwidth: 6.5e9 weights took 8.3 ms a pass
GATHER_SHARE = 0.55  # of the links, by FSDP's gathers: 70B, 2 x 512, no peer access: 2.35 s a step
STREAM_SHARE = 0.95  # of the host link, by weight streaming: 70B, 2 x 512: 1.36 s a step
ELEMENTWISE_SHARE = 0.75  # of memory bandwidth
LAUNCH_S = 0.004  # a layer and pass: 7B, 1 x 512: 0.41 s for 96 of them
KNOWN_ROWS = {"alpaca": 51_760, "guanaco": 9_846}
MAX_COUNTED_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Speed:
    """An estimate.

    Args:
        step_s: seconds of an optimizer step.
        tokens_per_s: of all ranks.
        bound: the bottleneck of most of the step, one of BOUNDS.
        parts_s: what each of BOUNDS would take alone.
    """

    step_s: float
    tokens_per_s: float
    bound: str
    parts_s: dict[str, float]


def estimate(s: Sizes, cfg: TrainConfig, setting: Setting, gpus: Sequence[Device]) -> Speed:
    """Estimate the time of an optimizer step; the slowest GPU sets the pace.

    Args:
        s: numbers of the model and its adapters.
        cfg: context, format, kind of recomputation.
        setting: batch, placements, levels.
        gpus: of all ranks, at least one.

    Returns:
        The estimate; copies are hidden behind computing where they are shorter, pass by pass.
    """
    num_tokens = setting.batch_size * cfg.context_length
    slowest: tuple[float, dict[str, float], dict[str, float]] = (0.0, {}, {})
    for gpu in set(gpus):
        ruled = dict.fromkeys(BOUNDS, 0.0)
        alone = dict.fromkeys(BOUNDS, 0.0)
        for parts in _passes(s, cfg, setting, gpu, num_tokens):
            gpu_s = parts[MATMULS] + parts[DEQUANTISE]
            worst = max((HOST_LINK, PEER_LINK, LAUNCHES), key=lambda name: parts[name])
            inside = max((MATMULS, DEQUANTISE), key=lambda name: parts[name])
            ruled[inside if gpu_s >= parts[worst] else worst] += max(gpu_s, parts[worst])
            alone = {name: alone[name] + parts[name] for name in BOUNDS}
        pass_s = sum(ruled.values()) * setting.accumulation + _optimizer_s(s, setting, gpu)
        slowest = max(slowest, (pass_s, ruled, alone), key=lambda found: found[0])
    step_s, ruled, alone = slowest
    return Speed(
        step_s=step_s,
        tokens_per_s=num_tokens * setting.accumulation * setting.num_ranks / step_s,
        bound=max(BOUNDS, key=lambda name: ruled[name]),
        parts_s={name: seconds * setting.accumulation for name, seconds in alone.items()},
    )


def _passes(
    s: Sizes, cfg: TrainConfig, setting: Setting, gpu: Device, tokens: int
) -> list[dict[str, float]]:
    """Seconds of forward and backward of one micro-batch, by what they are spent on."""
    matmuls = 2.0 * s.active * s.layers * tokens
    attention = 2.0 * s.layers * s.attention * cfg.context_length * tokens
    head = 2.0 * s.head * tokens
    lora = 2.0 * s.lora * s.layers * tokens
    weight_grads = 2.0 * s.num_trained(setting) * tokens - lora  # of what is trained itself
    num_full, num_selective = setting.count("full"), setting.count("selective")
    # A non-reentrant recomputation stops before the last matmul.
    left_out = 0 if cfg.reentrant_checkpointing else s.last / s.active
    again = (matmuls * (1 - left_out) + attention + lora) * num_full / s.layers
    item, flops = s.item / 2, gpu.bf16_tflops * 1e12
    forward_s = (matmuls + attention + 2 * head + lora) * item / flops
    backward_s = (matmuls + 2.5 * attention + 2 * lora + weight_grads + again) * item / flops
    # What selective layers recompute is elementwise: norms, rotary embedding, activation.
    features = 6 * s.hidden + s.gates + s.product
    elementwise = tokens * features * s.item * (num_full + num_selective)
    backward_s += elementwise / (ELEMENTWISE_SHARE * gpu.memory_gbs * 1e9)
    fmt = FORMATS[cfg.format_name]
    touched = (fmt.weight_bits / 8 + s.item) * s.weights * (fmt.scratch_bytes > 0)
    unpack_s = touched * s.layers / (UNPACK_SHARE * gpu.memory_gbs * 1e9)
    launch_s = LAUNCH_S * s.layers * (gpu.memory_gib > 0)
    rows = []
    for is_backward, matmul_s in ((False, forward_s), (True, backward_s)):
        num = 1 + num_full / s.layers if is_backward else 1.0
        host_s, peer_s = _copies(s, setting, gpu, is_backward)
        inputs = num_offloaded(cfg, setting.levels) * tokens * s.hidden * s.item
        host_s += inputs / (gpu.host_link_gbs * 1e9)
        parts = (matmul_s, unpack_s * num, host_s, peer_s, launch_s * num)
        rows.append(dict(zip(BOUNDS, parts, strict=True)))
    return rows


def _copies(s: Sizes, setting: Setting, gpu: Device, is_backward: bool) -> tuple[float, float]:
    """Seconds of one pass on the link to the host, and on the link between GPUs."""
    host_bytes_s, ranks = gpu.host_link_gbs * 1e9, setting.num_ranks
    peer_bytes_s = (gpu.peer_gbs or gpu.host_link_gbs) * 1e9
    others = 1 - 1 / ranks
    is_kept = is_backward and setting.keeps_gathered
    grouped = 0 if is_kept else setting.count("sharded", "offloaded")
    sliced = 0 if is_kept else setting.count("offloaded")
    gathered = grouped * s.layer_bytes * others
    if setting.shares > 1:
        adapters = s.num_trained(setting) * (2 + 4 * is_backward)  # 16 bit gathered, 32 reduced
        ends = (1 if is_backward else 2) * s.head * s.item  # the embedding takes no part backwards
        gathered += (adapters + ends) * others
    host_s = setting.count("streamed") * s.layer_bytes / (STREAM_SHARE * host_bytes_s)
    slice_s = sliced * s.layer_bytes / ranks / host_bytes_s / GATHER_SHARE
    peer_s = gathered / peer_bytes_s / GATHER_SHARE
    host_s += slice_s + (peer_s if sliced else 0.0)  # a layer's slices come before its gather
    if gpu.peer_gbs:
        return host_s, peer_s
    total_s = host_s + (0.0 if sliced else peer_s)  # all cross the one link
    return (total_s, 0.0) if host_s > peer_s else (0.0, total_s)


def _optimizer_s(s: Sizes, setting: Setting, gpu: Device) -> float:
    """AdamW reads and writes weights, gradients and two moments once."""
    nbytes = 28.0 * s.num_trained(setting) / setting.shares
    return nbytes / (ELEMENTWISE_SHARE * gpu.memory_gbs * 1e9)


def num_rows(cfg: TrainConfig) -> int | None:
    """Rows of the data set, where they are known or quickly counted.

    Args:
        cfg: dataset, dataset_samples.

    Returns:
        Their number; None for a data set that would have to be read.
    """
    if cfg.dataset in ("dummy", "alpaca_sample", "orca_math"):
        return cfg.dataset_samples
    path = Path(os.path.expanduser(cfg.dataset))  # unlike pathlib's these raise nothing
    is_jsonl = path.suffix == ".jsonl" and os.path.isfile(path)
    if not is_jsonl or path.stat().st_size > MAX_COUNTED_BYTES:
        return KNOWN_ROWS.get(cfg.dataset)
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())


def num_steps(cfg: TrainConfig, setting: Setting) -> int | None:
    """Optimizer steps of the run; None where they depend on rows that are not known.

    Args:
        cfg: max_steps, num_epochs, eval_samples, the data set.
        setting: rows of a step.
    """
    rows = num_rows(cfg)
    if cfg.max_steps > 0 or rows is None:
        return cfg.max_steps if cfg.max_steps > 0 else None
    rows_per_step = setting.batch_size * setting.accumulation * setting.num_ranks
    return math.ceil(max(rows - cfg.eval_samples, 1) / rows_per_step) * cfg.num_epochs
