"""Files of a result: tokenizers byte for byte, only what changed is written, always the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora import arch
from fsdp_qlora.config import PROJECT_DIR
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


def test_templates_by_name_go_with_what_was_trained(base: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}" + TEMPLATE)
    info, full = arch.read(str(base), need_weights=True), AutoTokenizer.from_pretrained(base)
    assert set(full.chat_template) == {"default", "tool_use"}
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    model_files.write_tokenizer(tmp_path / "adapter", info, full)
    model_files.copy_beside(tmp_path / "merged", info, None, tmp_path / "adapter")
    for name in ("adapter", "merged"):
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.chat_template == full.chat_template


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


# Trains nothing: an adapter of one rank as it starts, and with it two whole tensors.
SAVE = """
import dataclasses, sys, tempfile, torch
from pathlib import Path
from fsdp_qlora.distributed.world import World
from fsdp_qlora.export import model_files
from tests import tiny
model, out = sys.argv[1:]
store = Path(tempfile.mkdtemp()) / "store"
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
world = World(0, 1, 0, 1, torch.device("cpu"))
flags = (f"--output_dir={out}", "--lora_rank=4", "--modules_to_save=embed_tokens,lm_head")
built, info, cfg = tiny.build(model, world, *flags)
for number in "12":
    Path(out + number).mkdir()
    cfg = dataclasses.replace(cfg, output_dir=out + number)
    model_files.save(built, info, cfg, None, is_writer=True)
"""


def test_equal_adapters_are_equal_bytes_in_every_process(tmp_path: Path):
    """Python hashes names anew in every process, and the library's header has any order."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    model = tiny.save_model(tmp_path / "model")
    outs = [tmp_path / f"{seed}{number}" for seed in "01" for number in "12"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(model), str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed, "CUDA_VISIBLE_DEVICES": ""},
            cwd=PROJECT_DIR,
        )
        for seed in "01"
    ]
    assert [run.wait() for run in runs] == [0, 0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(out / name).read_bytes() for out in outs}) == 1, name
    config = LoraConfig.from_pretrained(outs[0])
    assert config.r == 4 and len(config.target_modules) == 7
    assert sorted(config.modules_to_save) == ["embed_tokens", "lm_head"]
    tensors = load_file(outs[0] / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * tiny.SIZES["num_hidden_layers"] + 2
