"""train.py as a user runs it: a process, a tiny Llama with a real tokenizer, two ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora import config
from fsdp_qlora import run as train_run
from fsdp_qlora.__main__ import COMMANDS
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import BUG, DONE, ENVIRONMENT
from tests import tiny, warm

NUM_STEPS = 12
QUESTION = "What is 5?"
STEP_FIELDS = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "num_trained_tokens", "num_tokens"),
    *("tokens_per_s", "step_s", "data_s", "forward_s", "backward_s", "optimizer_s"),
    *("ranks", "host"),
}
RANK_FIELDS = {
    *("device_allocated_gib", "device_reserved_gib", "device_peak_allocated_gib"),
    *("device_peak_reserved_gib", "device_used_gib", "device_total_gib"),
    *("host_rss_gib", "host_pss_gib", "host_pinned_gib", "host_swap_gib", "device_rows"),
    "cpu_cores",
}
HOST_FIELDS = {"host_total_gib", "host_available_gib", "cgroup_limit_gib", "host_rows"}
SUMMARY_FIELDS = {
    *("num_steps", "train_s", "total_s", "steps_per_s", "tokens_per_s", "num_tokens", "peaks"),
    *("num_trained_tokens", "loss_first", "loss_last", "num_ranks", "versions", "config"),
    *("plan", "ledger"),
}
NOISE = re.compile(r"Warning|Traceback|warn|it/s\]|\r|\x1b|deprecat|Failed to load")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `data.jsonl`."""
    directory = tmp_path_factory.mktemp("run")
    warm.make_model(directory, **tiny.SIZES)
    return directory


def flags(place: Path, *more: str) -> list[str]:
    """A short run on the tiny model; later flags win."""
    return [
        f"--model_name={place / 'model'}",
        f"--dataset={place / 'data.jsonl'}",
        f"--quant_cache={place / 'cache'}",
        f"--max_steps={NUM_STEPS}",
        "--context_length=128",
        "--lora_rank=8",
        "--batch_size=4",
        "--lr=0.01",
        "--sample_tokens=4",
        *more,
    ]


def start(directory: Path, *command: str) -> subprocess.Popen:
    """Start Python on the CPU in a directory; no settings of torch are handed down."""
    ours = ("OMP_", "TOKENIZERS_", "PYTORCH_")
    env = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, *command],
        env=env | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(directory: Path, *command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(directory, *command)
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()  # its ranks end with it
    return process.returncode, out, err


def train(place: Path, out_dir: Path, *more: str) -> tuple[int, str, str]:
    """Run train.py on two ranks."""
    argv = flags(place, "--world_size=2", f"--output_dir={out_dir}", *more)
    return run(place, str(PROJECT_DIR / "train.py"), *argv)


def lines_of(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def steps_of(out_dir: Path) -> list[dict]:
    return [line for line in lines_of(out_dir) if "event" not in line]


def check_metrics(out_dir: Path) -> None:
    steps = steps_of(out_dir)
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    losses = [step["loss"] for step in steps]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    for step in steps:
        assert step.keys() >= STEP_FIELDS and step["host"].keys() >= HOST_FIELDS
        assert "nonfinite" not in step and step["step_s"] > 0 and step["num_trained_tokens"] > 0
        assert len(step["ranks"]) == 2
        for rank in step["ranks"]:
            assert rank.keys() == RANK_FIELDS and rank["host_rss_gib"] > 0.05
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_FIELDS and summary["is_complete"]
    assert (summary["num_steps"], summary["num_ranks"]) == (NUM_STEPS, 2)
    assert summary["num_tokens"] == sum(step["num_tokens"] for step in steps)
    held_out = [e["loss"] for e in lines_of(out_dir) if e.get("event") == "eval"]
    assert len(held_out) == 2 and held_out[1] < held_out[0]


def check_adapter(out_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(out_dir.parent / "model")
    ids = AutoTokenizer.from_pretrained(out_dir)(QUESTION, return_tensors="pt").input_ids
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, out_dir)
    adapted = model(ids).logits
    assert adapted.isfinite().all() and (adapted - before).abs().max() > 0.1
    # The directory of the run stands for the adapted model: no file of ours hides that.
    assert AutoModelForCausalLM.from_pretrained(out_dir)(ids).logits.equal(adapted)


def test_two_ranks_from_end_to_end(place: Path):
    """One command: falling loss, the whole record, the adapter, a picture, and no noise."""
    out_dir = place / "whole"
    extra = (
        "--eval_samples=8",
        f"--sample_prompt={QUESTION}",
        "--sample_tokens=8",
        "--verbose",
        "--watch",
    )
    code, out, err = train(place, out_dir, *extra, "--log-to", "stdout")
    assert (code, err) == (DONE, "")
    assert not NOISE.search(out)
    check_metrics(out_dir)
    names = {path.name for path in out_dir.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "run_config.json", "metrics.jsonl", "summary.json"),
        *("README.md", "report.html", "logs"),
        *("checkpoints", ".lock"),
    }
    assert (out_dir / "logs" / "rank1.log").read_text() == ""
    table = json.loads((out_dir / "run_config.json").read_text())
    assert table.pop("versions").keys() >= {"torch", "transformers", "bitsandbytes", "python"}
    cfg = config.TrainConfig(**table)
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.output_dir) == (8, 32, str(out_dir))
    for start_of_line in ("held-out  loss ", f"prompt    {QUESTION}", "before    ", "after     "):
        assert len(re.findall(f"^{re.escape(start_of_line)}", out, re.MULTILINE)) == 1
    assert out.count("--verbose has no effect") == 1
    assert out.splitlines()[1].startswith("fits ") and out.count("CPU ranks run as asked for") == 1
    assert out.count("memory    GiB on the host, ") == 1
    assert out.count(f"step {NUM_STEPS}/{NUM_STEPS} loss ") == 1
    assert len(re.findall(r"^watch     http://127\.0\.0\.1:\d+/ ", out, re.MULTILINE)) == 1
    words = ["saved", "next", "python", "python", "python", "vllm"]
    assert [line.split()[0] for line in out.splitlines()[-6:]] == words
    check_adapter(out_dir)


