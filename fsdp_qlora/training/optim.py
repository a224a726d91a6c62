"""Optimizer and learning rate schedule of what is trained."""

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fsdp_qlora.config import OPTIMIZERS, TrainConfig, check_optimizer

# Last parts of names that no weight decay pulls on: there is nothing small about a good norm.
NO_DECAY = (".bias", "norm.weight", "magnitude")


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def factor(name: str, step: int, num_steps: int, warmup: int | float) -> float:
    """Share of the highest learning rate at optimizer step `step` (0-based).

    The rate rises linearly over the warmup (never from zero); "constant" has none, as in the
    reference.

    Args:
        name: row of SCHEDULES.
        step, num_steps: position and length of the run in optimizer steps.
        warmup: steps; a float is a share of `num_steps`.

    Returns:
        Factor of the learning rate, 0 to 1.
    """
    if name == "constant":
        warmup = 0
    elif isinstance(warmup, float):
        warmup = math.ceil(warmup * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[name]((step - warmup) / max(num_steps - warmup, 1))


# Module, class, options. A fused kernel reads on the device whether the step is to be skipped.
KINDS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "adamw": ("torch.optim", "AdamW", {"fused": True}),
    "adam": ("torch.optim", "Adam", {"fused": True}),
    "sgd": ("torch.optim", "SGD", {"fused": True}),
    "adadelta": ("torch.optim", "Adadelta", {}),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "paged_adamw": ("bitsandbytes.optim", "PagedAdamW", {}),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit", {}),
}


def build(
    params: list[torch.nn.Parameter], cfg: TrainConfig, num_steps: int, names: Sequence[str] = ()
) -> tuple[Optimizer, LambdaLR]:
    """The optimizer over this rank's slices of what is trained, and its schedule.

    Args:
        params: this rank's slices, float32.
        cfg: optimizer, lr, wd, lr_scheduler, warmup_steps.
        num_steps: optimizer steps of the run.
        names: of `params` in the model, for what NO_DECAY leaves alone; none: all decay.

    Returns:
        (optimizer, schedule to step after it).

    Raises:
        UserError: the optimizer needs a CUDA GPU (code 3).
    """
    check_optimizer(cfg.optimizer, params[0].device.type == "cuda")
    wd = cfg.wd if OPTIMIZERS[cfg.optimizer].decays else 0.0
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for param, name in zip(params, names or [""] * len(params), strict=True):
        groups.setdefault(0.0 if name.endswith(NO_DECAY) else wd, []).append(param)
    module, kind, options = KINDS[cfg.optimizer]
    optimizer: Optimizer = getattr(importlib.import_module(module), kind)(
        [{"params": own, "weight_decay": decay} for decay, own in groups.items()],
        lr=cfg.lr,
        **options,
    )
    return optimizer, LambdaLR(
        optimizer, lambda step: factor(cfg.lr_scheduler, step, num_steps, cfg.warmup_steps)
    )


def scale_updates(optimizer: Optimizer, slices: Sequence[torch.Tensor], ratio: float) -> None:
    """Let some elements of the parameters move `ratio` times as far: a learning rate of their own.

    Every optimizer here moves an element by lr times something that no other element's lr enters.

    Args:
        optimizer: from `build`.
        slices: views of its parameters.
        ratio: of the learning rates.

    Source: LoRA+, arXiv 2402.12354, section 4.
    """
    before: list[torch.Tensor] = []

    def keep(*_) -> None:
        before[:] = [part.clone() for part in slices]

    def scale(*_) -> None:
        torch._foreach_lerp_(before, list(slices), ratio)
        torch._foreach_copy_(list(slices), before)
        before.clear()

    if slices:
        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(scale)


def clip(
    grads: Sequence[torch.Tensor],
    norm: torch.Tensor,
    max_norm: float | None,
    scale: torch.Tensor | None = None,
) -> None:
    """Undo the loss scale, and scale gradients so that their global norm is at most `max_norm`.

    Args:
        grads: this rank's, changed in place.
        norm: of the whole gradient without the loss scale, 0-d on its device.
        max_norm: None: as they are.
        scale: of the loss, 0-d; None: 1.

    Source: torch.nn.utils.clip_grad_norm_, the 1e-6 included.
    """
    share = torch.ones_like(norm)
    if max_norm is not None:
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if scale is not None:
        share = share / scale
    if max_norm is not None or scale is not None:
        torch._foreach_mul_(list(grads), share)


def step(optimizer: Optimizer, is_bad: torch.Tensor) -> None:
    """Take a step, or none: parameters and moments then stay as they are, bit for bit.

    Args:
        optimizer: from `build`, with gradients.
        is_bad: 1 for none, else 0; 0-d float32. Fused kernels read it on the device (the way of
            torch.amp.GradScaler); for the other optimizers the host waits for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = is_bad  # type: ignore[attr-defined]
    elif is_bad.item():
        return
    optimizer.step()


def state_gib(optimizer: Optimizer | None, only_paged: bool = False) -> float:
    """What an optimizer keeps, tensor by tensor.

    Args:
        optimizer: None: nothing yet.
        only_paged: what bitsandbytes lets the driver move to the host and back; torch's allocator
            does not know of it.
    """
    states = optimizer.state.values() if optimizer is not None else ()
    found = [v for values in states for v in values.values() if isinstance(v, torch.Tensor)]
    if only_paged:
        found = [tensor for tensor in found if getattr(tensor, "is_paged", False)]
    return sum(tensor.nbytes for tensor in found if tensor.dim()) / 2**30
