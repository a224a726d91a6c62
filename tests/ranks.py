"""Real ranks for tests, forked from one process that has imported torch once.

They talk gloo on the CPU; on a machine with GPUs each has one, they talk NCCL, and are spawned
(a process that has touched CUDA cannot be forked).
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from tests import tiny

PRELOAD = ["tests.preload"]
TIMEOUT_S = 240


def _serve(function, rank, world_size, store, results, args):
    import torch

    from fsdp_qlora.distributed.world import World

    torch.set_num_threads(1)
    has_gpus = tiny.DEVICE == "cuda"
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    try:
        if has_gpus:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
        )
        world = World(rank, world_size, rank, world_size, device)
        results.put((rank, True, function(world, *args)))
        torch.distributed.barrier()
    except Exception:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # nothing to tidy up; a failed peer may hold the group


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run function(world, *args) on ranks and return what each returned, by rank.

    The function must be importable (module level) and its results picklable. Skips the calling test
    on a machine with cards, but too few of them.
    """
    if 0 < tiny.NUM_CARDS < world_size:
        pytest.skip(f"needs {world_size} cards")
    context = multiprocessing.get_context("spawn" if tiny.DEVICE == "cuda" else "forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ranks = [
            context.Process(
                target=_serve, args=(function, rank, world_size, store, results, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        answers = {}
        try:
            for _ in ranks:
                rank, is_good, value = results.get(timeout=TIMEOUT_S)
                assert is_good, f"rank {rank}:\n{value}"
                answers[rank] = value
            for process in ranks:
                process.join(10)
        finally:
            for process in ranks:
                process.kill()
    return [answers[rank] for rank in range(world_size)]
