"""What a user types: the README line by line, and words that zsh and fish complete."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import completion
from fsdp_qlora.config import PROJECT_DIR
from tests import small_tokenizers, tiny
from tests.test_readme import commands

pytestmark = pytest.mark.system
# The beginning of a command -> why it is not run here.
NOT_RUN = {
    "git clone": "needs the network: this is a clone",
    "cd fsdp_qlora": "is part of it",
    "make venv": "has made the environment of this test",
    "pip install": "needs an environment of its own: tests/system/test_package.py",
    "make quickstart": "takes minutes: tests/test_quickstart.py",
    "make test": "has its own step in .ci/run",
    "python -m fsdp_qlora evaluate --adapter output/mine --tasks": "reads tasks from the hub",
    "python -m fsdp_qlora export gguf": "needs llama.cpp: tests/system/test_gguf.py",
}
MODELS = {"meta-llama/Llama-2-7b-hf": "llama", "meta-llama/Llama-2-70b-hf": "llama"}
MODELS |= {"Qwen/Qwen3-8B": "qwen3", "quickstart/SmolLM2-135M-Instruct": "llama"}
SHORT = ["--max_steps=2", "--sample_prompts=off", "--fit=off"]
# The beginning of a command -> what it is given beside, so that it needs no hub and little time.
BESIDE = {
    "python train.py --resume": [],
    "python train.py": SHORT,
    "torchrun": [*SHORT, "--dataset=my.jsonl", "--overwrite=true"],
    "python -m fsdp_qlora generate": ["--num_tokens=4"],
    "python -m fsdp_qlora doctor": ["--quick=true"],
}
# Words typed -> the line as it is completed.
TYPED = {
    "pl": "plan",
    "train --lora_r": "train --lora_rank",
    "train --train_type hqq_lo": "train --train_type hqq_lora",
    "recipe sh": "recipe show",
    "export mer": "export merged",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone whose hub is a cache of tiny models by the names of the README."""
    for name in ("train.py", "fsdp_qlora", "recipes"):
        (tmp_path / name).symlink_to(PROJECT_DIR / name)
    for name, kind in MODELS.items():
        cache = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        path = tmp_path / name if name.startswith("quick") else cache / "snapshots" / ("0" * 40)
        tiny.save_model(path, kind, vocab_size=600)
        small_tokenizers.save(path, "chatml")
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / "main").write_text("0" * 40)
    rows = [{"instruction": f"Add {i} and 1.", "output": str(i + 1)} for i in range(40)]
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no no"} for i in range(40)]
    asked = [{"prompt": "What is a whale?"}, {"prompt": "Who?"}]
    for name, table in (("my", rows), ("pairs", pairs), ("asked", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return tmp_path


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs_or_is_listed(place: Path):
    """In its order, on the CPU; what is not run is named above with the reason, and is there."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(place / "hub")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "XDG_CACHE_HOME": str(place)}
    lines = commands((PROJECT_DIR / "README.md").read_text(encoding="utf-8"))
    listed, num_run = set[str](), 0
    for words in lines:
        line = " ".join(words)
        if left := [start for start in NOT_RUN if line.startswith(start)]:
            listed.update(left)
            continue
        beside = next((own for start, own in BESIDE.items() if line.startswith(start)), [])
        command = [*words, *beside]
        done = subprocess.run(
            command, cwd=place, env=env, input="/quit\n", capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        num_run += 1
    assert listed == NOT_RUN.keys() and num_run >= 10
    assert (place / "output" / "mine" / "report.html").is_file()
    assert len((place / "answers.jsonl").read_text().splitlines()) == 2
    assert (place / "merged-nf4" / "config.json").is_file()


def test_fish_completes_what_is_typed(tmp_path: Path):
    (tmp_path / "own.fish").write_text(completion("fish"))
    for typed, whole in TYPED.items():
        code = f"source {tmp_path}/own.fish; complete -C 'fsdp-qlora {typed}'"
        command = ["fish", "--no-config", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout.split(), done.stderr) == (whole.split()[-1:], "")


def test_zsh_completes_what_is_typed(tmp_path: Path):
    """At a terminal, where the user has not set up completion."""
    (tmp_path / "own.zsh").write_text(completion("zsh"))
    shell, terminal = pty.fork()
    if not shell:
        os.environ.update(HOME=str(tmp_path), TERM="dumb")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    seen = ""

    def type_in(keys: str, until: str) -> None:
        nonlocal seen
        os.write(terminal, keys.encode())
        began, seen = time.monotonic(), ""
        while until not in seen and time.monotonic() - began < 20:
            seen += os.read(terminal, 10_000).decode(errors="replace")
        assert until in seen, seen

    type_in(f"source {tmp_path}/own.zsh; echo rea''dy\n", "ready")
    assert "not found" not in seen
    for typed, whole in TYPED.items():
        type_in(f"\x15fsdp-qlora {typed}\t", f"fsdp-qlora {whole} ")
    os.close(terminal)
    os.waitpid(shell, 0)
