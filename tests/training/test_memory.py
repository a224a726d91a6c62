"""Device and host memory (train/memory.py)."""

import time

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


def test_process_memory_sees_what_this_process_allocates():
    before = measured()
    ballast = bytearray(b"x" * (256 * 2**20))
    after = measured()
    assert set(after) == {*memory.PROCESS_FIELDS}
    for name in ("host_rss_gib", "host_pss_gib"):
        assert after[name] - before[name] == pytest.approx(len(ballast) / memory.GIB, abs=0.02)
    assert after["host_rss_gib"] == pytest.approx(
        psutil.Process().memory_full_info().rss / memory.GIB, abs=0.02
    )
    assert after["host_pss_gib"] == pytest.approx(
        psutil.Process().memory_full_info().pss / memory.GIB, abs=0.02
    )
    host = hardware.machine_memory()
    used_gib = host["host_total_gib"] - host["host_available_gib"]
    assert host["host_used_gib"] == pytest.approx(used_gib)


def test_the_sampler_keeps_a_peak_that_is_gone_at_the_next_step():
    with memory.HostSampler(interval_s=0.01) as sampler:
        ballast = bytearray(b"x" * (512 * 2**20))
        used_gib = hardware.machine_memory()["host_used_gib"]
        time.sleep(0.2)
        del ballast
    assert sampler.peak_used_gib >= used_gib - 0.1
    assert sampler.pss_gib == pytest.approx(hardware.pss_gib(), rel=0.1)


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
