"""Results are there whole or not at all: killed at every file, on a full disk, beside each other.

The verb is the real one. It is forked from this process, which has imported torch once.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fsdp_qlora import atomic
from fsdp_qlora.__main__ import console, main
from fsdp_qlora.atomic import new_directory
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, SIGTERM, UserError
from fsdp_qlora.export import new_weights  # noqa: F401 (once, not in every fork)
from fsdp_qlora.export.model_files import safetensors_file, write_weights
from tests import faults
from tests.export.test_adapter import write_adapter
from tests.model_files import write_model

EVENTS = ("open", "os.mkdir", "os.rename", "os.chmod", "os.rmdir", "os.remove", "shutil.copyfile")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `adapter`."""
    directory = tmp_path_factory.mktemp("place")
    model = write_model(directory / "model", architectures=["LlamaForCausalLM"])
    (model / "tokenizer.json").write_text("{}")
    write_adapter(directory / "adapter", model)
    return directory


def words(place: Path, out: Path, verb: str = "merge") -> list[str]:
    flags = ["--evidence_rows=0", "--device=cpu", "--max_shard_gib=0.00004", "--dtype=fp32"]
    name = "adapter" if verb == "merge" else "model_name"
    return [verb, f"--{name}={place / name.removesuffix('_name')}", f"--out={out}", *flags]


def run(argv: list[str], number: int, kind: int | None, counted) -> None:
    """The verb as a process; at the `number`th touch of a place of its own a signal comes."""
    out = next(Path(word[6:]) for word in argv if word.startswith("--out="))
    touched = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal touched
        place = str(args[0]) if event in EVENTS else ""
        if place == str(out.parent) or place.startswith(f"{out.parent}/.{out.name}"):
            touched += 1
            counted.value = touched
            if touched == number and kind is not None:
                os.kill(os.getpid(), kind)
                time.sleep(5 * (kind == signal.SIGTERM))  # until Python notices

    sys.addaudithook(watch)
    sys.argv = ["fsdp-qlora", *argv]
    sys.exit(console())


def fork(argv: list[str], number: int = 0, kind: int | None = None) -> tuple[int | None, int]:
    """Exit code, and how many touches were counted."""
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    process = context.Process(target=run, args=(argv, number, kind, counted))
    process.start()
    process.join(60)
    return process.exitcode, counted.value


