"""The picture of a run, from its record."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fsdp_qlora.__main__ import VERBS
from fsdp_qlora.errors import UserError
from fsdp_qlora.results.report import command as report
from fsdp_qlora.results.report import record
from tests.report_runs import CONFIG, REAL, Page, step_line, steps_of, write_run


def drawn(path):
    report.write([path], path, has_png=False)
    return path / "report.svg"


def texts(path):
    return [text for text in ElementTree.parse(drawn(path)).getroot().itertext() if text]


@pytest.fixture
def run_dir(tmp_path):
    steps = [step_line(i, 3.0 - i / 10) for i in range(1, 13)]
    return write_run(tmp_path / "my run", steps, evals=(3.25, 1.875))


def test_a_cpu_run_shows_loss_and_host_memory(run_dir):
    found = texts(run_dir)
    assert {"my run", "Loss", "Memory of the host", "rank 0: 1.0", "rank 1: 2.0"} <= set(found)
    assert {"whole machine: 6.0", "machine has 15.0", "optimizer step"} <= set(found)
    assert {"3.250", "held out 1.875"} <= set(found)
    assert "Memory of each card" not in found
    assert any("SmolLM2" in text and "qlora" in text and "2 ranks" in text for text in found)
    assert any("12 steps in 24 s" in text and "400 tokens/s" in text for text in found)


def test_a_run_on_cards_shows_each_card_and_what_it_has(tmp_path):
    steps = [step_line(i, 2.0, card_gib=10.0 + i) for i in range(1, 4)]
    found = texts(write_run(tmp_path / "run", steps))
    assert {"Memory of each card", "card 0: 13.0", "card 1: 13.0", "card has 24.0"} <= set(found)


def test_a_budget_takes_the_place_of_the_card(tmp_path):
    steps = [step_line(1, 2.0, card_gib=10.0)]
    found = texts(write_run(tmp_path / "run", steps, config=CONFIG | {"gpu_budget_gib": 16.0}))
    assert "budget 16.0" in found and "card has 24.0" not in found


def test_many_ranks_share_a_label(tmp_path):
    found = texts(write_run(tmp_path / "run", [step_line(1, 2.0, num_ranks=8)]))
    assert "8 ranks, at most 8.0" in found and not any(t.startswith("rank ") for t in found)


def test_one_step_is_enough(tmp_path):
    found = texts(write_run(tmp_path / "run", [step_line(1, 2.5)]))
    assert "training 2.500" in found and any("1 step in 2 s" in text for text in found)


def test_a_loss_that_is_not_a_number_is_counted_and_left_out(tmp_path):
    steps = [step_line(i, None if i == 2 else 2.0) for i in range(1, 5)]
    found = texts(write_run(tmp_path / "run", steps))
    assert any("losses that are not a number: 1" in text for text in found)
    all_bad = texts(write_run(tmp_path / "bad", [step_line(1, None)]))
    assert "Loss" not in all_bad and "Memory of the host" in all_bad


def test_held_out_losses_stand_at_the_step_after_which_they_were_taken(run_dir):
    assert record.read(run_dir).evals == [(0, 3.25), (12, 1.875)]


def test_a_last_line_still_being_written_is_left_out(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert len(record.read(run_dir).steps) == 12


def test_steps_taken_again_after_a_resume_count_once(tmp_path):
    steps = [step_line(i, 3.0) for i in (1, 2, 3, 4)] + [step_line(i, 2.0) for i in (3, 4, 5)]
    run = record.read(write_run(tmp_path / "run", steps))
    assert [(s["step"], s["loss"]) for s in run.steps] == [(1, 3), (2, 3), (3, 2), (4, 2), (5, 2)]
    assert run.num_redone == 2


def test_the_summary_tells_how_a_run_ended(tmp_path):
    assert record.read(REAL).state == "finished"
    steps = [step_line(1, 3.0)]
    assert record.read(write_run(tmp_path / "a", steps)).state == "still running"
    stopped = write_run(tmp_path / "b", steps, summary={"is_complete": False})
    assert record.read(stopped).state == "stopped early"


def test_the_real_record_is_read_whole():
    run = record.read(REAL)
    assert run.steps == steps_of(REAL) and len(run.steps) == 8
    assert [step for step, _ in run.evals] == [0, 8]


def test_json_that_is_no_record_is_an_error_with_its_place(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"event": "run"}\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is neither a step nor an event"):
        drawn(run_dir)


def test_a_torn_line_elsewhere_is_an_error_with_its_place(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl:4: is not JSON"):
        drawn(run_dir)


def test_a_directory_without_a_record_or_a_step_is_an_error(tmp_path):
    with pytest.raises(UserError, match="give the output directory of a run"):
        drawn(tmp_path)
    with pytest.raises(UserError, match="holds no optimizer step"):
        drawn(write_run(tmp_path / "run", []))


def verb(*args, code="", **changes):
    """Run `python -m fsdp_qlora ARGS`, or `code`, in a process of its own, with other variables."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "fsdp_qlora", *map(str, args)])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | changes
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_verb_writes_a_page_markdown_and_pictures_and_prints_their_paths(run_dir):
    done = verb("report", run_dir, "--png", "off")
    names = ["report.html", "report.md", "report.svg"]
    assert done.stdout.splitlines() == [str(run_dir / name) for name in names]
    assert (done.returncode, done.stderr) == (0, "")
    assert (run_dir / "report.svg").read_text().startswith("<svg")
    assert {path.name for path in run_dir.iterdir()} == {"metrics.jsonl", *names}


def test_without_a_browser_the_picture_is_left_out_with_a_word(run_dir, tmp_path):
    done = verb("report", run_dir, PATH="/nowhere", HOME=str(tmp_path))
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and last.startswith("no report.png: no Chromium or Chrome found")
    assert not (run_dir / "report.png").exists()


def test_a_browser_that_fails_costs_the_picture_only(run_dir, tmp_path):
    """And a report.png of a former report does not stay beside the new page."""
    (run_dir / "report.png").write_bytes(b"of the last time")
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    done = verb("report", run_dir, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("no report.png: headless Chromium: it ended")
    assert not (run_dir / "report.png").exists()


def test_several_runs_are_reported_here_or_where_the_user_says(run_dir, tmp_path):
    out = tmp_path / "both"
    done = verb("report", run_dir, REAL, run_dir, "--out", out, "--png", "off")
    assert done.returncode == 0 and done.stdout.startswith(f"{out / 'report.html'}\n")
    page = Page((out / "report.html").read_text())
    assert page.row("Figures", "steps") == [12, 8]
    assert {"my run, smoothed", "report_run"} <= {t.get("data-name") for _, t in page.tags}
    assert "report.html" not in {path.name for path in REAL.iterdir()}


def test_a_fault_is_one_line_and_its_exit_code(tmp_path):
    done = verb("report", tmp_path / "absent")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_unknown_verb_names_the_known_and_no_verb_lists_them():
    done = verb("reprot")
    assert done.returncode == 2 and f"want one of {' '.join(VERBS)};" in done.stderr
    listed = verb()
    assert listed.returncode == 0 and {"bench", "fetch", "report"} <= set(listed.stdout.split())


def test_the_report_imports_nothing_heavy():
    heavy = "('torch', 'numpy', 'transformers', 'peft', 'bitsandbytes')"
    code = "import sys, fsdp_qlora.__main__, fsdp_qlora.results.report.command\n"
    done = verb(code=code + f"print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n"
