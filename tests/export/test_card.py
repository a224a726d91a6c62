"""The model card: its figures are those of the record, and no secret is in it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fsdp_qlora import arch, config, record
from fsdp_qlora.export import hub

RECORD = Path(__file__).parents[1] / "report" / "run"
CANARIES = {
    "hf": "hf_CanaryCanaryCanaryCanary01",
    "openai": "sk-canarycanarycanary02",
    "github": "ghp_canarycanarycanary03",
    "wandb": "0123456789abcdef0123456789abcdef01234567",
    "aws": "AKIACANARYCANARY05",
    "environment": "correct horse battery staple",
    "password": "pa55word",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A directory with the record of a run."""
    return Path(shutil.copytree(RECORD, tmp_path / "my-run"))


def parse(run_dir: Path, *flags: str) -> config.TrainConfig:
    return config.parse(["--model_name=llama-2-7b", f"--output_dir={run_dir}", *flags])


def write(cfg: config.TrainConfig) -> str:
    info = arch.read("llama-2-7b", need_weights=False)
    return hub.write_card(cfg.resolved_output_dir, cfg, info).read_text()


def value(text: str, name: str) -> str:
    """The cell beside a name."""
    found = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    assert len(found) == 1, (name, found)
    return found[0]


def test_its_figures_are_those_of_the_record(run_dir: Path):
    """Losses, memory, versions, what was trained."""
    text = write(parse(run_dir, "--lora_rank=8", "--dataset=my.jsonl"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    evals = [line["loss"] for line in lines if line.get("event") == "eval"]
    both = f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
    assert value(text, "loss of the first and the last step") == both
    both = f"{evals[0]:.4f} -> {evals[-1]:.4f}"
    assert value(text, "held-out loss before and after") == both
    peak = max(step["host"]["host_peak_used_gib"] for step in steps)
    assert value(text, "peak memory of the host, all programs") == f"{peak:.1f} GiB"
    assert value(text, "steps") == str(len(steps)) and value(text, "data set") == "my.jsonl"
    assert value(text, "trained parameters").startswith("19,988,480 (")
    assert value(text, "base in training") == "nf4_dq" and "--lora_rank 8" in text
    for name, version in lines[0]["versions"].items():
        assert value(text, name) == version
    cards = [rank["device_peak_reserved_gib"] for step in steps for rank in step["ranks"]]
    assert ("peak memory of a GPU" in text) == any(cards)


def test_its_command_makes_the_same_run(run_dir: Path):
    """Parsed again it gives the configuration, but for the directory."""
    flags = ["--lora_rank=8", "--use_cpu_offload=false", "--lr=3e-4", "--system_prompt=It's | ok"]
    flags += ["--eval_split=0.1", "--lora_target_modules=q_proj,v_proj"]
    cfg = parse(run_dir, *flags)
    block = re.search(r"## Command\n\n```bash\n(.*)\n```", write(cfg))
    assert block is not None
    words = shlex.split(block[1])
    assert words[:2] == ["python", "train.py"]
    assert config.parse([*words[2:], f"--output_dir={run_dir}"]) == cfg


def test_no_planted_secret_comes_through(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Not from options, not from the record, not from the environment; the rest stays."""
    monkeypatch.setenv("MY_API_KEY", CANARIES["environment"])
    monkeypatch.setenv("HF_TOKEN", CANARIES["hf"])
    url = f"https://alice:{CANARIES['password']}@example.org/rows.jsonl?token={CANARIES['aws']}"
    prompt = " ".join([CANARIES["openai"], CANARIES["environment"], "be helpful"])
    cfg = parse(run_dir, "--lora_rank=8")  # which refuses secrets
    cfg = dataclasses.replace(cfg, dataset=url, system_prompt=prompt)
    (run_dir / "summary.json").unlink()  # when the card is written there is none yet
    path = run_dir / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    event = json.loads(first)
    event["lines"] = [f"data      {CANARIES['github']} of {CANARIES['wandb']}, 12 rows"]
    path.write_text("\n".join([json.dumps(event), *rest]) + "\n")
    raw = hub.card_text(cfg, arch.read("llama-2-7b", need_weights=False), record.read(run_dir))
    planted = [name for name, secret in CANARIES.items() if secret in raw]
    assert planted == [name for name in CANARIES if name != "hf"]  # the environment is not told
    text = write(cfg)
    assert [name for name, secret in CANARIES.items() if secret in text] == []
    assert "12 rows" in text and "be helpful" in text and "example.org/rows.jsonl" in text
    assert all(os.environ[name] not in text for name in ("MY_API_KEY", "HF_TOKEN"))


def test_its_header_names_what_the_hub_knows(run_dir: Path):
    """A hub name is the base; a path of this machine is none, and breaks no table."""
    from_hub = parse(run_dir, "--model_name=meta-llama/Llama-2-7b-hf", "--dataset=org/rows:en")
    header = ModelCard(hub.card_text(from_hub, arch.read("llama-2-7b", False), None)).data
    assert (header.base_model, header.library_name) == ("meta-llama/Llama-2-7b-hf", "peft")
    assert header.datasets == ["org/rows"] and header.tags == ["lora", "fsdp_qlora", "qlora"]
    odd = run_dir / "a|b`c"
    odd.mkdir()
    local = parse(run_dir, f"--model_name={odd}", "--dataset=data/rows.py:load")
    text = hub.card_text(local, arch.read("llama-2-7b", False), None)
    assert "base_model" not in text and "datasets" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_a_record_that_cannot_be_read_costs_only_the_figures(run_dir: Path):
    """The adapter is saved by then."""
    (run_dir / "metrics.jsonl").write_text("{}\n{}\n")
    text = write(parse(run_dir))
    assert "## Results" not in text and "## Command" in text
