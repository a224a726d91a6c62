"""The ledger by row (train/rows.py, memory.py): real models on two ranks, and its arithmetic."""

import functools
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora import arch, config
from fsdp_qlora.distributed import exit_report
from fsdp_qlora.hardware import Machine
from fsdp_qlora.planning import rows as names
from fsdp_qlora.planning import run as plans
from fsdp_qlora.training import memory
from fsdp_qlora.training.memory import HostShare, MemoryTracker, Peak
from tests import tiny
from tests.ranks import run_ranks

FLAGS = ("--lora_rank=8", "--lora_dropout=0", "--context_length=128", "--batch_size=2")
PLACES = {
    "sharded": ("--use_cpu_offload=false",),
    "streamed": ("--use_cpu_offload=true",),
    "offloaded": ("--use_cpu_offload=true", "--offload_impl=fsdp"),
    "partly": ("--use_cpu_offload=true", "--resident_layers=1"),
    "ddp": ("--sharding_strategy=ddp",),
}
EXACT = (names.PACKED, names.CONSTANTS, names.ADAPTERS, names.OPTIMIZER)
CPU = torch.device("cpu")


def plan_of(path: Path, *flags: str) -> plans.RunPlan:
    """The plan of two CPU ranks."""
    cfg = config.parse([f"--model_name={path}", "--quant_cache=off", *FLAGS, *flags])
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    return plans.make(info, cfg, frozenset(), Machine((), None, 2, 0.0))


def tracked(world, path: Path, num_steps: int, *flags: str):
    """A model that is loaded, its optimizer, and what is known of their memory."""
    from fsdp_qlora.model.load import build
    from fsdp_qlora.training import optim

    plan = plan_of(path, *flags)
    tracker = MemoryTracker(plan, world.device)
    with tracker.phase("load"):
        built = build(plan.cfg, plan.info, world)
    tracker.record_model(built)
    trained = optim.prepare(built.model, plan.cfg, num_steps, world)
    tracker.record_optimizer(trained)
    return tracker, trained


def _accounts(world, path, cases):
    """Load and take two steps under every case; rows and host shares by case."""
    from fsdp_qlora.training import loop
    from fsdp_qlora.training.metrics import Clock, reach
    from tests.model.test_shard import micro_batches

    found = []
    for flags in cases:
        tracker, trained = tracked(world, path, 2, *flags)
        clock = Clock(world.device, tracker.peaks.mark)
        for _ in range(2):
            loop.train_step(
                trained,
                micro_batches(world.rank, world.size, 1),
                1,
                functools.partial(reach, clock, 0, 1),
            )
            steps, _ = tracker.step()
        share = tracker.share
        found.append((tracker.phases | steps, share, share.shared_gib, tracker.held))
    return found


