"""The files of a checkpoint: all there or not at all, every wrong byte found; no torch."""

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from fsdp_qlora import checkpoint_store as store
from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.training import preflight
from tests import faults

NUM_FLIPS = 250  # of single bits, in every file
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STATE = {"is_finite": True, "config": {"lora_rank": 4, "resume": None}, "total_s": 1.5}


def tensors(step: int) -> dict[str, dict[str, store.Array]]:
    """Two files, as a tiny run has them."""

    def array(*shape: int) -> store.Array:
        size = 4
        for length in shape:
            size *= length
        return store.Array("F32", shape, memoryview(random.Random(step).randbytes(size)))

    return {
        store.WEIGHTS: {"layers.0.lora": array(40, 8), "layers.1.lora": array(7)},
        store.OPTIMIZER: {"layers.0.lora.exp_avg": array(40, 8), "layers.0.lora.step": array()},
    }


def save(run_dir: Path, step: int, **state) -> Path:
    root = run_dir / store.CHECKPOINTS
    return store.write(root, step, tensors(step), {**STATE, **state})


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wholesale(path: Path, raw: bytes) -> Iterator[Callable[[], object]]:
    """Everything that can be wrong with a file but single bits."""
    yield from (lambda n=n: path.write_bytes(raw[:n]) for n in (0, 1, len(raw) // 2, len(raw) - 1))
    yield lambda: path.write_bytes(raw + b"\0")
    yield lambda: path.write_bytes(raw + b" ")
    yield lambda: path.write_bytes(raw[:-100] + bytes(100))
    yield lambda: path.write_bytes(bytes(len(raw)))
    yield lambda: path.write_bytes(HTML)
    yield lambda: path.write_bytes(POINTER)
    yield lambda: None  # deleted
    yield path.mkdir
    yield lambda: path.symlink_to(path.parent.parent / "copy")


def flips(path: Path, raw: bytes) -> Iterator[Callable[[], object]]:
    source = random.Random(path.name)
    for _ in range(NUM_FLIPS):
        damaged = bytearray(raw)
        damaged[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        yield lambda damaged=damaged: path.write_bytes(damaged)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_what_was_written_is_read_back(tmp_path: Path):
    """And by the library that other programs read it with."""
    path = save(tmp_path, 3)
    saved = store.read(path)
    assert (saved.step, saved.run_dir) == (3, tmp_path)
    assert saved.state == {"version": 1, "step": 3, **STATE}
    with safe_open(path / store.WEIGHTS, framework="np") as file:
        assert file.get_tensor("layers.0.lora").shape == (40, 8)
        raw = bytes(tensors(3)[store.WEIGHTS]["layers.1.lora"].data)
        assert file.get_tensor("layers.1.lora").tobytes() == raw
    assert {p.name for p in (tmp_path / store.CHECKPOINTS).iterdir()} == {"step-3"}


def test_a_thousand_damages_are_found_each_naming_its_file(tmp_path: Path):
    path = save(tmp_path, 7)
    num_found = 0
    for name, raw in content(path).items():
        file, copy = path / name, path.parent / "copy"
        copy.write_bytes(raw)
        for damage in (*wholesale(file, raw), *flips(file, raw)):
            remove(file)
            damage()
            with pytest.raises(UserError) as caught:
                store.read(path)
            assert caught.value.code == INTEGRITY and name in caught.value.got
            num_found += 1
        remove(file)
        file.write_bytes(raw)
        store.read(path)
    (path / "extra.json").write_text("{}")
    with pytest.raises(UserError, match=r"extra\.json"):
        store.read(path)
    assert num_found >= 1000


@pytest.mark.parametrize("point", hooks.SAVE_POINTS)
def test_a_full_disk_leaves_the_one_before_and_nothing_half_done(
    tmp_path: Path, point: str, monkeypatch
):
    """Whatever was reached; what is behind the renaming is a checkpoint."""
    before = content(save(tmp_path, 1))
    monkeypatch.setenv(faults.VARIABLE, f"enospc:0:{point}")
    root, is_there = tmp_path / store.CHECKPOINTS, point == "save-dir-fsync"

    def at(name: str) -> None:
        faults.meet(name, 0, 2)

    if point.startswith("prune"):
        save(tmp_path, 2)
        with pytest.raises(OSError, match=point):
            store.prune(tmp_path, 1, at)
        assert store.read(root / "step-2")
        return
    with pytest.raises(OSError, match=point):
        store.write(root, 2, tensors(2), STATE, at)
    assert {path.name for path in root.iterdir()} == {"step-1", *(["step-2"] if is_there else [])}
    assert content(root / "step-1") == before


def test_a_disk_that_fills_at_any_byte_leaves_the_one_before(tmp_path: Path):
    """16 sizes, so that it ends in every file in turn."""
    before = content(save(tmp_path, 1))
    sizes = {name: len(raw) for name, raw in before.items()}
    root, largest = tmp_path / store.CHECKPOINTS, max(sizes.values())
    stopped_in = set()
    for nbytes in [*range(0, largest, largest // 16), *(size - 1 for size in sizes.values())]:
        with faults.largest_file(nbytes), pytest.raises(OSError) as caught:
            save(tmp_path, 2)
        assert caught.value.errno == errno.EFBIG
        stopped_in |= {name for name, size in sizes.items() if size > nbytes}
        assert [path.name for path in root.iterdir()] == ["step-1"]
        assert content(root / "step-1") == before
    assert stopped_in == set(sizes)
    assert store.read(save(tmp_path, 2)).step == 2


def test_the_last_ones_the_best_and_a_finite_one_stay(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    store.set_best(tmp_path, 2, 0.5)
    assert store.prune(tmp_path, 2) == [1]
    assert store.steps(tmp_path) == [4, 3, 2]
    for step in (5, 6, 7):
        save(tmp_path, step, is_finite=False)
    assert store.prune(tmp_path, 2) == [5, 3]  # 4 is the last one with finite weights
    assert store.best_of(tmp_path) == {"step": 2, "loss": 0.5}
    assert store.steps(tmp_path) == [7, 6, 4, 2]


def test_nothing_is_removed_while_too_few_are_whole(tmp_path: Path):
    for step in (1, 2, 3):
        path = save(tmp_path, step)
    (path / store.STATE).write_text("{}")
    assert store.prune(tmp_path, 2) == []
    assert store.steps(tmp_path) == [3, 2, 1]


def test_the_latest_whole_one_is_found_and_damaged_ones_are_named(tmp_path: Path):
    assert store.latest(tmp_path) is None
    for step in (9, 10, 11):
        path = save(tmp_path, step)
    (path / store.WEIGHTS).write_bytes(b"")
    (path.parent / ".tmp-step-12").mkdir()
    (path.parent / "step-13").mkdir()
    said: list[str] = []
    saved = store.latest(tmp_path, said.append)
    assert saved is not None and saved.step == 10
    assert [line.split()[1:3] for line in said] == [["step", "13"], ["step", "11"]]
    assert store.WEIGHTS in said[1] and "0 bytes" in said[1]
    before = content(path)
    assert store.go_back(tmp_path, 10) == [13, 11]
    aside = {"step-11.aside-1", "step-13.aside-1"}
    assert {p.name for p in path.parent.iterdir()} == {"step-9", "step-10", *aside}
    assert content(path.with_name("step-11.aside-1")) == before


def test_nothing_is_removed_while_nobody_knows_which_is_the_best(tmp_path: Path):
    """One wrong byte in best.json made it forgotten, and the best checkpoint was removed."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / store.CHECKPOINTS / store.BEST).write_text('{"step": 1, "loss": 0.5\0')
    assert store.prune(tmp_path, 1) == []
    with pytest.raises(UserError, match=r"best\.json"):
        store.best_of(tmp_path)
    store.set_best(tmp_path, 1, 0.5)
    assert store.prune(tmp_path, 1) == [2] and store.steps(tmp_path) == [3, 1]


def test_a_checkpoint_of_the_same_step_is_set_aside(tmp_path: Path):
    before = content(save(tmp_path, 1, is_finite=False))
    path = save(tmp_path, 1)
    assert content(path.with_name("step-1.aside-1")) == before and store.read(path)


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch):
    """A passing error of the disk: code 5, and a restart does not begin anew."""
    save(tmp_path, 1)

    def fail(path: Path) -> list[str]:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "listdir", fail)
        assert store.last_step(tmp_path, unknown=0) == 0 and store.latest(tmp_path) is None
        for wanted in (store.AUTO, store.LATEST):
            with pytest.raises(UserError, match="Input/output error") as caught:
                preflight.expand_resume([f"--resume={wanted}", f"--output_dir={tmp_path}"])
            assert caught.value.code == INTEGRITY
    assert store.latest(tmp_path) == store.read(tmp_path / store.CHECKPOINTS / "step-1")


def test_a_damaged_line_does_not_cost_the_rest_of_the_record(tmp_path: Path):
    """It cut the record at the first wrong byte."""
    path = tmp_path / "metrics.jsonl"
    raw = b'{"event": "run"}\n{"step": 1}\n{"step"\0 2}\n{"step": 3}\n{"step": 4}\n'
    path.write_bytes(raw)
    assert store.cut_record(path, 3) == [{"event": "run"}, {"step": 1}, {"step": 3}]
    assert path.read_bytes() == b'{"event": "run"}\n{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == raw


def test_the_record_is_cut_behind_the_checkpoint(tmp_path: Path):
    """A torn last line, steps beyond, and the look at the finished model go."""
    path = tmp_path / "metrics.jsonl"
    look = {"event": "eval", "when": "before"}
    lines = [{"event": "run"}, look, {"step": 1}, {"step": 2}, {"event": "eval", "when": "step"}]
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    rests = (
        "",
        '{"step": 3, "lo',
        '{"step": 3}\n{"step": 4}\n',
        '{"event":"eval","when":"after"}\n',
    )
    for rest in rests:
        path.write_text(kept + rest)
        assert store.cut_record(path, 2) == lines
        assert path.read_text() == kept
    assert [line.get("step") for line in store.cut_record(path, 1)] == [None, None, 1]
    assert store.cut_record(tmp_path / "none", 2) == []
    shutil.rmtree(tmp_path)


def test_a_run_of_which_nothing_came_leaves_no_word_of_a_rank_half_written(tmp_path: Path):
    """A rank may be ended while it writes why; what somebody else has put there stays."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("rank0.error", ".rank0.error.part", "rank1.log", "notes.rank"):
        (logs / name).touch()
    best = tmp_path / "best"
    best.mkdir()
    store.clear(tmp_path)
    assert best.is_dir(), "somebody else's"
    (best / store.CONFIG).write_text('{"train_type": "qlora", "versions": {}}')
    store.clear(tmp_path)
    assert not best.exists(), "an adapter of the run that is written over"
    assert [path.name for path in logs.iterdir()] == ["notes.rank"]
