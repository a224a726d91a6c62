"""A run that is killed again and again comes to what the unbroken one has come to: `make soak`.

Kills come at random, on average every so many seconds: rank 0, rank 1, both, or the supervisor
by SIGKILL; every fifth is a SIGTERM to the supervisor, which saves first. After each the run goes
on by `--resume=auto`. Rounds follow each other until the time is over.

    python -m tests.soak --minutes 10 --every 10 --steps 150

With `--hosts 2` torchrun starts it on two hosts (as root: tests/system/cluster.py). First they are
hit at twelve points, then at random: a rank or a torchrun is killed, power or a link is lost.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from fsdp_qlora.checkpoint_store import is_complete
from fsdp_qlora.errors import DONE, RUN_FAILED, SIGNALED, SIGTERM
from tests import faults, warm
from tests.system import cluster
from tests.test_kill_sweep import argv_of, result

VICTIMS = ("rank 0", "rank 1", "both ranks", "supervisor")
TERM_EVERY = 5
LIMIT_S, ENDING_S = 20, 15  # --hang_timeout over hosts; torchrun needs some more to end
RETRIES = "net.ipv4.tcp_retries2=5"  # else torchrun's rendezvous awaits a silent host for 15 min
RENDEZVOUS = ("--rdzv_backend=c10d", f"--rdzv_endpoint=host1:{cluster.PORT}", "--rdzv_id=7")
SHARED = """rank host2 load, torchrun host1 pre-forward:1, rank both post-forward:2,
link host2 pre-optimizer:3, rank host1 save-rename:3, torchrun host2 save-after-file:4"""
OWN = """torchrun host2 load, power host1 post-backward:2, link host1 save-fsync:3,
rank host2 save-manifest:4, rank host1 eval, torchrun both export"""
HOST_VICTIMS = [f"{what} host{n}" for what in ("rank", "torchrun", "power", "link") for n in (1, 2)]
CODES = {"torchrun": SIGNALED + signal.SIGKILL, "power": -signal.SIGKILL}  # else torchrun's 1


def strike(run: warm.Run, generator: random.Random, number: int) -> tuple[str, int]:
    """End a run by a signal; return who was hit, and the exit code that must follow."""
    if number % TERM_EVERY == 0:
        run.signal(signal.SIGTERM)
        return "SIGTERM", SIGTERM
    who = generator.choice(VICTIMS)
    supervisor = run.process.pid
    ranks = sorted(set(run.orphans()) - {supervisor})
    hit = {"rank 0": ranks[:1], "rank 1": ranks[1:], "both ranks": ranks}.get(who, [supervisor])
    for pid in hit:
        os.kill(pid, signal.SIGKILL)
    return who, -signal.SIGKILL if who == "supervisor" else RUN_FAILED


def broken(
    place: Path, out: Path, more: list[str], every_s: float, seed: int, num_before: int
) -> Counter[str]:
    """Make a run under fire, the `num_before` starts of former rounds counted on for SIGTERM.

    Returns how often whom was hit. Every other end is a failure.
    """
    generator, hits = random.Random(seed), Counter[str]()
    while True:
        run = warm.start(argv_of(place, out, "--resume=auto", *more), place)
        run.process.join(generator.expovariate(1 / every_s))
        hits["starts"] += 1
        if run.process.exitcode is not None:
            assert run.wait() == DONE, run.err
            return hits
        try:
            who, code = strike(run, generator, num_before + hits["starts"])
        except ProcessLookupError:  # it came to its end meanwhile
            who, code = "too late", DONE
        found = run.wait()
        assert found in (code, DONE), (who, found, run.err)
        assert run.err.count("\n") <= 1 and run.left() == [], (run.err, run.orphans())
        hits[who] += 1
        if found == DONE:
            return hits


def on_hosts(hosts, argv: list[str], log: Path, how=(), **more) -> list[cluster.Process]:
    """Start a run by torchrun; what its ranks have on stderr is in `log`."""
    how = ("--redirects=2", f"--log_dir={log}", *how)
    argv = [*argv, "--resume=auto", f"--hang_timeout={LIMIT_S}"]
    return cluster.torchrun(hosts, argv, log, how, **more)


def strike_hosts(hosts, launchers: list[cluster.Process], who: str, point: str = "") -> None:
    """Hit hosts: in time both torchruns end rightly, each rank with one line at most."""
    (what, where), begin_s = who.split(), time.monotonic()
    number = signal.SIGTERM if what == "SIGTERM" else signal.SIGKILL
    for host, one in zip(hosts, launchers, strict=True):
        if where in (host.name, "both"):
            act = {"power": host.kill, "link": host.cut}.get(what)
            act() if act else one.signal(number, what == "rank")
    for host, one in zip(hosts, launchers, strict=True):
        right = CODES.get(what, 1) if where in (host.name, "both") else 1
        assert one.wait(LIMIT_S + ENDING_S) in (DONE, right), one.text
        assert not re.search(r"exitcode +: (?!4 |-9 |143 )", one.text), one.text
    for path in Path(str(launchers[0].out)[:-1]).rglob("stderr.log"):
        line = r"(error: host\d \(rank \d\): (is gone|hung)|stopped by SIGTERM).*\n|"
        assert re.fullmatch(line, path.read_text()), path.read_text()
    took_s = time.monotonic() - begin_s
    print(f"hit       {who:<15} {point:<18} {took_s:4.1f} s to the end", flush=True)


def sweep(hosts, place: Path) -> None:
    """Hit a run at each point in turn, and compare."""
    run = warm.start(argv_of(place, place / "one"), place)
    assert run.wait() == DONE, run.err
    for name, points, how in ("shared", SHARED, ()), ("own", OWN, RENDEZVOUS):
        own = [place / name] if how else ()
        out = place / name / "run"
        for i, words in enumerate(points.split(",")):
            who, point = words.strip().rsplit(" ", 1)
            more = {faults.VARIABLE: f"pause:{who.count('2')}:{point}", "own": own}
            launchers = on_hosts(hosts, argv_of(place, out), place / f"{name}-{i}-", how, **more)
            launchers[who.count("2")].wait_for("pauses")
            strike_hosts(hosts, launchers, who, point)
        launchers = on_hosts(hosts, argv_of(place, out), place / f"{name}-", how, own=own)
        assert [one.wait() for one in launchers] == [DONE, DONE], launchers[0].text
        out = place / "own.host1" / "run" if own else out
        assert result(out) == result(place / "one"), out
        print(f"swept     {i + 1} points: {out} is equal bit for bit", flush=True)


def broken_hosts(hosts, argv: list[str], out: Path, every_s: float, num: int) -> Counter[str]:
    """As `broken`, over hosts that have met; by turns torchrun is static and has a rendezvous."""
    generator, hits = random.Random(num), Counter[str]()
    while not is_complete(out):
        hits["starts"] += 1
        num += 1
        launchers = on_hosts(hosts, argv, out.with_name(f"{num}-"), RENDEZVOUS * (num % 2))
        launchers[0].wait_for("fits   ")
        limit_s = time.monotonic() + generator.expovariate(1 / every_s)
        while time.monotonic() < limit_s and not is_complete(out):
            time.sleep(0.05)
        if is_complete(out):
            assert [one.wait() for one in launchers] == [DONE, DONE], launchers[0].text
            break
        who = generator.choice(HOST_VICTIMS)
        who = who if num % TERM_EVERY else f"SIGTERM {who.split()[1]}"
        strike_hosts(hosts, launchers, who)
        hits[who] += 1
    return hits


def main() -> None:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=10, help="seconds from hit to hit")
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    parser.add_argument("--hosts", type=int, default=1, choices=(1, 2))
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    warm.call(warm.make_model, place)
    with cluster.hosts(2) if args.hosts == 2 else contextlib.nullcontext([]) as hosts:
        for host in hosts:
            host.start(["sysctl", "-qw", RETRIES], place / "sysctl").wait()
        if hosts:
            sweep(hosts, place)
        soak(args, place, hosts)
    shutil.rmtree(place)


def soak(args, place: Path, hosts) -> None:
    """Make rounds until the time is over, and compare each."""
    more = [f"--max_steps={args.steps}", "--num_epochs=99", "--save_every=5"]
    begin_s = time.monotonic()
    run = warm.start(argv_of(place, place / "unbroken", *more), place)
    assert run.wait(600) == DONE, run.err
    unbroken, unbroken_s = result(place / "unbroken", args.steps), time.monotonic() - begin_s
    print(f"unbroken  {args.steps} steps in {unbroken_s:.0f} s", flush=True)
    hits, rounds, begin_s = Counter[str](), 0, time.monotonic()
    while time.monotonic() - begin_s < 60 * args.minutes:
        out = place / f"round-{rounds}"
        if hosts:
            argv = argv_of(place, out, *more)
            hits += broken_hosts(hosts, argv, out, args.every, hits["starts"])
        else:
            hits += broken(place, out, more, args.every, rounds, hits["starts"])
        assert result(out, args.steps) == unbroken, f"round {rounds}: {out} is not {place}/unbroken"
        shutil.rmtree(out)
        rounds += 1
        said = ", ".join(f"{name} {count}" for name, count in sorted(hits.items()))
        print(f"round {rounds}   {time.monotonic() - begin_s:.0f} s  {said}", flush=True)
    total_s = time.monotonic() - begin_s
    print(f"soaked    {total_s:.0f} s, {rounds} rounds of {args.steps} steps, equal bit for bit")
    if not hosts:  # there torch is imported at each start
        print(f"effective {rounds * unbroken_s / total_s:.0%} of the time of unbroken runs")


if __name__ == "__main__":
    main()
