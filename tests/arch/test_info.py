"""What config.json and headers say of a model, against what transformers builds."""

import functools
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fsdp_qlora import arch
from fsdp_qlora.arch import targets
from fsdp_qlora.arch.info import LAYOUTS, OTHER_NAMES, Shapes, from_config, from_headers
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.skeleton import shapes_of
from fsdp_qlora.planning.sizes import count_trained
from tests.model_files import TINY, edit_json, write_model

# Parameters by model cards and papers; some in billions.
PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text())


@functools.cache
def known(name: str) -> arch.ModelInfo:
    """A model by the name of its shape; those of many experts take a second to read."""
    return arch.read(name, need_weights=False)


def build(config: dict, device: str = "meta") -> nn.Module:
    """Let transformers build the model of a config."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def built_shapes(model: nn.Module) -> Shapes:
    """Name -> shape; PyTorch itself leaves out the second name of a tied head."""
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def built_linears(model: nn.Module, prefix: str) -> set[arch.Linear]:
    """The nn.Linear modules of the first decoder layer."""
    modules = model.get_submodule(f"{prefix}.0").named_modules()
    found = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    return {
        arch.Linear(name, module.out_features, module.in_features, module.bias is not None)
        for name, module in found
    }


def save_tiny(directory: Path, model_type: str, max_shard_size: str = "5GB", **more) -> nn.Module:
    """Save a random three-layer model; return it."""
    torch.manual_seed(0)
    model = build({"model_type": model_type} | TINY | more, "cpu")
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize("name", arch.files.known_shapes())
def test_shape_of_a_known_model_equals_what_transformers_builds(name: str) -> None:
    """All parameters, linears and the tying, from config.json alone; a few layers suffice."""
    raw = arch.files.read_json(arch.files.SHAPES_DIRECTORY / f"{name}.json")
    info = known(name)
    if "_tensors" in raw:  # names as in files
        config = {key: v[:6] if key == "layer_types" else v for key, v in info.config.items()}
        wanted = shapes_of(config | {"num_hidden_layers": 6})
        found = arch.files.without_bytes(raw["_tensors"], {})
        numbers = {name: re.search(r"layers\.(\d+)", name) for name in found}
        first = {name for name, match in numbers.items() if match is None or int(match[1]) < 6}
        assert {name: list(found[name].shape) for name in first} == wanted
        return
    config = info.config | {"num_hidden_layers": 2}
    model = build(config)
    assert from_config(config).all_shapes() == built_shapes(model)
    assert set(info.linears) == built_linears(model, info.layers_prefix)
    assert info.is_tied == model.config.tie_word_embeddings
    assert (info.hidden_size, info.vocab_size) == tuple(model.get_input_embeddings().weight.shape)[
        ::-1
    ]


def test_shape_files_keep_the_rotary_base_and_scaling() -> None:
    """transformers 5 keeps them elsewhere; a base lost on the way would train a broken model."""
    config = AutoConfig.for_model(**arch.read("llama-3.1-8b", False).config)
    assert config.rope_parameters["rope_theta"] == 500_000
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("llama3", 8)


@pytest.mark.parametrize(("name", "num_params"), PUBLISHED["params"].items())
def test_parameter_count_equals_the_published_one(name: str, num_params: int) -> None:
    """From config.json alone."""
    assert arch.num_params(known(name)) == num_params


def test_parameters_of_mixtures_and_hybrids_are_the_published_ones() -> None:
    """Every model with a table of its tensors is among them."""
    shapes = {n: arch.files.SHAPES_DIRECTORY / f"{n}.json" for n in arch.files.known_shapes()}
    tables = {name for name, path in shapes.items() if "_tensors" in path.read_text()}
    assert tables <= PUBLISHED["billions"].keys() | PUBLISHED["params"].keys()
    found = {name: arch.num_params(known(name)) / 1e9 for name in PUBLISHED["billions"]}
    assert {name: round(num, 1) for name, num in found.items()} == PUBLISHED["billions"]


def test_trainable_counts_equal_those_of_peft() -> None:
    """Figures that peft prints for these two models."""

    def lora_params(info: arch.ModelInfo, targets: str) -> int:
        return count_trained(info, TrainConfig(lora_rank=8, lora_target_modules=targets)).total

    qwen = arch.read("qwen2.5-7b", need_weights=False)
    seven = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert lora_params(qwen, seven) == lora_params(qwen, "all") == 20_185_088
    llama = arch.read("llama-3-8b", need_weights=False)
    assert lora_params(llama, "q_proj, k_proj, self_attn.v_proj") == 4_718_592


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_optional_biases_follow_the_config(model_type: str, has_bias: bool) -> None:
    """attention_bias everywhere, mlp_bias where the type has one."""
    flags = {"attention_bias": has_bias, "mlp_bias": has_bias}
    config = {"model_type": model_type} | TINY | flags
    assert from_config(config).all_shapes() == built_shapes(build(config))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_sizes_left_out_of_the_config_take_the_defaults_of_the_type(model_type: str) -> None:
    """head_dim and the tying; without key-value heads every head has its own."""
    config = {"model_type": model_type, "num_key_value_heads": 4} | TINY
    del config["head_dim"]
    assert from_config(config).all_shapes() == built_shapes(build(config))
    old = {"model_type": "llama"} | TINY
    del old["num_key_value_heads"]
    assert from_config(old).all_shapes() == built_shapes(build(old))


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_headers_and_config_give_the_same_structure(model_type: str, tmp_path: Path) -> None:
    """Read both ways from a saved model, and bytes found where the headers say."""
    model = save_tiny(tmp_path, model_type)
    info = arch.read(str(tmp_path), need_weights=True)
    shapes = {name: ref.shape for name, ref in info.tensors.items()}
    assert from_headers(shapes) == from_config(info.config)
    assert shapes == built_shapes(model)
    for name, ref in info.tensors.items():
        raw = ref.file.read_bytes()[ref.start : ref.start + ref.nbytes]
        value = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(ref.shape)
        assert torch.equal(value, model.get_parameter(name)), name


@pytest.mark.parametrize("model_type", ["granite", "olmo2", "stablelm"])
def test_an_unlisted_type_is_understood_from_its_headers(model_type: str, tmp_path: Path) -> None:
    """No row in the table: the layers are found by their repetition; in order of execution."""
    model = save_tiny(tmp_path, model_type)
    info = arch.read(str(tmp_path), need_weights=False)
    assert info.num_layers == 3
    assert set(info.linears) == built_linears(model, info.layers_prefix)
    assert [linear.name for linear in info.linears][::3] == [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
    ]
    assert arch.num_params(info) == sum(value.numel() for value in model.parameters())


def test_a_type_without_files_is_what_transformers_would_save(tmp_path: Path) -> None:
    """By its config.json alone, for a plan and for random weights; one that it lacks is refused."""
    save_tiny(tmp_path, "qwen3_moe", num_experts=4, moe_intermediate_size=16)
    whole = arch.read(str(tmp_path), need_weights=False)
    (tmp_path / "model.safetensors").unlink()
    bare = arch.read(str(tmp_path), need_weights=False)
    assert (bare.kinds, bare.root_params) == (whole.kinds, whole.root_params)
    assert bare.names == whole.tensors.keys() and not bare.tensors
    edit_json(tmp_path / "config.json", model_type="qwen99")
    with pytest.raises(UserError, match=r"qwen99: models are read from their files only .*; add"):
        arch.read(str(tmp_path), need_weights=False)


def test_linears_come_in_the_order_of_execution_whatever_the_files_do(tmp_path: Path) -> None:
    """safetensors sorts by name; the packed bytes must not depend on that."""
    info = arch.read(str(write_model(tmp_path)), need_weights=True)
    ends = [linear.name.split(".")[1] for linear in info.linears]
    assert ends == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    fused = [linear.name.split(".")[1] for linear in arch.read("phi-3-mini", False).linears]
    assert fused == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_sharded_files_read_like_a_single_one(tmp_path: Path) -> None:
    """An index with many files; a copy in another format beside them is not read."""
    save_tiny(tmp_path / "whole", "llama")
    save_tiny(tmp_path / "shards", "llama", max_shard_size="20KB")
    shutil.copy(
        tmp_path / "whole" / "model.safetensors", tmp_path / "shards" / "consolidated.safetensors"
    )
    whole, shards = (arch.read(str(tmp_path / name), True).tensors for name in ("whole", "shards"))
    assert len({ref.file for ref in shards.values()}) > 3
    assert {n: ref.shape for n, ref in shards.items()} == {n: ref.shape for n, ref in whole.items()}
    # A shard is gone: the same model in one file is taken, as transformers does; no other is.
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "shards")
    next(iter(shards.values())).file.unlink()
    found = arch.read(str(tmp_path / "shards"), True).tensors
    assert {ref.file.name for ref in found.values()} == {"model.safetensors"}
    index = tmp_path / "shards" / "model.safetensors.index.json"
    names = dict(list(json.loads(index.read_text())["weight_map"].items())[1:])
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="is named by the index, and absent"):
        arch.read(str(tmp_path / "shards"), True)


def test_copies_in_the_files_are_left_out(tmp_path: Path) -> None:
    """Old Llama files hold rotary tables, some tied models a second head."""
    model = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    from safetensors.torch import save_file

    values = dict(model.state_dict())
    values["lm_head.weight"] = values["lm_head.weight"].clone()
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(values, tmp_path / "model.safetensors")
    info = arch.read(str(tmp_path), need_weights=True)
    assert info.is_tied
    assert info.tensors.keys() == built_shapes(model).keys()
    values["lm_head.weight"][0] += 1  # it is a head of its own, which a plan counts too
    save_file(values, tmp_path / "model.safetensors")
    for need_weights in (True, False):
        assert not arch.read(str(tmp_path), need_weights).is_tied
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert arch.read(str(tmp_path), need_weights=False).is_tied


def test_config_loses_the_keys_that_could_name_code(tmp_path: Path) -> None:
    """auto_map of a type that transformers has is dropped, not run; so are private keys."""
    code = {"AutoConfig": "evil.Config"}
    hub = dict.fromkeys(("attn_implementation", "experts_implementation"), "kernels-community/a")
    write_model(tmp_path, auto_map=code, _attn_implementation_internal="a/b", **hub)
    config = arch.read(str(tmp_path), need_weights=True).config
    assert not [key for key in config if key in ("auto_map", *hub) or key.startswith("_")]


def test_targets_that_match_nothing_are_refused() -> None:
    """The line lists what there is."""
    info = arch.read("phi-3-mini", need_weights=False)
    with pytest.raises(
        UserError, match="0 modules match q_proj; use all, or some of qkv_proj,o_proj"
    ):
        targets.find_targets(info, TrainConfig(lora_target_modules="q_proj,o_proj"))
    with pytest.raises(UserError, match="0 modules match"):
        targets.find_targets(info, TrainConfig(lora_target_modules=","))
    chosen = targets.find_targets(info, TrainConfig(lora_target_modules="down_proj,qkv_proj"))[0]
    assert [row.linear.name for row in chosen] == ["self_attn.qkv_proj", "mlp.down_proj"]


def test_sizes_have_the_names_of_transformers_attribute_maps():
    """XGLM's attention_heads, hunyuan's moe_topk, n_embd of GPT-2; encoders are none of ours."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"xlm"}:
        for ours, theirs in CONFIG_MAPPING[model_type].attribute_map.items():
            if ours in OTHER_NAMES and "encoder" not in theirs:
                assert theirs in OTHER_NAMES[ours], model_type


@pytest.mark.parametrize(
    ("name", "package"),
    [("qwen3.5-27b", "flash-linear-attention"), ("granite-4.0-h-tiny", "mamba-ssm")],
)
def test_kernels_that_recurrent_layers_lack_are_named(name: str, package: str, monkeypatch) -> None:
    info = arch.read(name, need_weights=False)
    assert info.recurrent_note().endswith(f"slower: {package} is missing")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    assert info.recurrent_note() == ""
    assert arch.read("llama-2-7b", need_weights=False).recurrent_note() == ""
