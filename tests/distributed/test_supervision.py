"""Ranks that leave early, hang, crash or lose each other; a terminal that goes away.

The ranks are tiny scripts without torch, as in test_launch.py.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import hooks, launch
from fsdp_qlora.distributed.hooks import Heartbeat, Watch
from fsdp_qlora.distributed.launch import RankSpec
from fsdp_qlora.errors import RUN_FAILED
from tests.distributed.test_launch import is_alive, run, start, wait_for_ranks

STEPS = """
import threading
hooks.enable_stack_dumps(out / "logs" / f"rank{rank}.log")
meet()
def take(first, last):
    for step in range(first, last):
        for point in hooks.STEP_POINTS:
            hooks.reach(point, rank, step)
            time.sleep(0.005)
"""


class Late:
    """A process seen to end some looks after its peer: its card gave back its memory first."""

    def __init__(self, process: launch.Rank, peer: Callable[[], launch.Rank]):
        self._process, self._peer, self._num_looks = process, peer, 0
        self.pid, self.returncode = process.pid, None
        self.wait, self.send_signal = process.wait, process.send_signal

    def poll(self) -> int | None:
        self._num_looks += self._peer().returncode is not None
        if self._num_looks > 10:
            self.returncode = self._process.poll()
        return self.returncode


@pytest.mark.parametrize("first", [0, 1])
def test_a_killed_rank_is_the_cause_even_if_its_peer_is_seen_to_fail_before(
    first: int, tmp_path: Path
):
    """One that had to be ended, by SIGTERM, is none."""
    pipe, ranks = tmp_path / "pipe", {}
    os.mkfifo(pipe)  # its reader goes on when its writer has died
    scripts = {first: f"exec 9>{pipe}; kill -9 $$", 1 - first: f"cat {pipe}; exit 1"}
    tasks = [
        RankSpec(rank, ["sh", "-c", scripts[rank]], dict(os.environ), None, ()) for rank in (0, 1)
    ]

    def start_one_late(task: RankSpec) -> launch.Rank:
        rank = launch.start(task)
        ranks[task.rank] = Late(rank, lambda: ranks[1 - first]) if task.rank == first else rank
        return ranks[task.rank]

    with hooks.open_board() as board:
        watch = Watch(board.fileno())
        late = launch.run_ranks(tasks, start_one_late, [], watch)
        for rank, script in (first, "exec sleep 60"), (1 - first, "exit 1"):
            tasks[rank] = RankSpec(rank, ["sh", "-c", script], dict(os.environ), None, ())
        slow = launch.run_ranks(tasks, launch.start, [], watch)
    assert (late.codes[first], late.codes[1 - first], late.ended) == (-9, 1, frozenset())
    assert (slow.codes[first], slow.codes[1 - first], slow.ended) == (-15, 1, {first})


def test_a_rank_that_leaves_with_0_before_its_end_is_a_failure(tmp_path: Path):
    """Its peers would wait for it; nobody has asked it to leave."""
    body = STEPS + "take(1, 4)\ntime.sleep(60 * (1 - rank))"
    code, out, err = run(tmp_path, body, FSDP_QLORA_FAULT="exit0:1:post-backward:2")
    log = f"{tmp_path}/out/logs/rank1.log"
    line = f"rank 1: ended with code 0 at step 2 (post-backward), before its end; see {log}"
    assert (code, out, err) == (RUN_FAILED, "", f"error: {line}\n")


@pytest.mark.parametrize("kind", ["stop", "hang"])
def test_a_rank_that_hangs_is_found_and_every_stack_written_down(tmp_path: Path, kind: str):
    """One that was stopped, one that waits; its peer waits for it. Nobody is left."""
    body = STEPS + "take(1, 4)\nif rank == 0: time.sleep(60)\n"
    body = body.replace("hooks.reach(", "step == 4 or hooks.reach(")
    fault = f"{kind}:1:post-forward:3"
    code, _, err = run(tmp_path, body, "--hang_timeout=2", FSDP_QLORA_FAULT=fault)
    line = r"error: rank 1: hung at step 3 \(post-forward\): no sign of life for (\d+) s; "
    found = re.fullmatch(f"{line}the stacks of all ranks are in .*/logs\n", err)
    assert code == RUN_FAILED and found
    assert 2 <= int(found[1]) < 20  # a second of it to write; the peer would sleep for 60
    for rank in range(2):
        log = (tmp_path / f"out/logs/rank{rank}.log").read_text()
        assert "most recent call first" in log and "rank.py" in log
    assert "_hang" in log or kind == "stop"
    assert not any(map(is_alive, wait_for_ranks(tmp_path)))


def test_a_crash_is_answered_by_as_many_new_starts_as_were_asked_for(tmp_path: Path):
    """The second start goes well; the fault happens once. Without a checkpoint, from the start."""
    body = STEPS + "take(1, 4)"
    fault = {"FSDP_QLORA_FAULT": "kill:1:post-record:2"}
    code, out, err = run(tmp_path, body, "--max_restarts=1", **fault)
    words = "rank 1: was killed by SIGKILL at step 2 (post-record)"
    assert (code, out, err) == (0, f"restart   1/1 from the beginning: {words}\n", "")


def test_restarts_end_at_their_number_and_at_faults_of_the_user(tmp_path: Path):
    """The last failure is the one that is told."""
    body = "meet()\nsys.exit(7 if rank else time.sleep(60))"
    code, out, err = run(tmp_path, body, "--max_restarts=2")
    starts = [line[:13] for line in out.splitlines()]
    assert (code, starts) == (7, ["restart   1/2", "restart   2/2"])
    assert err.startswith("error: rank 1: ended with code 7") and err.count("\n") == 1
    for own in (2, 3, 5):
        body = f"meet()\nwrite_error(out, rank, {own}, 'bad; repair it')\nsys.exit({own})"
        said = run(tmp_path, body, "--max_restarts=2", "--overwrite")
        assert said == (own, "", "error: bad; repair it\n")


def test_cards_that_cannot_exchange_a_megabyte_do_without_peer_to_peer(tmp_path: Path):
    """Once, and it is said; if that does not help either, the run ends."""
    body = """
