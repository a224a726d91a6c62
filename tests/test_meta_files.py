"""Llama as Meta hands it out is recognised, wherever a model is asked for."""

import json
from pathlib import Path

import pytest

from fsdp_qlora import arch
from fsdp_qlora.errors import INPUT, UserError
from tests.model_files import write_model


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
    for files, name in [*cases, (["params.json"], "c")]:
        line = refusal(original(tmp_path / name, *files))
        assert "Meta's original files" in line
        assert "python -m transformers.models.llama.convert_llama_weights_to_hf" in line


def test_beside_a_converted_model_that_one_is_named(tmp_path: Path):
    """Hub repositories of Llama 3 have it in original/; with config.json it is no matter."""
    model = write_model(tmp_path / "model")
    line = refusal(original(model / "original", "consolidated.00.pth", "params.json"))
    assert f"give the directory above it, {model}" in line
    (model / "params.json").write_text("{}")
    assert arch.read(str(model), need_weights=True).num_layers == 3
