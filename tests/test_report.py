"""The picture of a run, from its record."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fsdp_qlora.__main__ import VERBS
from fsdp_qlora.errors import UserError
from fsdp_qlora.results import report

CONFIG = {"model_name": "models/SmolLM2", "train_type": "qlora", "gpu_budget_gib": None}


def step_line(step, loss, num_ranks=2, card_gib=0.0):
    rank = {"device_peak_reserved_gib": card_gib, "device_total_gib": 24.0 * bool(card_gib)}
    return {
        "step": step,
        "epoch": step / 10,
        "loss": loss,
        "tokens_per_s": 400.0,
        "step_s": 2.0,
        "ranks": [rank | {"host_rss_gib": 1.0 + i} for i in range(num_ranks)],
        "host": {"host_used_gib": 6.0, "host_total_gib": 15.0},
    }


def write_run(path, steps, evals=(), config=CONFIG):
    """A record: the run's line, a held-out loss, the steps, a held-out loss."""
    lines = [{"event": "run", "config": config}]
    lines += [{"event": "eval", "when": "before", "loss": loss} for loss in evals[:1]]
    lines += steps
    lines += [{"event": "eval", "when": "after", "loss": loss} for loss in evals[1:]]
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(path):
    return [text for text in ElementTree.parse(report.render(path)).getroot().itertext() if text]


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
    assert report.read(run_dir).evals == [(0, 3.25), (12, 1.875)]


def test_a_last_line_still_being_written_is_left_out(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert len(report.read(run_dir).steps) == 12


def test_a_torn_line_elsewhere_is_an_error_with_its_place(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl:4: is not JSON"):
        report.render(run_dir)


def test_a_directory_without_a_record_or_a_step_is_an_error(tmp_path):
    with pytest.raises(UserError, match="give the output directory of a run"):
        report.render(tmp_path)
    with pytest.raises(UserError, match="holds no optimizer step"):
        report.render(write_run(tmp_path / "run", []))


def verb(*args, code=""):
    """Run `python -m fsdp_qlora ARGS`, or `code`, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "fsdp_qlora", *map(str, args)])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_verb_draws_and_prints_the_path(run_dir):
    done = verb("report", run_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run_dir / 'report.svg'}\n", "")
    assert (run_dir / "report.svg").read_text().startswith("<svg")
    assert {path.name for path in run_dir.iterdir()} == {"metrics.jsonl", "report.svg"}


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
    code = "import sys, fsdp_qlora.__main__, fsdp_qlora.results.report\n"
    done = verb(code=code + f"print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n"
