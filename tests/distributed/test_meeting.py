"""Ranks of several machines meet, or say why not: fsdp_qlora/distributed/meeting.py.

Two process groups of torchrun on this machine, each with a directory of its own, stand for hosts.
"""

import contextlib
import functools
import importlib
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from fsdp_qlora import run as train_run
from fsdp_qlora.arch import files
from fsdp_qlora.distributed import launch, meeting
from fsdp_qlora.distributed.meeting import Meeting
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, RUN_FAILED, UserError
from fsdp_qlora.training import checkpoint, preflight
from tests import faults, warm
from tests import test_kill_sweep as kill_sweep

SHORT = ("--max_steps=2", "--save_model=false", "--context_length=64", "--log_to=stdout")


def free_port() -> int:
    """A port below those that the system gives away: no other test has it until a rank listens."""
    while True:
        with contextlib.suppress(UserError):
            return launch.find_port(random.SystemRandom().randrange(10_000, 30_000))


def start(place: Path, rank: int, port: int, *argv: str, main=None, **env: str) -> warm.Run:
    """Start a rank that is alone on its host."""
    names = ("RANK", "GROUP_RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = dict(zip(names, map(str, (rank, rank, 0, 2, 1)), strict=True)) | env
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    flags = [f"--model_name={place / 'model'}", f"--dataset={place / 'data.jsonl'}", *SHORT]
    own = place / f"host{rank}"
    own.mkdir(exist_ok=True)
    flags += [f"--quant_cache={own / 'quantized'}", f"--token_cache={own / 'tokens'}"]
    return warm.start([*flags, *argv], place, main, **env)


def impatient(argv, **more) -> int:
    """`train` that waits for two seconds."""
    meeting.MEETING_S, meeting.REMIND_S = 2.0, 1.0
    return train_run.main(argv, **more)


def test_every_start_is_a_round_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """What ranks that are gone have left in torchrun's store is taken for no living rank."""
    monkeypatch.setenv(meeting.AGENT_STORE, "True")
    monkeypatch.setattr(meeting, "POLL_S", 0.001)
    store = dist.HashStore()
    places = []
    for number in ("1", "2"):
        late = Meeting(store, 1, 2, "127.0.0.1:1")
        waiting = threading.Thread(target=late.hold, args=(print,))
        waiting.start()  # sees the round before, which was complete
        waiting.join(0.05)
        assert waiting.is_alive()
        first = Meeting(store, 0, 2, "127.0.0.1:1")
        first.hold(print)
        waiting.join(5)
        assert (first.round, late.round) == (number, number) and first.places == late.places
        places.append(first.places)
    assert places[0] != places[1] and first.link() == "lo"


def test_a_process_that_is_a_rank_already_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Twice RANK=1 by hand."""
    monkeypatch.setattr(meeting, "MEETING_S", 0.2)
    store = dist.HashStore()
    Meeting(store, 0, 3, "127.0.0.1:1")
    store.set("1/1", "host9 12 0 10.0.0.9")
    with pytest.raises(UserError, match="rank 1: is process 12 on host9 already; start each"):
        Meeting(store, 1, 3, "127.0.0.1:1").hold(print)
    with pytest.raises(UserError, match=r"rank 0 of 3 \(there: 1 on host9, 2 on .*\): not at 127"):
        Meeting(store, 2, 3, "127.0.0.1:1").hold(print)


def test_a_stranger_is_refused_and_the_run_goes_on(place: Path):
    """It has the same host, port and rank, and another torchrun has started it."""
    port = free_port()
    ours, theirs = {"TORCHELASTIC_RUN_ID": "ours"}, {"TORCHELASTIC_RUN_ID": "theirs"}
    out = f"--output_dir={place / 'ours'}"
    first = start(place, 0, port, out, **ours)
    stranger = start(place, 1, port, out, **theirs)
    assert stranger.wait() == ENVIRONMENT
    line = f"error: localhost:{port}: is where another run meets (torchrun ours, 2 ranks; this one"
    assert stranger.err.startswith(line) and stranger.err.count("\n") == 1
    second = start(place, 1, port, out, **ours)
    assert (first.wait(), second.wait()) == (DONE, DONE), first.err + second.err
    assert {path.name for path in (place / "ours").iterdir()} >= {"metrics.jsonl", "logs"}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_before_the_meeting_tells_the_others(place: Path, failing: int):
    """They end at once, and name it."""
    port = free_port()
    argv = [["--max_steps=2"], ["--max_steps=2"]]
    argv[failing] = ["--lora_rank=none"]
    ranks = [start(place, rank, port, *argv[rank]) for rank in (0, 1)]
    assert [rank.wait(20) for rank in ranks] == [INPUT, INPUT]
    own, other = ranks[failing].err, ranks[1 - failing].err
    assert own.startswith("error: --lora_rank none") and own.count("\n") == 1
    assert other.startswith(f"error: rank {failing} (") and "--lora_rank none" in other


def test_who_is_missing_is_named(place: Path):
    """Every 30 s, and after 300 s in the error."""
    port = free_port()
    alone = start(place, 0, port, main=impatient)
    assert alone.wait(30) == ENVIRONMENT
    assert re.search(r"waiting   [12] s for rank 1 of 2 \(there: 0 on ", alone.out)
    assert f"at localhost:{port}" in alone.out and "rank 1 of 2" in alone.err
    alone = start(place, 1, port, main=impatient)
    assert alone.wait(30) == ENVIRONMENT
    rest = rf"s for rank 0 at localhost:{port} \(Connection refused\)"
    assert re.search(f"waiting   [12] {rest}", alone.out)
    assert alone.err.count("\n") == 1 and "rank 0 could not be reached for 2 s" in alone.err


def stops_where(name: str, argv, **more) -> int:
    """`train` that stops without a word, as a host that loses its power does, at a function."""

    def stop(*_, **__):
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

    module, _, function = name.rpartition(".")
    setattr(importlib.import_module(module), function, stop)
    return train_run.main(argv, **more)


LOST = ("torch.distributed.init_process_group", "fsdp_qlora.training.preflight.facts")


@pytest.mark.parametrize("name", LOST)
def test_a_host_lost_before_the_run_has_begun_is_named(place: Path, name: str):
    """Between the meeting and the first agreement; the others do not wait for half an hour."""
    main = functools.partial(stops_where, name)
    ranks = both(place, ("--hang_timeout=5", f"--output_dir={place / name}"), (), (), main=main)
    try:
        assert ranks[0].wait(40) == RUN_FAILED
        assert "stops" in ranks[1].out and ranks[0].err.count("\n") == 1
        line = r"error: \S+ \(rank 1\): is gone.*: no sign of life for \d+ s; no step is saved"
        assert re.match(line, ranks[0].err), ranks[0].err
    finally:
        for rank in ranks:
            rank.process.kill()


def both(place: Path, argv: tuple[str, ...], *more: tuple[str, ...], main=None, **env: str):
    """A run of a rank on each host, each with arguments of its own; the last of a kind wins."""
    port = free_port()
    mains = (None, main)
    return [start(place, i, port, *argv, *more[i], main=mains[i], **env) for i in (0, 1)]


def change(file: Path) -> None:
    """Flip a bit of its largest tensor."""
    content = bytearray(file.read_bytes())
    last = max(files.read_header(file).values(), key=lambda ref: ref.nbytes)
    content[last.start + last.nbytes - 1] ^= 1
    file.write_bytes(content)


def test_ranks_that_differ_are_refused_on_all_of_them(place: Path):
    """Options first; then what the files hold, whatever their paths are called."""
    ranks = both(place, ("--lr=0.01",), (), ("--lr=0.02", "--seed=7", "--max_steps=3"))
    for rank in ranks:
        assert rank.wait(30) == INPUT
        lines = rank.err.splitlines()
        assert "differ in --max_steps, --lr, --seed; start all with" in lines[0]
        assert [line.split()[0] for line in lines[1:]] == ["rank", "--max_steps", "--lr", "--seed"]
        assert "0.01" in lines[3] and "rank 1 (" in lines[3] and lines[3].endswith(": 0.02")
    own = place / "own"
    shutil.copytree(place / "model", own / "model", dirs_exist_ok=True)
    rows = (place / "data.jsonl").read_text().splitlines(keepends=True)
    (own / "rows.jsonl").write_text("".join(rows))
    same = (f"--model_name={own / 'model'}", f"--dataset={own / 'rows.jsonl'}")
    saves = (f"--output_dir={place / 'same'}", "--save_model=true")
    ranks = both(place, saves, (), same)
    assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[1].err
    first, other = place / "same", own / "adapter"  # as after a fetch of a name that has moved on
    shutil.copytree(first, other)
    change(other / "adapter_model.safetensors")
    begun = [(f"--init_adapter={path}",) for path in (first, other)]
    for rank in both(place, (f"--output_dir={place / 'begun'}",), *begun):
        assert rank.wait(30) == INPUT
        assert "differ in init_adapter; start" in rank.err.splitlines()[0]
    (own / "rows.jsonl").write_text("".join(rows[1::-1] + rows[2:-8]))
    change(*(own / "model").glob("*.safetensors"))
    ranks = both(place, ("--max_steps=-1",), (), same)
    for rank in ranks:
        assert rank.wait(30) == INPUT
        assert "differ in base_samples, rows, tokens, steps; start" in rank.err.splitlines()[0]


def test_a_library_that_only_some_hosts_have_is_a_difference():
    """Their layers would compute otherwise: --liger auto goes by what is installed."""
    name = "version of liger-kernel"
    for every in (({name: "0.8.5"}, {}), ({}, {name: "0.8.5"})):
        with pytest.raises(UserError, match=rf"differ in {name}; start all with") as caught:
            meeting.compare(every, ("a", "b"))
        assert sorted(re.findall("none|0.8.5", caught.value.__notes__[1])) == ["0.8.5", "none"]


def without_disk(argv, **more) -> int:
    """`train` on a host that has no checkpoint."""

    def fail(*_, **__):
        raise OSError("no such file")

    checkpoint.safe_open = preflight._find = fail
    return train_run.main(argv, **more)


def test_a_restart_goes_on_from_the_disk_of_rank_0(place: Path):
    """By itself, with equal bits, although the other host has neither checkpoint nor directory."""
    argv = ("--max_steps=4", "--save_every=2", "--save_model=true", "--lora_dropout=0.1")
    whole, broken, other = (f"--output_dir={place / name}" for name in ("whole", "broken", "other"))
    ranks = both(place, argv, (whole,), (other,))
    assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[1].err
    line = f"rank 0 writes to {place / 'whole'}; --output_dir {place / 'other'} is unused"
    assert line in ranks[1].out and line not in ranks[0].out
    fault = {faults.VARIABLE: "kill:all:post-backward:4"}
    assert DONE not in [rank.wait() for rank in both(place, argv, (broken,), (other,), **fault)]
    restart = {"TORCHELASTIC_RESTART_COUNT": "1"}
    ranks = both(place, argv, (broken,), (other,), main=without_disk, **restart)
    assert [rank.wait() for rank in ranks] == [DONE, DONE], ranks[1].err
    assert "step-2: 2 of 4 steps are done" in ranks[0].out and not (place / "other").exists()
    first, second = (kill_sweep.result(place / name, 4) for name in ("whole", "broken"))
    assert first == second
