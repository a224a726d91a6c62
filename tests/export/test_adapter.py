"""Adapters as files: what is refused, with numpy alone; what peft writes is in test_merge.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fsdp_qlora import arch, config
from fsdp_qlora.__main__ import main
from fsdp_qlora.arch import targets
from fsdp_qlora.errors import INPUT, INTEGRITY, UserError
from fsdp_qlora.export import adapter as adapter_files
from tests.model_files import write_model

RANK = 2
CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 4,
    "use_rslora": False,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
}


def write_adapter(directory: Path, model: Path, record: dict | None = None) -> Path:
    """An adapter of two linears per layer for a model of model_files."""
    info = arch.read(str(model), need_weights=False)
    random, tensors = np.random.default_rng(0), {}
    cfg = config.TrainConfig(lora_target_modules="q_proj,down_proj")
    for linear in (row.linear for row in targets.find_targets(info, cfg)[0]):
        for index in range(info.num_layers):
            stem = f"base_model.model.model.layers.{index}.{linear.name}.lora"
            tensors[f"{stem}_A.weight"] = random.normal(size=(RANK, linear.in_features))
            tensors[f"{stem}_B.weight"] = random.normal(size=(linear.out_features, RANK))
    directory.mkdir()
    texts = None if record is None else adapter_files.metadata(record)
    arrays = {name: tensors[name].astype("f4") for name in tensors}
    save_file(arrays, directory / "adapter_model.safetensors", texts)
    table = CONFIG | {"base_model_name_or_path": str(model)}
    (directory / "adapter_config.json").write_text(json.dumps(table))
    return directory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with `model` and `adapter`."""
    write_model(tmp_path / "model")
    write_adapter(tmp_path / "adapter", tmp_path / "model")
    return tmp_path


def rewrite(adapter: Path, **changes) -> None:
    """Change tensors of the file; None takes one away."""
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors") | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, adapter / "adapter_model.safetensors")


def test_pairs_scales_and_record_are_read(place: Path, monkeypatch: pytest.MonkeyPatch):
    """The record travels in the weights; without it run_config.json tells the same."""
    adapter = adapter_files.read(place / "adapter")
    assert len(adapter.pairs) == 6 and f"rank {RANK} on 6" in str(adapter) and adapter.record == {}
    assert {pair.scale for pair in adapter.pairs.values()} == {4 / RANK}
    argv = [f"--model_name={place / 'model'}", "--quant_type=fp4", "--output_dir=x"]
    cfg = config.parse(argv)
    config.save(cfg, place / "adapter" / "run_config.json", {"torch": "2"})
    told = {"base": str(place / "model"), "format": "fp4_dq", "compute_dtype": "bfloat16"}
    assert adapter_files.read(place / "adapter").record == told
    monkeypatch.chdir(place)  # a relative path is no name of a base
    info = arch.read("model", need_weights=True)
    assert adapter_files.base_name(info, cfg) == (str(place / "model"), None)
    record = adapter_files.record_of(info, cfg)
    shutil.rmtree(place / "adapter")
    adapter = adapter_files.read(write_adapter(place / "adapter", place / "model", record))
    assert adapter.record == record and record.items() >= told.items() and record["digest"]


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG_TENSORS = {
    "odd": ({f"{STEM}.lora_magnitude_vector": np.ones(4, "f4")}, INPUT, "is no LoRA matrix"),
    "head": ({"base_model.model.lm_head.weight": np.ones((2, 2), "f4")}, INPUT, "lm_head"),
    "half": ({f"{STEM}.lora_B.weight": None}, INTEGRITY, "has no pair"),
    "shape": ({f"{STEM}.lora_A.weight": np.ones((RANK, 31), "f4")}, INTEGRITY, "[32, 31]"),
    "other": (
        {
            f"{STEM.replace('.0.', '.9.')}.lora_{s}.weight": np.ones((RANK, RANK), "f4")
            for s in "AB"
        },
        INTEGRITY,
        "no such linear",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(place: Path, case: str):
    """Before torch is imported or anything written."""
    changes, code, words = WRONG_TENSORS[case]
    rewrite(place / "adapter", **changes)
    refuse(place, code, words)


def refuse(place: Path, code: int, words: str, *more: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["merge", f"--adapter={place / 'adapter'}", f"--out={place / 'out'}", *more])
    assert words in str(caught.value), str(caught.value)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "model"]


def test_files_that_are_no_adapter_are_one_line(place: Path):
    """A pickled one, one cut off, a damaged record, the reference's state dict, a hub name."""
    weights = place / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refuse(place, INTEGRITY, "not fully covered")
    weights.unlink()
    refuse(place, INTEGRITY, "adapter_model.safetensors")
    (place / "adapter" / "adapter_model.bin").write_bytes(b"x")
    refuse(place, INPUT, "is never read")
    from safetensors.numpy import load

    save_file(load(whole), weights, {"fsdp_qlora": "{"})
    refuse(place, INTEGRITY, "damaged record")
    save_file(load(whole), weights, adapter_files.metadata({"format": "nf5"}))
    refuse(place, INPUT, "format 'nf5': is unknown")
    (place / "adapter" / "adapter_config.json").unlink()
    refuse(place, INPUT, "holds no adapter_config.json")
    (place / "adapter" / "model_state_dict.safetensors").write_bytes(b"x")
    refuse(place, INPUT, "rename its tensors")


def test_all_faults_of_the_command_line_come_at_once(place: Path):
    """With the nearest name."""
    refuse(place, INPUT, "--adaptr", "--adaptr=x", "--dtype=int8", "--evidence_rows=-1")
    with pytest.raises(UserError) as caught:
        main(["merge", "--dtyp=bf16"])
    assert str(caught.value).count(" | ") == 2
    assert "did you mean --dtype?" in str(caught.value) and "--out" in str(caught.value)


def test_help_and_wrong_words_need_no_torch(tmp_path: Path):
    """They are answered at once."""
    program = """
import sys
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import UserError
for verb in (["merge"], ["export", "4bit"], ["export", "expanded"]):
    for word in ("--help", "--out=x"):
        try:
            main([*verb, word])
        except (SystemExit, UserError) as end:
            print(end)
print(sorted({"torch", "transformers", "peft", "bitsandbytes"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.count("usage: python -m") == run.stdout.count("must be given") == 3
    assert run.stdout.splitlines()[-1] == "[]" and list(tmp_path.iterdir()) == []
