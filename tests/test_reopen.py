"""A finished run opened again: evaluated and asked, from its directory alone."""

import json
import os
import subprocess
import sys

import pytest

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import UserError
from fsdp_qlora.results import reopen
from tests import tiny

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
ROWS = [{"prompt": f"say {word}", "completion": word * 3} for word in ("la", "lo", "li", "lu")] * 6


def run(*words, text=""):
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=PROJECT_DIR, env=ENV, capture_output=True, text=True, input=text
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny model trained on few rows by train.py."""
    directory = tmp_path_factory.mktemp("run")
    model = tiny.save_model(directory / "model", vocab_size=384)
    tiny.save_tokenizer(model, [row["prompt"] + row["completion"] for row in ROWS])
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    done = run(
        *("train.py", f"--model_name={model}", f"--dataset={rows}", "--eval_samples=4"),
        *("--world_size=1", "--precision=fp32", "--lora_rank=4", "--lora_dropout=0", "--lr=0.02"),
        *("--batch_size=4", "--num_epochs=6", "--quant_cache=off"),
        *(f"--output_dir={directory / 'out'}", "--sample_prompt=say la", "--sample_tokens=6"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "out"


def test_evaluate_finds_the_losses_of_the_run(finished):
    """Reference: the held-out losses that training recorded before and after."""
    done = run("-m", "fsdp_qlora", "evaluate", "--adapter", str(finished))
    assert done.returncode == 0, done.stderr
    found = json.loads((finished / "evaluation.json").read_text())
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    losses = {line["when"]: line["loss"] for line in lines if line.get("event") == "eval"}
    assert found["base"]["loss"] == pytest.approx(losses["before"], rel=1e-5)
    assert found["adapter"]["loss"] == pytest.approx(losses["after"], rel=1e-5)
    assert losses["after"] < losses["before"] - 0.5


def test_generate_gives_the_answer_of_the_trained_model(finished):
    """Reference: the answer that training recorded at its end."""
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    answers = {line["when"]: line["answer"] for line in lines if line.get("event") == "sample"}
    flags = ("--adapter", str(finished), "--prompt", "say la", "--num_tokens", "6", "--raw")
    done = run("-m", "fsdp_qlora", "generate", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answers["after"]
    flags = ("--adapter", str(finished), "--num_tokens", "6", "--raw", "--temperature", "3")
    done = run("-m", "fsdp_qlora", "generate", *flags, text="say la\nsay lo\nsay la\n\n")
    drawn = done.stdout.splitlines()
    assert drawn[0] == drawn[2] != answers["after"]
    assert len(drawn) == 3


def test_a_directory_without_an_adapter_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="adapter_config"):
        reopen.config_of(tmp_path, [])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="must hold a LoRA adapter"):
        reopen.config_of(tmp_path, [])
