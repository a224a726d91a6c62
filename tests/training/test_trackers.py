"""What trackers are told, by the real packages, and that none can stop or delay a run.

tensorboard, wandb (offline), trackio and swanlab (offline) run here; the other trackers of
accelerate are passed through untested.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fsdp_qlora import config
from fsdp_qlora.training import metrics as trackers
from tests import warm
from tests.report.runs import REAL

RUN_HERE = ("tensorboard", "wandb", "trackio", "swanlab")


class Fake:
    """A tracker that writes what it is told into a file, and can fail or hang at a step."""

    def __init__(self, path: Path, fail_at: int = -1, hang_at: int = -1) -> None:
        self.path, self.fail_at, self.hang_at = path, fail_at, hang_at

    def log(self, values: dict, step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, values]) + "\n")
        print("trackio prints without a switch")
        if step == self.fail_at:
            raise ConnectionError("no route\nto host")
        if step == self.hang_at:
            threading.Event().wait(60)

    def finish(self) -> None:
        self.log({"finished": 1}, 0)


def follow(out: Path, names: str, patience_s: float = 5.0) -> tuple[list[str], float, float]:
    """Write the real record line by line: what was shown, seconds of the run and of its end."""
    shown = list[str]()
    out.mkdir()
    argv = ["--model_name=/home/ada/llama", "--group=g", "--dataset=/x/rows.jsonl"]
    cfg = config.parse([*argv, f"--log_to={names}", f"--output_dir={out}"])
    lines = (REAL / "metrics.jsonl").read_text().splitlines(keepends=True)
    patience = mock.patch.object(trackers, "PATIENCE_S", patience_s)
    with (out / "metrics.jsonl").open("w", buffering=1) as file:
        began_s = time.monotonic()
        with patience, trackers.attach_trackers(cfg, True, shown.append):
            for line in lines:
                file.write(line[:50])
                file.write(line[50:])
            run_s = time.monotonic() - began_s
    return shown, run_s, time.monotonic() - began_s - run_s


def record_of(run_dir: Path) -> dict[str, dict[int, float]]:
    """Name of a figure -> step -> value, of the losses in metrics.jsonl."""
    found: dict[str, dict[int, float]] = {"train/loss": {}, "held_out/loss": {}}
    step = 0  # of an event: the last one before it
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        step = line.get("step", step)
        kind = {None: "train/loss", "eval": "held_out/loss"}.get(line.get("event"))
        if kind:
            found[kind][step] = line["loss"]
    return found


def of_tensorboard(run_dir: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = ("train/loss", "held_out/loss")
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


def of_trackio(run_dir: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {"train/loss": {}, "held_out/loss": {}}
    (path,) = (run_dir / "trackio").glob("*.db")
    with sqlite3.connect(path) as base:
        for step, text in base.execute("select step, metrics from metrics"):
            for name, value in json.loads(text).items():
                found.setdefault(name, {})[step] = value
        (settings,) = base.execute("select config from configs").fetchone()
        assert base.execute("select count(*) from system_metrics").fetchone() == (0,)
    assert trackers.SETTINGS[0] in json.loads(settings)
    return {name: found[name] for name in ("train/loss", "held_out/loss")}


@pytest.mark.slow
def test_four_trackers_at_once_get_every_loss_and_stay_quiet_and_inside_the_run(tmp_path):
    """Nothing that is not on the lists leaves the record, and nothing is written elsewhere."""
    home, run_dir = tmp_path / "home", tmp_path / "my run"
    home.mkdir()
    code = "import sys; from pathlib import Path; from tests.training import test_trackers as t\n"
    code += "print(t.follow(Path(sys.argv[1]), sys.argv[2], 60.0)[0])"
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(config.PROJECT_DIR)}
    env |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    argv = [sys.executable, "-c", code, str(run_dir), ", ".join(RUN_HERE)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    losses = record_of(run_dir)
    assert len(losses["train/loss"]) == 8 and len(losses["held_out/loss"]) == 2
    assert of_trackio(run_dir) == losses
    for name, steps in of_tensorboard(run_dir).items():
        assert steps == pytest.approx(losses[name], rel=1e-6)  # float32
    (wandb,), (swanlab,) = (
        run_dir.glob("wandb/offline-*/*.wandb"),
        run_dir.glob("swanlab/*/*.swanlab"),
    )
    for steps in losses.values():
        for loss in steps.values():
            assert repr(loss).encode() in wandb.read_bytes()
            packed = [struct.pack(kind, loss) for kind in ("<d", "<f")]
            assert any(number in swanlab.read_bytes() for number in packed)
    made = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
    for word in (b"/home/ada", b"rows.jsonl", b"prompt", str(config.PROJECT_DIR).encode()):
        assert [path for path in made if word in path.read_bytes()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "my run"]
    left = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    assert [path for path in left if path.parts[:2] != (".cache", "wandb")] == []  # its own log


@pytest.mark.slow
def test_rank_0_of_a_real_run_feeds_two_trackers_in_the_process_group_that_exists(tmp_path):
    warm.call(warm.make_model, tmp_path)
    argv = [f"--model_name={tmp_path / 'model'}", f"--dataset={tmp_path / 'data.jsonl'}"]
    argv += ["--precision=fp32", "--max_steps=3", "--world_size=2", "--context_length=64"]
    argv += ["--eval_split=4", "--log_to=stdout,tensorboard,trackio", "--quant_cache=off"]
    run = warm.start([*argv, f"--output_dir={tmp_path / 'out'}"], tmp_path)
    assert run.wait() == 0, run.err
    losses = record_of(tmp_path / "out")
    assert len(losses["train/loss"]) == 3 and len(losses["held_out/loss"]) == 2
    assert of_trackio(tmp_path / "out") == losses
    for name, steps in of_tensorboard(tmp_path / "out").items():
        assert steps == pytest.approx(losses[name], rel=1e-6)
    assert "rackio" not in run.out and "failed" not in run.out and run.err == ""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every tracker is a Fake: how it fails is set by a call."""

    def install(**faults: int) -> Path:
        def opened(name: str, *_: Any) -> Any:
            return Fake(tmp_path / name, **(faults if name == "wandb" else {}))

        monkeypatch.setattr(trackers, "_open", opened)
        return tmp_path / "wandb"

    return install


