"""Rows to batches: sources (rows), row_formats (text), tokens (ids), batches (tensors).

`build` goes the whole way. torch and transformers are imported by it, not with this package.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

from fsdp_qlora import arch, config, errors, hardware
from fsdp_qlora.data import batches, prepare, prompts, sources, tokenizer
from fsdp_qlora.planning.sizes import PAD_MULTIPLES

MOST_PADDING = 0.1  # share of a step's tokens; with more the rows are laid one after the other


class Data(NamedTuple):
    """What a run trains on.

    Args:
        train: this rank's training batches, by optimizer step.
        held_out: this rank's held-out batches; as many on every rank.
        tokenizer: transformers tokenizer, or None where none is needed.
        audit: what became of the rows; its text form is one line, `facts` are for the record.
        prompts: what is asked before and after; may be empty.
        digest: of the held-out rows and the prompts, the same on every rank.
    """

    train: batches.Batches
    held_out: list[batches.Batch]
    tokenizer: Any
    audit: prepare.Audit
    prompts: tuple[prompts.Prompt, ...]
    digest: str


def build(cfg: config.TrainConfig, info: arch.ModelInfo, world: Any) -> Data:
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
    needs_text = cfg.dataset != sources.DUMMY or prompts.has_prompts(cfg)
    full = tokenizer.load(tokenizer.directory(info)) if needs_text else None
    text_tokenizer = None if full is None else tokenizer.wrap(full, str(info.path))
    ready = prepare.prepare(cfg, text_tokenizer, info.vocab_size, world.rank == 0)
    ready.check()
    pad_multiple = PAD_MULTIPLES[world.device.type]
    if text_tokenizer is not None and ready.formatter is not None and ready.uses_chat:
        source = ready.formatter.chat.source
        if source != text_tokenizer.chat_template:
            text_tokenizer.full.chat_template = source  # it is saved with the adapter
    num = cfg.context_parallel
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world.size // num
    if cfg.objective == "kto" and per_step < 2:
        rule = "estimates the divergence from prompts with another row's answer: a step needs two"
        raise errors.UserError("--objective kto", rule, "use --batch_size 2")
    audit = prepare.audit(cfg, ready, world.size // num, pad_multiple)
    sampler = batches.sampler_config(cfg, world.size // num, world.rank // num, pad_multiple)
    sampler = dataclasses.replace(sampler, parts=num, part=world.rank % num)
    is_flat = audit.facts["padding_share"]["batches"] > MOST_PADDING
    is_flat = is_flat or ready.train.num_sides == 2  # which share prompts
    is_flat = is_flat and cfg.packing == "auto" and world.device.type == "cuda"
    train = batches.make(cfg, ready.train, sampler, is_flat)
    held_out = list(batches.all_once(ready.held_out, sampler))
    asked = prompts.choose_prompts(cfg, ready, text_tokenizer)
    hardware.release_freed_memory()
    held_back = ready.held_out.hashes.tobytes() + repr([prompt.ids for prompt in asked]).encode()
    return Data(train, held_out, full, audit, asked, hashlib.sha256(held_back).hexdigest()[:16])
