"""Runs over two hosts of one machine, real torchrun and real Slurm: tests/system/cluster.py."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fsdp_qlora.errors import DONE
from tests import warm
from tests.system import cluster
from tests.test_kill_sweep import argv_of, result

pytestmark = pytest.mark.system
PORT = 29501
TRAIN = (sys.executable, "-m", "fsdp_qlora", "train")
STATIC = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=host1", f"--master_port={PORT}")
RENDEZVOUS = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a model, its tokenizer and rows, on the disk that all hosts share."""
    directory = tmp_path_factory.mktemp("hosts")
    warm.call(warm.make_model, directory)
    return directory


@pytest.fixture(scope="module")
def on_one_host(place: Path) -> dict[str, object]:
    """What six steps on two ranks of this machine come to."""
    run = warm.start(argv_of(place, place / "one"), place)
    assert run.wait() == DONE, run.err
    return result(place / "one")


def torchrun(
    hosts: Sequence[cluster.Host], how: Sequence[str], argv: Sequence[str], out: Path
) -> list[cluster.Process]:
    """Start a rank on each host; host N prints to `out` + N."""
    started = []
    for host in hosts:
        own = how if how is not STATIC else [*how, f"--node_rank={host.number - 1}"]
        started.append(host.torchrun(own, argv, out.with_name(f"{out.name}{host.number}")))
    return started


def test_two_hosts_come_to_what_one_host_comes_to(place: Path, on_one_host):
    """By torchrun static, by its rendezvous and by srun, bit for bit."""
    with cluster.hosts(2) as hosts:
        meeting = (*RENDEZVOUS, f"--rdzv_endpoint=host1:{PORT}")
        for name, how in {"static": STATIC, "rendezvous": meeting}.items():
            ranks = torchrun(hosts, how, argv_of(place, place / name), place / f"{name}.out")
            assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[0].text + ranks[1].text
            assert result(place / name) == on_one_host
        with cluster.slurm(hosts, place / "slurm") as slurm:
            step = ["srun", "--nodes=2", "--ntasks=2", *TRAIN, *argv_of(place, place / "srun")]
            srun = slurm.start(step, place / "srun.out")
            assert srun.wait() == DONE, srun.text
            assert result(place / "srun") == on_one_host
