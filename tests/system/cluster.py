"""Hosts on one machine: network namespaces with own addresses and names, and a Slurm over two.

Needs root, iproute2, slurm-wlm and munge; what is missing is a failure. One process at a time has
the hosts; all that was started on them ends with them.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import faults

ROOT = Path(__file__).parents[2]
BRIDGE, SUBNET = "br77", "10.77.0"
LOCK = Path("/run/fsdp_qlora_hosts.lock")
ALL_SPACES = ("--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
TIMEOUT_S, PORT = 240.0, 29501
TRAIN = ("-m", "fsdp_qlora", "train")
WATCHED = """"$@"; code=$?; for i in $(seq 20); do set -- /proc/[0-9]*
[ $# = 1 ] && exit $code; sleep 0.1; done; head -c 200 "${@/%//cmdline}"; exit 98"""
STACKS = Path(__file__).with_name("stacks")
SLURM_CONF = Path(__file__).with_name("slurm.conf")


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def ip(*lines: str) -> None:
    """Run `ip` with each line's words."""
    for line in lines:
        run("ip", *line.split())


def wait_until(is_true: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Look again and again until something is true; fail with `what` when it never is."""
    limit_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < limit_s, what
        time.sleep(0.1)


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a rank on a CPU host whose package is this one."""
    ours = {"PYTHONPATH": f"{ROOT}:{STACKS}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | ours | more


class Process(subprocess.Popen):
    """A command under way; both its streams go to one file, `out`."""

    def __init__(self, command: Sequence[object], out: Path, env: dict[str, str]) -> None:
        self.out = out
        with out.open("ab") as file:
            super().__init__([*map(str, command)], cwd=ROOT, env=env, stdout=file, stderr=file)

    def signal(self, number: int, is_rank: bool = False) -> None:
        """Signal the torchrun that is started by this, or what that has started."""
        with contextlib.suppress(psutil.Error):  # it has come to its end
            below = psutil.Process(self.pid).children(recursive=True)[1:]  # without the bash
            for process in below[1:] if is_rank else below[:1]:
                process.send_signal(number)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.out.read_text()

    def wait_for(self, words: str, timeout_s: float = TIMEOUT_S) -> None:
        """Until it has printed something."""
        wait_until(lambda: words in self.text, f"no {words!r} in {self.out}", timeout_s)

    def wait(self, timeout: float | None = TIMEOUT_S) -> int:
        """Until it ends, not for ever; return its exit code."""
        try:
            return super().wait(timeout)
        except subprocess.TimeoutExpired:
            outs = sorted(self.out.parent.glob(f"{self.out.name[:-1]}*"))  # of the other hosts, too
            texts = "".join(f"\n{out}:\n{out.read_text()[-4000:]}" for out in outs)
            raise AssertionError(f"runs for {timeout} s{texts}") from None


@dataclass
class Host:
    """One of the hosts.

    Attributes:
        number: from 1; its network is h1, its name host1, its address 10.77.0.1.
        started: what runs or has run there.
    """

    number: int
    started: list[Process]

    @property
    def name(self) -> str:
        """Its name, as its hosts file has it."""
        return f"host{self.number}"

    def start(
        self, command: Sequence[object], out: Path, own: Sequence[Path] = (), **env: str
    ) -> Process:
        """Start a command there; its code is 98 if other processes are left 2 s after its end.

        Args:
            command: program and arguments.
            out: file for what it prints.
            own: directories that are on a disk of this host; the others are shared by all.
            env: of its environment besides.
        """
        script = f"hostname {self.name}\n"
        for path in own:
            disk = path.with_name(f"{path.name}.{self.name}")
            disk.mkdir(exist_ok=True)
            path.mkdir(exist_ok=True)
            script += f"mount --bind {shlex.quote(str(disk))} {shlex.quote(str(path))} || exit 99\n"
        spaces = ["ip", "netns", "exec", f"h{self.number}", "unshare", *ALL_SPACES, "bash", "-c"]
        whole = [*spaces, script + WATCHED, self.name, *command]
        self.started.append(Process(whole, out, clean_env(**env)))
        return self.started[-1]

    def cut(self) -> None:
        """Cut its link: nothing is refused, nothing arrives."""
        ip(f"link set ve{self.number} down")

    def mend(self) -> None:
        """Join it to the others again."""
        ip(f"link set ve{self.number} up")

    def kill(self) -> None:
        """Lose its power: the link is silent, then every process is gone."""
        self.cut()
        for process in self.started:
            process.kill()
            process.wait()


def torchrun(
    members: Sequence[Host], argv: Sequence[object], out: Path, how: Sequence[str] = (), **more
) -> list[Process]:
    """Start `torchrun HOW train ARGV`, one rank a host, static as a rule.

    Host N prints to `out` + N; `more` is for Host.start, and may bring a fault.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(members)}"]
    command += ["--nproc_per_node=1", "--master_addr=host1", f"--master_port={PORT}"]
    started, train = [], ("-m", "tests.faults") if faults.VARIABLE in more else TRAIN
    for host in members:
        host.mend()
        whole = [*command, f"--node_rank={host.number - 1}", *how, *train, *argv]
        started.append(host.start(whole, out.with_name(f"{out.name}{host.number}"), **more))
    return started


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[list[Host]]:
    """Hosts host1, host2, ... on one network; this process is at 10.77.0.254 of it."""
    assert os.geteuid() == 0, "hosts need root"
    found: list[Host] = []
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _take_down()  # what a killed test has left
        try:
            ip(f"link add {BRIDGE} type bridge", f"addr add {SUBNET}.254/24 dev {BRIDGE}")
            ip(f"link set {BRIDGE} up")
            for number in range(1, count + 1):
                _make(number, count)
                found.append(Host(number, []))
            yield found
        finally:
            for host in found:
                host.kill()
            _take_down()


def _make(number: int, count: int) -> None:
    """Make a network with one link, and the files in which it has its name and the others'."""
    space, link = f"h{number}", f"ve{number}"
    ip(f"netns add {space}", f"link add {link} type veth peer name eth0 netns {space}")
    ip(f"link set {link} master {BRIDGE} up", f"-n {space} link set lo up")
    ip(f"-n {space} addr add {SUBNET}.{number}/24 dev eth0", f"-n {space} link set eth0 up")
    files = Path("/etc/netns") / space
    files.mkdir(parents=True, exist_ok=True)
    names = [f"{SUBNET}.{other} host{other} h{other}\n" for other in range(1, count + 1)]
    (files / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))


def _take_down() -> None:
    for space in re.findall(r"^h\d+", run("ip", "netns", "list"), re.MULTILINE):
        run("bash", "-c", f"ip netns pids {space} | xargs -r kill -9; true")
        ip(f"netns del {space}")
        shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)
    for name in re.findall(rf"^\d+: (ve\d+|{BRIDGE})", run("ip", "-o", "link"), re.MULTILINE):
        subprocess.run(["ip", "link", "del", name], capture_output=True)  # may go by itself


@dataclass
class Slurm:
    """A Slurm of host1 and host2, eight pretended CPUs each; partition `high` pre-empts `low`."""

    env: dict[str, str]

    def start(self, command: Sequence[object], out: Path, **env: str) -> Process:
        """Start srun, or another of its tools, as on the login node."""
        return Process(command, out, self.env | env)

    def batch(self, script: Path, *flags: object) -> str:
        """Submit a script; return the job's number."""
        return run("sbatch", "--parsable", *flags, script, env=self.env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What is known of a job: JobState, ExitCode, Restarts, ..."""
        words = run("scontrol", "-o", "show", "job", number, env=self.env).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Until a job is in one of some states; return what is known of it."""
        what = f"job {number} is not {states}"
        wait_until(lambda: self.job(number)["JobState"] in states, what, timeout_s)
        return self.job(number)


@contextlib.contextmanager
def slurm(members: Sequence[Host], place: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and a slurmd on each of two hosts.

    Args:
        members: host1 and host2.
        place: empty directory for what they write.
    """
    for name in ("state", "h1", "h2"):
        (place / name).mkdir(parents=True)
    conf = SLURM_CONF.read_text().format(place=place, subnet=SUBNET)
    (place / "slurm.conf").write_text(conf)
    (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o400)
    paths = [f"--{name}-file={place}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={place}/munge.socket", *paths]
    ctld = ["unshare", "--uts", "bash", "-c", "hostname ctl; exec slurmctld -D -c"]
    found = Slurm(clean_env(SLURM_CONF=str(place / "slurm.conf")))
    daemons: list[Process] = []
    try:
        daemons.append(found.start(munged, place / "munged.log"))
        wait_until((place / "munge.socket").exists, "no munge.socket", 20)
        daemons.append(found.start(ctld, place / "slurmctld.log"))
        for host in members:
            slurmd = ["slurmd", "-D", "-N", f"h{host.number}"]
            host.start(slurmd, place / f"{host.name}.log", SLURM_CONF=found.env["SLURM_CONF"])
        sinfo = ("sinfo", "--noheader", "--partition=high", "--format=%T %D")
        wait_until(lambda: run(*sinfo, env=found.env) == "idle 2\n", f"see {place}/*.log", 40)
        yield found
    finally:
        subprocess.run(["scancel", "--user=root", "--full"], env=found.env, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
