"""Where rows come from: files, directories, the hub, or a function of the user's own.

Rows come one at a time, each with its place; the name of a file tells its format.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import runpy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from fsdp_qlora.config import OWN_CODE, TrainConfig
from fsdp_qlora.errors import ENVIRONMENT, INPUT, UserError, brief, one_line_of, read_table

WORDS = read_table(__file__, "words.toml")
DUMMY = "dummy"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:]*))?(?::(.+))?")
MOST_HASHED_BYTES = 2**28  # larger files are known by size and time: a hash would take long
MOST_NAMES = 50_000  # in a directory of rows and below it; `/` holds millions
FORMATS = "a .jsonl, .json, .csv, .parquet or .txt file (or .gz, .zst), a directory of them"
# What the datasets library leaves beside the rows it saves.
LEFTOVERS = ("dataset_info.json", "state.json", "dataset_dict.json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
WRAPPER = "data"  # under which a .json file may hold its rows
PIECE_CHARS = 2**16  # of plain text; a longer one would cost the tokenizer memory
LONGEST_LINE = 2**20
LONGEST_ROW = 2**26  # characters of a row in its file, or as a template writes it
LONGEST_TABLE = 2**32  # of a file that is one value in JSON


class RowPlace(NamedTuple):
    """Where a row stands.

    Args:
        name: file, or name of a data set.
        number: line (from 1), or row as a negative number where there are no lines.
    """

    name: str
    number: int

    def __str__(self) -> str:
        return self.name + (f":{self.number}" if self.number > 0 else f" row {-self.number}")


class BadRow(NamedTuple):
    """What stands in the place of a row that cannot be read.

    Args:
        fault: what is wrong, such as "has 1 cells (want 2, as in the first line)".
    """

    fault: str


NOT_UTF8 = BadRow("is not UTF-8")


class TextPiece(NamedTuple):
    """A part of a running text.

    Args:
        text: as it stands in the file.
        is_last: the text ends here.
    """

    text: str
    is_last: bool


PlacedRows = Iterator[tuple[RowPlace, Any]]


def suffix(path: Path) -> str:
    """Return the suffix that tells the format, without that of a compression, in lower case."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def can_read(path: Path) -> bool:
    """Return whether the name of a file tells a format that is read here."""
    is_compressed = path.suffix.lower() in COMPRESSIONS
    return suffix(path) in READERS and not (is_compressed and READERS[suffix(path)] is _read_arrow)


def read_file(path: Path) -> PlacedRows:
    """Read a file row by row.

    Args:
        path: a regular file for which `can_read` is true.

    Yields:
        RowPlace and row; a `BadRow` where a row cannot be read.

    Raises:
        UserError: the file as a whole cannot be read (code 3), or is damaged.
    """
    try:
        yield from READERS[suffix(path)](path)
    except OSError as error:
        rule, remedy, code = str(error.strerror), "check its permissions", ENVIRONMENT
        if error.errno is None:  # wrong bytes have none
            rule, remedy, code = f"is damaged ({brief(error)})", "fetch it again", INPUT
        raise UserError(str(path), rule, remedy, code) from error


def read_own_file(path: Path, flag: str, remedy: str) -> str:
    """Read a text file that the user named.

    Args:
        path: its name.
        flag: that names it.
        remedy: what to do if it cannot be read.

    Raises:
        UserError: it is not there, or not text.
    """
    path, rule = path.expanduser(), "is no regular file"
    try:
        if not os.path.lexists(path) or os.path.isfile(path):  # a pipe would wait
            return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        rule = getattr(error, "strerror", None) or "is not UTF-8"
    raise UserError(f"{flag} {path}", rule, remedy)


def _open(path: Path) -> io.TextIOWrapper:
    """A file that may be compressed; a wrong byte of it becomes half a surrogate pair."""
    file: Any
    if compression := COMPRESSIONS.get(path.suffix.lower()):
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))
    else:
        file = path.open("rb")
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")


