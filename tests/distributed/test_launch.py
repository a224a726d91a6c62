"""Ranks are started, watched and ended together: fsdp_qlora/distributed/launch.py.

The ranks are tiny scripts without torch; `supervise` is run as a user runs it, in a process.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fsdp_qlora import config, hardware
from fsdp_qlora.config import PROJECT_DIR, TrainConfig
from fsdp_qlora.distributed import hooks, launch
from fsdp_qlora.errors import ENVIRONMENT, INPUT, UserError
from fsdp_qlora.planning import fit
from fsdp_qlora.planning.sizes import setting_for
from tests import fake_nvml

PIPE = subprocess.PIPE
START = """
import dataclasses, sys
from fsdp_qlora.config import parse
from fsdp_qlora.distributed import launch
script, argv = sys.argv[1], sys.argv[2:]

def start(spec):
    command = [sys.executable, script, *spec.command[len(launch.PROGRAM) :]]
    return launch.start(spec._replace(command=command))
"""
PARENT = f"""{START}
from fsdp_qlora.errors import UserError
try:
    sys.exit(launch.supervise(launch.Attempt(parse(argv), argv, start=start)))
except UserError as fault:
    print(f"error: {{fault}}", file=sys.stderr)
    sys.exit(fault.code)
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {project!r})
from fsdp_qlora.distributed import exit_report, hooks
from tests import faults
faults.install()
rank = int(os.environ["RANK"])
out = Path([word for word in sys.argv if word.startswith("--output_dir=")][-1].split("=", 1)[1])
(out / f"pid{{rank}}").write_text(str(os.getpid()))
def meet():
    while len(list(out.glob("pid*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    time.sleep(0.05)
def write_error(out, *found, **more):
    exit_report.write_error(out, exit_report.RankError(*found, **more))
def wait_for_the_end_of(pid):
    stat = Path("/proc") / pid / "stat"
    while stat.exists() and ") Z" not in stat.read_text():
        time.sleep(0.001)
def stop_cleanly():
    def stop(number, frame):
        with open(out / f"stop{{rank}}", "a") as file:
            file.write(f"{{number}} ")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
{body}
hooks.beat(hooks.DONE, rank)
"""


def start(
    tmp_path: Path, body: str, *argv: str, num_ranks: int = 2, stdout: int = PIPE, **env: str
):
    """Start a supervisor on the CPU whose ranks all run `body`."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(project=str(PROJECT_DIR), body=body))
    command = [sys.executable, "-c", PARENT, str(script), *argv]
    command += ["--world_size", str(num_ranks), "--output_dir", str(tmp_path / "out")]
    ours = ("OMP_", "PYTORCH_", "TOKENIZERS_")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    env = clean | {"CUDA_VISIBLE_DEVICES": ""} | env
    streams = {"stdout": stdout, "stderr": PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=PROJECT_DIR, **streams)


def run(tmp_path: Path, body: str, *argv: str, num_ranks: int = 2, **env: str):
    """Return exit code, stdout and stderr of a supervised run."""
    parent = start(tmp_path, body, *argv, num_ranks=num_ranks, **env)
    out, err = parent.communicate(timeout=60)
    return parent.returncode, out, err


def wait_for_ranks(tmp_path: Path, name: str = "pid") -> list[int]:
    """Return the process ids of both ranks, once each has written a file of this name."""
    paths = [tmp_path / "out" / f"{kind}{rank}" for rank in (0, 1) for kind in (name, "pid")]
    limit_s = time.monotonic() + 30
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < limit_s
        time.sleep(0.01)
    return [int(path.read_text()) for path in paths[1::2]]


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_rank_gets_its_place_and_the_argv_and_only_rank_0_speaks(tmp_path: Path):
    """Values the user has set stay; rank 0 speaks on both streams, the others in their files."""
    names = [*launch.NUMBERS, "MASTER_ADDR", "OMP_NUM_THREADS"]
    names += ["OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF"]
    body = f"print(*[os.environ[name] for name in {names}], sys.argv[1:3], flush=True)"
    body += "\nprint('err', rank, file=sys.stderr)"
    code, out, err = run(tmp_path, body, "--seed", "7", OMP_WAIT_POLICY="active")
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    rest = f"2 2 127.0.0.1 {threads} active false expandable_segments:True ['--seed', '7']\n"
    assert (code, out, err) == (0, "0 0 " + rest, "err 0\n")
    assert (tmp_path / "out/logs/rank1.log").read_text() == "1 1 " + rest + "err 1\n"


def test_a_failed_rank_gives_its_line_and_code_and_ends_the_others(tmp_path: Path):
    """The first word counts, not what the peers say of the lost connection."""
    body = """
meet()
if rank == 1:
    write_error(out, rank, 5, "weights: broken;\\nfetch again")
    sys.exit(5)
while not (out / "logs/rank1.error").exists(): time.sleep(0.01)
write_error(out, rank, 4, "connection closed by peer")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
    (tmp_path / "out").mkdir()  # else it would be removed again
    code, out, err = run(tmp_path, body)
    assert (code, out, err) == (5, "", "error: weights: broken;\\nfetch again\n")
    word = tmp_path / "out" / "logs" / "rank1.error"
    assert time.time() - word.stat().st_mtime < 20  # 4 of grace; it would sleep for 60
    assert not any(map(is_alive, wait_for_ranks(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, number: signal.Signals):
    """Also when a peer notices first and leaves word of it."""
    body = f"""
meet()
if rank == 1: os.kill(os.getpid(), {int(number)})
wait_for_the_end_of((out / "pid1").read_text())
write_error(out, rank, 4, "connection closed by peer")
sys.exit(4)
"""
    code, _, err = run(tmp_path, body)
    assert code == 4 and err.count("\n") == 1
    assert err.startswith(f"error: rank 1: was killed by {number.name} before it had begun; ")


def test_a_fault_of_the_input_wins_over_a_crash_it_causes(tmp_path: Path):
    """Peers of a rank that leaves may be torn down by a signal."""
    body = """
meet()
if rank == 0:
    write_error(out, rank, 2, "data.jsonl:3: bad; repair it")
    sys.exit(2)
while not (out / "logs/rank0.error").exists(): time.sleep(0.001)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    code, _, err = run(tmp_path, body)
    assert (code, err) == (2, "error: data.jsonl:3: bad; repair it\n")


def test_a_rank_that_leaves_no_word_is_named_with_its_log(tmp_path: Path):
    """An early death must not look like success."""
    code, out, err = run(tmp_path, "meet(); sys.exit(9 if rank == 1 else time.sleep(60))")
    assert (code, out) == (9, "")
    line = "error: rank 1: ended with code 9 before it had begun; see"
    assert err == f"{line} {tmp_path}/out/logs/rank1.log\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_is_passed_on_once(tmp_path: Path, number: signal.Signals, code: int):
    """The ranks finish in their own time; one of them later than the grace for failures."""
    body = """
stop_cleanly()
time.sleep(0.1)
(out / f"ready{rank}").write_text("now")
try: time.sleep(60)
finally: time.sleep(5 * rank); (out / f"saved{rank}").touch()
"""
    parent = start(tmp_path, body)
    wait_for_ranks(tmp_path, "ready")
    parent.send_signal(number)
    err = parent.communicate(timeout=30)[1]
    assert (
        parent.returncode == code
        and err == f"stopped by {number.name}; what was recorded is in {tmp_path}/out\n"
    )
    for rank in range(2):
        assert (tmp_path / f"out/stop{rank}").read_text() == f"{int(number)} "
        assert (tmp_path / f"out/saved{rank}").exists()


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path):
    """A user who presses Ctrl-C again does not wait; signals sent together are one."""
    body = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
(out / f"deaf{rank}").write_text("now")
time.sleep(60)
"""
    parent = start(tmp_path, body)
    pids = wait_for_ranks(tmp_path, "deaf")
    for _ in range(2):  # as Slurm does
        parent.send_signal(signal.SIGINT)
        time.sleep(0.3)
    time.sleep(1.5 * hooks.BURST_S)  # as the supervisor hears them
    assert all(map(is_alive, pids))
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=30)
    assert parent.returncode == 130 and not any(map(is_alive, pids))


def test_a_rank_that_waits_for_one_that_has_stopped_is_ended(tmp_path: Path):
    """On a card it would hang in a collective that its peer has left."""
    body = """
if rank == 0: stop_cleanly()
else: signal.signal(signal.SIGINT, signal.SIG_IGN)
(out / f"ready{rank}").write_text("now")
time.sleep(60)
"""
    parent = start(tmp_path, body)
    pids = wait_for_ranks(tmp_path, "ready")
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=30)  # 10 of grace
    assert (parent.returncode, err.count("\n")) == (130, 1)
    assert err.startswith("stopped by SIGINT; ") and not any(map(is_alive, pids))


def test_ranks_do_not_outlive_a_killed_supervisor(tmp_path: Path):
    """kill -9 of the parent leaves no orphan."""
    parent = start(tmp_path, "time.sleep(60)")
    pids = wait_for_ranks(tmp_path)
    assert all(map(is_alive, pids))
    parent.kill()
    parent.communicate(timeout=30)
    limit_s = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < limit_s:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_a_run_of_which_nothing_came_takes_only_its_own_files_along(tmp_path: Path):
    """A cache in a new output directory stays when the run is refused."""
    body = "write_error(out, rank, 2, 'bad; repair it')\nsys.exit(2)"
    assert run(tmp_path, body)[0] == INPUT
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} <= {"pid0", "pid1"} and list(out.iterdir())


def test_a_free_port_is_another_than_one_in_use():
    """Only a port the user asked for can be taken, see bad_input/environment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.find_port(0) != port
    assert launch.find_port(port) == port


@dataclasses.dataclass
class FakeWorld:
    """A rank whose peers have said what `words` says."""

    rank: int
    words: list
    meeting: None = None

    def gather_objects(self, word: object) -> list:
        """Rank 0 speaks, the others hear what it has said."""
        self.words += [] if self.rank else [word]
        return self.words

    def first(self, work) -> object:
        """What rank 0 has made."""
        try:
            word = None if self.rank else work()
        except UserError as fault:
            word = fault
        (first,) = self.gather_objects(word)
        if isinstance(first, UserError):
            raise first
        return first


def test_ranks_of_torchrun_settle_on_the_directory_of_rank_0(tmp_path: Path, monkeypatch):
    """Their clocks may differ by a second; a directory that cannot be used ends all of them."""
    monkeypatch.delenv("FSDP_QLORA_SUPERVISOR", raising=False)
    words: list = []
    mine = [TrainConfig(output_dir=str(tmp_path / name), seed=7) for name in ("run-01", "run-02")]
    agreed = [launch.agree_output_dir(cfg, FakeWorld(rank, words)) for rank, cfg in enumerate(mine)]
    assert agreed == [mine[0], mine[0]]
    assert {path.name for path in tmp_path.rglob("*")} == {"run-01", "logs", ".lock"}
    words.clear()
    for rank in (0, 1):
        with pytest.raises(UserError, match="run-01: holds files already"):
            launch.agree_output_dir(mine[0], FakeWorld(rank, words))
    monkeypatch.setenv("FSDP_QLORA_SUPERVISOR", "1")
    assert launch.agree_output_dir(mine[1], FakeWorld(1, [])) is mine[1]


def test_ranks_are_planned_by_the_gpus(monkeypatch: pytest.MonkeyPatch):
    """One per GPU by default, never more; on the CPU as many as asked for."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setenv("FAKE_GPUS", fake_nvml.gpus("NVIDIA A", "NVIDIA B"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.plan_ranks(TrainConfig()) == 2
    assert launch.plan_ranks(TrainConfig(world_size=1)) == 1
    with pytest.raises(UserError, match="has 2 GPU") as caught:
        launch.plan_ranks(TrainConfig(world_size=4))
    assert caught.value.code == ENVIRONMENT
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [launch.plan_ranks(TrainConfig(world_size=n)) for n in (-1, 1, 4)] == [1, 1, 4]


def test_ranks_of_torchrun_and_srun_are_recognised():
    """The batch script of a Slurm job has SLURM_PROCID and SLURM_NTASKS too, but is no rank."""
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1"}
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "70007"}
    step = batch | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2),1", "SLURM_NODEID": "2"}
    step |= {"SLURM_STEP_NODELIST": "node[03-05,9],gpu1", "SLURM_STEP_ID": "0"}
    assert launch.is_rank(torchrun) and launch.is_rank(step)
    assert not launch.is_rank({}) and not launch.is_rank(batch)
    assert not launch.is_rank(step | {"SLURM_STEP_NUM_TASKS": "1"})
    for env, size in ((torchrun, 4), (torchrun | {"LOCAL_WORLD_SIZE": "2"}, 2), (step, 9)):
        assert launch.is_rank(env, size)
    assert launch.is_rank(torchrun | {"TORCHELASTIC_RUN_ID": "none"}, 9)
    with pytest.raises(UserError, match=r"--world_size 2: RANK and WORLD_SIZE=1 in .*; unset RANK"):
        launch.is_rank({"RANK": "0", "WORLD_SIZE": "1"}, 2)  # left from something else
    found = launch.rank_env(torchrun, TrainConfig())
    assert torchrun.items() <= found.items() and found["LOCAL_WORLD_SIZE"] == "4"
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node03"}
    place |= {"MASTER_PORT": "30007", "LOCAL_WORLD_SIZE": "2"}
    found = launch.rank_env(step, TrainConfig())
    assert place.items() <= found.items()
    again = launch.rank_env(step | found, TrainConfig())  # in the rank itself
    assert again.items() <= found.items() and again["FSDP_QLORA_RUN"] == "step 70007.0 of Slurm"
    other = launch.rank_env(step | {"SLURM_STEP_ID": "1"}, TrainConfig())
    assert all(other[name] != found[name] for name in ("MASTER_PORT", "FSDP_QLORA_RUN"))
    nodes = [launch.rank_env(step | {"SLURM_NODEID": n}, TrainConfig()) for n in "0123"]
    assert [env["LOCAL_WORLD_SIZE"] for env in nodes] == ["1", "2", "2", "1"]
    assert launch.rank_env(step, TrainConfig(master_port=99))["MASTER_PORT"] == "99"


def test_settings_of_libraries_are_wishes_the_user_may_overrule():
    """The ranks of torchrun get them as ours do."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "9"}
    found = launch.rank_env(torchrun, TrainConfig())
    assert "OMP_NUM_THREADS" not in found and found["OMP_WAIT_POLICY"] == "passive"
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    found = launch.rank_env(torchrun | {"PYTORCH_ALLOC_CONF": "x"}, TrainConfig())
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found


def test_first_host_of_a_slurm_list():
    """Ranges, lists, leading zeros and suffixes."""
    lists = {"a": "a", "a,b": "a", "n[1-3]": "n1", "n[07,9],m": "n07", "r[1-2]-ib,x": "r1-ib"}
    assert {hosts: launch.first_host(hosts) for hosts in lists} == lists


def test_what_is_chosen_fits_the_machine_with_the_least(monkeypatch):
    """Of two with unlike GPUs and hosts; the global batch stays, the link of 10 Gbit/s counts."""
    argv = ["--model_name=llama-2-7b", "--weights=random", "--dataset=dummy", "--batch_size=8"]
    argv += ["--context_length=2048", "--use_cpu_offload=false", "--output_dir=x"]
    cfg = config.parse(argv)
    given = config.given(argv) & {"model_name", "weights"}

    def plan_on(*machines: hardware.Machine, rank: int = 0):
        every = [(2, machine) for machine in machines for _ in range(2)]
        world = SimpleNamespace(
            **{"size": len(every), "rank": rank, "local_size": 2, "peers": [rank // 2 * 2]},
            **{"device": SimpleNamespace(type="cuda"), "each": lambda call: call()},
            gather_objects=lambda mine: every if isinstance(mine, tuple) else [mine] * len(every),
        )
        monkeypatch.setattr(launch.plans, "find_machine", lambda *_: machines[rank // 2])
        monkeypatch.setattr(launch.plans, "announce", lambda plan, say: None)
        return launch.broadcast_plan(cfg, given, world)

    large, small = (
        hardware.Machine(tuple(hardware.parse_gpus(names)), host_gib)
        for names, host_gib in (("2x80", 200.0), ("2x16", 60.0))
    )
    both, same = [plan_on(large, small, rank=rank) for rank in (0, 3)], plan_on(large, large)
    assert both[0].cfg == both[1].cfg != cfg
    assert both[0].machine.host_gib == 60 and both[0].found.fits_safely
    assert both[0].cfg.batch_size * both[0].cfg.gradient_accumulation_steps == 8
    assert same.cfg.sharding_strategy == "hybrid_full_shard"
    for plan, fits in ((same, False), (both[0], True)):
        setting = setting_for(plan.info, plan.cfg, dataclasses.replace(small, num_machines=2))
        assert fit.evaluate(plan.info, plan.cfg, setting, small).fits == fits


def test_what_one_machine_cannot_compute_in_none_does():
    """Beside an H100, whose memory is less than that of an MI300X, which has no fp8 here."""
    cases = {"MI300X": (True, 0.0), "V100-32": (False, 0.0), "H200": (True, 1.5)}
    for other, expected in cases.items():
        parts = [hardware.Machine(tuple(hardware.parse_gpus(n)), 64.0) for n in ("H100", other)]
        for order in (parts, parts[::-1]):
            (gpu,) = hardware.least_of(order).gpus
            assert (gpu.has_bf16, gpu.fp8_gain) == expected, other


def test_machines_of_unequal_ranks_choose_rate_and_precision_as_others_do(monkeypatch):
    """A 3090 and two 2080 Ti, as -N2 -n3: alike on all ranks; where layers lie is as asked."""
    argv = ["--model_name=llama-2-7b", "--weights=random", "--dataset=dummy", "--output_dir=x"]
    cfg, given, found = config.parse(argv), config.given(argv), []
    parts = [hardware.Machine(tuple(hardware.parse_gpus(n)), 64.0) for n in ("3090", "2x2080ti")]
    every = [(1, parts[0]), (2, parts[1]), (2, parts[1])]
    monkeypatch.setattr(launch.plans, "announce", lambda plan, say: None)
    for rank, (size, machine) in enumerate(every):
        world = SimpleNamespace(
            **{"size": 3, "rank": rank, "local_size": size, "peers": [min(rank, 1)]},
            **{"device": SimpleNamespace(type="cuda"), "each": lambda call: call()},
            gather_objects=lambda mine: every if isinstance(mine, tuple) else [mine] * 3,
        )
        monkeypatch.setattr(launch.plans, "find_machine", lambda *_, own=machine: own)
        found.append(launch.broadcast_plan(cfg, given, world))
    first = found[0]
    assert [plan.cfg for plan in found] == [first.cfg] * 3
    assert first.cfg.precision == "fp16_autocast" and "a 2080Ti has no bfloat16" in first.note
    alone = launch.plans.make(first.info, cfg, given, parts[1])
    assert first.cfg.lr == alone.cfg.lr > cfg.base_lr
    asked = dataclasses.replace(first.cfg, lr=cfg.lr, precision=cfg.precision)
    assert asked == cfg
