"""Bad machines: cards, ports, directories, libraries, what a job system left behind."""

import json
import os
import socket
from pathlib import Path

from fsdp_qlora.errors import ENVIRONMENT
from tests import fake_nvml
from tests.bad_input.case import Case, Place


def output(make):
    """Something stands where the run shall go."""
    return lambda place: make(place.out)


def write_run(path: Path) -> None:
    """An earlier run."""
    path.mkdir()
    (path / "run_config.json").write_text("{}")


def write_machine(text: str):
    """What doctor has measured, damaged."""

    def make(place: Place) -> None:
        (place.root / "cache").mkdir()
        (place.root / "cache" / "machine.json").write_text(text)

    return make


def taken_port() -> str:
    """A port that this process listens on until it ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return str(os.dup(listener.fileno()) and listener.getsockname()[1])


OUT = "--output_dir="
GPU = "NVIDIA GeForce RTX 3090"


def driver(text: str) -> dict[str, str]:
    """The environment of a machine with such GPUs."""
    return {"FAKE_GPUS": text, "CUDA_VISIBLE_DEVICES": "0,1"}


ONE_GPU = driver(fake_nvml.gpus(GPU))
OLD_GPU = driver(fake_nvml.gpus("Tesla T4", capability=None))
CASES = [
    Case("more ranks than cards", "has 1 GPU(s)", ("--world_size=2",), None, 3, ONE_GPU),
    Case("port taken", "is not free", (f"--master_port={taken_port()}",), code=ENVIRONMENT),
    Case("small card", "it does not fit", (), None, 3, driver(fake_nvml.gpus(GPU, gib=0.01))),
    Case("old card", "has no bfloat16", ("--precision=bf16",), None, 3, OLD_GPU),
    Case("driver fails", "gives no list of GPUs", (), None, 3, driver(fake_nvml.broken(18))),
    Case("measurements cut off", "not what doctor writes", (), write_machine("{"), 3, ONE_GPU),
    Case("measurements odd", "not what", (), write_machine(json.dumps({"cards": 7})), 3, ONE_GPU),
    Case("no host memory", "it does not fit", ("--host_budget_gib=0.001",), code=ENVIRONMENT),
    Case("no room on a card", "it does not fit", ("--gpu_budget_gib=0.001",), None, 3, ONE_GPU),
    Case("output is a file", "cannot be written", (), output(Path.touch), ENVIRONMENT),
    Case("output below a file", "cannot be written", (OUT + "{root}/rows.jsonl/out",), code=3),
    Case("output name too long", "cannot be written", (OUT + "{root}/" + "x" * 300,), code=3),
    Case("output not writable", "give another", (OUT + "/proc/out",), code=ENVIRONMENT),
    Case("output a link to itself", "cannot", (), output(lambda p: p.symlink_to(p)), ENVIRONMENT),
    Case("output of an earlier run", "holds files already", (), output(write_run)),
    Case("home of nobody", "no such home directory", (OUT + "~nobody-here/out",)),
    Case("no bitsandbytes", "pip install bitsandbytes", code=3, absent=("bitsandbytes",)),
    Case("no hqq", "pip install hqq", ("--train_type=hqq_lora",), code=3, absent=("hqq",)),
    Case("no transformers", "pip install transformers", code=3, absent=("transformers",)),
    Case(
        "no flash attention",
        "pip install flash-attn",
        ("--attn=flash_attention_2",),
        code=ENVIRONMENT,
        absent=("flash_attn",),
    ),
    Case(
        "no datasets",
        "pip install datasets",
        ("--dataset=org/rows",),
        code=ENVIRONMENT,
        absent=("datasets",),
    ),
    Case("rank of no number", "RANK", env={"RANK": "first", "WORLD_SIZE": "2"}, code=ENVIRONMENT),
]