meet()
if os.environ.get("NCCL_P2P_DISABLE") != ANSWER and rank:
    write_error(out, rank, 4, f"rank {rank}: LinkError: no answer; see", kind="link")
    sys.exit(4)
"""
    words = "rank 1: LinkError: no answer"
    line = f"links     {words}; again with NCCL_P2P_DISABLE=1, which is slower\n"
    assert run(tmp_path, body.replace("ANSWER", "'1'")) == (0, line, "")
    failed = run(tmp_path, body.replace("ANSWER", "'2'"), "--overwrite")
    assert failed == (RUN_FAILED, line, f"error: {words}; see\n")


def test_ranks_meet_on_a_port_that_only_this_machine_can_reach(tmp_path: Path):
    """The supervisor's own, open before the ranks start: nobody can take it from them."""
    body = """
import socket
number = int(os.environ["FSDP_QLORA_LISTENER"])
print(socket.socket(fileno=number).getsockname() == ("127.0.0.1", int(os.environ["MASTER_PORT"])))
print(os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
"""
    code, out, err = run(tmp_path, body, num_ranks=1)
    assert (code, out, err) == (0, "True\nlo lo\n", "")


def test_a_terminal_that_hangs_up_stops_nothing(tmp_path: Path):
    """SIGHUP, and every write to the terminal fails from then on."""
    body = """
sys.path.insert(0, PROJECT)
from fsdp_qlora.cli import safe_output
with safe_output():
    while not (out / "gone").exists():
        time.sleep(0.01)
    for _ in range(3):
        print("still here", flush=True)
    (out / f"end{rank}").touch()
"""
    ours, theirs = pty.openpty()
    parent = start(tmp_path, STEPS + body.replace("PROJECT", repr(str(PROJECT_DIR))), stdout=theirs)
    os.close(theirs)
    wait_for_ranks(tmp_path)
    os.close(ours)
    parent.send_signal(signal.SIGHUP)
    (tmp_path / "out" / "gone").touch()
    assert parent.wait(30) == 0
    assert {path.name for path in (tmp_path / "out").glob("end*")} == {"end0", "end1"}


