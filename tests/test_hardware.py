"""What this machine has: fsdp_qlora/hardware.py."""

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from fsdp_qlora import hardware
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import GIB, GPUS, Cgroup
from tests import fake_nvml

RTX = "NVIDIA GeForce RTX 3090"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    """Put a driver that lists such GPUs in the place of NVIDIA's library."""

    def set_gpus(text: str) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
        monkeypatch.setenv("FAKE_GPUS", text)

    return set_gpus


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["3090", "4060 Ti", "H200 NVL"]),
        ("1,0", ["4060 Ti", "3090"]),
        ("GPU-2,0", ["H200 NVL", "3090"]),
        ("0,7,1", ["3090"]),
        ("MIG-dd44,0", []),
        ("1,GPU-,0", ["4060 Ti"]),
        ("0,-1,1", ["3090"]),
        ("0,GPU-0", []),
        ("NoDevFiles", []),
        ("-1", []),
        ("", []),
    ],
)
def test_gpus_are_those_that_cuda_would_use(driver, visible: str | None, names: list[str]):
    """In its order; CUDA_VISIBLE_DEVICES ends at its first bad entry."""
    driver(fake_nvml.gpus(RTX, "NVIDIA GeForce RTX 4060 Ti", "NVIDIA H200 NVL"))
    found = hardware.find_gpus(visible)
    assert [gpu.name.rpartition("RTX ")[2].rpartition("NVIDIA ")[2] for gpu in found] == names
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert hardware.count_gpus(env) == len(names)
    assert hardware.driver_version() == "580.0"


def test_of_parts_of_gpus_cuda_is_asked(driver, monkeypatch):
    """By each form of their names, and where a GPU that is in parts is named by its number."""
    monkeypatch.setattr(hardware, "_torch_gpus", lambda visible: [f"CUDA's of {visible}"])
    driver(fake_nvml.gpus("NVIDIA H200 NVL"))
    for visible in ("MIG-0ab1", "MIG-GPU-0/1/0", "0,MIG-0ab1"):
        assert hardware.find_gpus(visible) == [f"CUDA's of {visible}"]
    assert hardware.find_gpus("0")[0].name == "NVIDIA H200 NVL"
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetMigMode", lambda handle: [1, 1])
    assert hardware.find_gpus("0") == ["CUDA's of 0"]


def test_the_driver_reports_what_a_name_does_not(driver):
    """What other programs hold, bfloat16 of a GPU in no table, memory shared with the host."""
    driver(fake_nvml.gpus(RTX, used_gib=1))
    (gpu,) = hardware.find_gpus()
    assert gpu.memory_gib == pytest.approx(24 * 0.985 - 1, abs=0.1)
    for capability, has_bf16 in (((7, 5), False), ((8, 6), True), (None, True)):
        driver(fake_nvml.gpus("NVIDIA GeForce GTX 1080 Ti", gib=11, capability=capability))
        assert hardware.find_gpus()[0].has_bf16 == has_bf16
    driver(fake_nvml.gpus("NVIDIA GB10", gib=None))
    assert [math.isinf(gpu.memory_gib) for gpu in hardware.find_gpus()] == [True]


AVX2, AVX512 = "flags\t\t: fpu avx2 f16c", "flags\t\t: avx2 avx512dq avx512bw avx512vl"
PROCESSORS = {AVX2: False, AVX512: True, f"{AVX2} avx_ne_convert": True, "": True}
PROCESSORS |= {"Features\t: fp asimd i8mm bf16": True, "Features\t: fp asimd": False}


def test_a_processor_has_bfloat16_where_torch_multiplies_it_by_instructions(monkeypatch):
    import torch

    assert hardware.own_cpu().has_bf16 == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for words, has_bf16 in PROCESSORS.items():
        text = f"processor\t: 0\n{words}\nbugs\t\t: spectre_v1\n"
        monkeypatch.setattr(hardware, "_read", lambda path, text=text: text)
        assert hardware.own_cpu.__wrapped__().has_bf16 == has_bf16


