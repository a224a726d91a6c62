"""--push_to_hub: what a hub is sent, and what it is not (export/hub.py)."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fsdp_qlora.config import PROJECT_DIR

TOKEN = "hf_" + "x" * 20
WEIGHTS = {  # what each kind of training leaves
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "new layers": ("new_layers.safetensors",),
    "model": ("config.json", "generation_config.json", "model.safetensors"),
    "large model": (
        *("config.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ),
}
ALWAYS = ("README.md", "tokenizer.json")
KEPT = ("run_config.json", "metrics.jsonl", "summary.json", "logs/rank1.log", "wandb/x.wandb")
PUSH = """
import sys
from pathlib import Path
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import hub
try:
    hub.check(sys.argv[2])
    hub.push(Path(sys.argv[1]), sys.argv[2])
except UserError as error:
    print(error.code, error)
"""


class FakeHub(BaseHTTPRequestHandler):
    """What huggingface_hub asks when it uploads; me/new can be made, others are refused."""

    asked: list
    took: dict[str, bytes]

    def do_POST(self) -> None:
        """Answer as the real hub does."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"], body))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            if (wanted.get("organization"), wanted["name"]) != ("me", "new"):
                return self.reply(403, {"error": "no\nwrite access"})
            return self.reply(200, {"url": f"http://{self.headers['Host']}/me/new"})
        if self.path.startswith("/api/models/me/new/preupload/"):
            files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        if self.path.startswith("/api/models/me/new/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.took[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/new/commit/0"
            return self.reply(200, {"commitUrl": url, "commitOid": "0" * 40})
        return self.reply(200, {"warnings": [], "errors": []})

    def do_GET(self) -> None:
        """Nothing else is there."""
        self.asked.append((self.path, self.headers["Authorization"], b""))
        self.reply(404, {"error": "not found"})

    do_HEAD = do_GET

    def reply(self, status: int, values: dict) -> None:
        """Send one answer."""
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Keep quiet."""


@pytest.fixture
def hub():
    """A hub of this machine: its address, what it was asked, what it took."""
    FakeHub.asked, FakeHub.took = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An output directory as a run leaves it."""
    return make_run(tmp_path / "run", "adapter")


def make_run(directory: Path, kind: str) -> Path:
    for name in (*ALWAYS, *WEIGHTS[kind], *KEPT):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    return directory


def push(run_dir: Path, name: str, endpoint: str, token: str | None = TOKEN) -> str:
    """Check and push in a process of its own: the library reads its settings when imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(run_dir.parent / "hf"), "PYTHONPATH": "."}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", PUSH, str(run_dir), name]
    done = subprocess.run(command, cwd=PROJECT_DIR, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_hub_gets_what_was_trained_in_a_private_place_and_nothing_else(hub, tmp_path, kind):
    assert push(make_run(tmp_path / "run", kind), "me/new", hub) == f"pushed    {hub}/me/new\n"
    assert FakeHub.took == {n: f"content of {n}".encode() for n in (*ALWAYS, *WEIGHTS[kind])}
    made = [json.loads(body) for path, _, body in FakeHub.asked if path == "/api/repos/create"]
    assert [row.get("private") or row.get("visibility") == "private" for row in made] == [True]
    tokens = {token for path, token, _ in FakeHub.asked if "create" in path or "commit" in path}
    assert tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("you/new", TOKEN, "3 --push_to_hub you/new: the hub refuses the token; it is in"),
        ("me/new", None, "3 --push_to_hub me/new: there is no token of the hub; run hf auth login"),
        ("new", TOKEN, "2 --push_to_hub new: is no name of a repository; give OWNER/NAME"),
        ("a b/new", TOKEN, "2 --push_to_hub a b/new: is no name of a repository; give OWNER/NAME"),
    ],
)
def test_what_cannot_be_sent_is_one_line_that_says_where_it_is(hub, run_dir, name, token, words):
    said = push(run_dir, name, hub, token)
    assert said.startswith(words) and said.count("\n") == 1 and TOKEN not in said
    assert FakeHub.took == {}


def test_a_hub_out_of_reach_loses_nothing(run_dir):
    said = push(run_dir, "me/new", "http://127.0.0.1:9")
    assert said.startswith("3 --push_to_hub me/new: the hub has not taken it: ")
    assert f"hf upload me/new {run_dir}" in said and said.count("\n") == 1
