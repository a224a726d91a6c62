"""Which share of the processors a run uses: cores kept busy, from one look to the next."""

import os
import time

import psutil

IDLE = ("idle", "iowait")  # guest time is a part of user time already
NOT_COUNTED = (*IDLE, "guest", "guest_nice")


class CpuUse:
    """Cores that this process, and all programs together, keep busy between two looks."""

    def __init__(self) -> None:
        """Look for the first time."""
        self._process = psutil.Process()
        self._last = self._read()

    def take(self) -> tuple[float, float]:
        """Cores busy since the last call: 2.5 means that on average two and a half computed.

        Returns:
            Of this process with all its threads, and of the machine.
        """
        last, self._last = self._last, self._read()
        wall_s, own_s, all_s = (new - old for new, old in zip(self._last, last, strict=True))
        wall_s = max(wall_s, 1e-9)
        return max(own_s, 0.0) / wall_s, max(all_s, 0.0) / wall_s

    def _read(self) -> tuple[float, float, float]:
        own, machine = self._process.cpu_times(), psutil.cpu_times()._asdict()
        busy_s = sum(seconds for name, seconds in machine.items() if name not in NOT_COUNTED)
        return time.monotonic(), own.user + own.system, busy_s


def num_cores() -> int:
    """Cores of the machine, hyperthreads counted."""
    return os.cpu_count() or 1
