"""train.py with its ranks, forked from a process that has imported everything once.

A run is a process as a user's: a supervisor of its own, ranks in sessions of their own, streams
in files. Only the 12 s of imports are saved.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fsdp_qlora import run as train_run
from fsdp_qlora.__main__ import console
from fsdp_qlora.distributed import launch
from tests import faults
from tests.ranks import PRELOAD

PR_SET_NAME = 15
TIMEOUT_S = 240


@dataclass
class Forked:
    """A child that was forked, as subprocess.Popen would give it."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def fork(task: launch.RankSpec) -> Forked:
    """Start one rank (see launch.start)."""
    tie = launch.tied_to_parent()
    sys.stdout.flush()  # or the child says again what is waiting there
    pid = os.fork()
    if pid == 0:
        os.setsid()
        tie()
        _become(task.command[len(launch.PROGRAM) :], task.env, task.log, task.log)
    while os.getpgid(pid) != pid:
        time.sleep(0.001)
    return Forked(pid)


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    out: Path | None,
    err: Path | None,
    main: Callable[..., int] | None = None,
    **more,
) -> NoReturn:
    """Be `python train.py argv`, or what calls `main`, and leave."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream, path in ((1, out), (2, err)):
            if path is not None:
                file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.dup2(file, stream)
        os.environ.clear()
        os.environ.update(env)
        faults.install()
        code = (main or train_run.main)(list(argv), **more)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _supervise(
    name: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    out: Path,
    err: Path,
    main: Callable[..., int] | None,
) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())  # whatever it starts inherits it
    os.setsid()
    _become(argv, env, out, err, main, start=fork)


@dataclass
class Run:
    """A run of train.py under way."""

    process: multiprocessing.process.BaseProcess
    out_file: Path
    err_file: Path
    name: str

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    def signal(self, number: int) -> None:
        """Signal the supervisor."""
        os.kill(self.process.pid or 0, number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Exit code of the command, negative for a signal."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still runs\n{self.out}\n{self.err}"
        return self.process.exitcode

    def left(self, within_s: float = 20.0) -> list[int]:
        """The processes that still live so long after the end."""
        limit_s = time.monotonic() + within_s
        while self.orphans() and time.monotonic() < limit_s:
            time.sleep(0.02)
        return self.orphans()

    def orphans(self) -> list[int]:
        """The living processes of this run: supervisor, ranks and all they have started."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                stat = (place / "stat").read_text()
                is_ours = f"({self.name})" in stat and ") Z " not in stat
                found += [int(place.name)] if is_ours else []
        return found


def command(argv: list[str], start: Callable[..., Any]) -> int:
    """Be `fsdp-qlora argv`, a `main` for `start`."""
    if argv[0] == "train":
        return train_run.main(argv[1:], start=start)
    sys.argv = ["fsdp-qlora", *argv]
    return console()


def make_model(directory: Path, **sizes: int) -> None:
    """Write a tiny Llama with a tokenizer (`model`) and 60 rows (`data.jsonl`)."""
    from tests import tiny

    rows = [
        {"instruction": f"What is {i}?", "input": "", "output": f"It is the number {i}."}
        for i in range(60)
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = tiny.save_model(directory / "model", **small | sizes | {"vocab_size": 384})
    from tests import small_tokenizers

    tiny.save_tokenizer(model, [text for row in rows for text in small_tokenizers.pair(row)])


def call(function: Callable[..., object], *args: object) -> None:
    """Call a function where everything is imported already."""
    process = _context().Process(target=function, args=args)
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == 0


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(
    argv: Sequence[str], scratch: Path, main: Callable[..., int] | None = None, **env: str
) -> Run:
    """Start `train.py argv` on two CPU ranks; its streams go to new files in `scratch`.

    `main(argv, start=...)` of a test module may be the supervisor instead.
    """
    number = len(list(scratch.glob("*.out")))
    out, err = scratch / f"{number}.out", scratch / f"{number}.err"
    out.touch()
    err.touch()
    whole, name = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""} | env, uuid.uuid4().hex[:12]
    process = _context().Process(target=_supervise, args=(name, argv, whole, out, err, main))
    process.start()
    return Run(process, out, err, name)
