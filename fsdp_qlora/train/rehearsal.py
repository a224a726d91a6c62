"""The dry run before step 1: forward and backward of the longest rows, which leave no trace."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fsdp_qlora.config import Config
from fsdp_qlora.data.batches import Batch, Batches, PackedBatches, collate, flatten
from fsdp_qlora.data.token_dataset import Sample
from fsdp_qlora.model import shard
from fsdp_qlora.model.skeleton import PackedModel
from fsdp_qlora.train import tracing
from fsdp_qlora.train.loop import Trained, token_loss_sum
from fsdp_qlora.train.rows import Account


def is_wanted(cfg: Config, device: torch.device) -> bool:
    """Return whether a run begins with a dry run.

    Args:
        cfg: dry_run.
        device: of this rank.
    """
    return cfg.dry_run == "on" or (cfg.dry_run == "auto" and device.type == "cuda")


def longest_batch(batches: Batches | PackedBatches, cfg: Config, vocab_size: int) -> Batch:
    """A micro-batch as large as any that the data can bring, every token trained.

    Args:
        batches: this rank's.
        cfg: batch_size; context_length, to which packed sequences are filled up.
        vocab_size: rows of the embedding.

    Returns:
        The batch, on the host.
    """
    if isinstance(batches, PackedBatches):
        longest, is_flat = cfg.context_length, True
    else:
        longest, is_flat = batches.longest, batches.is_flat
    ids = np.arange(longest, dtype=np.int32) % vocab_size
    rows = [Sample(ids, np.ones(longest, bool))] * cfg.batch_size
    if is_flat:
        return flatten(rows, batches.sampler.pad_multiple)
    return collate(rows, batches.sampler.pad_multiple, longest)


def rehearse(
    trained: Trained,
    batches: Batches | PackedBatches,
    cfg: Config,
    account: Account,
    allocate: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
) -> str:
    """Prove that the longest rows fit, and learn what comes and goes in a pass.

    Model, optimizer, random numbers and data are afterwards as if it had not been.

    Args:
        trained: what will be trained; all ranks must call.
        batches: this rank's.
        cfg: batch_size, how layers are recomputed.
        account: gets what comes and goes.
        allocate: makes room as large as a tensor, for what the optimizer will keep.

    Returns:
        One line for the user.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    model, world = trained.model, trained.world
    assert isinstance(model, PackedModel)
    batch = longest_batch(batches, cfg, account.plan.info.vocab_size)
    was_training = model.training
    model.train()
    with account.phase("dry run"), _random_numbers_kept(world.device):
        moments = [allocate(param) for param in trained.params for _ in range(2)]
        with tracing.traced(world.device) as trace:
            num_passes = _num_passes(model, cfg)
            for number in range(1, num_passes + 1):
                _pass(trained, batch, cfg.gradient_accumulation_steps > 1, number == num_passes)
            _drop_gradients(trained)
            tracing.boundary(world.device)
        del moments
        world.barrier()  # no rank goes on before all have come through
    model.train(was_training)
    model.set_checkpointing(cfg, world.device)  # CUDA graphs are captured anew
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    account.learn(trace.passing, trace.stays_gib)
    num_tokens = batch.num_tokens
    peak_gib = account.peak_of("dry run").allocated_gib
    words = f"dry run   {num_tokens:,} tokens at once fit"
    if trace.failure:
        words += f" (rows are not told apart: {trace.failure})"
    return words + (f": {peak_gib:.2f} GiB in tensors" if account.is_cuda else "")


def _pass(trained: Trained, batch: Batch, keeps_gradients: bool, is_last: bool) -> None:
    """Forward and backward, with marks at their ends."""
    if trained.is_reduced_once:
        shard.reduce_gradients(trained.model, is_last or not keeps_gradients)
    device = trained.world.device
    loss = token_loss_sum(trained.model, batch, device)
    tracing.boundary(device)
    loss.backward()
    tracing.boundary(device)
    if not keeps_gradients:
        _drop_gradients(trained)


def _num_passes(model: PackedModel, cfg: Config) -> int:
    """Two where the second finds gradients of the first, or graphs that it captures."""
    has_graphs = any(block.body.graphs is not None for block in shard.blocks(model))
    return 2 if cfg.gradient_accumulation_steps > 1 or has_graphs else 1


def _drop_gradients(trained: Trained) -> None:
    if any(param.grad is not None for param in shard.trained_parameters(trained.model)):
        shard.collect_gradients(trained.model, trained.params)
    for param in trained.params:
        param.grad = None


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Dropout draws the same numbers after the block as it would have without it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
