"""Model names: directories, shapes, and the real hub client against a hub on this machine."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fsdp_qlora import arch
from fsdp_qlora.arch import files
from fsdp_qlora.errors import ENVIRONMENT, INPUT, UserError
from tests.model_files import write_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "need_weights", "words"),
    [
        ("llama-2-7x", False, "a shape (llama-2-7b"),
        ("llama-2-7b", True, "is a shape without weights"),
        ("./absent", True, "is no model directory"),
        ("a/b/c", True, "is no model directory"),
        ("~nobody-here/x", True, "is no usable path"),
        ("x" * 5000, True, "is no usable path"),
        ("org/--x", True, "is no directory and no hub name"),
    ],
)
def test_a_name_that_is_no_model_is_refused(name: str, need_weights: bool, words: str) -> None:
    """With what would be one."""
    with pytest.raises(UserError) as caught:
        arch.read(name, need_weights)
    assert words in str(caught.value)
    assert caught.value.code == INPUT


def test_a_hub_name_known_as_a_shape_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning for a 70B works offline, whatever the spelling of the name."""
    monkeypatch.setattr(socket.socket, "connect", None)
    info = arch.read("Meta-Llama/llama-2-70B-hf", need_weights=False)
    assert arch.num_params(info) == arch.num_params(arch.read("llama-2-70b", False))


class FakeHub(BaseHTTPRequestHandler):
    """What huggingface_hub asks a hub for; org/model is there, org/gated and others are refused."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        """Answer as the real hub does."""
        commit = "0" * 40
        items = [
            {"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()
        ]
        siblings = [{"rfilename": name} for name in self.files]
        model = {"id": "org/model", "sha": commit, "siblings": siblings}
        if "/gated/" in self.path:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/models/org/model/tree/"):
            self.reply(200, json.dumps(items).encode())
        elif self.path.startswith("/api/models/org/model/"):
            self.reply(200, json.dumps(model).encode())
        elif self.path.startswith("/org/model/resolve/"):
            name = self.path.split(commit + "/")[1]
            self.reply(200, self.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": commit})
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Send one answer."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Keep quiet."""


READ_ALL = """
import json, sys
from fsdp_qlora import arch, errors
for name in sys.argv[1:]:
    try:
        print(json.dumps([0, sorted(p.name for p in arch.read(name, True).path.iterdir())]))
    except errors.UserError as error:
        print(json.dumps([error.code, str(error)]))
"""


def read_in_new_process(names: list[str], **environment: str) -> list:
    """Read models with huggingface_hub set up from the environment."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *names],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def fake_hub(files: dict[str, bytes], cache: Path) -> Iterator[dict[str, str]]:
    """Serve org/model; the environment that sends the real client there."""
    handler = type("Handler", (FakeHub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    place |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"}
    yield place | {"HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


def test_the_hub_gives_weights_once_and_its_refusals_in_one_line(tmp_path: Path) -> None:
    """The real client, against a hub on this machine; then offline, from the cache."""
    model = write_model(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    wanted = sorted(files)
    unwanted = ["consolidated.safetensors", "pytorch_model.bin", "original/params.json", "a.py"]
    with fake_hub(files | dict.fromkeys(unwanted, b"no"), tmp_path / "hf") as place:
        names = ["org/model", "org/gated", "org/absent"]
        found, gated, absent = read_in_new_process(names, **place)
    assert found == [0, wanted]
    assert gated[0] == absent[0] == ENVIRONMENT
    assert "accept them at https://huggingface.co/org/gated" in gated[1]
    assert "no such public model on the hub" in absent[1]
    place["HF_HUB_OFFLINE"] = "1"
    cached, missing = read_in_new_process(["org/model", "org/other"], **place)
    assert cached == [0, wanted]
    assert missing[0] == ENVIRONMENT
    assert "hf download org/other" in missing[1]


def test_every_shape_file_is_complete() -> None:
    """It names the model on the hub that it describes, once, and all the sizes that are read."""
    hub_names = []
    for name in files.known_shapes():
        config = json.loads((files.SHAPES_DIRECTORY / f"{name}.json").read_text())
        hub_names.append(config["_name_or_path"].lower())
        assert hub_names[-1].count("/") == 1 and config["architectures"] and config["rms_norm_eps"]
        for hub_name in (name, config["_name_or_path"]):
            info = arch.read(hub_name, need_weights=False)
            assert arch.num_params(info) > 1e8 and info.config["max_position_embeddings"] > 1000
    assert len(set(hub_names)) == len(hub_names)


COMMANDS = {
    "plan": ["-m", "fsdp_qlora", "plan", "--cards", "2x24"],
    "data": ["-m", "fsdp_qlora", "data"],
    "train": ["train.py", "--weights", "random", "--max_steps", "1", "--world_size", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_name_that_is_no_shape_is_asked_of_the_hub(command: str, tmp_path: Path) -> None:
    """In every command that needs no weights; a hub that cannot be reached is one line."""
    options = ["--dataset", "dummy", "--dataset_samples", "4", "--context_length", "16"]
    options += ["--output_dir", str(tmp_path / "run")] if command == "train" else []

    def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *COMMANDS[command], "--model_name", name, *options],
            env=os.environ | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    config = (write_model(tmp_path / "model") / "config.json").read_bytes()
    with fake_hub({"config.json": config}, tmp_path / "hf") as place:
        found = run("org/model", **place)
    assert (found.returncode, "Traceback" in found.stderr) == (0, False), found.stderr
    away = run("meta-llama/Llama-3.1-8B-Instruct", **place)
    assert away.returncode == ENVIRONMENT and away.stderr.count("\n") == 1
    assert away.stderr.startswith("error: meta-llama/Llama-3.1-8B-Instruct: no such directory")
    assert "hf download meta-llama/Llama-3.1-8B-Instruct" in away.stderr
    assert "llama-3.1-8b" in away.stderr, "the shape that is nearest"