def _lines(file: io.TextIOWrapper, path: Path, limit: int) -> Iterator[str]:
    """The lines of a file; one that is longer than any row would fill the host.

    Args:
        file: open.
        path: its name.
        limit: of the first line, which may be a whole table, in characters.
    """
    number = 1
    while line := file.readline(limit + 1):
        _check_size(len(line), f"{path}:{number}", limit)
        yield line
        number, limit = number + 1, LONGEST_ROW


def _check_size(num_chars: int, place: object, limit: int) -> None:
    if num_chars > limit:
        rule = f"is longer than {limit:,} characters, which may be one row"
        raise UserError(str(place), rule, "cut it into rows, or give plain text as .txt")


def is_unicode(text: str) -> bool:
    """Return whether a text holds no half of a surrogate pair, such as a wrong byte becomes."""
    return text.encode(errors="ignore").decode() == text


def _object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a field is given twice")
    return row


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# JSON as its standard has it: no field twice, no NaN.
STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _read_json(path: Path) -> PlacedRows:
    """One object a line, one list of objects, or that under "data"; by what the file holds."""
    with _open(path) as file:
        lines = _lines(file, path, LONGEST_TABLE)
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        number, line = next(numbered, (0, "[]"))
        row = None if line.lstrip().startswith("[") else parse_json(line.rstrip())
        second = next(numbered, None) if row is not None else None
        is_part = isinstance(row, BadRow) and line.rstrip()[-1] in "{[,:"
        if row is None or second is None or is_part:
            rest = file.read(LONGEST_TABLE + 1)
            _check_size(len(rest), path, LONGEST_TABLE)
            value = parse_json("".join([line, second[1] if second else "", rest]))
            value = value[WRAPPER] if _is_wrapped(value) else value
            rows, place = (value, -1) if isinstance(value, list) else ([value], number)
            for count, row in enumerate(rows):
                yield RowPlace(str(path), place - count), row
            return
        yield RowPlace(str(path), number), row
        for number, line in itertools.chain([second], numbered):
            yield RowPlace(str(path), number), parse_json(line.rstrip())


def _is_wrapped(value: Any) -> bool:
    """Whether a value is a data set under a key, with a version or the like beside it."""
    rows = value.get(WRAPPER) if isinstance(value, dict) else None
    others = [name for name in value if name != WRAPPER] if rows else []
    is_alone = not any(isinstance(value[name], list) for name in others)
    return isinstance(rows, list) and all(isinstance(r, dict) for r in rows) and is_alone


def parse_json(text: str) -> Any:
    """Return a value in strict JSON; a `BadRow` for what is none."""
    try:
        return STRICT.decode(text) if is_unicode(text) else NOT_UTF8
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON ({brief(error).replace('line 1 ', '')})")


def _read_csv(path: Path) -> PlacedRows:
    """Rows under a first line of names, separated by what that line has most: comma, ; or tab."""
    csv.field_size_limit(LONGEST_ROW)  # the default is 128 KiB
    names: list[str] = []
    with _open(path) as file:
        rest = _lines(file, path, LONGEST_ROW)
        first = next(rest, "")
        unquoted = re.sub(r'"[^"]*("|$)', "", first)  # a name may hold commas of its own
        separator = "\t" if suffix(path) == ".tsv" else max(",;\t", key=unquoted.count)
        lines = csv.reader(itertools.chain([first], rest), delimiter=separator, strict=True)
        while True:
            place = RowPlace(str(path), lines.line_num + 1)
            try:
                cells = next(lines, None)
            except csv.Error as error:
                yield place, BadRow(f"is not CSV ({error})")
                continue
            if cells is None:
                return
            if names and cells:
                yield place, _row_of_cells(names, cells)
            names = names or cells
            if len(set(names)) < len(names) or not is_unicode("".join(names)):
                rule = "must hold names of columns in UTF-8, each another one"
                raise UserError(str(place), rule, "correct them")


