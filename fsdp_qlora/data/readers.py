"""Files to rows, one at a time, each with its place; the name of a file tells its format."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fsdp_qlora.errors import UserError

COMPRESSIONS = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PIECE_CHARS = 2**16  # of plain text; a longer one would cost the tokenizer memory
LONGEST_LINE = 2**20
LONGEST_CELL = 2**31 - 1
WRONG_BYTES = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a wrong byte
JSON_SPACE = re.compile(r"[ \t\n\r]*")


class RowPlace(NamedTuple):
    """Where a row stands.

    Args:
        name: file, or name of a data set.
        number: line (from 1), or row as a negative number where there are no lines.
    """

    name: str
    number: int

    def __str__(self) -> str:
        number = f":{self.number}" if self.number > 0 else f" row {-self.number}"
        return self.name + number


class BadRow(NamedTuple):
    """What stands in the place of a row that cannot be read.

    Args:
        fault: what is wrong, such as "is not JSON (column 3)".
    """

    fault: str


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
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower()


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
    remedy = "fetch it again"
    try:
        yield from READERS[suffix(path)](path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(str(path), f"is damaged ({str(error)[:80]})", remedy) from error
    except OSError as error:
        if error.errno is None:  # Arrow's way to say that the bytes are wrong
            raise UserError(str(path), f"is damaged ({str(error)[:80]})", remedy) from error
        raise UserError(
            str(path), error.strerror or str(error), "check its permissions", code=3
        ) from error


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
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = getattr(error, "strerror", None) or "is not UTF-8"
    raise UserError(f"{flag} {path}", rule, remedy)


def _open(path: Path) -> BinaryIO:
    """A file that may be compressed, behind its byte order mark."""
    file: Any
    if path.suffix.lower() == ".gz":
        file = io.BufferedReader(gzip.GzipFile(path))
    elif path.suffix.lower() == ".zst":
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        file = path.open("rb")
    first = file.peek(3)[:3]
    if first[:2] in UTF16_MARKS:
        raise UserError(str(path), "is UTF-16", "save it as UTF-8")
    file.read(len(BYTE_ORDER_MARK) if first == BYTE_ORDER_MARK else 0)
    return file


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), "utf-8", "surrogateescape", newline="\n")


class _StrictJson(json.JSONDecoder):
    """JSON as its standard has it: no field twice, no NaN."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)
        self.fault: str | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return a value and where it ends; a `BadRow` for what the standard does not allow."""
        self.fault = None
        value, end = super().raw_decode(s, idx)
        return BadRow(f"is not JSON we can read ({self.fault})") if self.fault else value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) < len(pairs):
            self.fault = self.fault or "a field is given twice"
        return row

    def _constant(self, name: str) -> None:
        self.fault = self.fault or f"{name} is not a JSON value"


STRICT = _StrictJson()


def _read_json(path: Path) -> PlacedRows:
    """One object a line, or one list of objects; a .json or .jsonl file may hold either."""
    with _open(path) as file:
        is_first = True
        for number, line in enumerate(file, 1):
            if is_first and line.lstrip().startswith(b"["):
                yield from _read_json_list(path, line + file.read(), number)
                return
            if line.strip():
                is_first = False
                yield RowPlace(str(path), number), _parse_line(line.rstrip())


def _parse_line(data: bytes) -> Any:
    try:
        return STRICT.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return _bad_json(error)


def _bad_json(error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow(f"is not UTF-8 at byte {error.start}")
    if isinstance(error, json.JSONDecodeError):
        return BadRow(f"is not JSON (column {error.colno}: {error.msg})")
    return BadRow(f"is not JSON we can read ({str(error)[:80]})")


def _read_json_list(path: Path, data: bytes, first_line: int) -> PlacedRows:
    """The rows of a list, each with its line; with its number where all stand on one line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        yield RowPlace(str(path), line), _bad_json(error)
        return
    has_lines = "\n" in text.strip()
    at, line, counted, number = _skip_space(text, text.index("[") + 1), first_line, 0, 0
    has_more = not text.startswith("]", at)
    while has_more:
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = STRICT.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = (
                first_line + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else line
            )
            yield RowPlace(str(path), line), _bad_json(error)
            return
        yield RowPlace(str(path), line if has_lines else -number), row
        at = _skip_space(text, at)
        has_more = text.startswith(",", at)
        at = _skip_space(text, at + has_more)
    if text[at:].rstrip() != "]":
        line += text.count("\n", counted, at)
        fault = "is not JSON (want a comma, or the list's end and no more)"
        yield RowPlace(str(path), line), BadRow(fault)