def test_what_lies_on_a_rank_is_counted_tensor_by_tensor_and_is_what_was_planned(tmp_path):
    """Of five placements: packed bytes, constants, adapters, moments, gradients, slots."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=4)
    by_rank = run_ranks(_accounts, 2, path, list(PLACES.values()))
    for number, (name, flags) in enumerate(PLACES.items()):
        plan = plan_of(path, *flags)
        assert plan.found is not None
        table, host = plan.found.device, plan.found.host
        accounts = [rank[number] for rank in by_rank]
        for phases, _, _, held in accounts:
            for phase, row in itertools.product(("forward", "backward", "optimizer"), EXACT):
                measured = phases[phase].get(row, 0.0)
                assert measured == pytest.approx(table.gib(phase, row), rel=1e-3), (name, row)
            grads = table.gib("optimizer", names.GRADIENTS)
            assert phases["optimizer"][names.GRADIENTS] == pytest.approx(grads, rel=1e-3)
            slots = table.gib("optimizer", names.BUFFERS)
            assert held.get(names.BUFFERS, 0.0) == pytest.approx(slots, rel=1e-3), name
            rest = table.gib("forward", names.UNQUANTISED)
            # with them: the frequencies of the rotary embedding, 64 bytes
            assert phases["forward"][names.UNQUANTISED] == pytest.approx(rest, rel=0.01)
        hosted = sum(share.slices_gib for _, share, _, _ in accounts) + accounts[0][2]
        assert hosted == pytest.approx(host.gib("forward", names.HOSTED), rel=1e-3), name
        assert accounts[0][2] == accounts[1][2]


def test_rows_of_a_step_sum_up_to_its_peak_and_the_rest_is_dealt_as_the_probe_found_it(tmp_path):
    """Fixed rows keep their size, the others share what is left; without a probe nobody knows."""
    tracker = MemoryTracker(plan_of(tiny.save_model(tmp_path / "model")), CPU)
    tracker.held = {names.PACKED: 2.0, names.ADAPTERS: 0.5}
    base_gib = tracker.share.base_gib
    peak = Peak(base_gib + 10.0, base_gib + 10.0, base_gib)
    assert tracker.device_rows("forward", peak) == pytest.approx(tracker.held | {names.REST: 7.5})
    fixed, scaled = {names.SCRATCH: 1.0}, {names.KEPT: 8.0, names.LAYER: 2.0}
    tracker.transients = {"forward": fixed | scaled}
    rows = tracker.device_rows("forward", peak)
    expected = tracker.held | {names.SCRATCH: 1.0, names.KEPT: 5.2, names.LAYER: 1.3}
    assert rows == pytest.approx(expected)
    low = Peak(base_gib + 3.05, 0.0, 0.0)  # less than what is fixed: all shrink alike
    rows = tracker.device_rows("forward", low)
    assert rows == pytest.approx(tracker.held | {"dequantised weight": 0.05} | {
        names.KEPT: 0.4, names.LAYER: 0.1})  # fmt: skip
    assert sum(rows.values()) == pytest.approx(3.05)


def test_paged_moments_are_told_apart_from_what_torch_holds(tmp_path):
    """The driver has them, not the allocator: they add to its peak and to nothing else."""
    tracker = MemoryTracker(plan_of(tiny.save_model(tmp_path / "model")), CPU)
    tracker.held = {names.PACKED: 2.0}
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([param])
    moments = {name: torch.zeros(2**26) for name in ("state1", "state2")}
    optimizer.state[param] = moments
    tracker.record_optimizer(SimpleNamespace(params=[param], optimizer=optimizer))
    peak = Peak(tracker.share.base_gib + 3.0, 0.0, 0.0)
    expected = {names.PACKED: 2.0, names.OPTIMIZER: 0.5}
    assert tracker.device_rows("forward", peak) == pytest.approx(expected | {names.REST: 0.5})
    for tensor in moments.values():
        tensor.is_paged = True  # as bitsandbytes marks them
    assert tracker.device_rows("forward", peak) == pytest.approx(expected | {names.REST: 1.0})


# 4 GiB of layers shared on the host, 0.5 of files in memory.
HOST = {"shared_gib": 4.0, "files_gib": 0.5, "system_gib": 1.5, "used_gib": 12.0}


def book_of(kind: str) -> memory.MemoryLedger:
    """An empty book of two ranks."""
    return memory.MemoryLedger(kind == "cuda", [(0, 1)])


def test_host_rows_of_cards_leave_the_rest_to_the_processes():
    """What was in use before the run is not the run's; what the load read ahead is told apart."""
    shares = [HostShare(1.0, 0.25, 0.5, 1.0, 1.25, **HOST)] * 2
    assert book_of("cuda").host_rows("load", shares) == pytest.approx({
        names.HOSTED: 5.0, names.FILES: 0.5, names.SYSTEM: 1.0, names.DATA: 0.5,
        names.LOADING: 0.5, names.PROCESSES: 4.5,
    })  # fmt: skip
    saved = [HostShare(1.0, 0.25, 0.5, save_gib=2.0, save_peak_gib=2.5, **HOST)] * 2
    rows = book_of("cuda").host_rows("save", saved)
    assert rows[names.SAVING] == pytest.approx(1.0)
    assert sum(rows.values()) == pytest.approx(12.0)