def _row_of_cells(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return BadRow(f"has {len(cells)} cells (want {len(names)}, as in the first line)")
    return dict(zip(names, cells, strict=True)) if is_unicode("".join(cells)) else NOT_UTF8


def _read_text(path: Path) -> PlacedRows:
    """Pieces of running text, cut where a line begins with a letter or sign: tokens keep whole."""
    start, number, piece = 1, 0, ""
    with _open(path) as lines:
        # A text may be one line only: it comes in parts.
        for line in iter(lambda: lines.readline(LONGEST_LINE), ""):
            number += 1
            if len(piece) >= (LONGEST_LINE if line[0].isspace() else PIECE_CHARS):
                yield RowPlace(str(path), start), _piece(piece, is_last=False)
                start, piece = number, ""
            number -= not line.endswith("\n")
            piece += line.replace("\r\n", "\n")
    if piece:
        yield RowPlace(str(path), start), _piece(piece, is_last=True)


def _piece(text: str, is_last: bool) -> Any:
    return TextPiece(text, is_last) if is_unicode(text) else NOT_UTF8


def _read_arrow(path: Path) -> PlacedRows:
    """A parquet file, or one of the datasets library, as `save_to_disk` writes it."""
    import pyarrow
    from pyarrow import parquet

    is_parquet = suffix(path) == ".parquet"
    try:
        with pyarrow.OSFile(str(path)) as file:
            table = parquet.ParquetFile(file) if is_parquet else pyarrow.ipc.open_stream(file)
            batches = table.iter_batches(1024) if is_parquet else table
            schema = table.schema_arrow if is_parquet else table.schema
            known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            features = (known.get("info") or {}).get("features") or {}
            rows = (row for batch in batches for row in _rows_of(batch, path))
            for number, row in enumerate(rows, 1):
                yield RowPlace(str(path), -number), _without_nulls(row, features, decodes=True)
    except (OSError, UserError):
        raise
    except Exception as error:  # Arrow's own and others, such as UnicodeDecodeError
        rule = f"is not a readable {'parquet' if is_parquet else 'Arrow'} file ({brief(error)})"
        raise UserError(str(path), rule, "fetch or save it again") from error


def _rows_of(batch: Any, path: Path) -> Iterator[dict]:
    """The rows of a batch, one at a time where they are large."""
    step = 1 if batch.nbytes > LONGEST_ROW else len(batch)
    for part in (batch.slice(start, step) for start in range(0, len(batch), step or 1)):
        _check_size(part.nbytes * (step == 1), path, LONGEST_ROW)
        yield from part.to_pylist(maps_as_pydicts="strict")


def _without_nulls(row: dict, features: dict, decodes: bool = False) -> dict:
    """A row less the fields of its structs that are null: Arrow gives each the keys of all others.

    Args:
        row: as Arrow or the datasets library gives it.
        features: of its columns, as the datasets library writes them; nulls of its JSON stay.
        decodes: JSON of such columns is still text.

    Source: TRL's remove_none_values.
    """

    def stripped(value: Any, feature: Any) -> Any:
        feature = {"feature": feature[0]} if isinstance(feature, list) else feature or {}
        if feature.get("_type") == "Json":
            return json.loads(value) if decodes and isinstance(value, str) else value
        if isinstance(value, list) and value and not isinstance(value[0], int | float):
            return [stripped(entry, feature.get("feature")) for entry in value]
        if not isinstance(value, dict):
            return value
        return {k: stripped(v, feature.get(k)) for k, v in value.items() if v is not None}

    return {name: stripped(value, features.get(name)) for name, value in row.items()}


READERS = dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json)
READERS |= dict.fromkeys((".csv", ".tsv"), _read_csv)
READERS |= dict.fromkeys((".txt", ".text"), _read_text)
READERS |= dict.fromkeys((".parquet", ".arrow"), _read_arrow)


