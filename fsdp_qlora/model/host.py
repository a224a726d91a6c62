"""Host memory that GPUs copy from: a rank's own, or one copy for all ranks of a machine.

`torch.pin_memory` rounds every block to a power of two; registering a mapping does not.
"""

import mmap
import os
import weakref

import torch

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.hardware import GIB


class HostBytes:
    """One block of host memory, pinned at its exact size where there is a GPU.

    Attributes:
        bytes: uint8 [nbytes].
        pinned_bytes: nbytes, or 0.
    """

    def __init__(self, mapping: mmap.mmap, pin: bool) -> None:
        """Take over a mapping.

        Args:
            mapping: the memory; it lives as long as `bytes` or a view of it.
            pin: page-lock it.

        Raises:
            UserError: it cannot be pinned (code 3).
        """
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self.pinned_bytes = len(mapping) if pin else 0
        if not pin:
            return
        cudart, address = torch.cuda.cudart(), self.bytes.data_ptr()
        if int(cudart.cudaHostRegister(address, len(mapping), 0)):
            raise UserError(
                f"{len(mapping) / GIB:.1f} GiB of host memory could not be pinned",
                "offloaded weights are copied to the GPU from pinned memory",
                "raise the limit (ulimit -l unlimited) or free host memory; "
                "or --use_cpu_offload false",
                code=3,
            )
        # The driver must forget the pages before another mapping gets their address.
        release = weakref.finalize(mapping, cudart.cudaHostUnregister, address)
        release.atexit = False


def private(nbytes: int, pin: bool) -> HostBytes:
    """Memory of this process alone.

    Args:
        nbytes: its size.
        pin: page-lock it.
    """
    return HostBytes(mmap.mmap(-1, nbytes), pin)


def shared(nbytes: int, pin: bool, world: World) -> HostBytes | str:
    """Memory that all ranks of one machine see.

    It has no name anywhere (Linux: memfd), so that nothing is left behind however the ranks end,
    and no limit of /dev/shm applies, only that of the machine or container.

    Args:
        nbytes: its size.
        pin: page-lock it, each rank for itself.
        world: the ranks, on one machine; all must call.

    Returns:
        The memory; or why there is none, the same on every rank.
    """
    memory: HostBytes | None = None
    refusal, fd, place = "", -1, ""
    try:
        if world.rank == 0:
            fd = os.memfd_create("fsdp_qlora")
            os.ftruncate(fd, nbytes)
            place = f"/proc/{os.getpid()}/fd/{fd}"
    except (OSError, AttributeError) as error:
        refusal = f"no shared memory: {error}"
    place = world.gather_objects(place)[0]
    try:
        if world.rank != 0 and place:
            fd = os.open(place, os.O_RDWR)
        if fd >= 0 and place:
            memory = HostBytes(mmap.mmap(fd, nbytes), pin)
    except OSError as error:
        refusal = f"rank {world.rank} cannot map the memory of rank 0: {error}"
    except UserError as error:
        refusal = error.got
    refusals = [text for text in world.gather_objects(refusal) if text]  # all have opened it now
    if fd >= 0:
        os.close(fd)
    if refusals:
        return refusals[0]
    assert memory is not None
    return memory
