"""Tiny models of real architectures, on disk and as the trainer builds them."""

import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.arch import targets
from fsdp_qlora.data import batches
from fsdp_qlora.distributed.hooks import StopFlag
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import adapters, load, shard, weights
from fsdp_qlora.model.quantize import FORMATS, LayerStore, build_layout, store_linear
from fsdp_qlora.model.skeleton import QuantizedModel

NUM_CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
DEVICE = "cuda" if NUM_CARDS else "cpu"  # where ranks compute
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}

MIXTURES = {  # experts of two types
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}


def require_triton() -> None:
    """Skip the calling test without Triton; fail where REQUIRE_TRITON=1 promises it."""
    if os.environ.get("REQUIRE_TRITON") == "1":
        importlib.import_module("triton")
    pytest.importorskip("triton")


def save_model(directory: Path, model_type: str = "llama", dtype=torch.float32, **changes) -> Path:
    """Write a tiny random model in transformers' format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(model_config, dtype=dtype).save_pretrained(directory)
    return directory


def recorder(out: Path, world, num_steps: int, **info):
    """The record of a run in `out` that has loaded nothing."""
    from fsdp_qlora.planning import run as plans
    from fsdp_qlora.training import memory, metrics

    cfg = config.parse([f"--output_dir={out}"])
    plan = plans.RunPlan(
        cfg, cfg, arch.read("llama-2-7b", need_weights=False), hardware.Machine(())
    )
    tracker = memory.MemoryTracker(plan, world.device)
    with tracker.phase("load"):
        pass
    return metrics.Recorder(tracker, world, num_steps, info)


def lines(out: Path) -> list[dict]:
    """The record of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[dict]:
    """The steps in the record of a run."""
    return [line for line in lines(out) if "event" not in line]


def unsaved() -> SimpleNamespace:
    """What stands for the Checkpointer of a training that saves nothing and hears no signal."""
    never = {"poll": lambda step: (), "should_save": lambda agreed: False}
    return SimpleNamespace(step=0, stop=StopFlag(), finish=lambda step: None, **never)


def held_out(samples, size: int, world: int, rank: int, multiple: int = 8, objective: str = "sft"):
    """A rank's batches of held-out rows."""
    sampler = batches.SamplerConfig(size, 1, world, rank, 0, 1, 0, multiple, objective)
    return list(batches.all_once(samples, sampler))


def shape(path: Path, world: World, *flags: str):
    """Build and shard a model as train.py does; it has no bytes yet.

    Returns (load.Built, info, cfg).
    """
    cfg = config.parse(["--recipe=reference", f"--model_name={path}", "--quant_cache=off", *flags])
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    return load.shape(cfg, info, world), info, cfg


def build(
    path: Path, world: World, *flags: str
) -> tuple[QuantizedModel, arch.ModelInfo, config.TrainConfig]:
    """Build, shard and fill a model as train.py does."""
    built, info, cfg = shape(path, world, *flags)
    return load.fill(built, weights.build(info, cfg), cfg, world).model, info, cfg


def fill_lora(model: QuantizedModel, seed: int = 1) -> list[torch.Tensor]:
    """Set adapters (B too, which starts at zero) to random values; return the whole flat ones."""
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    flats = []
    for block in shard.blocks(model):
        if not block.body.slots:
            continue
        flat = torch.randn(block.body.lora.shape, generator=generator) * 0.05
        start, stop = shard.local_range(block.body.lora)
        shard.set_local(block.body, "lora", flat[start:stop].to(device, copy=True))
        flats.append(flat)
    return flats


def lora_dict(model: QuantizedModel, flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat tensors by peft's names."""
    return dict(adapters.named_pairs(model, flats))


def lora_grads(model: torch.nn.Module) -> list[torch.Tensor]:
    """The whole gradients of the adapters, layer by layer."""
    grads = [block.body.lora.grad for block in shard.blocks(model) if block.body.slots]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def reference_loss(model, batch) -> torch.Tensor:
    """Mean cross entropy over the trained tokens, of a model of transformers, in float32."""
    logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten())


def merged_logits(out: Path, ids: torch.Tensor, *more: str, most: float = 1e-3) -> torch.Tensor:
    """The last logits by transformers of an adapter that is merged into its base, in OUT-merged."""
    from transformers import AutoModelForCausalLM

    from fsdp_qlora.export import commands

    place = Path(f"{out}-merged")
    argv = [f"--adapter={out}", f"--out={place}", "--dtype=fp32", "--device=cpu", *more]
    assert commands.merge(argv) == 0
    evidence = json.loads((place / "merge.json").read_text())["evidence"]
    assert evidence["max_difference"] < most, evidence
    merged = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    with torch.no_grad():
        return merged(ids).logits[0, -1]


