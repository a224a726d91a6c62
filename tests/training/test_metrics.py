"""The record of a run."""

import contextlib
import dataclasses
import json
import math
import os
import pty
import re
import select
import statistics
import sys
import termios
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from fsdp_qlora import cli, hardware
from fsdp_qlora.planning import rows as names
from fsdp_qlora.training import memory, metrics
from fsdp_qlora.training.metrics import Clock
from tests import tiny
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Alone:
    """A process group of one rank."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    peers: tuple[int, ...] = (0,)

    def gather_objects(self, value: object) -> list[object]:
        return [value]


@pytest.fixture
def pass_s(monkeypatch):
    """Lets seconds pass; none pass otherwise."""
    now_s = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    return lambda seconds: now_s.__setitem__(0, now_s[0] + seconds)


def record(step: int, **changes) -> dict:
    values = {"step": step, "epoch": step / 10, "loss": 4.0 - step, "learning_rate": 1e-4}
    return {**values, "grad_norm": 0.5, "num_trained_tokens": 90, "num_tokens": 100, **changes}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def run_steps(folder: Path, num_steps: int, **changes) -> None:
    with tiny.recorder(folder, Alone(), num_steps, config={"seed": 42}) as recorder:
        for step in range(1, num_steps + 1):
            recorder.clock.mark("forward")
            recorder.step(record(step, **changes))


def test_every_step_is_one_line_with_its_values_and_all_memory_fields(tmp_path):
    run_steps(tmp_path, 5)
    written = tiny.steps(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5]
    for line in written:
        expected = record(line["step"])
        assert {name: line[name] for name in expected} == expected
        assert set(line["ranks"][0]) == {*memory.PROCESS_FIELDS, "cpu_cores", "device_rows"}
        others = {"host_peak_used_gib", "cpu_cores", "num_cpu_cores", "host_rows"}
        assert set(line["host"]) == {*hardware.machine_memory(), *others}
        assert line["ranks"][0]["host_rss_gib"] > 0.05
        assert line["tokens_per_s"] == pytest.approx(100 / line["step_s"])


def test_the_first_line_names_config_versions_and_ranks(tmp_path):
    run_steps(tmp_path, 1)
    first = tiny.lines(tmp_path)[0]
    assert first["event"] == "run"
    assert first["config"] == {"seed": 42}
    assert first["num_ranks"] == 1
    assert first["versions"]["torch"] == metadata.version("torch")
    assert first["versions"]["python"].startswith("3.")


def test_the_loss_of_a_step_is_read_only_when_the_next_step_is_launched(tmp_path):
    with tiny.recorder(tmp_path, Alone(), 2) as recorder:
        loss = torch.tensor(9.0)
        recorder.step(record(1, loss=loss, grad_norm=torch.tensor(0.25)))
        assert tiny.steps(tmp_path) == []
        loss.fill_(7.0)  # as if the device computed it only now
        recorder.step(record(2))
        assert [(line["loss"], line["grad_norm"]) for line in tiny.steps(tmp_path)] == [(7.0, 0.25)]
    assert [line["step"] for line in tiny.steps(tmp_path)] == [1, 2]


def test_phases_add_up_over_micro_batches_and_make_the_step(pass_s):
    clock = Clock(CPU)
    for _ in range(2):
        for phase, seconds in (("forward", 0.5), ("backward", 2.0)):
            pass_s(seconds)
            clock.mark(phase)
    seconds = Clock.seconds(clock.lap())
    assert list(seconds.items()) == [("forward", 1.0), ("backward", 4.0)]
    pass_s(0.25)
    clock.mark("record")
    assert Clock.seconds(clock.lap()) == {"record": 0.25}


def test_step_seconds_cover_the_whole_time_except_what_an_event_tells_of(tmp_path, pass_s):
    with tiny.recorder(tmp_path, Alone(), 3) as recorder:
        for step in (1, 2, 3):
            pass_s(0.5)
            recorder.clock.mark("forward")
            pass_s(0.125)
            recorder.step(record(step))
        pass_s(3.0)
        recorder.event("eval", {"loss": 1.0})
        pass_s(0.25)
        recorder.step(record(4))
    steps = tiny.steps(tmp_path)
    phases = [(line["step_s"], line.get("forward_s"), line["other_s"]) for line in steps]
    assert phases == [(0.625, 0.5, 0.125)] * 3 + [(0.25, None, 0.25)]
    assert [line.get("record_s") for line in steps] == [None, 0.0, 0.0, None]


def test_recording_costs_milliseconds(tmp_path):
    """Of the quietest step: others compute on this machine too."""
    run_steps(tmp_path, 40)
    assert min(line["record_s"] for line in tiny.steps(tmp_path)[1:]) < 0.005


def test_summary_holds_totals_peaks_and_the_median_speed_without_the_first_three_steps(tmp_path):
    with tiny.recorder(tmp_path, Alone(), 5, config={"lr": 1e-5}) as recorder:
        recorder.event("load", {"load_s": 1.5})
        for step in range(1, 6):
            time.sleep(0.2 if step <= 3 else 0.01)
            recorder.step(record(step))
    totals, written = summary(tmp_path), tiny.steps(tmp_path)
    assert totals["is_complete"] is True
    assert totals["num_steps"] == 5
    assert totals["num_tokens"] == 500
    assert totals["num_trained_tokens"] == 450
    assert (totals["loss_first"], totals["loss_last"]) == (3.0, -1.0)
    assert totals["train_s"] == pytest.approx(sum(line["step_s"] for line in written))
    assert totals["steps_per_s"] == pytest.approx(5 / totals["train_s"])
    assert totals["tokens_per_s"] == pytest.approx(500 / totals["train_s"])
    speeds = [line["tokens_per_s"] for line in written[3:]]
    assert totals["tokens_per_s_median"] == pytest.approx(statistics.median(speeds))
    assert totals["total_s"] >= totals["train_s"]
    for name in memory.PROCESS_FIELDS:
        assert totals["peaks"]["ranks"][0][name] == max(line["ranks"][0][name] for line in written)
    assert totals["peaks"]["host"]["host_peak_used_gib"] > 0
    assert totals["events"] == [{"event": "load", "load_s": 1.5}]
    assert totals["config"] == {"lr": 1e-5}


def test_a_failed_run_keeps_its_last_step_and_says_that_it_is_incomplete(tmp_path):
    with pytest.raises(ZeroDivisionError), tiny.recorder(tmp_path, Alone(), 9) as recorder:
        recorder.step(record(1))
        recorder.step(record(2))
        raise ZeroDivisionError
    assert [line["step"] for line in tiny.steps(tmp_path)] == [1, 2]
    assert summary(tmp_path)["is_complete"] is False
    assert summary(tmp_path)["num_steps"] == 2


def test_a_loss_that_is_not_a_number_is_null_and_named(tmp_path):
    with tiny.recorder(tmp_path, Alone(), 2) as recorder:
        recorder.step(record(1, loss=torch.tensor(float("nan")), grad_norm=float("inf")))
        recorder.step(record(2, grad_norm=None))
    first, second = tiny.steps(tmp_path)
    assert (first["loss"], first["grad_norm"]) == (None, None)
    assert first["nonfinite"] == ["loss", "grad_norm"]
    assert "nonfinite" not in second
    assert summary(tmp_path)["loss_last"] == 2.0


def test_events_stand_between_the_steps_they_happened_between(tmp_path):
    with tiny.recorder(tmp_path, Alone(), 2) as recorder:
        recorder.step(record(1))
        recorder.event("eval", {"loss": torch.tensor(2.5)})
        recorder.step(record(2))
    order = [line.get("event", line.get("step")) for line in tiny.lines(tmp_path)]
    assert order == ["run", 1, "eval", 2]
    assert tiny.lines(tmp_path)[2]["loss"] == 2.5


def test_without_a_terminal_a_long_run_prints_some_twenty_plain_lines(tmp_path, capsys):
    run_steps(tmp_path, 100)
    printed = capsys.readouterr().out.splitlines()
    assert 20 <= len(printed) <= 22
    assert re.fullmatch(
        r"step 1/100 loss 3\.000 lr [\d.e-]+ [\d,]+ tok/s host [\d.]+/\d+ GiB ETA [\d:]+",
        printed[0],
    )
    mean = sum(4.0 - step for step in range(81, 101)) / 20  # of the last steps
    assert printed[-1].startswith(f"step 100/100 loss {mean:.3f} ")


def test_without_a_terminal_a_slow_run_prints_a_line_in_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "LINE_S", 0.0)
    run_steps(tmp_path, 100)
    assert capsys.readouterr().out.count(" loss ") == 100


def test_what_is_said_stands_after_the_steps_before_it(tmp_path, capsys):
    with tiny.recorder(tmp_path, Alone(), 1) as recorder:
        recorder.say("begin")
        recorder.step(record(1))
        recorder.say("saved")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["begin", "step", "saved"]


def test_without_a_terminal_a_long_step_prints_a_line_in_time(tmp_path, capsys, monkeypatch):
    """None between two steps: what happens there has lines of its own."""
    monkeypatch.setattr(cli, "LINE_S", 0.3)
    with tiny.recorder(tmp_path, Alone(), 3) as recorder:
        began_s = time.monotonic()
        recorder.step(record(1))
        time.sleep(1.0)
        recorder.flush()
        assert len(capsys.readouterr().out.splitlines()) == 1
        recorder.clock.mark("data")
        time.sleep(1.0)
        said = capsys.readouterr().out.splitlines()
        seconds = range(1, math.ceil(time.monotonic() - began_s) + 1)
        assert said and set(said) <= {
            f"step 2/3 forward, {s} s since the last one" for s in seconds
        }
        recorder.step(record(2))


@contextlib.contextmanager
def terminal(monkeypatch, num_columns):
    """A terminal at stderr; what is drawn there is in the list that comes."""
    (leader, follower), drawn = pty.openpty(), []
    termios.tcsetwinsize(follower, (24, num_columns))
    with os.fdopen(follower, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        yield drawn
        file.flush()
        while select.select([leader], [], [], 1.0)[0]:  # the kernel hands it over piece by piece
            drawn.append(os.read(leader, 100_000).decode())
    os.close(leader)


@pytest.mark.parametrize(("num_columns", "seen", "unseen"), [(60, "lr", "host"), (110, "GiB", "x")])
def test_the_bar_fits_the_terminal_and_evaluations_do_not_spoil_its_eta(
    tmp_path, monkeypatch, capsys, num_columns, seen, unseen
):
    monkeypatch.setenv("NO_COLOR", "1")
    with (
        terminal(monkeypatch, num_columns) as drawn,
        tiny.recorder(tmp_path, Alone(), 50) as written,
    ):
        for step in range(1, 4):
            written.step(record(step, loss=torch.tensor(3.0 / step)))
            if step == 1:
                time.sleep(1.0)
                written.event("eval", {"loss": 1.0})
        written.flush()
    last = re.split(r"[\r\n]", "".join(drawn).strip())[-1]
    assert re.search(r"^ *3/50 .*00:0\d left loss 1\.833 lr [\d.e-]+", last), last
    assert seen in last and unseen not in last and len(last) <= num_columns
    assert capsys.readouterr().out == ""


def test_what_takes_long_shows_a_bar_or_a_line_in_time_and_nothing_when_it_is_short(
    monkeypatch, capsys
):
    def work(is_silent=False, pause_s=0.0):
        with cli.Progress("loads", 4, "layers", is_silent) as progress:
            for _ in range(3):
                progress.update(1, 2**29)
            time.sleep(pause_s)

    work()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli, "LINE_S", 0.05)
    work(True, 0.3)
    assert capsys.readouterr().err == ""
    work(False, 0.3)  # nothing moves, and yet there are lines
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert re.fullmatch(r"loads     3/4 layers, [\d.]+ GiB/s, 0 s", lines[0])
    monkeypatch.setattr(cli, "DELAY_S", 0.1)
    with terminal(monkeypatch, 60) as drawn:
        work(False, 0.4)
    assert re.search(r"loads     3/4 layers, [\d.]+ GiB/s, 0 s.*[█#]", "".join(drawn))
    assert "\n" not in "".join(drawn).strip()


def record_with_ballast(world, folder: str) -> None:
    ballast = bytearray(b"x" * (world.rank * 400 * 2**20))
    with tiny.recorder(folder, world, 2) as recorder:
        for step in (1, 2):
            recorder.step(record(step, num_trained_tokens=10 + world.rank, num_tokens=100 * step))
    del ballast


def test_two_ranks_sum_their_tokens_and_show_their_memory_each(tmp_path):
    run_ranks(record_with_ballast, 2, str(tmp_path))
    written = tiny.steps(tmp_path)
    assert [line["num_tokens"] for line in written] == [200, 400]
    assert [line["num_trained_tokens"] for line in written] == [21, 21]
    rss = [rank["host_rss_gib"] for rank in written[1]["ranks"]]
    assert rss[1] - rss[0] == pytest.approx(400 / 1024, abs=0.1)
    assert len(summary(tmp_path)["peaks"]["ranks"]) == 2


def record_on_two_hosts(world, folder: str) -> None:
    """Rank 1 is alone on another host, where 90 of 100 GiB are in use."""
    world = dataclasses.replace(world, local_rank=0, local_size=1)
    there = dict.fromkeys(hardware.machine_memory(), 90.0) | {"host_total_gib": 100.0}
    if world.rank:
        hardware.machine_memory = lambda group: there
    with patch.object(os, "uname", lambda: SimpleNamespace(nodename=["near", "far"][world.rank])):
        recorder = tiny.recorder(folder, world, 1)
    with recorder:
        recorder.tracker.share = recorder.tracker.share._replace(slices_gib=1.0 + world.rank)
        recorder.step(record(1))


def test_the_memory_of_several_hosts_is_recorded_per_host(tmp_path):
    """Each host's own figures and rows; the fullest stands in the line of the step."""
    run_ranks(record_on_two_hosts, 2, str(tmp_path))
    here, there = tiny.steps(tmp_path)[0]["hosts"]
    assert here.items() >= tiny.steps(tmp_path)[0]["host"].items() and there["name"] == "far"
    assert (there["host_used_gib"], there["host_total_gib"]) == (90.0, 100.0)
    assert [host["host_rows"][names.HOSTED] for host in (here, there)] == [1.0, 2.0]
    totals = summary(tmp_path)
    assert (
        totals["peaks"]["hosts"][1].items() >= {"name": "far", "host_peak_used_gib": 90.0}.items()
    )
    assert [place["forward"][names.HOSTED] for place in totals["ledger"]["hosts"]] == [1.0, 2.0]
    assert "host far 90.0/100 GiB" in metrics._progress_words(tiny.steps(tmp_path)[0], [1.0])
    assert [metrics._of(*pair) for pair in ((0.25, 0.5), (0.3, 1.5), (1, 9.6), (2, 63.7))] == [
        *("0.2/0.5 GiB", "0.3/1.5 GiB", "1.0/10 GiB", "2.0/64 GiB")
    ]
    assert metrics.figures(tiny.steps(tmp_path)[0])["memory/host_gib"] == 90.0


