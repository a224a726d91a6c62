"""CUDA graphs of a layer: the same numbers as without."""

import pytest
import torch

from fsdp_qlora.model import cuda_graphs
from tests import tiny
from tests.ranks import run_ranks


class Alike(torch.nn.Module):
    def __init__(self, layer_idx, use_rope=1):
        super().__init__()
        self.layer_idx, self.use_rope = layer_idx, use_rope
        self.norm = torch.nn.LayerNorm(8)


def test_graphs_are_only_for_cards_and_layers_that_differ_in_their_weights_alone():
    card = torch.device("cuda", 0)
    alike = [Alike(i) for i in range(3)]
    assert cuda_graphs.choose("auto", alike, card, 1e9) is not None
    assert cuda_graphs.choose("auto", alike, card, 1e12) is None
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
        results.append((numbers, sum(p is not None for p in passes), failure))
    return results


@pytest.mark.gpu
@pytest.mark.skipif(tiny.DEVICE != "cuda", reason="needs a card")
def test_training_by_graphs_is_training(tmp_path):
    """Reference: the same steps without graphs, bit for bit, for every placement."""
    from tests.model.test_shard import PLACES

    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5, dtype=torch.bfloat16)
    places = list(PLACES.values())
    off = [(*place, "--cuda_graphs=off") for place in places]
    for results in run_ranks(_train, 1, path, [*places, *off]):
        for (by_graph, num_graphs, failure), (plain, _, _) in zip(
            results[: len(places)], results[len(places) :], strict=True
        ):
            assert (num_graphs, failure) == (3, "")
            assert by_graph == plain
