"""What only the ranks can find, secrets in a run that crashes, and who can reach the ranks."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fsdp_qlora import errors
from tests import warm

PEM = "-----BEGIN EC PRIVATE KEY-----\nMIIEcanaryPEM1\n+/canaryPEM2==\n-----END EC PRIVATE KEY-----"
CANARIES = {
    "HF_TOKEN": "hf_" + "canaryAcanaryAcanaryAcanary",
    "WANDB_API_KEY": "0123456789abcdefcafe0123456789abcdefcafe",
    "AWS_SECRET_ACCESS_KEY": "/anaryB2+canary/canary/B+canary/B",  # not a path
    "AWS_SESSION_TOKEN": "canary25//session+token=",
    "HTTPS_PROXY": "http://alice:canary-C-password@127.0.0.1:9",
    "GITLAB_PAT": "canary-pat-1a2b3c",
    "DB_PASS": "canary pass 4",
    "SMTP_PASSWORD": "canary$pw\"quo'te\\5",
    "PGPASSWORD": "canarypgpassword",
    "REDISCLI_AUTH": "canary-redis-9",
    "DOCKER_AUTH_CONFIG": '{"auths": {"r.io": {"auth": "canaryWZG9ja2VyMTA="}}}',
    "HTTP_BEARER": "canarybearer11",
    "SESSION_COOKIE": "sid=canary-cookie-12; Path=/",
    "SENTRY_DSN": "https://canary13key@o1.ingest.sentry.io/55",
    "SLACK_WEBHOOK": "https://hooks.slack.com/services/T0/B0/canary14",
    "DATABASE_URL": "postgres://alice:canary%2F21@db/x",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=canary23canary23==;Suffix=x",
    "GOOGLE_CREDENTIALS": f'{{"private_key": "{PEM[:-1]}-", "private_key_id": "canary27id0123"}}',
    "SSH_PRIVATE_KEY": PEM,
    **{"TS_AUTHKEY": "tskey-canary-39", "MAILPASS": "canarypass40", "GITPAT": "canarypat-41"},
    **{
        "LICENSEKEY": "canary-license-42",
        "RABBITDSN": "amqp-canary-43",
        "F": "pypi-AgEIcHlwaS5canary44Zq",
    },
    "api_tokens": "canary-38-a,canary-38-b-longer-value",
    # by their look, whatever the name
    "A": "eyJhbGciOiJIUzI1NiJ9.eyJjYW5hcnkiOjE3fQ.canarysignature",
    "B": "xoxb-canary-18-abc",
    "C": "dapi" + "0123456789abcdef" * 2,
    "D": "r8_canary20canary20canary20",
    "E": "sk-ant-api03-canary31canary31_canaryAA",
}
PLAIN = {
    **{"PATH": "/usr/local/bin:/usr/bin", "MY_AUTH": "/home/auth/models", "OLDPWD": "/srv/canary"},
    **{"SORT_KEY": "short", "MAX_TOKENS": "2147483648", "TOKEN_LIMIT": "1,000,000,000"},
    **{"COMPASS": "north-by-northwest", "PUBLICKEY": "ed25519-of-alice", "MONKEY": "bananas-only"},
    **{"TOKENIZERS_PARALLELISM": "disabled!", "KEYBOARD": "us-international", "PASSIVE": "a" * 20},
    "PWD": "/mnt/c/Users/Ann Other/models",
    **{"GIT_AUTHOR_NAME": "Alice Author", "AUTH_TYPE": "kerberos5", "PATTERN": "some-pattern"},
    **{"SSH_AUTH_SOCK": "/tmp/ssh-1/agent.11", "DATASET_URL": "https://example.org/x.jsonl"},
}
IN_FILE = "hf_" + "canaryDcanaryDcanaryDcanary"  # as `hf auth login` leaves it
IN_ADDRESS = "canaryEcanaryE"
SHOWN = re.compile(r"(?i)canary|0123456789abcdef")  # of any secret above, in any form
OWN = (
    "def rows(config, tokenizer, split):\n    yield {'text': 'a'}\n    raise KeyError('no more')\n"
)


def argv_of(place: Path, out: Path, *more: str) -> list[str]:
    """Two steps on two ranks."""
    return [
        *(f"--model_name={place / 'model'}", f"--dataset={place / 'data.jsonl'}"),
        *(f"--quant_cache={out}-cache", f"--token_cache={out}-tokens", "--eval_samples=4"),
        *("--world_size=2", "--max_steps=2", "--context_length=64", "--lora_rank=4"),
        *("--save_every=1", "--sample_tokens=2", f"--output_dir={out}", *more),
    ]


def leaky(argv: list[str], start) -> int:
    """train.py, whose run ends in an error that tells all it knows (the ranks are forked)."""
    from fsdp_qlora import run as train

    whole = train.run

    def run(plan, world, *args) -> None:
        whole(plan, world, *args)
        world.barrier()  # rank 0 has written the whole record
        known = [f"{name}={os.environ[name]}" for name in CANARIES]
        known += [json.dumps(dict(os.environ)), repr(os.environ), *PEM.splitlines()[1:3]]
        known += [Path(os.environ["HF_HOME"], "token").read_text()]
        raise LookupError(f"no https://x.org/rows?token={IN_ADDRESS} {' '.join(known)}")

    train.run = run
    return train.main(argv, start=start)


def listening(pids: list[int]) -> set[str]:
    """Addresses at which these processes can be reached, by the kernel's tables."""
    found = set()
    for pid in pids:
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        except OSError:  # it has just ended
            continue
        for line in "".join(tables).splitlines():
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(digits: str) -> str:
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


