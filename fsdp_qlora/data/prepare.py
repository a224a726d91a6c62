"""From a configuration to tokens, without torch: what the ranks train on and the audit looks at."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdp_qlora import __version__
from fsdp_qlora.config import Config
from fsdp_qlora.data import sources, store, templates, tokens
from fsdp_qlora.data.rows import Place
from fsdp_qlora.data.sources import Source
from fsdp_qlora.data.store import Builder, Part, Store
from fsdp_qlora.data.templates import Writer
from fsdp_qlora.data.tokenizer import TextTokenizer
from fsdp_qlora.errors import UserError, join

FEWEST_KEPT_BYTES = 2**20  # less is tokenized sooner than it is read back

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """Tokens of a run.

    Args:
        train: samples to learn.
        held_out: samples whose loss is measured; may be empty.
        num_test: samples that belong to neither.
        stores: what they lie in: of the data set, and of the held-out file if there is one.
        names: of the sources.
        writer: how rows became text; None for dummy rows.
        example: a row that was read, or None.
    """

    train: Part
    held_out: Part
    num_test: int
    stores: tuple[Store, ...]
    names: tuple[str, ...]
    writer: Writer | None = None
    example: Any = None

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Place and fault of the first rows that are none."""
        return [tuple(pair) for found in self.stores for pair in found.facts.get("bad", ())]

    @property
    def uses_chat(self) -> bool:
        """Whether some rows went through the chat template."""
        kinds = [kind for found in self.stores for kind in found.facts.get("kinds", ())]
        return any("chat" in kind for kind in kinds)

    @property
    def num_bad(self) -> int:
        """Rows that are none."""
        return sum(found.facts.get("num_bad", 0) for found in self.stores)

    def check(self) -> None:
        """Refuse bad rows, and a data set of which nothing can be learned.

        Raises:
            UserError: the first bad rows, named by file and line, and how many more there are.
        """
        faults = [UserError(place, fault, "correct or remove it") for place, fault in self.bad]
        if faults:
            more = self.num_bad - len(faults)
            last = faults[-1]
            last.remedy += f" and {more:,} more bad rows" if more else ""
            raise join(faults)
        if not self.train.store.facts.get("num_rows"):
            name = ", ".join(self.names)
            raise UserError(name, "holds no rows", "give a data set with at least one row")


def prepare(
    cfg: Config,
    tokenizer: TextTokenizer | None,
    vocab_size: int,
    load_tokenizer: Callable[[], Any] = lambda: None,
    progress: Progress = lambda num_rows: None,
) -> Prepared:
    """Read, tokenize and part the data of a run.

    Args:
        cfg: the run.
        tokenizer: may be None for dummy rows.
        vocab_size: rows of the model's embedding.
        load_tokenizer: gives the transformers tokenizer, for a function of the user's own.
        progress: told now and then how many more rows are done.

    Returns:
        The tokens; call its `check` before training on them.

    Raises:
        UserError: no such data, a wrong template, no room for the parts asked for.
    """
    if cfg.dataset == sources.DUMMY:
        whole = tokens.dummy_samples(cfg.dataset_samples, cfg.context_length, vocab_size, cfg.seed)
        train, held_out, num_test = part(whole, cfg)
        return Prepared(train, held_out, num_test, (whole.store,), (sources.DUMMY,))
    assert tokenizer is not None, "text without a tokenizer"
    writer = templates.choose(
        cfg.template, tokenizer.chat(), tokenizer.names, cfg.train_on, cfg.system_prompt
    )
    make = functools.partial(_tokens_of, cfg, tokenizer, writer, vocab_size, progress=progress)
    wanted = sources.Wanted(cfg.dataset_samples, cfg.seed, _name(cfg.train_split), load_tokenizer)
    found = sources.find(cfg.dataset, wanted)
    whole = make(found)
    example = next((row for _, row in _good_rows(found, writer)), None)
    eval_name = None if cfg.eval_samples else _name(cfg.eval_split)
    if eval_name is None:
        train, held_out, num_test = part(whole, cfg)
        stores: tuple[Store, ...] = (whole.store,)
    else:
        train, _, num_test = part(whole, cfg)
        more = _find_eval(cfg, eval_name, wanted)
        held_out = make(more)
        stores, found = (whole.store, held_out.store), [*found, *more]
    names = tuple(source.name for source in found)
    if cfg.eval_every is not None and not len(held_out):
        remedy = "say --eval_samples N, --eval_split 0.1 or a file"
        raise UserError(f"--eval_every {cfg.eval_every}", "no rows are held out", remedy)
    return Prepared(train, held_out, num_test, stores, names, writer, example)


