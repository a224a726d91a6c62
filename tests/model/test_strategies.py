"""Every strategy and precision has the gradients of one process, over all of `train_step`.

With SGD and a learning rate of 1 the change of a weight is its gradient, clipping, loss scale and
reduction included.
"""

import dataclasses
import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.config import STRATEGIES
from fsdp_qlora.data.batches import collate
from fsdp_qlora.model import layer, load, shard
from fsdp_qlora.training import evaluate, loop, optim
from tests import tiny
from tests.model.test_shard import FLAGS, make_samples
from tests.ranks import run_ranks

NUM_ROWS = 24
MOMENTS = ("exp_avg", "exp_avg_sq")
SYNCS = (("--no_sync=true",), (), ("--no_sync=true",), ())
SGD = (*FLAGS[1:], "--optimizer=sgd", "--lr=1")
# Largest error of the gradient as a share of its norm: products of 24, 8 and 11 bits.
PRECISIONS = {"fp32": 5e-6, "bf16": 0.02, "fp16_autocast": 0.003}
PLACES = {
    "sharded": ("--use_cpu_offload=false",),
    "offloaded": ("--offload_impl=fsdp",),
    "offloaded_resident": ("--offload_impl=fsdp", "--resident_layers=1"),
    "streamed": ("--offload_impl=stream", "--resident_layers=1"),
}


def trained_on(world, path, num_micro, *flags):
    """A step over all NUM_ROWS rows: (gradient by peft's names, loss, gradient norm)."""
    model, _, cfg = tiny.build(path, world, *SGD, *flags)
    before = tiny.fill_lora(model)
    trained = optim.prepare(model, cfg, 1, world)
    rows = make_samples(NUM_ROWS)[world.rank :: world.size]
    size = len(rows) // num_micro
    batches = [collate(rows[i * size : (i + 1) * size]) for i in range(num_micro)]
    results = loop.train_step(trained, batches)
    assert not results["skipped"]
    grads = [old - new for old, new in zip(before, shard.whole_lora(model), strict=True)]
    named = {name: grad.numpy() for name, grad in tiny.lora_dict(model, grads).items()}
    return named, results["loss"].item(), results["grad_norm"].item()


def all_cases(world, path, local_size, cases):
    world = dataclasses.replace(world, local_size=local_size, local_rank=world.rank % local_size)
    if local_size < world.size:
        is_slice_of_the_machine(world, path)
    else:
        is_bfloat16_throughout(world, path)
    return [trained_on(world, path, *case) for case in cases]


def is_slice_of_the_machine(world, path):
    """Machines hold the same."""
    hybrid = "--sharding_strategy=hybrid_full_shard"
    model, _, _ = tiny.build(path, world, hybrid, *PLACES["sharded"])
    packed = next(shard.blocks(model)).quantized
    start, stop = shard.local_range(packed)
    assert (stop - start) * 2 == len(packed)
    marks = world.gather_objects((start, load.fingerprint(packed.to_local())))
    assert marks[:2] == marks[2:] and marks[0] != marks[1]


def is_bfloat16_throughout(world, path):
    """What is trained, and the moments; the sums of a step stay float32."""
    model, _, cfg = tiny.build(path, world, *FLAGS[1:], "--precision=bf16_pure", "--lr=0.01")
    trained = optim.prepare(model, cfg, 3, world)
    batch = collate(make_samples(4))
    results = [loop.train_step(trained, [batch]) for _ in range(3)]
    assert results[2]["loss"] < results[0]["loss"]
    moments = [trained.optimizer.state[trained.params[0]][name] for name in MOMENTS]
    assert {t.dtype for t in (*trained.params, *moments)} == {torch.bfloat16}
    assert {v.dtype for v in (results[0]["loss"], results[0]["grad_norm"])} == {torch.float32}


def lora_values(world, path):
    model, _, _ = tiny.build(path, world, *FLAGS)
    return {n: t.numpy() for n, t in tiny.lora_dict(model, tiny.fill_lora(model)).items()}


def reference(path):
    """Gradient, loss and norm by transformers + peft on one process, float32."""
    cfg = config.parse([f"--model_name={path}", *FLAGS])
    lora = {n: torch.from_numpy(v) for n, v in run_ranks(lora_values, 1, path)[0].items()}
    model, named = tiny.reference_model(path, "nf4_dq", lora, cfg)
    loss = tiny.reference_loss(model, collate(make_samples(NUM_ROWS)))
    loss.backward()
    return {name: param.grad.numpy() for name, param in named.items()}, loss.item()


