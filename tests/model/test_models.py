"""Model types beside Llama: gradients, adapters and merged weights equal transformers and peft."""

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
from fsdp_qlora.data.batches import collate
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import model_files as export
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.model.experts import QuantizedExperts, replace_experts
from fsdp_qlora.training import loop
from tests import tiny, tiny_models
from tests.model.test_shard import make_samples, micro_batches
from tests.ranks import run_ranks

FLAGS = ("--precision=fp32", "--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MODELS = {
    "mistral": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**MOE, "head_dim": 32},
    "gpt_neox": {},
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# What "all" means to us; peft's own all-linear reaches into the experts of some mixtures.
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
SHARED = ",shared_expert.gate_proj,shared_expert.up_proj,shared_expert.down_proj,shared_expert_gate"
TARGETS = {"mixtral": ATTENTION, "qwen3_moe": ATTENTION, "qwen2_moe": ATTENTION + SHARED}
ADAPTED = ("mixtral", "qwen3_moe")  # whose experts have adapters too
MERGED = ("phi3", "mixtral", "gpt_neox")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, dict[str, tuple]]:
    """Directory of models (NAME) and adapters (NAME-adapter), and what both ranks have computed."""
    place = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        tiny.save_model(place / name, name, num_hidden_layers=2, **sizes)
    results = run_ranks(see_all, 2, place)
    return place, results[0]


def see_all(world, place: Path) -> dict[str, tuple]:
    return {name: see(world, place / name, place / f"{name}-adapter") for name in MODELS}


def flags_of(name: str) -> tuple[str, ...]:
    return (*FLAGS, *["--expert_lora_rank=2"] * (name in ADAPTED))


def see(world, path: Path, out: Path) -> tuple:
    """Adapter values, their gradients, loss, logits of a row, and the matrices left in 16 bit."""
    model, info, cfg = tiny.build(
        path, world, *flags_of(path.name), f"--output_dir={out}", "--selective_layers=1"
    )
    flats = tiny.fill_lora(model)
    (batch,) = micro_batches(world.rank, world.size, 1)
    num_tokens = world.sum(batch.num_trained_tokens)
    loss = loop.token_loss_sum(model, batch, world.device) * (world.size / num_tokens)
    loss.backward()
    grads = [block.body.lora.grad for block in shard.blocks(model)]
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    named = [dict(adapters.named_pairs(model, f, info.layers_prefix)) for f in (flats, grads)]
    matrices = {n for n, (m, a) in model.tensors.items() if getattr(m, a).dim() > 1}
    out.mkdir(exist_ok=True)
    export.save(model, info, cfg, None, is_writer=world.rank == 0)
    model.eval()
    with torch.no_grad():
        last = model(torch.arange(40, device=world.device)[None])[0, -1].float()
    values, gradients = ({n: t.cpu().numpy() for n, t in part.items()} for part in named)
    total = world.sum(loss.item()) / world.size
    return values, gradients, total, last.cpu().numpy(), matrices


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_logits_equal_peft_on_one_process(seen, name: str):
    """Reference: transformers + peft, unsharded; and what peft makes of the saved adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place, results = seen
    values, gradients, loss, last, _ = results[name]
    targets = f"--lora_target_modules={TARGETS.get(name, 'all')}"
    cfg = config.parse([f"--model_name={place / name}", targets, *flags_of(name)])
    lora = {key: torch.from_numpy(value) for key, value in values.items()}
    model, named = tiny.reference_model(place / name, "nf4_dq", lora, cfg)
    batch = collate(make_samples(4))
    logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1).float()
    wanted = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten())
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    for key, param in named.items():
        torch.testing.assert_close(
            torch.from_numpy(gradients[key]), param.grad, rtol=2e-3, atol=4e-6, msg=key
        )
    base = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)
    tiny.round_base(base, "nf4_dq")
    model = PeftModel.from_pretrained(base, place / f"{name}-adapter").eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(40)[None]).logits[0, -1]
    torch.testing.assert_close(torch.from_numpy(last), found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_has_the_logits_of_the_trained_one(seen, name: str):
    (place, results), ids = seen, torch.arange(40)[None]
    base = f"--model_name={place / name}"
    last = tiny.merged_logits(place / f"{name}-adapter", ids, base, most=1e-4)
    torch.testing.assert_close(torch.from_numpy(results[name][3]), last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_packed_and_what_is_not_is_listed(seen, name: str):
    """Every matrix of the files is a packed linear, or stands in the list with its size."""
    place, results = seen
    info = arch.read(str(place / name), need_weights=True)
    packed = {
        f"{info.layers_prefix}.{layer}.{linear.name}.weight"
        for layer in range(info.num_layers)
        for linear in info.linears
    }
    kept = {key for key, ref in info.tensors.items() if len(ref.shape) > 1 and key not in packed}
    assert kept == results[name][4]
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


def test_experts_that_compute_otherwise_are_refused(seen, tmp_path: Path):
    """Not left in 16 bit, not computed wrongly: one line."""

    class Clamped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 2))

        def forward(self, x):
            return x.clamp(max=7)

    layer = torch.nn.ModuleDict({"experts": Clamped()})
    with pytest.raises(UserError, match=r"3-D weights of experts \(Clamped\): is not computed"):
        replace_experts(layer, (), lambda index, dtype: torch.zeros(0))
    text = json.loads((seen[0] / "mixtral" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"num_local_experts": 2}))
    (tmp_path / "model.safetensors").symlink_to(seen[0] / "mixtral" / "model.safetensors")
    with pytest.raises(UserError, match=r"2 of \(192, 128\) in config"):
        build_one(arch.read(str(tmp_path), need_weights=True))


def test_experts_are_read_from_the_store_whatever_liger_has_bound(tmp_path, monkeypatch):
    """It binds a forward to a mixture's experts, and stops at a layer that has none.

    And it puts a class of its own into transformers, which the next model must not be built of.
    """
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    from fsdp_qlora.model import skeleton

    def bind(model, **kernels):
        modeling_qwen3_moe.Qwen3MoeExperts = torch.nn.Identity
        for layer in model.model.layers[1:]:
            layer.mlp.experts.forward = None
        model.model.layers[0].mlp.experts.forward = None

    fake = SimpleNamespace(_apply_liger_kernel_to_instance=bind, __spec__=object())
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, fake)
    usual = skeleton.choose_kernels

    def choose(*args):
        return dataclasses.replace(usual(*args), use_liger=True)

    monkeypatch.setattr(skeleton, "choose_kernels", choose)
    tiny_models.save(tmp_path / "model", "qwen3_moe")  # its first layer is dense
    for _ in range(2):
        built = build_one(arch.read(str(tmp_path / "model"), need_weights=True))
        mixtures = [m for m in built.modules() if isinstance(m, QuantizedExperts)]
        assert mixtures and not any("forward" in vars(mixture) for mixture in mixtures)


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
    with pytest.raises(UserError, match="a head that is a matrix"):
        build_one(info_of("xlstm", num_blocks=2))


def build_one(info: arch.ModelInfo):
    from fsdp_qlora.model import skeleton

    cfg = config.parse(["--model_name=llama-2-7b", "--attn=sdpa", "--precision=fp32"])
    return skeleton.build(info, cfg, torch.device("cpu"))
