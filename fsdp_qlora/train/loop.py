"""The training loop.

It knows batches, a model and an optimizer; nothing of quantisation or files, and of sharding only
that `shard` hands over the gradients.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fsdp_qlora.data.batches import Batch, Batches
from fsdp_qlora.model import shard
from fsdp_qlora.model.head import Targets
from fsdp_qlora.model.rows import Rows
from fsdp_qlora.train.clock import Clock
from fsdp_qlora.train.ledger import Recorder
from fsdp_qlora.train.world import World, clip_grad_norm


@dataclass(frozen=True)
class Trained:
    """What an optimizer step works on.

    Attributes:
        model: the sharded model.
        params: this rank's slices of the trained parameters, float32.
        optimizer, schedule: over `params`.
        max_norm: global gradient norm to clip to, or None.
        world: the ranks.
    """

    model: nn.Module
    params: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler
    max_norm: float | None
    world: World


def token_loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the cross entropy over the trained tokens of a batch.

    Args:
        model: a PackedModel.
        batch: on the host.
        device: of this rank.

    Returns:
        0-d float32 on the device, with its graph.
    """
    rows = Rows.of(batch.row_lengths, device)
    return model(_to_device(batch.input_ids, device), Targets.of(batch.labels, device), rows=rows)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def train_step(
    trained: Trained, micro_batches: list[Batch], clock: Clock
) -> dict[str, torch.Tensor]:
    """One optimizer step; every trained token of the global batch weighs the same.

    Args:
        trained: model, parameters, optimizer.
        micro_batches: this rank's, as many on every rank.
        clock: told when each phase ends.

    Returns:
        loss (mean over the trained tokens of all ranks) and grad_norm (before clipping), 0-d
        float32 on the device.
    """
    world = trained.world
    num_tokens = max(world.sum(sum(b.num_trained_tokens for b in micro_batches)), 1.0)
    loss_sum = torch.zeros((), device=world.device)
    clock.mark("data")
    for batch in micro_batches:
        loss = token_loss_sum(trained.model, batch, world.device)
        clock.mark("forward")
        (loss * (world.size / num_tokens)).backward()  # FSDP averages gradients over ranks: undo it
        loss_sum += loss.detach()
        clock.mark("backward")
    are_slices = shard.collect_gradients(trained.model, trained.params)
    grads = [p.grad for p in trained.params if p.grad is not None]
    grad_norm = clip_grad_norm(grads, trained.max_norm, world, are_slices)
    trained.optimizer.step()
    trained.schedule.step()
    trained.optimizer.zero_grad()
    loss_mean = world.sum_(loss_sum) / num_tokens
    clock.mark("optimizer")
    return {"loss": loss_mean, "grad_norm": grad_norm}


def fit(
    trained: Trained,
    batches: Batches,
    recorder: Recorder,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Take every optimizer step of the run.

    Args:
        trained: model, parameters, optimizer.
        batches: this rank's, of all steps.
        recorder: gets a line per step.
        after_step: called when a step is recorded.
    """
    trained.model.train()
    gc.collect()
    gc.freeze()  # else Python walks every module and tensor now and then: 0.2 s of a step at 7B
    for step in range(batches.num_steps):
        micro_batches = batches.step(step)
        learning_rate = trained.schedule.get_last_lr()[0]
        results = train_step(trained, micro_batches, recorder.clock)
        recorder.step(
            {
                "step": step + 1,
                "epoch": batches.epoch(step),
                "learning_rate": learning_rate,
                "num_trained_tokens": sum(b.num_trained_tokens for b in micro_batches),
                "num_tokens": sum(b.num_tokens for b in micro_batches),
                **results,
            }
        )
        after_step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World) -> float:
    """Mean loss over all trained tokens of all ranks' batches.

    Args:
        model: a PackedModel; its mode is left as it was.
        batches: this rank's, as many on every rank.
        world: the ranks; all must call.

    Returns:
        Mean cross entropy, nats per token.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_tokens = torch.zeros((), device=world.device), 0
    for batch in batches:
        loss_sum += token_loss_sum(model, batch, world.device)
        num_tokens += batch.num_trained_tokens
    model.train(was_training)
    return world.sum(loss_sum.item()) / max(world.sum(num_tokens), 1.0)
