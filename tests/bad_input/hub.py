"""A hub on this machine that refuses, each model for another reason."""

import json
from http.server import BaseHTTPRequestHandler

from fsdp_qlora.errors import ENVIRONMENT
from tests.bad_input.case import Case

COMMIT = "0" * 40
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\0" * 100}
REFUSALS = {
    "no-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "absent": (404, {"X-Error-Code": "RepoNotFound"}),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "down": (503, {}),
    "busy": (429, {}),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the real hub does; org/cut sends half of each file, org/drop nothing at all."""

    def do_GET(self) -> None:
        """Refuse by the name of the model."""
        name = self.path.partition("org/")[2].split("/")[0]
        if name in REFUSALS:
            self.reply(REFUSALS[name][0], b"", REFUSALS[name][1])
        elif not name:
            self.reply(404, b"")
        elif name == "drop":
            self.connection.close()
        elif "/tree/" in self.path:
            items = [
                {"type": "file", "path": n, "size": len(d), "oid": n} for n, d in FILES.items()
            ]
            self.reply(200, json.dumps(items).encode())
        elif "/api/models/" in self.path:
            siblings = [{"rfilename": name} for name in FILES]
            model = {"id": f"org/{name}", "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(model).encode())
        else:
            file = self.path.rpartition("/")[2]
            self.reply(200, FILES[file], {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT}, cuts=2)

    do_HEAD = do_GET

    def reply(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, cuts: int = 1
    ) -> None:
        """Send an answer, of its body a part."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // cuts])
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def model(name: str, words: str) -> Case:
    """A model that the hub does not give."""
    return Case(name, words, (f"--model_name=org/{name}",), code=ENVIRONMENT)


CASES = [
    model("no-token", "hf auth login"),
    model("gated", "accept them at"),
    model("absent", "no such public model"),
    model("revision", "has no such revision"),
    model("down", "the hub is down (503)"),
    model("busy", "wants fewer requests (429)"),
    model("drop", "hub out of reach"),
    model("cut", "hub out of reach"),
]
