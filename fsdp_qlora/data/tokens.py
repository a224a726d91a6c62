"""Rows to token ids, many at a time, with what is lost on the way counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fsdp_qlora.data.row_formats import BLOCKS, TOKENS, RowFormatter
from fsdp_qlora.data.sources import BadRow, PlacedRows, RowPlace, TextPiece
from fsdp_qlora.data.token_dataset import Sample, StoreBuilder, TokenDataset, TokenStore, of_samples
from fsdp_qlora.data.tokenizer import Refused, Span, Text, TextTokenizer

CHUNK = 1024  # texts that are tokenized at once
NUM_EXAMPLES = 5
NO_TEXT = Text("", (), has_markup=True)
MOST_BAD = 1000  # then reading stops: the format is another one than we think
# Rows that were good and that were not. Samples longer than the context, without anything to learn,
# whose answers all lie beyond the context, that hold the end-of-text token, and that learn it.
NUMBERS = (
    *("num_rows", "num_bad", "num_cut", "num_empty", "num_beyond"),
    *("num_with_end", "num_learning_end"),
)


Facts = dict[str, Any]


class _Job(NamedTuple):
    """One text on its way: `block` is None for a sample of its own, else whether its text ends."""

    place: RowPlace
    text: Text
    codes: np.ndarray | None = None
    block: bool | None = None
    starts_text: bool = False


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
        The samples. Their facts: `NUMBERS`; kinds, how the rows were treated -> how many; bad,
        place and fault of the first bad rows; examples, "cut", "empty" and "beyond" -> places of
        the first of them; largest_id, of all samples.

    Raises:
        UserError: no end-of-text token, or a source that cannot be read. Bad rows are counted,
            not raised.
    """
    num_reported, facts = 0, Facts(dict.fromkeys(NUMBERS, 0))
    facts |= {"kinds": Counter(), "bad": [], "examples": {}, "largest_id": -1}
    maker = _SampleMaker(builder, facts, context_length, tokenizer)
    jobs = _jobs(rows, formatter, facts)
    while chunk := list(islice(jobs, CHUNK)):
        for job, codes in zip(chunk, _encode(maker, chunk), strict=True):
            maker.take(job, codes)
        progress(facts["num_rows"] - num_reported)
        num_reported = facts["num_rows"]
    if maker.num_running > 1:  # of a single token nothing can be learned
        maker.flush()
    return builder.finish(facts | {"kinds": dict(facts["kinds"])})


def _jobs(rows: PlacedRows, formatter: RowFormatter, facts: Facts) -> Iterator[_Job]:
    starts_text, last = True, None
    for place, row in rows:
        if not starts_text and last is not None and place.name != last.name:
            yield _Job(place, NO_TEXT, None, True)  # its last row did not say that the text ends
            starts_text = True
        last = place
        fault = row.fault if isinstance(row, BadRow) else formatter.problem(row)
        if fault is None:
            try:
                treatment = formatter.name(row)
                jobs = _jobs_of_row(place, row, formatter, treatment)
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
        yield from jobs
    if not starts_text and last is not None:
        yield _Job(last, NO_TEXT, None, True)


def _jobs_of_row(place: RowPlace, row: Any, formatter: RowFormatter, treatment: str) -> list[_Job]:
    """A text that ends in a line break goes on in the next row (wikitext has a row a line)."""
    if treatment == TOKENS:
        return [_Job(place, NO_TEXT, _codes_of_ids(row, formatter.train_on == "all"))]
    if treatment != BLOCKS:
        return [_Job(place, text) for text in formatter.render(row)]
    piece = row if isinstance(row, TextPiece) else None
    text = piece.text if piece else row["text"]
    ends = piece.is_last if piece else bool(text) and not text.endswith("\n")
    return [_Job(place, Text(text, (), has_markup=True), None, ends)]


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
        encodings = maker.tokenizer.encode([jobs[i].text.text for i in chosen], not has_markup)
        for i, encoding in zip(chosen, encodings, strict=True):
            found[i] = maker.codes(jobs[i], encoding)
    return [codes for codes in found if codes is not None]


class _SampleMaker:
    """Codes to samples."""

    def __init__(
        self, builder: StoreBuilder, facts: Facts, context_length: int, tokenizer: TextTokenizer
    ) -> None:
        self.builder, self.facts, self.context_length = builder, facts, context_length
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_id
        self.added_ids = np.array(sorted(tokenizer.added_ids | {self.eos_id}), np.int32)
        bos_id = tokenizer.core.token_to_id(tokenizer.names.get("bos_token", ""))
        self.bos_codes = np.array([~bos_id] if tokenizer.adds_bos else [], np.int32)
        self.running: list[np.ndarray] = []  # codes of the block that is being filled
        self.num_running, self.running_place = 0, RowPlace("", 0)

    def codes(self, job: _Job, encoding: Any) -> np.ndarray:
        """Ids with what is given marked, the end of text appended where none is."""
        text = job.text
        ids = np.array(encoding.ids, np.int32)
        if job.block is not None:
            start = [self.bos_codes] if job.starts_text else []
            end = [np.array([self.eos_id], np.int32)] if job.block else []
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
        end_code = self.eos_id if reaches_end else ~self.eos_id
        return np.append(codes, np.int32(end_code))

    def take(self, job: _Job, codes: np.ndarray) -> None:
        """Turn the codes of a job into samples, in the order of the rows."""
        if job.block is None:
            self._add(codes, job.place)
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
        self._add(codes, self.running_place)

    def _add(self, codes: np.ndarray, place: RowPlace) -> None:
        facts, cut = self.facts, codes[: self.context_length]
        learned = cut[1:][cut[1:] >= 0]
        if not len(learned):
            self._lose("beyond" if (codes[1:] >= 0).any() else "empty", place)
            return
        if len(codes) > len(cut):
            self._lose("cut", place)
        ids = np.where(cut < 0, ~cut, cut)
        facts["largest_id"] = max(facts["largest_id"], int(ids.max()))
        facts["num_with_end"] += int((ids == self.eos_id).any())
        facts["num_learning_end"] += int((learned == self.eos_id).any())
        self.builder.add(cut, place, len(codes))

    def _lose(self, what: str, place: RowPlace) -> None:
        """Count what is lost of a sample, and remember the first places."""
        self.facts[f"num_{what}"] += 1
        places = self.facts["examples"].setdefault(what, [])
        if len(places) < NUM_EXAMPLES and str(place) not in places:
            places.append(str(place))


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


def dummy_samples(num: int, context_length: int, vocab_size: int, seed: int) -> TokenDataset:
    """Make random rows of full length, every id trained: for measuring speed and memory.

    Args:
        num: rows.
        context_length: tokens of each row.
        vocab_size: ids are drawn from [0, vocab_size).
        seed: seed of the draw.

    Returns:
        `num` samples of `context_length` ids.
    """
    random = np.random.default_rng(seed)
    ids = random.integers(vocab_size, size=(num, context_length), dtype=np.int32)
    return of_samples([Sample(row, np.ones(context_length, bool)) for row in ids], "dummy")
