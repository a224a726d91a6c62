"""The page of a report: every number is that of the run's files, and nothing else is needed."""

import json
import math
import re
import shutil
import statistics
import time

import pytest

from fsdp_qlora.config import TrainConfig, renamed, to_dict
from fsdp_qlora.planning import rows as names
from fsdp_qlora.record import OWN_FLAGS
from tests.report.runs import (
    AUDIT,
    CONFIG,
    DEVICE,
    REAL,
    gpu_facts,
    gpu_step,
    measured,
    page_of,
    step_line,
    steps_of,
    write_gpus,
    write_run,
)

MAX_PAGE_BYTES = 1_000_000


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """A finished run on two GPUs with plan and ledger, and its page."""
    path = write_gpus(tmp_path_factory.mktemp("runs") / "gpus")
    return path, page_of(path, out=path)


def test_every_figure_of_a_real_run_is_that_of_its_files(tmp_path):
    page = page_of(REAL, out=tmp_path)
    summary, steps = json.loads((REAL / "summary.json").read_text()), steps_of(REAL)
    found = {
        name: cells[0][1]
        for title in ("Time", "Memory and processors", "Loss")
        for name, cells in page.tables[title].items()
    }
    evals = [event["loss"] for event in summary["events"]]
    assert found == {
        "steps": summary["num_steps"],
        "epochs": steps[-1]["epoch"],
        "tokens": summary["num_tokens"],
        "trained tokens": summary["num_trained_tokens"],
        "seconds of training": summary["train_s"],
        "seconds in total": summary["total_s"],
        "seconds of loading": summary["load_s"],
        "seconds a step, median": statistics.median(step["step_s"] for step in steps[3:]),
        "tokens/s, median": summary["tokens_per_s_median"],
        "GiB of the host, peak": summary["peaks"]["host"]["host_peak_used_gib"],
        "GiB of the host while loading": summary["load_peaks"]["host_peak_used_gib"],
        "trained parameters": summary["num_trainable_params"],
        "training loss, first step": summary["loss_first"],
        "training loss, last step": summary["loss_last"],
        "held-out loss before": evals[0],
        "held-out loss after": evals[1],
    }
    assert f"perplexity {math.exp(evals[1]):.2f}" in page.words


