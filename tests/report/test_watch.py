"""The live page's server: what is new, whatever a run does to its files, and nothing else."""

import http.client
import json
import os
import re
import socket
import struct
import time
from unittest import mock
from urllib.parse import quote

import pytest

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning import rows as names
from fsdp_qlora.report import watch
from fsdp_qlora.report.charts import MAX_BINS, Tape
from fsdp_qlora.report.watch import Follower, Server
from tests.report.runs import CONFIG, Page, gpu_step, step_line, write_run


class Reader:
    """Keeps what a page would: it joins each answer to what it has."""

    def __init__(self, follower):
        self.follower, self.token, self.columns, self.bins = follower, "", {}, {}

    def look(self):
        new = self.follower.answer(self.token)
        steps, _, _, bins = new["starts"]
        for name, values in new["columns"].items():
            self.columns[name] = [*self.columns.get(name, [])[:steps], *values]
        for title, chart in new["memory"].items():
            self.bins[title] = [*self.bins.get(title, [])[:bins], *chart["bins"]]
        self.token = new["token"]
        return new


def append(path, *rows):
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run", [step_line(i, 3.0) for i in (1, 2, 3)], (3.25,))


def test_a_reader_has_what_the_record_says_after_growth_resume_and_a_new_start(run_dir):
    page = Reader(follower := Follower(run_dir))
    follower.catch_up()
    assert page.look()["evals"] == [[0, 3.25]] and page.columns["loss"] == [3.0] * 3
    assert "accuracy" not in page.columns  # which preferences have
    append(run_dir, step_line(4, 2.5))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "step_s": 1')  # still being written
    new = page.look()
    assert new["columns"]["step"] == [4] and new["evals"] == []  # only what is new
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('.0, "loss": 2.0, "ranks": [{}], "host": {}}\n[1]\n{"step": 6}\n')
    assert page.look()["columns"]["step"] == [5]
    append(run_dir, *(step_line(i, 1.5) for i in (3, 4)))  # taken again
    page.look()
    assert (page.columns["step"], page.columns["loss"][2:]) == ([1, 2, 3, 4], [1.5, 1.5])
    assert page.columns["time"] == [2.0, 4.0, 6.0, 8.0]
    for lines in ([step_line(1, 1.0)], [step_line(i, 1.25) for i in range(1, 9)]):
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        page.look()  # the same file, written anew: shorter, then longer
        assert page.columns["loss"] == [row["loss"] for row in lines]
    new = write_run(run_dir / "x", [step_line(1, 9.0)]) / "metrics.jsonl"
    os.replace(new, run_dir / "metrics.jsonl")
    page.look()
    assert page.columns["loss"] == [9.0] and page.look()["columns"]["loss"] == []


def test_memory_keeps_its_peak_and_its_order_however_long_a_run_is():
    tape, steps = Tape(), [gpu_step(i, 1) for i in range(1, 21)]
    page, number = Reader(None), 5 * MAX_BINS + 3
    page.follower = type("", (), {"answer": lambda self, token: tape.since(token)})()
    for i in range(number):
        line = steps[i % 20] | {"step": i + 1}
        if i == 3210:
            line["ranks"] = [line["ranks"][0] | {"device_rows": {names.KEPT: 9.0}}]
        tape.add(line)
        if i % 97 == 0:
            page.look()
    page.look()
    assert page.bins["GPU 0"] == tape.since()["memory"]["GPU 0"]["bins"]
    assert MAX_BINS / 2 <= len(page.bins["GPU 0"]) <= MAX_BINS
    assert max(page.bins["GPU 0"], key=lambda found: found[1])[:2] == [3211, 9.0]
    at = [found[0] for found in page.bins["GPU 0"]]
    assert at == sorted(set(at)) and page.columns["step"] == [*range(1, number + 1)]


