"""Traces of torch.profiler on the steps asked for (memory_probe.profile), on a CPU."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.training import memory_probe

CPU = torch.device("cpu")


def profiled(out: Path, num_steps: int, *flags: str) -> list[str]:
    """Take steps of three products each under the profiler; what it says."""
    said: list[str] = []
    cfg = config.parse([f"--output_dir={out}", *flags])
    matrix = torch.ones(64, 64)
    with memory_probe.profile(cfg, 1, CPU, said.append) as after_step:
        for step in range(1, num_steps + 1):
            with torch.profiler.record_function(f"our step {step}"):
                (matrix @ matrix @ matrix).sum()
            after_step()
    return said


def trace_of(place: Path) -> list[dict]:
    with gzip.open(place / "rank1_trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_holds_three_steps_their_shapes_and_allocations(tmp_path):
    """Two steps are left out, then as many as --profile says; one trace, however long the run."""
    said = profiled(tmp_path, 14, "--profile=2")
    (place,) = (tmp_path / "profiles").iterdir()
    assert said == [f"profile   steps up to 7, for ui.perfetto.dev: {place}"]
    assert sorted(path.name for path in place.iterdir()) == [
        *("rank1_operations.txt", "rank1_trace.json.gz")
    ]
    events = trace_of(place)
    names = {str(event.get("name")) for event in events}
    assert {n for n in names if n.startswith("our step")} == {f"our step {n}" for n in (5, 6, 7)}
    shapes = {str(e["args"]["Input Dims"]) for e in events if e.get("name") == "aten::mm"}
    assert shapes == {"[[64, 64], [64, 64]]"} and "[memory]" in names
    assert "aten::mm" in (place / "rank1_operations.txt").read_text()


def test_without_profile_nothing_is_written_and_a_snapshot_needs_a_card(tmp_path):
    """One line says so."""
    assert profiled(tmp_path, 3) == [] and list(tmp_path.iterdir()) == []
    (note,) = profiled(tmp_path, 1, "--profile_memory")
    assert note.startswith("note      --profile_memory needs a GPU")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_the_memory_snapshot_of_a_card_can_be_read(tmp_path):
    """Of the first three steps; it names who allocated."""
    import pickle

    device = torch.device("cuda", 0)
    cfg = config.parse([f"--output_dir={tmp_path}", "--profile_memory"])
    with memory_probe.profile(cfg, 0, device, lambda line: None) as after_step:
        for _ in range(5):
            held = torch.ones(2**20, device=device)
            after_step()
        del held
    found = pickle.loads((tmp_path / "profiles" / "rank0_memory.pickle").read_bytes())
    sizes = [e["size"] for e in found["device_traces"][0] if e["action"] == "alloc"]
    assert sizes.count(2**22) == memory_probe.SNAPSHOT_STEPS
