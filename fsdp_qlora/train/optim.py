"""Optimizer and learning rate schedule of the adapters."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from fsdp_qlora.config import Config


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def factor(name: str, step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the highest learning rate at optimizer step `step` (0-based).

    The rate rises linearly over the first `warmup_ratio` of the steps (never from zero); "constant"
    has no warmup, as in the reference.

    Args:
        name: row of SCHEDULES.
        step, num_steps: position and length of the run in optimizer steps.
        warmup_ratio: share of `num_steps`.

    Returns:
        Factor of the learning rate, 0 to 1.
    """
    warmup = 0 if name == "constant" else math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[name]((step - warmup) / max(num_steps - warmup, 1))


def build(
    params: list[torch.nn.Parameter], cfg: Config, num_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over this rank's slices of the adapters (one fused kernel), and its schedule.

    Args:
        params: this rank's slices, float32.
        cfg: lr, wd, lr_scheduler, warmup_ratio.
        num_steps: optimizer steps of the run.

    Returns:
        (optimizer, schedule to step after it).
    """
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.wd, fused=True)
    return optimizer, LambdaLR(
        optimizer, lambda step: factor(cfg.lr_scheduler, step, num_steps, cfg.warmup_ratio)
    )
