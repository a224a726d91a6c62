"""What follows a backward pass: is the step taken, how far, and with which optimizer.

No step is taken on a loss or a gradient that is not finite; float16 has a loss scale. What decides
is on the device and the same on every rank; the host learns of it a step later, when it has the
next one launched, and waits for nothing.
"""

import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fsdp_qlora.arch.files import describe
from fsdp_qlora.config import OPTIMIZERS, TrainConfig, check_optimizer
from fsdp_qlora.data.batches import Batches
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import RUN_FAILED, UserError
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.model.skeleton import QuantizedModel
from fsdp_qlora.training.objectives import Preference

# Last parts of names that no weight decay pulls on: there is nothing small about a good norm.
NO_DECAY = (".bias", "norm.weight", "magnitude")
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000  # those of torch.amp
LEAST_SCALE = 1.0
Tensors = Sequence[Tensor]
MOST_PLACES = 3  # rows named on the screen; the record has them all


# Share of the highest rate by progress after the warmup, 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
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


def learning_rate(cfg: TrainConfig, num_steps: int, step: int) -> float:
    """Return the learning rate of a step.

    Args:
        cfg: lr, lr_scheduler, warmup_steps.
        num_steps: of the run.
        step: 0-based.
    """
    return cfg.base_lr * factor(cfg.lr_scheduler, step, num_steps, cfg.warmup_steps)


def build(
    params: list[nn.Parameter], cfg: TrainConfig, num_steps: int, names: Sequence[str]
) -> tuple[Optimizer, LambdaLR]:
    """The optimizer over this rank's slices of what is trained, and its schedule.

    Args:
        params: this rank's slices, float32.
        cfg: optimizer, lr, wd, lr_scheduler, warmup_steps.
        num_steps: optimizer steps of the run.
        names: of `params` in the model, for what NO_DECAY leaves alone.

    Returns:
        (optimizer, schedule to step after it).

    Raises:
        UserError: the optimizer needs a CUDA GPU (code 3).
    """
    check_optimizer(cfg.optimizer, params[0].device.type == "cuda")
    row = OPTIMIZERS[cfg.optimizer]
    wd = cfg.wd if row.decays else 0.0
    groups: dict[float, list[nn.Parameter]] = {}
    for param, name in zip(params, names, strict=True):
        groups.setdefault(0.0 if name.endswith(NO_DECAY) else wd, []).append(param)
    parts = [{"params": own, "weight_decay": decay} for decay, own in groups.items()]
    options = {"fused": True} if row.is_fused else {}
    optimizer: Optimizer = pkgutil.resolve_name(row.kind)(parts, lr=cfg.base_lr, **options)
    shape = (num_steps, cfg.warmup_steps)
    return optimizer, LambdaLR(optimizer, lambda step: factor(cfg.lr_scheduler, step, *shape))


def scale_updates(optimizer: Optimizer, slices: Tensors, ratio: float) -> None:
    """Let some elements of the parameters move `ratio` times as far: a learning rate of their own.

    Every optimizer here moves an element by lr times something that no other element's lr enters.

    Args:
        optimizer: from `build`.
        slices: views of its parameters.
        ratio: of the learning rates.

    Source: LoRA+, arXiv 2402.12354, section 4.
    """
    before: list[Tensor] = []

    def keep(*_) -> None:
        before[:] = [part.clone() for part in slices]

    def scale(*_) -> None:
        torch._foreach_lerp_(before, list(slices), ratio)
        torch._foreach_copy_(list(slices), before)
        before.clear()

    if slices:
        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(scale)


def clip(grads: Tensors, norm: Tensor, max_norm: float | None, scale: Tensor | None = None) -> None:
    """Undo the loss scale, and scale gradients so that their global norm is at most `max_norm`.

    Args:
        grads: this rank's, changed in place.
        norm: of the whole gradient without the loss scale, 0-d on its device.
        max_norm: None: as they are.
        scale: of the loss, 0-d; None: 1.

    Source: torch.nn.utils.clip_grad_norm_, the 1e-6 included.
    """
    if max_norm is None and scale is None:
        return
    share = torch.ones_like(norm)
    if max_norm is not None:
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(grads), share if scale is None else share / scale)


