"""`python -m fsdp_qlora doctor`: fsdp_qlora/train/doctor/."""

import dataclasses
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fsdp_qlora import hardware
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.hardware import count_gpus
from fsdp_qlora.model import host
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.train.doctor import command, device, jobs, machine, together
from fsdp_qlora.train.doctor.findings import OK, PROBLEM, WARNING, Finding, ok, softly
from fsdp_qlora.train.doctor.jobs import Job
from tests import fake_nvml
from tests.tiny import require

CPU = torch.device("cpu")
FOUR_BIT = ("nf4", "nf4_dq", "fp4", "fp4_dq", "hqq4")
SECRET = "hf_canary0123456789"


def one(found: list[Finding], name: str) -> Finding:
    """The only finding of a name."""
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


@pytest.mark.slow
def test_a_machine_is_looked_at_and_measured_for_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole command as JSON: every check has run, and `plan` reads what was written."""
    if count_gpus(os.environ):
        pytest.skip("written for a machine without cards")
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = hardware.machine_file()
    path.parent.mkdir()
    path.write_text(json.dumps({"cards": {"RTX 3090": {"memory_gbs": 900}, "CPU": {}}}))
    code = main(["doctor", "--json", f"--output_dir={tmp_path / 'runs'}"])
    text = capsys.readouterr().out
    values = json.loads(text)
    found = [Finding(**row) for row in values["findings"]]
    assert [finding for finding in found if finding.status == PROBLEM] == []
    assert (code, values["code"]) == (DONE, DONE)
    names = {finding.name for finding in found}
    assert names >= {"python", "packages", "host memory", "swap", "memlock", "/dev/shm", "hub"}
    assert names >= {"disk of cache", "disk of output", "CPU nf4_dq", "CPU bfloat16", "CPU memory"}
    for part in ("meet", "shared host", "all-gather", "4-bit bytes"):
        assert one(found, f"2 CPU ranks {part}").status == OK
    assert "4 gathered layers" in one(found, "2 CPU ranks 4-bit bytes").value
    table = json.loads(path.read_text())["cards"]
    assert table["RTX 3090"] == {"memory_gbs": 900}
    assert table["CPU"] == values["cards"]["CPU"]
    listed = [hardware.CPU, *hardware.parse_gpus("3090")]
    measured, known = hardware.with_measured(listed, path, None)
    assert measured.is_measured and known.memory_gbs == 900
    for key in ("bf16_tflops", "memory_gbs", "card_link_gbs"):
        assert getattr(measured, hardware.SPEEDS[key]) == table["CPU"][key] > 0
    assert SECRET not in text and "a token is set" in one(found, "hub").value
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["cache", "machine.json"]


def test_a_changed_byte_is_a_problem_on_every_rank_and_of_one_layer():
    """One bit of one rank's slice of an offloaded layer; what was right before is still told."""
    job = Job("cpu", 2, ("join", "bytes"), 100, flip=(1, 2, 4321))
    meet, spoiled = jobs.run(job, os.environ)
    assert (meet.status, meet.name) == (OK, "2 CPU ranks meet")
    assert (spoiled.status, spoiled.code) == (PROBLEM, INTEGRITY)
    assert "packed bytes of layer 2 changed" in spoiled.value
    assert "versions of torch" in spoiled.remedy


def test_planted_bytes_are_those_that_careless_copies_rewrite():
    """Through float32 a bfloat16 view of them changes; every 16-bit pattern is there."""
    flat = together.planted(3, 300_000)
    halves = flat.view(torch.bfloat16)
    assert not torch.equal(halves.float().mul(1.0).bfloat16().view(torch.uint8), flat)
    assert flat[: 2**17].view(torch.int16).unique().numel() == 2**16
    words = flat[2**17 :][: 2**16].view(torch.float32)
    assert words.isnan().all() and len({*words.signbit().tolist()}) == 2
    assert not torch.equal(flat, together.planted(4, 300_000))


def test_ranks_that_crash_or_hang_are_findings(tmp_path: Path):
    """With their last words, and what could not be checked after them."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99 is missing')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    crashed = jobs.run(Job("cpu", 1, ("join", "bytes"), 60), env)[0]
    assert (crashed.status, crashed.code) == (PROBLEM, ENVIRONMENT)
    assert "ended with code 1 (ImportError: libcudart.so.99 is missing)" in crashed.value
    assert "not checked: join, bytes" in crashed.value
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    hung = jobs.run(Job("cpu", 2, ("join",), 0.5), env)
    assert ["no answer in time" in finding.value for finding in hung] == [True, True]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_products_are_those_of_an_independent_decoding(name: str):
    """In float64, from the published code; each kind of error is a problem."""
    require(name)
    (right,) = device.four_bit(CPU, name)
    assert right.status == OK
    row = FORMATS[name]

    def one_block_off(packed, constants, shape, dtype):
        weight_OI = row.unpack(packed, constants, shape, dtype).clone()
        weight_OI.view(-1)[640:704] *= 1.01
        return weight_OI

    def zeros(packed, constants, shape, dtype):
        return torch.zeros(*shape, dtype=dtype)

    def coarse(weight_OI):  # packs something else
        return row.pack(weight_OI.sign() * 0.02)

    for spoiled in ({"unpack": one_block_off}, {"unpack": zeros}, {"pack": coarse}):
        (wrong,) = device.four_bit(CPU, name, dataclasses.replace(row, **spoiled))
        assert (wrong.status, wrong.name) == (PROBLEM, f"CPU {name}")
        assert wrong.code == (DONE if name == "hqq4" else INTEGRITY)
        assert "pip install --upgrade" in wrong.remedy


def test_links_to_the_host_are_measured_in_step():
    """The CPU's own memory stands for the card's; both directions wait for the other ranks."""
    steps: list[int] = []
    memory = host.private(device.LINK_BYTES, pin=False)
    pinning, link = device.host_links(CPU, memory, 0.5, lambda: steps.append(1))
    assert len(steps) == 2 and pinning.status == link.status == OK
    assert link.speeds["host_link_gbs"] > 0


def test_kernels_fit_a_card_by_major_version_or_by_ptx():
    """CUDA's rules of compatibility."""
    build = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_120"]
    fits = {(6, 1): False, (7, 0): False, (7, 5): True, (8, 0): True, (8, 9): True}
    fits |= {(9, 0): True, (10, 0): False, (12, 0): True, (12, 1): True}
    assert {card: device.has_kernels(card, build) for card in fits} == fits


