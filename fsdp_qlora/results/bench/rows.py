"""The rows of a bench: every arm trains on the same token ids, per rank and per step."""

DUMMY_FLAGS = ("--dataset=dummy", "--eval_samples=0")


def data_flags(
    batch_size: int,
    context_length: int,
    num_steps: int,
    num_ranks: int,
    seed: int,
    accumulation: int = 1,
) -> list[str]:
    """Say to train.py what an arm trains on: as many random rows as the steps take.

    Args:
        batch_size: rows per rank and micro-batch.
        context_length: tokens of each row.
        num_steps: optimizer steps.
        num_ranks: ranks.
        seed: of the ids and of their order.
        accumulation: micro-batches of a step.

    Returns:
        Flags of train.py.
    """
    return [
        *DUMMY_FLAGS,
        f"--dataset_samples={num_steps * accumulation * batch_size * num_ranks}",
        f"--gradient_accumulation_steps={accumulation}",
        f"--batch_size={batch_size}",
        f"--context_length={context_length}",
        f"--max_steps={num_steps}",
        f"--seed={seed}",
    ]


def rows_of_rank(
    model_name: str,
    batch_size: int,
    context_length: int,
    num_steps: int,
    num_ranks: int,
    seed: int,
    rank: int,
) -> list[list[list[int]]]:
    """List what one of our ranks sees, by the code that a run of ours uses.

    Args:
        model_name: as for train.py; gives the size of the vocabulary.
        batch_size, context_length, num_steps, num_ranks, seed: see `data_flags`.
        rank: which of the ranks.

    Returns:
        Token ids, [num_steps][batch_size][context_length].
    """
    import torch

    from fsdp_qlora import arch, config, data
    from fsdp_qlora.distributed.world import World

    flags = data_flags(batch_size, context_length, num_steps, num_ranks, seed)
    cfg = config.parse([f"--model_name={model_name}", *flags])
    info = arch.read(model_name, need_weights=False)
    world = World(rank, num_ranks, rank, num_ranks, torch.device("cpu"))
    train = data.build(cfg, info, world).train
    steps = [train.step(step) for step in range(train.num_steps)]
    return [batch.input_ids[:, :context_length].tolist() for (batch,) in steps]


def dealt_in_turn(by_rank: list[list[list[list[int]]]]) -> list[list[int]]:
    """Order rows for a trainer that deals whole micro-batches to its ranks in turn.

    accelerate gives batch i of a sequential sampler to rank i modulo the number of ranks; then
    every rank sees at every step what it sees in a run of ours.

    Args:
        by_rank: of each rank, see `rows_of_rank`.

    Returns:
        Rows: of step 0 those of rank 0, then of rank 1, ..., then of step 1.

    Source: huggingface/accelerate, src/accelerate/data_loader.py, BatchSamplerShard.
    """
    return [row for ranks in zip(*by_rank, strict=True) for batch in ranks for row in batch]