class Source(NamedTuple):
    """One place that rows come from.

    Args:
        name: as the user is shown it.
        read: gives the rows, with their places, from the first on.
        fingerprint: a text that is another one for other rows; None if there is no telling.
        num_bytes: of its files, as far as known.
        is_file: it is one file, without splits.
    """

    name: str
    read: Callable[[], PlacedRows]
    fingerprint: Callable[[], str | None]
    num_bytes: int = 0
    is_file: bool = False


class HubSet(NamedTuple):
    """A data set of the Hugging Face hub, and which of its rows are used.

    Args:
        repo: name on the hub.
        split: split that is read; a slice such as "train[:1%]" is one too.
        config: one of its configurations, where it has several.
        is_shuffled: rows are shuffled with the run's seed before any are chosen.
        first: index of the first row used.
        is_limited: only `dataset_samples` rows are used.
    """

    repo: str
    split: str = "train"
    config: str | None = None
    is_shuffled: bool = False
    first: int = 0
    is_limited: bool = False

    def __str__(self) -> str:
        return ":".join([self.repo, *([self.config] if self.config else []), self.split])


HUB_SETS = {name: HubSet(**row) for name, row in WORDS["hub_sets"].items()}


def find(dataset: str, cfg: TrainConfig, split: str | None, tokenizer: Any = None) -> list[Source]:
    """Find what --dataset or --eval_split names.

    Args:
        dataset: path of a file or directory, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, a name in
            `HUB_SETS`, `file.py[:function]`, or several of them with commas between.
        cfg: dataset_samples, the rows to use of alpaca_sample and orca_math (all else is used
            whole), and seed, of the shuffle of sql and orca_math.
        split: split of hub sets and own functions, whatever their name says; None for that one,
            or the usual one.
        tokenizer: transformers tokenizer for a function of the user's own.

    Returns:
        At least one source, in the order given; the files of a directory by name.

    Raises:
        UserError: no such data set; the hub cannot be reached (code 3).
    """
    is_one = "," not in dataset or os.path.lexists(dataset)
    names = [dataset] if is_one else [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        _refuse_name(dataset)
    return [source for name in names for source in _find_one(name, cfg, split, tokenizer)]


def read(sources: list[Source]) -> PlacedRows:
    """Read all rows of some sources, one at a time.

    Args:
        sources: from `find`.

    Yields:
        RowPlace and row; a `BadRow` where a row cannot be read.

    Raises:
        UserError: one that cannot be read.
    """
    return (pair for source in sources for pair in source.read())


def _find_one(name: str, cfg: TrainConfig, split: str | None, tokenizer: Any) -> list[Source]:
    if match := OWN_CODE.fullmatch(name):
        return [_own_source(Path(match[1]), match[2] or "get_custom_dataset", split, tokenizer)]
    entry = HUB_SETS.get(name)
    if entry is None:
        try:
            path = Path(name).expanduser()
        except RuntimeError:
            _refuse_name(name)
        if os.path.isdir(path):
            return _directory(path)
        if os.path.lexists(path) or can_read(path):
            return [_file(path)]
        match = HUB_NAME.fullmatch(name)
        if match is None or name.startswith("."):
            _refuse_name(name)
        entry = HubSet(match[1], match[3] or "train", match[2] or None)
    return [_hub_source(entry._replace(split=split or entry.split), name, cfg)]


def _refuse_name(dataset: str) -> NoReturn:
    names = [*HUB_SETS, DUMMY]
    close = difflib.get_close_matches(dataset, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"or ORG/NAME of the hub, {' '.join(names)}"
    raise UserError(f"dataset {dataset}", f"want {FORMATS}", remedy)


def _directory(path: Path) -> list[Source]:
    remedy = "check its permissions"
    with one_line_of(f"dataset {path}", remedy, ENVIRONMENT, "cannot be listed ({})"):
        names = list(itertools.islice(path.rglob("*"), MOST_NAMES))
    if len(names) == MOST_NAMES:
        rule, remedy = f"holds {MOST_NAMES:,} names or more", "give the directory of the rows"
        raise UserError(f"dataset {path}", rule, remedy)
    inside = (p for p in sorted(names) if not _is_hidden(p.relative_to(path)))
    files = [file for file in inside if can_read(file) and file.is_file()]
    if not files:
        raise UserError(f"dataset {path}", "holds no file that can be read", f"want {FORMATS}")
    return [_file(file) for file in files]


def _is_hidden(path: Path) -> bool:
    is_leftover = path.name in LEFTOVERS or path.name.startswith("cache-")
    return is_leftover or any(part.startswith(".") for part in path.parts)


def _file(path: Path) -> Source:
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"dataset {path}", what, f"give {FORMATS}")
    if not can_read(path):
        raise UserError(f"dataset {path}", "its name tells no format we read", f"want {FORMATS}")
    size = os.stat(path).st_size
    return Source(str(path), lambda: read_file(path), lambda: _file_fingerprint(path), size, True)


def _file_fingerprint(path: Path) -> str | None:
    status = os.stat(path)
    if status.st_size > MOST_HASHED_BYTES:
        return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    with contextlib.suppress(OSError), path.open("rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return None  # reading it will say so


def _hub_source(entry: HubSet, name: str, cfg: TrainConfig) -> Source:
    """The datasets library brings a set into its cache, or finds it there; rows stay on disk."""
    import datasets

    rule = f"{entry} cannot be had ({{}})"  # hub, network, cache and Arrow each raise their own
    remedy = "check the network and HF_HUB_OFFLINE, or give a local file or directory"
    with one_line_of(f"dataset {name}", remedy, ENVIRONMENT, rule, Exception):
        table = datasets.load_dataset(entry.repo, entry.config, split=entry.split)
    stop = min(cfg.dataset_samples, len(table)) if entry.is_limited else len(table)

    def read() -> PlacedRows:
        rows = table.shuffle(seed=cfg.seed) if entry.is_shuffled else table
        features = table.features.to_dict()
        for index in range(entry.first, stop):
            yield RowPlace(str(entry), -index - 1), _without_nulls(rows[index], features)

    def fingerprint() -> str | None:
        files = [(file["filename"], os.stat(file["filename"])) for file in table.cache_files]
        parts = [f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in files]
        seed = cfg.seed if entry.is_shuffled else ""
        return f"{entry} {entry.first} {stop} {seed} {parts}" if parts else None

    return Source(str(entry), read, fingerprint, table.data.nbytes)


def _own_source(path: Path, function: str, split: str | None, tokenizer: Any) -> Source:
    """The user's own local file is run; nothing fetched ever is."""
    if not path.is_file():
        raise UserError(f"dataset {path}", "does not exist", "give FILE.py:FUNCTION")
    name = f"{path}:{function}"
    return Source(name, lambda: _read_own(path, function, split, tokenizer), lambda: None)


def _read_own(path: Path, name: str, split: str | None, tokenizer: Any) -> PlacedRows:
    """Source: llama-recipes' custom data sets, `get_custom_dataset(config, tokenizer, split)`."""
    names = {"train_split": "train", "test_split": "validation"}
    settings = SimpleNamespace(dataset="custom_dataset", file=str(path), **names)
    try:
        function = runpy.run_path(str(path)).get(name)
        if not callable(function):
            raise UserError(f"{path}:{name}", "is no function there", f"define {name} in {path}")
        table = function(settings, tokenizer, split or "train")
        for number, row in enumerate(table, 1):
            if isinstance(row, dict):  # lists in place of tensors and arrays
                row = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()}
                features = getattr(table, "features", None)  # of the datasets library
                row = _without_nulls(row, features.to_dict()) if features is not None else row
            yield RowPlace(f"{path}:{name}", -number), row
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        what = f"{type(error).__name__}: {brief(error)}"
        remedy = f"correct it; {name} must return rows"
        raise UserError(f"{path}:{[name, *lines][-1]}", what, remedy) from error
