"""Run cases one after the other in one process that never imports torch, and say what came out.

    python -m tests.bad_input.run DIRECTORY GROUP ...

A process of its own, because a hook of `sys.addaudithook` cannot be taken off again: while a case
runs it takes down what is written, and refuses to start programs or to leave this machine.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fsdp_qlora import run as train_run
from tests import fake_nvml
from tests.bad_input.case import Case, Place, write_place

LIMIT_S = 60
# transformers itself brings no torch: chat templates are rendered in its environment
HEAVY = ("torch", "peft", "bitsandbytes")
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
HARMLESS = ("/dev/", "/proc/self/")


class Watch:
    """What the program does to the world while a case runs."""

    def __init__(self, *inside: Path) -> None:
        self.is_on, self.inside = False, tuple(map(str, inside))
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        """See an audit event; refuse what no bad input may lead to."""
        if not self.is_on:
            return
        if event in STARTS:
            self._refuse(f"{event} {args[0]}")
        if event == "socket.connect" and not _is_loopback(args[1]):
            self._refuse(f"{event} {args[1]}")
        if event == "pickle.find_class":
            self._refuse(f"{event} {args}")
        if event not in CHANGES and not (event == "open" and _writes(args)):
            return
        is_below = event in ("os.remove", "os.rmdir") and args[1] != -1
        is_seen = is_below or isinstance(args[0], int)  # by the number of what was opened by name
        if not is_seen and not str(args[0]).startswith(HARMLESS + self.inside):
            self.seen.append(f"{event} {args[0]}")

    def _refuse(self, what: str) -> None:
        self.seen.append(what)
        raise PermissionError(f"a bad input led to {what}")


def _writes(args: tuple) -> bool:
    flags = args[2] if isinstance(args[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _is_loopback(address: Any) -> bool:
    return isinstance(address, str) or str(address[0]) in ("127.0.0.1", "::1", "localhost")


def tree_hash(root: Path) -> str:
    """Names, kinds and contents of all that lies in a directory."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        digest.update(f"{path.relative_to(root)!r} {path.lstat().st_mode}".encode(errors="replace"))
        digest.update(path.read_bytes() if is_plain else b"")
    return digest.hexdigest()


@contextlib.contextmanager
def setting(case: Case, root: Path) -> Iterator[None]:
    """The environment of a case, and modules that are not there."""
    before, modules = dict(os.environ), {name: sys.modules.get(name) for name in case.absent}
    os.environ.update({key: text.replace("{root}", str(root)) for key, text in case.env.items()})
    sys.modules.update(dict.fromkeys(case.absent))  # None: cannot be imported
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for name, module in modules.items():
            sys.modules.pop(name)
            sys.modules.update({name: module} if module else {})


def run(case: Case, place: Place, watch: Watch) -> dict[str, Any]:
    """Run one case; the good place is its own copy."""
    if case.make:
        case.make(place)
    argv = place.flags() + [flag.replace("{root}", str(place.root)) for flag in case.flags]
    before, out, err = tree_hash(place.root), io.StringIO(), io.StringIO()
    trace, code, watch.seen = "", None, []
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # it ends this process: a library may hang
    began_s = time.perf_counter()
    with setting(case, place.root), redirect_stdout(out), redirect_stderr(err):
        watch.is_on = True
        try:
            code = train_run.main(argv)
        except BaseException:
            trace = traceback.format_exc()
        finally:
            watch.is_on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "code": code,
        "err": err.getvalue(),
        "out": out.getvalue(),
        "seconds": time.perf_counter() - began_s,
        "trace": trace,
        "did": watch.seen,
        "is_tree_same": tree_hash(place.root) == before,
        "heavy": sorted(set(HEAVY) & set(sys.modules)),
    }


def main(directory: Path, groups: list[str]) -> None:
    """Run all cases of some groups and print a line of JSON each."""
    temporary = directory / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    sys.modules["pynvml"] = fake_nvml
    watch = Watch(directory / "case", temporary)
    sys.addaudithook(watch)
    good = write_place(directory / "good")
    os.environ["FSDP_QLORA_CACHE"] = str(directory / "case" / "cache")
    os.chdir(good.root)
    for group in groups:
        for case in importlib.import_module(f"tests.bad_input.{group}").CASES:
            root = directory / "case"
            shutil.copytree(good.root, root)
            found = run(case, Place(root), watch)
            shutil.rmtree(root)
            print(json.dumps({"group": group, "name": case.name} | found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
