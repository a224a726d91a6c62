"""Predicted, measured, difference: as plan and ledger of a run have them, and judged aright."""

import re

import pytest

from fsdp_qlora.planning import rows as names
from tests.report_runs import (
    DEVICE,
    card_facts,
    card_step,
    measured,
    page_of,
    step_line,
    write_cards,
    write_run,
)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """A finished run on two cards with plan and ledger, and its page."""
    path = write_cards(tmp_path_factory.mktemp("runs") / "cards")
    return path, page_of(path, out=path)


def test_plan_and_ledger_stand_side_by_side_by_row_and_phase(cards):
    _, page = cards
    for phase, rows in DEVICE.items():
        title = f"card, {phase} (rank 1, the highest)"
        ledger = measured({phase: rows}, rank=1)[phase]
        for row, gib in rows.items():
            assert page.row(title, row) == [gib, ledger[row], ledger[row] - gib]
        sums = [sum(rows.values()), sum(ledger.values())]
        assert page.row(title, "total") == [*sums, sums[1] - sums[0]]
    assert page.row("host, forward", names.PROCESSES) == [4.0, 4.0625, 0.0625]
    totals = page.tables["card, measured total of every rank"]
    assert [value for _, value in totals["rank 0"]] == [
        sum(rows.values()) for rows in measured(DEVICE).values()
    ]


def test_rows_off_by_more_than_the_aim_stand_out_and_are_counted(cards):
    path, page = cards
    html = (path / "report.html").read_text()
    off = re.findall(r'<tr[^>]*><th scope="row">([^<]*)</th>(?:(?!</tr>).)*class="n off"', html)
    assert sorted(off) == sorted([names.LAYER, names.SLACK, "total"])  # 29 %, 33 %, backward +11 %
    peak = sum(measured(DEVICE, 1)["backward"].values())
    words = f"peak predicted 6.50 GiB, measured {peak:.2f} GiB, {peak / 6.5 - 1:+.1%}: NOT within"
    assert words in page.words
    assert "Of 10 rows over 0.5 GiB, counted in every phase, 8 are within 10%." in page.words
    assert "Host: peak predicted 7.00 GiB, measured 7.12 GiB, +1.8%: within" in page.words


def test_rows_of_nothing_count_as_nothing_and_small_ones_are_put_together(tmp_path):
    facts = card_facts(1)
    ledger = facts["ledger"]["ranks"][0]["device"]["load"]
    ledger |= {names.ADAPTERS: 0.001, names.GRADIENTS: 0.002}
    del ledger[names.CONTEXT]
    page = page_of(write_run(tmp_path / "run", [card_step(1, 1)], summary=facts), out=tmp_path)
    table = page.tables["card, load"]
    assert [value for _, value in table[names.CONTEXT]] == [1.25, 0.0, -1.25]
    assert [value for _, value in table["2 rows below 0.01"]] == [0.0, 0.003, 0.003]
    assert names.ADAPTERS not in table
    assert "Of 10 rows over 0.5 GiB, counted in every phase, 7 are within" in page.words


def test_rows_that_no_dry_run_told_apart_stay_open(tmp_path):
    facts = card_facts(1)
    ledger = facts["ledger"]["ranks"][0]["device"]["load"]
    ledger[names.REST] = ledger.pop(names.CONTEXT)
    page = page_of(write_run(tmp_path / "run", [card_step(1, 1)], summary=facts), out=tmp_path)
    table = page.tables["card, load"]
    assert [value for _, value in table[names.CONTEXT]] == [1.25, None, None]
    assert [value for _, value in table[names.REST]] == [None, 1.3125, None]
    assert [value for _, value in table["total"]] == [2.75, 2.8125, 0.0625]
    assert "Of 9 rows over 0.5 GiB, counted in every phase, 7 are within" in page.words
    assert page.words.count("(--dry_run on) would have told its rows apart") == 1


def test_what_was_not_measured_stays_open(tmp_path):
    facts = card_facts(1)
    del facts["ledger"]
    page = page_of(write_run(tmp_path / "run", [card_step(1, 1)], summary=facts), out=tmp_path)
    assert page.tables["card, load"][names.CONTEXT] == [("1.25", 1.25), ("–", None), ("–", None)]
    assert "Card: peak predicted 6.50 GiB." in page.words


def test_cpu_ranks_are_held_to_the_aims_of_the_host_only_where_figures_are_large(tmp_path):
    facts = card_facts(2)
    for rank in facts["ledger"]["ranks"]:
        rank["device"] = {"forward": {names.ADAPTERS: 0.25}}
    facts["plan"] |= {"device": {"forward": {names.ADAPTERS: 0.125}}, "peak_device_gib": 0.125}
    facts["ledger"]["host"]["forward"][names.PROCESSES] = 4.5
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], summary=facts)
    words = page_of(run, out=tmp_path).words
    assert "Rank: peak predicted 0.12 GiB, measured 0.25 GiB, +100.0%; aims are set for" in words
    assert "Host: peak predicted 7.00 GiB, measured 7.56 GiB, +8.0%: within the aim of 15%" in words
