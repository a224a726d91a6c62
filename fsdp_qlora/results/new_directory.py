"""A directory that is there whole or not at all: written under another name, then renamed."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.train.checkpoint_files import sync

GIB = 2**30
SPARE = 1.01  # of the disk: what lies beside the weights
IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check(out: Path, need_bytes: int) -> None:
    """Refuse a place that cannot take the result, before any work is done.

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

    What a killed run has left beside `out` is removed first: a lock, which ends with its process,
    tells it from what another run is writing.

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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        draft = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        lock = os.open(draft, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield draft
        _settle(draft)
        draft.rename(out)
        sync(out.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        place = str(out if draft is None or error.errno in IS_FULL else error.filename or out)
        remedy = "make room, or give another --out"
        if error.errno in IS_FULL:
            reason = f"{reason}; {need_bytes / GIB:,.2f} GiB are needed, nothing is left behind"
        raise UserError(place, reason, remedy, ENVIRONMENT) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.draft-"


def _sweep(out: Path) -> None:
    """Remove the drafts whose process is gone."""
    drafts = [path for path in out.parent.iterdir() if path.name.startswith(_prefix(out))]
    for draft in drafts:
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft)
        except BlockingIOError:
            continue  # somebody writes there
        finally:
            os.close(lock)


def _settle(draft: Path) -> None:
    """Bring everything to the disk; give the directory the mode that others have."""
    for path in draft.rglob("*"):
        sync(path)
    mask = os.umask(0)
    os.umask(mask)
    draft.chmod(0o777 & ~mask)
    sync(draft)