def test_a_card_that_torch_cannot_see_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The driver lists one, this torch sees none: code 3; --quick writes no figures."""
    if torch.cuda.is_available():
        pytest.skip("torch sees a card")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setenv("FAKE_GPUS", fake_nvml.gpus("NVIDIA GeForce RTX 3090"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--quick"]) == ENVIRONMENT
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("problem")]
    remedy = "update the driver" if torch.version.cuda else "this build of torch is for the CPU"
    assert "the driver lists 1" in line and f"sees 0; {remedy}" in line
    assert lines[-1].startswith("1 problems, ")
    assert not (tmp_path / "cache").exists()


class _Forbidding(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_the_hub_may_be_away_and_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch):
    """Offline, unreachable, nonsense and forbidding: all fine, all said."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "offline by HF_HUB_OFFLINE" in one(list(machine.hub()), "hub").value
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    server = HTTPServer(("127.0.0.1", 0), _Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cases = {
        f"http://user:{SECRET}@127.0.0.1:{closed}": "cannot be reached",
        f"nonsense:{SECRET}": "local models and data only",
        f"http://127.0.0.1:{server.server_port}": "with 403",
    }
    for address, words in cases.items():
        monkeypatch.setenv("HF_ENDPOINT", address)
        finding = one(list(machine.hub()), "hub")
        assert finding.status == OK
        assert words in finding.value and SECRET not in finding.line()
    server.shutdown()


def test_packages_out_of_range_or_at_odds_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An old peft in front of the real one, which wants another torch than there is."""
    before = [f for f in machine.packages() if f.status != OK]
    assert before == []
    place = tmp_path / "peft-0.1.dist-info"
    place.mkdir()
    meta = "Metadata-Version: 2.1\nName: peft\nVersion: 0.1\nRequires-Dist: torch<2\n"
    (place / "METADATA").write_text(meta)
    monkeypatch.syspath_prepend(str(tmp_path))
    old, odds = [f for f in machine.packages() if f.status != OK]
    assert (old.name, old.status, old.code) == ("peft", PROBLEM, ENVIRONMENT)
    assert old.value.startswith("0.1; want >=") and "pip install 'peft>=" in old.remedy
    assert (odds.name, odds.status) == ("peft", WARNING)
    assert odds.value == f"wants torch<2, found {metadata.version('torch')}"


def test_a_disk_that_cannot_be_written_is_a_problem_with_a_way_out(tmp_path: Path):
    """/proc takes no files; a directory that is not there yet is measured through its parent."""
    bad = machine.disk("disk of output", Path("/proc"), Path("/proc"), "--output_dir DIR")
    assert bad.status == PROBLEM and "choose another with --output_dir DIR" in bad.remedy
    *_, output = machine.disks(tmp_path / "not" / "yet")
    assert output.status != PROBLEM and not list(tmp_path.iterdir())


def test_figures_of_the_slowest_card_are_kept_beside_those_of_other_machines(tmp_path: Path):
    """A broken file is replaced, and that is said; a place that cannot be written is a warning."""
    found = [ok("a", "", "H200", memory_gbs=4000.0, bf16_tflops=480.0), ok("b", "fine")]
    found += [ok("c", "", "H200", memory_gbs=3900.04)]
    table = command.measured(found)
    assert table == {"H200": {"memory_gbs": 3900.0, "bf16_tflops": 480.0}}
    path = tmp_path / "machine.json"
    path.write_text("[]")
    assert "could not be read" in command.keep(table, path).value
    assert "could not be read" not in command.keep({"CPU": {"memory_gbs": 9.0}}, path).value
    assert json.loads(path.read_text())["cards"] == {**table, "CPU": {"memory_gbs": 9.0}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["machine.json"]
    assert command.keep(table, Path("/proc/none/machine.json")).status == WARNING


def test_a_failing_check_hides_neither_itself_nor_what_it_had_found():
    """An error is a line; one of ours brings its own remedy and code."""

    def looks():
        yield ok("first", "fine")
        raise RuntimeError("broken\nat length")

    first, broken = softly("x", looks, "do this")
    assert (first.value, broken.status, broken.code) == ("fine", PROBLEM, DONE)
    assert broken.line().split() == ["problem", "x", "RuntimeError:", "broken;", "do", "this"]

    def refuses():
        raise UserError("1 GiB", "could not be pinned", "ulimit -l", ENVIRONMENT)

    (refused,) = softly("x", refuses, "do this")
    assert (refused.remedy, refused.code) == ("ulimit -l", ENVIRONMENT)


def test_wrong_options_are_told_at_once_and_torch_is_not_needed_for_help():
    """The command itself loads nothing heavy: a broken torch is for it to report."""
    with pytest.raises(UserError, match=r"--quik.*did you mean --quick.*--json x"):
        command.parse(["--quik", "--json=x"])
    program = "import sys, fsdp_qlora.train.doctor.command; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", program]) == 0
