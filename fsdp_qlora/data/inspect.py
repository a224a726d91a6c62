"""`python -m fsdp_qlora data [options of train.py] [--rows 3] [--json]`: look before you rent.

The same facts are kept in the record of every run.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.arch import files
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import batches, prepare, sources, tokenizer
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.data.token_dataset import TokenDataset
from fsdp_qlora.data.tokenizer import TextTokenizer
from fsdp_qlora.data.tokens import NUMBERS
from fsdp_qlora.errors import DONE, UserError, one_line
from fsdp_qlora.planning.sizes import PAD_MULTIPLES

USAGE = """usage: python -m fsdp_qlora data [--rows 3] [--json] [options of train.py ...]

Reads and tokenizes the data of a run as the run would, and says what is in it: rows, lengths
against the context, what is cut or left out, steps, padding, and some rows with the tokens that
are learned marked. It needs neither a GPU nor the model's weights, only its tokenizer.

  --rows N     how many rows are shown [3]
  --json       all facts as one JSON object, no rows"""
MOST_CHARS = 700  # of a stretch of text that is shown
MOST_SIMULATED_ROWS = 20_000  # padding is counted on so many, drawn at random
NUM_EXAMPLES = 3
TRAINED_ON = {"assistant": "answers", "completion": "answers", "last": "last answers"}
REPORT = """\
rows      {num_rows} of {sources} ({kinds})
learned   {train_on}: {num_trained_tokens} of {num_tokens} tokens ({trained_share:.1%})
length    median {median_tokens}, 95% up to {p95_tokens}, longest {longest_uncut_tokens}; \
context {context_length}
{losses}
end       the end of text is learned in {end_share:.1%} of the rows
parts     {num_train} to learn, {num_held_out} held out, {num_test} left for a test
epoch     {epoch_tokens} tokens, {epoch_trained_tokens} of them learned
steps     {steps}
padding   {batches:.1%} in batches of like length, {packed:.1%} if rows are packed
tokens    {kept}
{notes}"""
LOSSES = {
    "cut": "rows are longer than the context and lose {num_tokens_cut} tokens",
    "empty": "rows have nothing to learn and are left out",
    "beyond": "rows have nothing to learn within the context and are left out",
    "repeated": "rows hold the same as another",
}


@dataclass(frozen=True)
class Audit:
    """Facts of the data of a run.

    Args:
        facts: by name, as JSON can hold them; `audit()` below says which.
    """

    facts: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """Samples of all parts."""
        return sum(self.facts[name] for name in ("num_train", "num_held_out", "num_test"))

    def __str__(self) -> str:
        facts = self.facts
        held_out = f" ({facts['num_held_out']:,} held out)" if facts["num_held_out"] else ""
        cut = f", {facts['num_cut']:,} cut at {facts['context_length']}" if facts["num_cut"] else ""
        num_dropped = facts["num_empty"] + facts["num_beyond"]
        dropped = f", {num_dropped:,} dropped (nothing to learn)" if num_dropped else ""
        is_text = "blocks" in facts["kinds"]
        rows = f"{self.num_samples:,} blocks" if is_text else f"{facts['num_rows']:,} rows"
        return (
            f"{rows}{held_out}{cut}{dropped}; {facts['num_tokens']:,} tokens, "
            f"{facts['num_trained_tokens']:,} of them trained, longest row "
            f"{facts['longest_tokens']:,}"
        )

    def lines(self) -> list[str]:
        """Return all facts for people, a line each."""
        facts = self.facts
        shown = {k: f"{v:,}" if isinstance(v, int) else v for k, v in facts.items()}
        steps = "; ".join(
            f"{size} GPU{'s' * (int(size) > 1)}: {count['per_epoch']:,} an epoch, "
            f"{count['in_all']:,} in total"
            for size, count in facts["steps"].items()
        )
        losses = (
            f"{what:<9} {shown[f'num_{what}']} {words.format_map(shown)}: "
            + ", ".join(facts["examples"].get(what, []))
            for what, words in LOSSES.items()
            if facts[f"num_{what}"]
        )
        shown |= facts["padding_share"] | {
            "sources": ", ".join(facts["sources"]),
            "kinds": ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"].items()),
            "train_on": TRAINED_ON.get(facts["train_on"], "everything"),
            "trained_share": facts["num_trained_tokens"] / max(facts["num_tokens"], 1),
            "losses": "\0".join(losses),
            "end_share": facts["num_learning_end"] / max(self.num_samples, 1),
            "steps": steps,
            "notes": "\0".join(f"note      {note}" for note in facts["notes"]),
        }
        text = REPORT.replace("\n", "\0").format_map(shown)  # a name may hold a line break
        return [line for line in text.split("\0") if line]


def audit(cfg: TrainConfig, ready: PreparedData, world_size: int, pad_multiple: int) -> Audit:
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
        p95_tokens, longest_uncut_tokens. Steps by world size, padding_share, and notes for the
        user.
    """
    parts = (ready.train, ready.held_out)
    tables = [store.facts for store in ready.stores]
    examples: dict[str, list[str]] = {}
    for what, places in (pair for table in tables for pair in table.get("examples", {}).items()):
        examples.setdefault(what, []).extend(places[:NUM_EXAMPLES])
    repeated = _repeated(TokenDataset(ready.stores[0]))
    examples["repeated"] = repeated[:NUM_EXAMPLES]
    uncut = np.concatenate([store.num_uncut for store in ready.stores])
    lengths = np.concatenate([part.lengths for part in parts])
    facts = {
        "sources": list(ready.names),
        "train_on": cfg.train_on,
        "context_length": cfg.context_length,
        **{name: sum(table.get(name, 0) for table in tables) for name in NUMBERS},
        "kinds": dict(sum((Counter(table.get("kinds", {})) for table in tables), Counter())),
        "bad": [f"{place}: {fault}" for place, fault in ready.bad],
        "examples": examples,
        "num_repeated": len(repeated),
        "num_leaked": int(np.isin(ready.held_out.hashes, ready.train.hashes).sum()),
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
        "num_tokens_cut": int(uncut.sum()) - sum(len(store.codes) for store in ready.stores),
        "steps": _steps(cfg, len(ready.train), world_size),
        "padding_share": _padding(cfg, ready.train.lengths, world_size, pad_multiple),
        "kept": ready.stores[0].note or "in memory only",
    }
    return Audit({**facts, "notes": _notes(cfg, ready, Audit(facts), world_size)})