@pytest.mark.gpu
def test_cuda_phases_are_the_time_of_the_device_and_reading_them_is_late():
    device = torch.device("cuda", 0)
    clock = Clock(device)
    began = time.perf_counter()
    torch.cuda._sleep(2_000_000_000)
    clock.mark("forward")
    lap = clock.lap()
    assert time.perf_counter() - began < 0.2
    assert Clock.seconds(lap)["forward"] > 0.3


def test_a_process_that_computes_is_busy_and_one_that_waits_is_not(tmp_path):
    """Between what the clocks of the process say just inside of a step and just around it."""
    tick_s, bounds = 2.5 / os.sysconf("SC_CLK_TCK"), []

    def look() -> tuple[float, float]:
        return time.process_time(), time.monotonic()

    with tiny.recorder(tmp_path, Alone(), 3) as recorder:
        around, _, within = look(), recorder.step(record(1)), look()
        for step, wanted_s in ((2, 0.0), (3, 0.4)):
            threading.Event().wait(0.3 if step == 2 else 0.0)
            while time.process_time() - within[0] < wanted_s:
                sum(range(2000))
            end, _, after = look(), recorder.step(record(step)), look()
            least = (end[0] - within[0] - tick_s) / (after[1] - around[1])
            most = (after[0] - around[0] + tick_s) / (end[1] - within[1])
            bounds.append((least, most))
            around, within = end, after
    _, idle, busy = tiny.steps(tmp_path)
    for (least, most), line in zip(bounds, (idle, busy), strict=True):
        assert least <= line["ranks"][0]["cpu_cores"] <= most, bounds
    # the machine's clock is coarse, and counts this process too
    assert busy["host"]["cpu_cores"] > busy["ranks"][0]["cpu_cores"] / 2
