"""`python -m fsdp_qlora data [options of train.py] [--rows 3] [--json]`: look before you rent."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.arch import files
from fsdp_qlora.config import Config
from fsdp_qlora.data import audit, prepare, sources, tokenizer
from fsdp_qlora.data.prepare import Prepared
from fsdp_qlora.data.store import Sample
from fsdp_qlora.data.tokenizer import TextTokenizer
from fsdp_qlora.errors import DONE, UserError, one_line

USAGE = """usage: python -m fsdp_qlora data [--rows 3] [--json] [options of train.py ...]

Reads and tokenizes the data of a run as the run would, and says what is in it: rows, lengths
against the context, what is cut or left out, steps, padding, and some rows with the tokens that
are learned marked. It needs neither a GPU nor the model's weights, only its tokenizer.

  --rows N     how many rows are shown [3]
  --json       all facts as one JSON object, no rows"""
LEARNED, GIVEN, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
MOST_CHARS = 700  # of a stretch of text that is shown


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
    num_rows, as_json, rest = _own_options(argv)
    cfg = config.parse(rest, say=lambda line: print(line, file=sys.stderr))
    info = arch.read(cfg.model_name, need_weights=False)
    is_dummy = cfg.dataset == sources.DUMMY
    path = Path() if is_dummy else _tokenizer_directory(cfg.model_name, info)
    text_tokenizer = None if is_dummy else tokenizer.read(path)
    with _progress() as progress:
        ready = prepare.prepare(
            cfg,
            text_tokenizer,
            info.vocab_size,
            lambda: tokenizer.load(path),
            lambda n: progress.update(n),
        )
    num_cards = hardware.count_gpus(os.environ)
    world_size = cfg.world_size if cfg.world_size > 0 else max(num_cards, 1)
    found = audit.of(cfg, ready, world_size, 64 if num_cards else 8)
    if as_json:
        print(json.dumps(found.facts, indent=1))
    else:
        print("\n".join(map(one_line, found.lines())))
        print("".join(_shown(cfg, ready, text_tokenizer, num_rows)), end="")
    ready.check()
    return DONE


def _own_options(argv: list[str]) -> tuple[int, bool, list[str]]:
    """The options of this verb alone, and the rest."""
    rest, num_rows, words = [], "3", list(argv)
    while words:
        word = words.pop(0)
        if word == "--rows" and words:
            num_rows = words.pop(0)
        elif word.startswith("--rows="):
            num_rows = word.partition("=")[2]
        elif word != "--json":
            rest.append(word)
    if not num_rows.isdecimal():
        raise UserError(f"--rows {num_rows}", "must be a whole number", "default is 3")
    return int(num_rows), "--json" in argv, rest


def _tokenizer_directory(model_name: str, info: arch.ModelInfo) -> Path:
    """Where the tokenizer lies; of a model on the hub its files are brought, not its weights."""
    has_files = info.path is not None and any(
        (info.path / name).exists() for name in tokenizer.TOKENIZER_FILES
    )
    if has_files:
        assert info.path is not None
        return info.path
    if Path(model_name).expanduser().is_dir() or "/" not in model_name:
        tokenizer.require_files(Path(model_name))
    return files.fetch_tokenizer(model_name)


def _progress() -> Any:
    from tqdm import tqdm

    is_silent = not sys.stderr.isatty()
    return tqdm(desc="tokenizing", unit=" rows", delay=2, disable=is_silent, leave=False)


def _shown(
    cfg: Config, ready: Prepared, text_tokenizer: TextTokenizer | None, num_rows: int
) -> Iterator[str]:
    """Some rows as the model sees them; what is learned in colour, or between ⟦ and ⟧."""
    if text_tokenizer is None or not len(ready.train):
        return
    has_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    marks = (LEARNED, PLAIN, GIVEN, PLAIN) if has_colour else ("⟦", "⟧", "", "")
    chosen = np.random.default_rng(cfg.seed).permutation(len(ready.train))[:num_rows]
    for index in sorted(chosen.tolist()):
        sample = ready.train[index]
        place, num_tokens = one_line(str(ready.train.place(index))), len(sample.input_ids)
        yield f"\n{place}: {num_tokens:,} tokens, {sample.num_trained_tokens:,} learned\n"
        for is_learned, text in stretches(sample, text_tokenizer):
            before, after = marks[:2] if is_learned else marks[2:]
            yield f"{before}{_safe(text)}{after}"
        yield "\n"


def stretches(sample: Sample, text_tokenizer: TextTokenizer) -> Iterator[tuple[bool, str]]:
    """Decode a sample in stretches of tokens that are all learned, or all given.

    Args:
        sample: ids.
        text_tokenizer: made them.

    Yields:
        Whether a stretch is learned, and its text, special tokens written out.
    """
    is_learned = sample.is_trained.copy()
    is_learned[:1] = False  # nothing is asked for the first token
    edges = np.nonzero(np.diff(is_learned))[0] + 1
    for part in np.split(np.arange(len(is_learned)), edges):
        text = text_tokenizer.core.decode(sample.input_ids[part].tolist(), False)
        yield bool(is_learned[part[0]]), text


def _safe(text: str) -> str:
    """Long text without its middle, and no terminal codes of the data's own."""
    if len(text) > MOST_CHARS:
        num_left_out = len(text) - MOST_CHARS
        head, tail = text[: MOST_CHARS // 2], text[-MOST_CHARS // 2 :]
        text = f"{head} [... {num_left_out:,} characters ...] {tail}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
