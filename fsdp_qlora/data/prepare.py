"""What a run trains on and is asked: from a configuration to tokens and prompts, without torch."""

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fsdp_qlora import __version__
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import row_formats, sources, token_dataset, tokens
from fsdp_qlora.data.row_formats import RowFormatter
from fsdp_qlora.data.sources import Source, parse_json, read_own_file
from fsdp_qlora.data.token_dataset import Sample, StoreBuilder, TokenDataset, TokenStore, split_name
from fsdp_qlora.data.tokenizer import Refused, TextTokenizer
from fsdp_qlora.errors import UserError, join

FEWEST_KEPT_BYTES = 2**20  # less is tokenized sooner than it is read back
NUM_HELD_OUT = 3
TEXT_TOKENS = 32  # of running text, in which nothing is a question
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class PreparedData:
    """Tokens of a run.

    Args:
        train: samples to learn.
        held_out: samples whose loss is measured; may be empty.
        num_test: samples that belong to neither.
        stores: what they lie in: of the data set, and of the held-out file if there is one.
        names: of the sources.
        formatter: how rows became text; None for dummy rows.
        example: a row that was read, or None.
    """

    train: TokenDataset
    held_out: TokenDataset
    num_test: int
    stores: tuple[TokenStore, ...]
    names: tuple[str, ...]
    formatter: RowFormatter | None = None
    example: Any = None

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Place and fault of the first rows that are none."""
        return [tuple(pair) for store in self.stores for pair in store.facts.get("bad", ())]

    @property
    def num_bad(self) -> int:
        """Rows that are none."""
        return sum(store.facts.get("num_bad", 0) for store in self.stores)

    @property
    def uses_chat(self) -> bool:
        """Whether some rows went through the chat template."""
        return any("chat" in kind for store in self.stores for kind in store.facts.get("kinds", ()))

    def check(self) -> None:
        """Refuse bad rows, and a data set of which nothing can be learned.

        Raises:
            UserError: the first bad rows, named by file and line, and how many more there are.
        """
        faults = [UserError(place, fault, "correct or remove it") for place, fault in self.bad]
        if faults:
            more = self.num_bad - len(faults)
            faults[-1].remedy += f" and {more:,} more bad rows" if more else ""
            raise join(faults)
        if not self.train.store.facts.get("num_rows"):
            name = ", ".join(self.names)
            raise UserError(name, "holds no rows", "give a data set with at least one row")


def prepare(
    cfg: TrainConfig,
    tokenizer: TextTokenizer | None,
    vocab_size: int,
    shows_progress: bool = False,
) -> PreparedData:
    """Read, tokenize and split the data of a run.

    Args:
        cfg: the run.
        tokenizer: may be None for dummy rows.
        vocab_size: rows of the model's embedding.
        shows_progress: a bar on the terminal, if it takes seconds.

    Returns:
        The tokens; call its `check` before training on them.

    Raises:
        UserError: no such data, a wrong template, no room for the parts asked for.
    """
    if cfg.dataset == sources.DUMMY:
        whole = tokens.dummy_samples(cfg.dataset_samples, cfg.context_length, vocab_size, cfg.seed)
        return PreparedData(
            *token_dataset.train_test_split(whole, cfg), (whole.store,), (sources.DUMMY,)
        )
    assert tokenizer is not None, "text without a tokenizer"
    formatter = row_formats.choose(
        cfg.template, tokenizer.chat(), tokenizer.names, cfg.train_on, cfg.system_prompt
    )
    found = sources.find(cfg.dataset, cfg, split_name(cfg.train_split), tokenizer.full)
    is_silent = not (shows_progress and sys.stderr.isatty())
    with tqdm(desc="tokenizing", unit=" rows", delay=2, disable=is_silent, leave=False) as bar:
        make = functools.partial(_tokenize, cfg, tokenizer, formatter, bar.update)
        whole = make(found)
        train, held_out, num_test = token_dataset.train_test_split(whole, cfg)
        good = (row for _, row in sources.read(found) if formatter.problem(row) is None)
        example, stores = next(good, None), [whole.store]
        eval_name = None if cfg.eval_samples else split_name(cfg.eval_split)
        if eval_name is not None:
            more = _find_eval(cfg, eval_name, tokenizer)
            held_out, found = make(more), [*found, *more]
            stores.append(held_out.store)
    largest = max(store.facts["largest_id"] for store in stores)
    if largest >= vocab_size:
        rule = f"the model's embedding has {vocab_size} rows"
        raise UserError(f"token id {largest}", rule, "use the model's tokenizer")
    if cfg.eval_every is not None and not len(held_out):
        remedy = "say --eval_split 100, 0.1 or a file"
        raise UserError(f"--eval_every {cfg.eval_every}", "no rows are held out", remedy)
    names = tuple(source.name for source in found)
    return PreparedData(train, held_out, num_test, tuple(stores), names, formatter, example)


def prepare_early(
    cfg: TrainConfig, tokenizer: TextTokenizer, vocab_size: int
) -> PreparedData | None:
    """Prepare the data of a run before its ranks are started, if they need not do it again.

    Args:
        cfg, tokenizer, vocab_size: as for `prepare`.

    Returns:
        The tokens; None for rows that cannot be kept, and are too many to be tokenized twice.

    Raises:
        UserError: as `prepare`.
    """
    split = split_name(cfg.train_split)
    found = [] if cfg.dataset == sources.DUMMY else sources.find(cfg.dataset, cfg, split)
    can_keep = token_dataset.cache_root(cfg.token_cache) is not None
    if not _is_small(found) and not (can_keep and all(source.fingerprint() for source in found)):
        return None
    return prepare(cfg, tokenizer, vocab_size, shows_progress=True)


def _is_small(found: list[Source]) -> bool:
    return sum(source.num_bytes for source in found) < FEWEST_KEPT_BYTES


def _find_eval(cfg: TrainConfig, name: str, tokenizer: TextTokenizer) -> list[Source]:
    """A file (or a hub set) of its own, or another split of what is trained on."""
    if os.path.exists(os.path.expanduser(name)) or "/" in name or "." in name:
        return sources.find(name, cfg, None, tokenizer.full)
    found = sources.find(cfg.dataset, cfg, name, tokenizer.full)
    if any(source.is_file for source in found):
        remedy = "give a share of the rows (0.1) or a file"
        raise UserError(f"--eval_split {name}", "is no file, and files have no splits", remedy)
    return found


def _tokenize(
    cfg: TrainConfig,
    tokenizer: TextTokenizer,
    formatter: RowFormatter,
    progress: Callable[[int], Any],
    found: list[Source],
) -> TokenDataset:
    """All samples of some sources, from the cache of tokens where they are in it."""

    def build(builder: StoreBuilder) -> TokenStore:
        rows = sources.read(found)
        return tokens.tokenize(builder, rows, formatter, tokenizer, cfg.context_length, progress)

    root = token_dataset.cache_root(cfg.token_cache)
    prints = [source.fingerprint() for source in found]
    if root is None or None in prints or (cfg.token_cache == "auto" and _is_small(found)):
        made = build(StoreBuilder(None))
    else:
        key = _key(prints, tokenizer, formatter, cfg.context_length)
        made = token_dataset.cached(root / key, build)
    if not len(made) and made.facts["num_rows"] and not made.facts["num_bad"]:
        rule = f"none has an answer within {cfg.context_length} tokens"
        remedy = "raise --context_length or check the answers"
        raise UserError(f"{made.facts['num_rows']} rows", rule, remedy)
    return TokenDataset(made)


def _key(
    prints: list, tokenizer: TextTokenizer, formatter: RowFormatter, context_length: int
) -> str:
    """Another name for other tokens; transformers renders the templates."""
    own = formatter.row_template
    how = [formatter.format_name, formatter.train_on, formatter.system, formatter.parts]
    jinja = [formatter.chat.template.source, own and own.source]
    versions = [token_dataset.VERSION, __version__, importlib.metadata.version("transformers")]
    parts = [versions, prints, tokenizer.fingerprint(), how, jinja, context_length]
    return f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues.

    Args:
        shown: what the user wrote, or the text itself.
        ids: its tokens, in the form of the training rows.
        expected: the answer of the data, or None.
    """

    shown: str
    ids: tuple[int, ...]
    expected: str | None = None


