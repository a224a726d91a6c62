"""Tokens on disk: written once, mapped by all, never trusted blindly."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fsdp_qlora import atomic
from fsdp_qlora.data import tokens
from fsdp_qlora.data.sources import RowPlace
from fsdp_qlora.data.tokens import StoreBuilder, TokenDataset

CODES = [[~5, 6, 7], [~1, ~2, 3], [4], [], [~5, 6, 7]]


def build(builder: StoreBuilder):
    for number, codes in enumerate(CODES, 1):
        builder.add(np.array(codes, np.int32), RowPlace("ab"[number % 2], number), 9)
    return builder.finish({"num_rows": 5})


def check(found: tokens.TokenStore):
    part = TokenDataset(found)
    assert [s.input_ids.tolist() for s in part] == [[5, 6, 7], [1, 2, 3], [4], [], [5, 6, 7]]
    assert part[1].is_trained.tolist() == [False, False, True]
    assert part.num_trained.tolist() == [s.num_trained_tokens for s in part] == [2, 1, 0, 0, 2]
    assert part.lengths.tolist() == [3, 3, 1, 0, 3]
    assert [str(part.place(i)) for i in (0, 1, 4)] == ["b:1", "a:2", "b:5"]
    hashes = TokenDataset(found).hashes.tolist()
    assert hashes[0] == hashes[4] and len(set(hashes)) == 4
    assert found.table[:-1, tokens.NUM_UNCUT].tolist() == [9] * 5 and found.facts["num_rows"] == 5


def test_samples_come_back_from_memory_and_from_disk(tmp_path):
    check(build(StoreBuilder(None)))
    check(tokens.cached(tmp_path / "x" / "tokens", build))
    check(tokens.cached(tmp_path / "x" / "tokens", lambda builder: pytest.fail("made again")))
    found = tokens.read_store(tmp_path / "x" / "tokens")
    assert isinstance(found.codes, np.memmap) and not found.codes.flags.writeable
    part = TokenDataset(found, np.array([4, 1]))
    assert len(part) == 2 and part[0].input_ids.tolist() == [5, 6, 7]
    assert part.lengths.tolist() == [3, 3] and str(part.place(1)) == "a:2"


def test_nothing_may_be_kept_too(tmp_path):
    found = tokens.cached(tmp_path / "x", lambda builder: builder.finish({}))
    assert len(TokenDataset(found)) == len(TokenDataset(tokens.read_store(tmp_path / "x"))) == 0


@pytest.mark.parametrize("name", ["codes.bin", "table.bin", "facts.json"])
def test_a_damaged_or_lost_file_is_noticed_and_all_made_again(tmp_path, name):
    """Valid JSON whose facts have other names is damaged too."""
    path = tmp_path / "tokens" / name
    for damage in ("flip", "cut", "rename", "lose"):
        check(tokens.cached(tmp_path / "tokens", build))
        content = path.read_bytes()
        changed = {"flip": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1]}
        path.write_bytes(changed.get(damage, content.replace(b"num_rows", b"num_raws") + b" "))
        if damage == "lose":
            path.unlink()
        assert tokens.read_store(tmp_path / "tokens") is None
        check(found := tokens.cached(tmp_path / "tokens", build))
        assert "made again: it was damaged" in found.note
        assert tokens.read_store(tmp_path / "tokens") is not None


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in ("tokens", "other-1", "alive-2"):
        (tmp_path / f".tmp-1-{name}").mkdir()
    held = atomic.lock(tmp_path / "alive-2")
    found = tokens.cached(tmp_path / "tokens", build)
    assert found.note == str(tmp_path / "tokens")
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert left == {"tokens", ".tmp-1-alive-2"}
    held.close()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        assert tokens.cached(tmp_path / str(number), build).note == str(tmp_path / str(number))
        assert f"has no locks ({os.strerror(number)})" in capsys.readouterr().err
    number = errno.EIO
    assert tokens.cached(tmp_path / "no", build).note.startswith(f"not kept: {tmp_path}: ")


def test_without_a_disk_to_write_on_the_tokens_stay_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    found = tokens.cached(tmp_path / "file" / "tokens", build)
    check(found)
    assert found.note.startswith(f"not kept: {tmp_path}/file: ")


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(builder):
        build(builder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tokens.cached(tmp_path / "tokens", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".tokens.lock"]


def keep_slowly(directory: Path, log: Path) -> None:
    def build_slowly(builder):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return build(builder)

    check(tokens.cached(directory, build_slowly))


def test_of_several_ranks_one_makes_the_tokens_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    args = (tmp_path / "tokens", tmp_path / "log")
    ranks = [context.Process(target=keep_slowly, args=args) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


def test_the_root_is_off_usual_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    assert tokens.cache_root("off") is None and tokens.cache_root("auto") == tmp_path
    assert tokens.cache_root("~/x") == Path.home() / "x"
    monkeypatch.delenv("FSDP_QLORA_CACHE")
    assert tokens.cache_root("auto") == Path.home() / ".cache" / "fsdp_qlora"