def _skip_space(text: str, at: int) -> int:
    found = JSON_SPACE.match(text, at)
    assert found is not None, "the pattern matches the empty text too"
    return found.end()


def _read_csv(path: Path) -> PlacedRows:
    """Rows under a first line of names, separated by what that line has most: comma, ; or tab."""
    csv.field_size_limit(LONGEST_CELL)  # the default is 128 KiB
    with _open_text(path) as lines:
        first = lines.readline()
        separator = "\t" if suffix(path) == ".tsv" else max(",;\t", key=first.count)
        names = _column_names(path, first, separator)
        rows = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            place = RowPlace(str(path), rows.line_num + 2)
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield place, BadRow(f"is not CSV ({error})")
                continue
            if cells is None:
                return
            if cells:
                yield place, _row_of_cells(names, cells)


def _column_names(path: Path, line: str, separator: str) -> list[str]:
    names: list[str] = []
    fault = "is not UTF-8" if WRONG_BYTES.search(line) else None
    try:
        names = next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error as error:
        fault = fault or f"is not CSV ({error})"
    twice = [name for name in names if names.count(name) > 1]
    fault = fault or (f'two columns are called "{twice[0]}"' if twice else None)
    if fault is not None:
        raise UserError(f"{path}:1", fault, "correct the names of the columns")
    return names


def _row_of_cells(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return BadRow(f"has {len(cells)} cells (want {len(names)}, as in the first line)")
    if any(WRONG_BYTES.search(cell) for cell in cells):
        return BadRow("is not UTF-8")
    return dict(zip(names, cells, strict=True))


def _read_text(path: Path) -> PlacedRows:
    """Pieces of running text, cut where a line begins with a letter or sign: tokens keep whole."""
    start, number, piece = 1, 0, ""
    with _open_text(path) as lines:
        # A text may be one line only: it comes in parts.
        for line in iter(lambda: lines.readline(LONGEST_LINE), ""):
            number += 1
            is_long = len(piece) >= LONGEST_LINE
            if is_long or (len(piece) >= PIECE_CHARS and not line[0].isspace()):
                yield RowPlace(str(path), start), _piece(piece, is_last=False)
                start, piece = number, ""
            number -= not line.endswith("\n")
            piece += line.replace("\r\n", "\n")
    if piece:
        yield RowPlace(str(path), start), _piece(piece, is_last=True)


def _piece(text: str, is_last: bool) -> Any:
    return BadRow("is not UTF-8") if WRONG_BYTES.search(text) else TextPiece(text, is_last)


def _read_arrow(path: Path) -> PlacedRows:
    """A parquet file, or one of the datasets library, as `save_to_disk` writes it."""
    import pyarrow
    from pyarrow import parquet

    is_parquet = suffix(path) == ".parquet"
    try:
        if is_parquet:
            with parquet.ParquetFile(path) as file:
                yield from _rows_of_batches(path, file.iter_batches(batch_size=1024))
        else:
            with pyarrow.memory_map(str(path)) as file:
                yield from _rows_of_batches(path, pyarrow.ipc.open_stream(file))
    except OSError:
        raise
    except Exception as error:  # Arrow's own and others, such as UnicodeDecodeError
        kind = "parquet" if is_parquet else "Arrow"
        rule = f"is not a readable {kind} file ({str(error)[:80]})"
        raise UserError(str(path), rule, "fetch or save it again") from error


def _rows_of_batches(path: Path, batches: Any) -> PlacedRows:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield RowPlace(str(path), -number), row


def _one_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("is not UTF-8")


READERS: dict[str, Callable[[Path], PlacedRows]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    **dict.fromkeys((".txt", ".text"), _read_text),
    **dict.fromkeys((".parquet", ".arrow"), _read_arrow),
}