def test_host_rows_of_cpu_ranks_tell_their_models_from_their_processes():
    """By what each process had before it had a model."""
    shares = [HostShare(1.0, 0.25, 0.0, 1.5, 2.0, 2.5, 2.75, 0.0, 4.0, 3.0, 2.0, **HOST)] * 2
    found = {phase: book_of("cpu").host_rows(phase, shares) for phase in names.PHASES}
    models = {phase: rows[names.RANKS] for phase, rows in found.items()}
    assert models == {"load": 2.0, "forward": 6.0, "backward": 4.0, "optimizer": 2.0, "save": 3.0}
    assert {rows[names.PROCESSES] for rows in found.values()} == {1.5}
    assert found["save"][names.SAVING] == 0.5
    alone = [share._replace(system_gib=0.0) for share in shares]
    assert names.SYSTEM not in book_of("cpu").host_rows("load", alone)


def test_the_book_keeps_the_rows_of_the_highest_step():
    """Not the highest of each row: what it shows was there at one time."""
    kept = book_of("cpu")
    for packed, other in ((1.0, 5.0), (2.0, 1.0)):
        phases = {"forward": {names.PACKED: packed, names.REST: other}}
        tops, (host,) = kept.update([(phases, HostShare(**HOST))] * 2, ("forward",))
        assert tops == [phases["forward"]] * 2 and host[names.HOSTED] == 4.0
    assert kept.to_dict()["ranks"][1]["device"]["forward"] == {names.PACKED: 1.0, names.REST: 5.0}


def _short_of_memory(world, path, out):
    """Train until the third forward pass finds no memory; the error, its notes, a step's cost."""
    from fsdp_qlora.data.batches import Batches, SamplerConfig
    from fsdp_qlora.model import shard
    from fsdp_qlora.training import loop, metrics
    from tests.data.test_batches import make_samples

    flags = ("--use_cpu_offload=false", f"--output_dir={out}")
    tracker, trained = tracked(world, path, 9, *flags)
    batches = Batches(make_samples(40), SamplerConfig(2, 1, 1, 0, 42, 1, 9))
    calls = []

    def no_room(module, args):
        calls.append(module)
        if (
            len(calls) == 6 * tracker.plan.info.num_layers + 2
        ):  # forward and recomputation of two steps
            raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    for block in shard.blocks(trained.model):
        block.body.layer.register_forward_pre_hook(no_room)
    info = {"plan": tracker.plan.to_dict()}
    notes = []
    try:
        with metrics.Recorder(tracker, world, 9, info) as recorder:
            loop.fit(trained, batches, recorder, tiny.unsaved())
    except torch.OutOfMemoryError as error:
        notes = error.__notes__
    costs = []
    for _ in range(20):
        began_s = time.perf_counter()
        for phase in ("data", "forward", "backward", "optimizer", "other"):
            tracker.peaks.mark(phase)
        tracker.step()
        costs.append(time.perf_counter() - began_s)
    return notes, min(costs)  # others compute on this machine too


def test_a_run_that_finds_no_memory_leaves_its_record_and_says_where(tmp_path):
    """In the forward of a step; rows in every line; and what the tracker costs a step."""
    path = tiny.save_model(tmp_path / "model")
    ((notes, cost_s),) = run_ranks(_short_of_memory, 1, path, tmp_path)
    words = [note.split()[0] for note in notes]
    assert words == ["out", "predicted", "there", "largest"]
    assert notes[0].startswith("out of memory in the forward of step ")
    assert "on the host, all ranks" in notes[1] and "of its own at its highest" in notes[2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["is_complete"] is False and summary["num_steps"] >= 2
    assert summary["ledger"]["host"].keys() == {"load", "forward", "backward", "optimizer"}
    for line in tiny.steps(tmp_path):
        assert line["ranks"][0]["device_rows"] and line["host"]["host_rows"]
        assert set(line["ranks"][0]["device_rows"]) <= {*names.DEVICE_ROWS, names.REST}
    assert len(notes) + 2 <= exit_report.MAX_LINES
    assert cost_s < 0.003
