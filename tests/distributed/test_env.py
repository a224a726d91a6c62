"""Which processes make a run: fsdp_qlora/distributed/env.py."""

import sys

import pytest

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import env
from fsdp_qlora.errors import ENVIRONMENT, UserError
from tests import fake_nvml


def test_ranks_are_planned_by_the_gpus(monkeypatch: pytest.MonkeyPatch):
    """One per GPU by default, never more; on the CPU as many as asked for."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setenv("FAKE_GPUS", fake_nvml.gpus("NVIDIA A", "NVIDIA B"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert env.plan_ranks(TrainConfig()) == 2
    assert env.plan_ranks(TrainConfig(world_size=1)) == 1
    with pytest.raises(UserError, match="has 2 GPU") as caught:
        env.plan_ranks(TrainConfig(world_size=4))
    assert caught.value.code == ENVIRONMENT
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [env.plan_ranks(TrainConfig(world_size=n)) for n in (-1, 1, 4)] == [1, 1, 4]


def test_ranks_of_torchrun_and_srun_are_recognised():
    """The batch script of a Slurm job has SLURM_PROCID and SLURM_NTASKS too, but is no rank."""
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    torchrun |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "70007"}
    step = batch | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    step["SLURM_STEP_NUM_NODES"] = "2"
    step["SLURM_STEP_NODELIST"] = "node[03-05,9],gpu1"
    assert env.is_rank(torchrun) and env.is_rank(step)
    assert not env.is_rank({}) and not env.is_rank(batch)
    assert not env.is_rank(step | {"SLURM_STEP_NUM_TASKS": "1"})
    found = env.rank_env(torchrun, TrainConfig())
    assert torchrun.items() <= found.items() and found["LOCAL_WORLD_SIZE"] == "4"
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node03"}
    place |= {"MASTER_PORT": "30007", "LOCAL_WORLD_SIZE": "2"}
    assert place.items() <= env.rank_env(step, TrainConfig()).items()
    assert env.rank_env(step, TrainConfig(master_port=99))["MASTER_PORT"] == "99"


def test_settings_of_libraries_are_wishes_the_user_may_overrule():
    """The ranks of torchrun get them as ours do."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "9"}
    found = env.rank_env(torchrun, TrainConfig())
    assert "OMP_NUM_THREADS" not in found and found["OMP_WAIT_POLICY"] == "passive"
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    found = env.rank_env(torchrun | {"PYTORCH_ALLOC_CONF": "x"}, TrainConfig())
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[07,9],m", "n07"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str):
    """Ranges, lists, leading zeros and suffixes."""
    assert env.first_host(hosts) == first