def _repeated(whole: TokenDataset) -> list[str]:
    """Rows that hold the same tokens as one before, as "x.jsonl:9 repeats x.jsonl:3"."""
    _, first, inverse = np.unique(whole.store.hashes, return_index=True, return_inverse=True)
    earlier = first[inverse]
    again = np.nonzero(earlier != np.arange(len(whole)))[0].tolist()
    return [f"{whole.place(i)} repeats {whole.place(int(earlier[i]))}" for i in again]


def _steps(cfg: TrainConfig, num_rows: int, world_size: int) -> dict[str, dict[str, int]]:
    found = {}
    for size in sorted({1, 2, world_size}):
        rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * size
        per_epoch = batches.steps_per_epoch(num_rows, rows_per_step)
        total = cfg.max_steps if cfg.max_steps > 0 else per_epoch * cfg.num_epochs
        found[str(size)] = {"per_epoch": per_epoch, "in_all": total}
    return found


def _padding(
    cfg: TrainConfig, lengths: np.ndarray, world_size: int, pad_multiple: int
) -> dict[str, float]:
    """Share of the tokens of an epoch that are padding, in batches and in packed sequences."""
    if not len(lengths):
        return {"batches": 0.0, "packed": 0.0}
    if len(lengths) > MOST_SIMULATED_ROWS:
        lengths = np.random.default_rng(cfg.seed).choice(lengths, MOST_SIMULATED_ROWS, False)
    total = int(lengths.sum())
    num_packed = len(batches.pack(lengths, cfg.context_length, world_size, cfg.seed, 0))
    sampler = batches.sampler_config(cfg, world_size, 0, pad_multiple)
    num_padded = sum(batches.padded_tokens(lengths, sampler))
    packed = 1 - total / (num_packed * cfg.context_length)
    return {"batches": 1 - total / num_padded, "packed": packed}


