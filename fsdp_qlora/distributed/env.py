"""Which processes make a run: how many ranks, how they are recognised, their environment."""

import os
import re
import socket
from collections.abc import Mapping

from fsdp_qlora.config import PROJECT_DIR, TrainConfig
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import count_gpus

LISTENER = "FSDP_QLORA_LISTENER"  # number of the open socket at which rank 0 meets the others
LOOPBACK = "lo"
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MASTER = ("MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


def plan_ranks(cfg: TrainConfig, num_gpus: int | None = None) -> int:
    """Return how many ranks this machine starts: one per GPU, or `world_size` on the CPU.

    Args:
        cfg: the run; `world_size` -1 means all GPUs, or one rank without a GPU.
        num_gpus: as counted before; None: to be counted.

    Raises:
        UserError: more ranks than GPUs.
    """
    num_gpus = count_gpus(os.environ) if num_gpus is None else num_gpus
    if cfg.world_size == -1:
        return max(num_gpus, 1)
    if num_gpus and cfg.world_size > num_gpus:
        rule = f"this machine has {num_gpus} GPU(s), a rank needs one"
        remedy = f"use --world_size {num_gpus}, or CUDA_VISIBLE_DEVICES= for the CPU"
        raise UserError(f"--world_size {cfg.world_size}", rule, remedy, ENVIRONMENT)
    return cfg.world_size


def is_rank(env: Mapping[str, str]) -> bool:
    """Return whether torchrun, or srun with several tasks, has started this process as a rank.

    In the batch script of a Slurm job SLURM_PROCID and SLURM_NTASKS are set although no other task
    runs; only a step of srun sets SLURM_STEP_NUM_TASKS.

    Args:
        env: the environment.
    """
    for name in (*NUMBERS, "MASTER_PORT", *SLURM):
        if not env.get(name, "0").isdecimal():
            remedy = "unset it, or start the ranks with torchrun or srun"
            raise UserError(f"{name}={env[name]}", "must be a whole number", remedy, ENVIRONMENT)
    if "RANK" in env and "WORLD_SIZE" in env:
        return True
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def is_supervised(env: Mapping[str, str]) -> bool:
    """Return whether `supervise` has started this process, so that it prints the errors."""
    return "FSDP_QLORA_SUPERVISOR" in env


def rank_env(env: Mapping[str, str], cfg: TrainConfig) -> dict[str, str]:
    """Return what a process that `is_rank` shall have in its environment.

    Args:
        env: the environment that torchrun, srun or `supervise` made.
        cfg: gives the port when the environment has none.

    Returns:
        The place of the rank: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
        MASTER_PORT; under srun the first host of the step is the master. And the settings of
        libraries that the user has not made.
    """
    if "RANK" in env:
        rank, size, local = env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", env["RANK"])
        local_size = env.get("LOCAL_WORLD_SIZE", size)
        host, port = "127.0.0.1", 29500
    else:
        rank, size = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        local = env.get("SLURM_LOCALID", rank)
        local_size = str(int(size) // int(env.get("SLURM_STEP_NUM_NODES", "1")))
        host = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        port = 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    address = env.get("MASTER_ADDR", host), env.get("MASTER_PORT", str(cfg.master_port or port))
    place = dict(zip(NUMBERS + MASTER, (rank, local, size, local_size, *address), strict=True))
    return place | wishes(env, int(local_size))


def wishes(env: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the settings of libraries that suit ranks, less those that `env` has already.

    Args:
        env: environment of the user.
        num_ranks: ranks on this machine.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    wanted = {
        "OMP_NUM_THREADS": str(max(num_cores // num_ranks, 1)),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "99",  # torch.profiler would tell of its own stages
    }
    if "PYTORCH_ALLOC_CONF" not in env:
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {name: text for name, text in wanted.items() if name not in env}


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: "node[03-05,7],gpu1" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^\[,]*))?", hosts)
    return "".join(part for part in match.groups() if part) if match else hosts


def find_port(wanted: int | None) -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on.

    Args:
        wanted: the port the user asked for; None or 0 for any.

    Raises:
        UserError: the wanted port is taken.
    """
    with open_listener(wanted) as probe:
        return probe.getsockname()[1]


def open_listener(wanted: int | None) -> socket.socket:
    """Return a socket that listens on 127.0.0.1 only: where ranks meet, from the start to the end.

    Args:
        wanted: the port the user asked for; None or 0 for any.

    Raises:
        UserError: the wanted port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", wanted or 0))
        listener.listen()
    except OSError as error:
        listener.close()
        got, remedy = f"--master_port {wanted}", "leave it out for a free one"
        raise UserError(got, f"is not free ({error.strerror})", remedy, ENVIRONMENT) from error
    return listener


def child_env(env: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of one rank; what the user has set stays.

    A rank imports the package from where this process has it, installed or not.

    Args:
        env: environment of the supervisor.
        rank: global and local rank.
        num_ranks: number of ranks.
        port: where the ranks meet on 127.0.0.1.
    """
    numbers = map(str, (rank, rank, num_ranks, num_ranks))
    place = dict(zip(NUMBERS + MASTER, (*numbers, "127.0.0.1", str(port)), strict=True))
    place["FSDP_QLORA_SUPERVISOR"] = str(os.getpid())
    if PROJECT_DIR.name not in ("site-packages", "dist-packages"):
        paths = [str(PROJECT_DIR), env.get("PYTHONPATH", "")]
        place["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # else they listen on the network
    has_loopback = LOOPBACK in (name for _, name in socket.if_nameindex())
    links = {name: LOOPBACK for name in names if has_loopback and name not in env}
    return dict(env) | wishes(env, num_ranks) | links | place
