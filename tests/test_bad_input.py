"""Bad input, by the tables in tests/bad_input: one clear line, at once, and nothing left behind."""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora import config
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, INTEGRITY
from tests.bad_input import arguments, environment, hub, models, names, resume, rows, tokenizers
from tests.bad_input.case import Case, Place, write_place

ROOT = Path(__file__).parent.parent
TABLES = {
    "arguments": (arguments.CASES, 30),
    "models": (models.CASES, 35),
    "tokenizers": (tokenizers.CASES, 10),
    "rows": (rows.CASES, 45),
    "resume": (resume.CASES, 20),
    "environment": (environment.CASES, 10),
}
EVERY = [(group, case) for group, (cases, _) in TABLES.items() for case in cases]
MAX_CHARS = 300
MAX_MEDIAN_S, MAX_S = 1.0, 30.0
LIMIT_S = 240

Answers = dict[tuple[str, str], dict[str, Any]]


def ask(directory: Path, *groups: str, **environment: str) -> Answers:
    """Run groups of cases in a new process; answers by group and name."""
    env = os.environ | {"HF_HOME": str(directory / "tmp" / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.bad_input.run", str(directory), *groups]
    done = subprocess.run(
        command, env=env | environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {found[-1:]}: {done.returncode} {done.stderr[-2000:]}"
    return {(answer["group"], answer["name"]): answer for answer in found}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What came of every case."""
    return ask(tmp_path_factory.mktemp("bad"), "good", *TABLES, "names")


def check(answer: dict[str, Any], codes: tuple[int, ...]) -> None:
    """What is asked of every answer, whatever was wrong."""
    assert answer["trace"] == "" and answer["code"] in codes
    line = answer["err"].splitlines()[0]
    assert line.startswith("error: ") and line.isprintable() and "Traceback" not in line
    assert all(len(fault) <= MAX_CHARS for fault in line.removeprefix("error: ").split(" | "))
    assert re.search(r": .+; .+", line), "value: rule; remedy"
    assert answer["did"] == [] and answer["is_tree_same"]
    assert answer["heavy"] == [], "imported before the answer"
    assert "anary" not in answer["err"] + answer["out"]


def test_the_tables_hold_as_many_cases_as_they_promise():
    for group, (cases, least) in TABLES.items():
        assert len({case.name for case in cases}) == len(cases) >= least, group
    assert len(EVERY) >= 150


def test_the_good_place_would_start_its_ranks(answers: Answers):
    """So every case fails of what was done to it; and the watch sees a process that is started."""
    answer = answers["good", "nothing is wrong"]
    assert [event.partition(" ")[0] for event in answer["did"]] == ["subprocess.Popen"]
    assert answer["err"] == "" and not answer["is_tree_same"]


@pytest.mark.parametrize(
    ("group", "case"), [pytest.param(g, c, id=f"{g}-{c.name[:40]}") for g, c in EVERY]
)
def test_bad_input_is_one_line_with_its_code_and_leaves_nothing(
    answers: Answers, group: str, case: Case
):
    """No torch, no process, no connection, no unpickling, no file that was not there before."""
    answer = answers[group, case.name]
    check(answer, (case.code,))
    assert case.words in answer["err"]
    assert (answer["err"].count("\n") > 1) == case.has_table


def test_two_hundred_fuzzed_names_create_nothing(answers: Answers):
    """Upward paths, absolute ones, terminal codes, in every flag that takes a name."""
    found = [answer for (group, _), answer in answers.items() if group == "names"]
    assert len(found) == len(names.CASES) == 200
    for answer in found:
        check(answer, (INPUT, ENVIRONMENT, INTEGRITY))


def test_the_directory_of_a_run_is_a_plain_name_whatever_the_model_is_called():
    for case in names.CASES:
        name = config.default_output_dir(case.flags[0].partition("=")[2], "qlora")
        assert re.fullmatch(r"output/[A-Za-z0-9_-][A-Za-z0-9._-]*-qlora-\d{8}-\d{6}", name)


def test_answers_come_at_once(answers: Answers):
    """The median of all cases is far below a second, and no single one is slow."""
    seconds = [answers[group, case.name]["seconds"] for group, case in EVERY]
    print(f"{len(seconds)} cases: median {statistics.median(seconds):.3f} s, {max(seconds):.2f} s")
    assert statistics.median(seconds) < MAX_MEDIAN_S and max(seconds) < MAX_S


def test_refusals_of_the_hub_tell_their_reasons_apart(tmp_path: Path):
    """The real client against a hub on this machine: 401, 403, 404, 503, a cut-off file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    found = ask(tmp_path, "hub", **place, HF_HUB_DISABLE_PROGRESS_BARS="1", no_proxy="127.0.0.1")
    server.shutdown()
    server.server_close()
    for case in hub.CASES:
        answer = found["hub", case.name]
        check(answer, (case.code,))
        assert case.words in answer["err"]


PROCESSES = [
    ("arguments", "unknown flag", INPUT),
    ("models", "config cut off", INTEGRITY),
    ("tokenizers", "cut off", INPUT),
    ("rows", "answer null", INPUT),
    ("environment", "no host memory", ENVIRONMENT),
    ("resume", "one bit flipped", INTEGRITY),
]


@pytest.mark.parametrize(("group", "name", "code"), PROCESSES)
def test_as_a_command_the_answer_takes_a_moment_and_no_torch(tmp_path, group, name, code):
    """One of each table as the user runs it; -X importtime tells what was imported."""
    case = next(case for case in TABLES[group][0] if case.name == name)
    place: Place = write_place(tmp_path / "place")
    if case.make:
        case.make(place)
    flags = [flag.replace("{root}", str(place.root)) for flag in case.flags]
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *place.flags(), *flags]
    before, began_s = sorted(tmp_path.rglob("*")), time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    print(f"{group}: {time.monotonic() - began_s:.2f} s")
    modules = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "json" in modules and not modules & {"torch", "peft", "bitsandbytes"}
    assert (done.returncode, len(said)) == (code, 1) and case.words in said[0]
    assert code != DONE and sorted(tmp_path.rglob("*")) == before
