"""Layers from files: every rank finds their bytes, never wrong ones, and none stay in memory."""

import ctypes
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from fsdp_qlora import atomic
from fsdp_qlora.data.batches import collate
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.hardware import GIB
from fsdp_qlora.model import disk, placement
from fsdp_qlora.training import evaluate
from tests import tiny
from tests.model.test_shard import FLAGS, micro_batches
from tests.model.test_visit import NUM_MICRO, trained_by
from tests.ranks import run_ranks

NUM_LAYERS, FILE = 7, "--offload_impl=file"


@pytest.mark.parametrize("is_direct", [True, False])
def test_ranks_that_share_a_ring_find_every_span_in_any_order(tmp_path, monkeypatch, is_direct):
    """Three ranks of different pace; spans of any length anywhere in their file, read in pieces."""
    monkeypatch.setattr(disk, "PIECE_BYTES", 2 * disk.PAGE)
    if not is_direct:
        monkeypatch.setattr(disk.Span, "_read_past_cache", lambda _: False)
    rng, path = np.random.default_rng(0), tmp_path / "file"
    sizes = [1, 4096, 20_000, 70_001, 8192, 33, 50_000, 12_345, 4095]
    content, starts = rng.bytes(sum(sizes) + 77), 77 + np.cumsum([0, *sizes])
    atomic.write(path, content)  # on the disk: what is not there yet, the page cache keeps
    num_slots, num_ranks = 3, 3
    memory = mmap.mmap(-1, disk.ring_bytes(max(sizes), num_slots, num_ranks))
    there_and_back = [*range(9), *reversed(range(9))]
    order = [*there_and_back, *there_and_back, *rng.integers(0, 9, 60).tolist()]

    def run(rank):
        spans = [disk.Span(path, *place) for place in zip(starts.tolist(), sizes, strict=False)]
        ring = disk.Ring(spans, memoryview(memory), num_slots, rank, num_ranks)
        pauses, wrong, before = np.random.default_rng(rank), [], -1
        for number in order:
            step = 1 if number > before else -1
            ring.want([n for n in range(number, number + 3 * step, step) if 0 <= n < 9])
            taken, before = ring.taken(number, ring.book(number)), number
            with taken as place:
                threading.Event().wait(pauses.random() / 500)
                want = content[starts[number] :][: sizes[number]]
                wrong += [number] * (memory[place.start : place.stop] != want)
        return wrong

    with ThreadPoolExecutor(num_ranks) as pool:
        assert list(pool.map(run, range(num_ranks))) == [[]] * num_ranks
    assert cached_pages([path])[0] <= 4


@pytest.mark.parametrize("num_slots", [2, 3])
def test_layers_in_memory_and_on_disk_share_slots_in_any_order(tmp_path, monkeypatch, num_slots):
    """Copies that nobody waits for any more come before those that take their slot."""
    path, size, num_layers = tmp_path / "file", 5000, 9
    path.write_bytes(b"".join(bytes([layer]) * size for layer in range(num_layers)))
    read, pauses = disk.Span.read, np.random.default_rng(1)

    def read_late(self, *args):
        threading.Event().wait(pauses.random() / 500)
        read(self, *args)

    monkeypatch.setattr(disk.Span, "read", read_late)
    streamer = placement.Streamer([size] * num_layers, num_slots, torch.device("cpu"))
    on_disk = [layer for layer in range(num_layers) if layer % 3 != 1]
    streamer.sources = [
        None if layer in on_disk else torch.full([size], layer, dtype=torch.uint8)
        for layer in range(num_layers)
    ]
    memory = torch.frombuffer(mmap.mmap(-1, disk.ring_bytes(size, 4, 1)), dtype=torch.uint8)
    spans = [disk.Span(path, layer * size, size) for layer in on_disk]
    streamer.open(disk.Ring(spans, memory.numpy().data, 4, 0, 1), memory, None)
    there_and_back = [*range(num_layers), *reversed(range(num_layers))]
    wild = np.random.default_rng(0).integers(0, num_layers, 150).tolist()
    for layer in [*there_and_back * 2, *wild]:
        assert (streamer.read(layer) == layer).all()
        threading.Event().wait(0.001)
        assert (streamer.read(layer) == layer).all()


