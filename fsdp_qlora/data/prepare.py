"""What a run trains on, and an audit of it: from a configuration, without torch.

`python -m fsdp_qlora data [options of train.py] [--rows 3] [--json]` shows the audit: look before
you rent. The same facts are kept in the record of every run.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora import __version__, arch, cli, config, hardware
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import batches, preferences, row_formats, sources, tokenizer, tokens
from fsdp_qlora.data.row_formats import RowFormatter
from fsdp_qlora.data.tokenizer import DATE, SETTINGS_FILES, TextTokenizer
from fsdp_qlora.data.tokens import NUMBERS, Facts, TokenDataset, TokenStore
from fsdp_qlora.errors import DONE, UserError, join, one_line, read_table
from fsdp_qlora.planning.sizes import PAD_MULTIPLES

FEWEST_KEPT_BYTES = 2**20  # less is tokenized sooner than it is read back
NUM_EXAMPLES = 3
MOST_CHARS = 700  # of a stretch of text that is shown
MOST_SIMULATED_ROWS = 20_000  # padding is counted on so many, drawn at random
TRAINED_ON = {"assistant": "answers", "completion": "answers", "last": "last answers"}
LOSSES = ("cut", "empty", "beyond", "repeated", "same")
SIDES = {0: ("",), 1: ("desirable, ",), -1: ("undesirable, ",)}
TEXTS = read_table(__file__, "audit.toml")


@dataclasses.dataclass(frozen=True)
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

    @functools.cached_property
    def facts(self) -> Facts:
        """What was counted while the sources were read; see `tokens.tokenize`."""
        tables = [store.facts for store in self.stores]
        examples: dict[str, list[str]] = {}
        for what, places in (pair for table in tables for pair in table["examples"].items()):
            examples.setdefault(what, []).extend(places[:NUM_EXAMPLES])
        found: Facts = {name: sum(table[name] for table in tables) for name in NUMBERS}
        for name in ("kinds", "findings", "unused"):
            found[name] = dict(sum((Counter(table[name]) for table in tables), Counter()))
        bad = [tuple(pair) for table in tables for pair in table["bad"]]
        return found | {"bad": bad, "examples": examples}

    @property
    def uses_chat(self) -> bool:
        """Whether some rows went through the chat template."""
        return any("chat" in kind for kind in self.facts["kinds"])

    def check(self) -> None:
        """Refuse bad rows, and a data set of which nothing can be learned.

        Raises:
            UserError: the first bad rows, named by file and line, and how many more there are.
        """
        pairs = self.facts["bad"]
        faults = [UserError(place, fault, "correct or remove it") for place, fault in pairs]
        if faults:
            more = self.facts["num_bad"] - len(faults)
            faults[-1].remedy += f" and {more:,} more bad rows" if more else ""
            raise join(faults)
        if not self.train.store.facts["num_rows"]:
            name = ", ".join(self.names)
            raise UserError(name, "holds no rows", "give a data set with at least one row")


def prepare(
    cfg: TrainConfig, tokenizer: TextTokenizer | None, vocab_size: int, shows_progress: bool = False
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
        shape = (cfg.dataset_samples, cfg.context_length, vocab_size, cfg.seed)
        whole = tokens.dummy_samples(*shape, cfg.num_answers)
        return PreparedData(*train_test_split(whole, cfg), (whole.store,), (sources.DUMMY,))
    assert tokenizer is not None, "text without a tokenizer"
    kwargs = dated(cfg, Path(tokenizer.place))
    formatter = _choose(dataclasses.replace(cfg, chat_template_kwargs=kwargs), tokenizer)
    found = sources.find(cfg.dataset, cfg, split_name(cfg.train_split), tokenizer.full)
    with cli.Progress("tokenizes", unit="rows", is_silent=not shows_progress) as bar:
        make = functools.partial(_tokenize, cfg, tokenizer, formatter, bar.update)
        whole = make(found)
        train, held_out, num_test = train_test_split(whole, cfg)
        good = (row for _, row in sources.read(found) if formatter.problem(row) is None)
        example, stores = next(good, None), [whole.store]
        eval_name = split_name(cfg.eval_split)
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


def dated(cfg: TrainConfig, place: Path | None, stored: str | None = None) -> str | None:
    """Settle the day that a template may write into every row, once for a run.

    Another day is other tokens, and with them other held-out rows.

    Args:
        cfg: the run; a day that the user has set stays.
        place: of the tokenizer; None: it has none.
        stored: `chat_template_kwargs` of the run that goes on, which has its day.

    Returns:
        The run's `chat_template_kwargs`, with the day of its first start as `strftime_now` where a
        template asks for it.
    """
    files = [place / name for name in SETTINGS_FILES] if place else []
    files += [*place.glob("additional_chat_templates/*.jinja")] if place else []
    files += [Path(cfg.template).expanduser()] if cfg.template else []
    if not any(os.path.isfile(file) and DATE.encode() in file.read_bytes() for file in files):
        return cfg.chat_template_kwargs
    day = json.loads(stored or "{}").get(DATE, datetime.date.today().isoformat())
    return json.dumps({DATE: day} | json.loads(cfg.chat_template_kwargs or "{}"))


def _choose(cfg: TrainConfig, tokenizer: TextTokenizer) -> RowFormatter:
    """How the rows of a run become text."""
    found = row_formats.choose(cfg.template, tokenizer.chat(), cfg.train_on, cfg.system_prompt)
    kwargs = json.loads(cfg.chat_template_kwargs or "{}")
    unread = set(found.chat.unread(kwargs)) & set(found.chat.unread(kwargs, tools=True))
    if unread:
        got = f"--chat_template_kwargs with {', '.join(sorted(unread))}"
        raise UserError(got, "the chat template reads no such name", "correct it or leave it out")
    if found.row_template is not None and DATE in kwargs:
        found.row_template.names[DATE] = kwargs[DATE]
    rest = {"chat_kwargs": kwargs, "allows_dropped": cfg.allow_dropped_text}
    if not cfg.num_answers:
        return dataclasses.replace(found, **rest)
    if found.row_template is not None or found.parts:
        got = f"--template {cfg.template} with --objective {cfg.objective}"
        rule = "knows no prompt and no answers to compare"
        raise UserError(got, rule, "use --template chat or prompt, or leave it out")
    return preferences.PreferenceFormatter(**vars(found) | rest, num_answers=cfg.num_answers)


def prepare_early(cfg: TrainConfig, light: TextTokenizer, vocab_size: int) -> PreparedData | None:
    """Prepare the data of a run before its ranks are started, if they need not do it again.

    Args:
        cfg, light, vocab_size: as for `prepare`.

    Returns:
        The tokens; None for rows that cannot be kept, and are too many to be tokenized twice.

    Raises:
        UserError: as `prepare`.
    """
    split = split_name(cfg.train_split)
    found = [] if cfg.dataset == sources.DUMMY else sources.find(cfg.dataset, cfg, split)
    can_keep = tokens.cache_root(cfg.token_cache) is not None
    if not _is_small(found) and not (can_keep and all(source.fingerprint() for source in found)):
        return None
    return prepare(cfg, light, vocab_size, shows_progress=True)


def _is_small(found: list[sources.Source]) -> bool:
    return sum(source.num_bytes for source in found) < FEWEST_KEPT_BYTES


def _find_eval(cfg: TrainConfig, name: str, tokenizer: TextTokenizer) -> list[sources.Source]:
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
    found: list[sources.Source],
) -> TokenDataset:
    """All samples of some sources, from the cache of tokens where they are in it."""

    def build(builder: tokens.StoreBuilder) -> TokenStore:
        rows = sources.read(found)
        return tokens.tokenize(builder, rows, formatter, tokenizer, cfg.context_length, progress)

    root, prints = tokens.cache_root(cfg.token_cache), [source.fingerprint() for source in found]
    if root is None or None in prints or (cfg.token_cache == "auto" and _is_small(found)):
        made = build(tokens.StoreBuilder(None))
    else:
        made = tokens.cached(root / _key(prints, tokenizer, formatter, cfg.context_length), build)
    if not len(made) and made.facts["num_rows"] and not made.facts["num_bad"]:
        rule = f"none has an answer within {cfg.context_length} tokens"
        remedy = "raise --context_length or check the answers"
        raise UserError(f"{made.facts['num_rows']} rows", rule, remedy)
    return TokenDataset(made)


def _key(prints: list, tokenizer: TextTokenizer, formatter: RowFormatter, most: int) -> str:
    """Another name for other tokens; transformers renders the templates."""
    own = formatter.row_template
    how: list[Any] = [formatter.format_name, formatter.train_on, formatter.system, formatter.parts]
    how += [formatter.chat_kwargs, formatter.allows_dropped, getattr(formatter, "num_answers", 0)]
    jinja = [formatter.chat.source, own and own.source]
    versions = [tokens.VERSION, __version__, importlib.metadata.version("transformers")]
    parts = [versions, prints, tokenizer.fingerprint(), how, jinja, most]
    return f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def train_test_split(
    whole: TokenDataset, cfg: TrainConfig
) -> tuple[TokenDataset, TokenDataset, int]:
    """Split samples into those to learn, those held out, and those for a later test.

    What a sample holds decides, with the seed, not where it stands: rows that are added later
    change nothing for those that were there, and equal rows fall into one part.

    Args:
        whole: all samples.
        cfg: gives train_split and eval_split, and the seed.

    Returns:
        Train and held out, each in the order of the rows, and how many are left for a test.

    Raises:
        UserError: a part would be empty, or the shares are more than the whole.
    """
    at, num_rows = spread(whole.hashes, cfg.seed), len(whole)
    learn, num_held_out = split_share(cfg.train_split), cfg.num_held_out(num_rows)
    if num_held_out:
        if learn is not None:
            got = f"--eval_split {cfg.eval_split} with --train_split {cfg.train_split}"
            raise UserError(got, "both split the rows", "give a share (0.1) as --eval_split")
        if num_rows and num_held_out >= num_rows:
            rule = f"only {num_rows} rows can be used, and some must be trained on"
            raise UserError(f"--eval_split {num_held_out}", rule, f"at most {num_rows - 1}")
        is_held_out = np.isin(np.arange(num_rows), np.argsort(at, kind="stable")[:num_held_out])
        return whole.part(~is_held_out), whole.part(is_held_out), 0
    hold = split_share(cfg.eval_split)
    if learn is None and hold is None:
        return whole, whole.part(at < 0), 0
    has_file = split_name(cfg.eval_split) is not None
    learn = 1.0 - hold if learn is None and hold is not None else learn or 0.0
    hold = (0.0 if has_file else 1.0 - learn) if hold is None else hold
    if learn + hold > 1.0 + 1e-9:
        got = f"--train_split {learn} --eval_split {hold}"
        raise UserError(got, "are more than all rows", "make them 1 or less together")
    train, held_out = whole.part(at < learn), whole.part((at >= learn) & (at < learn + hold + 1e-9))
    for name, made, share in (("train", train, learn), ("eval", held_out, hold)):
        if not len(made) and share and num_rows:
            rule = f"{share:g} of {num_rows} rows is none"
            raise UserError(f"--{name}_split", rule, "give more rows or another --seed")
    return train, held_out, num_rows - len(train) - len(held_out)


def spread(hashes: np.ndarray, seed: int) -> np.ndarray:
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


def split_share(setting: str | None) -> float | None:
    """Return a split as a number between 0 and 1, or None if it is a name.

    Args:
        setting: train_split or eval_split.

    Raises:
        UserError: it is another number.
    """
    try:
        share = float(setting) if setting is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise UserError(f"a split of {setting}", "must be between 0 and 1", "0.1 is a tenth")
    return share


def split_name(setting: str | None) -> str | None:
    """Return a split that is a name: of a file, or of a split of a hub set; else None.

    Args:
        setting: train_split or eval_split.
    """
    is_named = setting not in (None, "auto") and not str(setting).isdecimal()
    return setting if is_named and split_share(setting) is None else None


@dataclasses.dataclass(frozen=True)
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
        facts, is_text = self.facts, "blocks" in self.facts["kinds"]
        due = facts | {"blocks": is_text, "rows": not is_text, "num_samples": self.num_samples}
        due |= {"num_dropped": facts["num_empty"] + facts["num_beyond"], "tokens": True}
        return "".join(text.format_map(due) for name, text in TEXTS["line"].items() if due[name])

    def lines(self) -> list[str]:
        """Return all facts for people, a line each."""
        facts = self.facts
        kinds, steps = (f"{count:,} {kind}" for kind, count in facts["kinds"].items()), []
        for size, count in facts["steps"].items():
            each = f"{count['per_epoch']:,} an epoch, {count['in_all']:,} in total"
            steps.append(f"{size} GPU{'s' * (int(size) > 1)}: {each}")
        shown = facts | facts["padding_share"] | {"steps": "; ".join(steps)}
        shown |= {"sources": ", ".join(facts["sources"]), "kinds": ", ".join(kinds)}
        shown["train_on"] = TRAINED_ON.get(facts["train_on"], "everything")
        shown["trained_share"] = facts["num_trained_tokens"] / max(facts["num_tokens"], 1)
        shown["end_share"] = facts["num_learning_end"] / max(self.num_samples, 1)
        shown |= {what: ", ".join(facts["examples"].get(what, [])) for what in LOSSES}
        texts = TEXTS["lines"].items()
        due = [pair for pair in texts if pair[0] not in LOSSES or facts[f"num_{pair[0]}"]]
        lines = [f"{name:<9} {text.format_map(shown)}" for name, text in due]
        if facts["answers"]:
            kind = "pairs" if "chosen" in facts["answers"] else "labels"
            lines.append(f"{kind:<9} {TEXTS[kind].format_map(facts['answers'])}")
        return lines + [f"note      {note}" for note in facts["notes"]]


def audit(cfg: TrainConfig, ready: PreparedData, world_size: int, pad_multiple: int) -> Audit:
    """Count what is worth knowing of the data of a run.

    Args:
        cfg: the run.
        ready: its tokens.
        world_size: ranks that see rows of their own.
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
    parts, repeated = (ready.train, ready.held_out), _repeated(TokenDataset(ready.stores[0]))
    uncut = np.concatenate([store.table[:-1, tokens.NUM_UNCUT] for store in ready.stores])
    lengths = np.concatenate([part.lengths for part in parts])
    bad = [f"{place}: {fault}" for place, fault in ready.facts["bad"]]
    examples = ready.facts["examples"] | {"repeated": repeated[:NUM_EXAMPLES]}
    leaked = np.isin(ready.held_out.hashes, ready.train.hashes)
    facts: Facts = {"sources": list(ready.names), "train_on": cfg.train_on}
    facts |= {"context_length": cfg.context_length, **ready.facts, "bad": bad, "examples": examples}
    facts |= {"num_repeated": len(repeated), "num_leaked": int(leaked.sum())}
    facts |= {"num_train": len(ready.train), "num_held_out": len(ready.held_out)}
    facts["num_test"] = ready.num_test
    facts["num_tokens"] = int(sum(part.sizes.sum() for part in parts))
    facts["num_trained_tokens"] = int(sum(part.num_trained.sum() for part in parts))
    facts |= {"longest_tokens": int(lengths.max(initial=0))}
    facts |= {"epoch_tokens": int(ready.train.sizes.sum())}
    facts |= {"epoch_trained_tokens": int(ready.train.num_trained.sum())}
    middle, most = np.percentile(uncut, [50, 95]) if len(uncut) else (0, 0)
    facts |= {"median_tokens": int(middle), "p95_tokens": int(most)}
    facts["longest_uncut_tokens"] = int(uncut.max(initial=0))
    facts["num_tokens_cut"] = int(np.maximum(uncut - cfg.context_length, 0).sum())
    facts["steps"] = _steps(cfg, ready.train, world_size)
    facts["padding_share"] = _padding(cfg, ready.train, world_size, pad_multiple)
    facts |= {"answers": _answers(ready.stores), "kept": ready.stores[0].note or "in memory only"}
    return Audit({**facts, "notes": _notes(cfg, ready, Audit(facts), world_size)})


