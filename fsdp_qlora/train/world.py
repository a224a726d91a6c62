"""The ranks: who they are, and every collective outside FSDP."""

import datetime
import os
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    Attributes:
        rank, size: this process's number, and how many there are, on all machines.
        local_rank, local_size: the same on this machine.
        device: where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def sum(self, value: float) -> float:
        """Sum a host number over ranks; no device is involved.

        Args:
            value: of this rank.
        """
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks on its device.

        Args:
            tensor: of this rank, overwritten.

        Returns:
            The same tensor.
        """
        dist.all_reduce(tensor)
        return tensor

    def gather(self, values: list[float]) -> list[list[float]]:
        """Gather host numbers; no device is involved.

        Args:
            values: of this rank; as many on every rank.

        Returns:
            Every rank's values, by rank.
        """
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [tensor.tolist() for tensor in every]

    def gather_objects(self, value: object) -> list:
        """Gather small host objects.

        Args:
            value: of this rank, picklable.

        Returns:
            Every rank's value, by rank.
        """
        every: list = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def exchange(self, flat: torch.Tensor) -> torch.Tensor:
        """Cut a tensor into slices, one per rank, and send each rank its slice.

        Args:
            flat: 1-D, its length divisible by `size`.

        Returns:
            [size, len/size]: this rank's slice of every rank's tensor.
        """
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        return received.view(self.size, -1)

    def share(self, flat: torch.Tensor) -> torch.Tensor:
        """Send every rank the whole tensor.

        Args:
            flat: 1-D, as long on every rank.

        Returns:
            [size, len]: every rank's tensor.
        """
        received = flat.new_empty(self.size * flat.numel())
        # torch 2.13 renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(received, flat)
        return received.view(self.size, -1)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)


def join(gpu_budget_gib: float | None, seed: int, timeout_s: float = 1800.0) -> World:
    """Join the process group named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Uses NCCL for tensors on GPUs and gloo for tensors on the host, both in one group: host numbers
    (token counts, memory records) never wait for the device. From here on libraries keep to
    themselves what they deprecate, unless Python was started with -W or PYTHONWARNINGS.

    Args:
        gpu_budget_gib: cap of this rank's allocator, GiB.
        seed: of dropout, different on every rank; adapters and data have their own generators.
        timeout_s: after which a collective fails.

    Returns:
        This process among the ranks.
    """
    if not sys.warnoptions:  # FSDP and transformers call each other's deprecated names
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    env = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_gpu:
        # srun --gpus-per-task=1 shows each rank one device, whatever its LOCAL_RANK.
        device = torch.device("cuda", env["LOCAL_RANK"] % torch.cuda.device_count())
    torch.manual_seed(seed + env["RANK"])
    if has_gpu:
        torch.cuda.set_device(device)
        if gpu_budget_gib is not None:
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            fraction = min(gpu_budget_gib * 2**30 / total_bytes, 1.0)
            torch.cuda.set_per_process_memory_fraction(fraction)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if has_gpu else None,
    )
    return World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], local_size, device)


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def clip_grad_norm(
    grads: list[torch.Tensor], max_norm: float | None, world: World, are_slices: bool
) -> torch.Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm`.

    Args:
        grads: this rank's gradients, float32, on one device.
        max_norm: None measures only.
        world: the ranks; all must call.
        are_slices: the ranks hold different slices (sum of squares over ranks) or all the same.

    Returns:
        The norm before clipping, 0-d float32 on the device of the gradients; the host never waits.

    Source: torch.nn.utils.clip_grad_norm_, the 1e-6 included.
    """
    norms = torch.stack(torch._foreach_norm(grads))
    total = norms.square().sum()
    if are_slices:
        world.sum_(total)
    norm = total.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
