"""Every train type trains as its unsharded reference does: gradients, steps, files."""

import itertools
import json
import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fsdp_qlora import arch, config, inference
from fsdp_qlora import run as train_run
from fsdp_qlora.data.batches import collate
from fsdp_qlora.export import commands
from fsdp_qlora.hardware import Device, Machine
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.planning import fit
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.sizes import setting_for
from fsdp_qlora.training import loop, losses, optim
from tests import tiny
from tests.model.test_shard import CHECKPOINTING, PLACES, _train, make_samples, micro_batches
from tests.ranks import run_ranks

LORA = ("--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0")
FULL, PRO = ("--train_type=full",), ("--train_type=bnb_llama_pro",)
SAVED = ("--train_type=qlora", "--modules_to_save=embed_tokens,lm_head")
FP32 = "--precision=fp32"
STRATEGIES = ("full_shard", "ddp")
UNEVEN = ("--layers_to_transform=1", '--rank_pattern={"v_proj": 2, "1.*q_proj": 9}')
UNEVEN += ("--lora_target_modules=q_proj,k_proj,v_proj,up_proj", '--alpha_pattern={"k_proj": 3}')
FILES = {
    "full": ("llama", FULL),
    "full_tied": ("qwen2", (*FULL, "--sharding_strategy=ddp")),
    "blocks": ("deep", PRO),
    "dora": ("llama", ("--train_type=bnb_dora", "--lora_target_modules=q_proj,o_proj,down_proj")),
    "saved": ("llama", SAVED),
    "saved_tied": ("qwen2", SAVED),
}
TYPES = [name for name in config.TRAIN_TYPES if not name.startswith("custom_")]


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.float().cpu().numpy()


def gradients(world, path, flags, accumulation):
    """(values, gradients) of all that is trained, by the names of peft and of the model's files."""
    model, _, _ = tiny.build(path, world, *LORA, *flags)
    params = dict(model.tensors)
    has_lora = any(block.body.slots for block in shard.blocks(model))
    flats = tiny.fill_lora(model) if has_lora else []
    batches = micro_batches(world.rank, world.size, accumulation)
    num_tokens = world.sum(sum(b.num_trained_tokens for b in batches))
    for batch in batches:
        loss = losses.token_loss_sum(model, batch, world.device)
        (loss * (world.size / num_tokens)).backward()
    found = {}
    if has_lora:
        grads = [grad.float().cpu() for grad in tiny.lora_grads(model)]
        found |= {n: t.numpy() for n, t in tiny.lora_dict(model, grads).items()}
        adapters.shift_magnitudes(model, flats, 1)
    for name, (module, attribute) in params.items():
        param = getattr(module, attribute)
        if param.requires_grad:
            found[name] = whole(param.grad)
    return {n: t.numpy() for n, t in tiny.lora_dict(model, flats).items()} if flats else {}, found


def reference(path, flags, values, accumulation):
    """Gradients of transformers and peft on one process, float32, frozen linears quantised."""
    from transformers import AutoModelForCausalLM

    from fsdp_qlora import arch
    from fsdp_qlora.planning.sizes import trained_whole

    cfg = config.parse([f"--model_name={path}", *LORA, *flags])
    info = arch.read(cfg.model_name, need_weights=True)
    if values:
        lora = {name: torch.from_numpy(value) for name, value in values.items()}
        model, named = tiny.reference_model(path, cfg.format_name, lora, cfg)
    else:
        model, named = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), {}
    own = trained_whole(info, cfg)
    layers = tuple(f"model.layers.{i}." for i in own.layers)
    for name, param in model.named_parameters():
        if "lora_" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        param.requires_grad_(name in own.root or name.startswith(layers))
        if param.requires_grad:
            named[name] = param
        elif not values and param.dim() == 2 and "layers." in name:
            param.data = tiny.dequantized(param.data, cfg.format_name)
    tiny.reference_loss(model, collate(make_samples(4 * accumulation))).backward()
    return {name: param.grad.numpy() for name, param in named.items()}


def cosine(a, b):
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


def check(found, wanted, is_exact, case):
    assert found.keys() == wanted.keys(), case
    for name, want in wanted.items():
        if is_exact:
            np.testing.assert_allclose(
                found[name], want, rtol=2e-3, atol=4e-6, err_msg=f"{case} {name}"
            )
        else:
            assert cosine(found[name], want) > 0.98, (case, name)


def _all_gradients(world, cases):
    finalize = FSDPParamGroup.finalize_backward

    def all_read(group):
        assert group._all_gather_result is None, f"{group._module_fqn}: gathered for nothing"
        finalize(group)

    with patch.object(FSDPParamGroup, "finalize_backward", all_read):
        return [gradients(world, *case) for _, *case in cases]