def test_no_secret_is_written_and_nobody_else_can_reach_the_ranks(place: Path):
    """Six canaries, a whole record, then a crash that tells all: every byte is looked through."""
    out, home = place / "leaky", place / "hf"
    home.mkdir()
    (home / "token").write_text(IN_FILE)
    run = warm.start(argv_of(place, out), place, leaky, HF_HOME=str(home), **CANARIES)
    addresses: set[str] = set()
    while run.process.is_alive():
        addresses |= listening(run.orphans())
        run.process.join(0.05)
    assert run.wait() == errors.BUG and run.orphans() == []
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert run.err.count("\n") == 1 and "LookupError: no https://x.org/rows?" in run.err
    trace = "".join(path.read_text() for path in (out / "logs").glob("rank*.log"))
    assert trace.count("[secret]") >= len(CANARIES) + 2 and "raise LookupError" in trace
    files = [
        p for part in (out, Path(f"{out}-cache"), Path(f"{out}-tokens")) for p in part.rglob("*")
    ]
    written = {path: path.read_bytes() for path in files if path.is_file()}
    assert {"summary.json", "metrics.jsonl", "run_config.json", "README.md"} <= {
        path.name for path in written
    }
    written |= {run.out_file: run.out.encode(), run.err_file: run.err.encode()}
    texts = {path: data.decode(errors="replace") for path, data in written.items()}
    assert {path: SHOWN.findall(text) for path, text in texts.items() if SHOWN.search(text)} == {}


def test_no_secret_in_what_is_cut_nor_in_what_ends_a_process_and_no_harmless_value_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
):
    """A text cut in the midst of a secret; a thread and a command that nobody has foreseen."""
    program = "import os, threading; from fsdp_qlora import errors; errors.redact_tracebacks()\n"
    program += "def end(): raise LookupError(dict(os.environ))\n"
    program += "thread = threading.Thread(target=end); thread.start(); thread.join(); end()"
    env = dict(os.environ) | CANARIES | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert ended.stderr.count("LookupError: {") == 2 and not SHOWN.search(ended.stderr)
    for name, value in (CANARIES | PLAIN).items():
        monkeypatch.setenv(name, value)
    for value in CANARIES.values():
        texts = [errors.brief(LookupError("x" * num + value)) for num in range(120)]
        assert not any(map(SHOWN.search, texts)), value
    for name, value in PLAIN.items():
        assert errors.redact(f"{name}={value}") == f"{name}={value}"
    for text in ("--sample_tokens 48", "sorted(rows, key=len)", "https://x.org/a?download=true"):
        assert errors.redact(text) == text


KERNELS = """import os
def get_kernel(*what, **more):
    open(os.environ["CANARY"], "a").write(repr(what))
"""
NO_NETWORK = """import os, sys
def watch(event, args):
    if event == "socket.connect":
        open(os.environ["CANARY"], "a").write(repr(args))
        raise PermissionError(args)
sys.addaudithook(watch)
import fsdp_qlora.export.model_files, fsdp_qlora.inference, fsdp_qlora.training.loop, peft
assert "bitsandbytes" in sys.modules
import kernels
"""


def test_no_kernel_is_fetched_or_run_and_torch_comes_from_one_place(tmp_path: Path):
    """A package `kernels` is installed: bitsandbytes would have it fetch one as it is imported."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    paths = os.pathsep.join([os.getcwd(), str(tmp_path)])
    env = dict(os.environ) | {"PYTHONPATH": paths, "CANARY": str(tmp_path / "canary")}
    subprocess.run([sys.executable, "-c", NO_NETWORK], env=env, check=True)
    assert not (tmp_path / "canary").exists()
    make = ["make", "-nB", "venv", "TORCH_INDEX=https://torch.test/cpu"]
    said = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in said.splitlines() if line.endswith(" torch")]
    assert "--index-url https://torch.test/cpu --no-deps" in line
    assert "--extra-index-url" not in said


def test_rows_that_only_the_ranks_can_make_fail_in_one_line_and_leave_nothing(place: Path):
    """A function of the user's own is called by the ranks, with the tokenizer that they load."""
    (place / "own.py").write_text(OWN)
    out = place / "own"
    run = warm.start(argv_of(place, out, f"--dataset={place / 'own.py'}:rows"), place)
    assert run.wait() == errors.INPUT and run.orphans() == []
    assert re.fullmatch(r"error: \S+own\.py:3: KeyError: 'no more'; correct it; .*\n", run.err)
    assert not out.exists()


def test_weights_that_are_not_numbers_are_named(place: Path):
    """One of a million is enough; it is found when it is read, before a step."""
    out, path = place / "nan", place / "model" / "model.safetensors"
    good = path.read_bytes()
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    save_file(tensors, path)
    run = warm.start(argv_of(place, out), place)
    assert run.wait() == errors.INTEGRITY and run.orphans() == []
    assert run.err.startswith(f"error: {name} in {path}: holds numbers that are not finite")
    assert run.err.count("\n") == 1 and not out.exists()
    path.write_bytes(good)
