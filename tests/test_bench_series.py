"""`bench 7b`, `70b`, `small`: a row that really runs, what moved, and the page."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from fsdp_qlora import config
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import UserError
from fsdp_qlora.results.bench import cases, series, series_page
from fsdp_qlora.results.bench.arms import COMMON

ROW = "4x64-one_card"


def verb(*words: str) -> subprocess.CompletedProcess:
    """Run the verb without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", "fsdp_qlora", "bench", *words],
        cwd=PROJECT_DIR,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, str, dict]:
    """One row of `bench 7b` on a machine without a GPU, beside a row of a former bench."""
    out = tmp_path_factory.mktemp("series")
    done = verb("7b", f"--rows={ROW}", "--steps=1", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return out, done.stdout, json.loads((out / "bench-small.json").read_text())


@pytest.mark.slow
def test_without_a_gpu_a_scaled_model_trains_and_everything_says_so(real):
    out, said, bench = real
    assert said.startswith("no GPU: a scaled model on CPU ranks instead of 7b (bench-small)\n")
    (row,) = bench["rows"]
    assert (row["name"], row["state"], row["num_ranks"]) == (ROW, "measured", 1)
    assert len(row["steps_s"]) == 4 and row["step_s"]["num"] == 1
    num_tokens = 4 * 64
    assert row["tokens_per_s"] == pytest.approx(num_tokens / row["step_s"]["median"])
    assert row["host_added_gib"] >= 0 and bench["weights"] == row["weights"] == "random"
    predicted, measured = row["peaks"]["host"]
    assert min(predicted, measured) > 0.3 and "card" not in row["peaks"]
    total, _, told, _ = row["table"][-1].split()
    assert (total, told) == ("total", f"{measured:.2f}")
    for name in ("bench-small.md", "bench-small.svg"):
        text = (out / name).read_text()
        assert "says nothing about the real one" in text and ROW in text
    assert "1 steps counted a row: a trial" in (out / "bench-small.md").read_text()


@pytest.mark.slow
def test_the_page_is_drawn_again_without_a_run_and_keeps_what_it_has(real):
    out, _, bench = real
    page = (out / "bench-small.md").read_text()
    (out / "bench-small.md").unlink()
    done = verb("small", "--redraw", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "bench-small.md").read_text() == page
    assert json.loads((out / "bench-small.json").read_text()) == bench


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["7b", "--rows=4x64-ddd"], "no such row; use 4x64-one_card 4x64-ddp"),
        (["70b", "--rows=4x2048-*"], "no such row; use 1x64-offload"),
        (["small", "--steps=0"], "must be >= 1"),
        (["small", "--redraw", "--out=tests"], "run the bench first"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(words, rule):
    done = verb(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and rule in done.stderr


def test_a_former_bench_of_another_machine_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    former = {"rows": [row(where="2 x NVIDIA H200, 580.1")]}
    (tmp_path / "bench-small.json").write_text(json.dumps(former))
    with pytest.raises(UserError, match=r"is of 2 x NVIDIA H200, 580\.1, this is .*another dir"):
        series.main(["small", f"--out={tmp_path}"])


def test_the_rows_are_those_that_the_issue_names_and_every_one_is_a_command_line():
    names = [case.name for case in cases.KINDS["7b"].cases]
    places = ("one_card", "ddp", "full_shard", "offload")
    assert names[:8] == [f"4x{length}-{place}" for length in (512, 2048) for place in places]
    assert names[8:] == [
        *("4x2048-fit", "8x2x512-full_shard", "8x2x512-offload"),
        *("8x2x2048-full_shard", "8x2x2048-offload"),
    ]
    names = [case.name for case in cases.KINDS["70b"].cases]
    wanted = [f"{size}x{length}-offload" for length in (512, 2048) for size in (1, 2, 4)]
    assert names == [*wanted, "2x2048-fit"]
    for place in cases.PLACES.values():
        cfg = config.parse(["--model_name=llama-2-7b", *COMMON, *place.flags])
        assert (cfg.fit == "auto") == place.is_fitted and not cfg.save_model
        given = config.given(["--model_name=llama-2-7b", *COMMON, *place.flags])
        left_open = {"use_gradient_checkpointing", "use_cpu_offload", "resident_layers"}
        assert bool(left_open & given) != place.is_fitted


def row(place="full_shard", **more) -> dict:
    """A row of two cards as the JSON file has it."""
    case = cases.Case(place, 4, 2048, seed=cases.SEEDS.get(place))
    found = {"name": case.name, "shape": case.shape, "place": place, "state": "measured"}
    found |= {"what": "", "num_ranks": 2, "weights": "random", "p2p": "on", "reason": None}
    found |= {"date": "2026-11-22", "commit": "abc", "where": "2 x NVIDIA H200, 580.1"}
    found |= {"step_s": {"median": 0.8, "min": 0.7, "max": 1.0}, "tokens_per_s": 20000.0}
    found |= {"peak_allocated_gib": 5.5, "peak_reserved_gib": 6.5, "host_added_gib": 5.0}
    found |= {"peaks": {"host": [10.0, 11.0], "card": [8.0, 8.2]}, "losses": [11.1, 10.9]}
    found |= {"command": "train.py", "table": ["total 8.2"], "plan_note": "24 selective"}
    found |= {"seed": case.seed and asdict(case.seed), "wall_s": 40.0}
    return found | more


def test_moves_are_told_past_one_per_cent_of_memory_and_fifteen_of_speed():
    old = {"4x2048-full_shard": row(), "4x2048-ddp": row("ddp")}
    same = row(peak_reserved_gib=6.5 * 1.009, tokens_per_s=20000 * 0.86, host_added_gib=5.19)
    assert series_page.moved(old, {"4x2048-full_shard": same}) == []
    other = row(peak_reserved_gib=6.5 * 1.011, tokens_per_s=20000 * 0.84, host_added_gib=5.21)
    found = series_page.moved(old, {"4x2048-full_shard": other, "new": row()})
    assert found == [
        "4x2048-full_shard: GiB reserved 6.50 -> 6.57 (+1.1% since 2026-11-22, abc)",
        "4x2048-full_shard: GiB on the host 5.00 -> 5.21 (+4.2% since 2026-11-22, abc)",
        "4x2048-full_shard: tokens/s 20,000.00 -> 16,800.00 (-16.0% since 2026-11-22, abc)",
    ]
    broken = row(state="failed", reason="out of memory")
    real = row(weights="real, from /m", tokens_per_s=1.0)
    found = series_page.moved(old, {"4x2048-full_shard": broken, "4x2048-ddp": real})
    assert found == [
        "4x2048-full_shard: failed, was measured",
        "4x2048-ddp: not compared: weights random, now real, from /m",
    ]


def test_the_page_holds_the_rows_against_their_plan_the_seed_and_what_was_asked(tmp_path):
    rows = [row(), row("fit", tokens_per_s=25000.0), row("offload")]
    rows.append(row("ddp", state="left out", reason="needs 2 cards"))
    bench = {"kind": "7b", "title": "Llama-2 7B", "date": "2026-11-22", "notes": [], "rows": rows}
    here = {"cards": "2 x NVIDIA H200", "cpu": "Xeon", "num_cores": 32, "host_total_gib": 256.0}
    bench |= {"machine": here | {"platform": "Linux"}, "versions": {"torch": "2.11"}}
    bench |= {"commit": "abc", "command": "bench 7b", "weights": "random", "model": "llama-2-7b"}
    bench |= {"gpu_budget_gib": 24.0, "least_gain": 1.12, "moved": ["x: failed, was measured"]}
    series_page.write(tmp_path / "bench-7b", bench)
    page = (tmp_path / "bench-7b.md").read_text()
    for part in (
        "| 5.50 / 6.50 / 8.20 (+2.5%) | 5.0 / 11.00 (+10.0%) |",
        "| 7 + 18 |",
        "with FSDP and offload, batch 4: 7 GB a card, 18 GB host.",
        "4x2048-fit: 1.25x full_shard, 1.25x offload; asked for 1.12x full_shard: reached",
        "- x: failed, was measured",
        "- 4x2048-ddp: needs 2 cards",
        "capped at 24 GiB",
    ):
        assert part in page
    svg = (tmp_path / "bench-7b.svg").read_text()
    assert "6.5  (7 GB with FSDP and offload, batch 4)" in svg and "left out" in svg
    assert json.loads((tmp_path / "bench-7b.json").read_text()) == bench
    slow = [row(), row("fit", tokens_per_s=22000.0)]
    assert "MISSED" in series_page.gains(bench | {"rows": slow})[0]