def tree(directory: Path) -> dict[str, str]:
    """Name -> hash of what is in it; the times and sizes that merge.json tells do not count."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != "merge.json":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_killed_at_any_file_it_leaves_nothing_half_made(place: Path, tmp_path: Path, verb: str):
    """SIGKILL at every touch of a file; then the same command makes the same as ever."""
    whole = tmp_path / "whole"
    code, num_touches = fork(words(place, whole, verb))
    assert code == DONE and num_touches > 20
    expected, outcomes = tree(whole), set()
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < expected.keys()
    out = tmp_path / "out"
    apart = 1 if verb == "merge" else 2
    for number in (*range(apart, num_touches, apart), num_touches):
        assert fork(words(place, out, verb), number, signal.SIGKILL)[0] == -signal.SIGKILL, number
        outcomes.add(out.exists())
        if number % 8 == 4 and not out.exists():
            assert list(tmp_path.glob(".out.*")) != []
            assert fork(words(place, out, verb))[0] == DONE
        assert not out.exists() or tree(out) == expected, number
        assert not (out.exists() and list(tmp_path.glob(".out.*"))), number
        for path in (out, *tmp_path.glob(".out.*")):
            shutil.rmtree(path, ignore_errors=True)
    assert outcomes == {False, True}


@pytest.mark.parametrize("number", [2, 15])
def test_sigterm_takes_the_draft_away(place: Path, tmp_path: Path, number: int, capfd):
    """And a line and the exit code tell of it."""
    out = tmp_path / "out"
    assert fork(words(place, out), number, signal.SIGTERM)[0] == SIGTERM
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr().err == "stopped by SIGTERM\n"


@pytest.mark.parametrize("limit", [0, 100, 5_000, 20_000])
def test_a_full_disk_is_one_line(place: Path, tmp_path: Path, limit: int, capsys):
    """Wherever it happens, nothing is left behind: the limit of file size stands for the disk."""
    with faults.largest_file(limit), pytest.raises(UserError) as caught:
        main(words(place, tmp_path / "out"))
    assert caught.value.code == ENVIRONMENT
    assert "File too large" in str(caught.value) and "ulimit -f" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_done(tmp_path: Path):
    """With what is needed and what is there."""
    words = r"needs 9,\d+,\d+\.\d\d GiB, and .* GiB free"
    with pytest.raises(UserError, match=words) as caught, new_directory(tmp_path / "a", 10**16):
        raise AssertionError("it went on")
    assert caught.value.code == ENVIRONMENT and list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_written_over(tmp_path: Path):
    """A directory with something in it, a file, a link to nowhere; an empty directory is taken."""
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(UserError) as caught, new_directory(tmp_path / name, 0):
            raise AssertionError("it went on")
        assert "exists" in str(caught.value)
        assert caught.value.code == INPUT
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty", 0) as draft:
        (draft / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x"
    mode = (tmp_path / "full").stat().st_mode
    assert (tmp_path / "empty").stat().st_mode == mode


def test_what_another_run_writes_is_left_alone(tmp_path: Path):
    """A draft without a process is removed; one with a lock stays. The later one to end fails."""
    stale, live = (tmp_path / f".out.draft-{name}" for name in ("stale", "live"))
    stale.mkdir()
    live.mkdir()
    (stale / "model.safetensors").write_text("x")
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError) as caught, new_directory(tmp_path / "out", 0):
        assert not stale.exists() and live.exists()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    os.close(lock)
    assert caught.value.code == ENVIRONMENT and "not empty" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.draft-live", "out"]


def test_files_are_what_safetensors_reads(tmp_path: Path):
    """Odd lengths, all dtypes, no elements; every tensor aligned, nothing of the header left."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        'quo"te': torch.randint(0, 255, (7,), dtype=torch.uint8),
        "c": torch.randn(4, 4),
        "empty": torch.empty(0, 4),
        "d": torch.randn(3).half(),
        "e": torch.randn(9),
        "f": torch.tensor(2.5, dtype=torch.float64),
        "g": torch.randn(6, 4).t(),
    }
    with safetensors_file(tmp_path / "x.safetensors", tensors) as add:
        for name, tensor in tensors.items():
            add(name, tensor)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[n].dtype == tensors[n].dtype and read[n].equal(tensors[n]) for n in tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % tensors[name].element_size() == 0
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o444 == 0o444


def test_shards_hold_no_more_than_they_may(tmp_path: Path):
    """One tensor that is larger than a file may be has a file of its own."""
    sizes = {"a": 10, "b": 10, "c": 100, "d": 10, "e": 30}
    tensors = ((name, torch.zeros(size)) for name, size in sizes.items())
    written = write_weights(tmp_path, sizes, tensors, 160)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [set(load_file(path)) for path in sorted(tmp_path.glob("model-*"))]
    assert files == [{"a", "b"}, {"c"}, {"d", "e"}] and written["num_files"] == 3
    assert index["metadata"]["total_size"] == 160 * 4
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path):
    """An error in the writer, or a full disk, leaves the former content and nothing beside it."""
    place = tmp_path / "x.json"
    atomic.write_json(place, {"a": 1})
    assert json.loads(place.read_text()) == {"a": 1}
    assert place.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(ValueError, match="compliant"):
        atomic.write_json(place, {"a": float("nan")})
    with pytest.raises(KeyError), atomic.new_file(place) as draft:
        draft.write_bytes(b"half")
        raise KeyError
    with faults.largest_file(100), pytest.raises(OSError, match="too large"):
        atomic.write(place, b"x" * 1000)
    assert json.loads(place.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [place]
    (tmp_path / "draft").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "draft" / "new").write_text("new")
    (tmp_path / "final" / "old").write_text("old")
    atomic.commit(tmp_path / "draft", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
    assert not (tmp_path / "draft").exists()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_a_home_directory_the_place_of_the_cache_is_asked_for(monkeypatch, tmp_path: Path):
    """A container or job may run as a number that no list of users knows."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("FSDP_QLORA_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    with pytest.raises(UserError, match="no home directory; export HOME=DIR, or FSDP_QLORA_CACHE"):
        atomic.cache_dir()
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    assert atomic.cache_dir() == tmp_path
