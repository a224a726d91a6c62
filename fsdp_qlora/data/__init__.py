"""Rows to batches: templates (text), sources (rows), tokens (ids), batches (tensors).

`build` goes the whole way. torch and transformers are imported by it, not with this package.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config
from fsdp_qlora.data import sources, templates, tokens
from fsdp_qlora.errors import UserError

if TYPE_CHECKING:
    from fsdp_qlora.data.batches import Batch, Batches

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    Args:
        train: this rank's training batches, by optimizer step.
        held_out: this rank's held-out batches; as many on every rank.
        tokenizer: transformers tokenizer, or None where none is needed.
        audit: what became of the rows; its text form is one line.
        sample_prompt: `cfg.sample_prompt` in the shape of the training rows, or None.
    """

    train: "Batches"
    held_out: "list[Batch]"
    tokenizer: Any
    audit: tokens.Audit
    sample_prompt: str | None


def build(cfg: Config, info: ModelInfo, world: Any) -> Data:
    """Make the data of a run; every rank does the same work and keeps its own share.

    Args:
        cfg: the run's configuration.
        info: the model: directory of the tokenizer, rows of the embedding.
        world: has `rank` and `size`; no collective is called.

    Returns:
        The data.

    Raises:
        UserError: no such data, a bad row, no usable tokenizer, nothing left to train on.
    """
    from fsdp_qlora.data import batches

    is_dummy = cfg.dataset == sources.DUMMY
    tokenizer = None if is_dummy and cfg.sample_prompt is None else load_tokenizer(info)
    length, example = cfg.context_length, {"text": ""}
    if is_dummy:
        samples = tokens.dummy_samples(cfg.dataset_samples, length, info.vocab_size, cfg.seed)
        audit = tokens.audit(samples, len(samples), 0, 0, length)
    else:
        rows = sources.read(cfg.dataset, cfg.dataset_samples, cfg.seed)
        samples, audit = tokens.tokenize(rows, tokenizer, length, info.vocab_size)
        example = rows[0]
    train, held_out = tokens.split(samples, cfg.eval_samples, cfg.seed)
    return Data(
        train=batches.Batches(
            train,
            cfg.batch_size,
            cfg.gradient_accumulation_steps,
            world.size,
            world.rank,
            cfg.seed,
            cfg.num_epochs,
            cfg.max_steps,
        ),
        held_out=batches.held_out(held_out, cfg.batch_size, world.size, world.rank),
        tokenizer=tokenizer,
        audit=replace(audit, num_held_out=len(held_out)),
        sample_prompt=cfg.sample_prompt and templates.ask(cfg.sample_prompt, example),
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
    if info.path is None:
        remedy = "use --dataset dummy, or give a model directory"
        raise UserError("a model shape without files", "has no tokenizer", remedy)
    path = Path(info.path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        remedy = "put tokenizer.json there, or use --dataset dummy"
        raise UserError(str(path), "has no tokenizer", remedy)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare Exception
        rule = f"its tokenizer cannot be read ({str(error)[:120]})"
        raise UserError(str(path), rule, "fetch its tokenizer files again") from error
