"""The memory probe leaves no trace, and tells rows apart."""

import dataclasses
import hashlib
from unittest import mock

import numpy as np
import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.data.batches import Batches, PackedBatches, SamplerConfig
from fsdp_qlora.planning import rows as names
from fsdp_qlora.training import memory, memory_probe
from tests import tiny
from tests.data.test_batches import make_samples
from tests.ranks import run_ranks
from tests.training.test_memory_rows import plan_of, tracked

CPU = torch.device("cpu")
CASES = (
    ("--lora_dropout=0.1", "--use_cpu_offload=false", "--gradient_accumulation_steps=2"),
    ("--lora_dropout=0.1", "--selective_layers=1", "--uncheckpointed_layers=1"),
    ("--lora_dropout=0", "--reentrant_checkpointing=true", "--sharding_strategy=shard_grad_op"),
)


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def _train(world, path, cases, is_rehearsed):
    """Three steps under every case; everything that a step could depend on, bit for bit."""
    from fsdp_qlora.model.load import build
    from fsdp_qlora.training import loop, optim
    from fsdp_qlora.training.memory import MemoryTracker

    results = []
    for flags in cases:
        torch.manual_seed(7 + world.rank)
        plan = plan_of(path, *flags, "--lr=0.01")
        cfg, tracker = plan.cfg, MemoryTracker(plan, world.device)
        built = build(cfg, plan.info, world)
        trained = optim.prepare(built.model, cfg, 3, world)
        params, optimizer = trained.params, trained.optimizer
        num_micro = cfg.gradient_accumulation_steps
        batches = Batches(
            make_samples(60), SamplerConfig(2, num_micro, world.size, world.rank, 42, 1, 3)
        )
        if is_rehearsed:
            words = memory_probe.run(trained, batches, tracker)
            assert words == f"probe     {2 * batches.longest:,} tokens at once fit"
            assert tracker.taken["memory probe"].allocated_gib > 0
        found = [digest([torch.get_rng_state(), *params]), len(optimizer.state)]
        for step in range(3):
            done = loop.train_step(trained, batches.step(step))
            found += [done["loss"].item().hex(), done["grad_norm"].item().hex()]
        moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        found.append(digest([torch.get_rng_state(), *params, *moments]))
        results.append((found, trained.schedule.get_last_lr()))
    return results


def test_training_is_bitwise_the_same_with_and_without_a_memory_probe(tmp_path):
    """Losses, norms, adapters, moments, random numbers; dropout, levels, accumulation."""
    path = tiny.save_model(tmp_path / "model")
    with_it = run_ranks(_train, 2, path, CASES, True)
    without = run_ranks(_train, 2, path, CASES, False)
    assert with_it == without
    for found, _ in without[0]:
        assert found[0] != found[-1] and len(set(found[2:-1])) == 6  # something was learned


def _no_room(world, path):
    """The error of a probe that finds no room for the moments, and what it leaves."""
    tracker, trained = tracked(world, path, 3)
    batches = Batches(make_samples(9), SamplerConfig(2, 1, world.size, world.rank, 42, 1, 1))

    def refuse(tensor):
        raise torch.OutOfMemoryError(f"no room for {tensor.numel()}")

    try:
        with mock.patch.object(memory_probe, "room_like", refuse):
            memory_probe.run(trained, batches, tracker)
    except torch.OutOfMemoryError as error:
        return error.__notes__
    return []


def test_a_probe_that_does_not_fit_says_what_was_there(tmp_path):
    """Predicted, present, largest; the rest is the supervisor's."""
    (notes,) = run_ranks(_no_room, 1, tiny.save_model(tmp_path / "model"))
    assert notes[0] == "out of memory in the memory probe"
    assert [note.split()[0] for note in notes[1:]] == ["predicted", "there", "largest"]


def test_the_longest_batch_is_as_large_as_any_of_the_run():
    """Padded, laid flat, or packed to the context; every token but the first is trained."""
    samples, cfg = make_samples(40), config.parse(["--batch_size=3", "--context_length=64"])
    dealing = SamplerConfig(3, 2, 1, 0, 42, 1, -1)
    for batches in (
        Batches(samples, dealing),
        Batches(samples, dataclasses.replace(dealing, pad_multiple=64)),
        Batches(samples, dealing, is_flat=True),
        PackedBatches(samples, 64, dealing),
    ):
        found = memory_probe.longest_batch(batches, cfg, 256)
        micro = [batch for step in range(batches.num_steps) for batch in batches.step(step)]
        assert found.input_ids.numel() >= max(batch.input_ids.numel() for batch in micro)
        assert found.input_ids.dim() == micro[0].input_ids.dim()
        assert (len(found.row_lengths) > 0) == (len(micro[0].row_lengths) > 0)
        assert int(found.input_ids.max()) < 256
        num_rows = 3
        assert found.num_trained_tokens == found.num_tokens - num_rows
    assert (
        memory_probe.longest_batch(PackedBatches(samples, 64, dealing), cfg, 256).num_tokens == 192
    )


def test_a_probe_is_for_gpus_unless_asked_for():
    """On a CPU memory is not lost to an allocator that has to be proven."""
    for word, on_cpu, on_card in (("auto", 0, 1), ("on", 1, 1), ("off", 0, 0)):
        cfg = config.parse([f"--dry_run={word}"])
        assert memory_probe.is_wanted(cfg, CPU) == on_cpu
        assert memory_probe.is_wanted(cfg, torch.device("cuda", 0)) == on_card


