"""Streaming: which copies are made, and that the shared copy ends with its ranks."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

from fsdp_qlora import atomic
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import placement
from fsdp_qlora.model.placement import Streamer
from tests import tiny, tiny_models, warm
from tests.ranks import run_ranks

NUM_LAYERS = 7


def _streamer(num_slots):
    device = torch.device(tiny.DEVICE, 0) if tiny.DEVICE == "cuda" else torch.device("cpu")
    streamer = Streamer([64] * NUM_LAYERS, num_slots, device)
    sources = torch.arange(NUM_LAYERS, dtype=torch.uint8).repeat_interleave(64).view(-1, 64)
    streamer.sources = list(sources.pin_memory() if tiny.DEVICE == "cuda" else sources)
    return streamer


@pytest.mark.parametrize("num_slots", [2, 3, 5, 7, 9])
def test_every_read_finds_its_layer_however_the_pass_travels(num_slots):
    """Forward and backward, evaluation, a token at a time, and no order at all."""
    streamer = _streamer(num_slots)
    generator = torch.Generator().manual_seed(0)
    there_and_back = [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))]
    wild = torch.randint(0, NUM_LAYERS, (200,), generator=generator).tolist()
    for layer in [*there_and_back * 3, *range(NUM_LAYERS), *range(NUM_LAYERS), *wild]:
        assert (streamer.read(layer) == layer).all()


@pytest.mark.parametrize("num_slots", [2, 3])
def test_a_step_copies_each_layer_twice_less_what_lies_in_the_slots_at_the_turns(num_slots):
    streamer = _streamer(num_slots)
    there_and_back = [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))]
    for layer in there_and_back:
        streamer.read(layer)
    with patch.object(placement, "copy", wraps=placement.copy) as copies:
        for layer in there_and_back:
            streamer.read(layer)
    assert copies.call_count == 2 * (NUM_LAYERS - num_slots)


def test_the_next_layer_is_under_way_before_it_is_asked_for():
    streamer = _streamer(2)
    num_stalls = 0
    for layer in [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))]:
        num_stalls += layer not in streamer._held
        streamer.read(layer)
    assert num_stalls == 1  # the very first


def _choices(world, path, out):
    """(names, note) of three settings, and how a disk without room is refused."""
    found = []
    for flags in ((), ("--offload_impl=fsdp",), ("--host_budget_gib=0.00001",)):
        placed = tiny.shape(path, world, *flags, f"--output_dir={out}")[0].placed
        found.append((placed.names, placed.note, placed.memory is not None))
    with pytest.raises(UserError) as caught:
        tiny.shape(path, world, "--offload_impl=file", "--output_dir=/proc/none")
    return *found, (caught.value.code, str(caught.value))


def test_the_placement_and_its_reason_are_shown_before_the_load(tmp_path):
    """Also that there is no room on the host, or on the disk."""
    path = tiny.save_model(tmp_path / "model")
    out = tmp_path / "out"
    for found in run_ranks(_choices, 2, path, out):
        (names, note, has_memory), (others, why, _), (on_disk, where, _), (code, text) = found
        assert set(names) == {"streamed"} and has_memory
        assert note.startswith("3 layers streamed from the host (one copy for all ranks, ")
        assert set(others) == {"offloaded"} and why.endswith("(as asked)")
        assert set(on_disk) == {"disk"} and where.startswith("3 layers streamed from disk (0.00 G")
        assert f"in {out}; " in where and not [*out.iterdir()]  # the file has no name
        assert code == 3 and "/proc/none: No such file" in text and "--output_dir" in text


def _losses(world, path, cases):
    """Losses of one epoch, 3 steps of 2 micro-batches, and the held-out loss, bit for bit."""
    from fsdp_qlora.training import evaluate, loop, optim
    from tests.model.test_shard import CLIPPED, FLAGS, micro_batches

    results = []
    for flags in cases:
        model, _, cfg = tiny.build(path, world, *FLAGS, *CLIPPED, *flags)
        trained = optim.prepare(model, cfg, 3, world)
        batches = micro_batches(world.rank, world.size, 6)
        losses = [loop.train_step(trained, batches[2 * i : 2 * i + 2])["loss"] for i in range(3)]
        held_out = evaluate.measure(model, None, batches, world)["loss"]
        if world.rank == 0 and "--host_budget_gib=0.00001" in flags:  # no `cache clear` meanwhile
            assert atomic.lock(next(Path(flags[0].partition("=")[2]).glob("model-*"))) is None
        results.append([loss.item().hex() for loss in losses] + [held_out.hex()])
    return results


def test_an_epoch_has_the_same_losses_bit_for_bit_wherever_the_bytes_lie(tmp_path):
    """Also in the files of the cache, when the host has no room for a copy."""
    from tests.model.test_shard import CHECKPOINTING, PLACES

    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5)
    cache = f"--quant_cache={tmp_path / 'cache'}"
    places = [*PLACES.values(), (cache,), (cache, "--host_budget_gib=0.00001")]
    levels = [CHECKPOINTING[name] for name in ("non_reentrant", "levels")]
    cases = [(*place, *level) for level in levels for place in places]
    for results in run_ranks(_losses, 2, path, cases):
        for level in range(2):
            by_place = results[level * len(places) : (level + 1) * len(places)]
            assert by_place == [by_place[0]] * len(places)
            assert len(set(by_place[0])) == 4


@pytest.mark.parametrize("name", ["glm4_moe", "gemma4_text", "qwen3_5_text", "gpt_oss"])
def test_layers_of_several_kinds_have_the_same_losses_wherever_their_bytes_lie(tmp_path, name):
    """Dense and expert layers, two head sizes and shared keys, linear attention, fused experts."""
    from tests.model.test_shard import PLACES

    tiny_models.save(tmp_path / "model", name)
    cache = f"--quant_cache={tmp_path / 'cache'}"
    places = [*PLACES.values(), (cache,), (cache, "--host_budget_gib=0.00001")]
    for by_place in run_ranks(_losses, 2, tmp_path / "model", places):
        assert by_place == [by_place[0]] * len(places)
        assert len(set(by_place[0])) == 4


def _mappings(name: str) -> set[int]:
    """Processes that map shared memory of this name."""
    pids = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if name in maps.read_text():
                pids.add(int(maps.parent.name))
        except OSError:  # it ended, or belongs to someone else
            continue
    return pids


def _copies(pids: set[int]) -> set[str]:
    """The shared copies that these processes map, each by its device and inode."""
    lines = [
        line.split()
        for pid in pids
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "memfd:fsdp_qlora" in line
    ]
    return {f"{fields[3]} {fields[4]} " for fields in lines}


def _named() -> set[str]:
    """Shared memory with a name; semaphores of other tests come and go."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def _left(before: set[str], within_s: float = 10.0) -> set[str]:
    """New names that stay although nobody maps them; those of other tests go with these."""
    limit_s, stay = time.monotonic() + within_s, _named() - before
    while stay and time.monotonic() < limit_s:
        time.sleep(0.2)
        stay = {name for name in stay & _named() if not _mappings(f"/dev/shm/{name}")}
    return stay


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_kill_9_of_all_ranks_leaves_no_shared_memory(tmp_path):
    path = tiny.save_model(tmp_path / "model")
    before = _named()
    flags = ["--offload_impl=stream", "--dataset=dummy", "--dataset_samples=4000", "--world_size=2"]
    flags += [f"--model_name={path}", f"--output_dir={tmp_path / 'out'}", "--context_length=64"]
    run = warm.start(["--precision=fp32", *flags], tmp_path)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert run.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.2)
    own = {child.pid for child in psutil.Process(run.process.pid).children(recursive=True)}
    own &= _mappings("memfd:fsdp_qlora")  # other tests stream too
    copies = _copies(own)
    assert len(own) == 2 and len(copies) == 1  # both ranks map the one copy
    for pid in own:
        os.kill(pid, signal.SIGKILL)
    run.wait(60)
    assert _mappings(copies.pop()) == set() and _left(before) == set()
