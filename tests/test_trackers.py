"""What a tracker is told (train/trackers.py), and that it can neither stop nor delay a run.

The tracker is a stub with the calls of wandb 0.31 that are used, so that it can fail and hang.
With the real packages: tensorboard 2.21 and wandb 0.31 (offline) took tests/report/run, 8 steps and
two held-out losses, and tensorboard's own reader found the same numbers (2026-11-22).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora import config
from fsdp_qlora.config import PROJECT_DIR, TRACKERS
from fsdp_qlora.train import trackers
from tests.report.runs import REAL

STUB = """
import json, os, threading
from pathlib import Path
OUT = Path(os.environ["TRACKED"])
class Settings:
    model_fields = ("console", "silent")
    def __init__(self, **given): self.given = given
class Run:
    def log(self, values, step):
        with OUT.open("a") as file: file.write(json.dumps([step, values]) + "\\n")
        if step == int(os.environ.get("FAIL_AT", -1)): raise ConnectionError("no route\\nto host")
        if step == int(os.environ.get("HANG_AT", -1)): threading.Event().wait(60)
    def finish(self): OUT.open("a").write('"finished"\\n')
def init(settings, **given):
    OUT.write_text(json.dumps({**given, **settings.given}) + "\\n")
    return Run()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub of wandb that writes what it is told into a file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("TRACKED", str(tmp_path / "told"))
    return tmp_path / "told"


def follow(tmp_path: Path, patience_s: float = 5.0) -> tuple[list[str], float, float]:
    """Write the real record line by line: what was said, seconds of the run and of its end."""
    out, said = tmp_path / "my run", list[str]()
    out.mkdir()
    argv = [
        "--model_name=/home/ada/llama",
        "--log_to=wandb",
        "--group=g",
        "--dataset=/x/rows.jsonl",
    ]
    cfg = config.parse([*argv, f"--output_dir={out}"])
    lines = (REAL / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (out / "metrics.jsonl").open("w", buffering=1) as file:
        began_s = time.monotonic()
        with trackers.followed(cfg, out, True, said.append, patience_s):
            for line in lines:
                file.write(line[:50])
                file.write(line[50:])
            run_s = time.monotonic() - began_s
    return said, run_s, time.monotonic() - began_s - run_s


def test_every_step_and_held_out_loss_arrives_and_nothing_that_is_not_on_the_list(stub, tmp_path):
    said, _, _ = follow(tmp_path)
    begin, *told, end = map(json.loads, stub.read_text().splitlines())
    assert (said, end) == ([], "finished")
    assert (begin["project"], begin["name"], begin["group"]) == ("fsdp_qlora", "my run", "g")
    assert begin["console"] == "off" and "x_disable_meta" not in begin  # unknown to this release
    assert begin["config"].keys() == set(trackers.SETTINGS)
    record = [json.loads(line) for line in (REAL / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in record if "event" not in line}
    got = {step: values for step, values in told if "train/loss" in values}
    assert got.keys() == steps.keys() and len(got) == 8
    for step, values in got.items():
        for name in trackers.FIGURES:
            assert values[f"train/{name}"] == steps[step][name]
        assert values["memory/host_gib"] == steps[step]["host"]["host_used_gib"]
    held_out = [(step, values) for step, values in told if "held_out/loss" in values]
    losses = [line["loss"] for line in record if line.get("event") == "eval"]
    assert [step for step, _ in held_out] == [0, 8]
    assert [values["held_out/loss"] for _, values in held_out] == losses
    text = stub.read_text()
    assert not [word for word in ("/home/ada", "rows.json", "prompt") if word in text]


def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "3")
    said, _, _ = follow(tmp_path)
    assert said == ["note      the tracker failed (no route): metrics.jsonl goes on"]
    assert [json.loads(line)[0] for line in stub.read_text().splitlines()[1:]][-1] == 3


def test_a_tracker_that_hangs_delays_neither_the_run_nor_its_end(stub, tmp_path):
    """In a process of its own, which ends at once although the tracker's thread still waits."""
    code = (
        "import sys; from pathlib import Path; from tests import test_trackers as t\n"
        "import atexit, wandb, time; atexit.register(time.sleep, 60)\n"
        "print(*t.follow(Path(sys.argv[1]), 0.2), sep='|', flush=True)"
    )
    env = os.environ | {"HANG_AT": "2", "PYTHONPATH": f"{stub.parent / 'site'}:{PROJECT_DIR}"}
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    said, run_s, end_s = done.stdout.strip().split("|")
    assert "wandb has not taken all of it yet: metrics.jsonl has it" in said
    assert float(run_s) < 5 and 0.2 <= float(end_s) < 5  # the tracker would wait for 60
    assert (done.returncode, done.stderr) == (0, "") and time.monotonic() - began_s < 30


def test_a_run_that_fails_does_not_wait_for_its_tracker(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("HANG_AT", "1")
    monkeypatch.setattr("atexit.register", lambda *_: None)
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    cfg = config.parse(["--model_name=x", "--log_to=wandb", f"--output_dir={out}"])
    with pytest.raises(ZeroDivisionError), trackers.followed(cfg, out, True, print):
        began_s = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - began_s < trackers.SHORT_S + 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_told_before_anything_starts(name, tmp_path):
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from fsdp_qlora import config; from fsdp_qlora.training import preflight\n"
        "from fsdp_qlora.errors import UserError\n"
        "cfg = config.parse(['--model_name=x', f'--log_to={sys.argv[1]}'])\n"
        "try: preflight._check_libraries(cfg)\n"
        "except UserError as error: print(error.code, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert done.stdout == f"3 --log_to {name}: is not installed; pip install {name}\n", done.stderr


def test_flags_of_wandb_without_it_are_told_to_have_no_effect():
    cfg = config.parse(["--model_name=x", "--entity=me", "--log_to=tensorboard"])
    from fsdp_qlora.config import cfg_notes

    assert "--tracker_args has no effect: --log_to is not wandb" in cfg_notes(cfg)
