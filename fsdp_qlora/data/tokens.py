"""Rows to token ids, with what is lost on the way counted."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdp_qlora.data import templates
from fsdp_qlora.errors import UserError


@dataclass(frozen=True, eq=False)
class Sample:
    """One row as ids; ids from `num_prompt_tokens` on are trained, the very first never is.

    Args:
        input_ids: int32 array of shape [num_tokens].
        num_prompt_tokens: leading ids that are given and not learned.
    """

    input_ids: np.ndarray
    num_prompt_tokens: int

    @property
    def num_trained_tokens(self) -> int:
        """Ids that are the target of a prediction."""
        return max(len(self.input_ids) - max(self.num_prompt_tokens, 1), 0)


@dataclass(frozen=True)
class Audit:
    """What became of the rows; tokens are counted after cutting.

    Args:
        num_rows: rows read.
        num_cut: rows longer than the context, trained up to there.
        num_dropped: rows without a token to train (no answer, or none within the context).
        context_length: tokens a row may have.
        num_tokens: tokens of the rows that are kept.
        num_trained_tokens: those of them that are targets.
        longest_tokens: length of the longest row that is kept.
        num_held_out: kept rows that are set aside for the held-out loss.
    """

    num_rows: int
    num_cut: int
    num_dropped: int
    context_length: int
    num_tokens: int
    num_trained_tokens: int
    longest_tokens: int
    num_held_out: int = 0

    def __str__(self) -> str:
        held_out = f" ({self.num_held_out} held out)" if self.num_held_out else ""
        cut = f", {self.num_cut:,} cut at {self.context_length}" if self.num_cut else ""
        dropped = f", {self.num_dropped:,} dropped (nothing to learn)" if self.num_dropped else ""
        return (
            f"{self.num_rows:,} rows{held_out}{cut}{dropped}; {self.num_tokens:,} tokens, "
            f"{self.num_trained_tokens:,} of them trained, longest row {self.longest_tokens:,}"
        )


def tokenize(
    rows: list[dict], tokenizer: Any, context_length: int, vocab_size: int
) -> tuple[list[Sample], Audit]:
    """Tokenize rows: prompt masked, end-of-text appended and trained.

    Prompt and completion are tokenized as one text, as they are at generation time; what the
    prompt alone shares with it from the left is the masked part. A row that is cut gets no
    end-of-text: it did not end. A beginning-of-text id appears if the tokenizer adds one.

    Args:
        rows: rows that `templates.render` accepts.
        tokenizer: a transformers tokenizer.
        context_length: most tokens a sample may have.
        vocab_size: rows of the model's embedding.

    Returns:
        The samples in the order of the rows, and the count of what was cut or dropped.

    Raises:
        UserError: no end-of-text token, an id outside the embedding, or no row left.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise UserError("tokenizer", "has no end-of-text token", remedy)
    pairs = [templates.render(row) for row in rows]
    prompts = _encode(tokenizer, [prompt for prompt, _ in pairs])
    texts = _encode(tokenizer, [prompt + completion for prompt, completion in pairs])
    samples, num_cut, num_dropped = [], 0, 0
    for (_, completion), prompt_ids, ids in zip(pairs, prompts, texts, strict=True):
        if ids[-1:] != [eos_id]:
            ids = [*ids, eos_id]
        cut_ids = np.array(ids[:context_length], dtype=np.int32)
        sample = Sample(cut_ids, _shared_prefix(prompt_ids, ids[:-1]))
        if not completion.strip() or sample.num_trained_tokens == 0:
            num_dropped += 1
            continue
        samples.append(sample)
        num_cut += len(ids) > context_length
    if not samples:
        rule = f"none has an answer within {context_length} tokens"
        raise UserError(f"{len(rows)} rows", rule, "raise --context_length or check the answers")
    _check_ids(samples, vocab_size)
    return samples, audit(samples, len(rows), num_cut, num_dropped, context_length)


def dummy_samples(num: int, context_length: int, vocab_size: int, seed: int) -> list[Sample]:
    """Make random rows of full length, every id trained: for measuring speed and memory.

    Args:
        num: rows.
        context_length: tokens of each row.
        vocab_size: ids are drawn from [0, vocab_size).
        seed: seed of the draw.

    Returns:
        `num` samples of `context_length` ids.
    """
    ids = np.random.default_rng(seed).integers(
        vocab_size, size=(num, context_length), dtype=np.int32
    )
    return [Sample(row, 0) for row in ids]


def audit(
    samples: list[Sample], num_rows: int, num_cut: int, num_dropped: int, context_length: int
) -> Audit:
    """Count the tokens of the samples that were kept.

    Args:
        samples: the rows that were kept.
        num_rows: rows that were read.
        num_cut: rows that were cut.
        num_dropped: rows that were dropped.
        context_length: most tokens a sample may have.

    Returns:
        The counts, with a one-line text form.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    num_trained = sum(sample.num_trained_tokens for sample in samples)
    return Audit(
        num_rows, num_cut, num_dropped, context_length, sum(lengths), num_trained, max(lengths)
    )


def split(samples: list[Sample], num_eval: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Set rows aside for the held-out loss.

    Args:
        samples: all samples.
        num_eval: how many to set aside, chosen at random.
        seed: seed of the choice.

    Returns:
        (train, held_out), each in the order of `samples`.

    Raises:
        UserError: no row would be left to train on.
    """
    if num_eval >= len(samples):
        rule = f"only {len(samples)} rows can be used, and some must be trained on"
        raise UserError(f"--eval_samples {num_eval}", rule, f"at most {len(samples) - 1}")
    chosen = set(np.random.default_rng(seed).permutation(len(samples))[:num_eval].tolist())
    train = [sample for i, sample in enumerate(samples) if i not in chosen]
    return train, [samples[i] for i in sorted(chosen)]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]


def _shared_prefix(prompt_ids: list[int], ids: list[int]) -> int:
    pairs = enumerate(zip(prompt_ids, ids, strict=False))
    differ = (i for i, (ours, theirs) in pairs if ours != theirs)
    return next(differ, min(len(prompt_ids), len(ids)))


def _check_ids(samples: list[Sample], vocab_size: int) -> None:
    largest = max(int(sample.input_ids.max()) for sample in samples)
    if largest >= vocab_size:
        rule = f"the model's embedding has {vocab_size} rows"
        raise UserError(f"token id {largest}", rule, "use the tokenizer that belongs to the model")
