"""The live page of runs: a server on 127.0.0.1 that reads their directories and writes nothing.

    python -m fsdp_qlora watch output/a output/b

Finished runs and those still under way lie over each other; a run is followed over its end and a
resume. From another machine: ssh -L 8123:127.0.0.1:8123 HOST, then open the same address there.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fsdp_qlora import atomic, checkpoint_store, cli, record
from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, redact
from fsdp_qlora.report import charts, page

HOST, PORT, NAMES = "127.0.0.1", 8123, ("127.0.0.1", "localhost", "::1")  # others are of the web
CHUNK_BYTES = 4 * 2**20  # of a record that are read at a time
MARK_BYTES = 64  # of the last line: whether a record is still the one that was read
LOG_BYTES, LOG_LINES, MAX_WAITS = 4096, 20, 4
OWNER = re.compile(r"pid (\d+) on (\S+)")


class Follower:
    """Reads the record of a run as it grows.

    Attributes:
        name: of the directory.
        is_behind: more is there than was read.
    """

    def __init__(self, directory: Path) -> None:
        """Read nothing yet.

        Args:
            directory: of the run; it may be made later.
        """
        self.name, self.is_behind = directory.resolve().name, True
        self._dir, self._tape, self._lock = directory.resolve(), charts.Tape(), threading.Lock()
        self._offset, self._mark, self._file = 0, b"", (0, 0)

    def _inside(self, name: str) -> Path | None:
        """A file of the directory; None where it is none, or a link that leads out."""
        path = (self._dir / name).resolve()
        return path if path.is_relative_to(self._dir) and path.is_file() else None

    def answer(self, token: str) -> dict[str, Any]:
        """Read on, and tell what the page does not know yet.

        Args:
            token: of the answer before.
        """
        if not self.is_behind:
            self.read()
        with self._lock:
            state, waits = self._state()
            own = {"name": self.name, "state": state, "waits": waits, "log": self._log()}
            return own | self._tape.since(token)

    def read(self) -> None:
        """Read the next part of the record."""
        with self._lock, contextlib.suppress(OSError):
            self.is_behind = False
            self._read()

    def catch_up(self) -> None:
        """Read all that is there."""
        while self.is_behind:
            self.read()

    def _read(self) -> None:
        path = self._inside(checkpoint_store.METRICS)
        if path is None:
            return
        with path.open("rb") as file:
            stat, start = os.fstat(file.fileno()), self._offset - len(self._mark)
            known = os.pread(file.fileno(), len(self._mark), start)
            if (stat.st_dev, stat.st_ino) != self._file or known != self._mark:
                self._file, self._offset = (stat.st_dev, stat.st_ino), 0
                self._tape = charts.Tape(self._tape.version + 1)
            block = os.pread(file.fileno(), CHUNK_BYTES, self._offset)
        whole = block[: block.rfind(b"\n") + 1]
        for line in whole.splitlines():
            row = atomic.parse_json(line)
            if row and ("event" in row or all(row.get(n) not in (None, []) for n in record.NEEDED)):
                with contextlib.suppress(*page.NO_RECORD):
                    self._tape.add(row)  # a damaged line is left out
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:] if self._offset else b""
        self.is_behind = bool(whole) and len(block) == CHUNK_BYTES

    def _state(self) -> tuple[str, list[str]]:
        """How the run stands, and what its ranks do."""
        lock, summary = self._inside(checkpoint_store.LOCK), self._inside(checkpoint_store.SUMMARY)
        owner = OWNER.match(lock.read_text("utf-8", "replace")[:200]) if lock else None
        pid, host = owner.groups() if owner else ("", "")
        is_here = host == socket.gethostname()
        if is_here and Path("/proc", pid).exists():
            return "running", _waits(pid)
        if summary is not None:
            is_complete = atomic.read_json(summary).get("is_complete")
            return "finished" if is_complete else "stopped early", []
        if host and not is_here:
            return "running", [f"it runs on {host}"]
        return "ended without a summary" if host else "not under way", []

    def _log(self) -> list[str]:
        """The last lines of the ranks that have a log; of a run without one those of its start."""
        lines: list[str] = []
        logs = sorted((self._dir / checkpoint_store.LOGS).glob("rank*.log"))
        for path in (p for p in logs if self._inside(f"{checkpoint_store.LOGS}/{p.name}")):
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - LOG_BYTES, 0))
                text = file.read(LOG_BYTES).decode("utf-8", "replace")
            lines += [f"{path.stem}  {line}" for line in text.splitlines()[-LOG_LINES:]]
        known = self._tape.facts.get("lines")
        return [redact(str(line)) for line in [*(known if isinstance(known, list) else ()), *lines]]


def _waits(pid: str) -> list[str]:
    """What every rank does and since when, as the board says that their supervisor holds open."""
    for path in Path("/proc", pid, "fd").glob("*"):
        with contextlib.suppress(OSError):
            if not os.readlink(path).startswith("/memfd:heartbeat"):
                continue
            with path.open("rb") as board:
                size = os.fstat(board.fileno()).st_size // hooks.SLOT.size
                return _does([hooks.read(board.fileno(), rank) for rank in range(size)])
    return []


def _does(signs: list[hooks.Heartbeat]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for rank, sign in enumerate(signs):
        saves = "saves a checkpoint" if sign.point.startswith(("save", "prune")) else sign.point
        step = f"step {sign.step}: " if sign.step else ""
        ranks.setdefault(step + charts.TABLE["does"].get(sign.point, saves), []).append(rank)
    lines = []
    for words, those in ranks.items():
        silent_s = max(signs[rank].silent_s for rank in those)
        who = "all ranks" if len(those) == len(signs) else f"rank {', '.join(map(str, those))}"
        lines.append(f"{who}: {words}, for {silent_s:.0f} s")
    return lines[:MAX_WAITS]


class Server(ThreadingHTTPServer):
    """Serves one page and what is new on it, to this machine only."""

    daemon_threads = True

    def __init__(self, run_dirs: list[Path], port: int | None) -> None:
        """Listen.

        Args:
            run_dirs: of the runs.
            port: None: the usual one, or any where that is taken.

        Raises:
            UserError: the port is taken, or there is none of its number.
        """
        self.followers = [Follower(run_dir) for run_dir in run_dirs]
        for follower in self.followers:
            threading.Thread(target=follower.catch_up, daemon=True).start()
        if len({follower.name for follower in self.followers}) < len(run_dirs):
            for follower, run_dir in zip(self.followers, run_dirs, strict=True):
                follower.name = str(run_dir)
        try:
            super().__init__((HOST, PORT if port is None else port), _Handler)
        except (OSError, OverflowError) as error:
            if port is not None:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(f"--port {port}", reason, "give another", ENVIRONMENT) from error
            super().__init__((HOST, 0), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def begin(self) -> "Server":
        """Serve in a thread, until this process ends."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def page(self) -> str:
        """The page, before it has asked for anything."""
        empty = charts.Tape().since() | {"state": "reading", "waits": [], "log": [], "token": ""}
        runs = [empty | {"name": follower.name} for follower in self.followers]
        chapters = [page.Section(name, [], []) for name in ("Answers", "Memory", "Log")]
        return page.render("  ·  ".join(run["name"] for run in runs), chapters, runs, live=True)

    def news(self, query: str) -> str:
        """What is new since the answers of which `query` gives the tokens, as JSON."""
        tokens = parse_qs(query, keep_blank_values=True).get("at", []) + [""] * len(self.followers)
        runs = [f.answer(token) for f, token in zip(self.followers, tokens, strict=False)]
        is_behind = any(follower.is_behind for follower in self.followers)
        return json.dumps({"runs": runs, "isBehind": is_behind}, separators=(",", ":"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a reader go that has closed its page."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        hosts, url = self.headers.get_all("Host") or [], urlsplit(self.path)
        if len(hosts) != 1 or urlsplit(f"//{hosts[0]}").hostname not in NAMES:
            self._send(403, "text/plain", "only for this machine")
        elif url.path == "/":
            self._send(200, "text/html", self.server.page())
        elif url.path == "/data":
            self._send(200, "application/json", self.server.news(url.query))
        else:
            self._send(404, "text/plain", "not here")

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response_only(code)
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (charts.TABLE["headers"] | own).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def main(argv: list[str]) -> int:
    """Serve the live page of the runs named on the command line until Ctrl-C.

    Args:
        argv: output directories, --port.

    Returns:
        Exit code.
    """
    port = {"help": f"of {HOST} [{PORT}, or a free one]"}
    args = cli.arguments("watch", argv, __doc__, port=port)
    for path in args.runs:
        if not path.is_dir():
            raise UserError(str(path), "no such directory", "give the output directory of a run")
    server = Server(list({path.resolve(): path for path in args.runs}.values()), args.port)
    print(f"watch     {server.url} (Ctrl-C ends it; from elsewhere: --help)", flush=True)
    if sys.stdout.isatty() and {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}:
        webbrowser.open(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return DONE
