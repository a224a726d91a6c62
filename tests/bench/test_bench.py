"""The command `bench`: a row that really runs, the page, and the stored pages."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fsdp_qlora
from fsdp_qlora import arch, bench, config
from fsdp_qlora.errors import UserError
from fsdp_qlora.hardware import GPUS, Machine
from fsdp_qlora.planning import memory
from fsdp_qlora.planning.sizes import Sizes, setting_for
from tests.report.runs import Page

ROW = "4x64-one_card"
PLAIN = ("one_card", "ddp", "full_shard", "offload")
STORED = [
    (page.stem, row)
    for page in sorted(config.RECIPES_DIR.glob("bench-*.json"))
    for row in json.loads(page.read_text())["rows"]
    if row["state"] == "measured" and row["place"] != "fit"
]


def command(*words: str) -> subprocess.CompletedProcess:
    """Run the command without a GPU."""
    argv = [sys.executable, "-m", "fsdp_qlora", "bench", *words]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        argv, cwd=config.PROJECT_DIR, env=env, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_without_a_gpu_a_scaled_model_trains_and_the_page_says_so(tmp_path):
    done = command("7b", f"--rows={ROW}", "--steps=1", f"--out={tmp_path}")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("no GPU: a scaled model on CPU ranks instead of 7b (bench-small)")
    facts = json.loads((tmp_path / "bench-small.json").read_text())
    (row,) = facts["rows"]
    assert (row["name"], row["state"], row["num_ranks"]) == (ROW, "measured", 1)
    assert len(row["steps_s"]) == 4 and row["step_s"]["num"] == 1
    assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_s"]["median"])
    assert row["host_added_gib"] >= 0 and facts["weights"] == row["weights"] == "random"
    predicted, measured = row["peaks"]["host"]
    assert min(predicted, measured) > 0.3 and "card" not in row["peaks"]
    total, _, text, _ = row["table"][-1].split()
    assert (total, text) == ("total", f"{measured:.2f}")
    page = (tmp_path / "bench-small.md").read_text()
    assert "nothing is said about the real one" in page and page.count(ROW) > 3
    assert "1 steps counted a row: a trial" in page and facts["versions"]["torch"] in page
    charts = Page((tmp_path / "bench-small.html").read_text()).data["bars"]
    assert [ROW, row["tokens_per_s"]] in [chart["values"][0] for chart in charts]
    bench.write(tmp_path / "bench-small", facts)  # drawn again without a run
    assert (tmp_path / "bench-small.md").read_text() == page


def test_what_cannot_be_measured_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="4x64-ddd: no such row; use 4x64-one_card 4x64-ddp"):
        bench.main(["small", "--rows=4x64-ddd", f"--out={tmp_path}"])
    former = {"rows": [row(where="2 x NVIDIA H200")]}
    (tmp_path / "bench-small.json").write_text(json.dumps(former))
    with pytest.raises(UserError, match=r"is of 2 x NVIDIA H200, this is .*another directory"):
        bench.main(["small", f"--out={tmp_path}"])


def test_the_bench_itself_loads_nothing_heavy_beside_its_runs():
    code = "import sys, fsdp_qlora.bench; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.PROJECT_DIR, capture_output=True)
    assert done.stdout == b"set()\n", done.stderr


def test_the_version_is_of_the_package_and_never_of_a_repository_around_it(tmp_path, monkeypatch):
    """Installed in a directory of another checkout, copied into its top, and a checkout of ours."""

    def git(*words, cwd):
        argv = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words]
        return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True).stdout

    def commits(place):
        code = "from fsdp_qlora import bench, doctor; "
        code += "print(bench.commit(), *doctor._requirements())"
        argv, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(place)}
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(" ")[0].strip(), "torch" in done.stdout

    own, other = tmp_path / "own", tmp_path / "other"
    for place in (own, other, other / "venv" / "site-packages"):
        ignored = shutil.ignore_patterns("recipes", "__pycache__")
        shutil.copytree(config.PROJECT_DIR / "fsdp_qlora", place / "fsdp_qlora", ignore=ignored)
    (other / "pyproject.toml").write_text('[project]\nname = "other"\n')
    shutil.copy(config.PROJECT_DIR / "pyproject.toml", own)
    for place in (other, own):
        git("init", "-q", cwd=place)
        git("add", "-A", cwd=place)
        git("commit", "-qm", "all", cwd=place)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as within a hook
    head = git("--git-dir", own / ".git", "rev-parse", "HEAD", cwd=own).strip()
    assert head.startswith(commits(own)[0]) and commits(own)[1]
    for place in (other, other / "venv" / "site-packages"):
        assert commits(place)[0] == fsdp_qlora.__version__


def test_every_row_is_a_command_line_of_its_own():
    names = [case.name for case in bench.KINDS["7b"][2]]
    assert names[:8] == [f"4x{n}-{place}" for n in (512, 2048) for place in PLAIN]
    assert names[8:10] == ["4x2048-fit", "8x2x512-full_shard"] and len(names) == 13
    wanted = [f"{size}x{length}-offload" for length in (512, 2048) for size in (1, 2, 4)]
    assert [case.name for case in bench.KINDS["70b"][2]] == [*wanted, "2x2048-fit"]
    for case in bench.KINDS["7b"][2]:
        flags = [*bench.COMMON, *bench.PLACES[case.place]["flags"]]
        argv = bench.train_command("llama-2-7b", flags, case, 11, 2, Path("out"))
        argv = [word for word in argv if word.startswith("--")]
        cfg, given = config.parse(argv), config.given(argv)
        assert (cfg.fit == "auto") == (case.place == "fit") and not cfg.save_model
        left_open = {"use_gradient_checkpointing", "use_cpu_offload", "resident_layers"}
        assert bool(left_open & given) != (case.place == "fit")
        assert cfg.dataset_samples == 11 * 2 * case.batch_size * case.accumulation


def row(place="full_shard", **more) -> dict:
    """A row of two GPUs as the JSON file has it."""
    found = {"name": f"4x2048-{place}", "place": place, "state": "measured", "num_ranks": 2}
    found |= {"weights": "random", "p2p": "on", "reason": None, "where": "2 x NVIDIA H200"}
    found |= {"date": "2026-11-22", "commit": "abc", "command": "train.py", "table": ["total 8.2"]}
    found |= {"step_s": {"median": 0.8, "min": 0.7, "max": 1.0}, "tokens_per_s": 20000.0}
    found |= {"peak_allocated_gib": 5.5, "peak_reserved_gib": 6.5, "host_added_gib": 5.0}
    found |= {"peaks": {"host": [10.0, 11.0], "card": [8.0, 8.2]}, "losses": [11.1, 10.9]}
    return found | {"plan_note": "24 selective"} | more


def test_the_page_holds_the_rows_beside_their_plan(tmp_path):
    rows = [row(), row("fit", tokens_per_s=25000.0)]
    rows.append(row("ddp", state="left out", reason="needs 2 GPUs", command=""))
    here = {"cards": "2 x NVIDIA H200", "cpu": "Xeon", "num_cores": 32, "host_total_gib": 256.0}
    facts = {"title": "Llama-2 7B", "date": "2026-11-22", "notes": [], "rows": rows}
    facts |= {"machine": here | {"platform": "Linux"}, "versions": {"torch": "2.11"}}
    facts |= {"commit": "abc", "command": "bench 7b", "weights": "random", "gpu_budget_gib": 24.0}
    bench.write(tmp_path / "bench-7b", facts)
    page = (tmp_path / "bench-7b.md").read_text()
    for part in (
        "| 5.50 / 6.50 / 8.20 (+2.5%) | 5.0 / 11.00 (+10.0%) | 11.100 - 10.900 |",
        "# 4x2048-ddp. needs 2 GPUs",
        "# 4x2048-fit. 24 selective\ntrain.py\ntotal 8.2",
        "capped at 24 GiB",
    ):
        assert part in page
    (*_, chart) = Page((tmp_path / "bench-7b.html").read_text()).data["bars"]
    assert chart["values"] == [["4x2048-full_shard", 20000], ["4x2048-fit", 25000]]


def test_a_program_that_runs_out_of_time_is_ended_with_its_children(tmp_path):
    code = "import subprocess, sys; print('begun', flush=True);"
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began_s, log = time.monotonic(), tmp_path / "log"
    ran = bench.run_program([sys.executable, "-c", code], os.environ, log, timeout_s=1.0)
    assert ran["reason"] == f"no end after 1 s: begun (log: {log})"
    assert time.monotonic() - began_s < 10 and log.read_text() == "begun\n"


def test_the_host_memory_of_a_program_is_the_most_in_use_while_it_ran(tmp_path, monkeypatch):
    """Of all programs, and other tests run too: here the readings are given, and one is checked."""
    readings = iter([3.0, 3.5, 5.25])
    with monkeypatch.context() as given:
        given.setattr(bench.hardware, "host_used_gib", lambda: next(readings, 4.0))
        argv = [sys.executable, "-c", "import time; time.sleep(1.5)"]
        ran = bench.run_program(argv, os.environ, tmp_path / "log", timeout_s=60.0)
    assert (ran["reason"], ran["host_peak_gib"], ran["host_added_gib"]) == (None, 5.25, 2.25)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("step 1\n[rank1]: ValueError: no bf16\nx.ChildFailedError: \n====\n", "[rank1]: Value"),
        ("a\rKilled\n", "Killed"),
        ("\n", "it printed nothing"),
    ],
)
def test_the_reason_is_the_error_and_not_what_launchers_make_of_it(tmp_path, text, last):
    (tmp_path / "log").write_text(text)
    assert bench.last_error(tmp_path / "log").startswith(last)


def test_there_are_pages():
    assert len(STORED) >= 10


@pytest.mark.parametrize(("page", "row"), STORED, ids=[f"{p}-{row['name']}" for p, row in STORED])
def test_the_plan_predicts_a_gpu_of_the_bench(page, row):
    """Peak of the GPU within five percent, CUDA context and collectives included."""
    argv = [word for word in shlex.split(row["command"]) if word.startswith("--")]
    cfg = config.parse(argv)
    info = arch.read(cfg.model_name, need_weights=False)
    setting = setting_for(info, cfg, Machine((), None, row["num_ranks"]))
    has_peer = row["p2p"] == "on" and row["num_ranks"] > 1
    sizes = Sizes(info, cfg, tflops=GPUS["H200"].bf16_tflops)
    planned = memory.device(sizes, setting, has_peer=has_peer).peak_gib
    measured = row["peaks"]["card"][1]
    assert planned == pytest.approx(measured, rel=0.05), (planned, measured)
