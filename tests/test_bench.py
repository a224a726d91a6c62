"""`bench peers`: arms that really run, in turn, on the same rows; and what voids or fails a row."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.results.bench import attempt, process, report
from tests.model_files import write_model

HAS_TRL = importlib.util.find_spec("trl") is not None
BATCH_SIZE, LENGTH, NUM_STEPS, NUM_RANKS = 1, 64, 6, 2
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}
WORK = (
    *(f"--batch_size={BATCH_SIZE}", f"--context_length={LENGTH}", f"--max_steps={NUM_STEPS}"),
    f"--world_size={NUM_RANKS}",
)
# What the reference's train.py shows of two steps of 0.3 s, on the same streams.
REFERENCE = """
import sys, time
from tqdm import tqdm
print("Loaded model weights in 1.250 seconds")
bar = tqdm(range(5))
bar.set_description("Epoch 0, Loss 0.000", refresh=True)
for step in range(1, 6):
    time.sleep(0.3)
    bar.update(1)
    bar.set_description(f"Epoch 0, Loss {5.6 - step / 10:.3f}, LR 1.00e-04", refresh=True)
for rank in range(2):
    print(f"Rank {rank}: Peak allocated memory: {5 + rank}.50 GiB")
    print(f"Rank {rank}: Peak reserved memory:  {7 + rank}.25 GiB")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama with random weights, made without transformers."""
    directory = write_model(tmp_path_factory.mktemp("bench") / "tiny", **SHAPE)
    path, draw = directory / "model.safetensors", np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    save_file({n: draw.normal(0, 0.05, shape).astype("f4") for n, shape in shapes.items()}, path)
    return directory


def verb(out: Path, model: Path, *words: str) -> tuple[int, str, str, dict]:
    """Run the verb on the CPU: exit code, stdout, stderr, peers.json."""
    command = [sys.executable, "-m", "fsdp_qlora", "bench", "peers", f"--model_name={model}"]
    done = subprocess.run(
        [*command, f"--out={out}", *words],
        cwd=PROJECT_DIR,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    path = out / "peers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return done.returncode, done.stdout, done.stderr, found


@pytest.fixture(scope="module")
def real(model: Path, tmp_path_factory) -> tuple[Path, dict]:
    """One round of two arms of ours, and of TRL where it is installed."""
    out = tmp_path_factory.mktemp("peers")
    arms = ("--arms=ours,ours_best,trl_fsdp2", "--best=--reentrant_checkpointing true")
    flags = ("--rounds=1", *arms, "--", "--attn=sdpa")
    code, said, err, found = verb(out, model, *WORK, *flags)
    assert (code, err) == (0, ""), said
    return out, found


@pytest.mark.slow
def test_arms_run_in_turn_and_agree_on_losses_of_the_same_rows(real):
    _, found = real
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["ours", "ours_best", "trl_fsdp2"]
    num_measured = 2 + HAS_TRL
    runs = found["runs"][:num_measured]
    assert [run["state"] for run in runs] == ["measured"] * num_measured
    base = runs[0]["losses"]
    for run in runs:
        assert run["has_same_rows"] and run["losses"] == pytest.approx(base, rel=2e-3)
        assert len(run["step_s"]) == NUM_STEPS and 0 < run["load_s"] < run["first_step_s"]
        assert run["first_step_s"] < run["wall_s"] and Path(run["log"]).stat().st_size > 0
        assert run["host_peak_gib"] >= run["host_before_gib"] > 0.1
    assert len(set(base)) == NUM_STEPS
    for row in list(rows.values())[:num_measured]:
        seconds = row["step_s"]
        assert row["state"] == "measured" and seconds["num"] == NUM_STEPS - 3
        assert seconds["min"] <= seconds["median"] <= seconds["p90"] <= seconds["max"]
        num_tokens = BATCH_SIZE * LENGTH * NUM_RANKS
        assert row["tokens_per_s"] == pytest.approx(num_tokens / seconds["median"])
    assert "--reentrant_checkpointing true" in runs[1]["command"]
    assert all("--attn=sdpa" in run["command"] for run in runs[:2])


@pytest.mark.slow
def test_the_peer_is_measured_beside_ours_or_says_how_to_install_it(real):
    _, found = real
    ours, _, peer = found["rows"]
    if not HAS_TRL:
        assert peer["state"] == "failed" and "pip install 'fsdp_qlora[peers]'" in peer["reason"]
        return
    (ratio,) = ours["ratios"]["trl_fsdp2"]["rounds"]
    assert ratio == pytest.approx(peer["step_s"]["median"] / ours["step_s"]["median"])


@pytest.mark.slow
def test_the_results_are_a_page_and_bars_that_say_cpu(real):
    out, found = real
    page = (out / "peers.md").read_text()
    for part in (
        "says nothing about GPUs",
        "a trial",
        "| ours |",
        *found["machine"]["cpu"].split(),
    ):
        assert part in page
    assert found["versions"]["torch"] in page
    assert ("recipes/peers/trl_fsdp2.py" in page) == HAS_TRL
    svg = ElementTree.parse(out / "peers.svg").getroot()
    texts = [text for text in svg.itertext() if text.strip()]
    assert {"ours", "ours_best", "trl_fsdp2"} <= set(texts)
    assert any("says nothing about GPUs" in text for text in texts)
    widths = [float(bar.get("width")) for bar in svg.iter(f"{svg.tag[:-3]}rect")][1:]
    assert sum(width > 0 for width in widths) == 3 * (2 + HAS_TRL)


def test_arms_that_fail_are_rows_with_the_error_and_are_not_tried_again(model, tmp_path):
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "train.py").write_text("import json\nfrom json import LLAMA_CLASSES\n")
    flags = (f"--reference={tmp_path / 'ref'}", "--arms=ours_best,reference,trl_fsdp2_liger")
    out = tmp_path / "out"
    code, said, err, found = verb(out, model, *WORK, *flags, "--best=--lora_rnk=8")
    assert (code, err) == (4, "")
    reasons = {row["arm"]: row["reason"] for row in found["rows"]}
    assert "--lora_rnk: no such option; did you mean --lora_rank?" in reasons["ours_best"]
    assert "ImportError: cannot import name 'LLAMA_CLASSES'" in reasons["reference"]
    assert "need a GPU" in reasons["trl_fsdp2_liger"]
    assert len(found["runs"]) == 3 and {row["state"] for row in found["rows"]} == {"failed"}
    assert all(reason in said for reason in reasons.values())
    assert "LLAMA_CLASSES" in (out / "runs" / "cpu-1-reference" / "log.txt").read_text()


def test_the_references_progress_bar_is_read_and_its_other_rows_void_it(model, tmp_path):
    (tmp_path / "train.py").write_text(REFERENCE)
    flags = (f"--reference={tmp_path}", "--arms=reference", "--rounds=1")
    code, _, _, found = verb(tmp_path / "out", model, *WORK, *flags)
    (run,), (row,) = found["runs"], found["rows"]
    assert run["losses"] == [5.5, 5.4, 5.3, 5.2, 5.1]
    assert run["step_s"] == pytest.approx([0.3] * 5, abs=0.15)
    assert (run["peak_allocated_gib"], run["peak_reserved_gib"]) == (6.5, 8.25)
    assert run["load_s"] == 1.25
    assert code == 4 and row["state"] == "void" and "other rows" in row["reason"]
    made = tmp_path / "out" / "runs" / "cpu-1-reference" / "model" / "tokenizer.json"
    assert Tokenizer.from_file(str(made)).encode("out put").ids == [0] * 7


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--arms=ours,trl"], "no such arm; use ours ours_streamed"),
        (["--arms=reference"], "add --reference DIR"),
        (["--max_steps=3"], "the first 3 steps warm up"),
        (["--reference=/dev"], "holds no train.py"),
        (["--model_name=lama-2-7b"], "is no directory and no known shape"),
        (["--model_name=llama-2-7b"], "6.7 billion parameters are too many without a GPU"),
        (["--out=tests"], "holds files already"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(model, tmp_path, words, rule):
    code, said, err, found = verb(tmp_path / "out", model, *words)
    assert (code, said, found) == (2, "", {})
    assert err.startswith("error: ") and rule in err and err.count("\n") == 1


def test_the_bench_itself_loads_nothing_heavy_beside_its_arms():
    code = "import sys, fsdp_qlora.results.bench.command\n"
    code += "print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True)
    assert done.stdout == b"set()\n"


def test_a_program_that_runs_out_of_time_is_ended_with_its_children(tmp_path):
    code = "import subprocess, sys; print('begun', flush=True);"
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began_s = time.monotonic()
    launch = process.Launch([sys.executable, "-c", code], tmp_path)
    ran = process.run(launch, dict(os.environ), tmp_path / "log", timeout_s=1.0)
    assert ran.code is None and time.monotonic() - began_s < 10
    assert [text for _, text in ran.lines] == ["begun"]
    assert (tmp_path / "log").read_text() == "begun\n"


def test_the_host_memory_of_a_program_is_the_most_in_use_while_it_ran(tmp_path, monkeypatch):
    """Of all programs, and other tests run too: here the readings are given, and one is checked."""
    readings = iter([3.0, 3.5, 5.25])
    with monkeypatch.context() as given:
        given.setattr(process, "used_gib", lambda: next(readings, 4.0))
        launch = process.Launch([sys.executable, "-c", "import time; time.sleep(1.5)"], tmp_path)
        ran = process.run(launch, dict(os.environ), tmp_path / "log", timeout_s=60.0)
    assert (ran.host_before_gib, ran.host_peak_gib) == (3.0, 5.25)
    lines = map(str.split, Path("/proc/meminfo").read_text().splitlines())
    kib = {line[0]: int(line[1]) for line in lines}
    used_gib = (kib["MemTotal:"] - kib["MemAvailable:"]) / 2**20
    assert process.used_gib() == pytest.approx(used_gib, abs=0.1)


def test_the_last_word_is_the_error_and_not_what_launchers_make_of_it():
    said = ["step 1", "[rank1]: ValueError: no bf16", "x.ChildFailedError: ", "====="]
    assert process.last_word([(0.0, text) for text in said]) == "[rank1]: ValueError: no bf16"
    assert process.last_word([(0.0, "a"), (1.0, "Killed")]) == "Killed"
    assert process.last_word([]) == "it said nothing"


def test_peer_access_is_a_setting_of_the_environment_of_every_arm():
    env = {"NCCL_P2P_DISABLE": "1", "PYTHONPATH": "x"}
    assert attempt.environment(env, "off", 2)["NCCL_P2P_DISABLE"] == "1"
    found = attempt.environment(env, "on", 2)
    assert "NCCL_P2P_DISABLE" not in found
    assert found["PYTHONPATH"].split(os.pathsep) == [str(PROJECT_DIR), "x"]


def test_every_rank_of_a_peer_sees_the_rows_that_ours_sees_at_that_step(model):
    """By accelerate's own way of dealing batches."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    from fsdp_qlora.results.bench.rows import dealt_in_turn, rows_of_rank

    shape = {"batch_size": 2, "context_length": 16, "num_steps": 4, "num_ranks": 3, "seed": 42}
    by_rank = [rows_of_rank(str(model), **shape, rank=rank) for rank in range(3)]
    rows = dealt_in_turn(by_rank)
    assert len({tuple(row) for row in rows}) == 4 * 3 * 2 and len(rows[0]) == 16
    batches = BatchSampler(SequentialSampler(rows), 2, drop_last=False)
    for rank in range(3):
        dealt = list(BatchSamplerShard(batches, num_processes=3, process_index=rank))
        assert [[rows[i] for i in indices] for indices in dealt] == by_rank[rank]


