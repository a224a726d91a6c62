"""Model names: directories, shapes, a hub on this machine; damaged files are named in one line."""

import contextlib
import hashlib
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
from tests.model_files import write_header, write_model


@pytest.mark.parametrize("second", [[4, 12], [12, 20], [0, 8]])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path: Path, second: list[int]) -> None:
    """Every byte belongs to exactly one tensor."""
    entry = {"dtype": "F32", "shape": [2]}
    header = {"a": entry | {"data_offsets": [0, 8]}, "b": entry | {"data_offsets": second}}
    write_header(tmp_path / "x.safetensors", header, bytes(second[1]))
    with pytest.raises(UserError, match=r"invalid offset for tensor|not fully covered"):
        files.read_header(tmp_path / "x.safetensors")


def original(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text(json.dumps({"dim": 4096, "n_layers": 32}))
    return directory


def refusal(path: Path) -> str:
    for need_weights in (True, False):
        with pytest.raises(UserError) as caught:
            arch.read(str(path), need_weights)
        assert caught.value.code == INPUT and len(str(caught.value)) <= 300
    return str(caught.value)


def test_the_line_says_how_to_convert(tmp_path: Path):
    """One file or eight, with or without params.json; the script is named whole."""
    names = [f"consolidated.{number:02d}.pth" for number in range(8)]
    cases = [(names[:1], "a"), ([*names, "params.json", "tokenizer.model"], "b")]
    for names_there, name in [*cases, (["params.json"], "c")]:
        line = refusal(original(tmp_path / name, *names_there))
        assert "Meta's original files" in line
        assert "python -m transformers.models.llama.convert_llama_weights_to_hf" in line


def test_beside_a_converted_model_that_one_is_named(tmp_path: Path):
    """Hub repositories of Llama 3 have it in original/; with config.json it is no matter."""
    model = write_model(tmp_path / "model")
    line = refusal(original(model / "original", "consolidated.00.pth", "params.json"))
    assert f"give the directory above it, {model}" in line
    (model / "params.json").write_text("{}")
    assert arch.read(str(model), need_weights=True).num_layers == 3


ROOT = Path(__file__).parents[2]


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
        elif "/nowhere" in self.path:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
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


REVISIONS = "give one of its branches, tags or commits"
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
        names = ["org/model@v1", "org/gated", "org/absent", "org/model", "org/model@nowhere"]
        tagged, gated, absent, found, lost = read_in_new_process(names, **place)
    assert found == tagged == [0, wanted]
    assert (tmp_path / "hf/hub/models--org--model/refs/v1").read_text() == "0" * 40
    assert lost == [3, f"org/model@nowhere: org/model has no such revision; {REVISIONS}"]
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
        text = config.get("text_config", config)
        assert hub_names[-1].count("/") == 1 and config["architectures"] and text["rms_norm_eps"]
        assert text["max_position_embeddings"] > 1000
        paths = {files.locate(n, need_weights=False) for n in (name, config["_name_or_path"])}
        assert paths == {files.SHAPES_DIRECTORY / f"{name}.json"}
    assert len(set(hub_names)) == len(hub_names)


COMMANDS = {
    "plan": ["-m", "fsdp_qlora", "plan", "--gpus", "2x24"],
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
    away = run("meta-llama/Llama-3.2-1B-Instruct", **place)
    assert away.returncode == ENVIRONMENT and away.stderr.count("\n") == 1
    assert away.stderr.startswith("error: meta-llama/Llama-3.2-1B-Instruct: no such directory")
    assert "hf download meta-llama/Llama-3.2-1B-Instruct" in away.stderr
    assert "llama-3.2-1b" in away.stderr, "the shape that is nearest"


def test_a_digest_sees_sixteen_places_of_every_tensor_or_every_byte(tmp_path: Path, monkeypatch):
    """A byte in the first 4 KiB, in the last, in one between; only all bytes see the others."""
    path, size, apart = tmp_path / "x.safetensors", 1 << 18, ((1 << 18) - 4096) / 15
    refs = {"a": files.TensorRef(path, "U8", (size,), 100, size)}
    refs["b"] = refs["a"]._replace(start=100 + size)
    content = bytearray(100 + 2 * size)

    def seen(at: float) -> list[bool]:
        found = []
        for bit in (0, 1):
            content[100 + size + round(at) + 2000] = bit
            path.write_bytes(content)
            found.append([files.sample_digest(refs, num) for num in (files.NUM_SAMPLES, 0, 1)])
        content[100 + size + round(at) + 2000] = 0
        return [old != new for old, new in zip(*found, strict=True)]

    assert [seen(place * apart) for place in range(16)] == [[True] * 3] + [[True, True, False]] * 15
    assert seen(apart / 2) == [False, True, False] and files.sample_digest({}) is None
    monkeypatch.setattr(files, "WHOLE_BYTES", 1000)  # in many parts, some of them in flight
    path.write_bytes(random := os.urandom(len(content)))
    wanted = hashlib.sha256(f"a:U8:{(size,)}".encode() + random[100 : 100 + size])
    wanted.update(f"b:U8:{(size,)}".encode() + random[100 + size :])
    assert files.sample_digest(refs, 0) == wanted.hexdigest()[:16]
    path.unlink()
    assert files.sample_digest(refs) is None and files.sample_digest(refs, 0) is None