def _repeated(whole: TokenDataset) -> list[str]:
    """Rows that hold the same tokens as one before, as "x.jsonl:9 repeats x.jsonl:3"."""
    _, first, inverse = np.unique(whole.hashes, return_index=True, return_inverse=True)
    earlier = first[inverse]
    again = np.nonzero(earlier != np.arange(len(whole)))[0].tolist()
    return [f"{whole.place(i)} repeats {whole.place(int(earlier[i]))}" for i in again]


def _steps(cfg: TrainConfig, rows: TokenDataset, world_size: int) -> dict[str, dict[str, int]]:
    """Steps by number of GPUs, of which some may share each row."""
    found = {}
    for size in sorted({1, 2, world_size}) if len(rows) else ():
        made = batches.make(cfg, rows, batches.sampler_config(cfg, size, 0, 1))
        count = {"per_epoch": made.steps_per_epoch, "in_all": made.num_steps}
        found[str(size * cfg.context_parallel)] = count
    return found


def _padding(cfg: TrainConfig, rows: TokenDataset, world_size: int, pad_multiple: int) -> Facts:
    """Share of the tokens of an epoch that are padding, in batches and in packed sequences."""
    lengths, sizes, num_sides = rows.lengths, rows.sizes, rows.num_sides
    if not len(lengths):
        return {"batches": 0.0, "packed": 0.0}
    if len(lengths) > MOST_SIMULATED_ROWS:
        chosen = np.random.default_rng(cfg.seed).choice(len(lengths), MOST_SIMULATED_ROWS, False)
        lengths, sizes = lengths[chosen], sizes[chosen]
    total, capacity = int(sizes.sum()), cfg.context_length * num_sides
    num_packed = len(batches.pack(sizes, capacity, world_size, cfg.seed, 0))
    sampler = batches.sampler_config(cfg, world_size, 0, pad_multiple)
    num_padded = sum(batches.padded_tokens(lengths, sampler)) * num_sides
    return {"batches": 1 - total / num_padded, "packed": 1 - total / (num_packed * capacity)}


