"""Hosts with disks of their own meet, agree and go on: fsdp_qlora/distributed/meeting.py."""

import sys
from pathlib import Path

import pytest

from fsdp_qlora.errors import DONE
from tests import warm
from tests.system import cluster
from tests.test_kill_sweep import argv_of, result

pytestmark = pytest.mark.system
STEP = ("srun", "--nodes=2", "--ntasks=2", "--overlap", sys.executable, *cluster.TRAIN)


def test_hosts_without_a_shared_disk(place: Path):
    """Debian calls each host 127.0.1.1, the first dies, both go on."""
    run = warm.start(argv_of(place, place / "one"), place)
    assert run.wait() == DONE, run.err
    own = place / "own"
    argv = argv_of(place, own / "run", f"--quant_cache={own / 'q'}", f"--token_cache={own / 't'}")
    with cluster.hosts(2) as hosts:
        for host in hosts:
            names = Path(f"/etc/netns/h{host.number}/hosts")
            names.write_text(f"127.0.1.1 {host.name}\n{names.read_text()}")
        more = {"own": [own]}
        killed = cluster.torchrun(hosts, argv, place / "killed", **more)
        killed[0].wait_for("step 3/")
        killed[0].kill()
        assert killed[1].wait() != DONE
        ranks = cluster.torchrun(hosts, [*argv, "--resume=auto"], place / "resumed", **more)
        assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[0].text + ranks[1].text
        first, second = (place / f"own.{host.name}" / "run" for host in hosts)
        assert result(first) == result(place / "one")
        assert {path.name for path in second.rglob("*")} <= {"logs", "rank1.log"}


def test_two_steps_of_a_job_are_two_runs(place: Path):
    """They share hosts and names; each comes to what it comes to alone."""
    with cluster.hosts(2) as hosts, cluster.slurm(hosts, place / "slurm") as slurm:
        script = place / "job.sh"
        lines = ["#!/bin/bash"]
        for name in ("left", "right"):
            argv = argv_of(place, place / name, f"--quant_cache={place / name}.cache")
            lines.append(f"{' '.join([*STEP, *argv])} > {place / name}.out 2>&1 &")
        script.write_text("\n".join([*lines, "wait"]))
        batch = ["sbatch", "--wait", "--nodes=2", "--ntasks=4", f"--output={place}/job.out", script]
        assert slurm.start(batch, place / "sbatch.out").wait() == DONE
    texts = [(place / f"{name}.out").read_text() for name in ("left", "right")]
    assert result(place / "left") == result(place / "right"), texts
