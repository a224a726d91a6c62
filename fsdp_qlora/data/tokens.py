"""Rows to token ids: tokenized many at a time, and kept as one flat array.

The array lies in memory, or on disk once for all ranks and later runs. A token that is learned is
stored as its id, one that is only given as ~id, a negative number. What is lost is counted.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fsdp_qlora import atomic
from fsdp_qlora.data.row_formats import BLOCKS, TOKENS, RowFormatter
from fsdp_qlora.data.sources import BadRow, PlacedRows, RowPlace, TextPiece
from fsdp_qlora.data.tokenizer import Refused, Span, Text, TextTokenizer

VERSION = 5  # of what the files mean; raise it when that or the way rows become tokens changes
CODES, TABLE, FACTS = "codes.bin", "table.bin", "facts.json"
START, FILE, NUMBER, HASH, NUM_TRAINED, NUM_UNCUT, PROMPT, SECOND, LABEL = range(9)
CHUNK = 1024  # texts that are tokenized at once
NUM_EXAMPLES = 5
NO_TEXT = Text("", (), has_markup=True)
MOST_BAD = 1000  # then reading stops: the format is another one than we think
# Rows that were good and that were not. Samples longer than the context, without anything to learn,
# whose answers all lie beyond the context, pairs of equal answers; samples that hold the
# end-of-text token, and that learn it.
NUMBERS: tuple[str, ...] = ("num_rows", "num_bad", "num_cut", "num_empty", "num_beyond")
NUMBERS += ("num_same", "num_with_end", "num_learning_end")
Facts = dict[str, Any]
Parts = tuple[int, ...]  # prompt, second, label of a `Sample`
WHOLE: Parts = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One row as ids.

    Args:
        input_ids: int32 [T]; of a pair prompt, chosen answer, rejected answer.
        is_trained: bool [T], tokens that are learned; the very first never is.
        prompt: tokens before the answers that are compared; 0: nothing is.
        second: of a pair, where the rejected answer begins; else 0.
        label: of a single answer, 1 = desirable, -1 = not; else 0.
        is_answer: bool [T], of a row whose prompt is learned too; None: `is_trained`.
    """

    input_ids: np.ndarray
    is_trained: np.ndarray
    prompt: int = 0
    second: int = 0
    label: int = 0
    is_answer: np.ndarray | None = None

    @property
    def num_trained_tokens(self) -> int:
        """Ids that are the target of a prediction."""
        return int(np.count_nonzero(self.is_trained[1:]))

    def rows(self, learns_prompt: bool = False) -> "list[Sample]":
        """Return itself, or of a pair the chosen row and the rejected one.

        Args:
            learns_prompt: every token of the chosen row is a target.
        """
        if not self.second:
            return [self]
        parts = slice(self.prompt, self.second), slice(self.second, None)
        found = [self._spliced(self, part) for part in parts]
        if learns_prompt:
            own = found[0]
            every = np.ones_like(own.is_trained)
            found[0] = replace(own, is_trained=every, is_answer=own.is_trained)
        return found

    def after(self, other: "Sample", most: int) -> "Sample":
        """Return its answer behind the prompt of another one.

        Args:
            other: a single answer too.
            most: tokens; what is longer is cut.
        """
        return self._spliced(other, slice(self.prompt, None), most)

    def _spliced(self, other: "Sample", tail: slice, most: int | None = None) -> "Sample":
        pairs = ((other.input_ids, self.input_ids), (other.is_trained, self.is_trained))
        ids, flags = (np.concatenate([a[: other.prompt], b[tail]])[:most] for a, b in pairs)
        return Sample(ids, flags)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All samples of a data set.

    Args:
        codes: int32 [tokens of all samples].
        table: int64 [samples + 1, 9], of each sample: where it begins in `codes`, index into
            facts["files"] and number of its `RowPlace`, a hash of its codes, tokens that are the
            target of a prediction, tokens before the context cut them (of a pair those of the
            longer row); prompt, second, label of `Sample`. The last row is the end.
        facts: what was counted while the rows were read, as JSON can hold it.
        note: one line for the user on where the tokens lie.
    """

    codes: np.ndarray
    table: np.ndarray
    facts: dict[str, Any]
    note: str = ""

    def __len__(self) -> int:
        return len(self.table) - 1


class TokenDataset(Sequence[Sample]):
    """Some samples of a store.

    Attributes:
        lengths: tokens of each; of a pair those of its longer row.
        sizes: tokens of all rows of each.
        num_sides: rows of a sample: 2 for pairs.

    Args:
        store: holds them.
        indices: int64, which ones, in order; None for all.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray | None = None) -> None:
        self.store = store
        self.indices = np.arange(len(store)) if indices is None else indices
        tokens = np.diff(store.table[:, START])[self.indices]
        prompt, second = (store.table[self.indices, name] for name in (PROMPT, SECOND))
        self.num_sides = 1 + bool(store.table[:, SECOND].any())
        self.sizes = tokens + prompt * (second > 0)
        self.lengths = np.maximum(second, self.sizes - second)
        self.num_trained = store.table[self.indices, NUM_TRAINED]
        self.hashes = store.table[self.indices, HASH].view(np.uint64)  # equal for equal tokens

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        row = self.indices[index]
        start, stop = self.store.table[row : row + 2, START]
        codes = np.array(self.store.codes[start:stop])
        rest = self.store.table[row, PROMPT:].tolist()
        return Sample(np.where(codes < 0, ~codes, codes), codes >= 0, *rest)

    def part(self, is_in: np.ndarray) -> "TokenDataset":
        """Return the samples for which a bool is true."""
        return TokenDataset(self.store, self.indices[is_in])

    def place(self, index: int) -> RowPlace:
        """Return where the row of a sample stands."""
        row = self.store.table[self.indices[index]]
        return RowPlace(self.store.facts["files"][row[FILE]], int(row[NUMBER]))


