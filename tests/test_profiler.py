"""Traces of torch.profiler on the steps asked for (train/profiler.py), on a CPU."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.train import profiler

CPU = torch.device("cpu")


def profiled(out: Path, num_steps: int, *flags: str) -> list[str]:
    """Take steps of three products each under the profiler; what it says."""
    said: list[str] = []
    cfg = config.parse([f"--output_dir={out}", *flags])
    matrix = torch.ones(64, 64)
    with profiler.watched(cfg, 1, CPU, said.append) as after_step:
        for step in range(1, num_steps + 1):
            with torch.profiler.record_function(f"our step {step}"):
                (matrix @ matrix @ matrix).sum()
            after_step()
    return said


def trace_of(place: Path) -> list[dict]:
    with gzip.open(place / "rank1_trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_holds_the_active_steps_of_a_cycle(tmp_path):
    """wait 1, warmup 2, active 2, twice: steps 4, 5 and 9, 10."""
    flags = ["--profile", "--wait_steps=1", "--warmup_steps=2", "--active_steps=2", "--repeat=2"]
    said = profiled(tmp_path, 14, *flags)
    places = sorted((tmp_path / "profiles").iterdir(), key=lambda path: int(path.name[5:]))
    assert [place.name for place in places] == ["step-5", "step-10"]
    for place, last in zip(places, (5, 10), strict=True):
        names = {str(event.get("name")) for event in trace_of(place)}
        steps = {name for name in names if name.startswith("our step")}
        assert steps == {f"our step {last - 1}", f"our step {last}"} and "aten::mm" in names
        assert "aten::mm" in (place / "rank1_operations.txt").read_text()
        assert len(list(place.iterdir())) == 2
    assert said == [
        f"profile   steps up to {last}: {tmp_path / 'profiles'}/step-{last}" for last in (5, 10)
    ]


def test_without_repeat_a_trace_comes_every_profiling_frequency_steps(tmp_path):
    """As the reference has it: what is not warmup or trace is left out, whatever wait_steps is."""
    cycle = profiler.cycle(config.parse(["--profile", "--wait_steps=7"]))
    assert cycle == {"wait": 5, "warmup": 1, "active": 4, "repeat": 0}
    flags = ["--profile", "--profiling_frequency=4", "--active_steps=1", "--profiling_output=t/u"]
    profiled(tmp_path, 9, *flags)
    assert sorted(p.name for p in (tmp_path / "t" / "u").iterdir()) == ["step-4", "step-8"]


def test_shapes_stacks_and_allocations_are_recorded_when_asked_for(tmp_path):
    """The memory time line rises when a product is made; the trace itself may be left out."""
    plain = ["--profile", "--profiling_frequency=2", "--active_steps=1"]
    profiled(tmp_path / "a", 2, *plain, "--with_shapes", "--with_stack")
    events = trace_of(tmp_path / "a" / "profiles" / "step-2")
    (shapes,) = {str(e["args"]["Input Dims"]) for e in events if e.get("name") == "aten::mm"}
    assert shapes == "[[64, 64], [64, 64]]"
    assert any("test_profiler.py" in str(event.get("name")) for event in events)
    profiled(tmp_path / "b", 2, *plain, "--export_memory_timeline", "--export_trace=false")
    place = tmp_path / "b" / "profiles" / "step-2"
    assert not list(place.glob("*trace*"))
    table = json.loads((place / "rank1_memory.json").read_text())
    assert table["columns"] == ["time_us", "device", "allocated_bytes", "reserved_bytes"]
    times, allocated = ([row[i] for row in table["rows"]] for i in (0, 2))
    assert times == sorted(times)
    assert max(allocated) - min(allocated) >= 64 * 64 * 4


def test_without_profile_nothing_is_written_and_a_snapshot_needs_a_card(tmp_path):
    """One line says so."""
    assert profiled(tmp_path, 3) == [] and list(tmp_path.iterdir()) == []
    (note,) = profiled(tmp_path, 1, "--profile_memory")
    assert note.startswith("note      --profile_memory needs a card")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_the_memory_snapshot_of_a_card_can_be_read(tmp_path):
    """Of the first three steps; it names who allocated."""
    import pickle

    device = torch.device("cuda", 0)
    cfg = config.parse([f"--output_dir={tmp_path}", "--profile_memory"])
    with profiler.watched(cfg, 0, device, lambda line: None) as after_step:
        for _ in range(5):
            held = torch.ones(2**20, device=device)
            after_step()
        del held
    found = pickle.loads((tmp_path / "profiles" / "rank0_memory.pickle").read_bytes())
    sizes = [e["size"] for e in found["device_traces"][0] if e["action"] == "alloc"]
    assert sizes.count(2**22) == profiler.SNAPSHOT_STEPS
