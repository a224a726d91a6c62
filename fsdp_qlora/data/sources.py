"""Where rows come from: files, directories, the hub, or a function of the user's own."""

import difflib
import functools
import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from fsdp_qlora.config import OWN_CODE
from fsdp_qlora.data import hub, readers
from fsdp_qlora.data.hub import HUB_SETS, HubSet
from fsdp_qlora.data.rows import Place, Rows
from fsdp_qlora.errors import ENVIRONMENT, UserError

DUMMY = "dummy"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:]*))?(?::(.+))?")
OWN_FUNCTION = "get_custom_dataset"
MOST_HASHED_BYTES = 2**28  # larger files are told by size and time, as their hash would take long
MOST_NAMES = 50_000  # in a directory of rows and below it; `/` holds millions
FORMATS = "a .jsonl, .json, .csv, .parquet or .txt file (or .gz, .zst), a directory of them"


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        name: as the user is shown it.
        read: gives the rows, with their places, from the first on.
        fingerprint: a text that is another one for other rows; None if there is no telling.
        num_bytes: of its files, as far as known.
        is_file: it is one file, without splits.
    """

    name: str
    read: Callable[[], Rows]
    fingerprint: Callable[[], str | None]
    num_bytes: int = 0
    is_file: bool = False


@dataclass(frozen=True)
class Wanted:
    """What some sources must know besides their name.

    Args:
        num_samples: rows to use of alpaca_sample and orca_math; all else is used whole.
        seed: seed of the shuffle of sql and orca_math.
        split: split of hub sets and own functions, whatever their name says; None for that one,
            or the usual one.
        load_tokenizer: gives the transformers tokenizer for a function of the user's own.
    """

    num_samples: int = 0
    seed: int = 0
    split: str | None = None
    load_tokenizer: Callable[[], Any] = lambda: None


def find(dataset: str, wanted: Wanted) -> list[Source]:
    """Find what --dataset names.

    Args:
        dataset: path of a file or directory, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, a name in
            `HUB_SETS`, `file.py[:function]`, or several of them with commas between.
        wanted: what some sources must know besides.

    Returns:
        At least one source, in the order given; the files of a directory by name.

    Raises:
        UserError: no such data set; the hub cannot be reached (code 3).
    """
    is_one = "," not in dataset or os.path.lexists(dataset)
    names = [dataset] if is_one else [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        _refuse_name(dataset)
    return [source for name in names for source in _find_one(name, wanted)]


def read(dataset: str, wanted: Wanted) -> Rows:
    """Read all rows of a data set, one at a time.

    Args:
        dataset: as for `find`.
        wanted: as for `find`.

    Yields:
        Place and row; a `rows.Bad` where a row cannot be read.

    Raises:
        UserError: no such data set, or one that cannot be read.
    """
    for source in find(dataset, wanted):
        yield from source.read()


def _find_one(name: str, wanted: Wanted) -> list[Source]:
    if name in HUB_SETS:
        entry = HUB_SETS[name]
        return [_hub_source(replace(entry, split=wanted.split or entry.split), name, wanted)]
    if match := OWN_CODE.fullmatch(name):
        return [_own_source(Path(match[1]), match[2] or OWN_FUNCTION, wanted)]
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        _refuse_name(name)
    if os.path.isdir(path):
        return _directory(path)
    if os.path.lexists(path) or readers.can_read(path):
        return [_file(path)]
    match = HUB_NAME.fullmatch(name)
    if match is None or name.startswith("."):
        _refuse_name(name)
    entry = HubSet(match[1], wanted.split or match[3] or "train", match[2] or None)
    return [_hub_source(entry, name, wanted)]


def _refuse_name(dataset: str) -> NoReturn:
    names = [*HUB_SETS, DUMMY]
    close = difflib.get_close_matches(dataset, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"or ORG/NAME of the hub, {' '.join(names)}"
    raise UserError(f"dataset {dataset}", f"want {FORMATS}", remedy)


def _directory(path: Path) -> list[Source]:
    try:
        names = list(itertools.islice(path.rglob("*"), MOST_NAMES))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror})"
        raise UserError(f"dataset {path}", reason, "check its permissions", ENVIRONMENT) from error
    if len(names) == MOST_NAMES:
        rule, remedy = f"holds {MOST_NAMES:,} names or more", "give the directory of the rows"
        raise UserError(f"dataset {path}", rule, remedy)
    inside = (p for p in sorted(names) if not _is_hidden(p.relative_to(path)))
    files = [file for file in inside if readers.can_read(file) and file.is_file()]
    if not files:
        raise UserError(f"dataset {path}", "holds no file that can be read", f"want {FORMATS}")
    return [_file(file) for file in files]


def _is_hidden(path: Path) -> bool:
    """Also what the datasets library leaves beside the rows it saves."""
    leftovers = ("dataset_info.json", "state.json", "dataset_dict.json")
    is_leftover = path.name in leftovers or path.name.startswith("cache-")
    return is_leftover or any(part.startswith(".") for part in path.parts)


def _file(path: Path) -> Source:
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"dataset {path}", what, f"give {FORMATS}")
    if not readers.can_read(path):
        raise UserError(f"dataset {path}", "its name tells no format we read", f"want {FORMATS}")
    return Source(
        str(path),
        functools.partial(readers.read, path),
        functools.partial(_file_fingerprint, path),
        os.stat(path).st_size,
        is_file=True,
    )


def _file_fingerprint(path: Path) -> str | None:
    status = os.stat(path)
    if status.st_size > MOST_HASHED_BYTES:
        return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # reading it will say so
        return None
    return f"{path.name} {digest}"


def _hub_source(entry: HubSet, name: str, wanted: Wanted) -> Source:
    table = hub.load(entry, name)
    rest = (table, entry, wanted.num_samples, wanted.seed)
    return Source(
        str(entry),
        functools.partial(hub.read, *rest),
        functools.partial(hub.fingerprint, *rest),
        table.data.nbytes,
    )


def _own_source(path: Path, function: str, wanted: Wanted) -> Source:
    """The user's own local file is run; nothing fetched ever is."""
    if not path.is_file():
        raise UserError(f"dataset {path}", "does not exist", "give FILE.py:FUNCTION")
    read = functools.partial(_read_own, path, function, wanted)
    return Source(f"{path}:{function}", read, lambda: None)


def _read_own(path: Path, name: str, wanted: Wanted) -> Rows:
    """Source: llama-recipes' custom data sets, `get_custom_dataset(config, tokenizer, split)`."""
    function = _own_function(path, name)
    settings = SimpleNamespace(
        dataset="custom_dataset", file=str(path), train_split="train", test_split="validation"
    )
    try:
        table = function(settings, wanted.load_tokenizer(), wanted.split or settings.train_split)
        for number, row in enumerate(table, 1):
            yield Place(f"{path}:{name}", -number), _plain(row)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise _own_fault(path, name, error) from error


def _own_function(path: Path, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise _own_fault(path, name, error) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}:{name}", "is no function there", f"define {name} in {path}")
    return function


def _own_fault(path: Path, name: str, error: Exception) -> UserError:
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    what = f"{type(error).__name__}: {error}"[:160]
    return UserError(f"{path}:{line or name}", what, f"correct it; {name} must return rows")


def _plain(row: Any) -> Any:
    """A row with lists in place of tensors and arrays."""
    if not isinstance(row, dict):
        return row
    return {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()
    }