def test_every_type_has_the_gradients_of_one_process(tmp_path):
    """{train type} x {full_shard, ddp} x {fp32, bf16}; of whole layers, also x {checkpointing}.

    A backward pass reads all that FSDP gathers in it: what it does not wait for may be overwritten
    on a card while it arrives. Values in bf16 are compared with those of fp32.
    """
    tiny.require("hqq4")
    tied = {"tie_word_embeddings": True, "num_hidden_layers": 2}
    plain = tiny.save_model(tmp_path / "model", num_hidden_layers=2)
    qwen = tiny.save_model(tmp_path / "qwen", "qwen2", **tied)
    deep = disturbed(expand(plain, tmp_path / "deep", 0.5))
    cases = []
    for name, strategy, precision in itertools.product(TYPES, STRATEGIES, ("fp32", "bf16")):
        path = deep if "pro" in name else plain
        rest = (f"--sharding_strategy={strategy}", f"--precision={precision}")
        cases.append(((f"--train_type={name}",), path, (f"--train_type={name}", *rest), 1))
    for kind, strategy in itertools.product(("qlora", "bnb_dora"), STRATEGIES):
        flags = (f"--train_type={kind}", f"--sharding_strategy={strategy}", FP32, *UNEVEN)
        cases.append((flags[:1] + UNEVEN, plain, flags, 1))
    for level, flags in CHECKPOINTING.items():
        if level != "non_reentrant":
            cases.append((FULL, qwen, (*FULL, FP32, *flags), 2))
            for place in ("streamed", "sharded"):
                cases.append((PRO, deep, (*PRO, FP32, *PLACES[place], *flags), 2))
    cases.append((PRO, deep, (*PRO, FP32, *PLACES["sharded_resident"]), 2))
    cases += [(SAVED, path, (*SAVED, FP32), 2) for path in (plain, qwen)]
    first, second = run_ranks(_all_gradients, 2, cases)
    wanted = {}
    for number, (kind, path, flags, accumulation) in enumerate(cases):
        key = (kind, path, accumulation)
        if key not in wanted:
            wanted[key] = reference(path, (*kind, FP32), first[number][0], accumulation)
        for _, found in (first[number], second[number]):
            check(found, wanted[key], "--precision=bf16" not in flags, (path.name, *flags))


def disturbed(path):
    """With numbers for the zeros of the new layers, which else let no gradient pass."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in tensors.values():
        if not tensor.any():
            tensor.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def expand(path, out, rate):
    argv = [f"--model_name={path}", f"--out={out}", f"--expansion_rate={rate}"]
    assert commands.expand(argv) == 0
    return out


def _trained(world, places, out):
    """Logits of the trained model, after it has written its files."""
    found = {}
    for name, (place, flags) in FILES.items():
        losses, _, _, last = _train(world, places[place], out / name, 3, flags)
        assert losses[-1] < losses[0], name
        found[name] = last
    return found


def test_every_type_writes_files_that_give_the_logits_of_the_trained_model(tmp_path, monkeypatch):
    """Reference: transformers and peft on what was written; all that is no model, merged too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llama = tiny.save_model(tmp_path / "llama", num_hidden_layers=2)
    tied = {"tie_word_embeddings": True, "num_hidden_layers": 2}
    places = {"llama": llama, "qwen2": tiny.save_model(tmp_path / "qwen2", "qwen2", **tied)}
    places["deep"] = expand(llama, tmp_path / "deep", 0.5)
    found = run_ranks(_trained, 2, places, tmp_path)[0]
    ids = collate(make_samples(4)).input_ids[:1]

    def check_logits(model, name):
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1].float()
        np.testing.assert_allclose(logits, found[name], rtol=1e-4, atol=2e-4, err_msg=name)

    def quantised(name):
        model = AutoModelForCausalLM.from_pretrained(places[FILES[name][0]], dtype=torch.float32)
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers." in path:
                module.weight.data = tiny.dequantized(module.weight.data, "nf4_dq")
        return model

    monkeypatch.setattr(os, "environ", dict(os.environ))
    opened = inference.open_run(
        tmp_path / "blocks", inference.config_of(tmp_path / "blocks", ["--precision=fp32"])
    )
    opened.load_adapter()
    with torch.no_grad():
        last = opened.model(ids)[0, -1].float()
    opened.close()
    np.testing.assert_allclose(last, found["blocks"], rtol=1e-4, atol=2e-4)
    for name in ("full", "full_tied"):
        check_logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), name)
    for name in ("dora", "saved", "saved_tied"):
        check_logits(PeftModel.from_pretrained(quantised(name), tmp_path / name), name)
    for name in ("blocks", "dora", "saved", "saved_tied"):
        merged = tmp_path / f"{name}-merged"
        argv = [f"--adapter={tmp_path / name}", f"--out={merged}", "--dtype=fp32"]
        assert commands.merge([*argv, "--evidence_rows=2"]) == 0
        check_logits(AutoModelForCausalLM.from_pretrained(merged), name)
        facts = json.loads((merged / "merge.json").read_text())["evidence"]
        assert facts["max_difference"] < 1e-3, (name, facts)