def check(by_rank, cases, want, loss):
    norm = np.sqrt(sum(float((grad**2).sum()) for grad in want.values()))
    for results in by_rank:
        for case, (grads, own_loss, own_norm) in zip(cases, results, strict=True):
            precision = next(flag for flag in case if "precision" in str(flag)).split("=")[1]
            most = PRECISIONS[precision]
            assert grads.keys() == want.keys()
            error = np.sqrt(sum(float(((grads[n] - want[n]) ** 2).sum()) for n in want)) / norm
            print(f"{error:.1e} {abs(own_norm / norm - 1):.1e}", *case)
            assert error < most, (case, error)
            assert own_loss == pytest.approx(loss, rel=most)
            assert own_norm == pytest.approx(norm, rel=most)


def flags_of(strategy, precision, place, *more):
    return f"--sharding_strategy={strategy}", f"--precision={precision}", *PLACES[place], *more


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tiny.save_model(tmp_path_factory.mktemp("model"))
    return path, *reference(path)


def test_every_strategy_and_precision_has_the_gradient_of_one_process(one_process):
    """{5 strategies} x {3 precisions}, and gradients that are reduced once, on two ranks."""
    path, want, loss = one_process
    cases = [
        (2, *flags_of(strategy, precision, "sharded"))
        for strategy, precision in itertools.product(STRATEGIES, PRECISIONS)
    ]
    cases += [(3, *flags_of(name, "fp32", "sharded", "--no_sync=true")) for name in STRATEGIES]
    cases += [(3, *flags_of("full_shard", "fp32", "sharded"))]
    check(run_ranks(all_cases, 2, path, 2, cases), cases, want, loss)


def test_hybrid_strategies_on_two_machines_have_the_gradient_of_one_process(one_process):
    """2 x 2 ranks: {hybrid strategies} x {placements}, the narrow precisions, streaming by all."""
    path, want, loss = one_process
    hybrids = [name for name, row in STRATEGIES.items() if row.is_hybrid]
    cases = [
        (2, *flags_of(strategy, "fp32", place, *sync))
        for strategy, (place, sync) in itertools.product(hybrids, zip(PLACES, SYNCS, strict=True))
    ]
    cases += [(1, *flags_of(hybrids[0], p, "sharded")) for p in ("bf16", "fp16_autocast")]
    cases += [(2, *flags_of(name, "fp32", "streamed")) for name in ("full_shard", "ddp")]
    check(run_ranks(all_cases, 4, path, 2, cases), cases, want, loss)


OFFLOADED = "--use_activation_cpu_offload=true"
KEEPING = {
    "full": (),
    "reentrant": ("--reentrant_checkpointing=true",),
    "levels": ("--selective_layers=2", "--uncheckpointed_layers=1"),
    "streamed": ("--offload_impl=stream", "--lora_dropout=0.3"),
}


def two_steps(trained):
    """Losses of two steps, of micro-batches of which the second is the longer one."""
    losses = []
    for step in range(2):
        batches = [collate(make_samples(2 + 2 * step)), collate(make_samples(9))]
        losses.append(loop.train_step(trained, batches)["loss"].item().hex())
    return losses


def kept_on_the_host(world, path):
    """Steps with and without: losses and weights bit for bit, and how many inputs went."""
    found = {}
    for name, flags in KEEPING.items():
        for extra in ((), (OFFLOADED,)):
            torch.manual_seed(world.rank)
            model, _, cfg = tiny.build(path, world, *FLAGS, "--lr=0.01", *flags, *extra)
            trained = optim.prepare(model, cfg, 2, world)
            put = layer.Offload._put
            with patch.object(layer.Offload, "_put", autospec=True, side_effect=put) as puts:
                losses = two_steps(trained)
            held_out = evaluate.measure(model, None, [collate(make_samples(3))], world)
            losses.append(held_out["loss"].hex())
            digest = sum(load.fingerprint(flat) for flat in shard.whole_lora(model))
            found[name, bool(extra)] = losses, digest, puts.call_count
    return found


def test_activations_on_the_host_change_no_bit(tmp_path):
    """{kept input alone, by torch's checkpoint, levels, streamed with dropout}, two ranks."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5)
    for found in run_ranks(kept_on_the_host, 2, path):
        for name in KEEPING:
            without, with_offload = found[name, False], found[name, True]
            assert without[:2] == with_offload[:2], name
            assert without[2] == 0
            assert with_offload[2] == 4 * 4  # all layers but the last, in every micro-batch