def of_samples(samples: Sequence[Sample], name: str) -> TokenDataset:
    """Put samples into memory.

    Args:
        samples: any.
        name: what their places are called.

    Returns:
        All of them.
    """
    builder = StoreBuilder(None)
    for number, sample in enumerate(samples, 1):
        codes = np.where(sample.is_trained, sample.input_ids, ~sample.input_ids)
        rest = (sample.prompt, sample.second, sample.label)
        builder.add(codes.astype(np.int32), RowPlace(name, -number), parts=rest)
    counts = {"num_rows": len(samples), "kinds": {name: len(samples)}}
    return TokenDataset(builder.finish(no_facts() | counts))


class StoreBuilder:
    """Collects samples.

    Args:
        directory: where the tokens are written; None for memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory, self.buffer = directory, io.BytesIO()
        self.file: BinaryIO = self.buffer
        if directory is not None:
            directory.mkdir(parents=True)
            self.file = (directory / CODES).open("wb")
        self.num_tokens, self.table, self.names = 0, array("q"), dict[str, int]()

    def add(self, codes: np.ndarray, place: RowPlace, uncut: int = 0, parts: Parts = WHOLE) -> None:
        """Add a sample.

        Args:
            codes: int32 [T].
            place: of its row.
            uncut: tokens before it was cut; 0 for T.
            parts: prompt, second, label of `Sample`.
        """
        whole = codes.tobytes()
        self.file.write(whole)
        own = np.array(parts).tobytes() * any(parts)
        digest = hashlib.blake2b(whole + own, digest_size=8).digest()
        file = self.names.setdefault(place.name, len(self.names))
        num_trained, uncut = int(np.count_nonzero(codes[1:] >= 0)), uncut or len(codes)
        number = int.from_bytes(digest, "little", signed=True)
        self.table.extend((self.num_tokens, file, place.number, number, num_trained, uncut, *parts))
        self.num_tokens += len(codes)

    def finish(self, facts: dict[str, Any]) -> TokenStore:
        """Return the samples; they are whole on disk if there is a directory.

        Args:
            facts: what was counted.
        """
        facts = facts | {"files": list(self.names)}
        self.table.extend((self.num_tokens, *[0] * LABEL))
        if self.directory is None:
            codes = np.frombuffer(self.buffer.getbuffer(), np.int32)
            return TokenStore(codes, np.array(self.table).reshape(-1, LABEL + 1), facts)
        self.file.close()
        (self.directory / TABLE).write_bytes(self.table.tobytes())
        sums = [_digest(self.directory / name) for name in (CODES, TABLE)]
        atomic.write_sealed(self.directory / FACTS, {"sums": sums, "facts": facts})
        return _map(self.directory, facts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _map(directory: Path, facts: dict[str, Any]) -> TokenStore:
    has_codes = (directory / CODES).stat().st_size > 0  # nothing of that size can be mapped
    codes = np.memmap(directory / CODES, np.int32, "r") if has_codes else np.zeros(0, np.int32)
    table = np.memmap(directory / TABLE, np.int64, "r").reshape(-1, LABEL + 1)
    return TokenStore(codes, table, facts)


def read_store(directory: Path) -> TokenStore | None:
    """Map what is on disk.

    Args:
        directory: of a finished store.

    Returns:
        The store; None if there is none or a byte of it is wrong.
    """
    try:
        table = atomic.read_sealed(directory / FACTS)
        sums = [_digest(directory / name) for name in (CODES, TABLE)]
        return _map(directory, table["facts"]) if table and table["sums"] == sums else None
    except OSError:
        return None


def cache_root(setting: str) -> Path | None:
    """Return where stores are kept.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
    """
    return None if setting == "off" else atomic.cache_dir(setting)


def cached(directory: Path, build: Callable[[StoreBuilder], TokenStore]) -> TokenStore:
    """Map a store, or build it while the other ranks wait.

    Args:
        directory: of the store; another one for other tokens.
        build: fills a builder; its errors are passed on.

    Returns:
        The store; in memory, with the reason in its note, if the disk does not take it.
    """
    draft = directory.with_name(f".tmp-{os.getpid()}-{directory.name}")
    is_new = not os.path.exists(directory.parent)  # too long a name is no fault here
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic.lock(directory, waits=True) or contextlib.nullcontext():
            found = read_store(directory)
            if found is not None:
                return replace(found, note=f"{directory} (made before)")
            again = " (made again: it was damaged, or by an older version)" * directory.exists()
            shutil.rmtree(directory, ignore_errors=True)
            atomic.sweep(directory)
            made = build(StoreBuilder(draft))
            if made.facts.get("num_bad"):  # mapped files live on until they are closed
                return replace(made, note="not kept: there are bad rows")
            atomic.commit(draft, directory)
            return replace(made, note=f"{directory}{again}")
    except OSError as error:  # a full disk, or one that cannot be written or locked
        note = f"not kept: {directory.parent}: {error.strerror or error}"
        return replace(build(StoreBuilder(None)), note=note)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if is_new and not os.path.exists(directory):  # nothing is kept, so nothing is left
            with contextlib.suppress(OSError):
                directory.with_name(f".{directory.name}.lock").unlink()
                directory.parent.rmdir()


def no_facts() -> Facts:
    """Return what `tokenize` counts, before a row has been read."""
    tables: Facts = {name: Counter() for name in ("kinds", "findings", "unused")}
    return dict.fromkeys(NUMBERS, 0) | tables | {"examples": {}, "bad": [], "largest_id": -1}


class _Job(NamedTuple):
    """One text on its way: `block` is None for a sample of its own, else whether its text ends.

    `answer` is None where nothing is compared, 0 for the rows of a pair in turn, else the label.
    """

    place: RowPlace
    text: Text
    codes: np.ndarray | None = None
    block: bool | None = None
    starts_text: bool = False
    answer: int | None = None


def tokenize(
    builder: StoreBuilder,
    rows: PlacedRows,
    formatter: RowFormatter,
    tokenizer: TextTokenizer,
    context_length: int,
    progress: Callable[[int], Any] = lambda num_rows: None,
) -> TokenStore:
    """Tokenize rows: what is given masked, the end of text appended and learned.

    A text is tokenized as a whole, as it is when the model is used; a token is learned when a
    character of it is. A row that is cut gets no end of text: it did not end. Running text is cut
    into blocks of the context's length, nothing of it left out.

    Args:
        builder: gets the samples, in the order of the rows.
        rows: from `sources.read`.
        formatter: makes text of them.
        tokenizer: makes ids of that.
        context_length: most tokens of a sample.
        progress: called now and then with how many more rows are done.

    Returns:
        The samples. Their facts: `NUMBERS`; kinds, how the rows were treated -> how many;
        findings, kinds of `Text.notes` -> how many rows have one; unused, what nothing used -> in
        how many rows; bad, place and fault of the first bad rows; examples, "cut", "empty",
        "beyond" and findings -> places of the first of them; largest_id, of all samples.

    Raises:
        UserError: no end-of-text token, or a source that cannot be read. Bad rows are counted,
            not raised.
    """
    num_reported, facts = 0, no_facts()
    maker = _SampleMaker(builder, facts, context_length, tokenizer)
    jobs = _jobs(rows, formatter, facts)
    while chunk := list(itertools.islice(jobs, CHUNK)):
        for job, codes in zip(chunk, _encode(maker, chunk), strict=True):
            maker.take(job, codes)
        progress(facts["num_rows"] - num_reported)
        num_reported = facts["num_rows"]
    if maker.num_running > 1:  # of a single token nothing can be learned
        maker.flush()
    return builder.finish(facts)


def _jobs(rows: PlacedRows, formatter: RowFormatter, facts: Facts) -> Iterator[_Job]:
    starts_text, last = True, None
    for place, row in rows:
        if not starts_text and last is not None and place.name != last.name:
            yield _Job(place, NO_TEXT, None, True)  # its last row did not say that the text ends
            starts_text = True
        last, fault = place, row.fault if isinstance(row, BadRow) else formatter.problem(row)
        if fault is None:
            try:
                treatment = formatter.name(row)
                jobs = _jobs_of_row(place, row, formatter, treatment)
                _count_notes(place, jobs, formatter, facts)
            except Refused as refusal:
                fault = f"cannot be written as text ({refusal})"
        if fault is not None:
            facts["num_bad"] += 1
            facts["bad"] += [(str(place), fault)] * (len(facts["bad"]) < NUM_EXAMPLES)
            if facts["num_bad"] == MOST_BAD:
                return
            continue
        if treatment == BLOCKS:
            jobs = [jobs[0]._replace(starts_text=starts_text)]
            starts_text = bool(jobs[0].block) or (starts_text and not jobs[0].text.text)
        facts["num_rows"] += 1
        facts["kinds"][treatment] += 1
        if len(facts["unused"]) < MOST_BAD:
            facts["unused"].update(formatter.unused(row))
        yield from jobs
    if not starts_text and last is not None:
        yield _Job(last, NO_TEXT, None, True)


def _jobs_of_row(place: RowPlace, row: Any, formatter: RowFormatter, treatment: str) -> list[_Job]:
    """A text that ends in a line break goes on in the next row (wikitext has a row a line)."""
    if treatment == TOKENS:
        return [_Job(place, NO_TEXT, _codes_of_ids(row, formatter.train_on == "all"))]
    if treatment != BLOCKS:
        pairs = zip(formatter.render(row), formatter.answers(row), strict=False)
        return [_Job(place, text, answer=answer) for text, answer in pairs]
    piece = row if isinstance(row, TextPiece) else None
    text = piece.text if piece else row["text"]
    ends = piece.is_last if piece else bool(text) and not text.endswith("\n")
    return [_Job(place, Text(text, (), has_markup=True), None, ends)]


def _count_notes(place: RowPlace, jobs: list[_Job], formatter: RowFormatter, facts: Facts) -> None:
    """Refuse a row that loses text without leave; count what else is found in it."""
    texts = [job.text for job in jobs if job is jobs[0] or job.answer is not None]
    notes = dict(reversed([n for text in texts for n in text.notes]))  # the first of each kind
    if "dropped" in notes and not formatter.allows_dropped:
        rule = f"the chat template leaves out {notes['dropped']}"
        raise Refused(f"{rule}; --allow_dropped_text trains the rest")
    for kind, words in notes.items():
        facts["findings"][kind] += 1
        places = facts["examples"].setdefault(kind, [])
        places += [f"{place} {words}".strip()] * (len(places) < NUM_EXAMPLES)


def _codes_of_ids(row: dict, learns_all: bool) -> np.ndarray:
    ids = np.array(row["input_ids"], np.int32)
    labels, mask = row.get("labels"), row.get("attention_mask")
    is_trained = np.ones(len(ids), bool)
    if labels is not None and not learns_all:
        is_trained = np.array(labels, np.int64) == ids
    codes = np.where(is_trained, ids, ~ids)
    return codes if mask is None else codes[np.array(mask, bool)]


def _encode(maker: "_SampleMaker", jobs: list[_Job]) -> list[np.ndarray]:
    """Codes of every job, not yet cut; the tokenizer uses all cores."""
    found = [job.codes for job in jobs]
    for has_markup in (False, True):
        of_kind = (job.codes is None and job.text.has_markup == has_markup for job in jobs)
        chosen = [i for i, is_chosen in enumerate(of_kind) if is_chosen]
        named = [jobs[i]._replace(text=maker.once(jobs[i])) for i in chosen]
        encodings = maker.tokenizer.encode([job.text.text for job in named], not has_markup)
        for i, job, encoding in zip(chosen, named, encodings, strict=True):
            found[i] = maker.codes(job, encoding)
    return [codes for codes in found if codes is not None]


class _SampleMaker:
    """Codes to samples."""

    def __init__(
        self, builder: StoreBuilder, facts: Facts, context_length: int, tokenizer: TextTokenizer
    ) -> None:
        self.builder, self.facts, self.context_length = builder, facts, context_length
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_id
        added = tokenizer.core.get_added_tokens_decoder()  # no text of a language
        self.added_ids = np.array(sorted({*added, self.eos_id}), np.int32)
        bos_id = tokenizer.core.token_to_id(tokenizer.names.get("bos_token", ""))
        self.bos_codes = np.array([~bos_id] if tokenizer.adds_bos else [], np.int32)
        bos, eos = (re.escape(tokenizer.names.get(name, "")) for name in ("bos_token", "eos_token"))
        plain = rf"{eos}((?:\s*{eos})*\s*)\Z" + rf"|\A((?:\s*{bos})+)" * tokenizer.adds_bos
        chat = rf"{eos}((?:\s*{eos})+)" + rf"|{bos}((?:{bos})+)" * bool(bos)
        self.repeats = re.compile(plain), None if bos == eos else re.compile(chat)
        self.first: np.ndarray | None = None  # codes of the chosen row of a pair
        self.running: list[np.ndarray] = []  # codes of the block that is being filled
        self.num_running, self.running_place = 0, RowPlace("", 0)

    def once(self, job: _Job) -> Text:
        """A text without the tokens written in it that a template or the tokenizer adds as well."""
        text, pattern = job.text, self.repeats[job.text.has_markup]
        if job.block is not None or pattern is None:
            return text
        found = [match.span(match.lastindex or 0) for match in pattern.finditer(text.text)]
        if all(start == stop for start, stop in found):
            return text
        is_kept = np.ones(len(text.text) + 1, bool)
        for start, stop in found:
            is_kept[start:stop] = False
        moved = np.cumsum(is_kept) - is_kept  # characters kept before each
        kept = "".join(itertools.compress(text.text, is_kept))
        spans = ((int(moved[start]), int(moved[stop])) for start, stop in text.spans)
        return text._replace(text=kept, spans=tuple(span for span in spans if span[0] < span[1]))

    def codes(self, job: _Job, encoding: Any) -> np.ndarray:
        """Ids with what is given marked, the end of text appended where none is."""
        text, ids = job.text, np.array(encoding.ids, np.int32)
        if job.block is not None:
            has_start = np.array_equal(~ids[:1], self.bos_codes)  # written in the text itself
            start = [self.bos_codes] if job.starts_text and not has_start else []
            has_end = text.text.rstrip().endswith(self.tokenizer.names["eos_token"])
            end = [np.array([self.eos_id], np.int32)] if job.block and not has_end else []
            return np.concatenate([*start, ids, *end])
        is_trained, last_span = mask(encoding, text.spans, len(ids))
        reaches_end = bool(text.spans) and text.spans[-1][1] == len(text.text)
        has_end = len(ids) > 0 and ids[-1] == self.eos_id
        if text.has_markup:
            has_end = has_end or bool(np.isin(ids[last_span], self.added_ids).any())
        elif has_end:
            is_trained[-1] |= reaches_end
        codes = np.where(is_trained, ids, ~ids)
        if has_end or (text.has_markup and not reaches_end):
            return codes
        return np.append(codes, np.int32(self.eos_id if reaches_end else ~self.eos_id))

    def take(self, job: _Job, codes: np.ndarray) -> None:
        """Turn the codes of a job into samples, in the order of the rows."""
        if job.answer == 0 and self.first is None:
            self.first = codes
            return
        if job.block is None:
            rows, self.first = [codes] if self.first is None else [self.first, codes], None
            self._add(rows, job.place, job.answer)
            return
        while len(codes):
            self.running_place = self.running_place if self.running else job.place
            room = self.context_length - self.num_running
            self.running.append(codes[:room])
            self.num_running += len(codes[:room])
            codes = codes[room:]
            if self.num_running == self.context_length:
                self.flush()

    def flush(self) -> None:
        """End the block that is being filled."""
        codes, self.running, self.num_running = np.concatenate(self.running), [], 0
        self._add([codes], self.running_place)

    def _add(self, rows: list[np.ndarray], place: RowPlace, answer: int | None = None) -> None:
        facts, cuts = self.facts, [codes[: self.context_length] for codes in rows]
        if not all((cut[1:] >= 0).any() for cut in cuts):
            has_all = all((codes[1:] >= 0).any() for codes in rows)
            self._lose("beyond" if has_all else "empty", place)
            return
        num_uncut = max(map(len, rows))
        if num_uncut > self.context_length:
            self._lose("cut", place)
        cut, parts = cuts[0], WHOLE
        if answer:
            parts = 1 + int((cut[1:] >= 0).argmax()), 0, answer
        elif answer == 0:
            if np.array_equal(cuts[0], cuts[1]):
                self._lose("same", place)
            cut, shared = joined(cuts[0], cuts[1])
            parts = shared, len(cuts[0]), 0
        ids, learned = np.where(cut < 0, ~cut, cut), cut[1:][cut[1:] >= 0]
        facts["largest_id"] = max(facts["largest_id"], int(ids.max()))
        facts["num_with_end"] += int((ids == self.eos_id).any())
        facts["num_learning_end"] += int((learned == self.eos_id).any())
        self.builder.add(cut, place, num_uncut, parts)

    def _lose(self, what: str, place: RowPlace) -> None:
        """Count what is lost of a sample, and remember the first places."""
        self.facts[f"num_{what}"] += 1
        places = self.facts["examples"].setdefault(what, [])
        places += [str(place)] if len(places) < NUM_EXAMPLES and str(place) not in places else []


def joined(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, int]:
    """Lay the tokens of a pair one after the other, their common prompt once.

    Args:
        chosen, rejected: codes of tokens, each has one that is learned.

    Returns:
        The codes, and how many of them are common.
    """
    num = min(len(chosen), len(rejected))
    is_common = (chosen[:num] == rejected[:num]) & (chosen[:num] < 0)
    shared = num if is_common.all() else int(is_common.argmin())
    return np.concatenate([chosen, rejected[shared:]]), shared


def mask(encoding: Any, spans: tuple[Span, ...], num_ids: int) -> tuple[np.ndarray, slice]:
    """Find the tokens that hold a character of a span.

    Args:
        encoding: a `tokenizers.Encoding`.
        spans: (first character, end), in order.
        num_ids: tokens of it.

    Returns:
        bool [num_ids], and which tokens the last span has.
    """
    is_inside, tokens = np.zeros(num_ids, bool), slice(0, 0)
    first, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    for start, stop in spans:
        found = np.nonzero((first < stop) & (end > start))[0]
        tokens = slice(found[0], found[-1] + 1) if len(found) else slice(num_ids, 0)
        is_inside[tokens] = True
    return is_inside, tokens


def dummy_samples(
    num: int, context_length: int, vocab_size: int, seed: int, num_answers: int = 0
) -> TokenDataset:
    """Make random rows of full length, every id trained: for measuring speed and memory.

    Args:
        num: rows.
        context_length: tokens of each row.
        vocab_size: ids are drawn from [0, vocab_size).
        seed: seed of the draw.
        num_answers: of a row; half of a row is then the prompt.

    Returns:
        `num` samples of `context_length` ids; of pairs two such rows each.
    """
    random, prompt = np.random.default_rng(seed), context_length // 2 * (num_answers > 0)
    second = context_length * (num_answers == 2)
    size = 2 * context_length - prompt if second else context_length
    ids = random.integers(vocab_size, size=(num, size), dtype=np.int32)
    is_trained = np.arange(size) >= prompt
    labels = [(1 - number % 2 * 2) * (num_answers == 1) for number in range(num)]
    rows = zip(ids, labels, strict=True)
    made = [Sample(row, is_trained, prompt, second, sign) for row, sign in rows]
    return of_samples(made, "dummy")
