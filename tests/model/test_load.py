"""A model gets its bytes: from 16-bit files, from the cache, at random, on any number of ranks."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora import arch, atomic
from fsdp_qlora.distributed.world import find_neighbors
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model import load, quantize, shard, weights
from fsdp_qlora.training import memory
from tests import tiny
from tests.faults import largest_file
from tests.ranks import run_ranks

NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGES = (("layer-00001.safetensors", -1000), ("layer-00001.safetensors", None))
DAMAGES += (("manifest.json", -7), ("manifest.json", None))
PLAIN = ("--use_cpu_offload=false", "--fit=off")


def test_a_fingerprint_is_made_in_little_memory():
    """Of 128 MiB; in larger pieces it took 0.6 GiB, more than all that a small host then held."""
    flat = torch.arange(2**25, dtype=torch.int32).view(torch.uint8)
    words = flat.view(torch.int32)[:3000].long()
    wanted = (words * (torch.arange(3000) * 0x1E3779B97F4A7C15 | 1)).sum().item() % 2**64
    assert load.fingerprint(flat[:12000]) == wanted
    memory.process_peak()
    before = memory.process_peak().left_gib
    load.fingerprint(flat)
    assert memory.process_peak().allocated_gib - before < 0.15


class CountedWeights(weights.Weights):
    """The files of a model; knows how many bytes of whole 16-bit tensors were alive at once."""

    def __init__(self, info) -> None:
        super().__init__(info)
        self.alive_bytes, self.peak_bytes, self.lock = 0, 0, threading.Lock()

    def _count(self, nbytes: int) -> None:
        with self.lock:
            self.alive_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def _read_rows(self, name, rows=None):
        if rows is not None:
            return super()._read_rows(name, rows)
        nbytes = self.info.tensors[name].nbytes
        self._count(nbytes)
        tensor = super()._read_rows(name)
        weakref.finalize(tensor, self._count, -nbytes)
        return tensor


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a copy: a storage that numpy has seen cannot be freed by FSDP."""
    return hashlib.sha256(tensor.detach().clone().view(torch.uint8).numpy()).hexdigest()


