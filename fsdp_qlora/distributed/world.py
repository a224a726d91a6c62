"""The ranks: who they are, and every collective outside FSDP."""

import atexit
import dataclasses
import datetime
import functools
import gc
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug
from torch.utils import deterministic

from fsdp_qlora.distributed import exit_report, meeting
from fsdp_qlora.distributed.hooks import LISTENER, Peers, is_supervised
from fsdp_qlora.errors import ENVIRONMENT, RUN_FAILED, UserError

# In what torch says when a rank has left.
LINK_WORDS, GLOO_LINK = ("gloo", "NCCL", "onnection"), "GLOO_SOCKET_IFNAME"
T = TypeVar("T")
Met = meeting.Meeting | None

MACHINE_NUMBERS = ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK")  # of torchrun, srun, Ray


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the ranks.

    Attributes:
        rank, size: this process's number, and how many there are, on all machines.
        local_rank, local_size: the same on this machine.
        device: where this rank computes.
        meeting: where they have met; None in a process group of the caller's.
        neighbors: the ranks of this machine, if `find_neighbors` has looked.
        context: the ranks that share the tokens of this one's rows, numbered among themselves, see
            `split`; None: it has whole rows.
        group: torch's process group; None: the one of all ranks.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    meeting: Met = None
    neighbors: tuple[int, ...] = ()
    context: "World | None" = None
    group: Any = None

    @property
    def peers(self) -> Sequence[int]:
        """The ranks of this machine, this one included; the first acts for the machine."""
        first = self.rank - self.local_rank  # where nobody has looked: machine by machine
        return self.neighbors or range(first, first + self.local_size)

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
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather_objects(self, value: object) -> list:
        """Gather small host objects; no device is involved.

        Args:
            value: of this rank, picklable.

        Returns:
            Every rank's value, by rank.
        """
        every: list = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def first(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 for all; every rank must call.

        Args:
            work: its result is picklable.

        Returns:
            What it returned there.

        Raises:
            UserError: as it was raised there; on every rank.
        """
        return self.gather_objects(self.each(lambda: work() if self.rank == 0 else None))[0]

    def each(self, work: Callable[[], T]) -> T:
        """Do work on every rank, and go on only if all could do it.

        Args:
            work: each rank's own.

        Returns:
            What it returned on this rank.

        Raises:
            UserError: raised on one rank, on every rank.
        """
        found, own = None, None
        try:
            found = work()
        except UserError as error:
            own = error
        for rank, fault in enumerate(self.gather_objects(own)):
            if fault is not None:
                got = f"rank {rank}: {fault.got}"
                raise own or UserError(got, fault.rule, fault.remedy, fault.code)
        return found  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on unless all ranks say the same; all must call.

        Args:
            facts: of this rank by name, picklable.

        Raises:
            UserError: they differ, see `meeting.compare`; raised on every rank.
        """
        hosts, every = zip(*self.gather_objects((socket.gethostname(), facts)), strict=True)
        meeting.compare(every, hosts)

    def from_first(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Send a tensor from rank 0 to all ranks.

        Args:
            tensor: on the host of rank 0; elsewhere it is not looked at.

        Returns:
            The same on every rank.
        """
        shape, dtype = self.first(lambda: (tensor.shape, tensor.dtype))  # type: ignore[union-attr]
        whole = tensor if self.rank == 0 and tensor is not None else torch.empty(shape, dtype=dtype)
        dist.broadcast(whole.reshape(-1).view(torch.uint8), 0)
        return whole

    def exchange(self, slices: torch.Tensor) -> torch.Tensor:
        """Send each rank of this machine its slice; nothing crosses to other machines.

        Args:
            slices: [local_size, n], contiguous; `n` is the same on all ranks, which all must call.

        Returns:
            [local_size, n]: this rank's slice of every one of `peers`.
        """
        received = torch.empty_like(slices)
        sizes = [slices.shape[1] * (rank in self.peers) for rank in range(self.size)]
        dist.all_to_all_single(received.view(-1), slices.view(-1), sizes, sizes)
        return received

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
        gather(received, flat, group=self.group)
        return received.view(self.size, -1)

    def sum_slices(self, slices: torch.Tensor) -> torch.Tensor:
        """Sum slices over ranks, and keep one.

        Args:
            slices: [size, n] on every rank, contiguous.

        Returns:
            [n], the sum of this rank's slices.
        """
        own = torch.empty_like(slices[0])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, slices.view(-1), group=self.group)
        return own

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)


def of_process_group() -> World | None:
    """Return this process among the ranks of the process group that it is in.

    Returns:
        None where there is no group yet; on this machine it is LOCAL_RANK, else its rank.

    Raises:
        UserError: the group has no backend for tensors on the host (code 3).
    """
    if not dist.is_initialized():
        return None
    rank, size = dist.get_rank(), dist.get_world_size()
    backends = dist.get_backend_config()
    if "cpu" not in backends and "gloo" not in backends:
        got = f"the process group's backends are {backends}"
        rule = "numbers of the host are exchanged too"
        raise UserError(got, rule, 'init_process_group("cpu:gloo,cuda:nccl")', ENVIRONMENT)
    local = int(os.environ.get("LOCAL_RANK", rank))
    return World(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)), _device(local))


def find_neighbors(world: World) -> World:
    """Find out which ranks are on which machine: they need not be numbered machine by machine.

    A machine is what the launcher numbers as one (torchrun, srun, Ray), else a host by its name.

    Args:
        world: the ranks; all must call.

    Returns:
        The same, `neighbors`, `local_rank` and `local_size` as they are.
    """
    names = (os.environ[name] for name in MACHINE_NUMBERS if name in os.environ)
    machines = world.gather_objects(next(names, os.uname().nodename))
    peers = tuple(rank for rank in range(world.size) if machines[rank] == machines[world.rank])
    number, num = peers.index(world.rank), len(peers)
    return dataclasses.replace(world, neighbors=peers, local_rank=number, local_size=num)


def split(world: World, num: int) -> World:
    """Let neighbouring ranks share the tokens of their rows.

    Args:
        world: the ranks; all must call.
        num: of the ranks that share; `world.size` is a multiple of it.

    Returns:
        The same with `context`, where there is more than one.
    """
    if num == 1:
        return world
    group = None if num == world.size else dist.new_subgroups(num)[0]
    context = dataclasses.replace(world, rank=world.rank % num, size=num, group=group)
    return dataclasses.replace(world, context=context)


def _device(local_rank: int) -> torch.device:
    """This rank's; srun --gpus-per-task=1 shows each rank one, whatever its LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def meet() -> meeting.Meeting:
    """Wait until all ranks have met where MASTER_ADDR and MASTER_PORT say.

    Raises:
        UserError: the others have not come, or are of another run (code 3), or one has failed.
    """
    place = _open_meeting(meeting.MEETING_S)
    try:
        place.hold(_say)
    except UserError as error:
        with suppress(UserError, RuntimeError):
            place.tell_failure(str(error), error.code, lingers=False)
        raise
    except RuntimeError as error:  # the store is gone
        rule, remedy = "has left before all ranks were there", "see what it has printed"
        raise UserError("rank 0", rule, remedy, RUN_FAILED) from error
    return place


def join(place: Met = None, timeout_s: float = 1800.0) -> World:
    """Join the process group named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Uses NCCL for tensors on GPUs and gloo for tensors on the host, both in one group: host numbers
    (token counts, memory records) never wait for the device. From here on libraries keep to
    themselves what they deprecate, unless Python was started with -W or PYTHONWARNINGS.

    Args:
        place: where the ranks have met; None: they have not yet.
        timeout_s: after which a collective fails.

    Returns:
        This process among the ranks.

    Raises:
        UserError: see `meet`; or their devices differ.
    """
    # FSDP and transformers call each other's deprecated names.
    for kind in () if sys.warnoptions else (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, place = _device(int(os.environ["LOCAL_RANK"])), place or meet()
    own_device = device if device.type == "cuda" else None
    backend = "gloo" if own_device is None else "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout_s)
    if GLOO_LINK not in os.environ and (link := place.link()):
        os.environ[GLOO_LINK] = link  # gloo asks for the host's name, in Debian 127.0.1.1
    store = dist.PrefixStore(f"group {place.round}", place.store)
    _leave_at_exit()
    dist.init_process_group(backend, None, limit, size, rank, store, device_id=own_device)
    world = of_process_group()
    assert world is not None
    world = dataclasses.replace(world, meeting=place)
    world.agree({"device": device.type})
    if own_device is not None and size > 1:
        check_links(world)
    return world


def _open_meeting(limit_s: float) -> meeting.Meeting:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_owner = rank == 0 and os.environ.get(meeting.AGENT_STORE) != "True"
    more: dict[str, Any] = {"multi_tenant": True}
    if LISTENER in os.environ:  # torch would listen on all addresses, on a port that may be taken
        more = {"master_listen_fd": int(os.environ[LISTENER]) if is_owner else None}
    if not is_owner:
        meeting.await_server(host, port, limit_s, _say)
    limit = datetime.timedelta(seconds=meeting.MEETING_S)
    try:
        store = dist.TCPStore(host, port, None, is_owner, limit, wait_for_workers=False, **more)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        rule = f"the ranks cannot meet there ({reason[-100:]})"
        remedy = "give another --master_port or MASTER_PORT"
        raise UserError(f"{host}:{port}", rule, remedy, ENVIRONMENT) from error
    return meeting.Meeting(dist.PrefixStore("fsdp_qlora", store), rank, size, f"{host}:{port}")


def _say(line: str) -> None:
    if os.environ["LOCAL_RANK"] == "0":
        print(line, flush=True)


def tell(error: UserError) -> None:
    """Let the other ranks know that this one fails before it has met them.

    Args:
        error: what ends it.
    """
    with suppress(UserError, RuntimeError):
        _open_meeting(meeting.LINGER_S).tell_failure(str(error), error.code, lingers=True)


def explain(error: Exception, place: Met, peers: Peers | None = None) -> Exception:
    """Let the other ranks know that this one fails; without a supervisor nobody else would.

    Args:
        error: what ends it.
        place: where the ranks have met; None: nowhere.
        peers: ends this process where a rank is gone, and the error follows from that.

    Returns:
        What to show: the word of a rank whose failure has caused this one, else the error.
    """
    if is_supervised() or place is None:
        return error
    is_own = isinstance(error, UserError)
    try:
        if not is_own:
            place.heed_failure()
    except UserError as cause:
        return cause
    except RuntimeError:  # the store is gone
        pass
    if peers is not None and any(word in str(error) for word in LINK_WORDS):
        peers.hurry()
    with suppress(UserError, RuntimeError):
        code = error.code if isinstance(error, UserError) else RUN_FAILED
        place.tell_failure(str(error) if is_own else repr(error), code, lingers=False)
    return error


def configure(world: World, budget_gib: float | None, seed: int, is_exact: bool = False) -> None:
    """Prepare this process for a run.

    Args:
        world: this process among the ranks.
        budget_gib: cap of this rank's allocator, GiB.
        seed: of dropout, different on every rank; adapters and data have their own generators.
        is_exact: let every kernel sum in the same order each time; on GPUs the backward
            passes of attention do not by themselves, CPU ranks always do.
    """
    device = world.device
    torch.manual_seed(seed + world.rank)
    if is_exact:
        torch.use_deterministic_algorithms(True)  # warn_only would leave attention as it is
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # never read
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers, for flash-attn
    if device.type == "cuda" and budget_gib is not None:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_gib * 2**30 / total_bytes, 1.0))


def check_links(world: World, timeout_s: float = 20.0) -> None:
    """Sum a megabyte over the ranks and look at the result.

    Between some consumer GPUs peer-to-peer copies are offered and do not work: the first
    collective hangs, or gives wrong numbers.

    Args:
        world: the ranks; all must call.
        timeout_s: for the answer.

    Raises:
        LinkError: there is none, or it is wrong.
    """
    numbers = torch.full((2**18,), float(world.rank + 1), device=world.device)
    work, limit_s = dist.all_reduce(numbers, async_op=True), time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > limit_s:
            raise exit_report.LinkError(f"no answer from the other ranks in {timeout_s:.0f} s")
        time.sleep(0.001)
    work.wait()
    if not bool((numbers == world.size * (world.size + 1) / 2).all()):
        raise exit_report.LinkError("numbers arrive wrong at the other ranks")


def leave() -> None:
    """Leave the process group, whose threads end if no model is left.

    One that is at work while the interpreter ends would abort it.

    Source: https://github.com/pytorch/pytorch/issues/190489.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    with suppress(AttributeError):  # a private name: this cache keeps meshes, and they the group
        debug._clear_sharding_prop_cache()
    gc.collect()


_leave_at_exit = functools.cache(functools.partial(atexit.register, leave))  # once a process
