"""The training loop: the step, and all steps of a run.

It knows batches, a model and an optimizer; nothing of quantisation or files, and of sharding only
that `shard` hands over the gradients.
"""

import dataclasses
import functools
import gc
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from fsdp_qlora.data.batches import Batch, Batches
from fsdp_qlora.distributed import hooks
from fsdp_qlora.model import experts, shard
from fsdp_qlora.training import checkpoint, losses, metrics, optim
from fsdp_qlora.training.optim import Trained

Hook = Callable[[str], None]  # is told of every point of a step


def train_step(
    trained: Trained, micro_batches: list[Batch], step: int = 0, hook: Hook = lambda point: None
) -> dict[str, Tensor]:
    """One optimizer step; every trained token of the global batch weighs the same, or every pair.

    Args:
        trained: model, parameters, optimizer.
        micro_batches: this rank's, as many on every rank.
        step: its number, from 1; 0: the guard is not told of it.
        hook: told of every point of the step, see metrics.reach.

    Returns:
        loss (mean over the trained tokens of all ranks), grad_norm (before clipping), skipped
        (the step was not taken) and, where there is one, the loss scale, 0-d on the device; of a
        preference its figures; of a mixture expert_load.
    """
    world, guard, preference = trained.world, trained.guard, trained.preference
    guard.begin()
    hook("pre-forward")
    weights = losses.weigh(trained.model, preference, micro_batches, world)
    loss_sum, sums = torch.zeros((), device=world.device), torch.zeros(8, device=world.device)
    hook("data")
    for start in range(0, len(micro_batches), trained.per_visit):
        together = micro_batches[start : start + trained.per_visit]
        if trained.is_reduced_once:
            shard.reduce_gradients(trained.model, start + len(together) == len(micro_batches))
        losses_B, own = losses.step_losses(trained, together, weights)
        sums = sums if own is None else sums + own
        hook("post-forward")
        # FSDP averages gradients over ranks: undo it
        guard.scaled(losses_B * (world.size * weights.copies / weights.num)).sum().backward()
        for loss in losses_B.detach():
            loss_sum += loss
        hook("post-backward")
    num_copies = shard.collect_gradients(trained.model, trained.params)
    grads = [p.grad for p in trained.params if p.grad is not None]
    mixtures = getattr(trained.model, "mixtures", ())
    loads = [mixture.loads for mixture in mixtures]
    status = guard.check(grads, loss_sum, weights.num, num_copies, loads)
    optim.clip(grads, status.grad_norm, trained.max_norm, guard.scale)
    hook("pre-optimizer")
    optim.step(trained.optimizer, status.is_bad)
    trained.schedule.step()
    trained.optimizer.zero_grad()
    guard.finish(step, status)
    hook("post-optimizer")
    results = {"loss": status.loss, "grad_norm": status.grad_norm, "skipped": status.is_bad > 0}
    results |= {} if guard.scale is None else {"loss_scale": status.facts[2]}
    results |= experts.take_load(mixtures)
    return results | losses.figures(preference, sums, weights, world)


def fit(
    trained: Trained,
    batches: Batches,
    recorder: metrics.Recorder,
    checkpointer: checkpoint.Checkpointer,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Take every optimizer step of the run, or those that are left.

    Nothing that a step needs comes from the steps before it but weights, moments and step number:
    rows and dropout follow from seed, step and rank.

    Args:
        trained: model, parameters, optimizer.
        batches: this rank's, of all steps.
        recorder: gets a line per step.
        checkpointer: saves checkpoints, and knows how many steps were taken before.
        after_step: called when a step is recorded.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """
    trained.model.train()
    gc.collect()
    gc.freeze()  # else Python walks every module and tensor now and then: 0.2 s of a step at 7B
    world = trained.world
    with checkpointer.stop.deferred():
        world.sum(0)  # no rank takes a step that another could still leave at once for a signal
        for step in range(checkpointer.step, batches.num_steps):
            micro_batches = batches.step(step)
            # No random state need be kept; another rank draws other numbers.
            draws = hashlib.sha256(f"dropout:{trained.seed}:{step}:{world.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(draws[:7], "little"))
            learning_rate = trained.schedule.get_last_lr()[0]
            hook = functools.partial(metrics.reach, recorder.clock, world.rank, step + 1)
            results = train_step(trained, micro_batches, step + 1, hook)
            line = {"step": step + 1, "epoch": batches.epoch(step), "learning_rate": learning_rate}
            line["num_trained_tokens"] = sum(b.num_trained_tokens for b in micro_batches)
            line["num_tokens"] = sum(b.num_tokens for b in micro_batches)
            agreed = recorder.step({**line, **results}, checkpointer.poll(step + 1))
            hooks.reach("post-record", world.rank, step + 1)
            _note_skipped(trained, batches, recorder)
            hooks.beat("look", world.rank, step + 1)  # a profiler's trace takes its time
            after_step()
            if checkpointer.should_save(agreed):
                _note_skipped(trained, batches, recorder, is_last=True)
                checkpointer.after_step(step + 1, agreed)
        _note_skipped(trained, batches, recorder, is_last=True)
        optim.check_weights(trained, batches.num_steps)
        checkpointer.finish(batches.num_steps)


def _note_skipped(
    trained: Trained, batches: Batches, recorder: metrics.Recorder, is_last: bool = False
) -> None:
    for skipped in trained.guard.skipped_steps(batches, is_last):
        recorder.event("skipped", dataclasses.asdict(skipped))
        recorder.say(str(skipped))
        optim.check_weights(trained, skipped.step - 1)