def test_the_ranks_of_torchrun_agree_on_the_default_directory(place: Path):
    """They join as they are; one directory, named by rank 0; ours is not asked to speak.

    The rows are longer than those the model was made for: that is said.
    """
    shutil.copytree(place / "model", place / "short")
    table = json.loads((place / "short" / "config.json").read_text())
    (place / "short" / "config.json").write_text(json.dumps(table | {"max_position_embeddings": 9}))
    script, more = str(PROJECT_DIR / "train.py"), ("--max_steps=2", "--save_model=false")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", script)
    model = f"--model_name={place / 'short'}"
    code, out, err = run(place, *torchrun, *flags(place, *more, "--sample_prompts=off", model))
    assert code == DONE and not NOISE.search(out)
    assert re.search(r"(?m)^note +rows of up to \d\d+ tokens: the model was made for 9$", out)
    assert "rror" not in err
    (out_dir,) = (place / "output").iterdir()
    assert out_dir.name.startswith("short-qlora-20")
    assert sorted(path.name for path in out_dir.iterdir()) == [
        *(".lock", "logs", "metrics.jsonl", "run_config.json", "summary.json"),
    ]
    assert [len(step["ranks"]) for step in steps_of(out_dir)] == [2, 2]
    table = json.loads((out_dir / "run_config.json").read_text())
    assert table["output_dir"] == f"output/{out_dir.name}"


def with_a_bug(argv: list[str], start) -> int:
    """As run.main, but rank 1 has a bug."""

    def broken(plan, world, *more, run=train_run.run):
        if world.rank == 1:
            raise LookupError("no such thing\nsecond line")
        run(plan, world, *more)

    train_run.run = broken
    return train_run.main(argv, start=start)


def test_a_bug_of_one_rank_is_one_line_and_a_trace_in_its_log(place: Path):
    """The rank that waits for it in a collective does not speak."""
    out_dir = place / "bug"
    argv = flags(place, "--world_size=2", f"--output_dir={out_dir}")
    ended = warm.start(argv, place, with_a_bug)
    log = out_dir / "logs" / "rank1.log"
    line = f"error: rank 1: LookupError: no such thing; the trace is in {log}\n"
    assert (ended.wait(), ended.err) == (BUG, line)
    assert log.read_text().count("Traceback") == 1 and "test_run.py" in log.read_text()


def on_no_screen(argv: list[str], start) -> int:
    """As `fsdp-qlora argv` whose stdout is on a full disk, and knows Latin-1 only."""
    sys.stdout.reconfigure(encoding="latin-1", errors="strict")
    return warm.command(argv, start)


def test_no_command_depends_on_its_screen(place: Path):
    """What it saves is whole; where it saves nothing, its code tells that the answer is lost."""
    out, name = place / "unseen", f"--model_name={place / 'model'}"
    own = [*flags(place, "--max_steps=2", "--eval_samples=4"), f"--sample_prompt={'…你' * 99}"]
    made: dict[str, tuple[list[str], Path | None]] = {
        "train": ([*own, "--world_size=1", f"--output_dir={out}"], out / "report.html"),
        "plan": ([name], None),
        "data": (own, None),
        "doctor": (["--quick"], None),
        "cache": (["list"], None),
        "recipe": (["list"], None),
        "fetch": (["docstrings", f"--out={place / 'rows'}"], place / "rows"),
        "report": ([str(out), f"--out={place}"], place / "report.html"),
        "evaluate": ([f"--adapter={out}"], out / "evaluation.json"),
        "generate": ([f"--adapter={out}", "--prompt=你", "--num_tokens=2"], None),
        "export": (
            ["expanded", name, f"--out={place / 'e'}", "--expansion_rate=0.5"],
            place / "e" / "config.json",
        ),
    }
    assert {*made, "bench", "watch"} == {*COMMANDS}  # which take minutes, and never end
    for command, (argv, file) in made.items():
        screen = place / f"screen of {command}"  # its own: other tests write to files in `place`
        screen.mkdir()
        (screen / "1.out").symlink_to("/dev/full")
        ended = warm.start([command, *argv], screen, on_no_screen)
        code = ended.wait()
        lost = "warning   stdout has not taken all that was printed: No space left on device\n"
        assert ended.err.endswith(lost) or command == "train", (command, ended.err)
        assert code == (ENVIRONMENT if file is None else DONE), (command, ended.err)
        assert file is None or file.exists(), command
