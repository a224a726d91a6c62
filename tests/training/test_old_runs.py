"""A run that an older version of the trainer began goes on with equal bits.

The old version is a commit in a git worktree. Its default learning rate is changed there, as a
release may change it: a resumed run keeps what it began with.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import DONE
from tests import warm
from tests.test_kill_sweep import result
from tests.training.test_resume import make_place

OLD = "f05eea4215f628d3499f2e3a91c7c2843991616f"
NUM_STEPS, STOP_AFTER = 6, 3
OLD_LR = "0.0071"  # was never a default of any version
TERMINATED = 143
# As the old version names them; --verbose has had no effect for long.
OPTIONS = (
    *("--world_size=2", f"--max_steps={NUM_STEPS}", "--context_length=64", "--lora_rank=4"),
    *("--batch_size=1", "--gradient_accumulation_steps=2", "--save_every=1", "--eval_samples=4"),
    *("--sample_tokens=2", "--lora_dropout=0.1", "--verbose=true"),
)


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, f"git {' '.join(words)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def old_tree(tmp_path: Path):
    """The old version, with another default learning rate; a history without it is a failure."""
    has_commit = ["git", "cat-file", "-e", f"{OLD}^{{commit}}"]
    if subprocess.run(has_commit, cwd=PROJECT_DIR, capture_output=True).returncode:
        git("fetch", "--depth=1", "origin", OLD)  # the clone of a CI is shallow
    tree = tmp_path / "old"
    git("worktree", "add", "--detach", str(tree), OLD)
    options = tree / "fsdp_qlora" / "config.py"
    before = options.read_text()
    after = before.replace("lr: float = flag(1e-5,", f"lr: float = flag({OLD_LR},")
    assert after != before
    options.write_text(after)
    yield tree
    git("worktree", "remove", "--force", str(tree))


def train(tree: Path, *argv: str, **env: str) -> tuple[int | None, str, str]:
    """Run a version of the trainer as a user does: exit code, stdout, stderr."""
    env = {**os.environ, "PYTHONPATH": str(tree), **env}
    command = [sys.executable, "train.py", *argv]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_run_of_an_old_version_goes_on_with_equal_bits(tmp_path: Path, old_tree: Path):
    """Losses, gradient norms, rates, moments and the adapter, by the old code and by this one."""
    place, out = make_place(tmp_path), tmp_path / "run"
    paths = {"model_name": place / "model", "dataset": place / "data.jsonl", "output_dir": out}
    paths |= {"quant_cache": tmp_path / "quant", "token_cache": tmp_path / "tokens"}
    argv = [*(f"--{name}={path}" for name, path in paths.items()), *OPTIONS]
    stopped = train(old_tree, *argv, FSDP_QLORA_FAULT=f"term:0:post-forward:{STOP_AFTER}")
    assert stopped[0] == TERMINATED, stopped
    results = {}
    for name in ("old", "new"):
        copy = shutil.copytree(out, tmp_path / f"by-{name}")
        if name == "old":
            code, said, err = train(old_tree, f"--resume={copy}")
        else:
            run = warm.start([f"--resume={copy}"], tmp_path)
            code, said, err = run.wait(), run.out, run.err
        assert code == DONE, err
        adapter = load_file(copy / "adapter_model.safetensors")
        results[name] = result(copy, NUM_STEPS) | {
            # Its header names the version that wrote it.
            "adapter_model.safetensors": {key: t.tobytes() for key, t in adapter.items()}
        }
        assert name == "old" or "options that are no more, and were set: verbose" in said
        assert f": {STOP_AFTER} of {NUM_STEPS} steps are done" in said
    rates = {float.fromhex(step[3]) for step in results["old"]["steps"]}
    assert max(rates) == float(OLD_LR)
    assert results["new"] == results["old"]
