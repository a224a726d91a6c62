"""The text half of a model that sees: trained alone, its adapter and merge are of the whole.

Reference: transformers' model of the whole wrapper, and peft.
"""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fsdp_qlora import arch, config
from fsdp_qlora.__main__ import main
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import DONE
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.export import model_files
from fsdp_qlora.model import adapters, load
from tests import tiny, tiny_models
from tests.model.test_model_sweep import share
from tests.model_files import edit_json

WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text"}
WRAPPERS |= {"gemma4": "gemma4_text", "qwen3_5_moe": "qwen3_5_moe_text", "llama4": "llama4_text"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "depth": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_heads": 4, "head_dim": 8}
SIZES |= {"global_head_dim": 8, "image_size": 28, "patch_size": 14, "out_hidden_size": 64}
SIZES |= {"num_position_embeddings": 16, "position_embedding_size": 64}


def save_wrapper(path, name: str) -> None:
    """Write a tiny random wrapper as transformers does."""
    text = tiny_models.tiny_config(WRAPPERS[name]).to_dict()
    text |= {"pad_token_id": 0}  # Gemma 4 fills the places of pictures with it
    usual = AutoConfig.for_model(name).vision_config or AutoConfig.for_model(f"{name}_vision")
    vision = usual.to_dict() | {k: v for k, v in SIZES.items() if hasattr(usual, k)}
    rest = {"mm_tokens_per_image": 4} if name == "gemma3" else {}
    whole = AutoConfig.for_model(name, text_config=text, vision_config=vision, **rest)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(whole, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape) * 0.1
            param.copy_((noise if param.dim() > 1 else param + noise).bfloat16())
    model.save_pretrained(path)


@pytest.mark.parametrize("name", WRAPPERS)
def test_adapter_and_merge_are_those_of_the_whole_model(tmp_path, name):
    base, out, merged = (tmp_path / part for part in ("base", "adapter", "merged"))
    save_wrapper(base, name)
    flags = ("--train_type=qlora", "--precision=fp32", "--quant_cache=off", f"--output_dir={out}")
    cfg = config.parse([f"--model_name={base}", *flags])
    info = arch.read(str(base), need_weights=True)
    assert info.wrapper == name and info.model_type == WRAPPERS[name]
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = load.build(cfg, info, World(0, 1, 0, 1, torch.device("cpu"))).model
        tiny.fill_lora(model)
        out.mkdir()
        model_files.save(model, info, cfg, None, is_writer=True)
        ids = torch.arange(40)[None]
        with torch.no_grad():
            own = model.eval()(ids)[0, -1]
        argv = adapter_files.expand_init([f"--init_adapter={out}", *flags])
        again = config.parse([f"--model_name={base}", *argv])
        adapter_files.check_init(again, info, print)
        fresh = load.build(again, info, World(0, 1, 0, 1, torch.device("cpu"))).model
        place = out / adapter_files.WEIGHTS_NAME
        adapters.load(fresh, place)
        with torch.no_grad():
            assert torch.equal(fresh.eval()(ids)[0, -1], own)
    finally:
        torch.distributed.destroy_process_group()
    argv = [f"--adapter={out}", f"--out={merged}", f"--model_name={base}"]
    assert main(["merge", *argv, "--dtype=fp32", "--device=cpu"]) == DONE
    facts = json.loads((merged / "merge.json").read_text())
    assert facts["evidence"]["max_difference"] < 1e-3
    before, after = (load_file(place / "model.safetensors") for place in (base, merged))
    assert before.keys() == after.keys()
    assert info.towers and all(torch.equal(before[key], after[key]) for key in info.towers)
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        assert share(own, whole(input_ids=ids).logits[0, -1]) < 1e-4
    original = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(original, out).named_parameters())
    saved = load_file(out / "adapter_model.safetensors")
    assert len(saved) == sum("lora_" in key for key in loaded)  # none on another part
    for key, value in saved.items():
        assert torch.equal(loaded[key.replace(".weight", ".default.weight")], value)


def test_a_wrapper_is_planned_from_a_config_that_leaves_sizes_to_its_class(tmp_path):
    """As gemma-3-4b-it's on the hub: six values of the text half."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", model_type="gemma3", text_config=text, vision_config={})
    num = arch.num_params(arch.read(str(tmp_path), need_weights=False))
    whole = AutoConfig.for_model(**text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    assert num == sum(param.numel() for param in model.parameters())
