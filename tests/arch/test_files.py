"""Damaged model files are found from their headers and named in one line."""

import json
import os
from pathlib import Path

import pytest

from fsdp_qlora import arch
from fsdp_qlora.arch import files
from fsdp_qlora.errors import INPUT, INTEGRITY, UserError
from tests.model_files import write_header, write_model


def lose_config(directory: Path) -> None:
    """config.json is absent."""
    (directory / "config.json").unlink()


def cut_config(directory: Path) -> None:
    """config.json ends in the middle."""
    path = directory / "config.json"
    path.write_text(path.read_text()[:100])


def list_config(directory: Path) -> None:
    """config.json is JSON, but no object."""
    (directory / "config.json").write_text("[]")


def pickle_only(directory: Path) -> None:
    """Only pickled weights."""
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def adapter_only(directory: Path) -> None:
    """An adapter's directory instead of a model's."""
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")


def lfs_pointer(directory: Path) -> None:
    """A clone without git lfs."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9000000\n"
    (directory / "model.safetensors").write_text(text)


def html_page(directory: Path) -> None:
    """A page saved by a browser."""
    (directory / "model.safetensors").write_text("\n<!DOCTYPE html><html>Sign in</html>")


def truncate(directory: Path) -> None:
    """A download that stopped near the end."""
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def truncate_header(directory: Path) -> None:
    """A download that stopped at the start."""
    os.truncate(directory / "model.safetensors", 100)


def empty(directory: Path) -> None:
    """A file without a byte."""
    os.truncate(directory / "model.safetensors", 0)


def append(directory: Path) -> None:
    """Bytes that belong to no tensor."""
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def edit_header(directory: Path, old: bytes, new: bytes) -> None:
    """Replace text in the header, keeping its length."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    assert len(old) == len(new) and raw.count(old) >= 1
    path.write_bytes(raw.replace(old, new, 1))


def rename_tensor(directory: Path) -> None:
    """A tensor with a wrong name."""
    edit_header(directory, b"model.norm.weight", b"model.mean.weight")


def integer_tensor(directory: Path) -> None:
    """A checkpoint of integers."""
    edit_header(directory, b'"F32"', b'"I32"')


def garbled_header(directory: Path) -> None:
    """A header that is no JSON."""
    edit_header(directory, b'"F32"', b'"F32,')


def index_of_absent_file(directory: Path) -> None:
    """A shard was not downloaded."""
    write_index(directory, {"lm_head.weight": "model-00002-of-00002.safetensors"})


def index_of_other_tensors(directory: Path) -> None:
    """The index belongs to another model."""
    write_index(directory, {"model.extra.weight": "model.safetensors"})


def index_outside(directory: Path) -> None:
    """The index points out of the directory."""
    write_index(directory, {"lm_head.weight": "../model.safetensors"})


def index_without_map(directory: Path) -> None:
    """The index names nothing."""
    write_index(directory, {})


def write_index(directory: Path, more: dict) -> None:
    """Write an index of the single file, with more entries."""
    index = {"weight_map": {"model.norm.weight": "model.safetensors"} | more if more else {}}
    (directory / files.INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words", "code"),
    [
        (lose_config, "config.json: is needed, and absent", INPUT),
        (cut_config, "is no valid JSON", INTEGRITY),
        (list_config, "must hold a JSON object", INTEGRITY),
        (pickle_only, "only pickled weights (pytorch_model.bin)", INPUT),
        (adapter_only, "holds no safetensors weights", INPUT),
        (lfs_pointer, "is a git-lfs pointer, not the file; run git lfs pull", INTEGRITY),
        (html_page, "is an HTML page", INTEGRITY),
        (truncate, "incomplete metadata, file not fully covered", INTEGRITY),
        (truncate_header, "100 bytes are no safetensors file", INTEGRITY),
        (empty, "0 bytes are no safetensors file", INTEGRITY),
        (append, "incomplete metadata, file not fully covered", INTEGRITY),
        (rename_tensor, "1 tensor (model.norm.weight)", INTEGRITY),
        (integer_tensor, "holds I32 tensors", INPUT),
        (garbled_header, "invalid JSON in header", INTEGRITY),
        (index_of_absent_file, "is named by the index, and absent", INTEGRITY),
        (index_of_other_tensors, "1 tensor (model.extra.weight) not in the file", INTEGRITY),
        (index_outside, "which is no plain file name", INTEGRITY),
        (index_without_map, "has no weight_map", INTEGRITY),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, damage, words: str, code: int) -> None:
    """Found from the headers, before a weight is read."""
    damage(write_model(tmp_path))
    with pytest.raises(UserError) as caught:
        arch.read(str(tmp_path), need_weights=True)
    assert words in str(caught.value)
    assert caught.value.code == code


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