def quantized_store(
    format_name: str, weights: list[torch.Tensor]
) -> tuple[LayerStore, torch.Tensor]:
    """The store of a layer of these linears, and its flat bytes, where ranks compute."""
    layout = build_layout([(w.shape[0], w.shape[1]) for w in weights], format_name)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=DEVICE)
    for index, weight in enumerate(weights):
        store_linear(flat, layout, index, FORMATS[format_name].quantize(weight.to(DEVICE)))
    return LayerStore(lambda: flat, layout), flat


def require(format_name: str) -> None:
    """Skip the calling test where the format's library is absent (CI has them all)."""
    if format_name.startswith("hqq"):
        pytest.importorskip("hqq")


def dequantized(weight: torch.Tensor, format_name: str) -> torch.Tensor:
    """A weight quantised and dequantised by the library itself, in float32, where ranks do it."""
    return _round_trip(weight.to(DEVICE), format_name).cpu()


def _round_trip(weight: torch.Tensor, format_name: str) -> torch.Tensor:
    if format_name == "bf16":
        return weight.bfloat16().float()
    if format_name.startswith("hqq"):
        return hqq_round_trip(weight, format_name, torch.float32)
    import bitsandbytes.functional as bnb

    if format_name == "int8":
        packed, row_absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return packed * (row_absmax.unsqueeze(1) * (1 / 127))
    packed, state = bnb.quantize_4bit(
        weight, quant_type=format_name[:3], compress_statistics=format_name.endswith("_dq")
    )
    return bnb.dequantize_4bit(packed, state)


def hqq_round_trip(weight: torch.Tensor, format_name: str, dtype: torch.dtype) -> torch.Tensor:
    """hqq's own quantisation and dequantisation, its meta data in the dtype that we store."""
    from hqq.core.quantize import Quantizer

    found = re.fullmatch(r"hqq(\d)(?:_g(\d+))?(_a0)?", format_name)
    bits, axis = int(found[1]), int(found[3] is None)
    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=int(found[2] or 64), axis=axis, device=weight.device.type
    )
    kept = torch.float32 if bits == 8 else torch.bfloat16
    meta |= {"compute_dtype": dtype} | {name: meta[name].to(kept) for name in ("scale", "zero")}
    return Quantizer.dequantize(packed, meta).to(dtype)


def round_base(model, format_name: str) -> None:
    """Round what is quantised: linears of the layers, and each projection of each expert."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight.data = dequantized(module.weight.data, format_name)
        for name, param in module.named_parameters(recurse=False):
            if param.dim() == 3:
                num_parts = 2 if name == "gate_up_proj" else 1
                parts = [part for expert in param.data for part in expert.chunk(num_parts)]
                rounded = torch.cat([dequantized(part.contiguous(), format_name) for part in parts])
                param.data = rounded.view(param.shape)


def reference_model(path: Path, format_name: str, lora: dict[str, torch.Tensor], cfg):
    """transformers + peft on one process, float32, its base rounded through `dequantized`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    round_base(model, format_name)
    ranks, alphas = (json.loads(text or "{}") for text in (cfg.rank_pattern, cfg.alpha_pattern))
    params = ["experts.gate_up_proj", "experts.down_proj"] if cfg.expert_lora_rank else []
    ranks |= dict.fromkeys(params, cfg.expert_lora_rank)
    alphas |= dict.fromkeys(params, cfg.expert_lora_rank * cfg.lora_alpha / cfg.lora_rank)
    names, layers = cfg.lora_target_modules, targets.layer_numbers(cfg.layers_to_transform)
    lora_config = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if names == "all" else names.split(","),
        exclude_modules=cfg.lora_exclude_modules,
        layers_to_transform=layers or None,
        target_parameters=params or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=cfg.use_rslora,
        use_dora=cfg.train_type.endswith("dora"),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    named = {n.replace("vector.weight", "vector"): p for n, p in named.items()}
    assert named.keys() == lora.keys()
    for name, param in named.items():
        param.data = lora[name].clone()
    return model, named


def keep_as_on_the_hub(directory: Path) -> dict[str, bytes]:
    """Name what was saved as older transformers did; return the files of the tokenizer by name."""
    path = directory / "tokenizer_config.json"
    table = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("backend", "is_local", "local_files_only"):
        table.pop(key, None)
    path.write_text(json.dumps(table))
    files = directory.glob("tokenizer*")
    return {file.name: file.read_bytes() for file in files}


def save_tokenizer(directory: Path, texts: list[str], vocab_size: int = 384) -> None:
    """Train a byte-level BPE on `texts` and write it in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