def has_prompts(cfg: TrainConfig) -> bool:
    """Return whether the user asks something of their own.

    Args:
        cfg: the run.
    """
    return cfg.sample_prompt is not None or cfg.sample_prompts not in ("auto", "off")


def choose_prompts(
    cfg: TrainConfig, ready: PreparedData, tokenizer: TextTokenizer | None
) -> tuple[Prompt, ...]:
    """Find the prompts of a run.

    Args:
        cfg: sample_prompt, sample_prompts, sample_tokens.
        ready: the data; its held-out rows are asked where the user names no prompt.
        tokenizer: None where there is no text.

    Returns:
        The prompts; none without a tokenizer.

    Raises:
        UserError: a file that cannot be read, a line of it that is no prompt, or a prompt that
            the template cannot render.
    """
    if tokenizer is None:
        return ()
    asked = [] if cfg.sample_prompt is None else [("--sample_prompt", cfg.sample_prompt)]
    if cfg.sample_prompts not in ("auto", "off"):
        asked += _read_prompts(Path(cfg.sample_prompts).expanduser())
    if asked or cfg.sample_prompts == "off" or ready.formatter is None:
        return tuple(_ask(place, question, ready, tokenizer) for place, question in asked)
    number = min(NUM_HELD_OUT, len(ready.held_out))
    chosen = np.random.default_rng(cfg.seed).permutation(len(ready.held_out))[:number]
    samples = (ready.held_out[index] for index in sorted(chosen.tolist()))
    return tuple(_ask_held_out(sample, tokenizer, cfg.sample_tokens) for sample in samples)