def test_the_server_answers_this_machine_alone_and_only_with_the_run(run_dir, tmp_path):
    bad = "<script>alert(1)<"
    other = write_run(
        tmp_path / bad, [step_line(1, 2.0)], config=CONFIG | {"model_name": bad, "max_steps": "x"}
    )
    (tmp_path / "secret").write_text("do not serve")
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank1.log").symlink_to(tmp_path / "secret")
    (run_dir / "logs" / "rank2.log").write_text("a line\nhf_" + "a1" * 20)
    server = Server([run_dir, other], 0).begin()

    def ask(path, host="127.0.0.1:1", method="GET"):
        link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        link.putrequest(method, path, skip_host=True)
        for name in [host] if isinstance(host, str) else host:
            link.putheader("Host", name)
        link.endheaders()
        answer = link.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())

    for host in ("evil.example", "127.0.0.1.evil.example:80", "", [], ["localhost", "evil"]):
        assert ask("/data", host)[0] == 403
    assert ask("/", "[::1]:9")[0] == ask("/", "localhost")[0] == 200
    for path in ("/metrics.jsonl", "/../secret", "//etc/passwd", "/data/", quote("/data\0")):
        assert ask(path)[0] == 404
    assert ask("/", method="POST")[0] == 501
    _, html, headers = ask("/")
    assert "Access-Control-Allow-Origin" not in headers
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2 and bad in page.words
    deadline = time.monotonic() + 10
    while (news := json.loads(ask("/data?at=&at=x-y")[1]))["isBehind"]:
        assert time.monotonic() < deadline
    text = json.dumps(news)
    assert "do not serve" not in text and "a line" in text and "a1a1a1" not in text
    assert [found["name"] for found in news["runs"]] == ["run", bad]
    with pytest.raises(UserError, match=r"--port .*: Address already in use; give another"):
        Server([run_dir], server.server_address[1])
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").symlink_to(other / "metrics.jsonl")
    follower = Follower(run_dir)
    follower.catch_up()
    assert follower.answer("")["columns"]["step"] == []


def test_every_sign_of_life_of_a_run_has_words():
    texts = (path.read_text() for path in (PROJECT_DIR / "fsdp_qlora").rglob("*.py"))
    points = set(re.findall(r'hooks\.(?:beat|reach)\("([a-z-]+)"', "".join(texts)))
    assert points >= {"generate", "eval"}
    for point in points | {*hooks.POINTS, hooks.DONE}:
        (line,) = watch._does([hooks.Heartbeat(0.0, 3, point)])
        assert f": {point}," not in line


def test_a_run_tells_what_its_ranks_do_and_how_it_ended(run_dir):
    def state(owner, summary=None):
        (run_dir / ".lock").write_text(owner)
        if summary is not None:
            (run_dir / "summary.json").write_text(json.dumps({"is_complete": summary}))
        found = Follower(run_dir).answer("")
        return found["state"], found["waits"]

    here, now_s = socket.gethostname(), time.monotonic()
    with hooks.open_board() as board, mock.patch.object(time, "monotonic", lambda: now_s):
        for rank, point in enumerate(("post-forward", "post-forward", "save-mkdir")):
            sign = (int((now_s - 3) * 1e9), 7, point.encode())
            os.pwrite(board.fileno(), struct.pack("<qq512s", *sign), rank * hooks.SLOT.size)
        assert state(f"pid {os.getpid()} on {here} since today") == (
            "running",
            ["rank 0, 1: step 7: backward, for 3 s", "rank 2: step 7: saves a checkpoint, for 3 s"],
        )
    assert state(f"pid {2**22 + 1} on {here} since today")[0] == "ended without a summary"
    assert state("pid 1 on elsewhere since today") == ("running", ["it runs on elsewhere"])
    assert state(f"pid {2**22 + 1} on {here} since today", False)[0] == "stopped early"
    assert state(f"pid {2**22 + 1} on {here} since today", True)[0] == "finished"
