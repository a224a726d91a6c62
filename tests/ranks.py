"""Real gloo ranks for tests: forked from one process that has imported torch once."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = ["tests.preload"]
TIMEOUT_S = 240


def _serve(function, rank, world_size, store, results, args):
    import torch

    from fsdp_qlora.train.world import World

    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        world = World(rank, world_size, rank, world_size, torch.device("cpu"))
        results.put((rank, True, function(world, *args)))
        torch.distributed.barrier()
    except Exception:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # nothing to tidy up; a failed peer may hold the group


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run function(world, *args) on gloo ranks and return what each returned, by rank.

    The function must be importable (module level) and its results picklable.
    """
    context = multiprocessing.get_context("forkserver")
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
