"""Files and directories that are there whole or not at all: the one writer of the program.

Everything is written under a hidden name beside its own, brought to the disk, and renamed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fsdp_qlora.errors import ENVIRONMENT, SIGTERM, UserError

GIB, SPARE = 2**30, 1.01  # of the disk: what lies beside the weights
# No room for a file -> what to do.
IS_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room")
IS_FULL |= {errno.EFBIG: "raise the limit of a file's size (ulimit -f)"}
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}  # file systems whose directories take no fsync
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}  # file systems without locks


def cache_dir(setting: str = "auto") -> Path:
    """Return the directory of what can be made again.

    Args:
        setting: a directory, or "auto" for $FSDP_QLORA_CACHE or ~/.cache/fsdp_qlora.
    """
    if setting == "auto":
        setting = os.environ.get("FSDP_QLORA_CACHE") or "~/.cache/fsdp_qlora"
    if (path := os.path.expanduser(setting)).startswith("~"):  # of a user that no list knows
        remedy = "export HOME=DIR, or FSDP_QLORA_CACHE=DIR"
        raise UserError(setting, "there is no home directory", remedy, ENVIRONMENT)
    return Path(path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk.

    Args:
        path: of what is there.

    Raises:
        OSError: the disk does not take it.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file under a hidden name; a file of its own name stays until it is whole.

    Args:
        path: its own name; its directory exists.

    Yields:
        The path to write to, an empty file with the mode that others have.

    Raises:
        OSError: the disk does not take it; nothing of it is left.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        draft.write_bytes(b"")
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def check_file(path: Path) -> None:
    """See that `write` can write a file, before any work is done; its directory is made if needed.

    Args:
        path: its name.

    Raises:
        OSError: it is a directory, or its directory takes no new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path if path.is_dir() else path.with_name(f".{path.name}.part")
    draft.open("a").close()
    draft.unlink(missing_ok=True)  # by another rank