def run_of(arm: str, number: int, step_s: float, losses=(11.0, 10.8), **more) -> dict:
    """A run as peers.json holds it: three slow steps, then steady ones around `step_s`."""
    seconds = [9.0] * 3 + [step_s * factor for factor in (0.99, 1.0, 1.0, 1.02)]
    sizes = ("peak_allocated_gib", "peak_reserved_gib", "load_peak_reserved_gib", "load_s")
    sizes += ("host_peak_gib", "host_added_gib", "first_step_s")
    run = {"arm": arm, "what": "", "is_ours": arm == "ours", "p2p": "off", "round": number}
    run |= {"state": "measured", "reason": None, "has_same_rows": True, "step_s": seconds}
    return run | dict.fromkeys(sizes, 1.0) | {"losses": list(losses)} | more


def judged(*runs: dict) -> dict[str, dict]:
    return {row["arm"]: row for row in report.rows_of(report.judge([*runs]), 1000)}


def test_ratios_come_from_paired_rounds_so_that_a_slowing_machine_cancels_out():
    slow = 3.0
    rows = judged(
        *(run_of("ours", 1, 0.8), run_of("peer", 1, 1.0)),
        *(run_of("ours", 2, 0.8 * slow), run_of("peer", 2, 1.0 * slow)),
        run_of("ours", 3, 0.1),
    )
    assert rows["ours"]["ratios"]["peer"]["rounds"] == pytest.approx([1.25, 1.25])
    assert rows["ours"]["step_s"]["max"] == pytest.approx(0.8 * slow * 1.02)
    assert rows["peer"]["ratios"] == {}


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((11.07, 10.81), "first loss 11.0700 against 11.0000 (0.6%)"),
        ((11.0, 10.5), "mean loss 10.7500 against 10.9000 (1.4%)"),
        ((11.0, None), "1 losses against 2 of ours"),
    ],
)
def test_losses_that_disagree_void_a_row_with_both_numbers(losses, words):
    rows = judged(run_of("ours", 1, 0.8), run_of("peer", 1, 1.0, losses), run_of("ours", 2, 0.8))
    assert rows["peer"]["state"] == "void" and words in rows["peer"]["reason"]
    assert rows["peer"]["tokens_per_s"] == pytest.approx(1000.0)
    assert rows["ours"]["state"] == "measured" and rows["ours"]["ratios"] == {}


def test_losses_within_bf16_noise_do_not_void_a_row():
    rows = judged(run_of("ours", 1, 0.8), run_of("peer", 1, 1.0, (11.03, 10.81)))
    assert rows["peer"]["state"] == "measured" and rows["ours"]["ratios"].keys() == {"peer"}


def test_other_rows_void_a_row_whatever_its_losses():
    rows = judged(run_of("peer", 1, 1.0, has_same_rows=False), run_of("ours", 1, 0.8))
    assert rows["peer"]["state"] == "void" and "other rows" in rows["peer"]["reason"]
    assert rows["ours"]["state"] == "measured"


def test_the_spread_leaves_out_the_steps_that_warm_up():
    seconds = [float(i) for i in range(1, 12)]
    found = report.spread(seconds)
    assert found == {"median": 6.0, "min": 1.0, "max": 11.0, "p90": 10.0, "num": 11}
    assert found["median"] == statistics.median(seconds)
    assert max(report.steady(run_of("ours", 1, 0.5))) < 9.0