def test_a_machine_without_a_driver_has_no_gpu_and_a_broken_driver_is_named(driver, monkeypatch):
    """No library, no driver: nothing is said. A driver that does not answer: code 3."""
    monkeypatch.setattr(hardware, "DRIVERS", ())
    for value in (fake_nvml.NVML_ERROR_LIBRARY_NOT_FOUND, fake_nvml.NVML_ERROR_DRIVER_NOT_LOADED):
        driver(fake_nvml.broken(value))
        assert hardware.find_gpus() == []
    driver(fake_nvml.broken(fake_nvml.VERSION_MISMATCH))
    with pytest.raises(UserError, match="gives no list of GPUs") as caught:
        hardware.find_gpus()
    assert caught.value.code == ENVIRONMENT
    assert hardware.find_gpus("") == [] and hardware.driver_version() is None


def test_without_the_library_torch_is_asked_where_a_driver_is_loaded(
    tmp_path: Path, driver, monkeypatch: pytest.MonkeyPatch
):
    """AMD, and containers without NVML; a torch that cannot be imported is named."""
    driver(fake_nvml.broken(fake_nvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    monkeypatch.setattr(hardware, "DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    class get_device_properties:
        name, total_memory, major = "AMD Instinct MI210", 64 * 2**30, 9
        def __init__(self, index): pass
"""
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setattr(hardware, "has_gpu_build", lambda: False)
    hardware._torch_gpus.cache_clear()
    assert hardware.find_gpus() == []
    monkeypatch.setattr(hardware, "has_gpu_build", lambda: True)
    hardware._torch_gpus.cache_clear()
    found = hardware.find_gpus()
    assert [(gpu.name, gpu.has_bf16) for gpu in found] == [("AMD Instinct MI210", True)] * 2
    assert found[0].memory_gib == 64
    (tmp_path / "torch.py").write_text("import missing\n")
    hardware._torch_gpus.cache_clear()
    with pytest.raises(UserError, match=r"lists no GPUs.*import torch") as caught:
        hardware.find_gpus()
    assert caught.value.code == ENVIRONMENT
    hardware._torch_gpus.cache_clear()


def test_gpus_of_this_machine_are_those_of_torch():
    """The real library, in a process of its own; torch is not loaded for it."""
    program = """
import os, sys
from fsdp_qlora import hardware
found = [gpu.name for gpu in hardware.find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))]
assert "torch" not in sys.modules
import torch
num = torch.cuda.device_count() if torch.cuda.is_available() else 0
assert found == [torch.cuda.get_device_name(i) for i in range(num)], found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NAMES = {
    "RTX 4090 Laptop GPU": "4090 laptop",
    "4060ti": "4060Ti-8G",  # of two sizes the smaller
    "A100 SXM4 80GB": "A100-80",
    "2x 7900XTX": "7900 XTX+7900 XTX",
    "NVIDIA RTX PRO 6000 Blackwell": "PRO 6000",
    "RTX 6000 Ada Generation": "6000 Ada",
    "Quadro RTX 6000": "Quadro RTX 6000",
    "rtx-4070-ti-super": "4070Ti Super",
    "H100 PCIe": "H100 PCIe",
    "5090 d": "5090D",
}
HINTS = {"3091": "mean 3090", "4090 Ti": "mean 4090", "4085": "mean 4080", "H300": "mean H200"}
HINTS |= {
    "4060Ti-12G": "mean 4060Ti-8G",
    "0x24": "no list",
    "9999": "such as 3090",
    "A1000": "such as",
}


def test_gpus_are_read_from_a_list():
    """Names of the table in any spelling, sizes in GiB, none; a hint is never at a bigger one."""
    names = [gpu.name for gpu in hardware.parse_gpus("2x3090 + 4060 ti-16g")]
    assert names == ["3090", "3090", "4060Ti-16G"]
    for name, meant in NAMES.items():
        assert [gpu.name for gpu in hardware.parse_gpus(name)] == meant.split("+")
    assert hardware.parse_gpus("NVIDIA GeForce RTX 4090") == [GPUS["4090"]]
    (small,) = hardware.parse_gpus("8GB")
    assert (small.memory_gib, small.bf16_tflops) == (7.8, GPUS["3060-12G"].bf16_tflops)
    assert hardware.parse_gpus("24")[0].memory_gbs == GPUS["3090"].memory_gbs
    assert hardware.parse_gpus("none") == []
    for wrong, words in HINTS.items():
        with pytest.raises(UserError, match=words):
            hardware.parse_gpus(wrong)


def test_every_gpu_of_the_table_has_a_source_and_rates_that_can_be():
    """Sustained below the data sheet; each name is found by itself and as the driver spells it."""
    for name, gpu in GPUS.items():
        assert hardware.parse_gpus(f"2x{name}") == [gpu, gpu]
        assert 0.2 < gpu.bf16_tflops / gpu.dense_tflops < 0.8 and gpu.memory_gbs > 100
        full = f"NVIDIA RTX {name.partition('-')[0]} GPU"
        assert hardware.gpu_like(full, gpu.memory_gib).memory_gbs == gpu.memory_gbs
        memory = round(gpu.memory_gib / 0.975)  # what the user would call it
        assert hardware.parse_gpus(f"{name} {memory}GB" if "-" not in name else name) == [gpu]
    tables = tomllib.loads(Path(hardware.__file__).with_name("gpus.toml").read_text())
    assert all(table["source"] for table in tables.values())


@pytest.mark.parametrize(
    ("name", "total_gib", "like"),
    [
        (RTX, 24.0, "3090"),
        ("NVIDIA GeForce RTX 3080", 20.0, "3080-20G"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 40.0, "A100-40"),
        ("NVIDIA H200", 140.4, "H200"),
        ("Tesla V100-SXM2-32GB", 32.0, "V100-32"),
        ("NVIDIA RTX A1000 Laptop GPU", 6.0, "3060-12G"),
        ("AMD Radeon PRO W7900", 48.0, "W7900"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA Something New", 25.0, "3090"),
    ],
)
def test_the_drivers_names_find_their_row(name: str, total_gib: float, like: str):
    """An unknown one is taken for the nearest in memory that is not larger."""
    found = hardware.gpu_like(name, total_gib)
    assert found.bf16_tflops == GPUS[like].bf16_tflops
    assert found.memory_gib == pytest.approx(total_gib, rel=0.02)


def test_measured_speeds_replace_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What doctor writes stands above the table, --link above both; a broken file is named."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    path, listed = hardware.machine_file(), hardware.parse_gpus("3090")
    assert hardware.with_measured(listed) == [GPUS["3090"]]
    path.write_text(json.dumps({"cards": {"disk": {"disk_gbs": 9}}}))
    assert hardware.with_measured(listed) == [GPUS["3090"]]  # it is elsewhere, and so is its disk
    assert hardware.with_measured([hardware.CPU])[0].disk_gbs == 9
    row = {"bf16_tflops": 55.5, "host_link_gbs": 13, "card_link_gbs": 7, "int8_gain": 1.9}
    path.write_text(json.dumps({"cards": {RTX: row}}))
    (found,) = hardware.with_measured(listed)
    assert found.is_measured and (found.bf16_tflops, found.host_link_gbs) == (55.5, 13)
    assert (found.peer_gbs, found.memory_gbs, found.gain("int8")) == (7, 936, 1.9)
    assert (found.known_gain("fp16"), found.known_gain("int8")) == (0, 1.9)
    assert hardware.with_measured(listed, 5.0)[0].host_link_gbs == 5
    path.write_text("[]")
    with pytest.raises(UserError, match="not what doctor writes"):
        hardware.with_measured(listed)


def group(folder: Path, text: str, files: dict[str, str]) -> Cgroup:
    """The group that such files describe."""
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(text)
    for name, content in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return hardware.find_cgroup(folder / "proc", folder / "sys")


def test_the_tightest_cgroup_limit_above_this_process_counts(tmp_path: Path):
    files = {
        "job/step/memory.max": "max\n",
        "job/step/memory.current": f"{3 * GIB}\n",
        "job/step/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "job/memory.max": f"{8 * GIB}\n",
        "job/memory.current": f"{5 * GIB}\n",
        "job/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    found = group(tmp_path, "0::/job/step\n", files)
    assert (found.limit_gib, found.used_gib()) == (8.0, 4.0)  # other steps use it too
    now = hardware.machine_memory(found)
    assert now["host_total_gib"] == now["cgroup_limit_gib"] == 8.0 and now["host_used_gib"] >= 4.0
    assert str(found.events_path).endswith("job/step/memory.events")


def test_a_version_one_cgroup_is_read_at_the_mount_when_its_own_path_is_hidden(tmp_path: Path):
    files = {
        "memory/memory.limit_in_bytes": f"{6 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{4 * GIB}\n",
        "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
    }
    found = group(tmp_path, "4:cpu,memory:/docker/abc\n0::/\n", files)
    assert found.limit_gib == 6.0
    assert found.used_gib() == 3.0  # children count, and so does their cache


def test_no_cgroup_and_no_limit_are_none(tmp_path: Path):
    assert hardware.find_cgroup(tmp_path, tmp_path).used_gib() is None
    files = {
        "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "memory/memory.usage_in_bytes": "0",
    }
    assert group(tmp_path, "1:memory:/\n", files).limit_gib is None


def test_a_control_group_or_the_machine_sets_the_limit():
    """What is in use is counted where the limit is."""
    machine_gib = hardware.host_limit_gib(Cgroup())
    now = psutil.virtual_memory()
    assert machine_gib == pytest.approx(now.total / GIB)
    assert hardware.host_limit_gib(Cgroup(limit_gib=0.5)) == 0.5
    assert hardware.host_limit_gib(Cgroup(limit_gib=1e9)) == machine_gib
    used_gib = (now.total - now.available) / GIB
    assert hardware.host_used_gib(Cgroup()) == pytest.approx(used_gib, abs=0.3)
    kib = hardware.read_kib(Path("/proc/meminfo"), "MemAvailable")
    loose = Cgroup(limit_gib=machine_gib - 0.001)  # the machine has less left than the group
    assert hardware.host_used_gib(loose) == pytest.approx(machine_gib - kib / 2**20, abs=0.3)


def test_in_a_real_group_all_numbers_are_those_of_the_group(memory_group: Path):
    """As in a Slurm job: the limit stands above; what a neighbour holds counts, cache does not."""
    held = ["held = b'x' * (80 * 2**20)", "print(flush=True)", "input()"]
    look = ["import json", "from fsdp_qlora import hardware", "from fsdp_qlora.hardware import *"]
    look += ["print(json.dumps([machine_memory(), host_limit_gib() - host_used_gib()]))"]
    found, children = [], []
    try:
        for name, lines in (("neighbour", held), ("own", look)):
            (place := memory_group / name).mkdir()
            enter = f'echo $$ > {place}/cgroup.procs && exec "$@"'
            command = ["sh", "-c", enter, "sh", sys.executable, "-c", "\n".join(lines)]
            child = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
            children.append(child)
            found.append(child.stdout.readline())
    finally:
        for child in children:
            child.communicate("\n")
        for place in memory_group.glob("*/"):
            place.rmdir()
    now, free_gib = json.loads(found[1])
    limit_gib = 300 / 1024
    assert now["host_total_gib"] == now["cgroup_limit_gib"] == pytest.approx(limit_gib)
    assert 80 / 1024 < now["host_used_gib"] < 160 / 1024
    assert now["host_available_gib"] == pytest.approx(limit_gib - now["host_used_gib"])
    assert free_gib == pytest.approx(now["host_available_gib"], abs=0.02)


def test_kills_are_counted_in_the_group_or_else_on_the_machine(tmp_path: Path):
    """Version 1, version 2, and no group at all."""
    events = tmp_path / "memory.events"
    events.write_text("low 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 5\n")
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 9\noom_kill 7\n")
    assert hardware.oom_kills(Cgroup(events_path=events), vmstat) == 2
    events.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    assert hardware.oom_kills(Cgroup(events_path=events), vmstat) == 4
    assert hardware.oom_kills(Cgroup(), vmstat) == 7
    assert hardware.oom_kills(Cgroup(), tmp_path / "none") == 0
