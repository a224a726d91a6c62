"""Device and host memory (train/memory.py)."""

import re
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fsdp_qlora import hardware
from fsdp_qlora.training import memory

CPU, NOTHING = torch.device("cpu"), memory.Peak()


def measured(device: torch.device = CPU, peak: memory.Peak = NOTHING) -> dict[str, float]:
    """Of this process, PSS too."""
    sampler = memory.HostSampler()
    sampler.sample()
    return memory.process_memory(device, peak, sampler)


def shared_gib() -> float:
    """PSS of pages of files: it falls when another process that has loaded them starts."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Pss_File: +(\d+) kB", text)[1]) / 2**20


def test_process_memory_sees_what_this_process_allocates():
    before, shared = measured(), [shared_gib()]
    ballast = bytearray(b"x" * (256 * 2**20))
    after, shared = measured(), [*shared, shared_gib()]
    assert set(after) == {*memory.PROCESS_FIELDS}
    grown_gib = {name: after[name] - before[name] for name in ("host_rss_gib", "host_pss_gib")}
    grown_gib["host_pss_gib"] -= shared[1] - shared[0]
    assert grown_gib == pytest.approx(dict.fromkeys(grown_gib, len(ballast) / memory.GIB), abs=0.03)
    info = psutil.Process().memory_full_info()
    assert after["host_rss_gib"] == pytest.approx(info.rss / memory.GIB, abs=0.03)
    own_gib = info.pss / memory.GIB - shared_gib()
    assert after["host_pss_gib"] - shared[1] == pytest.approx(own_gib, abs=0.03)
    host = hardware.machine_memory()
    used_gib = host["host_total_gib"] - host["host_available_gib"]
    assert host["host_used_gib"] == pytest.approx(used_gib)


def test_the_sampler_keeps_a_peak_that_is_gone_at_the_next_step(monkeypatch):
    """Of the whole machine, where others come and go too: here what is in use is given."""
    levels, is_over = iter([1.0, 3.5]), threading.Event()

    def used_gib(cgroup: hardware.Cgroup) -> float:
        level = next(levels, 2.0)
        if level == 2.0:
            is_over.set()
        return level

    monkeypatch.setattr(memory, "host_used_gib", used_gib)
    with memory.HostSampler(interval_s=0.01) as sampler:
        before_gib = sampler.pss_gib
        ballast = bytearray(b"x" * (512 * 2**20))
        assert is_over.wait(60)
    assert sampler.peak_used_gib == 3.5
    grown_gib = sampler.pss_gib - before_gib  # measured once more at the end
    assert grown_gib == pytest.approx(len(ballast) / memory.GIB, abs=0.2)


def test_phase_peaks_of_a_cpu_rank_are_its_own_pages_phase_by_phase():
    """What came and went between two marks is seen; what stays is seen in every later phase."""
    peaks = memory.PhasePeaks(CPU)
    base_gib = peaks.now().left_gib
    stays = np.ones(300 * 2**20, dtype=np.uint8)
    peaks.mark("forward")
    goes = np.ones(200 * 2**20, dtype=np.uint8)
    del goes
    peaks.mark("backward")
    peaks.mark("rest")
    assert peaks.marks == ["forward", "backward", "rest"]
    found = {phase: peak.allocated_gib - base_gib for phase, peak in peaks.take().items()}
    expected = {"forward": 300, "backward": 500, "rest": 300}
    assert stays.nbytes == 300 * 2**20
    assert found == pytest.approx({name: mib / 1024 for name, mib in expected.items()}, abs=0.03)
    assert peaks.take() == {} and peaks.marks == []
    peaks.mark("forward")
    peaks.mark("forward")
    assert list(peaks.take()) == ["forward"]  # the higher of two


@pytest.mark.gpu
def test_device_peaks_start_anew_at_every_reading():
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # from here on there is an allocator
    peaks = memory.PhasePeaks(device)
    ballast = torch.empty(2**30, dtype=torch.uint8, device=device)
    del ballast
    first, second = (measured(device, peaks.now()) for _ in range(2))
    assert first["device_peak_allocated_gib"] - first["device_allocated_gib"] >= 1.0
    assert second["device_peak_allocated_gib"] == second["device_allocated_gib"]
    assert first["device_used_gib"] >= first["device_reserved_gib"] > 0
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    grown = memory.pinned_gib(device) - second["host_pinned_gib"]
    assert grown == pytest.approx(pinned.numel() / memory.GIB)
