"""The training loop.

It knows batches, a model and an optimizer; nothing of quantisation or files, and of sharding only
that `shard` hands over the gradients.
"""

import contextlib
import dataclasses
import gc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.batches import Batch, Batches, PackedBatches
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.model.attention import RowBounds
from fsdp_qlora.model.head import Targets
from fsdp_qlora.training import optim
from fsdp_qlora.training.metrics import Recorder, StepHook
from fsdp_qlora.training.nonfinite import NonFiniteGuard


class Checkpointing(Protocol):
    """What the loop needs of the one that saves: training.checkpoint.Checkpointer."""

    step: int
    stop: hooks.StopFlag

    def poll(self, step: int) -> list[float]:
        """What this rank asks for after a step."""

    def should_save(self, polled: Sequence[float]) -> bool:
        """Whether `after_step` must be called."""

    def after_step(self, step: int, polled: Sequence[float]) -> None:
        """Save; leave, if a signal has come."""

    def finish(self, step: int) -> None:
        """Save what the run has ended with."""

    def mark_best(self, best: tuple[float, int] | None) -> None:
        """Keep the checkpoint of the best evaluation: its loss, and the step it came after."""

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk."""


class Evaluating(Protocol):
    """What the loop needs of the one that measures held-out loss: evaluate.Evaluator."""

    best: tuple[float, int] | None

    def begin(self) -> None:
        """Evaluate the model before the first step."""

    def after_step(self) -> None:
        """Evaluate the model after a step, if that is due."""

    def end(self) -> None:
        """Evaluate the model after the last step."""


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
    """

    model: nn.Module
    params: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler
    max_norm: float | None
    world: World
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    is_reduced_once: bool = False
    seed: int = 0


def prepare(model: nn.Module, cfg: TrainConfig, num_steps: int, world: World) -> Trained:
    """Make a model ready to be trained.

    Args:
        model: sharded and filled.
        cfg: optimizer, learning rate, clipping, precision, max_skipped_steps, no_sync, seed.
        num_steps: optimizer steps of the run.
        world: the ranks.
    """
    params = shard.local_parameters(model)
    optimizer, schedule = optim.build(params, cfg, num_steps, shard.trained_names(model))
    if cfg.loraplus_ratio != 1:
        slices = adapters.b_slices(model, params)
        optim.scale_updates(optimizer, slices, cfg.loraplus_ratio)
    return Trained(
        model,
        params,
        optimizer,
        schedule,
        cfg.grad_norm if cfg.apply_gradient_clipping else None,
        world,
        NonFiniteGuard(model, cfg.compute_dtype, cfg.max_skipped_steps),
        cfg.no_sync,
        cfg.seed,
    )


def token_loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the cross entropy over the trained tokens of a batch.

    Args:
        model: a QuantizedModel.
        batch: on the host.
        device: of this rank.

    Returns:
        0-d float32 on the device, with its graph.
    """
    rows = RowBounds.of(batch.row_lengths, device)
    return model(_to_device(batch.input_ids, device), Targets.of(batch.labels, device), rows=rows)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def train_step(
    trained: Trained,
    micro_batches: list[Batch],
    step: int = 0,
    hook: Callable[[str], None] = lambda point: None,
) -> dict[str, torch.Tensor]:
    """One optimizer step; every trained token of the global batch weighs the same.

    Args:
        trained: model, parameters, optimizer.
        micro_batches: this rank's, as many on every rank.
        step: its number, from 1; 0: the guard is not told of it.
        hook: told of every point of the step, see clock.StepHook.

    Returns:
        loss (mean over the trained tokens of all ranks), grad_norm (before clipping), skipped
        (the step was not taken) and, where there is one, the loss scale, 0-d on the device.
    """
    world, guard = trained.world, trained.guard
    guard.begin()
    hook("pre-forward")
    num_tokens = max(world.sum(sum(b.num_trained_tokens for b in micro_batches)), 1.0)
    loss_sum = torch.zeros((), device=world.device)
    hook("data")
    for number, batch in enumerate(micro_batches, 1):
        if trained.is_reduced_once:
            shard.reduce_gradients(trained.model, number == len(micro_batches))
        loss = token_loss_sum(trained.model, batch, world.device)
        hook("post-forward")
        # FSDP averages gradients over ranks: undo it
        guard.scaled(loss * (world.size / num_tokens)).backward()
        loss_sum += loss.detach()
        hook("post-backward")
    num_copies = shard.collect_gradients(trained.model, trained.params)
    grads = [p.grad for p in trained.params if p.grad is not None]
    status = guard.check(grads, loss_sum, num_tokens, num_copies, world)
    optim.clip(grads, status.grad_norm, trained.max_norm, guard.scale)
    hook("pre-optimizer")
    optim.step(trained.optimizer, status.is_bad)
    trained.schedule.step()
    trained.optimizer.zero_grad()
    guard.finish(step, status)
    hook("post-optimizer")
    results = {"loss": status.loss, "grad_norm": status.grad_norm, "skipped": status.is_bad > 0}
    return results if guard.scale is None else results | {"loss_scale": status.facts[2]}


def train(
    trained: Trained,
    batches: Batches | PackedBatches,
    recorder: Recorder,
    checkpointer: Checkpointing,
    evaluator: Evaluating,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train from the step that the checkpointer resumes; every rank must call.

    Args:
        trained: model, parameters, optimizer, restored.
        batches: this rank's, of all steps.
        recorder: gets a line per step.
        checkpointer: saves, also the best evaluation.
        evaluator: measures before, between and after the steps.
        after_step: called when a step is recorded.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """

    def evaluate_step() -> None:
        after_step()
        evaluator.after_step()
        checkpointer.mark_best(evaluator.best)

    evaluator.begin()
    fit(trained, batches, recorder, evaluate_step, checkpointer)
    evaluator.end()
    checkpointer.mark_best(evaluator.best)
    checkpointer.wait()


