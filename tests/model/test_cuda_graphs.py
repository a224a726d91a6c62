"""CUDA graphs of a layer: the same numbers as without."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from fsdp_qlora.model import cuda_graphs, matmul, skeleton
from tests import tiny
from tests.ranks import run_ranks


class Alike(torch.nn.Module):
    def __init__(self, layer_idx, use_rope=1):
        super().__init__()
        self.layer_idx, self.use_rope = layer_idx, use_rope
        self.norm = torch.nn.LayerNorm(8)


def test_graphs_are_only_for_cards_and_layers_that_differ_in_their_weights_alone(monkeypatch):
    card, own = torch.device("cuda", 0), SimpleNamespace(name="NVIDIA H200", total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    alike = [Alike(i) for i in range(3)]
    assert cuda_graphs.choose("auto", alike, card, 1e9) is not None
    assert cuda_graphs.choose("auto", alike, card, 1e12) is None
    assert cuda_graphs.choose("auto", alike, card, 4e11) is not None
    own.name = "NVIDIA GeForce RTX 3090"  # whose matmuls take longer than the launches
    assert cuda_graphs.choose("auto", alike, card, 4e11) is None
    assert cuda_graphs.choose("off", alike, card, 1e9) is None
    assert cuda_graphs.choose("auto", alike, torch.device("cpu"), 1e9) is None
    assert cuda_graphs.choose("auto", [*alike, Alike(3, use_rope=0)], card, 1e9) is None
    alike[1].norm = torch.nn.Identity()
    assert cuda_graphs.choose("auto", alike, card, 1e9) is None


def _train(world, path, cases):
    """Losses, gradient norms and failures of six steps over three shapes, twice each."""
    from fsdp_qlora.data.batches import collate
    from fsdp_qlora.model import shard
    from fsdp_qlora.training import loop, optim
    from tests.model.test_shard import make_samples

    rows = make_samples(2 * world.size)
    shapes = [rows[world.rank :: world.size], rows[:1], rows[1:2]]
    results = []
    for flags in cases:
        own = ("--lora_rank=4", "--lora_dropout=0", "--apply_gradient_clipping=true")
        model, _, cfg = tiny.build(path, world, *own, *flags)
        tiny.fill_lora(model)
        trained = optim.prepare(model, cfg, 9, world)
        steps = [loop.train_step(trained, [collate(batch)]) for batch in shapes * 3]
        bodies = [block.body for block in shard.blocks(model)]
        passes = bodies[0].graphs.passes.values() if bodies[0].graphs else []
        failure = bodies[0].graphs.failure if bodies[0].graphs else ""
        numbers = [(s["loss"].item(), s["grad_norm"].item()) for s in steps]
        results.append((numbers, sum(isinstance(p, cuda_graphs.Pass) for p in passes), failure))
    return results


LEVELS = {  # flags -> pairs of graphs of a shape
    (): 1,
    ("--selective_layers=5",): 1,
    ("--selective_layers=2", "--uncheckpointed_layers=1"): 2,
}


def _check(results, nums):
    """By graphs, then without: bit for bit; `nums`: pairs of graphs of each of three shapes."""
    half = len(nums)
    for (numbers, *graphs), (plain, *_), num in zip(
        results[:half], results[half:], nums, strict=True
    ):
        assert graphs == [3 * num, ""]
        assert numbers == plain


@pytest.mark.gpu
@pytest.mark.skipif(tiny.DEVICE != "cuda", reason="needs a card")
def test_training_by_graphs_is_training(tmp_path):
    """Reference: the same steps without graphs, bit for bit, for every placement and level."""
    from tests.model.test_shard import PLACES

    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5, dtype=torch.bfloat16)
    cases = {(*place, *kept): num for place in PLACES.values() for kept, num in LEVELS.items()}
    off = [(*case, "--cuda_graphs=off") for case in cases]
    for results in run_ranks(_train, 1, path, [*cases, *off]):
        _check(results, [*cases.values()])


def _again(self, work):
    """Stand for a capture and its replays: the work itself, into the tensors of the first time."""
    found = work()

    def tensors(part):
        if isinstance(part, torch.Tensor):
            return [part]
        results = getattr(part, "results", part) or ()
        return [tensor for each in results for tensor in tensors(each)]

    def replay():
        for old, new in zip(tensors(found), tensors(work()), strict=True):
            old.copy_(new)

    return found, replay


def _train_by_stand_in(world, path, cases):
    """As `_train`, by graphs that run the work itself in place of a replay."""
    own = {"_aside": lambda self, work: work(), "_graph": _again}

    def chosen(setting, *rest):
        return None if setting == "off" else cuda_graphs.Graphs()

    with (
        patch.multiple(cuda_graphs.Graphs, **own),
        patch.object(skeleton, "choose_graphs", chosen),
        patch.object(matmul, "MIN_TOKENS_8_BIT", 1),
    ):
        return _train(world, path, cases)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_graphs_read_and_write_is_that_of_each_layer(tmp_path, num_ranks):
    """Reference: the same steps without graphs, bit for bit, for all levels side by side."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5)
    place = ("--offload_impl=stream",) if num_ranks == 1 else ("--use_cpu_offload=false",)
    cases = {("--precision=fp32", *place, *kept): num for kept, num in LEVELS.items()}
    cases[("--precision=bf16", "--matmul=fp8", *place)] = 1
    off = [(*case, "--cuda_graphs=off") for case in cases]
    for results in run_ranks(_train_by_stand_in, num_ranks, path, [*cases, *off]):
        _check(results, [*cases.values()])


def test_a_failed_capture_is_said_once_and_layers_run_as_they_are(capsys):
    def fail():
        raise RuntimeError("not permitted\nwhile the stream is capturing")

    body = SimpleNamespace(store=SimpleNamespace(read=fail), lora=None, level="full")
    graphs, hidden = cuda_graphs.Graphs(), torch.zeros(1, 2, 4)
    assert [graphs.find(body, hidden, (), {}) for _ in range(4)] == [None] * 4
    assert capsys.readouterr().out == "note      CUDA graphs are off: not permitted\n"
