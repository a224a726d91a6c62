"""A run that is killed again and again comes to what the unbroken one has come to: `make soak`.

Kills come at random, on average every so many seconds: rank 0, rank 1, both, or the supervisor
by SIGKILL; every fifth is a SIGTERM to the supervisor, which saves first. After each the run goes
on by `--resume=auto`. Rounds follow each other until the time is over.

    python -m tests.soak --minutes 10 --every 10 --steps 150
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from fsdp_qlora.errors import DONE, RUN_FAILED, SIGTERM
from tests import warm
from tests.test_kill_sweep import argv_of, result

VICTIMS = ("rank 0", "rank 1", "both ranks", "supervisor")
TERM_EVERY = 5


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


def main() -> None:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=10, help="seconds from hit to hit")
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    warm.call(warm.make_model, place)
    more = [f"--max_steps={args.steps}", "--num_epochs=99", "--save_every=5"]
    begin_s = time.monotonic()
    run = warm.start(argv_of(place, place / "unbroken", *more), place)
    assert run.wait(600) == DONE, run.err
    unbroken, unbroken_s = result(place / "unbroken", args.steps), time.monotonic() - begin_s
    print(f"unbroken  {args.steps} steps in {unbroken_s:.0f} s", flush=True)
    hits, rounds, begin_s = Counter[str](), 0, time.monotonic()
    while time.monotonic() - begin_s < 60 * args.minutes:
        out = place / f"round-{rounds}"
        hits += broken(place, out, more, args.every, rounds, hits["starts"])
        assert result(out, args.steps) == unbroken, f"round {rounds}: {out} is not {place}/unbroken"
        shutil.rmtree(out)
        rounds += 1
        said = ", ".join(f"{name} {count}" for name, count in sorted(hits.items()))
        print(f"round {rounds}   {time.monotonic() - begin_s:.0f} s  {said}", flush=True)
    shutil.rmtree(place)
    total_s = time.monotonic() - begin_s
    print(
        f"soaked    {total_s:.0f} s, {rounds} rounds of {args.steps} steps, all equal bit for bit"
    )
    print(f"effective {rounds * unbroken_s / total_s:.0%} of the time of unbroken runs")


if __name__ == "__main__":
    main()