def step(optimizer: Optimizer, is_bad: Tensor) -> None:
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


def check_weights(trained: "Trained", step: int) -> None:
    """Refuse to go on with, or to save, weights that are not finite; every rank must call.

    Args:
        trained: between two steps.
        step: the last one taken.

    Raises:
        UserError: some are NaN or infinite (code 4).
    """
    sums = torch.stack([param.detach().sum(dtype=torch.float64) for param in trained.params])
    faults = trained.world.sum_((~sums.isfinite()).float()).tolist()
    names = [n for n, k in zip(shard.trained_names(trained.model), faults, strict=True) if k]
    if names:
        rule = f"are NaN or infinite after step {step}: no step leads out of that"
        remedy = "start anew with a lower --lr, or --resume a checkpoint before it with one"
        raise UserError(f"the weights of {describe(names)}", rule, remedy, RUN_FAILED)


def state_gib(optimizer: Optimizer | None, only_paged: bool = False) -> float:
    """What an optimizer keeps, tensor by tensor.

    Args:
        optimizer: None: nothing yet.
        only_paged: what bitsandbytes lets the driver move to the host and back; torch's allocator
            does not know of it.
    """
    states = optimizer.state.values() if optimizer is not None else ()
    found = [v for values in states for v in values.values() if isinstance(v, Tensor)]
    if only_paged:
        found = [tensor for tensor in found if getattr(tensor, "is_paged", False)]
    return sum(tensor.nbytes for tensor in found if tensor.dim()) / 2**30


class StepStatus(NamedTuple):
    """What all ranks together know of a step before the optimizer; 0-d float32 on the device.

    Attributes:
        loss: mean over the trained tokens of all ranks.
        grad_norm: of the whole gradient, unscaled, before clipping.
        is_bad: 1 when one of the two is not finite, else 0.
        facts: is_bad, whether it is the loss, the loss scale, then 1 for every rank whose own loss
            or own gradient is not finite.
    """

    loss: Tensor
    grad_norm: Tensor
    is_bad: Tensor
    facts: Tensor


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken.

    Attributes:
        step: from 1.
        ranks: whose own loss or gradient was not finite; none: nobody's alone was.
        is_loss: the loss was not finite, or the gradient alone.
        loss_scale: of the step; 1 without one.
        places: of the rows that these ranks (all, if none) had seen.
    """

    step: int
    ranks: tuple[int, ...]
    is_loss: bool
    loss_scale: float
    places: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the user."""
        what = "loss" if self.is_loss else "gradient"
        where = f" on rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        scale = f" at loss scale {self.loss_scale:g}" if self.loss_scale != 1 else ""
        rows = ", ".join(self.places[:MOST_PLACES])
        rows += f" and {len(self.places) - MOST_PLACES} more" * (len(self.places) > MOST_PLACES)
        return f"step {self.step} skipped: {what} not finite{where}{scale} (rows {rows})"


