"""`python -m fsdp_qlora doctor`: fsdp_qlora/doctor.py."""

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fsdp_qlora import doctor, hardware
from fsdp_qlora.__main__ import main
from fsdp_qlora.distributed.world import World
from fsdp_qlora.doctor import OK, PROBLEM, WARNING, Finding
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.model.quantize import FORMATS
from tests import fake_nvml
from tests.tiny import require

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
FOUR_BIT = ("nf4", "nf4_dq", "fp4", "fp4_dq", "hqq4")


def one(findings: list[Finding], name: str) -> Finding:
    """The only finding of a name."""
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


@pytest.mark.slow
def test_a_machine_is_checked_and_measured_for_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole command as JSON: every check has run, and `plan` reads what was written."""
    if hardware.count_gpus(os.environ):
        pytest.skip("written for a machine without GPUs")
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    path = hardware.machine_file()
    path.parent.mkdir()
    path.write_text(json.dumps({"cards": {"RTX 3090": {"memory_gbs": 900}, "CPU": {}}}))
    code = main(["doctor", "--json", f"--output_dir={tmp_path / 'runs'}"])
    values = json.loads(capsys.readouterr().out)
    assert [row for row in values["findings"] if row.pop("status") == PROBLEM] == []
    findings = [Finding(**row) for row in values["findings"]]
    assert (code, values["code"]) == (DONE, DONE)
    names = {finding.name for finding in findings}
    assert names >= {"packages", "host memory", "/dev/shm", "disk of cache", "disk of output"}
    half = "bfloat16" if hardware.own_cpu().has_bf16 else "float32"
    assert names >= {"GPUs", "CPU nf4_dq", "CPU fp4", f"CPU {half}", "CPU memory"}
    assert one(findings, "2 CPU ranks meet").status == OK
    assert "bytes exact" in one(findings, "2 CPU ranks gather").value
    table = json.loads(path.read_text())["cards"]
    assert table["RTX 3090"] == {"memory_gbs": 900} and table["CPU"] == values["cards"]["CPU"]
    listed = [hardware.CPU, *hardware.parse_gpus("3090")]
    measured, known = hardware.with_measured(listed)
    assert measured.is_measured and known.memory_gbs == 900
    for key in ("bf16_tflops", "memory_gbs", "card_link_gbs"):
        assert getattr(measured, hardware.SPEEDS[key]) == table["CPU"][key] > 0
    assert measured.disk_gbs == known.disk_gbs == table["disk"]["disk_gbs"] > 0
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["cache", "machine.json"]


class SpoilingWorld(World):
    """Ranks whose bytes arrive as this one's; one bit of the second's changes on its way."""

    def share(self, flat: torch.Tensor) -> torch.Tensor:
        own = flat.view(torch.uint8)
        generator = torch.Generator().manual_seed(1)
        other = torch.randint(0, 256, own.shape, dtype=torch.uint8, generator=generator)
        other[4321] ^= 1
        return torch.stack([own, other])

    def barrier(self) -> None:
        pass

    def gather_objects(self, value: object) -> list:
        return [value, value]


def test_a_bit_that_changes_on_its_way_is_a_problem():
    """One of what rank 1 sends."""
    (spoiled,) = doctor.gather(SpoilingWorld(0, 2, 0, 2, CPU))
    assert (spoiled.status, spoiled.code) == (PROBLEM, INTEGRITY)
    assert spoiled.value == "bytes of rank 1 arrive changed"
    assert "NCCL_P2P_DISABLE" in spoiled.remedy


def test_ranks_that_crash_or_hang_are_findings(tmp_path: Path):
    """With their last words, and what could not be checked after them."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99 is missing')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (crashed,) = doctor.run_ranks("cpu", 1, ("meet", "gather"), env, 60)
    assert (crashed.status, crashed.code) == (PROBLEM, ENVIRONMENT)
    assert "ended with code 1 (ImportError: libcudart.so.99 is missing)" in crashed.value
    assert "not checked: meet, gather" in crashed.value
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    hung = doctor.run_ranks("cpu", 2, ("meet",), env, 0.5)
    assert ["no answer in time" in finding.value for finding in hung] == [True, True]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_quantized_matmul_is_compared_with_the_right_one(name: str):
    """A block that is off, nothing at all, a code of something else: each is a problem."""
    require(name)
    (right,) = doctor.quantized(name, ALONE)
    assert right.status == OK
    row = FORMATS[name]

    def one_block_off(packed, constants, shape, dtype):
        weight_OI = row.dequantize(packed, constants, shape, dtype).clone()
        weight_OI.view(-1)[640:704] *= 1.01
        return weight_OI

    def zeros(packed, constants, shape, dtype):
        return torch.zeros(*shape, dtype=dtype)

    def coarse(weight_OI):  # quantizes something else
        return row.quantize(weight_OI.sign() * 0.02)

    for spoiled in ({"dequantize": one_block_off}, {"dequantize": zeros}, {"quantize": coarse}):
        (wrong,) = doctor.quantized(name, ALONE, dataclasses.replace(row, **spoiled))
        assert wrong.name == name and wrong.value.startswith("wrong: ")
        assert wrong.code == (DONE if name == "hqq4" else INTEGRITY)
        assert "pip install --upgrade" in wrong.remedy