def test_a_reader_that_has_seen_enough_stops_nothing(tmp_path: Path):
    """train.py | head -1, no stdout, a full disk: printed into nowhere, and the end is reached."""
    program = f"""
import sys
sys.path.insert(0, {str(PROJECT_DIR)!r})
from fsdp_qlora.cli import safe_output
with safe_output():
    with open({str(tmp_path / "end")!r}, "w"):
        for number in range(20000):
            print("line", number, end="\\u2026\\n" if number else "\\n")
"""
    script = tmp_path / "prints.py"
    script.write_text(program)
    for screen, shown in (("| head -1", "line 0\n"), (">&- 2>&-", ""), (">/dev/full", "")):
        command = ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} {screen}"]
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")
        assert (tmp_path / "end").read_text() == ""  # the first file to be opened is no stdout
        (tmp_path / "end").unlink()


def test_a_step_is_given_ten_times_the_slowest_and_the_start_five_minutes(monkeypatch):
    """By the monotonic clock, as long as nobody is suspended; the jumps of another are nothing."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now_s * 1e9))
    monkeypatch.setattr(time, "time", lambda: now_s - 86400)
    with hooks.open_board() as board:
        monkeypatch.setenv(hooks.BOARD, str(board.fileno()))
        watch = Watch(board.fileno(), began_s=now_s)
        pids = {0: 2**22 + 1, 1: 2**22 + 2}  # nobody's: they use no processor time

        def after(seconds: int) -> list[int]:
            nonlocal now_s
            for _ in range(seconds):
                now_s += 1
                found = watch.find_hung(pids)
            return found

        def both(point: str, step: int, after_s: int) -> list[int]:
            after(after_s)
            for rank in pids:
                hooks.beat(point, rank, step)
            return watch.find_hung(pids)

        assert both("load", 0, 299) == []
        assert after(301) == [0, 1]
        for step, seconds in ((1, 200), (2, 3), (3, 20), (4, 3)):
            assert both("pre-forward", step, seconds) == []
        assert after(199) == []
        now_s += 3600  # a scheduler has suspended the job, its supervisor too
        assert after(1) == [] and both("pre-forward", 5, 3) == []  # that it took long is not kept
        assert after(199) == []  # 10 times 20 s
        hooks.beat("post-forward", 1, 5)
        assert after(2) == [0]  # rank 1 is farther
        assert both("eval", 0, 1) == [] and hooks.read(board.fileno(), 0).step == 5
        assert after(299) == []


def test_ranks_that_compute_before_the_first_step_do_not_hang(monkeypatch):
    """Tokens of ten million rows take longer than five minutes; a step may not."""
    with hooks.open_board() as board:
        monkeypatch.setenv(hooks.BOARD, str(board.fileno()))
        watch = Watch(board.fileno(), limit_s=0.001)
        pids = {0: os.getpid()}
        for step in (0, 1, 2):
            sum(range(5 * 10**6))  # several ticks of the kernel's clock
            time.sleep(0.002)
            assert watch.find_hung(pids) == []
            hooks.beat("pre-forward" if step else "load", 0, step)
            watch.find_hung(pids)
        time.sleep(0.002)
        assert watch.find_hung(pids) == [0]


def test_the_last_sign_is_read_as_it_was_written(monkeypatch):
    """By rank; without a board nothing is written, and a number of no open file is no error."""
    monkeypatch.delenv(hooks.BOARD, raising=False)
    hooks.beat("load", 0)
    monkeypatch.setenv(hooks.BOARD, "9999")
    hooks.beat("load", 0, 3)
    with hooks.open_board() as board:
        monkeypatch.setenv(hooks.BOARD, str(board.fileno()))
        hooks.beat("load", 2, 3)
        assert hooks.read(board.fileno(), 0) == hooks.read(board.fileno(), 3)
        sign = hooks.read(board.fileno(), 2)
        assert str(sign) == " at step 3 (load)" and sign.silent_s < 1
    assert str(Heartbeat()) == " before it had begun"