def whole(param: torch.Tensor) -> torch.Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def start(world, path, *flags):
    """Fill a model; return facts of it that a test process can compare."""
    built, info, cfg = tiny.shape(path, world, *flags)
    source = CountedWeights(info) if cfg.weights == "load" else weights.build(info, cfg)
    model, report = built.model, load.fill(built, source, cfg, world).loaded
    blocks = list(shard.blocks(model))
    local_bytes = [
        getattr(block.quantized, "_local_tensor", block.quantized).untyped_storage().nbytes()
        for block in blocks
        if block.quantized is not None
    ]
    packed = []
    for block in blocks:
        packed.append(digest(shard.gathered(block)))
        shard.release(block)
    others = {n: digest(whole(getattr(m, a))) for n, (m, a) in model.tensors.items()}
    lora = tiny.lora_dict(model, shard.whole_lora(model))
    return {
        "packed": packed,
        "others": others,
        "lora": {name: digest(pair) for name, pair in lora.items()},
        "source": report.source,
        "read_bytes": report.read_bytes,
        "bytes_of_files": source.read_bytes,
        "peak_bytes": getattr(source, "peak_bytes", 0),
        "local_bytes": local_bytes,
        "slice_bytes": -(-model.layouts[0].nbytes // 4 // world.size) * 4,
        "is_shared": model.head.weight is model.embedding.weight,
        "directory": built.cache.directory,
        "note": built.cache.note,
    }


def starts(world, cases):
    return [start(world, *case) for case in cases]


def bytes_of(facts: dict) -> dict:
    return {name: facts[name] for name in ("packed", "others", "lora")}


def fault_of(world, path, *flags):
    """(code, text) of the UserError that a start ends with."""
    with pytest.raises(UserError) as caught:
        start(world, path, *flags)
    return caught.value.code, str(caught.value)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def file_bytes(path: Path) -> tuple[int, int]:
    """Bytes of the linears in the layers, and of everything else."""
    tensors = load_file(path / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    linear_bytes = sum(sizes[name] for name in sizes if is_linear(name))
    return linear_bytes, sum(sizes.values()) - linear_bytes


def test_the_second_start_reads_the_cache_and_no_linear(tmp_path):
    """Equal bytes; each byte of a file is read once, by one rank; ranks keep only their slices."""
    path = tiny.save_model(tmp_path / "model")
    flags = (f"--quant_cache={tmp_path / 'cache'}", "--use_cpu_offload=false")
    first_and_second = run_ranks(starts, 2, [(path, *flags), (path, *flags)])
    first, second = zip(*first_and_second, strict=True)
    linear_bytes, other_bytes = file_bytes(path)
    assert {facts["source"] for facts in first} == {"files"}
    assert {facts["source"] for facts in second} == {"cache"}
    assert sum(facts["bytes_of_files"] for facts in first) == linear_bytes + other_bytes
    assert sum(facts["bytes_of_files"] for facts in second) == other_bytes
    packed_bytes = sum(facts["read_bytes"] for facts in second) - other_bytes
    assert packed_bytes == 3 * 2 * first[0]["slice_bytes"]
    assert len({json.dumps(bytes_of(facts)) for facts in (*first, *second)}) == 1
    for facts in (*first, *second):
        assert max(facts["local_bytes"]) <= facts["slice_bytes"]
    entry = first[0]["directory"]
    files = [f"layer-{index:05d}.safetensors" for index in range(3)]
    assert sorted(item.name for item in entry.iterdir()) == [*files, "manifest.json"]
    assert {item.name for item in (tmp_path / "cache").iterdir()} == {
        entry.name,
        lock_of(entry).name,
    }
    stored = [load_file(entry / name)["packed"] for name in files]
    assert [digest(tensor) for tensor in stored] == first[0]["packed"]


def lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


MACHINES = (0, 1, 0)  # of three ranks: uneven, and not numbered machine by machine


def on_machines(world, path, place):
    """Starts on two machines, each with a cache of its own, and whose host copy a rank sees."""
    machine = os.environ["GROUP_RANK"] = str(MACHINES[world.rank])
    world = find_neighbors(world)
    flags = f"--quant_cache={place / machine}", "--use_cpu_offload=false"
    found = [start(world, path, *flags), start(world, path, *flags)]
    world.barrier()
    if world.rank == 1:
        shutil.rmtree(place / machine)
    found += [start(world, path, *flags), start(world, path, "--offload_impl=stream")]
    memory = tiny.shape(path, world, "--offload_impl=stream")[0].placed.memory.bytes
    if world.local_rank == 0:
        memory.fill_(world.rank + 1)
    world.barrier()
    return found, (world.local_rank, world.local_size, int(memory[-1]))


def other_bytes_on_a_machine(world, path):
    """Machine 1 has another base: (code, text) of the error on this rank."""
    world = dataclasses.replace(world, local_rank=0, local_size=1)
    other = quantize.store_linear

    def flipped(flat, *rest):
        other(flat, *rest)
        flat[0] ^= 1

    with patch.object(quantize, "store_linear", flipped if world.rank else other):
        return fault_of(world, path, "--offload_impl=stream")


def test_every_machine_keeps_a_host_copy_and_a_cache_of_its_own(tmp_path):
    """The model is that of one rank; a machine without a cache reads files while others do not."""
    path = tiny.save_model(tmp_path / "model")
    one = run_ranks(starts, 1, [(path,)])[0][0]
    by_rank = run_ranks(on_machines, 3, path, tmp_path)
    for found, _ in by_rank:
        assert [bytes_of(facts) for facts in found] == [bytes_of(one)] * 4
    sources = [[facts["source"] for facts in found] for found, _ in by_rank]
    assert sources == [["files", "cache", "files" if m else "cache", "files"] for m in MACHINES]
    assert [place for _, place in by_rank] == [(0, 2, 1), (0, 1, 2), (1, 2, 1)]
    for code, text in run_ranks(other_bytes_on_a_machine, 2, path):
        assert code == INTEGRITY and "machines' quantized bytes differ" in text


def split_files(path: Path, directory: Path, num_files: int) -> Path:
    """Copy a model, its tensors dealt to several files with an index."""
    directory.mkdir()
    tensors, places = load_file(path / "model.safetensors"), {}
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::num_files]}
        save_file(part, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text((path / "config.json").read_text())
    return directory


def test_every_number_of_ranks_gives_the_same_model(tmp_path):
    """Three layers on one, two and three ranks; random weights, tied ends and several files too.

    What is not quantized has the bytes of the file.
    """
    path = tiny.save_model(tmp_path / "model", dtype=torch.bfloat16)
    tied = tiny.save_model(tmp_path / "tied", "qwen2", torch.bfloat16, tie_word_embeddings=True)
    cases = [
        (path, "--use_cpu_offload=false"),
        (path, "--offload_impl=fsdp"),
        (split_files(path, tmp_path / "split", 3),),
        (tied,),
        (path, "--weights=random", f"--quant_cache={tmp_path}"),
    ]
    by_world = {size: run_ranks(starts, size, cases) for size in (1, 2, 3)}
    layer_bytes = file_bytes(path)[0] // 3
    for number, case in enumerate(cases):
        models = [facts[number] for by_rank in by_world.values() for facts in by_rank]
        assert len({json.dumps(bytes_of(facts)) for facts in models}) == 1, case
        assert {facts["is_shared"] for facts in models} == {case[0] == tied}
        largest = max(facts["peak_bytes"] for facts in models)
        assert largest <= layer_bytes and (largest > 0) == ("--weights=random" not in case)
    on_card, on_host, split, _, random = by_world[2][0]
    assert bytes_of(on_card) == bytes_of(on_host) == bytes_of(split)
    tensors = load_file(path / "model.safetensors")
    want = {name: digest(tensors[name]) for name in tensors if not is_linear(name)}
    assert on_card["others"] == want
    assert random["source"] == "random" and random["read_bytes"] == 0 == bool(random["directory"])
    assert not set(random["packed"]) & set(on_card["packed"])
    for facts in (facts for by_rank in by_world.values() for facts in by_rank):
        slices, host = facts[0]["local_bytes"], facts[1]["local_bytes"]
        assert max(slices) <= facts[0]["slice_bytes"]
        assert set(host) == {facts[1]["slice_bytes"] * 3}  # one block for the slices of all layers


def damaged_starts(world, path, cache):
    """Start, then twice after each damage to a file of the cache; of others only read."""
    go = partial(start, world, path, f"--quant_cache={cache}", *PLAIN)
    found, draw, num_seen = [go()], random.Random(0), 0
    for name, size in DAMAGES:
        world.barrier()
        if world.rank == 0:
            file = found[0]["directory"] / name
            file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size] + b"0")
        world.barrier()
        found += [go(), go()]
    built, info, _ = tiny.shape(path, world)
    for number in range(80 if world.rank == 0 else 0):
        file = found[0]["directory"] / ("manifest.json", "layer-00000.safetensors")[number % 2]
        content = bytearray(whole := file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        now = weights.find_cache(str(cache), info, built.model.layouts)
        read = next(now.read_layers([0])) if now.is_complete else None
        num_seen += read is None
        assert read is None or digest(read) == found[0]["packed"][0]
        file.write_bytes(whole)
    return found, num_seen


def test_a_damaged_cache_is_made_again_and_named(tmp_path):
    """On the rank that meets it; all have the same bytes. No flipped bit is trained on."""
    path = tiny.save_model(tmp_path / "model")
    by_rank, num_seen = zip(*run_ranks(damaged_starts, 2, path, tmp_path / "cache"), strict=True)
    assert len({json.dumps(bytes_of(facts)) for found in by_rank for facts in found}) == 1
    for first, *others in by_rank:
        for (name, _), again, third in zip(DAMAGES, others[::2], others[1::2], strict=True):
            is_layer = name.startswith("layer")
            assert again["source"] == ("cache" if is_layer else "files")
            words = "made again: layers 1" if is_layer else "made again: manifest.json was damaged"
            assert words in again["note"]
            assert third["source"] == "cache" and third["note"] == first["note"]  # as new
    assert num_seen[0] > 70  # not in blanks of the header


def other_models(world, cache, one, other):
    """Whether each start reads the cache, and has the bytes that it has without one."""
    ref, found = arch.read(str(one), need_weights=True).tensors[NAME], []
    content, at = bytearray(ref.file.read_bytes()), ref.file.stat()
    # Nothing; in a sampled place, of a model beside it, then in place; between two places, thrice.
    for path, place in ((one, None), (other, 3), (one, 3), (one, 7427), (one, None), (one, None)):
        file, flag = path / ref.file.name, "full" if len(found) > 3 else "auto"
        content[ref.start + (place or 0)] ^= 0x80 * (place is not None and path is one)
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
        kept = start(world, path, f"--quant_cache={cache}", f"--verify_base={flag}", *PLAIN)
        found.append((kept["source"], kept["packed"] == start(world, path, *PLAIN)["packed"]))
    return found


def test_another_model_of_one_name_size_and_time_has_another_cache(tmp_path):
    """Beside it or in its place; between the sampled places only --verify_base full sees it."""
    one = tiny.save_model(tmp_path / "a" / "model")
    other = shutil.copytree(one, tmp_path / "b" / "model")
    (found,) = run_ranks(other_models, 1, tmp_path / "cache", one, other)
    sources = ("files", "files", "files", "cache", "files", "cache")
    assert found == [*zip(sources, (True, True, True, False, True, True), strict=True)]


def hold(cache, info, layouts, writer):
    """Write a layer of an entry, say so, and do not end."""
    begun = weights.find_cache(str(cache), info, layouts)
    weights._claim(begun, begun.directory, 0.0)
    begun.write_layer(0, torch.zeros(layouts[0].nbytes, dtype=torch.uint8))
    begun._failure()
    os.write(writer, b"x")
    time.sleep(100)


def no_room(draft, final):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def two_runs(world, path, cache):
    """Starts while another process writes the entry, and when it is killed; two on full disks."""
    built, info, _ = tiny.shape(path, world, *PLAIN)
    layouts, (reader, writer) = built.model.layouts, os.pipe()
    if not (child := os.fork()):
        hold(cache, info, layouts, writer)
    os.read(reader, 1)
    found = [start(world, path, f"--quant_cache={cache}", *PLAIN)]
    drafts = [len(list(cache.glob(".tmp-*/layer*")))]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found += starts(world, [(path, f"--quant_cache={cache}", *PLAIN)] * 2)
    with largest_file(layouts[0].nbytes // 2):
        found.append(start(world, path, f"--quant_cache={cache}-full", *PLAIN))
    commit, atomic.commit = atomic.commit, no_room
    found.append(start(world, path, f"--quant_cache={cache}-late", *PLAIN))
    atomic.commit = commit
    return found, [*drafts, len(list(cache.parent.glob("cache*/.tmp-*")))]


def test_one_run_writes_the_cache_and_a_full_disk_is_no_error(tmp_path):
    """The others train without it; what a killed one left is swept; so is what did not fit."""
    path = tiny.save_model(tmp_path / "model")
    ((found, num_drafts),) = run_ranks(two_runs, 1, path, tmp_path / "cache")
    assert len({json.dumps(bytes_of(facts)) for facts in found}) == 1 and num_drafts == [1, 0]
    sources, notes = zip(*((facts["source"], facts["note"]) for facts in found), strict=True)
    assert sources == ("files", "files", "cache", "files", "files")
    words = ("in use by another run", "", "", "File too large", "No space left")
    for note, word in zip(notes, words, strict=True):
        assert word in note and note.startswith("not written: ") == bool(word)