def _answers(stores: Sequence[TokenStore]) -> dict[str, float]:
    """Of pairs the mean tokens of both answers, and in which share the chosen one is longer.

    Of single answers how many are desirable and how many are not; else nothing.
    """
    table = np.concatenate([np.diff(store.table[:, :1], axis=0) for store in stores])[:, 0]
    rest = np.concatenate([store.table[:-1, tokens.PROMPT :] for store in stores])
    if rest[:, 2].any():
        return {"desirable": int((rest[:, 2] > 0).sum()), "not": int((rest[:, 2] < 0).sum())}
    if not rest[:, 1].any():
        return {}
    chosen, rejected = rest[:, 1] - rest[:, 0], table - rest[:, 1]
    means = {"chosen": float(chosen.mean()), "rejected": float(rejected.mean())}
    return {**means, "chosen_longer": float((chosen > rejected).mean())}


def _notes(cfg: TrainConfig, ready: PreparedData, found: Audit, world_size: int) -> list[str]:
    """What the user should look at before the run."""
    facts, uses_chat = found.facts, ready.formatter is not None and ready.uses_chat
    rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    place = ready.formatter.chat.place if ready.formatter is not None else ""
    num_texts = sum(map(len, ready.stores)) + facts["num_empty"] + facts["num_beyond"]
    is_cut = facts["num_cut"] * 10 > found.num_samples
    is_few = 0 < facts["num_train"] < rows_per_step and cfg.packing != "on"
    is_split = uses_chat and not cfg.num_answers and num_texts > facts["num_rows"]
    ends = facts["num_learning_end"] or "blocks" in facts["kinds"] or not found.num_samples
    is_idle = not uses_chat and json.loads(cfg.chat_template_kwargs or "{}").keys() - {DATE}
    unused = ", ".join(f"{name} ({count:,} rows)" for name, count in facts["unused"].items())
    is_plain = uses_chat and place == tokenizer.PLAIN_PLACE
    asked = row_formats.suggested(ready.example) if cfg.objective == "sft" else ""
    longer = facts["answers"].get("chosen_longer", 0.5)
    is_due = {"cut": is_cut, "pairs": asked == "dpo", "labels": asked == "kto", "end": not ends}
    is_due |= {"longer": not 0.25 <= longer <= 0.75, "few": is_few, "leaked": facts["num_leaked"]}
    is_due |= {"idle": is_idle, "unused": unused, "plain": is_plain, "split": is_split}
    is_due["date"] = date = uses_chat and getattr(ready.formatter, "chat_kwargs", {}).get(DATE)
    shown = facts | {"longer": longer, "unused": one_line(unused)[:MOST_CHARS]}
    shown |= {"rows_per_step": rows_per_step, "num_texts": num_texts, "date": date}
    notes = [text.format_map(shown) for name, text in TEXTS["notes"].items() if is_due[name]]
    found_in_rows = []
    for kind, words in TEXTS["findings"].items():
        if count := facts["findings"].get(kind):
            found_in_rows.append(f"{count:,} rows {words}: {', '.join(facts['examples'][kind])}")
    return [*found_in_rows, *notes]