def cached_pages(files: list[Path]) -> tuple[int, int]:
    """Pages of files in the page cache, as the kernel tells, and all."""
    libc, found, total = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in files:
        with path.open("rb") as file:
            own = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2)
        pages = (ctypes.c_ubyte * (-(-len(own) // mmap.PAGESIZE)))()
        start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(own)))
        assert libc.mincore(start, ctypes.c_size_t(len(own)), pages) == 0
        found, total = found + sum(page & 1 for page in pages), total + len(pages)
    return found, total


def compare(world, path, folder):
    """What differs from weight streaming, pages that stayed, bytes that an evaluation read."""
    cache = f"--quant_cache={folder / 'cache'}"
    base = (cache, f"--output_dir={folder / 'out'}")
    plain = trained_by(world, path, collate, 1, (*base, "--offload_impl=stream"))[:2]
    found = {"cache": trained_by(world, path, collate, 1, (*base, FILE))}
    world.barrier()
    files = sorted((folder / "cache").glob("model-*/layer-*"))
    pages = cached_pages(files)
    own = (*base, FILE, "--resident_layers=1", "--use_activation_cpu_offload=disk")
    found["by layer"] = trained_by(world, path, collate, NUM_MICRO, own)
    found["no cache"] = trained_by(world, path, collate, 1, (*base, FILE, "--quant_cache=off"))
    # Of the plan's 2 GiB others have 0.5; each rank holds 1, and may take 0.4 more; 3 % is free.
    placement.pss_gib = lambda: 1.0
    table = SimpleNamespace(peak_gib=2.0, gib=lambda phase, row: 0.25)
    placement.plans = SimpleNamespace(host=lambda *_: table)
    layer_gib = tiny.shape(path, world)[0].model.layouts[0].nbytes / GIB
    budget_gib = (max(1.5, world.size) + 0.4 * world.size + 3.5 * layer_gib) / 0.97
    own = (*base, FILE, f"--host_budget_gib={budget_gib:.9f}")
    names = tiny.shape(path, world, *FLAGS, *own)[0].placed.names
    assert names == ("disk", "disk", "streamed", "disk", "streamed", "disk", "streamed")
    found["partly"] = trained_by(world, path, collate, 1, own)
    model, _, _ = tiny.build(path, world, *FLAGS, cache, FILE)
    world.barrier()
    before = psutil.Process().io_counters().read_chars
    evaluate.measure(model, None, micro_batches(world.rank, world.size, 1), world)
    num_read = psutil.Process().io_counters().read_chars - before
    wrong = [name for name, own in found.items() if own[:2] != plain]
    return wrong, pages, num_read / sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_from_files_train_bit_for_bit_as_from_memory(tmp_path, size):
    """Losses, norms and adapters; each machine reads a layer once a pass, and no page stays."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    results = run_ranks(compare, size, path, tmp_path)
    for wrong, (num_cached, num_pages), _ in results:
        assert wrong == [] and num_cached < 0.01 * num_pages and num_pages > 100
    # Its first four layers were read when the last pass, the check after the load, had ended.
    assert 0.3 < sum(share for *_, share in results) < 1.1


def faults(world, path, folder):
    """What a run says when its files change, and whether damage before the start is repaired."""
    cache, texts = f"--quant_cache={folder / 'cache'}", []
    batches = micro_batches(0, 1, 1)

    def start():
        return tiny.build(path, world, *FLAGS, cache, FILE)[0]

    def fault(run):
        with pytest.raises(UserError) as caught:
            run()
        assert caught.value.code == INTEGRITY and "\n" not in str(caught.value)
        texts.append(str(caught.value))

    model = start()
    loss = evaluate.measure(model, None, batches, world)
    files = sorted((folder / "cache").glob("model-*/layer-*"))
    model, size = start(), files[0].stat().st_size
    for file in files:  # whoever has a file open reads on
        file.rename(file.with_suffix(".old"))
    is_same = [evaluate.measure(model, None, batches, world) == loss]
    is_same.append(evaluate.measure(start(), None, batches, world) == loss)  # they are made anew
    model, state = start(), disk.Span._stat
    os.truncate(files[2], size // 2)
    fault(lambda: evaluate.measure(model, None, batches, world))
    disk.Span._stat = lambda self: (size, 0)  # of a file system that tells no change
    model = start()
    os.truncate(files[2], size // 2)
    fault(lambda: evaluate.measure(model, None, batches, world))
    disk.Span._stat = state
    model = start()
    with files[6].open("r+b") as file:
        file.seek(size // 2)
        file.write(b"wrong")
    fault(lambda: evaluate.measure(model, None, batches, world))
    is_same.append(evaluate.measure(start(), None, batches, world) == loss)
    read = disk.Span._read

    def spoil(self, view, start):
        read(self, view, start)
        view[self.lead] ^= 1

    disk.Span._read = spoil  # a disk that gives other bytes the second time
    fault(start)
    return texts, is_same


def test_changed_files_are_one_line_and_never_wrong_bytes(tmp_path):
    """Truncated, overwritten, other bytes at the first read; files that are gone are read on."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    ((changed, short, wrong, first), is_same) = run_ranks(faults, 1, path, tmp_path)[0]
    assert "layer-00002" in changed and "has changed" in changed and "--resume" in changed
    assert "layer-00002" in short and "ends before" in short
    assert "layer-00006" in wrong and "layer 0 changed on rank 0" in first
    assert is_same == [True, True, True]
    with pytest.raises(UserError, match="No such file"):
        disk.Span(tmp_path / "gone", 0, 1)
