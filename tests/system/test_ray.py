"""The script of recipes/cluster.md trains in Ray Train's workers as two ranks of ours do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fsdp_qlora
from fsdp_qlora.config import PROJECT_DIR
from tests import warm

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # Ray starts its workers twice
OPTIONS = {"max_steps": 4, "context_length": 64, "lora_rank": 4, "lr": 1e-3, "save_every": "1"}
STUMBLE = """
def stumble(line):
    marker = pathlib.Path(OUT + ".stumbled")
    if line["step"] == 3 and not marker.exists():
        marker.touch()
        raise KeyError("a worker fails")


import pathlib
"""


def test_the_script_of_the_page_has_the_losses_of_two_ranks(tmp_path: Path, monkeypatch):
    """On two CPU workers; one fails at step 3, and Ray's second attempt goes on bit for bit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    warm.call(warm.make_model, tmp_path)
    model, rows, out = (str(tmp_path / name) for name in ("model", "data.jsonl", "ray"))
    names = {"model_name": model, "dataset": rows, "output_dir": str(tmp_path / "own")}
    own = fsdp_qlora.train(fsdp_qlora.TrainConfig(**OPTIONS | names, world_size=2))
    page = (PROJECT_DIR / "recipes" / "cluster.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = re.sub(r"MODEL, ROWS, OUT = .*", f"MODEL, ROWS, OUT = {(model, rows, out)}", script)
    script = re.sub(r"OPTIONS = .*", f"OPTIONS = {OPTIONS}", script)
    script = script.replace("use_gpu=True", "use_gpu=False").replace("cpu:gloo,cuda:nccl", "gloo")
    script = script.replace('print(line["step"], line["loss"])', "stumble(line)")
    (tmp_path / "script.py").write_text(STUMBLE + script)
    env = {**os.environ, "PYTHONPATH": str(PROJECT_DIR)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ray.stumbled").exists()
    lines = map(json.loads, (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "event" not in line}
    assert list(losses.values()) == own.losses and len(losses) == OPTIONS["max_steps"]
    weights = [
        Path(place, "adapter_model.safetensors").read_bytes() for place in (out, own.output_dir)
    ]
    assert weights[0] == weights[1]
