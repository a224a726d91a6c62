"""recipes/peers: arms that run in turn on the same rows; what is not comparable, or fails."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fsdp_qlora.config import PROJECT_DIR
from tests.model_files import write_model

PEERS = PROJECT_DIR / "recipes" / "peers"
HAS_TRL = importlib.util.find_spec("trl") is not None
NUM_STEPS, NUM_RANKS = 5, 2
WORK = (
    *("--batch_size=1", "--context_length=64", f"--max_steps={NUM_STEPS}"),
    f"--world_size={NUM_RANKS}",
)
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "vocab_size": 256}


def script(name: str):
    """A script of recipes/peers as a module."""
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_peers = script("bench_peers")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama with random weights, made without transformers."""
    place = tmp_path_factory.mktemp("peers") / "tiny"
    directory = write_model(place, max_position_embeddings=256, **SHAPE)
    path, draw = directory / "model.safetensors", np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    save_file({n: draw.normal(0, 0.05, shape).astype("f4") for n, shape in shapes.items()}, path)
    return directory


def run(out: Path, model: Path, *words: str) -> tuple[int, str, str, dict]:
    """Run the script on the CPU: exit code, stdout, stderr, peers.json."""
    command = [sys.executable, str(PEERS / "bench_peers.py"), f"--model_name={model}"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, f"--out={out}", *words], env=env, capture_output=True, text=True, timeout=280
    )
    found = json.loads((out / "peers.json").read_text()) if (out / "peers.json").exists() else {}
    return done.returncode, done.stdout, done.stderr, found


@pytest.mark.slow
def test_arms_run_in_turn_and_agree_on_losses_of_the_same_rows(model, tmp_path):
    out = tmp_path / "out"
    arms = ("--rounds=1", "--arms=ours,trl_fsdp2")
    code, text, err, found = run(out, model, *WORK, *arms, "--", "--attn=sdpa")
    assert (code, err) == (0, ""), text
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["ours", "trl_fsdp2"]
    runs = found["runs"][: 1 + HAS_TRL]
    base = runs[0]["losses"]
    assert len(set(base)) == NUM_STEPS
    for each in runs:
        assert each["state"] == "measured" and len(each["steps_s"]) == NUM_STEPS
        assert each["has_same_rows"] and each["losses"] == pytest.approx(base, rel=2e-3)
        seconds = rows[each["arm"]]["step_s"]
        assert seconds["num"] == NUM_STEPS - 3
        speed = 64 * NUM_RANKS / seconds["median"]
        assert rows[each["arm"]]["tokens_per_s"] == pytest.approx(speed)
    assert "--attn=sdpa" in runs[0]["command"]
    page = (out / "peers.md").read_text()
    for part in ("says nothing about GPUs", "a trial", "| ours: measured |"):
        assert part in page
    if HAS_TRL:
        (ratio,) = rows["ours"]["ratios"]["trl_fsdp2"]
        medians = [rows[arm]["step_s"]["median"] for arm in ("trl_fsdp2", "ours")]
        assert ratio == pytest.approx(medians[0] / medians[1])
    else:
        assert "pip install 'fsdp_qlora[peers]'" in rows["trl_fsdp2"]["reason"]


def test_arms_that_fail_are_rows_with_the_error_and_are_not_tried_again(model, tmp_path):
    flags = ("--arms=ours_best,trl_fsdp2_liger", "--best=--lora_rnk=8")
    code, text, err, found = run(tmp_path / "out", model, *WORK, *flags, "--", "--attn=sdpa")
    assert (code, err) == (4, "") and len(found["runs"]) == 2
    assert "--attn=sdpa" in found["runs"][0]["command"]
    reasons = {row["arm"]: row["reason"] for row in found["rows"]}
    assert "--lora_rnk: no such option; did you mean --lora_rank?" in reasons["ours_best"]
    assert "need a GPU" in reasons["trl_fsdp2_liger"]
    assert all(row["state"] == "failed" and row["reason"] in text for row in found["rows"])


