"""Every type is equal or refused by the oldest transformers that a GPU machine was measured with.

The sweep of tests/model/test_model_sweep.py, whose table is of the newest, in another process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
PACKAGES = ("transformers==5.17.0", "huggingface_hub<2")
SWEPT = ("what_is_accepted", "every_type_is_built", "windows_and_sinks", "another_form")


@pytest.mark.timeout(1200)
def test_the_sweep_holds_with_transformers_5_17(tmp_path: Path):
    """Loss, logits and gradients, padded and packed, at all levels; what cannot pack is said."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={tmp_path}"]
    subprocess.run([*pip, *PACKAGES], check=True)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.strip() == "5.17.0", found.stderr
    pytest_ = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-o",
        "timeout=0",
    )
    run = subprocess.run(
        [*pytest_, "tests/model/test_model_sweep.py", "-k", " or ".join(SWEPT)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 7, run.stdout
