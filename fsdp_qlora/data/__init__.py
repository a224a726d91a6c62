"""Rows to batches: sources (rows), shapes and templates (text), tokens (ids), batches (tensors).

`build` goes the whole way. torch and transformers are imported by it, not with this package.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config
from fsdp_qlora.data import audit, order, prepare, prompts, sources, tokenizer
from fsdp_qlora.data.prompts import Prompt
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning.limits import PAD_MULTIPLES

if TYPE_CHECKING:
    from fsdp_qlora.data.batches import Batch, Batches
    from fsdp_qlora.data.packed_batches import PackedBatches

MOST_PADDING = 0.1  # share of a step's tokens; with more the rows are laid one after the other


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    Args:
        train: this rank's training batches, by optimizer step.
        held_out: this rank's held-out batches; as many on every rank.
        tokenizer: transformers tokenizer, or None where none is needed.
        audit: what became of the rows; its text form is one line, `facts` are for the record.
        prompts: what is asked before and after; may be empty.
    """

    train: "Batches | PackedBatches"
    held_out: "list[Batch]"
    tokenizer: Any
    audit: audit.Audit
    prompts: tuple[Prompt, ...]


def build(cfg: Config, info: ModelInfo, world: Any) -> Data:
    """Make the data of a run; every rank keeps its own share.

    One rank makes the tokens and the others read them, where the cache of tokens is in use; else
    every rank does the same work. No collective is called.

    Args:
        cfg: the run's configuration.
        info: the model: directory of the tokenizer, rows of the embedding.
        world: has `rank`, `size` and `device`.

    Returns:
        The data.

    Raises:
        UserError: no such data, a bad row, no usable tokenizer, nothing left to train on.
    """
    from fsdp_qlora.data import batches, packed_batches

    is_dummy = cfg.dataset == sources.DUMMY
    full = None if is_dummy and not prompts.are_named(cfg) else load_tokenizer(info)
    text_tokenizer = None if full is None else tokenizer.wrap(full, str(info.path))
    with progress(world.rank) as bar:
        ready = prepare.prepare(cfg, text_tokenizer, info.vocab_size, lambda: full, bar.update)
    ready.check()
    pad_multiple = PAD_MULTIPLES[world.device.type]
    if full is not None and text_tokenizer is not None and ready.writer and ready.uses_chat:
        source = ready.writer.chat.template.source
        if source != text_tokenizer.chat_template:
            full.chat_template = source  # it is saved with the adapter
    found = audit.of(cfg, ready, world.size, pad_multiple)
    dealing = order.Dealing(
        batch_size=cfg.batch_size,
        accumulation=cfg.gradient_accumulation_steps,
        world_size=world.size,
        rank=world.rank,
        seed=cfg.seed,
        num_epochs=cfg.num_epochs,
        max_steps=cfg.max_steps,
        pad_multiple=pad_multiple,
    )
    train: Batches | PackedBatches
    if cfg.packing == "on":
        train = packed_batches.PackedBatches(ready.train, cfg.context_length, dealing)
    else:
        is_flat = cfg.packing == "auto" and world.device.type == "cuda"
        is_flat = is_flat and found.facts["padding_share"]["batches"] > MOST_PADDING
        train = batches.Batches(ready.train, dealing, is_flat)
    return Data(
        train=train,
        held_out=batches.held_out(
            ready.held_out, cfg.batch_size, world.size, world.rank, pad_multiple
        ),
        tokenizer=full,
        audit=found,
        prompts=prompts.choose(cfg, ready, text_tokenizer),
    )


def load_tokenizer(info: ModelInfo) -> Any:
    """Load the tokenizer that lies beside the model; nothing is fetched, no code is run.

    Args:
        info: the model.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    return tokenizer.load(tokenizer_directory(info))


def tokenizer_directory(info: ModelInfo) -> Path:
    """Return where the tokenizer of a model lies.

    Args:
        info: the model.

    Raises:
        UserError: there is none.
    """
    if info.path is None:
        remedy = "use --dataset dummy, or give a model directory"
        raise UserError("a model shape without files", "has no tokenizer", remedy)
    tokenizer.require_files(info.path)
    return info.path


def progress(rank: int) -> Any:
    """Return a bar for the terminal of rank 0 while rows become tokens, if that takes seconds."""
    from tqdm import tqdm

    is_silent = rank > 0 or not sys.stderr.isatty()
    return tqdm(desc="tokenizing", unit=" rows", delay=2, disable=is_silent, leave=False)