def _read_prompts(path: Path) -> list[tuple[str, Any]]:
    """Place and question of every line that is not empty."""
    remedy = "give a file with one prompt a line, auto or off"
    lines = read_own_file(path, "--sample_prompts", remedy).splitlines()
    found = [(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"--sample_prompts {path}", "is empty", remedy)
    is_json = path.suffix.lower() in JSON_SUFFIXES
    return [(place, _parse_prompt(place, line) if is_json else line) for place, line in found]


def _parse_prompt(place: str, line: str) -> Any:
    """A text, or the messages of a conversation."""
    value = parse_json(line)
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    is_chat = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if not value or not (isinstance(value, str) or is_chat):
        remedy = 'write "text", {"prompt": "text"} or {"messages": [...]}'
        raise UserError(place, "is no prompt in JSON", remedy)
    return value


def _ask(place: str, question: Any, ready: PreparedData, tokenizer: TextTokenizer) -> Prompt:
    """A prompt as the rows have it, less the beginning of text that the tokenizer puts there."""
    is_chat = isinstance(question, list)
    shown = str(question[-1].get("content", "")) if is_chat else question
    text = question
    try:
        if is_chat and ready.formatter is not None:
            text = ready.formatter.chat.prompt(question)
        elif ready.formatter is not None:
            text = ready.formatter.ask(question, ready.example)
    except Refused as refusal:
        raise UserError(
            f"{place} {shown}", f"cannot be asked ({refusal})", "leave it out"
        ) from refusal
    bos = tokenizer.names.get("bos_token", "") if tokenizer.adds_bos else ""
    return Prompt(shown, tuple(tokenizer.encode([text.removeprefix(bos)], True)[0].ids))


def _ask_held_out(sample: Sample, tokenizer: TextTokenizer, num_tokens: int) -> Prompt:
    """What stands before the first answer of a row; the beginning of running text."""
    flags = np.append(sample.is_trained, False)
    flags[0] = False
    first = int(flags.argmax())
    last = first + int((~flags[first:]).argmax())
    if first <= 1:
        first = min(TEXT_TOKENS, max(len(sample.input_ids) // 2, 1))
        last = min(last, first + num_tokens)
    ids = sample.input_ids.tolist()
    return Prompt(
        tokenizer.core.decode(ids[:first]).strip(),
        tuple(ids[:first]),
        tokenizer.core.decode(ids[first:last]).strip(),
    )
