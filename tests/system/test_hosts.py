"""Runs over two hosts of one machine, real torchrun and real Slurm: tests/system/cluster.py."""

import sys
from pathlib import Path

import pytest

from fsdp_qlora.errors import DONE
from tests import warm
from tests.system import cluster
from tests.test_kill_sweep import argv_of, result

pytestmark = pytest.mark.system
MEETING = ("--rdzv_backend=c10d", f"--rdzv_endpoint=host1:{cluster.PORT}", "--rdzv_id=7")
SRUN = ("srun", "--nodes=2", "--ntasks=2", sys.executable, *cluster.TRAIN)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a model, its tokenizer and rows, on the disk that all hosts share."""
    directory = tmp_path_factory.mktemp("hosts")
    warm.call(warm.make_model, directory)
    return directory


def test_two_hosts_come_to_what_one_host_comes_to(place: Path):
    """By torchrun static, by its rendezvous and by srun, bit for bit."""
    run = warm.start(argv_of(place, place / "one"), place)
    assert run.wait() == DONE, run.err
    with cluster.hosts(2) as hosts, cluster.slurm(hosts, place / "slurm") as slurm:
        for name, how in {"static": (), "rendezvous": MEETING}.items():
            argv = argv_of(place, place / name)
            ranks = cluster.torchrun(hosts, argv, place / f"{name}.out", how=how)
            assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[0].text + ranks[1].text
        srun = slurm.start([*SRUN, *argv_of(place, place / "srun")], place / "srun.out")
        assert srun.wait() == DONE, srun.text
    for name in ("static", "rendezvous", "srun"):
        assert result(place / name) == result(place / "one")
