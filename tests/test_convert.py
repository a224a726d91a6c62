"""`convert`: state dicts named as AnswerDotAI/fsdp_qlora names them become adapters of peft's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE, INPUT, INTEGRITY, UserError
from fsdp_qlora.results import adapter_files
from tests import tiny
from tests.test_merge import logits

TARGETS = ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]  # its "all"
RANK, ALPHA = 4, 32
CUSTOM = "_fsdp_wrapped_module.model.layers.{}._fsdp_wrapped_module._checkpoint_wrapped_module.{}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `theirs.safetensors`, the state dict of peft's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("convert")
    model = tiny.save_model(directory / "model")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **settings)
    trained = get_peft_model(base, config).eval()
    save_file(dict(trained.state_dict()), directory / "theirs.safetensors")
    torch.save(logits(trained), directory / "logits.pt")
    return directory


def theirs(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "theirs.safetensors")


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As after train_type qlora: 4-bit bytes of the linears lie in one bfloat16 column."""
    return {
        name: tensor.bfloat16().view(-1)[::4].reshape(-1, 1).contiguous()
        if name.endswith("_proj.base_layer.weight") or name.endswith("o_proj.weight")
        else tensor
        for name, tensor in tensors.items()
    }


def custom(tensors: dict[str, torch.Tensor], prefix: str = "model.layers.{}.{}") -> dict:
    """As after train_type custom_qlora: only nn.Sequential(A, B), called lora_AB."""
    found = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            _, _, rest = name.partition("model.model.layers.")
            layer, _, rest = rest.partition(".")
            linear, _, side = rest.partition(".lora_")
            place = prefix.format(layer, linear)
            found[f"{place}.lora_AB.{'AB'.index(side[0])}.weight"] = tensor
    return found


def convert(place: Path, tensors: dict, out: Path, *more: str) -> dict:
    """Run the verb; return the record that the adapter carries."""
    file = out.with_name("model_state_dict.safetensors")
    save_file(tensors, file)
    argv = [f"--state_dict={file}", f"--model_name={place / 'model'}", f"--out={out}"]
    assert main(["convert", *argv, f"--lora_alpha={ALPHA}", *more]) == DONE
    return adapter_files.read(out).record


KINDS = {
    "lora": (lambda tensors: tensors, (), "bf16"),
    "qlora": (packed, (), "nf4_dq"),
    "custom_qlora": (custom, ("--train_type=custom_qlora",), "nf4_dq"),
    "custom_wrapped": (lambda tensors: custom(tensors, CUSTOM), (), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_it_and_computes_the_same(place: Path, tmp_path: Path, kind: str):
    """Whatever the names; what the base was is recorded where it can be known."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    change, flags, format_name = KINDS[kind]
    out = tmp_path / "out"
    record = convert(place, change(theirs(place)), out, *flags)
    assert record["format"] == format_name and record["base"] == str(place / "model")
    table = json.loads((out / "adapter_config.json").read_text())
    assert (table["r"], table["lora_alpha"]) == (RANK, ALPHA)
    assert sorted(table["target_modules"]) == sorted(TARGETS)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, out)
    assert torch.equal(logits(model), torch.load(place / "logits.pt", weights_only=True))
    assert len(load_file(out / "adapter_model.safetensors")) == 3 * len(TARGETS) * 2


def test_a_converted_adapter_merges(place: Path, tmp_path: Path):
    """From the reference's file to a plain model in two verbs."""
    convert(place, packed(theirs(place)), tmp_path / "adapter")
    argv = [f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    flags = ("--base=16bit", "--dtype=fp32", "--evidence_rows=0")
    assert main(["merge", *argv, *flags]) == DONE
    from transformers import AutoModelForCausalLM

    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    expected = torch.load(place / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ANY = torch.ones(2, 2)
Q = "model.layers.{}.self_attn.q_proj"
WRONG = {
    "unknown": ({"model.layers.0.mystery.weight": ANY}, INPUT, "(model.layers.0.mystery.weight)"),
    "dora": ({"model.layers.0.mlp.up_proj.dora_layer.lora_A.weight": ANY}, INPUT, "DoRA"),
    "other layer": ({Q.format(7) + ".lora_AB.0.weight": ANY}, INPUT, "is no linear of"),
    "no such linear": ({"model.layers.0.experts.lora_AB.0.weight": ANY}, INPUT, "is no linear of"),
    "half": ({Q.format(1) + ".lora_AB.0.weight": None}, INTEGRITY, "has one matrix of two"),
    "shape": ({Q.format(1) + ".lora_AB.1.weight": ANY}, INTEGRITY, "has matrices [4, 128] and [2"),
    "lost": (
        {Q.format(1) + f".lora_AB.{side}.weight": None for side in (0, 1)},
        INTEGRITY,
        "has no LoRA matrices for 1 tensor (model.layers.1.self_attn.q_proj)",
    ),
    "ranks": (
        {
            Q.format(1) + ".lora_AB.0.weight": torch.ones(2, 128),
            Q.format(1) + ".lora_AB.1.weight": torch.ones(128, 2),
        },
        INTEGRITY,
        "has ranks [2, 4]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_is_named(place: Path, tmp_path: Path, case: str):
    """And nothing is written."""
    changes, code, words = WRONG[case]
    tensors = custom(theirs(place)) | changes
    refuse(place, {n: t for n, t in tensors.items() if t is not None}, tmp_path, code, words)


def refuse(place: Path, tensors: dict, tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(place, tensors, tmp_path / "out")
    assert words in str(caught.value), str(caught.value)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model_state_dict.safetensors"]


def test_a_file_without_lora_is_refused(place: Path, tmp_path: Path):
    """Such as that of full fine-tuning, or a file that is cut off, or none."""
    base = {n: t for n, t in theirs(place).items() if ".lora_" not in n}
    refuse(place, base, tmp_path, INPUT, "holds no LoRA matrices")
    file = tmp_path / "model_state_dict.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    argv = [f"--model_name={place / 'model'}", f"--out={tmp_path / 'out'}"]
    for path, code in ((file, INTEGRITY), (tmp_path / "nothing", INPUT)):
        with pytest.raises(UserError) as caught:
            main(["convert", f"--state_dict={path}", *argv])
        assert caught.value.code == code
