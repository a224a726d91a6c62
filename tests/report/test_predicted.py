"""Predicted, measured, difference: as plan and ledger of a run have them, and judged aright."""

import re

import pytest

from fsdp_qlora.planning import rows as names
from tests.report.runs import (
    DEVICE,
    gpu_facts,
    gpu_step,
    measured,
    page_of,
    step_line,
    write_gpus,
    write_run,
)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """A finished run on two GPUs with plan and ledger, and its page."""
    path = write_gpus(tmp_path_factory.mktemp("runs") / "gpus")
    return path, page_of(path, out=path)


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
    assert sorted(off) == sorted([names.LAYER, names.SLACK, "total"])  # 29 %, 33 %, backward +11 %
    peak = sum(measured(DEVICE, 1)["backward"].values())
    words = f"peak: predicted 6.500 GiB, measured {peak:.3f} GiB ({peak / 6.5 - 1:+.1%}, OUTSIDE"
    assert f"GPU, {words} the aim of 5%)." in page.words
    assert "Host, peak: predicted 7.000 GiB, measured 7.125 GiB (+1.8%, within the" in page.words


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
    assert "GPU, peak: predicted 6.500 GiB, measured – GiB." in page.words


def test_cpu_ranks_are_held_to_the_aims_of_the_host_only_where_figures_are_large(tmp_path):
    facts = gpu_facts(2)
    for rank in facts["ledger"]["ranks"]:
        rank["device"] = {"forward": {names.ADAPTERS: 0.25}}
    facts["plan"] |= {"device": {"forward": {names.ADAPTERS: 0.125}}, "peak_device_gib": 0.125}
    facts["ledger"]["host"]["forward"][names.PROCESSES] = 4.5
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], summary=facts)
    words = page_of(run, out=tmp_path).words
    assert "Rank, peak: predicted 0.125 GiB, measured 0.250 GiB (+100.0%)." in words
    assert (
        "Host, peak: predicted 7.000 GiB, measured 7.562 GiB (+8.0%, within the aim of 15%)"
        in words
    )
