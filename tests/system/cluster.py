"""Hosts on one machine: network namespaces with own addresses and names, and a Slurm over two.

Needs root, iproute2, slurm-wlm and munge; what is missing is a failure. One process at a time has
the hosts; all that was started on them ends with them.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BRIDGE, SUBNET = "br77", "10.77.0"
LOCK = Path("/run/fsdp_qlora_hosts.lock")
ALL_SPACES = ("--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
TIMEOUT_S = 120.0
SLURM_CONF = """
ClusterName=toy
SlurmctldHost=ctl({subnet}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/ctld.pid
SlurmdPidFile={place}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=20
MinJobAge=3000
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=h1 NodeHostname=host1 NodeAddr={subnet}.1 CPUs=8 RealMemory=20000
NodeName=h2 NodeHostname=host2 NodeAddr={subnet}.2 CPUs=8 RealMemory=20000
PartitionName=low Nodes=h1,h2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=h1,h2 State=UP PriorityTier=10
"""


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_until(is_true: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Look again and again until something is true; fail with `what` when it never is."""
    limit_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < limit_s, what
        time.sleep(0.1)


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a rank on a CPU host whose package is this one."""
    ours = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | ours | more


@dataclass
class Process:
    """A command that runs on a host; its streams go to one file."""

    popen: subprocess.Popen
    out: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.out.read_text()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs:\n{self.text}") from None

    def wait_for(self, words: str, timeout_s: float = TIMEOUT_S) -> None:
        """Until it has printed something."""
        wait_until(
            lambda: words in self.text or self.popen.poll() is not None, self.text, timeout_s
        )
        assert words in self.text, self.text

    def send_signal(self, number: int) -> None:
        """Signal the command itself: the grandchild of what makes its name spaces."""
        pid = self.popen.pid
        for _ in range(2):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, number)

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        self.popen.kill()
        self.popen.wait()


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

    @property
    def address(self) -> str:
        """Its address."""
        return f"{SUBNET}.{self.number}"

    def start(
        self, command: Sequence[object], out: Path, own: Sequence[Path] = (), **env: str
    ) -> Process:
        """Start a command there.

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
        whole = [*spaces, script + '"$@"; exit $?', self.name, *map(str, command)]
        with out.open("ab") as file:
            popen = subprocess.Popen(
                whole,
                cwd=ROOT,
                env=clean_env(**env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.started.append(Process(popen, out))
        return self.started[-1]

    def torchrun(self, how: Sequence[str], argv: Sequence[object], out: Path, **more) -> Process:
        """Start `torchrun HOW -m fsdp_qlora train ARGV` there."""
        command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "fsdp_qlora", "train"]
        return self.start([*command, *argv], out, **more)

    def cut(self) -> None:
        """Cut its link: nothing is refused, nothing arrives."""
        run("ip", "link", "set", f"ve{self.number}", "down")

    def mend(self) -> None:
        """Join it to the others again."""
        run("ip", "link", "set", f"ve{self.number}", "up")

    def kill(self) -> None:
        """Lose its power: the link is silent, then every process is gone."""
        self.cut()
        for process in self.started:
            process.kill()


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[list[Host]]:
    """Hosts host1, host2, ... on one network; this process is at 10.77.0.254 of it."""
    assert os.geteuid() == 0, "hosts need root"
    found: list[Host] = []
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _take_down()  # what a killed test has left
        try:
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            run("ip", "addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
            run("ip", "link", "set", BRIDGE, "up")
            for number in range(1, count + 1):
                _make(number, count)
                found.append(Host(number, []))
            yield found
        finally:
            for host in found:
                for process in host.started:
                    process.kill()
            _take_down()


def _make(number: int, count: int) -> None:
    """Make a network with one link, and the files in which it has its name and the others'."""
    space, link = f"h{number}", f"ve{number}"
    run("ip", "netns", "add", space)
    run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    run("ip", "link", "set", link, "master", BRIDGE, "up")
    run("ip", "-n", space, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
    for name in ("eth0", "lo"):
        run("ip", "-n", space, "link", "set", name, "up")
    files = Path("/etc/netns") / space
    files.mkdir(parents=True, exist_ok=True)
    names = [f"{SUBNET}.{other} host{other} h{other}\n" for other in range(1, count + 1)]
    (files / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
    (files / "hostname").write_text(f"host{number}\n")


def _take_down() -> None:
    for line in run("ip", "netns", "list").splitlines():
        space = line.split()[0]
        if space[0] == "h" and space[1:].isdigit():
            for pid in run("ip", "netns", "pids", space).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", space)
            run("rm", "-rf", f"/etc/netns/{space}")
    links = run("ip", "-o", "link").splitlines()
    for name in (line.split(":")[1].strip().partition("@")[0] for line in links):
        if name == BRIDGE or (name[:2] == "ve" and name[2:].isdigit()):
            subprocess.run(["ip", "link", "del", name], capture_output=True)


@dataclass
class Slurm:
    """A Slurm of host1 and host2, eight pretended CPUs each; partition `high` pre-empts `low`."""

    env: dict[str, str]

    def start(self, command: Sequence[object], out: Path, **env: str) -> Process:
        """Start srun, or another of its tools, as on the login node."""
        with out.open("ab") as file:
            whole = self.env | env
            return Process(
                subprocess.Popen(
                    [*map(str, command)], env=whole, cwd=ROOT, stdout=file, stderr=file
                ),
                out,
            )

    def batch(self, script: Path, *flags: object) -> str:
        """Submit a script; return the job's number."""
        return run("sbatch", "--parsable", *flags, script, env=self.env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What is known of a job: JobState, ExitCode, Restarts, ..."""
        words = run("scontrol", "-o", "show", "job", number, env=self.env).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Until a job is in one of some states; return what is known of it."""
        wait_until(
            lambda: self.job(number)["JobState"] in states,
            f"{states}: {self.job(number)}",
            timeout_s,
        )
        return self.job(number)


@contextlib.contextmanager
def slurm(members: Sequence[Host], place: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and a slurmd on each of two hosts.

    Args:
        members: host1 and host2.
        place: empty directory for what they write.
    """
    (place / "state").mkdir(parents=True)
    (place / "slurm.conf").write_text(SLURM_CONF.format(place=place, subnet=SUBNET))
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
            (place / f"h{host.number}").mkdir()
            log = place / f"slurmd{host.number}.log"
            slurmd = ["slurmd", "-D", "-N", f"h{host.number}"]
            host.start(slurmd, log, SLURM_CONF=str(place / "slurm.conf"))
        sinfo = ["sinfo", "--noheader", "--partition=high", "--format=%T %D"]

        def is_up() -> bool:
            done = subprocess.run(sinfo, env=found.env, capture_output=True, text=True)
            return done.stdout.strip() == f"idle {len(members)}"

        wait_until(is_up, "\n".join(log.read_text() for log in place.glob("*.log")), 40)
        yield found
    finally:
        subprocess.run(["scancel", "--user=root", "--full"], env=found.env, capture_output=True)
        for daemon in reversed(daemons):
            daemon.popen.terminate()
            daemon.popen.wait()