def prepare_early(
    cfg: Config, tokenizer: TextTokenizer, vocab_size: int, progress: Progress
) -> Prepared | None:
    """Prepare the data of a run before its ranks are started, if they need not do it again.

    Args:
        cfg, tokenizer, vocab_size, progress: as for `prepare`.

    Returns:
        The tokens; None for rows that cannot be kept, and are too many to be tokenized twice.

    Raises:
        UserError: as `prepare`.
    """
    wanted = sources.Wanted(cfg.dataset_samples, cfg.seed, _name(cfg.train_split))
    found = [] if cfg.dataset == sources.DUMMY else sources.find(cfg.dataset, wanted)
    is_small = sum(source.num_bytes for source in found) < FEWEST_KEPT_BYTES
    if not is_small and (store.root(cfg.token_cache) is None or not _can_be_told(found)):
        return None
    return prepare(cfg, tokenizer, vocab_size, progress=progress)


def _can_be_told(found: list[Source]) -> bool:
    return None not in [source.fingerprint() for source in found]


def _find_eval(cfg: Config, name: str, wanted: sources.Wanted) -> list[Source]:
    """A file (or a hub set) of its own, or another split of what is trained on."""
    is_file = os.path.exists(os.path.expanduser(name)) or "/" in name or "." in name
    if is_file:
        return sources.find(name, sources.Wanted(wanted.num_samples, wanted.seed))
    split = sources.Wanted(wanted.num_samples, wanted.seed, name, wanted.load_tokenizer)
    found = sources.find(cfg.dataset, split)
    if any(source.is_file for source in found):
        remedy = "give a share of the rows (0.1) or a file"
        raise UserError(f"--eval_split {name}", "is no file, and files have no splits", remedy)
    return found


def _tokens_of(
    cfg: Config,
    tokenizer: TextTokenizer,
    writer: Writer,
    vocab_size: int,
    found: list[Source],
    progress: Progress,
) -> Part:
    """All samples of some sources, from the cache of tokens where they are in it."""
    rows = functools.partial(_all_rows, found)

    def build(builder: Builder) -> Store:
        return tokens.fill(builder, rows(), writer, tokenizer, cfg.context_length, progress)

    root = store.root(cfg.token_cache)
    is_small = sum(source.num_bytes for source in found) < FEWEST_KEPT_BYTES
    prints = [source.fingerprint() for source in found]
    if root is None or None in prints or (cfg.token_cache == "auto" and is_small):
        made = build(Builder(None))
    else:
        made = store.keep(root / _key(prints, tokenizer, writer, cfg.context_length), build)
    tokens.check_ids(made.facts["largest_id"], vocab_size)
    whole = Part(made)
    if not len(whole) and made.facts["num_rows"] and not made.facts["num_bad"]:
        rule = f"none has an answer within {cfg.context_length} tokens"
        remedy = "raise --context_length or check the answers"
        raise UserError(f"{made.facts['num_rows']} rows", rule, remedy)
    return whole


def _all_rows(found: list[Source]) -> Iterator[tuple[Place, Any]]:
    return (pair for source in found for pair in source.read())


