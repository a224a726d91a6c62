"""Rows from JSON: one object a line, or one list of them."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from fsdp_qlora.data.rows import Bad, Place, Rows, lines


def read(path: Path) -> Rows:
    """Read one object a line, or one list of objects; a .json or .jsonl file may hold either.

    Args:
        path: the file; a list is read whole, lines one by one.

    Yields:
        Place and value; a `Bad` where there is no JSON.
    """
    numbered = enumerate(lines(path), 1)
    for number, line in numbered:
        if not line.strip():
            continue
        if line.lstrip().startswith(b"["):
            rest = b"".join(line for _, line in numbered)
            yield from _read_list(path, line + rest, number)
            return
        yield Place(str(path), number), _parse(line.rstrip())
        break
    for number, line in numbered:
        if line.strip():
            yield Place(str(path), number), _parse(line.rstrip())


def _parse(data: bytes) -> Any:
    """Strict JSON: no duplicate keys, no NaN, valid UTF-8."""
    try:
        return STRICT.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Bad(f"is not JSON (column {error.colno}: {error.msg})")
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON we can read ({str(error)[:80]})")


def _read_list(path: Path, data: bytes, first_line: int) -> Rows:
    """The rows of a list, each with its line; with its number where all stand on one line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        yield Place(str(path), line), Bad(f"is not UTF-8 at byte {error.start}")
        return
    has_lines = "\n" in text.strip()
    at, line, counted, number = text.index("[") + 1, first_line, 0, 0
    while number == 0 or text.startswith(",", at):
        at = _skip_space(text, at + (number > 0))
        if number == 0 and text.startswith("]", at):
            break
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = _parse_item(text, at)
        except (ValueError, RecursionError) as error:
            yield _place_of(path, error, first_line, line)
            return
        yield Place(str(path), line if has_lines else -number), row
        at = _skip_space(text, at)
    if text[at:].rstrip() != "]":
        line += text.count("\n", counted, at)
        yield (
            Place(str(path), line),
            Bad("is not JSON (want a comma, or the list's end and no more)"),
        )


def _parse_item(text: str, start: int) -> tuple[Any, int]:
    """One item of a list, or a `Bad`, and where it ends."""
    try:
        return STRICT.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        return Bad(f"is not JSON we can read ({str(error)[:80]})"), LOOSE.raw_decode(text, start)[1]


def _place_of(path: Path, error: Exception, first_line: int, line: int) -> tuple[Place, Bad]:
    if isinstance(error, json.JSONDecodeError):
        place = Place(str(path), first_line + error.lineno - 1)
        return place, Bad(f"is not JSON (column {error.colno}: {error.msg})")
    return Place(str(path), line), Bad(f"is not JSON we can read ({str(error)[:80]})")


def _skip_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None, "the pattern matches the empty text too"
    return found.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a field is given twice")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


SPACE = re.compile(r"[ \t\n\r]*")
STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
LOOSE = json.JSONDecoder()
