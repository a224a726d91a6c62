"""Cores busy (train/usage.py): against what is really computed."""

import threading
import time

from fsdp_qlora.training.metrics import CpuUse, num_cores


def test_a_process_that_computes_is_busy_and_one_that_waits_is_not():
    use = CpuUse()
    waiting = threading.Event()
    began_s = time.process_time()
    waiting.wait(0.3)
    idle, _ = use.take()
    assert idle < 0.3
    began_s, wall_s = time.process_time(), time.monotonic()
    while time.process_time() - began_s < 0.4:
        sum(range(2000))
    wall_s = time.monotonic() - wall_s
    own, everyone = use.take()
    assert abs(own - 0.4 / wall_s) < 0.15 and own <= num_cores() + 0.1
    assert everyone > own / 2  # the machine's clock is coarse, and counts this process too
