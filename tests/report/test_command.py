"""`python -m fsdp_qlora report`, and the records it reads: whole, partial, resumed and damaged."""

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora import record
from fsdp_qlora.__main__ import COMMANDS
from fsdp_qlora.errors import UserError
from fsdp_qlora.report import page
from tests.report.runs import REAL, Page, page_of, step_line, steps_of, write_gpus, write_run


@pytest.fixture
def run_dir(tmp_path):
    steps = [step_line(i, 3.0 - i / 10) for i in range(1, 13)]
    return write_run(tmp_path / "my run", steps, evals=(3.25, 1.875))


def test_the_real_record_is_read_whole():
    run = record.read(REAL)
    assert run.steps == steps_of(REAL) and len(run.steps) == 8
    assert [line["step"] for line in run.evals] == [0, 8]
    assert run.state == "finished" and run.num_ranks == 2 and not run.has_gpus


def test_a_last_line_still_being_written_is_left_out(run_dir):
    evals = record.read(run_dir).evals
    assert [(line["step"], line["loss"]) for line in evals] == [(0, 3.25), (12, 1.875)]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert len(record.read(run_dir).steps) == 12


def test_steps_taken_again_after_a_resume_count_once_and_ranks_may_change(tmp_path):
    steps = [step_line(i, 3.0) for i in (1, 2, 3, 4)]
    steps += [step_line(i, 2.0, num_ranks=1) for i in (3, 4, 5)]
    run = record.read(write_run(tmp_path / "run", steps))
    assert [(s["step"], s["loss"]) for s in run.steps] == [(1, 3), (2, 3), (3, 2), (4, 2), (5, 2)]
    assert run.num_redone == 2 and run.num_ranks == 2
    assert [len(step) > 0 for step in run.rank(1)] == [True, True, False, False, False]
    shown = page_of(tmp_path / "run", out=tmp_path)
    assert "2 steps were taken again after a resume" in shown.words
    assert [v for _, v in shown.tables["Peaks of every rank"]["rank 1"]] == [2.0]


def test_the_summary_tells_how_a_run_ended(tmp_path):
    steps = [step_line(1, 3.0)]
    assert record.read(write_run(tmp_path / "a", steps)).state == "still running"
    stopped = write_run(tmp_path / "b", steps, summary={"is_complete": False})
    assert record.read(stopped).state == "stopped early"


STEP = step_line(2, 2.0)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"step": 1, "lo', "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ("{}", "step is missing"),
        ('{"step": 1}', "step_s is missing"),
        (json.dumps(STEP | {"ranks": []}), "ranks is missing"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_place(run_dir, line, fault):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(UserError, match=rf"metrics\.jsonl:4: is not part of .*: {fault}"):
        record.read(run_dir)


def places(part, place=()):
    """The keys on the way to every value."""
    for key in part if isinstance(part, dict) else range(len(part)):
        yield (*place, key)
        if isinstance(part[key], dict | list):
            yield from places(part[key], (*place, key))


def test_a_wrong_value_anywhere_is_shown_or_refused_in_one_line(tmp_path):
    """Every value in turn is missing, or of another type."""
    run = write_gpus(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:4]
    lines.append({"event": "sample", "when": "before", "prompt": "p", "answer": "a"})
    audit = {"num_rows": 3, "padding_share": {"batches": 0.5}, "examples": {"cut": ["a:1"]}}
    facts = json.loads((run / "summary.json").read_text()) | {"data": audit}
    whole = {"lines": lines, "facts": facts}
    junk = itertools.cycle(["absent", "x", None, [1], {"a": 1}, -1, 1e308, float("nan")])
    outcomes = set()
    for place, value in zip(list(places(whole)), junk, strict=False):
        broken = copy.deepcopy(whole)
        *way, last = place
        part = functools.reduce(lambda part, key: part[key], way, broken)
        part[last] = value
        if value == "absent":
            del part[last]
        if {*broken} != {"lines", "facts"} or not isinstance(broken["lines"], list):
            continue
        (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in broken["lines"]))
        (run / "summary.json").write_text(json.dumps(broken["facts"]))
        try:
            outcomes.add("</html>" in page.write([run], tmp_path).read_text())
        except UserError as error:
            outcomes.add(str(error).count("\n"))
    assert outcomes == {True, 0}


def test_a_directory_without_a_record_or_a_step_or_with_a_torn_summary_is_an_error(tmp_path):
    with pytest.raises(UserError, match="give the output directory of a run"):
        record.read(tmp_path)
    with pytest.raises(UserError, match="holds no optimizer step"):
        record.read(write_run(tmp_path / "run", []))
    run = write_run(tmp_path / "run", [step_line(1, 2.0)])
    (run / "summary.json").write_text('{"is_com')
    with pytest.raises(UserError, match=r"summary\.json: .*: no JSON object; remove it"):
        record.read(run)


def test_numbers_that_are_not_finite_are_no_values(tmp_path):
    """As Python's json writes them."""
    steps = [step_line(i, float("nan")) | {"grad_norm": float("inf")} for i in (1, 2)]
    steps.append(step_line(3, float("nan")) | {"tokens_per_s": None, "grad_norm": None})
    shown = page_of(write_run(tmp_path / "run", steps, (None, float("nan"))), out=tmp_path)
    assert shown.row("Loss", "losses that are not a number") == [3]
    assert shown.columns()["loss"] == shown.columns()["grad_norm"] == [None] * 3


def run_command(*args, code="", **changes):
    """Run `python -m fsdp_qlora ARGS`, or `code`, in a process of its own, with other variables."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "fsdp_qlora", *map(str, args)])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | changes
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_command_writes_one_page_and_prints_its_path(run_dir, tmp_path):
    done = run_command("report", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run_dir / 'report.html'}\n"
    assert {path.name for path in run_dir.iterdir()} == {"metrics.jsonl", "report.html"}
    both = run_command("report", run_dir, REAL, run_dir, "--out", tmp_path / "both")
    assert both.returncode == 0 and both.stdout == f"{tmp_path / 'both' / 'report.html'}\n"
    shown = Page((tmp_path / "both" / "report.html").read_text())
    assert shown.row("Time", "steps") == [12, 8]
    assert [run["name"] for run in shown.data["runs"]] == ["my run", "run"]
    assert "report.html" not in {path.name for path in REAL.iterdir()}


def test_a_fault_is_one_line_and_its_exit_code(run_dir, tmp_path):
    done = run_command("report", run_dir, tmp_path / "absent", "--out", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    done = run_command("report", run_dir, "--out", tmp_path / "file")
    assert done.returncode == 3 and done.stderr.count("\n") == 1


def test_an_unknown_command_names_the_known_and_no_command_lists_them():
    done = run_command("reprot")
    assert done.returncode == 2 and f"want one of {' '.join(COMMANDS)};" in done.stderr
    listed = run_command()
    assert listed.returncode == 0 and {"bench", "fetch", "report"} <= set(listed.stdout.split())


def test_the_report_imports_nothing_heavy_and_charts_no_template_engine():
    heavy = "('torch', 'numpy', 'transformers', 'peft', 'bitsandbytes')"
    code = "import sys, fsdp_qlora.__main__, fsdp_qlora.report.charts\n"
    code += "print('jinja2' in sys.modules)\nimport fsdp_qlora.report.page\n"
    done = run_command(code=code + f"print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "False\n[]\n", done.stderr