def test_held_out_preferences_have_an_accuracy_and_no_perplexity(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], evals=(0.693, 0.25))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    told = iter((0.5, 0.925))
    rows = [json.loads(line) for line in lines]
    rows = [row | {"accuracy": next(told)} if row.get("event") == "eval" else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = page_of(run, out=tmp_path / "page").words
    assert "0.6930 accuracy 50.0%" in words and "0.2500 accuracy 92.5%" in words
    assert "perplexity" not in words


def test_what_is_read_is_the_rounded_number_everywhere(gpus):
    cells = [
        cell
        for table in gpus[1].tables.values()
        for row in table.values()
        for cell in row
        if cell[1] is not None
    ]
    assert len(cells) > 60
    for text, value in cells:
        plain = text.replace(",", "").replace("+", "")
        digits = len(plain.partition(".")[2])
        assert float(plain) == pytest.approx(value, abs=0.5001 * 10**-digits), text


def test_peaks_of_every_rank_are_the_largest_of_its_steps(gpus):
    path, page = gpus
    for rank in (0, 1):
        peaks = [
            max(step["ranks"][rank][f"device_{name}_gib"] for step in steps_of(path))
            for name in ("peak_allocated", "peak_reserved", "used")
        ]
        assert page.row("Peaks of every rank", f"rank {rank}")[:3] == peaks


def test_memory_lies_by_row_below_the_plan_and_the_limit(gpus):
    path, page = gpus
    (bins, levels), last = page.memory("GPU 1"), steps_of(path)[-1]["ranks"][1]
    for row, gib in last["device_rows"].items():
        assert bins[-1][row] == pytest.approx(gib, rel=1e-5)
    assert bins[-1]["step"] == 30 and bins[-1]["total"] == pytest.approx(
        sum(last["device_rows"].values()), rel=1e-5
    )
    assert bins[-1]["held"] == pytest.approx(last["device_peak_reserved_gib"], rel=1e-5)
    assert levels == {"plan: peak": 6.5, "GPU has": 24.0}
    assert page.memory("host")[1] == {"plan: peak": 7.0, "usable": 16.0}
    assert [*page.data["look"]["rows"]][: len(names.DEVICE_ROWS)] == [*names.DEVICE_ROWS]


def test_the_budget_takes_the_place_of_the_gpu(tmp_path):
    steps = [gpu_step(i) for i in (1, 2)]
    run = write_run(tmp_path / "run", steps, config=CONFIG | {"gpu_budget_gib": 12.0})
    assert page_of(run, out=run).memory("GPU 0")[1] == {"budget": 12.0}


def test_curves_run_through_the_recorded_values(gpus):
    path, page = gpus
    steps, columns = steps_of(path), page.columns()
    for field in ("step", "loss", "tokens_per_s", "learning_rate", "grad_norm"):
        assert columns[field] == pytest.approx([step[field] for step in steps], rel=1e-5)
    assert columns["time"][-1] == pytest.approx(sum(step["step_s"] for step in steps), abs=0.02)
    assert columns["tokens"] == [4096 * i for i in range(1, 31)]
    assert page.data["runs"][0]["evals"] == [[0, 3.0], [30, 2.0]]


def test_preferences_have_curves_of_their_own_and_their_held_out_accuracy(tmp_path):
    steps = [step_line(i, 0.7) | {"accuracy": i / 4, "margin": i / 10} for i in (1, 2, 3)]
    run = write_run(tmp_path / "run", steps, evals=(0.7, 0.5))
    lines = (
        (run / "metrics.jsonl").read_text().replace('"loss": 0.5}', '"loss": 0.5, "accuracy": 0.9}')
    )
    (run / "metrics.jsonl").write_text(lines)
    page = page_of(run, out=run)
    assert page.columns()["accuracy"] == [0.25, 0.5, 0.75] and "kl" not in page.columns()
    assert page.data["runs"][0]["evals"][-1][1:] == [0.5, 0.9]


def test_nothing_refers_to_the_network(gpus, tmp_path):
    path, page = gpus
    html = (path / "report.html").read_text()
    links = [attrs[n] for _, attrs in page.tags for n in ("href", "src") if n in attrs]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    html = html.replace("http://www.w3.org/2000/svg", "")  # a name
    assert not re.search(r"https?:|//[a-z]|url\(|@import|XMLHttp|import\(", html)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy
    assert "script-src 'sha256-" in policy


def test_ten_thousand_steps_of_four_ranks_stay_below_a_megabyte_and_keep_their_peak(tmp_path):
    steps = [gpu_step(i, num_ranks=4) for i in range(1, 21)]
    many = [steps[i % 20] | {"step": i + 1} for i in range(10_000)]
    spike = json.loads(json.dumps(many[4321]))
    spike["ranks"][2]["device_rows"][names.KEPT] = 9.0
    many[4321] = spike
    run = write_run(tmp_path / "long", many, summary=gpu_facts(4))
    began = time.process_time()
    page = page_of(run, out=run)
    assert time.process_time() - began < 20
    assert (run / "report.html").stat().st_size < MAX_PAGE_BYTES
    top = max(page.memory("GPU 2")[0], key=lambda found: found["total"])
    assert (top["step"], top[names.KEPT]) == (4322, 9.0)


def test_a_run_of_an_early_version_is_shown_and_what_it_lacks_is_said(tmp_path):
    run = write_run(tmp_path / "old", [step_line(i, 2.0, gpu_gib=10.0) for i in (1, 2, 3)])
    page = page_of(run, out=run)
    assert page.row("Memory and processors", "GiB per GPU, peak reserved") == [10.0]
    assert "No plan was recorded" in page.words and "tokens" not in page.tables["Time"]
    assert page.memory("GPU 0") == (
        [{"step": i, "total": 10.0, "held": 10.0} for i in (1, 2, 3)],
        {"GPU has": 24.0},
    )
    assert page.memory("host")[1] == {"usable": 15.0}


def test_a_run_that_goes_on_tells_what_is_left(tmp_path):
    run = write_run(
        tmp_path / "run",
        [step_line(i, 2.0) for i in range(1, 6)],
        config=CONFIG | {"max_steps": 45, "num_epochs": 3},
    )
    page = page_of(run, out=run)
    assert "still running" in page.words
    assert page.row("Time", "seconds left") == [40 * 2.0]
    steps = [step_line(i, 2.0) for i in range(1, 6)]
    run = write_run(tmp_path / "run", steps, config=CONFIG | {"num_epochs": 3})
    assert page_of(run, out=run).row("Time", "seconds left") == [25 * 2.0]


def test_every_gpu_of_many_ranks_is_there(tmp_path):
    run = write_run(tmp_path / "run", [gpu_step(i, num_ranks=8) for i in (1, 2)])
    page = page_of(run, out=run)
    assert [*page.data["runs"][0]["memory"]] == [*(f"GPU {i}" for i in range(8)), "host"]
    assert len(page.tables["Peaks of every rank"]) == 8


def test_every_host_has_its_chart_and_the_fullest_is_the_peak(tmp_path):
    steps = [gpu_step(i) for i in range(1, 4)]
    for step in steps:
        far = step["host"] | {"host_used_gib": 9.5, "host_peak_used_gib": 9.75}
        step["hosts"] = [{"name": "near", **step["host"]}, {"name": "far", **far}]
    facts = gpu_facts()
    highest = {phase: {"row": 9.5} for phase in facts["ledger"]["host"]}
    facts["ledger"]["hosts"] = [facts["ledger"]["host"], highest]
    page = page_of(write_run(tmp_path / "run", steps, (3.0, 2.0), summary=facts), out=tmp_path)
    assert page.memory("host near")[0][-1]["held"] == 7.5
    assert page.memory("host far")[0][-1]["held"] == 9.5
    assert page.tables["Memory and processors"]["GiB of the host, peak"][0][1] == 9.75
    assert page.tables["Host, forward (host 1, the highest)"]["row"][1][1] == 9.5


def test_runs_side_by_side_show_ratios_and_the_flags_that_differ(gpus, tmp_path):
    config = CONFIG | {"max_steps": 30, "batch_size": 8, "output_dir": "x"}
    other = write_run(tmp_path / "other", [gpu_step(i, seed=7) for i in range(1, 31)], (), config)
    page = page_of(gpus[0], other, out=tmp_path)
    speeds = [
        statistics.median(step["tokens_per_s"] for step in steps_of(path)[3:])
        for path in (gpus[0], other)
    ]
    assert page.row("Time", "tokens/s, median") == speeds
    assert f"{speeds[1] / speeds[0]:.2f} ×" in page.words
    assert page.row("Memory and processors", "CPU cores busy, mean") == pytest.approx([2.5, 2.5])
    flags = page.tables["Flags that differ between the runs"]
    assert flags == {"batch_size": [("4", None), ("8", None)]}
    assert [run["name"] for run in page.data["runs"]] == ["gpus", "other"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copytree(REAL, tmp_path / name / "run")
    page = page_of(tmp_path / "a" / "run", tmp_path / "b" / "run", out=tmp_path)
    assert "a/run" in page.words and "b/run" in page.words
    assert "Flags that differ between the runs" not in page.tables


def test_one_run_shows_what_differs_from_the_defaults_and_a_command_that_says_so(tmp_path):
    page, config = (
        page_of(REAL, out=tmp_path),
        renamed(json.loads((REAL / "summary.json").read_text())["config"])[0],
    )
    defaults = to_dict(TrainConfig())
    changed = {k for k in config if config[k] != defaults.get(k, "")} - {*OWN_FLAGS}
    assert set(page.tables["Flags that differ from the defaults"]) == changed
    assert "python train.py --model_name models/tiny" in page.words
    assert page.tables["Environment"]["torch"] == [("2.13.0+cpu", None)]


def test_names_and_answers_cannot_break_out_of_their_place(tmp_path):
    bad = "<script>alert(1)</script> & | `x`"
    config = CONFIG | {"sample_prompt": bad, "max_steps": 1}
    run = write_run(tmp_path / "a<b>&", [step_line(1, 2.0)], config=config)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "sample", "when": "before", "prompt": bad, "answer": bad}))
        file.write("\n")
    page = page_of(run, out=run)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data, and what draws them
    assert "a<b>&" in page.words and page.tables["Answers"][bad] == [(bad, None)]
    assert page.words.count("Answers") == 2  # in the contents, and above them
    assert page_of(run, REAL, out=run).tables["a<b>&"][bad] == [(bad, None)]