class NonFiniteGuard:
    """Checks every step, counts those that are skipped, and ends a run that skips too many.

    Attributes:
        scale: the loss is multiplied by it before the backward pass, 0-d float32; None: by 1.
        num_skipped, num_in_a_row: steps, as far as the host knows; those that only the loss scale
            is to blame for are not in the row.
    """

    def __init__(self, model: nn.Module, precision: str, most: int, world: World) -> None:
        """Watch a model.

        Args:
            model: sharded and filled; its first trained layer tells whose gradient is not finite.
            precision: Torch name of the dtype of matmuls: float16 needs a loss scale.
            most: skipped steps in a row that end the run.
            world: the ranks.
        """
        self.scale: Tensor | None = None
        self.num_skipped = self.num_in_a_row = 0
        self._most, self._world = most, world
        self._is_bad_here: Tensor | None = None
        self._pending: list[tuple[int, Tensor, Any]] = []
        blocks = [b for b in shard.blocks(model) if any(p.requires_grad for p in b.parameters())]
        if blocks:
            blocks[0].register_forward_hook(self._watch)
        if precision == "float16":
            device = shard.local_parameters(model)[0].device
            self.scale = torch.full((), FIRST_SCALE, device=device)
            self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def _watch(self, _module: nn.Module, _args: tuple, hidden: Any) -> None:
        for tensor in hidden if isinstance(hidden, list) else [hidden]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._look)

    def _look(self, grad: Tensor) -> None:
        """What goes wrong in the backward of later layers comes by here, before the ranks mix."""
        is_bad, known = ~grad.sum(dtype=torch.float32).isfinite(), self._is_bad_here
        self._is_bad_here = is_bad if known is None else is_bad | known

    def begin(self) -> None:
        """Forget what passes before the step have left, such as those of the memory probe."""
        self._is_bad_here = None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as the backward pass shall see it."""
        return loss if self.scale is None else loss * self.scale

    def check(
        self, grads: Tensors, loss_sum: Tensor, num_tokens: float, num_copies: int, counts: Tensors
    ) -> StepStatus:
        """Norm and loss of all ranks, in one collective; all must call.

        Args:
            grads: this rank's gradients, on one device, of the scaled loss.
            loss_sum: over this rank's trained tokens.
            num_tokens: trained tokens of all ranks.
            num_copies: ranks that hold the same slices.
            counts: float32 [any], of this rank; afterwards those of all ranks; may be none.
        """
        is_bad_here = ~loss_sum.isfinite()
        if self._is_bad_here is not None:
            is_bad_here = is_bad_here | self._is_bad_here
        world, facts = self._world, loss_sum.new_zeros(2 + self._world.size)
        facts[0] = torch.stack(torch._foreach_norm(list(grads), 2, torch.float32)).square().sum()
        facts[1] = loss_sum
        facts[2 + world.rank] = is_bad_here
        every = [facts, *counts]
        torch._foreach_copy_(every, world.sum_(torch.cat(every)).split([*map(len, every)]))
        scale = torch.ones_like(loss_sum) if self.scale is None else self.scale.clone()
        norm, loss = (facts[0] / num_copies).sqrt() / scale, facts[1] / num_tokens
        is_bad = (~(norm.isfinite() & loss.isfinite())).float()
        told = torch.cat([torch.stack([is_bad, (~loss.isfinite()).float(), scale]), facts[2:]])
        return StepStatus(loss, norm, is_bad, told)

    def finish(self, step: int, status: StepStatus) -> None:
        """Adapt the loss scale to a step that is over, and send its status to the host.

        Args:
            step: from 1; 0: the host is not told.
            status: of it.

        Source: torch.amp.GradScaler.update.
        """
        if self.scale is not None:
            args = (status.is_bad, GROWTH, BACKOFF, GROWTH_STEPS)
            torch._amp_update_scale_(self.scale, self._growth, *args)
        if not step:
            return
        facts, done = status.facts, None
        if facts.device.type == "cuda":
            pinned = torch.empty(facts.shape, pin_memory=True)
            facts, done = pinned.copy_(facts, non_blocking=True), torch.cuda.Event()
            done.record()
        self._pending.append((step, facts, done))

    def skipped_steps(self, rows: Batches, is_last: bool = False) -> Iterator[Skipped]:
        """Yield the steps that are known to be skipped since the last call; call it once a step.

        Args:
            rows: of the run, to name those of a skipped step.
            is_last: read all; else the newest status is left for the next call.

        Raises:
            UserError: too many steps in a row, or the loss scale has fallen too low (code 4), on
                every rank.
        """
        while len(self._pending) > (not is_last):
            step, facts, done = self._pending.pop(0)
            if done is not None:
                done.synchronize()
            is_bad, is_loss, scale, *by_rank = facts.tolist()
            if not is_bad:
                self.num_in_a_row = 0
                continue
            self.num_skipped += 1
            self.num_in_a_row += bool(is_loss) or self.scale is None
            ranks = tuple(rank for rank, is_own in enumerate(by_rank) if is_own)
            seen = ranks or range(len(by_rank))
            places = (place for rank in seen for place in rows.places(step - 1, rank))
            found = Skipped(step, ranks, bool(is_loss), scale, tuple(dict.fromkeys(places)))
            yield found
            self._stop_if_hopeless(found)

    def _stop_if_hopeless(self, last: Skipped) -> None:
        rule = "the weights are those before these steps"
        if self.num_in_a_row >= self._most:
            got = f"{self.num_in_a_row} steps in a row were skipped, the last: {last}"
            remedy = "look at these rows, lower --lr, or allow more by --max_skipped_steps"
            raise UserError(got, rule, remedy, RUN_FAILED)
        if self.scale is not None and last.loss_scale * BACKOFF < LEAST_SCALE:
            got = f"the loss scale has fallen below {LEAST_SCALE:g}: {last}"
            raise UserError(got, rule, "use --precision bf16 or fp32", RUN_FAILED)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers."""
        scales = {}
        if self.scale is not None:
            scales = {"loss_scale": self.scale.item(), "growth": self._growth.item()}
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row, **scales}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.num_skipped = int(state["num_skipped"])
        self.num_in_a_row = int(state["num_in_a_row"])
        if self.scale is not None and "loss_scale" in state:
            self.scale.fill_(state["loss_scale"])
            self._growth.fill_(int(state["growth"]))


