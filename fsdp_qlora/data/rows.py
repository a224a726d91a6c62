"""A row and its place, and the files that rows are read from, compressed or not."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fsdp_qlora.errors import ENVIRONMENT, UserError

COMPRESSIONS = (".gz", ".zst")
MARK = b"\xef\xbb\xbf"


class Place(NamedTuple):
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


class Bad(NamedTuple):
    """What stands in the place of a row that cannot be read.

    Args:
        words: what is wrong, such as "is not JSON (column 3)".
    """

    words: str


class Piece(NamedTuple):
    """A part of a running text.

    Args:
        text: as it stands in the file.
        is_last: the text ends here.
    """

    text: str
    is_last: bool


Rows = Iterator[tuple[Place, Any]]


def lines(path: Path) -> Iterator[bytes]:
    """Read the lines of a file that may be compressed; a byte order mark is taken off.

    Args:
        path: the file.

    Yields:
        Lines with their ends; at least one, empty for an empty file.

    Raises:
        UserError: it is UTF-16; it needs a library that is not there (code 3).
    """
    with _open(path) as file:
        first = file.readline()
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(str(path), "is UTF-16", "save it as UTF-8")
        yield first.removeprefix(MARK)
        yield from file


def arrow(path: Path) -> Any:
    """Import pyarrow.

    Args:
        path: the file that needs it.

    Returns:
        The module.

    Raises:
        UserError: it is not installed (code 3).
    """
    try:
        import pyarrow
    except ImportError as error:
        remedy = "pip install pyarrow, or use a .jsonl file"
        raise UserError(str(path), "reading it needs pyarrow", remedy, code=ENVIRONMENT) from error
    return pyarrow


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(arrow(path).input_stream(str(path), compression="zstd"))
    return path.open("rb")