def test_the_audit_stands_in_the_report_with_the_places_of_what_is_lost(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], summary={"data": AUDIT})
    old = write_run(tmp_path / "old", [step_line(1, 2.0)])
    page = page_of(run, old, out=tmp_path / "both")
    assert page.tables["Data"] == {
        "sources": [("a<b>.jsonl", None)],
        "rows": [("1,200", 1200)],
        "rows cut": [("3", 3)],
        "epoch tokens": [("54,321", 54_321)],
        "padding, batches": [("12.5%", 0.125)],
        "padding, packed": [("1.0%", 0.01)],
    }
    assert "run: the end of text is never learned" in page.words
    assert "run: cut: a<b>.jsonl:7, a<b>.jsonl:9" in page.words and "empty:" not in page.words
    assert "Data" not in page_of(old, out=tmp_path / "one").tables


def test_every_prompt_has_a_row_with_its_answers(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], config=CONFIG)
    with (run / "metrics.jsonl").open("a") as file:
        for when in ("before", "after"):
            for name, expected in (("p", "the truth"), ("q", None)):
                values = {"prompt": name, "answer": f"{name} {when}", "expected": expected}
                file.write(json.dumps({"event": "sample", "when": when, **values}) + "\n")
    found = page_of(run, out=run).tables["Answers"]
    assert [text for text, _ in found["p"]] == ["p before", "p after", "the truth"]
    assert [text for text, _ in found["q"]] == ["q before", "q after", "–"]


