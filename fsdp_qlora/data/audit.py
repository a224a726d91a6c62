"""What a data set is like, counted before the GPU is rented, and kept in the record of the run."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdp_qlora.config import Config
from fsdp_qlora.data import order, packing
from fsdp_qlora.data.prepare import Prepared
from fsdp_qlora.data.store import Part
from fsdp_qlora.data.tokenizer import PLAIN_PLACE

MOST_SIMULATED_ROWS = 20_000  # padding is counted on so many, drawn at random
NUM_EXAMPLES = 3
BAR_CHARS = 40
LEARNED = {
    "assistant": "answers",
    "completion": "answers",
    "last": "last answers",
    "all": "everything",
}


@dataclass(frozen=True)
class Audit:
    """Facts of the data of a run.

    Args:
        facts: by name, as JSON can hold them; `facts()` below says which.
    """

    facts: dict[str, Any]

    def __str__(self) -> str:
        facts = self.facts
        held_out = f" ({facts['num_held_out']:,} held out)" if facts["num_held_out"] else ""
        cut = f", {facts['num_cut']:,} cut at {facts['context_length']}" if facts["num_cut"] else ""
        num_dropped = facts["num_empty"] + facts["num_beyond"]
        dropped = f", {num_dropped:,} dropped (nothing to learn)" if num_dropped else ""
        num_parts = facts["num_train"] + facts["num_held_out"] + facts["num_test"]
        rows = (
            f"{num_parts:,} blocks" if "blocks" in facts["kinds"] else f"{facts['num_rows']:,} rows"
        )
        return (
            f"{rows}{held_out}{cut}{dropped}; {facts['num_tokens']:,} tokens, "
            f"{facts['num_trained_tokens']:,} of them trained, longest row "
            f"{facts['longest_tokens']:,}"
        )

    def lines(self) -> list[str]:
        """Return all facts for people, a line each, and the lengths as bars."""
        facts = self.facts
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"].items())
        share = facts["num_trained_tokens"] / max(facts["num_tokens"], 1)
        steps = "; ".join(
            f"{size} card{'s' * (int(size) > 1)}: {count['per_epoch']:,} an epoch, "
            f"{count['in_all']:,} in all"
            for size, count in facts["steps"].items()
        )
        padding = facts["padding_share"]
        return [
            f"rows      {facts['num_rows']:,} of {', '.join(facts['sources'])} ({kinds})",
            f"learned   {LEARNED[facts['train_on']]}: {facts['num_trained_tokens']:,} of "
            f"{facts['num_tokens']:,} tokens ({share:.1%})",
            f"length    median {facts['median_tokens']:,}, 95% up to {facts['p95_tokens']:,}, "
            f"longest {facts['longest_uncut_tokens']:,}; context {facts['context_length']:,}",
            *_bars(facts["lengths"], facts["context_length"]),
            *_losses(facts),
            f"end       the end of text is learned in {_share_of_rows(facts)} of the rows",
            f"parts     {facts['num_train']:,} to learn, {facts['num_held_out']:,} held out, "
            f"{facts['num_test']:,} left for a test",
            f"epoch     {facts['epoch_tokens']:,} tokens, {facts['epoch_trained_tokens']:,} of "
            "them learned",
            f"steps     {steps}",
            f"padding   {padding['batches']:.1%} in batches of like length, "
            f"{padding['packed']:.1%} if rows are packed",
            f"tokens    {facts['kept']}",
            *(f"note      {note}" for note in facts["notes"]),
        ]


def of(cfg: Config, ready: Prepared, world_size: int, pad_multiple: int) -> Audit:
    """Count what is worth knowing of the data of a run.

    Args:
        cfg: the run.
        ready: its tokens.
        world_size: ranks.
        pad_multiple: the width of a batch is a multiple of this.

    Returns:
        The facts. Rows: num_rows, kinds, num_bad, bad. Samples: num_cut, num_empty (nothing to
        learn), num_beyond (nothing to learn within the context), num_repeated, num_leaked (held
        out but also learned), num_with_end, num_learning_end; examples of their places. Parts:
        num_train, num_held_out, num_test. Tokens after cutting: num_tokens, num_trained_tokens,
        longest_tokens, epoch_tokens, epoch_trained_tokens. Tokens before: median_tokens,
        p95_tokens, longest_uncut_tokens, lengths (first, last, samples). Steps by world size,
        padding_share, and notes for the user.
    """
    parts = (ready.train, ready.held_out)
    uncut = np.concatenate([found.num_uncut for found in ready.stores])
    counted = _sum_counts(ready)
    repeated = _repeated(Part(ready.stores[0]))
    lengths = np.concatenate([part.lengths for part in parts])
    facts = {
        "sources": list(ready.names),
        "train_on": cfg.train_on,
        "context_length": cfg.context_length,
        **counted,
        "num_repeated": len(repeated),
        "num_leaked": _num_leaked(ready),
        "num_train": len(ready.train),
        "num_held_out": len(ready.held_out),
        "num_test": ready.num_test,
        "num_tokens": int(lengths.sum()),
        "num_trained_tokens": int(sum(part.num_trained.sum() for part in parts)),
        "longest_tokens": int(lengths.max(initial=0)),
        "epoch_tokens": int(ready.train.lengths.sum()),
        "epoch_trained_tokens": int(ready.train.num_trained.sum()),
        "median_tokens": int(np.median(uncut)) if len(uncut) else 0,
        "p95_tokens": int(np.percentile(uncut, 95)) if len(uncut) else 0,
        "longest_uncut_tokens": int(uncut.max(initial=0)),
        "num_tokens_cut": int(uncut.sum() - sum(np.diff(s.starts).sum() for s in ready.stores)),
        "lengths": _histogram(uncut),
        "steps": _steps(cfg, len(ready.train), world_size),
        "padding_share": _padding(cfg, ready.train.lengths, world_size, pad_multiple),
        "kept": ready.stores[0].note or "in memory only",
    }
    facts["examples"]["repeated"] = repeated[:NUM_EXAMPLES]
    return Audit(
        {**facts, "notes": [*_notes(cfg, facts, world_size), *_notes_on_chat(ready, facts)]}
    )


def _sum_counts(ready: Prepared) -> dict[str, Any]:
    """The counts of all stores together."""
    names = ["num_rows", "num_bad", "num_cut", "num_empty", "num_beyond"]
    names += ["num_with_end", "num_learning_end"]
    tables = [found.facts for found in ready.stores]
    kinds: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for table in tables:
        for kind, count in table.get("kinds", {}).items():
            kinds[kind] = kinds.get(kind, 0) + count
        for what, places in table.get("examples", {}).items():
            examples.setdefault(what, []).extend(places[:NUM_EXAMPLES])
    sums = {name: sum(table.get(name, 0) for table in tables) for name in names}
    bad = [f"{place}: {fault}" for place, fault in ready.bad]
    return {**sums, "kinds": kinds, "bad": bad, "examples": examples}


def _repeated(whole: Part) -> list[str]:
    """Rows that hold the same tokens as one before, as "x.jsonl:9 repeats x.jsonl:3"."""
    hashes = whole.store.hashes
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.nonzero(first[inverse] != np.arange(len(hashes)))[0]
    earlier = first[inverse][again]
    return [
        f"{whole.place(int(i))} repeats {whole.place(int(j))}"
        for i, j in zip(again, earlier, strict=True)
    ]


def _num_leaked(ready: Prepared) -> int:
    learned = ready.train.store.hashes[ready.train.indices]
    held_out = ready.held_out.store.hashes[ready.held_out.indices]
    return int(np.isin(held_out, learned).sum())


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """First and last length, and how many: each bar twice as wide as the one before."""
    bars, first = [], 1
    while len(lengths) and first <= lengths.max():
        last = max(2 * first - 1, 15)
        bars.append([first, last, int(((lengths >= first) & (lengths <= last)).sum())])
        first = last + 1
    return bars


def _steps(cfg: Config, num_rows: int, world_size: int) -> dict[str, dict[str, int]]:
    found = {}
    for size in sorted({1, 2, world_size}):
        rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * size
        per_epoch = order.num_steps(num_rows, rows_per_step)
        in_all = cfg.max_steps if cfg.max_steps > 0 else per_epoch * cfg.num_epochs
        found[str(size)] = {"per_epoch": per_epoch, "in_all": in_all}
    return found


def _padding(
    cfg: Config, lengths: np.ndarray, world_size: int, pad_multiple: int
) -> dict[str, float]:
    """Share of the tokens of an epoch that are padding, in batches and in packed sequences."""
    if not len(lengths):
        return {"batches": 0.0, "packed": 0.0}
    if len(lengths) > MOST_SIMULATED_ROWS:
        lengths = np.random.default_rng(cfg.seed).choice(lengths, MOST_SIMULATED_ROWS, False)
    shape = (cfg.batch_size, cfg.gradient_accumulation_steps, world_size)
    in_batches = sum(order.padded_tokens(lengths, *shape, cfg.seed, pad_multiple))
    packed = packing.pack(lengths, cfg.context_length, world_size, cfg.seed, 0)
    return {
        "batches": 1 - int(lengths.sum()) / in_batches,
        "packed": 1 - int(lengths.sum()) / (len(packed) * cfg.context_length),
    }


def _notes(cfg: Config, facts: dict[str, Any], world_size: int) -> list[str]:
    """What the user should look at before the run."""
    rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    num_samples = facts["num_train"] + facts["num_held_out"] + facts["num_test"]
    is_few = 0 < facts["num_train"] < rows_per_step
    table = [
        (facts["num_bad"], f"{facts['num_bad']:,} rows cannot be used: they must be corrected"),
        (
            facts["num_cut"] * 10 > num_samples,
            "more than a tenth of the rows is cut: raise --context_length",
        ),
        (
            num_samples and not facts["num_learning_end"] and "blocks" not in facts["kinds"],
            "the end of text is never learned: answers will not stop by it",
        ),
        (is_few, f"{facts['num_train']} rows do not fill a step of {rows_per_step}"),
        (facts["num_leaked"], f"{facts['num_leaked']:,} held-out rows are also learned"),
    ]
    return [note for is_so, note in table if is_so]


def _notes_on_chat(ready: Prepared, facts: dict[str, Any]) -> list[str]:
    if ready.writer is None or not ready.uses_chat:
        return []
    num_texts = sum(len(found.starts) - 1 for found in ready.stores)
    num_texts += facts["num_empty"] + facts["num_beyond"]
    table = [
        (
            ready.writer.chat.template.place == PLAIN_PLACE,
            "the tokenizer has no chat template: '### Human: ... ### Assistant: ...' is used",
        ),
        (
            num_texts > facts["num_rows"],
            f"{facts['num_rows']:,} rows give {num_texts:,} samples: the chat template writes "
            "earlier turns in another way, so each answer stands alone",
        ),
    ]
    return [note for is_so, note in table if is_so]


def _bars(lengths: list[list[int]], context_length: int) -> list[str]:
    most = max((count for _, _, count in lengths), default=0)
    lines = []
    for first, last, count in lengths:
        bar = "█" * -(-BAR_CHARS * count // max(most, 1))
        mark = "  <- context" if first <= context_length <= last else ""
        lines.append(f"          {f'{first:,}-{last:,}':>15} {bar} {count:,}{mark}")
    return lines


def _losses(facts: dict[str, Any]) -> list[str]:
    """What is cut, left out or there twice, with the places of the first."""
    words = {
        "cut": f"rows are longer than the context and lose {facts['num_tokens_cut']:,} tokens",
        "empty": "rows have nothing to learn and are left out",
        "beyond": "rows have nothing to learn within the context and are left out",
        "repeated": "rows hold the same as another",
    }
    return [
        f"{what:<9} {facts[f'num_{what}']:,} {text}: {', '.join(facts['examples'].get(what, []))}"
        for what, text in words.items()
        if facts[f"num_{what}"]
    ]


def _share_of_rows(facts: dict[str, Any]) -> str:
    num_samples = facts["num_train"] + facts["num_held_out"] + facts["num_test"]
    return f"{facts['num_learning_end'] / max(num_samples, 1):.1%}"
