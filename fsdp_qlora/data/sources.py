"""Rows from a local file or from one of the named data sets on the hub."""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fsdp_qlora.data import templates
from fsdp_qlora.errors import UserError

DUMMY = "dummy"


@dataclass(frozen=True)
class HubSet:
    """A named data set: where it lies and which of its rows are used.

    Args:
        repo: name on the Hugging Face hub.
        split: split that is read.
        is_shuffled: rows are shuffled with the run's seed before any are chosen.
        first: index of the first row used.
        is_limited: only `dataset_samples` rows are used.
    """

    repo: str
    split: str = "train"
    is_shuffled: bool = False
    first: int = 0
    is_limited: bool = False


HUB_SETS = {
    "alpaca": HubSet("yahma/alpaca-cleaned"),
    "alpaca_sample": HubSet("yahma/alpaca-cleaned", is_limited=True),
    "guanaco": HubSet("timdettmers/openassistant-guanaco"),
    "sql": HubSet("knowrohit07/know_sql", split="validation", is_shuffled=True, first=1000),
    "orca_math": HubSet(
        "microsoft/orca-math-word-problems-200k", is_shuffled=True, is_limited=True
    ),
}


def read(dataset: str, num_samples: int, seed: int) -> list[dict]:
    """Read every row of a data set and check that each can be trained on.

    Args:
        dataset: path of a .jsonl, .json or .parquet file, or a name in `HUB_SETS`.
        num_samples: rows to use of alpaca_sample and orca_math; files are used whole.
        seed: seed of the shuffle of sql and orca_math.

    Returns:
        Rows that `templates.render` accepts, in the order of the source.

    Raises:
        UserError: no such data set; not readable (code 3); a bad row, named by file and line.
    """
    if dataset in HUB_SETS:
        return _checked(_read_hub(dataset, num_samples, seed), dataset)
    path = Path(dataset).expanduser()
    readers = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        _refuse_name(dataset)
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise UserError(
            f"dataset {path}", what, "give the path of a .jsonl, .json or .parquet file"
        )
    try:
        return _checked(reader(path), str(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), reason, "check its permissions", code=3) from error


def _refuse_name(dataset: str) -> NoReturn:
    names = [*HUB_SETS, DUMMY]
    close = difflib.get_close_matches(dataset, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"or one of {' '.join(names)}"
    raise UserError(f"dataset {dataset}", "want a .jsonl, .json or .parquet file", remedy)


def _checked(places_and_rows: Iterator[tuple[str, Any]], name: str) -> list[dict]:
    rows: list[dict] = []
    bad: list[str] = []
    for place, row in places_and_rows:
        fault = templates.problem(row)
        if fault is None:
            rows.append(row)
        else:
            bad.append(f"{place} {fault}")
    if bad:
        more = f" and {len(bad) - 1} more bad rows" if len(bad) > 1 else ""
        raise UserError(bad[0], "not a training row", f"correct or remove it{more}")
    if not rows:
        raise UserError(name, "holds no rows", "give a data set with at least one row")
    return rows


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """One object a line, or one list of objects; either may stand in .json and .jsonl files."""
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(str(path), "is UTF-16", "save it as UTF-8")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        first = next((line for line in file if line.strip()), b"")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        if first.lstrip().startswith(b"["):
            rows = _parse(file.read(), str(path))
            yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.rstrip(), f"{path}:{number}")


def _parse(data: bytes, place: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, valid UTF-8."""
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} " if error.lineno > 1 else ""
        rule = f"is not JSON ({where}column {error.colno}: {error.msg})"
    except (ValueError, RecursionError) as error:
        rule = f"is not JSON we can read ({str(error)[:80]})"
    raise UserError(place, rule, "correct the line")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a field is given twice")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        remedy = "pip install pyarrow, or use a .jsonl file"
        raise UserError(str(path), "reading parquet needs pyarrow", remedy, code=3) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        rule = f"is not a readable parquet file ({str(error)[:80]})"
        raise UserError(str(path), rule, "fetch it again") from error
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))


def _read_hub(name: str, num_samples: int, seed: int) -> Iterator[tuple[str, Any]]:
    entry = HUB_SETS[name]
    local = "or give a local .jsonl, .json or .parquet file"
    try:
        from datasets import load_dataset
    except ImportError as error:
        remedy = f"pip install datasets, {local}"
        raise UserError(f"dataset {name}", "needs datasets", remedy, code=3) from error
    try:
        table = load_dataset(entry.repo, split=entry.split)
    except Exception as error:  # hub, network, cache and Arrow each raise their own
        rule = f"{entry.repo} cannot be had ({str(error)[:120]})"
        remedy = f"check the network and HF_HUB_OFFLINE, {local}"
        raise UserError(f"dataset {name}", rule, remedy, code=3) from error
    if entry.is_shuffled:
        table = table.shuffle(seed=seed)
    stop = min(num_samples, len(table)) if entry.is_limited else len(table)
    for index in range(entry.first, stop):
        yield f"{entry.repo} row {index}", table[index]