def test_a_gpu_that_torch_cannot_see_and_a_broken_driver_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The driver lists one, this torch sees none: code 3, once; --quick writes no speeds."""
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setenv("FAKE_GPUS", fake_nvml.gpus("NVIDIA GeForce RTX 3090"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    for gpus, words in (
        (fake_nvml.gpus("NVIDIA GeForce RTX 3090"), "update the driver, or install the build"),
        (fake_nvml.broken(fake_nvml.VERSION_MISMATCH), "gives no list of GPUs"),
    ):
        monkeypatch.setenv("FAKE_GPUS", gpus)
        assert main(["doctor", "--quick"]) == ENVIRONMENT
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if line.startswith("problem")]
        assert words in line and lines[-1].startswith("1 problems, ")
    assert not (tmp_path / "cache").exists()


def test_packages_out_of_range_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An old peft in front of the real one."""
    assert [f for f in doctor.packages() if f.status != OK] == []
    place = tmp_path / "peft-0.1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (old,) = [f for f in doctor.packages() if f.status != OK]
    assert (old.name, old.status, old.code) == ("peft", PROBLEM, ENVIRONMENT)
    assert old.value.startswith("fsdp_qlora wants >=") and old.value.endswith(", found 0.1")
    assert old.remedy.startswith("pip install 'peft>=")


def test_a_disk_that_cannot_be_written_is_a_problem_with_a_way_out(tmp_path: Path):
    """/proc takes no files; a directory that does not exist yet is measured through its parent."""
    check, remedy = partial(doctor.disk, "output", Path("/proc"), ""), doctor.OUTPUT
    (bad,) = doctor.attempt("disk of output", check, remedy, ENVIRONMENT)
    assert bad.status == PROBLEM and "choose another with --output_dir DIR" in bad.line()
    (output,) = doctor.disk("output", tmp_path / "not" / "yet", "")
    assert output.code == DONE and not list(tmp_path.iterdir())


def test_speeds_of_the_slowest_gpu_are_saved_beside_those_of_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A broken file is replaced, and that is said; a place that cannot be written is a problem."""

    def of_h200(**speeds: float) -> Finding:
        return Finding("a", "", device="H200", speeds=speeds)

    findings = [of_h200(memory_gbs=4000.0, bf16_tflops=480.0), Finding("b", "fine")]
    findings.append(of_h200(memory_gbs=3900.04))
    table = doctor.measured(findings)
    assert table == {"H200": {"memory_gbs": 3900.0, "bf16_tflops": 480.0}}
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    path = hardware.machine_file()
    path.write_text("[]")
    (replaced,) = doctor.save(findings)
    cpu = Finding("c", "", device="CPU", speeds={"memory_gbs": 9.0})
    (added,) = doctor.save([cpu])
    assert "unreadable" in replaced.value and "unreadable" not in added.value
    assert json.loads(path.read_text())["cards"] == {**table, "CPU": {"memory_gbs": 9.0}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["machine.json"]
    monkeypatch.setenv("FSDP_QLORA_CACHE", "/proc/none")
    (refused,) = doctor.attempt("x", lambda: doctor.save(findings), doctor.CACHE)
    assert refused.status == WARNING and "FSDP_QLORA_CACHE" in refused.remedy


def test_a_failing_check_hides_neither_itself_nor_what_it_had_found():
    """An error is a line; one of ours brings its own remedy and code."""

    def looks():
        yield Finding("first", "fine")
        raise RuntimeError("broken\nat length")

    first, broken = doctor.attempt("x", looks, "do this")
    assert (first.value, broken.status, broken.code) == ("fine", WARNING, DONE)
    assert broken.line().split() == ["warning", "x", "RuntimeError:", "broken;", "do", "this"]

    def refuses():
        raise UserError("1 GiB", "could not be pinned", "ulimit -l", ENVIRONMENT)

    (refused,) = doctor.attempt("x", refuses, "do this")
    assert (refused.remedy, refused.code) == ("ulimit -l", ENVIRONMENT)


def test_wrong_options_are_reported_at_once_and_torch_is_not_needed_for_help():
    """The command itself loads nothing heavy: a broken torch is for it to report."""
    with pytest.raises(UserError, match=r"--quik.*did you mean --quick.*--json x"):
        doctor.main(["--quik", "--json=x"])
    program = "import sys, fsdp_qlora.doctor; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", program]) == 0