def main(argv: list[str]) -> int:
    """Read and tokenize the data of a run as the run would, and say what is in it.

    Rows, lengths against the context, what is cut or left out, steps, padding, and some rows with
    the tokens that are learned marked. It needs neither a GPU nor the model's weights, only its
    tokenizer.

    Args:
        argv: --rows, --json, and the options of train.py.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, or data that cannot be trained on; bad rows come last, after
            the rest has been printed.
    """
    about = str(inspect.getdoc(main)).partition("\n\nArgs:")[0]
    usage = "python -m fsdp_qlora data [--rows 3] [--json] [options of train.py ...]"
    parser = cli.Parser(usage=usage, description=about, allow_abbrev=False)
    parser.add_argument("--rows", nargs="?", default="3", help="how many rows are shown")
    parser.add_argument("--json", action="store_true", help="all facts as JSON, no rows")
    own, run_argv = parser.parse_known_args(argv)
    if not (own.rows or "").isdecimal():
        raise UserError(f"--rows {own.rows}", "must be a whole number", "default is 3")
    cfg = config.parse(run_argv, lambda line: print(line, file=sys.stderr), ("rows", "json"))
    info, is_dummy = arch.read(cfg.model_name, need_weights=False), cfg.dataset == sources.DUMMY
    path = Path() if is_dummy else _tokenizer_directory(cfg.model_name, info)
    text_tokenizer = None if is_dummy else tokenizer.read(path)
    ready = prepare(cfg, text_tokenizer, info.vocab_size, shows_progress=True)
    num_gpus = hardware.count_gpus(os.environ)
    world_size = cfg.world_size if cfg.world_size > 0 else max(num_gpus, 1)
    num_readers = max(world_size // cfg.context_parallel, 1)
    found = audit(cfg, ready, num_readers, PAD_MULTIPLES["cuda" if num_gpus else "cpu"])
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
    return arch.files.download(model_name, [*arch.files.CONFIG_FILES, *arch.files.TOKENIZER_FILES])


def _shown(
    cfg: TrainConfig, ready: PreparedData, text_tokenizer: TextTokenizer | None, num_rows: int
) -> Iterator[str]:
    """Some rows as the model sees them, what is learned between ⟦ and ⟧."""
    if text_tokenizer is None or not len(ready.train):
        return
    chosen = np.random.default_rng(cfg.seed).permutation(len(ready.train))[:num_rows]
    for index in sorted(chosen.tolist()):
        whole, place = ready.train[index], one_line(str(ready.train.place(index)))
        sides = ("chosen, ", "rejected, ") if whole.second else SIDES[whole.label]
        for side, sample in zip(sides, whole.rows(), strict=True):
            num_tokens, num_learned = len(sample.input_ids), sample.num_trained_tokens
            yield f"\n{place}: {side}{num_tokens:,} tokens, {num_learned:,} learned\n"
            is_learned = sample.is_trained & (np.arange(num_tokens) > 0)  # no target: the first
            for part in np.split(np.arange(num_tokens), np.nonzero(np.diff(is_learned))[0] + 1):
                text = _safe(text_tokenizer.core.decode(sample.input_ids[part].tolist(), False))
                yield f"⟦{text}⟧" if is_learned[part[0]] else text
            yield "\n"


def _safe(text: str) -> str:
    """Long text without its middle, and no terminal codes of the data's own."""
    if len(text) > MOST_CHARS:
        head, tail = text[: MOST_CHARS // 2], text[-MOST_CHARS // 2 :]
        text = f"{head} [... {len(text) - MOST_CHARS:,} characters ...] {tail}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
