"""Adapters that peft has made: computed as peft computes them, or refused in true words."""

import json
import os
from pathlib import Path

import pytest
import torch

from fsdp_qlora import inference
from fsdp_qlora.errors import UserError
from tests import tiny

ALPHAS = {"q_proj": 32, r"layers\.1\..*down_proj": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "alpha of some": {"target_modules": [*ATTENTION, "down_proj"], "alpha_pattern": ALPHAS},
    "alpha of all": {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}},
    "rank of some": {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2, "0.*k_proj": 9}},
    "rank and rslora": {
        **{"target_modules": ATTENTION, "use_rslora": True},
        **{"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    },
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "some layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers by pattern": {
        **{"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}
    },
    "without some": {"target_modules": ATTENTION, "exclude_modules": r".*layers\.1\..*q_proj"},
    "pattern": {"target_modules": r".*layers\.[12]\.(self_attn\.k_proj|mlp\.gate_proj)"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    "dora of some": {
        **{"target_modules": ["q_proj", "o_proj"], "use_dora": True},
        **{"layers_to_transform": [1], "alpha_pattern": {"o_proj": 3}},
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both ends": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
REFUSED = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "merge it"),
    "norm": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "merge it"),
    "bias": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "merge_and_unload"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "merge_and_unload"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "merge_and_unload"),
}
IDS = torch.arange(3, 35)[None]


def made(model: Path, out: Path, changes: dict) -> torch.Tensor:
    """Let peft make an adapter; its logits, [T, V]."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **changes)
    adapted = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "bias" in name:
                param.add_(torch.randn(param.shape) * 0.05)
    adapted.save_pretrained(out)
    with torch.no_grad():
        return adapted(IDS).logits[0]


def opened(adapter: Path, *flags: str) -> torch.Tensor:
    """Logits of generate and evaluate."""
    from fsdp_qlora.distributed import world
    from fsdp_qlora.model.head import Targets

    env = dict(os.environ)
    try:
        cfg = inference.config_of(adapter, ["--precision=fp32", "--quant_cache=off", *flags])
        model = inference.open_run(adapter, cfg)
        model.load_adapter()
        with torch.no_grad():
            device = model.world.device
            places = torch.arange(IDS.numel(), device=device)
            return model.model(IDS.to(device), Targets(places, None)).cpu()
    finally:
        world.leave()
        os.environ.clear()
        os.environ.update(env)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its values are bfloat16's, as training stores a base that is not quantized."""
    place = tmp_path_factory.mktemp("base") / "model"
    return tiny.save_model(place, dtype=torch.bfloat16, initializer_range=0.1)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(model: Path, tmp_path: Path, case: str, capfd):
    """In float32, over the base as it is stored: what the adapter does not tell is said."""
    reference = made(model, tmp_path / "adapter", CASES[case])
    torch.testing.assert_close(opened(tmp_path / "adapter"), reference, rtol=1e-4, atol=1e-4)
    assert "does not tell what it was trained over; its base is in 16 bit" in capfd.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_with_what_to_do(model: Path, tmp_path: Path, case: str):
    changes, words = REFUSED[case]
    made(model, tmp_path / "adapter", changes)
    with pytest.raises(UserError, match=words):
        opened(tmp_path / "adapter")


def test_a_head_trained_apart_from_a_tied_embedding_is_refused(tmp_path: Path):
    """peft trains a copy; one matrix cannot be both. By merge, too, which left it out before."""
    from fsdp_qlora.__main__ import main

    model = tiny.save_model(tmp_path / "model", tie_word_embeddings=True)
    made(model, tmp_path / "adapter", CASES["whole head"])
    with pytest.raises(UserError, match="trained apart from the embedding"):
        opened(tmp_path / "adapter")
    with pytest.raises(UserError, match="trained apart from the embedding"):
        main(["merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"])


def test_another_format_than_that_of_training_is_said(model: Path, tmp_path: Path, capfd):
    """An adapter of a 16-bit base over 4 bit, and the other way round; nothing where it fits."""
    from safetensors.torch import load_file, save_file

    place = tmp_path / "adapter"
    made(model, place, CASES["plain"])
    file = place / "adapter_model.safetensors"
    for trained, flags, words in (
        ("bf16", ("--train_type=qlora",), "over a base in 16 bit; its base is in nf4_dq here"),
        ("nf4_dq", ("--train_type=lora",), "over a base in nf4_dq; its base is in 16 bit here"),
        ("nf4_dq", (), ""),
        ("hqq4", (), ""),
        ("bf16", (), ""),
    ):
        save_file(load_file(file), file, {"fsdp_qlora": json.dumps({"format": trained})})
        opened(place, *flags)
        err = capfd.readouterr().err
        assert words in err and ("note      " in err) == bool(words), (trained, err)