def test_a_single_step_and_a_constant_run_are_shown(tmp_path):
    """A constant range once ended a finished run with exit code 1."""
    one = write_run(tmp_path / "one", [step_line(1, 2.0)])
    steps = [gpu_step(1) | {"step": i, "loss": 1e-14, "learning_rate": 0.0} for i in range(1, 13)]
    flat = write_run(tmp_path / "flat", steps, (1e-14, 1e-14), summary=gpu_facts())
    page = page_of(one, flat, out=tmp_path)
    assert page.row("Time", "steps") == [1, 12]
    assert page.columns(1)["loss"] == [1e-14] * 12


@pytest.mark.parametrize("num_steps", (1, 2, 12))
def test_no_value_that_a_run_can_record_ends_its_report(tmp_path, num_steps):
    """Every step alike, or the last one alone; NaN is null in a record, huge values are gaps."""
    values = (1e-30, 5e-324, 2.2e-308, 1e-300, 0.0, -1.0, 1e16, 1e299, 1e300, 1.7e308, None)
    fields = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
    for number, (value, other) in enumerate((v, o) for v in values for o in (v, 1 / 3)):
        steps = [gpu_step(i) | dict.fromkeys(fields, other) for i in range(1, num_steps + 1)]
        steps[-1] |= dict.fromkeys(fields, value)
        run = write_run(tmp_path / str(number), steps, (value, other), summary=gpu_facts())
        drawn = page_of(run, out=run).columns()["learning_rate"]
        for found, given in zip(drawn, [other] * (num_steps - 1) + [value], strict=True):
            is_gap = given is None or abs(given) >= 1e300
            assert (found is None) == is_gap
            assert is_gap or found == pytest.approx(given, rel=1e-5, abs=1e-300)


