"""A headless Chromium, if there is one: pictures of a page, and whether it fits a screen.

It is spoken to by the DevTools protocol over two pipes, so nothing has to be installed for it.
Source: chromedevtools.github.io/devtools-protocol, --remote-debugging-pipe.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import ENVIRONMENT, UserError

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
    "microsoft-edge",
)
BUNDLED = (  # of playwright, and of a Mac
    ".cache/ms-playwright/chromium*/chrome-*/*chrome*",
    "Library/Caches/ms-playwright/chromium*/chrome-*/*.app/Contents/MacOS/Chromium",
)
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
LIMIT_S = 60.0
CLOSE_S = 5.0
MAX_PIXELS = 16_000  # of one side of a picture: a limit of Chromium


def find() -> str | None:
    """Look for a Chromium or Chrome.

    Returns:
        Its path, or None.
    """
    for name in NAMES:
        if path := shutil.which(name):
            return path
    bundled = [path for pattern in BUNDLED for path in sorted(Path.home().glob(pattern))]
    found = [path for path in [*bundled, MAC] if path.is_file() and os.access(path, os.X_OK)]
    return str(found[-1]) if found else None


@dataclass
class Page:
    """A page in a running browser.

    Attributes:
        process: the browser.
        session: of the DevTools protocol.
    """

    process: subprocess.Popen
    session: str = ""
    _count: int = field(default=0, repr=False)
    _unread: bytes = field(default=b"", repr=False)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something.

        Args:
            method: of the DevTools protocol.
            params: its parameters.

        Returns:
            Its result.

        Raises:
            UserError: the browser ended, or refused.
        """
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\0")
            self.process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                break
        if "error" in answer:
            raise _fault(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def wait(self, event: str) -> None:
        """Wait until the browser tells of an event.

        Args:
            event: of the DevTools protocol.

        Raises:
            UserError: the browser ended first.
        """
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        """The next message; each ends with a zero byte."""
        assert self.process.stdout is not None
        parts = [self._unread]
        while b"\0" not in parts[-1]:
            parts.append(os.read(self.process.stdout.fileno(), 1 << 20))
            if not parts[-1]:
                raise _fault("it ended early or took too long")
        message, _, self._unread = b"".join(parts).partition(b"\0")
        return json.loads(message)

    def size(self, width: int, is_dark: bool = False) -> tuple[int, int]:
        """Lay the page out on a screen.

        Args:
            width: of the screen in CSS pixels.
            is_dark: the screen asks for dark colours.

        Returns:
            Width and height that the page then takes; a greater width means it must be scrolled
            sideways.
        """
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        words = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        found = self.evaluate(words)
        return int(found[0]), int(found[1])

    def evaluate(self, words: str) -> Any:
        """The value of a JavaScript expression on the page.

        Args:
            words: the expression; its value is JSON.
        """
        result = self.call("Runtime.evaluate", expression=words, returnByValue=True)
        return result["result"].get("value")

    def shoot(self, width: int, is_dark: bool = False) -> bytes:
        """Take a picture of the whole page.

        Args:
            width: of the screen in CSS pixels.
            is_dark: the screen asks for dark colours.

        Returns:
            PNG, two dots to a CSS pixel where that is not too many.
        """
        _, height = self.size(width, is_dark)
        scale = min(2.0, MAX_PIXELS / height)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])


@contextlib.contextmanager
def opened(browser: str, path: Path) -> Iterator[Page]:
    """Open a file in a browser of its own, which ends with the block.

    Args:
        browser: from `find`.
        path: an HTML file.

    Yields:
        The page, loaded.

    Raises:
        UserError: the browser does not start, ends early or takes longer than a minute.
    """
    with tempfile.TemporaryDirectory(prefix="report-", ignore_cleanup_errors=True) as profile:
        # 3 and 4 are the numbers that Chromium reads from and writes to.
        words = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", browser]
        options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-dev-shm-usage"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # as root it does not start else
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*words, *options, "about:blank"], stdin=pipe, stdout=pipe, start_new_session=True
        )
        watch = threading.Timer(LIMIT_S, _kill, [process])
        watch.start()
        page = Page(process)
        try:
            yield _load(page, path)
        finally:
            _close(page)
            watch.cancel()


def _close(page: Page) -> None:
    """End the browser; asked politely, it ends its helpers and lets go of its directory first."""
    page.session = ""
    with contextlib.suppress(UserError, subprocess.TimeoutExpired):
        page.call("Browser.close")
        page.process.wait(CLOSE_S)
    _kill(page.process)
    page.process.wait()


def _kill(process: subprocess.Popen) -> None:
    """End what is left of the browser and its helpers: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _load(page: Page, path: Path) -> Page:
    target = page.call("Target.createTarget", url="about:blank")["targetId"]
    page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    page.call("Page.enable")
    page.call("Page.navigate", url=path.resolve().as_uri())
    page.wait("Page.loadEventFired")
    return page


def _fault(what: str) -> UserError:
    return UserError("headless Chromium", what, "open report.html yourself", code=ENVIRONMENT)