def _notes(cfg: TrainConfig, ready: PreparedData, found: Audit, world_size: int) -> list[str]:
    """What the user should look at before the run."""
    facts, uses_chat = found.facts, ready.formatter is not None and ready.uses_chat
    rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    place = ready.formatter.chat.template.place if ready.formatter is not None else ""
    num_texts = sum(map(len, ready.stores)) + facts["num_empty"] + facts["num_beyond"]
    is_cut = facts["num_cut"] * 10 > found.num_samples
    is_few = 0 < facts["num_train"] < rows_per_step
    is_split = uses_chat and num_texts > facts["num_rows"]
    ends = facts["num_learning_end"] or "blocks" in facts["kinds"] or not found.num_samples
    plain = uses_chat and place == tokenizer.PLAIN_PLACE
    table = {
        f"{facts['num_bad']:,} rows cannot be used: they must be corrected": facts["num_bad"],
        "more than a tenth of the rows is cut: raise --context_length": is_cut,
        "the end of text is never learned: answers will not stop by it": not ends,
        f"{facts['num_train']} rows do not fill a step of {rows_per_step}": is_few,
        f"{facts['num_leaked']:,} held-out rows are also learned": facts["num_leaked"],
        "the tokenizer has no chat template: '### Human: ... ### Assistant: ...' is used": plain,
        f"{facts['num_rows']:,} rows give {num_texts:,} samples: the chat template writes "
        "earlier turns in another way, so each answer stands alone": is_split,
    }
    return [note for note, is_so in table.items() if is_so]


def main(argv: list[str]) -> int:
    """Audit the data of a run and print what is found.

    Args:
        argv: --rows, --json, and the options of train.py.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, or data that cannot be trained on; bad rows come last, after
            the rest has been printed.
    """
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return DONE
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", nargs="?", default="3")
    parser.add_argument("--json", action="store_true")
    own, run_argv = parser.parse_known_args(argv)
    if not (own.rows or "").isdecimal():
        raise UserError(f"--rows {own.rows}", "must be a whole number", "default is 3")
    cfg = config.parse(run_argv, say=lambda line: print(line, file=sys.stderr))
    info = arch.read(cfg.model_name, need_weights=False)
    is_dummy = cfg.dataset == sources.DUMMY
    path = Path() if is_dummy else _tokenizer_directory(cfg.model_name, info)
    text_tokenizer = None if is_dummy else tokenizer.read(path)
    ready = prepare.prepare(cfg, text_tokenizer, info.vocab_size, shows_progress=True)
    num_gpus = hardware.count_gpus(os.environ)
    world_size = cfg.world_size if cfg.world_size > 0 else max(num_gpus, 1)
    found = audit(cfg, ready, world_size, PAD_MULTIPLES["cuda" if num_gpus else "cpu"])
    if own.json:
        print(json.dumps(found.facts, indent=1))
    else:
        print("\n".join(map(one_line, found.lines())))
        print("".join(_shown(cfg, ready, text_tokenizer, int(own.rows))), end="")
    ready.check()
    return DONE


def _tokenizer_directory(model_name: str, info: arch.ModelInfo) -> Path:
    """Where the tokenizer lies; of a model on the hub its files are brought, not its weights."""
    if info.path is not None and tokenizer.has_files(info.path):
        return info.path
    if Path(model_name).expanduser().is_dir() or "/" not in model_name:
        tokenizer.require_files(Path(model_name))
    return files.fetch_tokenizer(model_name)


def _shown(
    cfg: TrainConfig, ready: PreparedData, text_tokenizer: TextTokenizer | None, num_rows: int
) -> Iterator[str]:
    """Some rows as the model sees them, what is learned between ⟦ and ⟧."""
    if text_tokenizer is None or not len(ready.train):
        return
    chosen = np.random.default_rng(cfg.seed).permutation(len(ready.train))[:num_rows]
    for index in sorted(chosen.tolist()):
        sample = ready.train[index]
        place, num_tokens = one_line(str(ready.train.place(index))), len(sample.input_ids)
        yield f"\n{place}: {num_tokens:,} tokens, {sample.num_trained_tokens:,} learned\n"
        is_learned = sample.is_trained.copy()
        is_learned[:1] = False  # nothing is asked for the first token
        edges = np.nonzero(np.diff(is_learned))[0] + 1
        for part in np.split(np.arange(num_tokens), edges):
            text = _safe(text_tokenizer.core.decode(sample.input_ids[part].tolist(), False))
            yield f"⟦{text}⟧" if is_learned[part[0]] else text
        yield "\n"


def _safe(text: str) -> str:
    """Long text without its middle, and no terminal codes of the data's own."""
    if len(text) > MOST_CHARS:
        num_left_out = len(text) - MOST_CHARS
        head, tail = text[: MOST_CHARS // 2], text[-MOST_CHARS // 2 :]
        text = f"{head} [... {num_left_out:,} characters ...] {tail}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
