"""Tokenizers are copied byte for byte; only what changed is written."""

import json
from pathlib import Path

import pytest

from fsdp_qlora import arch
from fsdp_qlora.export import model_files
from tests import tiny
from tests.model_files import write_model

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
NAMES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model with the tokenizer files that an older transformers wrote."""
    model = write_model(tmp_path / "model", vocab_size=386)
    tiny.save_tokenizer(model, ["What is 5? It is a number."] * 9)
    tiny.keep_as_on_the_hub(model)
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name in NAMES}


def test_a_trained_tokenizer_is_the_bases_files_and_its_template(base: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    info, full = arch.read(str(base), need_weights=True), AutoTokenizer.from_pretrained(base)
    for template in (None, TEMPLATE):
        full.chat_template = template
        out = tmp_path / str(template is None)
        out.mkdir()
        model_files.write_tokenizer(out, info, full)
        assert files(out) == files(base)
        others = {path.name for path in out.iterdir()} - NAMES
        assert others == ({"chat_template.jinja"} if template else set())
        again = AutoTokenizer.from_pretrained(out)
        assert again.chat_template == template
        assert again("What is 5?").input_ids == full("What is 5?").input_ids


def test_an_adapter_saved_anew_brings_its_template_or_its_tokens(base: Path, tmp_path: Path):
    """By transformers 5, as older versions of ours did: its names for classes are not taken on."""
    from transformers import AutoTokenizer

    info, full = arch.read(str(base), need_weights=True), AutoTokenizer.from_pretrained(base)
    full.chat_template = TEMPLATE
    full.save_pretrained(tmp_path / "adapter")
    assert "TokenizersBackend" in (tmp_path / "adapter" / "tokenizer_config.json").read_text()
    (tmp_path / "out").mkdir()
    model_files.copy_beside(tmp_path / "out", info, "bfloat16", tmp_path / "adapter")
    assert files(tmp_path / "out") == files(base)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    full.add_tokens(["<|tool|>"])
    full.save_pretrained(tmp_path / "more")
    (tmp_path / "larger").mkdir()
    model_files.copy_beside(tmp_path / "larger", info, None, tmp_path / "more")
    assert files(tmp_path / "larger") == files(tmp_path / "more") != files(base)