def _two_rates(world, path):
    """Whole adapters before and after a step."""
    flags = ("--precision=fp32", "--loraplus_ratio=16", "--lr=0.01", "--train_type=bnb_dora")
    model, _, cfg = tiny.build(path, world, *LORA, *flags)
    flats = tiny.fill_lora(model)
    trained = optim.prepare(model, cfg, 1, world)
    loop.train_step(trained, micro_batches(world.rank, world.size, 1))
    return [
        {name: tensor.numpy() for name, tensor in tiny.lora_dict(model, whole).items()}
        for whole in (flats, shard.whole_lora(model))
    ]


def test_b_matrices_have_a_learning_rate_of_their_own(tmp_path):
    """Reference: AdamW's first step is lr * (sign of the gradient + weight decay * value)."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=2)
    start, first = run_ranks(_two_rates, 2, path)[0]
    decay = 0.1  # of the reference, which tiny.shape takes
    for name, values in start.items():
        lr = 0.01 * (16 if "lora_B" in name else 1)
        moved = np.abs(first[name] - values * (1 - lr * decay))
        share = np.isclose(moved, lr, rtol=1e-2).mean()
        assert share > 0.95, (name, share)


def _commands(world, lines):
    """Run each command line as train.py does on a rank; GiB (predicted, measured) by row."""
    found = {}
    for name, argv in lines.items():
        cfg = config.parse(argv)
        info = arch.read(cfg.model_name, need_weights=True)
        cfg.resolved_output_dir.mkdir(parents=True, exist_ok=True)
        machine = Machine((), None, world.size)
        plan = plans.make(info, cfg, config.given(argv), machine)
        train_run.run(plan, world, config.given(argv))
        steps = tiny.steps(cfg.resolved_output_dir)
        measured = steps[-1]["ranks"][world.rank]["device_rows"]
        predicted = plan.to_dict()["device"]["optimizer"]
        found[name] = len(steps), predicted, measured
    return found


def test_every_type_runs_two_steps_by_the_command_of_the_reference(tmp_path):
    """AnswerDotAI/fsdp_qlora, README, on a tiny model; the plan knows what each keeps on a rank."""
    tiny.require("hqq4")
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(160)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.save_model(tmp_path / "model", num_hidden_layers=2, vocab_size=384)
    tiny.save_tokenizer(model, [" ".join(row.values()) for row in rows])
    deep = expand(model, tmp_path / "model_blk_exp-2-3", 0.5)
    common = (
        "--world_size 2 --master_port 12356 --gradient_accumulation_steps 2 --batch_size 8 "
        "--context_length 512 --precision bf16 --use_gradient_checkpointing true "
        "--use_cpu_offload false --use_activation_cpu_offload false --log_to stdout --max_steps 2 "
        f"--model_name {model} --dataset {data} --quant_cache off --lora_rank 8 --sample_tokens 2"
    ).split()
    more = {"qlora": ["--reentrant_checkpointing", "true"]}
    for name in ("bnb_llama_pro", "hqq_llama_pro"):
        more[name] = ["--llama_pro_path", str(deep)]
    results = []
    for start in range(0, len(TYPES), 4):
        lines = {
            name: [
                *common,
                "--train_type",
                name,
                *more.get(name, ()),
                f"--output_dir={tmp_path / name}",
            ]
            for name in TYPES[start : start + 4]
        }
        results += run_ranks(_commands, 2, lines)
    for name, (num_steps, predicted, measured) in (item for r in results for item in r.items()):
        assert num_steps == 2, name
        for row in ("adapters", "optimizer state", "unquantised weights"):
            assert measured.get(row, 0) == pytest.approx(predicted.get(row, 0), 0.03, 1e-6), (
                name,
                row,
            )
    files = {path.parent.name for path in tmp_path.glob("*/*.safetensors")}
    assert files >= {*TYPES}


def test_a_small_model_trained_in_full_fits_a_card_of_8_gb_by_plan():
    """Qwen2.5-0.5B with 8-bit AdamW; with torch's it does not."""
    fits = {}
    for optimizer in ("adamw_8bit", "adamw"):
        cfg = config.parse(
            ["--model_name=qwen2.5-0.5b", "--train_type=full", f"--optimizer={optimizer}"]
        )
        info = arch.read(cfg.model_name, need_weights=False)
        machine = Machine((Device("8 GB", 8e9 / 2**30, 50.0, 400.0, 20.0),), 64.0)
        found = fit.evaluate(info, cfg, setting_for(info, cfg, machine), machine)
        fits[optimizer] = found.fits
        assert found.device.gib("load", "packed weights") == 0
        weights = found.device.gib("forward", "adapters") * 2**30
        assert weights == pytest.approx(4 * 494_032_768)
    assert fits == {"adamw_8bit": True, "adamw": False}
