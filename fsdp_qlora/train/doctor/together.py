"""What the ranks of `doctor` do together: meet, share, gather, and keep bytes as they are."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fsdp_qlora.distributed import world as worlds
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import INTEGRITY
from fsdp_qlora.model import host, load, shard
from fsdp_qlora.model.layout import Layout, build_layout
from fsdp_qlora.model.packed import DecoderBlock, LayerCache
from fsdp_qlora.model.placement import Placed
from fsdp_qlora.train.doctor import device as one
from fsdp_qlora.train.doctor.findings import Finding, ok, problem, warning

COLLECTIVE_S = 60.0
SHARED_BYTES = 64 * 2**20
GATHER_BYTES = {"cuda": 128 * 2**20, "cpu": 16 * 2**20}
NUM_GATHERS, NUM_TRIES = {"cuda": 20, "cpu": 2}, 3
LAYER_SHAPES = [(512, 1024)]
PLACES = ("sharded", "offloaded")
NO_P2P = "export NCCL_P2P_DISABLE=1, or start one rank (--world_size 1)"


@dataclass
class Rank:
    """This process.

    Attributes:
        number, size: this rank, and how many there are.
        device: its own.
        flip: (rank, layer, byte of its slice) to spoil, so that the self-test has something to
            find; None in earnest.
        world: the ranks, once they have met.
    """

    number: int
    size: int
    device: torch.device
    flip: tuple[int, int, int] | None = None
    world: World | None = None

    @property
    def title(self) -> str:
        """What findings call all ranks together."""
        return f"{self.size} {'CPU ranks' if self.device.type == 'cpu' else 'cards'}"

    @property
    def met(self) -> World:
        """The ranks; they have met."""
        assert self.world is not None
        return self.world


def join(rank: Rank) -> Iterator[Finding]:
    """Let the ranks meet, and add something up.

    Args:
        rank: this one; it has its world afterwards.
    """
    rank.world = worlds.join(None, 0, COLLECTIVE_S)
    total = torch.full((2**18,), rank.number + 1.0, device=rank.device)
    rank.world.sum_(total)
    is_right = bool((total == rank.size * (rank.size + 1) / 2).all())
    name, by = f"{rank.title} meet", "gloo"
    if rank.device.type == "cuda":
        by = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if all(rank.world.gather_objects(is_right)):
        yield ok(name, f"over {by}, sums are right")
    else:
        yield problem(name, f"sums over {by} are wrong", NO_P2P, INTEGRITY)


def shared(rank: Rank) -> Iterator[Finding]:
    """One copy in host memory that all ranks see, as streamed layers need it.

    Args:
        rank: this one.
    """
    name, world = f"{rank.title} shared host", rank.met
    memory = host.shared(SHARED_BYTES, rank.device.type == "cuda", world)
    if isinstance(memory, str):
        remedy = "offload falls back to --offload_impl fsdp; allow memfd and /proc/PID/fd"
        yield warning(name, memory, remedy)
        return
    words = memory.bytes.view(torch.int64)
    expected = torch.arange(words.numel())
    if rank.number == 0:
        words.copy_(expected)
    world.barrier()
    if all(world.gather_objects(torch.equal(words, expected))):
        yield ok(name, f"one copy of {SHARED_BYTES // 2**20} MiB is seen by all")
    else:
        yield problem(name, "the ranks do not see the same", "--offload_impl fsdp", INTEGRITY)


def gather(rank: Rank) -> Iterator[Finding]:
    """Bandwidth of an all-gather: what each rank receives.

    Args:
        rank: this one.
    """
    if rank.size == 1:
        return
    world = rank.met
    nbytes = GATHER_BYTES[rank.device.type]
    flat = torch.full((nbytes // 4,), float(rank.number), device=rank.device)
    expected = torch.arange(rank.size, device=rank.device).unsqueeze(1)
    is_right = bool((world.share(flat) == expected).all())
    best_gbs = 0.0
    for _ in range(NUM_TRIES):
        world.barrier()
        began_s = time.perf_counter()
        for _ in range(NUM_GATHERS[rank.device.type]):
            received = world.share(flat)
        float(received[-1, -1])  # waits for the device
        gather_s = (time.perf_counter() - began_s) / NUM_GATHERS[rank.device.type]
        best_gbs = max(best_gbs, nbytes * (rank.size - 1) / gather_s / 1e9)
    every = world.gather_objects((is_right, best_gbs, one.has_peers(rank.device)))
    gbs, has_peers = min(row[1] for row in every), all(row[2] for row in every)
    name, value = f"{rank.title} all-gather", f"{gbs:.3g} GB/s into each"
    if not has_peers:
        value += ", through the host (no peer access)"
    if all(row[0] for row in every):
        link_gbs = gbs if has_peers else 0.0  # as hardware has it
        yield ok(name, value, one.card_name(rank.device), card_link_gbs=link_gbs)
    else:
        yield problem(name, f"what was gathered is wrong; {value}", NO_P2P, INTEGRITY)


class _Body(nn.Module):
    """Stands for what FSDP shards beside the packed bytes."""

    slots, is_whole, is_trained = (), False, False

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Parameter(torch.zeros(64, device="meta"))


class _Layers(nn.Module):
    """Blocks as shard.apply wants them, without a model around."""

    is_tied = False

    def __init__(self, num_layers: int, layout: Layout) -> None:
        super().__init__()
        blocks: list[Any] = [DecoderBlock(layout, LayerCache()) for _ in range(num_layers)]
        for block in blocks:
            block.body = _Body()
        self.layers = nn.ModuleList(blocks)
        self.embedding = nn.Linear(8, 8, device="meta")
        self.head = nn.Linear(8, 8, device="meta")


def planted(layer: int, nbytes: int) -> torch.Tensor:
    """Bytes that careless copies rewrite: every 16-bit pattern, signalling NaNs of float32.

    Args:
        layer: its number; each has bytes of its own.
        nbytes: at least 192 KiB.

    Returns:
        uint8 [nbytes].
    """
    generator = torch.Generator().manual_seed(layer)
    flat = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    patterns = torch.arange(2**16).to(torch.int16).view(torch.uint8)
    nans = torch.randint(1, 2**22, (2**14,), generator=generator) + 0x7F800000
    nans[1::2] -= 2**31  # the sign
    nans_bytes = nans.to(torch.int32).view(torch.uint8)
    flat[: patterns.numel()] = patterns
    flat[patterns.numel() :][: nans_bytes.numel()] = nans_bytes
    return flat


def exact_bytes(rank: Rank) -> Iterator[Finding]:
    """Shard planted bytes with FSDP2 as a run does, gather them as a run does, and compare.

    Args:
        rank: this one.

    Raises:
        UserError: bytes have changed (code 5).
    """
    world, layout = rank.met, build_layout(LAYER_SHAPES, "nf4_dq")
    names = tuple(name for name in PLACES for _ in range(rank.size))
    model: Any = _Layers(len(names), layout)
    shard.apply(model, "full_shard", Placed(names, ""), torch.bfloat16, world)
    blocks, made = list(shard.blocks(model)), {}
    slice_bytes = -(-layout.nbytes // 4 // rank.size) * 4
    for first in range(0, len(names), rank.size):  # each rank packs one of these layers
        flat = torch.zeros(slice_bytes * rank.size, dtype=torch.uint8, device=rank.device)
        own = first + rank.number
        flat[: layout.nbytes] = planted(own, layout.nbytes).to(rank.device)
        made[own] = load.fingerprint(flat[: layout.nbytes])
        for layer, part in enumerate(world.exchange(flat), first):
            start, stop = shard.local_range(blocks[layer].packed)
            local = part.clone()
            if names[layer] == "offloaded":
                local = host.private(slice_bytes, rank.device.type == "cuda").bytes
                local.copy_(part)
            if rank.flip is not None and rank.flip[:2] == (rank.number, layer):
                local[rank.flip[2]] ^= 1
            local = local[: (stop - start) * 4].view(torch.float32)
            shard.set_local(blocks[layer], "packed", local)
    num = load.verify_bytes(model, made, world)
    yield ok(f"{rank.title} 4-bit bytes", f"{num} gathered layers full of NaN patterns are exact")
