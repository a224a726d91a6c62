"""Runs over two hosts of one machine, real torchrun and real Slurm: tests/system/cluster.py."""

import re
import signal
import sys
from pathlib import Path

import pytest

from fsdp_qlora import checkpoint_store
from fsdp_qlora.errors import DONE, SIGNALED
from tests import warm
from tests.system import cluster
from tests.test_kill_sweep import argv_of, result

pytestmark = pytest.mark.system
MEETING = ("--rdzv_backend=c10d", f"--rdzv_endpoint=host1:{cluster.PORT}", "--rdzv_id=7")
TRAIN = (sys.executable, "-m", "tests.faults")  # as train.py
SRUN = ("srun", "--nodes=2", "--kill-on-bad-exit=1")
LONG = ("--max_steps=40", "--num_epochs=99", "--save_every=30", "--resume=auto")


def test_two_hosts_come_to_what_one_host_comes_to(place: Path):
    """By torchrun static, by its rendezvous and by srun, bit for bit."""
    run = warm.start(argv_of(place, place / "one"), place)
    assert run.wait() == DONE, run.err
    with cluster.hosts(2) as hosts:
        for name, how in {"static": (), "rendezvous": MEETING}.items():
            argv = argv_of(place, place / name)
            ranks = cluster.torchrun(hosts, argv, place / f"{name}.out", how=how)
            assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[0].text + ranks[1].text
    for name in ("static", "rendezvous"):
        assert result(place / name) == result(place / "one")


def wait_for_steps(out: Path) -> None:
    """Until four steps are taken."""
    record = out / "metrics.jsonl"
    cluster.wait_until(lambda: record.is_file() and '"step": 4' in record.read_text(), "no step")


def batch(slurm: cluster.Slurm, place: Path, name: str, lines: str, *flags: str) -> str:
    """Submit a script of these lines; return the job's number."""
    script = place / f"{name}.sbatch"
    script.write_text(f"#!/bin/bash\n{lines}\n")
    more = ("--nodes=2", "--requeue", "--open-mode=append", f"--output={place / name}.out")
    return slurm.batch(script, *more, *flags)


def test_a_job_of_slurm_that_is_pre_empted_goes_on_bit_for_bit(place: Path):
    """Slurm sends SIGTERM twice within 16 ms, and starts the job again when there is room."""
    run = warm.start(argv_of(place, place / "whole", *LONG), place)
    assert run.wait() == DONE, run.err
    out = place / "low"
    with cluster.hosts(2) as hosts, cluster.slurm(hosts, place / "slurm") as slurm:
        words = [
            "FSDP_QLORA_FAULT=slow:0:pre-forward:5",
            *SRUN,
            *TRAIN,
            *argv_of(place, out, *LONG),
        ]
        low = batch(slurm, place, "low", " ".join(words))
        wait_for_steps(out)
        high = batch(slurm, place, "high", "sleep 2", "--partition=high", "--exclusive")
        slurm.wait(high, "RUNNING", "COMPLETED")
        assert 4 <= checkpoint_store.last_step(out) < 30
        assert slurm.wait(low, "COMPLETED")["Restarts"] == "1"
    assert f"stopped by SIGTERM; --resume {out} goes on" in (place / "low.out").read_text()
    assert result(out, 40) == result(place / "whole", 40)


def test_the_death_of_a_host_is_named_with_what_is_saved(place: Path):
    """torchrun is killed, and its rank with it. Power or link is lost: the heartbeat is missed."""
    with cluster.hosts(2) as hosts:
        for how in ("kill", "cut"):
            out = place / how
            argv = argv_of(place, out, *LONG, "--hang_timeout=20", "--save_every=2")
            near, far = cluster.torchrun(hosts, argv, place / f"{how}.out")
            wait_for_steps(out)
            hosts[1].cut() if how == "cut" else far.signal(signal.SIGKILL)
            near.wait(60)
            last = checkpoint_store.last_step(out)
            line = rf"error: host2 \(rank 1\): is gone.*; step {last} is saved; continue with"
            assert re.search(rf"{line} --resume {out}\n", near.text), near.text
            assert "traceback : error: host2" in near.text, near.text  # torchrun has it, too
            code, is_told = far.wait(60), "error: host1 (rank 0): is gone" in far.text
            assert is_told if how == "cut" else code == SIGNALED + signal.SIGKILL, far.text


def test_steps_of_a_job_stay_apart_may_be_uneven_and_end_when_one_task_fails(place: Path):
    """Two at once have a port each; -N2 -n3 is 2 and 1; a rank that fails takes its step along."""
    for name, size in {"two": 2, "three": 3}.items():
        run = warm.start(argv_of(place, place / name, f"--world_size={size}"), place)
        assert run.wait() == DONE, run.err
    steps = {"a": 2, "b": 2, "uneven": 3, "bad": 2}
    lines = [
        " ".join(
            [*SRUN, f"-n{n} --overlap", *TRAIN, *argv_of(place, place / name, f"--world_size={n}")]
        )
        for name, n in steps.items()
    ]
    lines[:2] = [f"{lines[0]} & {lines[1]} & wait"]
    lines[-1] = f"FSDP_QLORA_FAULT=exc:1:pre-forward:3 {lines[-1]}; echo code $?"
    with cluster.hosts(2) as hosts, cluster.slurm(hosts, place / "slurm2") as slurm:
        job = batch(slurm, place, "steps", "\n".join(lines), "--ntasks=4")
        slurm.wait(job, "COMPLETED", "FAILED", timeout_s=400)
    text = (place / "steps.out").read_text()
    assert result(place / "a") == result(place / "b") == result(place / "two"), text
    assert result(place / "uneven") == result(place / "three"), text
    assert "fault made on purpose" in text and re.search(r"code (4|143)\n$", text), text