def test_plan_and_ledger_stand_side_by_side_by_row_and_phase(gpus):
    _, page = gpus
    for phase, rows in DEVICE.items():
        title = f"GPU, {phase} (rank 1, the highest)"
        ledger = measured({phase: rows}, rank=1)[phase]
        for row, gib in rows.items():
            assert page.row(title, row) == [gib, ledger[row], ledger[row] - gib]
        sums = [sum(rows.values()), sum(ledger.values())]
        assert page.row(title, "total") == [*sums, sums[1] - sums[0]]
    assert page.row("Host, forward", names.PROCESSES) == [4.0, 4.0625, 0.0625]


def test_rows_off_by_more_than_the_aim_stand_out_and_are_counted(gpus):
    path, page = gpus
    html = (path / "report.html").read_text()
    off = re.findall(r'<tr[^>]*><th scope="row">([^<]*)</th>(?:(?!</tr>).)*class="off"', html, re.S)
    assert sorted(off) == sorted([names.LAYER, names.SLACK, "total", "GPU"])  # 29, 33, +11 %, peak
    peak = sum(measured(DEVICE, 1)["backward"].values())
    assert page.row("Peaks, to be within 5%", "GPU") == [6.5, peak, peak - 6.5]
    assert page.row("Peaks, to be within 5%", "Host") == [7.0, 7.125, 0.125]


def test_rows_of_nothing_count_as_nothing_and_small_ones_count_in_the_total(tmp_path):
    facts = gpu_facts(1)
    ledger = facts["ledger"]["ranks"][0]["device"]["load"]
    ledger |= {names.ADAPTERS: 0.001, names.GRADIENTS: 0.0002}
    del ledger[names.CONTEXT]
    page = page_of(write_run(tmp_path / "run", [gpu_step(1, 1)], summary=facts), out=tmp_path)
    table = page.tables["GPU, load"]
    assert [value for _, value in table[names.CONTEXT]] == [1.25, 0.0, -1.25]
    assert [value for _, value in table[names.ADAPTERS]] == [0.0, 0.001, 0.001]
    assert names.GRADIENTS not in table and table["total"][1][1] == pytest.approx(1.5012)


def test_rows_that_no_dry_run_told_apart_stay_open(tmp_path):
    facts = gpu_facts(1)
    ledger = facts["ledger"]["ranks"][0]["device"]["load"]
    ledger[names.REST] = ledger.pop(names.CONTEXT)
    page = page_of(write_run(tmp_path / "run", [gpu_step(1, 1)], summary=facts), out=tmp_path)
    table = page.tables["GPU, load"]
    assert [value for _, value in table[names.CONTEXT]] == [1.25, None, None]
    assert [value for _, value in table[names.REST]] == [None, 1.3125, None]
    assert [value for _, value in table["total"]] == [2.75, 2.8125, 0.0625]
    assert "--dry_run on tells it apart" in page.words


def test_what_was_not_measured_stays_open(tmp_path):
    facts = gpu_facts(1)
    del facts["ledger"]
    page = page_of(write_run(tmp_path / "run", [gpu_step(1, 1)], summary=facts), out=tmp_path)
    assert page.tables["GPU, load"][names.CONTEXT] == [("1.250", 1.25), ("–", None), ("–", None)]
    assert page.row("Peaks, to be within 5%", "GPU") == [6.5, None, None]


def test_cpu_ranks_are_held_to_the_aims_of_the_host_only_where_figures_are_large(tmp_path):
    facts = gpu_facts(2)
    for rank in facts["ledger"]["ranks"]:
        rank["device"] = {"forward": {names.ADAPTERS: 0.25}}
    facts["plan"] |= {"device": {"forward": {names.ADAPTERS: 0.125}}, "peak_device_gib": 0.125}
    facts["ledger"]["host"]["forward"][names.PROCESSES] = 4.5
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], summary=facts)
    page = page_of(run, out=tmp_path)
    assert page.row("Peaks, to be within 15%", "Rank") == [0.125, 0.25, 0.125]
    assert page.row("Peaks, to be within 15%", "Host") == [7.0, 7.5625, 0.5625]
    assert 'class="off"' not in (tmp_path / "report.html").read_text()