def test_what_cannot_be_measured_is_refused_at_once(model, tmp_path):
    for words, rule in (
        (["--arms=ours,trl"], "no such arm; use ours ours_streamed"),
        (["--max_steps=3"], "the first 3 steps warm up"),
        (["--model_name=lama-2-7b"], "is no model directory or shape"),
        (["--model_name=llama-2-7b"], "6.7 billion parameters are too many without a GPU"),
    ):
        code, text, err, found = run(tmp_path / "out", model, *words)
        assert (code, text, found) == (2, "", {})
        assert err.startswith("error: ") and rule in err and err.count("\n") == 1


def test_every_rank_of_a_peer_sees_the_rows_that_ours_sees_at_that_step(model):
    """By accelerate's own way of dealing batches."""
    pytest.importorskip("trl")
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    trl_fsdp2 = script("trl_fsdp2")
    args = argparse.Namespace(model=str(model), batch_size=2, context_length=16, max_steps=4)
    args.seed = 42
    by_rank = [trl_fsdp2.rows_of_rank(args, 3, rank) for rank in range(3)]
    rows = trl_fsdp2.dealt_in_turn(by_rank)
    assert len({tuple(row) for row in rows}) == 4 * 3 * 2 and len(rows[0]) == 16
    batches = BatchSampler(SequentialSampler(rows), 2, drop_last=False)
    for rank in range(3):
        dealt = list(BatchSamplerShard(batches, num_processes=3, process_index=rank))
        assert [[rows[i] for i in indices] for indices in dealt] == by_rank[rank]


def run_of(arm: str, number: int, step_s: float, losses=(11.0, 10.8), **more) -> dict:
    """A run as peers.json holds it: three slow steps, then steady ones around `step_s`."""
    seconds = [9.0] * 3 + [step_s * factor for factor in (0.99, 1.0, 1.0, 1.02)]
    found = {"arm": arm, "p2p": "off", "round": number, "state": "measured", "reason": None}
    found |= {"has_same_rows": True, "steps_s": seconds, "losses": list(losses)}
    sizes = ("peak_allocated_gib", "peak_reserved_gib", "host_added_gib")
    return found | dict.fromkeys(sizes, 1.0) | more


def rows_of(*runs: dict) -> dict[str, dict]:
    rows = bench_peers.rows_of(bench_peers.compared([*runs]), 1000)
    return {row["arm"]: row for row in rows}


def test_ratios_come_from_paired_rounds_so_that_a_slowing_machine_cancels_out():
    slow, peer = 3.0, "trl_fsdp2"
    rows = rows_of(
        *(run_of("ours", 1, 0.8), run_of(peer, 1, 1.0)),
        *(run_of("ours", 2, 0.8 * slow), run_of(peer, 2, 1.0 * slow)),
        run_of("ours", 3, 0.1),
    )
    assert rows["ours"]["ratios"][peer] == pytest.approx([1.25, 1.25])
    assert rows["ours"]["step_s"]["max"] == pytest.approx(0.8 * slow * 1.02)
    assert rows[peer]["ratios"] == {}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"losses": [11.07, 10.81]}, "first loss 11.0700 against 11.0000 (0.6%)"),
        ({"losses": [11.0, 10.5]}, "mean loss 10.7500 against 10.9000 (1.4%)"),
        ({"losses": [11.0, None]}, "1 losses against 2 of ours"),
        ({"has_same_rows": False}, "other rows"),
        ({"losses": [11.03, 10.81]}, None),  # within the noise of bfloat16
    ],
)
def test_losses_and_rows_that_differ_make_a_row_not_comparable(more, words):
    rows = rows_of(run_of("ours", 1, 0.8), run_of("trl_fsdp2", 1, 1.0, **more))
    peer, ours = rows["trl_fsdp2"], rows["ours"]
    assert peer["tokens_per_s"] == pytest.approx(1000.0) and ours["state"] == "measured"
    assert peer["state"] == ("not comparable" if words else "measured")
    assert (words or "") in peer["reason"] and bool(ours["ratios"]) == (words is None)