def write(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all.

    Args:
        path: its name; its directory exists.
        content: text is written as UTF-8.

    Returns:
        The path.

    Raises:
        OSError: the disk does not take it; what was there is left as it was.
    """
    with new_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, values: Any) -> Path:
    """Write JSON, for people too, whole or not at all.

    Args:
        path: see `write`.
        values: what JSON can hold; NaN and infinity are refused.

    Returns:
        The path.

    Raises:
        OSError: see `write`.
        ValueError: a number is not finite.
    """
    return write(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> dict[str, Any] | None:
    """Read a JSON object.

    Args:
        text: such as a line of the record.

    Returns:
        The object, NaN and infinity as null; None for anything else, a torn line too.
    """
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text, parse_constant=lambda _: None), dict):
            return value
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one where none can be read."""
    with contextlib.suppress(OSError):
        return parse_json(path.read_bytes()) or {}
    return {}


def write_sealed(path: Path, table: dict[str, Any]) -> Path:
    """Write JSON with a checksum beside it; see `write`."""
    return write(path, json.dumps({"seal": _seal(table), "table": table}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read what `write_sealed` wrote; None where it is not there, or not as it was written."""
    content = read_json(path)
    table = content.get("table")
    return table if isinstance(table, dict) and content.get("seal") == _seal(table) else None


def _seal(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def try_lock(
    file: IO[bytes] | int, is_shared: bool = False, waits: bool = False, kind: str = "flock"
) -> bool:
    """Lock an open file until it is closed, or say that its file system has no locks.

    Args:
        file: open for writing, or for reading where the lock is shared.
        is_shared: with others that share it.
        waits: for those that hold it.
        kind: "lockf" locks for a process instead, until it closes the file anywhere.

    Returns:
        False: another process holds it.
    """
    try:
        how = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        getattr(fcntl, kind)(file, how if waits else how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        rule = f"its file system has no locks ({error.strerror}): let only one run use it at a time"
        number = file if isinstance(file, int) else file.fileno()
        print(f"warning   {os.readlink(f'/proc/self/fd/{number}')}: {rule}", file=sys.stderr)
    return True


def lock(entry: Path, is_shared: bool = False, waits: bool = False) -> IO[bytes] | None:
    """Hold an entry of a cache, by a hidden file beside it that tells its last use, too.

    Args:
        entry: its path; it need not be there.
        is_shared, waits: see `try_lock`.

    Returns:
        The open file, which holds it until it is closed; None: another process holds it.

    Raises:
        OSError: the file cannot be made.
    """
    path = entry.with_name(f".{entry.name}.lock")
    try:
        file: IO[bytes] = path.open("a+b")
    except OSError:
        if not is_shared:
            raise
        file = path.open("rb")  # in a cache that only others may write to
    if not try_lock(file, is_shared, waits):
        file.close()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return file


def remove(path: Path, entry: Path) -> bool:
    """Remove an entry of a cache, or a draft of it, unless a process holds the entry.

    Args:
        path: what is removed.
        entry: its own name.

    Returns:
        False: a process holds it.

    Raises:
        OSError: it cannot be removed.
    """
    held = lock(entry)
    if held is not None:
        with held:
            shutil.rmtree(path)
    return held is not None


def sweep(entry: Path) -> None:
    """Remove the drafts, `.tmp-PID-NAME`, that killed writers have left in a cache.

    Args:
        entry: an entry of the cache that the caller has locked.
    """
    for draft in entry.parent.glob(".tmp-*-*"):
        owner = entry.with_name(draft.name.split("-", 2)[2])
        with contextlib.suppress(OSError):
            shutil.rmtree(draft) if owner == entry else remove(draft, owner)


def commit(draft: Path, final: Path, replaces: bool = True) -> None:
    """Bring a directory to the disk, then give it its name.

    Args:
        draft: on the same file system, its files written and closed.
        final: its own name, locked by the caller.
        replaces: one that is there.

    Raises:
        OSError: the disk does not take it.
    """
    for path in (*draft.rglob("*"), draft):
        sync(path)
    if replaces:
        shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    sync(final.parent)


def check(out: Path, need_bytes: int) -> None:
    """Refuse a place that cannot take a new directory, before any work is done.

    Args:
        out: directory to be made.
        need_bytes: what it will hold.

    Raises:
        UserError: something lies there (code 2), or there is not enough room (code 3).
    """
    place = out.absolute()
    if place.is_dir() and not any(place.iterdir()):
        place = place.parent
    elif os.path.lexists(place):
        rule = "exists, and nothing is written over it"
        raise UserError(f"--out {out}", rule, "remove it, or give another --out")
    while not place.exists():
        place = place.parent
    free_gib, need_gib = shutil.disk_usage(place).free / GIB, need_bytes * SPARE / GIB
    if free_gib < need_gib:
        rule = f"needs {need_gib:,.2f} GiB, and {place} has {free_gib:,.2f} GiB free"
        raise UserError(f"--out {out}", rule, "make room, or give another --out", ENVIRONMENT)


@contextlib.contextmanager
def new_directory(out: Path, need_bytes: int) -> Iterator[Path]:
    """Make a directory under a hidden name beside its own; rename it when it is whole.

    What a killed process has left beside `out` is removed first: a lock, which ends with its
    process, marks what another one is writing. SIGTERM unwinds the program meanwhile, so
    that the draft is removed; the exit code says so.

    Args:
        out: its own name.
        need_bytes: what it will hold.

    Yields:
        The directory to write to.

    Raises:
        UserError: see `check`; the disk is full, read-only or damaged (code 3).
    """
    check(out, need_bytes)
    out, draft, lock = out.absolute(), None, None
    former = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{out.name}.draft-"
        _sweep(out.parent, prefix)
        draft = out.with_name(f"{prefix}{os.getpid()}")
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY)
        try_lock(lock)
        yield draft
        commit(draft, out, replaces=False)
    except OSError as error:
        reason = error.strerror or str(error)
        place = str(out if draft is None or error.errno in IS_FULL else error.filename or out)
        remedy = f"{IS_FULL.get(error.errno or 0, 'make room')}, or give another --out"
        if error.errno in IS_FULL:
            reason = f"{reason}; {need_bytes / GIB:,.2f} GiB are needed, nothing is left behind"
        raise UserError(place, reason, remedy, ENVIRONMENT) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if is_main:
            signal.signal(signal.SIGTERM, former)


def _sweep(directory: Path, prefix: str) -> None:
    """Remove the drafts whose process is gone."""
    for draft in [path for path in directory.iterdir() if path.name.startswith(prefix)]:
        lock = os.open(draft, os.O_RDONLY)
        try:
            if try_lock(lock):  # else somebody writes there
                shutil.rmtree(draft)
        finally:
            os.close(lock)