def _good_rows(found: list[Source], writer: Writer) -> Iterator[tuple[Place, Any]]:
    return (pair for pair in _all_rows(found) if writer.problem(pair[1]) is None)


def _key(prints: list, tokenizer: TextTokenizer, writer: Writer, context_length: int) -> str:
    own = writer.row_template
    how = [writer.shape_name, writer.train_on, writer.system, writer.format]
    jinja = [writer.chat.template.source, own and own.source]
    parts = [store.VERSION, __version__, prints, tokenizer.fingerprint(), how, jinja]
    digest = hashlib.sha256(json.dumps([*parts, context_length]).encode()).hexdigest()
    return f"tokens-{digest[:16]}"


def part(whole: Part, cfg: Config) -> tuple[Part, Part, int]:
    """Part samples into those to learn, those held out, and those for a later test.

    What a sample holds decides, with the seed, not where it stands: rows that are added later
    change nothing for those that were there, and equal rows fall into one part.

    Args:
        whole: all samples.
        cfg: gives train_split and eval_split (shares), or eval_samples, and the seed.

    Returns:
        Train and held out, each in the order of the rows, and how many are left for a test.

    Raises:
        UserError: a part would be empty, or the shares are more than the whole.
    """
    learn = _share(cfg.train_split)
    if cfg.eval_samples:
        if cfg.train_split is not None and learn is not None:
            got = f"--eval_split {cfg.eval_split} with --train_split {cfg.train_split}"
            raise UserError(got, "both split the rows", "give a share (0.1) as --eval_split")
        return (*_hold_out(whole, cfg.eval_samples, cfg.seed), 0)
    hold = _share(cfg.eval_split)
    if learn is None and hold is None:
        return whole, Part(whole.store, whole.indices[:0]), 0
    has_file = hold is None and _name(cfg.eval_split) is not None
    learn = 1.0 - hold if learn is None and hold is not None else learn or 0.0
    hold = (0.0 if has_file else 1.0 - learn) if hold is None else hold
    if learn + hold > 1.0 + 1e-9:
        got = f"--train_split {learn} --eval_split {hold}"
        raise UserError(got, "are more than all rows", "make them 1 or less together")
    at = shares(whole.store.hashes, cfg.seed)[whole.indices]
    train = Part(whole.store, whole.indices[at < learn])
    held_out = Part(whole.store, whole.indices[(at >= learn) & (at < learn + hold + 1e-9)])
    for name, made, share in (("train", train, learn), ("eval", held_out, hold)):
        if not len(made) and share and len(whole):
            rule = f"{share:g} of {len(whole)} rows is none"
            raise UserError(f"--{name}_split", rule, "give more rows or another --seed")
    return train, held_out, len(whole) - len(train) - len(held_out)


def shares(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Spread samples evenly over [0, 1), equal ones at the same place.

    Args:
        hashes: uint64.
        seed: another one spreads them in another way.

    Returns:
        float64, one each.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    mixed = hashes ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64


def _hold_out(whole: Part, num: int, seed: int) -> tuple[Part, Part]:
    if len(whole) and num >= len(whole):
        rule = f"only {len(whole)} rows can be used, and some must be trained on"
        raise UserError(f"--eval_samples {num}", rule, f"at most {len(whole) - 1}")
    chosen = np.argsort(shares(whole.store.hashes, seed)[whole.indices], kind="stable")[:num]
    is_chosen = np.zeros(len(whole), bool)
    is_chosen[chosen] = True
    return Part(whole.store, whole.indices[~is_chosen]), Part(whole.store, whole.indices[is_chosen])


def _share(setting: str | None) -> float | None:
    """A number between 0 and 1, or None for a name."""
    try:
        share = float(setting) if setting is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise UserError(f"a split of {setting}", "must be between 0 and 1", "0.1 is a tenth")
    return share


def _name(setting: str | None) -> str | None:
    return setting if setting is not None and _share(setting) is None else None
