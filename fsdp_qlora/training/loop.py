"""The training loop.

It knows batches, a model and an optimizer; nothing of quantisation or files, and of sharding only
that `shard` hands over the gradients.
"""

import dataclasses
import functools
import gc
import hashlib
from collections.abc import Callable, Sequence

import torch

from fsdp_qlora import cli
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.data.batches import Batch, Batches, PackedBatches
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import shard
from fsdp_qlora.model.attention import RowBounds
from fsdp_qlora.model.head import Targets
from fsdp_qlora.model.visit import RowGroup
from fsdp_qlora.training import metrics, optim
from fsdp_qlora.training.checkpoint import Checkpointer
from fsdp_qlora.training.metrics import Recorder
from fsdp_qlora.training.optim import Trained

Hook = Callable[[str], None]  # is told of every point of a step
SHORT_ROWS = (9, 7)  # tokens of two rows that are laid one after the other for a trial
MOST_ROW_ERROR = 0.2  # of what seeing the other row does; 16 bit round to some hundredths of it


def token_loss_sum(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
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


def token_losses(
    model: torch.nn.Module, batches: Sequence[Batch], device: torch.device
) -> torch.Tensor:
    """`token_loss_sum` of batches that pass each layer together, where there are several.

    Args:
        model, batches, device: see there.

    Returns:
        [batches], float32.
    """
    if len(batches) == 1:
        return token_loss_sum(model, batches[0], device).unsqueeze(0)
    groups = []
    for batch in batches:
        rows = RowBounds.of(batch.row_lengths, device)
        parts = _to_device(batch.input_ids, device), Targets.of(batch.labels, device)
        groups.append(RowGroup(*parts, rows))
    return torch.stack(model(groups))


def keep_rows_apart(
    model: torch.nn.Module, batches: Batches | PackedBatches, info: ModelInfo, world: World
) -> str:
    """Lay no rows one after the other where they would see each other.

    Args:
        model: filled.
        batches: of the run; padded from now on where that is needed.
        info: the model.
        world: the ranks; all must call.

    Returns:
        One line for the user, or "".

    Raises:
        UserError: --packing on, and they would (code 2).
    """
    if not batches.is_flat or are_rows_apart(model, world):
        return ""
    rule = f"rows of a {info.model_type} model that lie one after the other see each other"
    if isinstance(batches, PackedBatches):
        raise UserError("--packing on", rule, "use --packing off")
    batches.is_flat = False
    return f"packing   off: {rule}"


def are_rows_apart(model: torch.nn.Module, world: World) -> bool:
    """Whether a short row behind another one has the logits that it has alone.

    Args:
        model: a QuantizedModel, filled.
        world: the ranks; all must call.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_parameter("head.weight").shape[0]
    ids = torch.randint(vocab_size, (1, SHORT_ROWS[0] + SHORT_ROWS[1]), generator=generator)
    ids = ids.to(world.device)
    rows = RowBounds.of(SHORT_ROWS, world.device)
    positions = torch.arange(SHORT_ROWS[1], device=world.device)
    is_training = model.training
    with torch.no_grad():
        model.eval()
        alone = model(ids[:, SHORT_ROWS[0] :], Targets(positions, None)).float()
        behind = Targets(positions + SHORT_ROWS[0], None)
        seeing = model(ids, behind).float() - alone
        try:
            apart = model(ids, behind, rows=rows).float() - alone
        except ValueError:  # transformers: recurrent layers need kernels that are not installed
            apart = seeing
        model.train(is_training)
    shard.settle(model)
    # A median, because a rounding can send a token to another expert.
    error = (apart.norm(dim=1) / seeing.norm(dim=1)).median().item()
    return world.sum(float(error > MOST_ROW_ERROR)) == 0


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def train_step(
    trained: Trained, micro_batches: list[Batch], step: int = 0, hook: Hook = lambda point: None
) -> dict[str, torch.Tensor]:
    """One optimizer step; every trained token of the global batch weighs the same.

    Args:
        trained: model, parameters, optimizer.
        micro_batches: this rank's, as many on every rank.
        step: its number, from 1; 0: the guard is not told of it.
        hook: told of every point of the step, see metrics.reach.

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
    for start in range(0, len(micro_batches), trained.per_visit):
        together = micro_batches[start : start + trained.per_visit]
        if trained.is_reduced_once:
            shard.reduce_gradients(trained.model, start + len(together) == len(micro_batches))
        losses = token_losses(trained.model, together, world.device)
        hook("post-forward")
        # FSDP averages gradients over ranks: undo it
        guard.scaled(losses * (world.size / num_tokens)).sum().backward()
        for loss in losses.detach():
            loss_sum += loss
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


def fit(
    trained: Trained,
    batches: Batches | PackedBatches,
    recorder: Recorder,
    checkpointer: Checkpointer,
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
            torch.manual_seed(dropout_seed(trained.seed, step, world.rank))
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
    trained: Trained, batches: Batches | PackedBatches, recorder: Recorder, is_last: bool = False
) -> None:
    for skipped in trained.guard.skipped_steps(batches, is_last):
        recorder.event("skipped", dataclasses.asdict(skipped))
        recorder.say(str(skipped))
        optim.check_weights(trained, skipped.step - 1)


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Sequence[Batch], world: World) -> float:
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
    with cli.Progress("evaluates", len(batches), "batches", world.rank > 0) as progress:
        for batch in batches:
            hooks.reach("eval", world.rank)
            loss_sum += token_loss_sum(model, batch, world.device)
            num_tokens += batch.num_trained_tokens
            progress.update()
    model.train(was_training)
    return world.sum(loss_sum.item()) / max(world.sum(num_tokens), 1.0)
