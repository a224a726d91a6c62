"""Files to rows, one at a time, by the format that the name of the file tells."""

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.data import json_rows
from fsdp_qlora.data.rows import COMPRESSIONS, Bad, Piece, Place, Rows, arrow, lines
from fsdp_qlora.errors import UserError

PIECE_CHARS = 2**16  # of plain text; a longer one would cost the tokenizer memory
LONGEST_LINE_BYTES = 2**20
LONGEST_CELL = 2**31 - 1
SIGN_OF_BYTES = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a wrong byte


def suffix(path: Path) -> str:
    """Return the suffix that tells the format, without that of a compression, in lower case."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower()


def can_read(path: Path) -> bool:
    """Return whether the name of a file tells a format that is read here."""
    is_packed = path.suffix.lower() in COMPRESSIONS
    return suffix(path) in READERS and not (is_packed and suffix(path) in ARROW_FORMATS)


def read(path: Path) -> Rows:
    """Read a file row by row.

    Args:
        path: a regular file for which `can_read` is true.

    Yields:
        Place and row; a `Bad` where a row cannot be read.

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


def _read_csv(path: Path) -> Rows:
    """Rows under a first line of names, separated by what that line has most: comma, ; or tab."""
    csv.field_size_limit(LONGEST_CELL)  # the default is 128 KiB
    texts = (line.decode("utf-8", "surrogateescape") for line in lines(path))
    first = next(texts)
    separator = "\t" if suffix(path) == ".tsv" else max(",;\t", key=first.count)
    names = _columns(path, first, separator)
    rows = csv.reader(texts, delimiter=separator, strict=True)
    while True:
        place = Place(str(path), rows.line_num + 2)
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield place, Bad(f"is not CSV ({error})")
            continue
        if cells is None:
            return
        if cells:
            yield place, _row_of_cells(names, cells)


def _columns(path: Path, line: str, separator: str) -> list[str]:
    place, remedy = f"{path}:1", "correct the names of the columns"
    if SIGN_OF_BYTES.search(line):
        raise UserError(place, "is not UTF-8", remedy)
    try:
        names = next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error as error:
        raise UserError(place, f"is not CSV ({error})", remedy) from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(place, f'two columns are called "{twice}"', remedy)
    return names


def _row_of_cells(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return Bad(f"has {len(cells)} cells (want {len(names)}, as in the first line)")
    if any(SIGN_OF_BYTES.search(cell) for cell in cells):
        return Bad("is not UTF-8")
    return dict(zip(names, cells, strict=True))


def _read_text(path: Path) -> Rows:
    """Pieces of running text, cut where a line begins with a letter or sign: tokens keep whole."""
    start, piece = 1, ""
    for number, line in _text_lines(path):
        is_long = len(piece) >= LONGEST_LINE_BYTES
        if is_long or (len(piece) >= PIECE_CHARS and not line[0].isspace()):
            yield Place(str(path), start), _piece(piece, is_last=False)
            start, piece = number, ""
        piece += line
    if piece:
        yield Place(str(path), start), _piece(piece, is_last=True)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and line; a very long line (a text may be one line only) comes in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for number, line in enumerate(lines(path), 1):
        for start in range(0, len(line), LONGEST_LINE_BYTES):
            text = decoder.decode(line[start : start + LONGEST_LINE_BYTES])
            if text:
                yield number, text.replace("\r\n", "\n")
    if rest := decoder.decode(b"", final=True):
        yield number, rest


def _piece(text: str, is_last: bool) -> Any:
    return Bad("is not UTF-8") if SIGN_OF_BYTES.search(text) else Piece(text, is_last)


def _read_parquet(path: Path) -> Rows:
    arrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows_of(path, file.iter_batches(batch_size=1024))
    except OSError:
        raise
    except Exception as error:  # Arrow's own and others, such as UnicodeDecodeError
        rule = f"is not a readable parquet file ({str(error)[:80]})"
        raise UserError(str(path), rule, "fetch it again") from error


def _read_arrow(path: Path) -> Rows:
    """A file of the datasets library, as `save_to_disk` writes it."""
    pyarrow = arrow(path)
    try:
        with pyarrow.memory_map(str(path)) as file:
            yield from _rows_of(path, pyarrow.ipc.open_stream(file))
    except OSError:
        raise
    except Exception as error:  # Arrow's own and others, such as UnicodeDecodeError
        rule = f"is not a readable Arrow file ({str(error)[:80]})"
        raise UserError(str(path), rule, "save it again") from error


def _rows_of(path: Path, batches: Any) -> Rows:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield Place(str(path), -number), row


def _one_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return Bad("is not UTF-8")


ARROW_FORMATS = (".parquet", ".arrow")
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": json_rows.read,
    ".ndjson": json_rows.read,
    ".json": json_rows.read,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".text": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