PLACES = {
    "unpack": ["fsdp_qlora/model/quantize.py", "fsdp_qlora/model/layer.py"],
    "gather": ["torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py"],
    "loss": ["fsdp_qlora/model/head.py", "torch/autograd/function.py"],
    "head": ["fsdp_qlora/model/head.py", "torch/nn/modules/module.py"],
    "layer": ["transformers/models/llama/modeling_llama.py"],
    "graph": ["torch/cuda/graphs.py", "fsdp_qlora/model/cuda_graphs.py"],
    "nobody": [],
}


def history(*steps: str) -> list[dict]:
    """Events as torch's allocator tells them: "+name place GiB", "-name", "|" for a boundary."""
    events, addresses = [], {}
    for number, step in enumerate(steps):
        if step == "|":
            name = memory_probe._boundary.__name__
            frames = [{"name": name, "filename": "memory_probe.py", "line": 1}]
            events.append({"action": "alloc", "addr": 10**9, "size": 512, "frames": frames})
            events.append({"action": "free_requested", "addr": 10**9, "size": 512})
            events.append({"action": "free_completed", "addr": 10**9, "size": 512})
        elif step[0] == "+":
            name, place, gib = step[1:].split()
            addresses[name] = number
            frames = [{"name": "f", "filename": path, "line": 9} for path in PLACES[place]]
            size = int(float(gib) * 2**30)
            events.append({"action": "alloc", "addr": number, "size": size, "frames": frames})
        else:
            address = addresses[step[1:]]
            events.append({"action": "free_requested", "addr": address, "size": 0})
            events.append({"action": "free_completed", "addr": address, "size": 0})
    return events


PASS = (
    *("+weight unpack 1", "+kept1 layer 2", "+temp layer 4", "-temp", "-weight", "+kept2 layer 2"),
    *("+adapters gather 0.5", "+x head 0.25", "+logits loss 3", "+grad loss 0.125", "-logits"),
    *("-x", "|"),
    *("+weight2 unpack 1", "+again layer 6", "+reduced gather 0.75", "-kept2", "-again"),
    *("-weight2", "-kept1", "-grad", "-adapters", "+workspace nobody 0.0625", "|"),
)


def test_allocations_are_told_apart_by_place_and_life():
    """Worked out by hand: what is alive at the highest moment of each phase."""
    found, stays_gib = memory_probe.told_apart(history(*PASS, "-reduced", "|"))
    assert stays_gib == 0.0625  # the workspace
    forward, backward = found["forward"], found["backward"]
    # at the logits: 2 + 2 kept, adapters, x, logits; with the gradient that the loss keeps
    scaled = {names.KEPT: 4.0, names.LAYER: 0.25 + 0.125, names.LOSS: 3.0}
    assert forward == scaled | {names.BUFFERS: 0.5}
    fixed = {names.BUFFERS: 0.5, names.SCRATCH: 1.0, names.GRADIENTS: 0.75}
    assert backward == fixed | {names.KEPT: 4.0, names.LAYER: 6.125}


def test_of_two_passes_the_higher_counts():
    """The second finds gradients of the first; of a graph the output is kept, the rest stays."""
    changes = {"+reduced gather 0.75": "+sum gather 0.75", "+kept2 layer 2": "+kept2 graph 2"}
    second = [changes.get(step, step) for step in PASS]
    extra = ("+pool graph 5",)
    events = history(*PASS, *extra, *second, "-reduced", "-sum", "|", "-pool")
    found, stays_gib = memory_probe.told_apart(events)
    assert stays_gib == 0.125
    fixed = {row: gib for row, gib in found["forward"].items() if row in memory.FIXED}
    assert fixed == {names.BUFFERS: 0.5, names.GRADIENTS: 0.75}
    assert found["forward"][names.LAYER] == 5.375 and found["forward"][names.KEPT] == 4.0
    with pytest.raises(ValueError, match="2 boundaries"):
        memory_probe.told_apart(history("|", "+a layer 1", "|"))


def test_a_cpu_keeps_no_history():
    """Rows stay untold, and that is no fault."""
    with memory_probe._traced(CPU) as events:
        memory_probe._boundary(CPU)
        np.ones(3)
    assert events == []


def _told(world, path):
    """A memory probe on a GPU: what it says, the peak, and the rows that should make it."""
    tracker, trained = tracked(world, path, 3, "--use_cpu_offload=false", "--batch_size=8")
    batches = Batches(make_samples(60), SamplerConfig(8, 1, world.size, world.rank, 42, 1, 3))
    words = memory_probe.run(trained, batches, tracker)
    held_gib = sum(tracker.held.values())  # with workspaces of libraries: the probe has seen them
    moments_gib = 2 * sum(param.nbytes for param in trained.params) / 2**30
    return (
        words,
        tracker.taken["memory probe"].allocated_gib,
        held_gib + moments_gib,
        tracker.transients,
    )


@pytest.mark.gpu
def test_on_a_gpu_the_rows_that_are_told_apart_make_the_peak(tmp_path):
    """What lay there, what the optimizer will keep, and what came and went."""
    path = tiny.save_model(tmp_path / "model", hidden_size=512, intermediate_size=2048)
    ((words, peak_gib, known_gib, passing),) = run_ranks(_told, 1, path)
    assert "not told apart" not in words
    assert passing.keys() == {"forward", "backward"}
    sums = [sum(found.values()) for found in passing.values()]
    assert known_gib + max(sums) == pytest.approx(peak_gib, rel=0.1)
    assert passing["forward"][names.KEPT] > 0