@dataclass(frozen=True)
class Trained:
    """What an optimizer step works on.

    Attributes:
        model: the sharded model.
        params: this rank's slices of the trained parameters, float32.
        optimizer, schedule: over `params`.
        max_norm: global gradient norm to clip to, or None.
        world: the ranks.
        guard: skips steps whose loss or gradient is not finite.
        is_reduced_once: gradients of micro-batches are summed on each rank and reduced at the end.
        seed: of dropout.
        per_visit: micro-batches that pass each layer together, see model/visit.py.
        preference: what answers are compared by; None: rows are learned as they are.
    """

    model: nn.Module
    params: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler
    max_norm: float | None
    world: World
    guard: NonFiniteGuard
    is_reduced_once: bool = False
    seed: int = 0
    per_visit: int = 1
    preference: Preference | None = None


def prepare(model: nn.Module, cfg: TrainConfig, num_steps: int, world: World) -> Trained:
    """Make a model ready to be trained.

    Args:
        model: sharded and filled.
        cfg: optimizer, learning rate, clipping, precision, max_skipped_steps, no_sync, seed.
        num_steps: optimizer steps of the run.
        world: the ranks.
    """
    params = shard.local_parameters(model)
    optimizer, schedule = build(params, cfg, num_steps, shard.trained_names(model))
    if cfg.loraplus_ratio != 1:
        scale_updates(optimizer, adapters.b_slices(model, params), cfg.loraplus_ratio)
    max_norm = cfg.grad_norm if cfg.apply_gradient_clipping else None
    guard = NonFiniteGuard(model, cfg.compute_dtype, cfg.max_skipped_steps, world)
    parts = (model, params, optimizer, schedule, max_norm, world, guard, cfg.no_sync, cfg.seed)
    is_one = max(cfg.per_visit, 1 + bool(cfg.num_answers)) == 1
    can_visit = isinstance(model, QuantizedModel) and (is_one or model.can_visit(world.device))
    return Trained(*parts, cfg.per_visit if can_visit else 1, Preference.of(cfg, can_visit))
