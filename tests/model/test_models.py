"""Models of experts, and heads of other scales: what is quantized, what is refused."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora import arch, config
from fsdp_qlora.arch import info as shapes
from fsdp_qlora.arch import targets
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.experts import QuantizedExperts, replace_experts
from tests import tiny, tiny_models
from tests.model_files import edit_json


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Directory of models of experts, by type."""
    place = tmp_path_factory.mktemp("models")
    shared = {**tiny.MIXTURES["qwen3_moe"], "shared_expert_intermediate_size": 64}
    for name, sizes in {**tiny.MIXTURES, "qwen2_moe": shared}.items():
        tiny.save_model(place / name, name, num_hidden_layers=2, **sizes)
    return place


@pytest.mark.parametrize("name", [*tiny.MIXTURES, "qwen2_moe"])
def test_experts_are_packed_and_what_is_not_is_listed(place: Path, name: str):
    """Every matrix of the files is a packed linear, or stands in the list with its size."""
    info = arch.read(str(place / name), need_weights=True)
    packed = {
        f"{info.layers_prefix}.{layer}.{linear.name}.weight"
        for layer in range(info.num_layers)
        for linear in info.linears
    }
    kept = {key for key, ref in info.tensors.items() if len(ref.shape) > 1 and key not in packed}
    tensors = build_one(info).tensors
    assert kept == {n for n, (m, a) in tensors.items() if getattr(m, a).dim() > 1}
    assert sum(linear.expert is not None for linear in info.linears) == 4 * 3
    listed = arch.unquantized(info)
    assert sum(listed.values()) == sum(
        ref.shape[0] * ref.shape[1] for key, ref in info.tensors.items() if key in kept
    )
    assert {key.replace(".*.", ".1.") for key in listed} <= kept and len(listed) == 3
    assert any(key.endswith(".gate.weight") for key in listed)
    with pytest.raises(UserError, match="0 modules match"):
        names = "w1,up_proj,gate" if name != "qwen2_moe" else "w1,gate"
        targets.find_targets(info, config.TrainConfig(lora_target_modules=names))


def test_experts_that_compute_otherwise_are_refused(place: Path, tmp_path: Path):
    """Not left in 16 bit, not computed wrongly: one line."""

    class Clamped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 2))

        def forward(self, x):
            return x.clamp(max=7)

    layer = torch.nn.ModuleDict({"experts": Clamped()})
    with pytest.raises(UserError, match=r"weight of experts \(Clamped\) in a layer: is no matrix"):
        replace_experts(layer, (), lambda index, dtype: torch.zeros(0))
    text = json.loads((place / "mixtral" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"num_local_experts": 2}))
    (tmp_path / "model.safetensors").symlink_to(place / "mixtral" / "model.safetensors")
    with pytest.raises(UserError, match=r"2 of \(192, 128\) in config"):
        build_one(arch.read(str(tmp_path), need_weights=True))


def test_experts_are_read_from_the_store_whatever_liger_has_bound(tmp_path, monkeypatch):
    """It binds a forward to a mixture's experts, and stops at a layer that has none.

    And it puts classes of its own into transformers, which the next model must not be built of: its
    MLP has no biases.
    """
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    from fsdp_qlora.model import skeleton

    seen = []

    def bind(model, **kernels):
        seen.append({word for word, is_on in kernels.items() if not is_on})
        modeling_qwen3_moe.Qwen3MoeExperts = torch.nn.Identity
        modeling_qwen3_moe.Qwen3MoeMLP = torch.nn.Identity
        for layer in model.model.layers[1:]:
            layer.mlp.experts.forward = None
        model.model.layers[0].mlp.experts.forward = None

    def bind_half(model, **kernels):
        seen.append({word for word, is_on in kernels.items() if not is_on})
        raise ImportError  # as 0.8.5 does for qwen3_5_moe

    fake = SimpleNamespace(_apply_liger_kernel_to_instance=bind, __spec__=object())
    fake.LigerFusedGateUpSiLUMulFunction = SimpleNamespace(apply=lambda both, in_place: "fused")
    for name in ("", ".transformers", ".ops", ".ops.swiglu"):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", fake)
    usual = skeleton.choose_kernels

    def choose(*args):
        return dataclasses.replace(usual(*args), use_liger=True)

    monkeypatch.setattr(skeleton, "choose_kernels", choose)
    tiny_models.save(tmp_path / "model", "qwen3_moe")  # its first layer is dense
    for _ in range(2):
        built = build_one(arch.read(str(tmp_path / "model"), need_weights=True))
        mixtures = [m for m in built.modules() if isinstance(m, QuantizedExperts)]
        assert mixtures and not any("forward" in vars(mixture) for mixture in mixtures)
        assert {mixture._apply_gate(None) for mixture in mixtures} == {"fused"}
    edit_json(tmp_path / "model" / "config.json", hidden_act="relu")  # its kernels compute SiLU
    built = build_one(arch.read(str(tmp_path / "model"), need_weights=True))
    assert not any("_apply_gate" in vars(module) for module in built.modules())
    assert seen[-1] - seen[0] == {"swiglu"} and "geglu" in seen[0]
    tiny_models.save(tmp_path / "other", "falcon_h1")  # the bias of its MLP would not be scaled
    fake._apply_liger_kernel_to_instance = bind_half
    build_one(arch.read(str(tmp_path / "other"), need_weights=True))
    assert seen[-1] - seen[0] == {"swiglu"}


def test_the_scale_of_a_head_is_measured_and_another_head_is_refused():
    """Granite divides its logits: trained as if it did not, it would learn wrongly."""
    from transformers import AutoConfig

    def info_of(model_type: str, **values) -> arch.ModelInfo:
        sizes = AutoConfig.for_model(model_type, **{**tiny.SIZES, **values}).to_dict()
        return dataclasses.replace(info, config=sizes, layers_prefix="model.layers")

    kinds = shapes.from_config({"model_type": "llama", **tiny.SIZES}).kinds({})
    layers = {"kinds": kinds, "num_layers": len(kinds[0].layers)}
    info = dataclasses.replace(arch.read("llama-2-7b", need_weights=False), **layers)
    assert build_one(info_of("granite", logits_scaling=8.0)).head.scale == 0.125
    with pytest.raises(UserError, match="a head of more than matrix"):
        build_one(info_of("xlstm", num_blocks=2))


def build_one(info: arch.ModelInfo):
    from fsdp_qlora.model import skeleton

    cfg = config.parse(["--model_name=llama-2-7b", "--attn=sdpa", "--precision=fp32"])
    return skeleton.build(info, cfg, torch.device("cpu"))