def fit(
    trained: Trained,
    batches: Batches | PackedBatches,
    recorder: Recorder,
    after_step: Callable[[], None] = lambda: None,
    checkpointer: Checkpointing | None = None,
) -> None:
    """Take every optimizer step of the run, or those that are left.

    Nothing that a step needs comes from the steps before it but weights, moments and step number:
    rows and dropout follow from seed, step and rank.

    Args:
        trained: model, parameters, optimizer.
        batches: this rank's, of all steps.
        recorder: gets a line per step.
        after_step: called when a step is recorded.
        checkpointer: saves checkpoints, and knows how many steps were taken before; None: nothing
            is saved, and no signal waited for.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """
    trained.model.train()
    gc.collect()
    gc.freeze()  # else Python walks every module and tensor now and then: 0.2 s of a step at 7B
    world = trained.world
    first_step = checkpointer.step if checkpointer is not None else 0
    with checkpointer.stop.deferred() if checkpointer is not None else contextlib.nullcontext():
        world.sum(0)  # no rank takes a step that another could still leave at once for a signal
        for step in range(first_step, batches.num_steps):
            micro_batches = batches.step(step)
            torch.manual_seed(dropout_seed(trained.seed, step, world.rank))
            learning_rate = trained.schedule.get_last_lr()[0]
            hook = StepHook(recorder.clock, world.rank, step + 1)
            results = train_step(trained, micro_batches, step + 1, hook)
            agreed = recorder.step(
                {
                    "step": step + 1,
                    "epoch": batches.epoch(step),
                    "learning_rate": learning_rate,
                    "num_trained_tokens": sum(b.num_trained_tokens for b in micro_batches),
                    "num_tokens": sum(b.num_tokens for b in micro_batches),
                    **results,
                },
                checkpointer.poll(step + 1) if checkpointer is not None else (),
            )
            hooks.reach("post-record", world.rank, step + 1)
            _note_skipped(trained, batches, recorder)
            hooks.beat("look", world.rank, step + 1)  # a profiler's trace takes its time
            after_step()
            if checkpointer is not None and checkpointer.should_save(agreed):
                _note_skipped(trained, batches, recorder, is_last=True)
                checkpointer.after_step(step + 1, agreed)
        _note_skipped(trained, batches, recorder, is_last=True)
        if checkpointer is not None:
            checkpointer.finish(batches.num_steps)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout, so that no random state need be kept.

    Args:
        seed: of the run.
        step: 0-based.
        rank: another one draws other numbers.
    """
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _note_skipped(
    trained: Trained,
    batches: Batches | PackedBatches,
    recorder: Recorder,
    is_last: bool = False,
) -> None:
    for skipped in trained.guard.skipped_steps(batches, is_last):
        recorder.event("skipped", dataclasses.asdict(skipped))
        recorder.say(str(skipped))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World) -> float:
    """Mean loss over all trained tokens of all ranks' batches.

    Args:
        model: a QuantizedModel; its mode is left as it was.
        batches: this rank's, as many on every rank.
        world: the ranks; all must call.

    Returns:
        Mean cross entropy, nats per token.
    """
    was_training = model.training
    model.eval()
    # In float64, so that the sum is the same however the rows are cut into batches.
    loss_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for batch in batches:
        hooks.reach("eval", world.rank)
        loss_sum += token_loss_sum(model, batch, world.device)
        num_tokens += batch.num_trained_tokens
    model.train(was_training)
    return world.sum(loss_sum.item()) / max(world.sum(num_tokens), 1.0)