def told(path: Path) -> list[tuple[int, dict]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def test_every_step_and_held_out_loss_arrives_and_nothing_that_is_not_on_the_list(
    fake, tmp_path, capsys
):
    path = fake()
    shown, _, _ = follow(tmp_path / "my run", "wandb")
    *lines, end = told(path)
    assert (shown, end, capsys.readouterr().out) == ([], (0, {"finished": 1}), "")
    record = [json.loads(line) for line in (REAL / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in record if "event" not in line}
    got = {step: values for step, values in lines if "train/loss" in values}
    assert got.keys() == steps.keys() and len(got) == 8
    for step, values in got.items():
        wanted = {
            f"train/{name}": steps[step][name] for name in trackers.FIGURES if name in steps[step]
        }
        assert values == wanted | {"memory/host_gib": steps[step]["host"]["host_used_gib"]}
    held_out = {step: set(values) for step, values in lines if "held_out/loss" in values}
    assert held_out == {key: {"held_out/loss", "held_out/perplexity"} for key in (0, 8)}


def test_a_tracker_that_fails_is_one_line_and_the_run_and_the_other_one_go_on(fake, tmp_path):
    path = fake(fail_at=3)
    shown, _, _ = follow(tmp_path / "run", "wandb,trackio")
    assert shown == ["note      wandb failed (no route): metrics.jsonl goes on"]
    assert told(path)[-1][0] == 3 and told(tmp_path / "trackio")[-1] == (0, {"finished": 1})


def test_a_tracker_that_hangs_delays_neither_the_run_nor_its_end(tmp_path):
    """In a process of its own, which ends at once although the tracker's thread still waits."""
    code = (
        "import atexit, sys, time; from pathlib import Path\n"
        "from tests.training import test_trackers as t; atexit.register(time.sleep, 60)\n"
        "out = Path(sys.argv[1])\n"
        "t.trackers._open = lambda *_: t.Fake(out / 'told', hang_at=2)\n"
        "print(*t.follow(out / 'run', 'wandb', 0.2), sep='|', flush=True)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=config.PROJECT_DIR, **pipes) as process:
        shown, run_s, end_s = process.stdout.readline().strip().split("|")
        began_s = time.monotonic()
        assert (process.wait(), process.stderr.read()) == (0, "")
    assert "wandb has not taken all of it yet: metrics.jsonl has it" in shown
    assert float(run_s) < 5 and 0.2 <= float(end_s) < 5  # the tracker would wait for 60
    assert time.monotonic() - began_s < 30


def test_a_run_that_fails_does_not_wait_for_its_tracker(fake, tmp_path, monkeypatch):
    fake(hang_at=1)
    monkeypatch.setattr("atexit.register", lambda *_: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    cfg = config.parse(["--model_name=x", "--log_to=wandb", f"--output_dir={tmp_path}"])
    with pytest.raises(ZeroDivisionError), trackers.attach_trackers(cfg, True, print):
        began_s = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - began_s < trackers.PATIENCE_S  # a whole run would have so long


def test_every_tracker_is_known_to_accelerate_and_reported_before_anything_starts():
    code = (
        "import sys\n"
        "from fsdp_qlora import config; from fsdp_qlora.training import preflight\n"
        "from fsdp_qlora.errors import UserError\n"
        "for name in config.TRACKERS:\n"
        "    sys.modules[name] = None\n"
        "    cfg = config.parse(['--model_name=x', f'--report_to=stdout,{name}'])\n"
        "    try: preflight._check_libraries(cfg)\n"
        "    except UserError as error: print(error.code, error)\n"
        "from accelerate.tracking import LOGGER_TYPE_TO_CLASS as known\n"
        "print(set(config.TRACKERS) - set(known))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = [name.replace("_", "-") for name in config.TRACKERS]
    *lines, rest = done.stdout.splitlines()
    assert rest == "set()" and len(lines) == len(names), done.stderr
    for line, name, package in zip(lines, config.TRACKERS, names, strict=True):
        assert (
            line
            == f"3 --log_to {name}: needs {name}, which is not installed; pip install {package}"
        )
