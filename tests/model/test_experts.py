"""Experts over the 4-bit store: the kernel, adapters, files, against own arithmetic and peft."""

from unittest.mock import patch

import pytest
import torch

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.arch import targets
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.export import model_files, serving
from fsdp_qlora.model import adapters, experts, load, matmul
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.sizes import count_trained
from tests import tiny, tiny_models

ENDS = {"spread": (True, False), "joined": (False, True), "rows": (False, False)}
NUM, TOP, RANK, TOKENS = 6, 2, 3, 90


def matrices_of(shapes, format_name="nf4_dq") -> tuple[experts.ExpertMatrices, list]:
    """Matrices of NUM experts, each of several parts, in a store; and what they are there."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes for _ in range(NUM)]
    store, _ = tiny.quantized_store(format_name, weights)
    store.is_mixed = True
    parts = [tuple(range(i * NUM, i * NUM + NUM)) for i in range(len(shapes))]
    rounded = [tiny.dequantized(weight, format_name) for weight in weights]
    whole = [torch.cat([rounded[i] for i in row]) for row in zip(*parts, strict=True)]
    return experts.ExpertMatrices(store, parts, "mlp.experts"), whole


def by_hand(given, whole, routing, ends, bias, own):
    """Each row by the matrix of its expert; B is rank by rank."""
    x, a_RI, b_OR = given
    rows = x[routing.tokens] if ends[0] else x
    b_ORE = b_OR.view(b_OR.shape[0], RANK, NUM)
    pairs = [b_ORE[..., i] @ a_RI[i * RANK : i * RANK + RANK] for i in range(NUM)]
    matrix = [whole[int(routing.places[i])] + 0.5 * pairs[i] for i in range(NUM)]
    made = torch.stack([matrix[i] @ row + bias[i] for i, row in zip(own, rows, strict=True)])
    if not ends[1]:
        return made
    return torch.zeros(TOKENS, made.shape[1]).index_add(0, routing.tokens, made)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("shapes", [[(64, 256), (64, 256)], [(40, 72)]])
def test_all_paths_are_own_arithmetic_in_groups_of_experts(monkeypatch, shapes, name):
    """Sorted on the device, the kernel (by Triton's interpreter) and the loop; LoRA in any order.

    In NF4 with double quantization: matrices side by side in the store, and with gaps.
    """
    (matrices, whole), ends = matrices_of(shapes), ENDS[name]
    out, inner = matrices.out_features, matrices.in_features
    monkeypatch.setattr(experts, "WHOLE_LAYER_BYTES", 4 * 4 * out * inner)
    assert [row[:2] for row in matrices.weights(torch.float32)] == [(0, 3), (3, 6)]
    numbers = torch.tensor([0, 5, 1, 2, 4, 3])
    chosen = torch.stack([torch.randperm(NUM)[:TOP] for _ in range(TOKENS)])
    chosen[:40, 0] = 5  # more than a tile of one expert, and one that nobody chooses
    chosen[chosen == 2] = 5
    routing = experts.Routing(chosen, numbers, numbers.argsort())
    bias, pair = torch.randn(NUM, out), [torch.randn(RANK * NUM, inner), torch.randn(out, 3 * NUM)]
    x = torch.randn(TOKENS if ends[0] else TOKENS * TOP, inner)
    wanted = [t.clone().requires_grad_() for t in (x, *pair)]
    made = by_hand(wanted, whole, routing, ends, bias, chosen.flatten()[routing.order])
    grad = torch.randn_like(made)
    made.backward(grad)
    kernels = matmul.triton_kernels()
    call = experts.GroupedCall(matrices, routing, ends, 0.5)
    for path in [None, kernels] if kernels else [None]:
        given = [t.clone().requires_grad_() for t in (x, *pair)]
        with patch.object(experts, "triton_kernels", lambda is_cuda, path=path: path):
            found = experts.GroupedMatmul.apply(given[0], call, bias, *given[1:])
            found.backward(grad)
        assert torch.allclose(found, made, 1e-4, 1e-4), path
        for part, other in zip(given, wanted, strict=True):
            assert torch.allclose(part.grad, other.grad, 1e-4, 1e-4), path


FLAGS = ("--train_type=lora", "--precision=fp32", "--lora_rank=4", "--lora_alpha=6")
FLAGS += ("--quant_cache=off", "--expert_lora_rank", "--lora_target_modules=q_proj,o_proj")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "glm4_moe"])
def test_files_have_equal_logits_in_peft_and_when_they_are_merged(tmp_path, world, name):
    """Both forms; read back as an adapter to go on from; of another base they are refused."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out, ids = tmp_path / "model", tmp_path / "adapter", torch.arange(40)[None]
    tiny_models.save(base, name)
    has_names = name != "gpt_oss"
    flags = (*FLAGS, *["--expert_names=each"] * has_names, f"--output_dir={out}")
    cfg = config.parse([f"--model_name={base}", *flags])
    info = arch.read(str(base), need_weights=True)
    model = load.build(cfg, info, world).model.eval()
    tiny.fill_lora(model)
    out.mkdir()
    model_files.save(model, info, cfg, None, is_writer=True)
    with torch.no_grad():
        wanted = model(ids)[0, -1]
        for place in (out, out / adapter_files.EACH)[: 1 + has_names]:
            own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            own.set_experts_implementation("eager")
            found = PeftModel.from_pretrained(own, place).eval()(ids).logits[0, -1]
            assert torch.allclose(found, wanted, 1e-4, 1e-4), place
            found = tiny.merged_logits(place, ids)
            assert torch.allclose(found, wanted, 1e-4, 1e-4), place
    model.train()
    model(ids)
    top = tiny_models.tiny_config(name).num_experts_per_tok
    assert all(own.loads.sum() == len(ids[0]) * top for own in model.mixtures)
    assert experts.take_load(model.mixtures)["expert_load"] > 1
    assert not any(own.loads.any() for own in model.mixtures)
    vllm = next(line for line in serving.next_steps(out, cfg) if line.startswith("vllm"))
    assert ("per_expert" in vllm) == has_names
    assert ("merged" in vllm) != has_names
    given = [f"--model_name={base}", f"--init_adapter={out}", "--precision=fp32"]
    again = config.parse([*adapter_files.expand_init([*given, "--train_type=lora"]), *FLAGS[4:5]])
    assert (again.expert_lora_rank, again.lora_alpha) == (2, 6)
    adapter_files.check_init(again, info, print)
    opened = adapter_files.read(out)
    assert "rank 2 on the experts of" in str(opened)
    fresh = load.build(again, info, world).model
    scales = {key: pair.scale for key, pair in (opened.pairs | opened.experts).items()}
    for given_scales in (None, scales):
        file = out / adapter_files.WEIGHTS_NAME
        adapters.load(fresh, file, given_scales)
        with torch.no_grad():
            assert torch.equal(fresh.eval()(ids)[0, -1], wanted)
    other = tiny.save_model(tmp_path / "other")
    with pytest.raises(UserError, match="no such experts"):
        adapter_files.check(opened, arch.read(str(other), need_weights=True))


@pytest.mark.parametrize(
    ("shape", "flags", "match"),
    [
        ("qwen3-30b-a3b", ["--lora_dropout=0.1"], "--lora_dropout 0.1 with --expert_lora_rank"),
        ("qwen3-30b-a3b", ["--train_type=bnb_dora"], "peft has no such adapter on experts"),
        ("llama-2-7b", [], "--expert_lora_rank 16: there are no experts"),
        ("gpt-oss-20b", ["--expert_names=each"], "has no names for one expert"),
    ],
)
def test_what_cannot_be_an_adapter_of_experts_is_refused_before_anything_is_read(
    shape, flags, match
):
    with pytest.raises(UserError, match=match):
        cfg = config.parse([f"--model_name={shape}", "--expert_lora_rank", *flags])
        targets.find_targets(arch.read(shape, need_weights=False), cfg)


def test_the_plan_counts_adapters_of_experts_as_peft_has_them():
    """Qwen3-30B-A3B: 48 layers of 128 experts, 768 wide, 8 a token; A is shared by gate and up."""
    info = arch.read("qwen3-30b-a3b", need_weights=False)
    flags = ["--model_name=qwen3-30b-a3b", "--lora_rank=32", "--expert_lora_rank"]
    cfg = config.parse(flags)
    frozen = config.parse(flags[:2])
    of_one = 4 * (2048 + 2 * 768) + 4 * (768 + 2048)
    more = count_trained(info, cfg).total - count_trained(info, frozen).total
    assert more == 48 * 128 * of_one == 157_286_400
    plan = plans.RunPlan(frozen, frozen, info, hardware.Machine(()))
    assert "frozen; --expert_lora_rank 4 trains them: 157,286,400 par" in " ".join(plan.lines)
