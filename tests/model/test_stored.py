"""Models that lie on disk in MXFP4, FP8 or compressed-tensors: read, trained over and merged.

Reference: what transformers makes of the same files, and own arithmetic.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fsdp_qlora import arch, config
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import model_files
from fsdp_qlora.model import load, shard, weights
from fsdp_qlora.planning.sizes import Sizes, quantized_bytes
from tests import tiny, tiny_models
from tests.model.test_model_sweep import judge, share
from tests.model_files import edit_json

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


def save_gpt_oss(path: Path) -> Path:
    """Write a tiny gpt-oss whose experts are random bytes of MXFP4."""
    tiny_models.save(path, "gpt_oss")
    tensors, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num, num_in, num_out = tensors.pop(name).shape
        for part, shape, low, high in (
            ("blocks", (num_in // 32, 16), 0, 256),
            ("scales", (num_in // 32,), 121, 125),
        ):
            raw = torch.randint(low, high, (num, num_out, *shape), generator=generator)
            tensors[f"{name}_{part}"] = raw.to(torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", quantization_config=MXFP4)
    return path


def test_experts_in_mxfp4_are_trained_over_as_transformers_reads_them(tmp_path, world):
    """Loss, logits and gradients at all levels; the bytes of the file, in the cache too."""
    path = save_gpt_oss(tmp_path / "model")
    found = judge(path, world)
    assert found.verdict == "equal", found
    flags = [f"--model_name={path}", "--train_type=qlora", f"--quant_cache={tmp_path / 'cache'}"]
    cfg, stored = config.parse(flags), load_file(path / "model.safetensors")
    info = arch.read(str(path), need_weights=True)
    own = [linear.format for linear in info.linears]
    for is_cached in (False, True):
        built = load.build(cfg, info, world)
        assert built.cache.is_complete and ("cache" in str(built.loaded)) == is_cached
        block, layout = next(shard.blocks(built.model)), built.model.layouts[0]
        flat = shard.gathered(block)
        for index, linear in enumerate(info.linears):
            assert layout.formats[index] == ("mxfp4" if linear.expert else "nf4_dq")
            if linear.expert:
                stem = f"{info.layers_prefix}.0.{linear.expert[0]}.experts.{linear.last_name}"
                raw = stored[f"{stem}_blocks"][linear.expert[1]]
                assert torch.equal(flat[slice(*layout.weights[index])], raw.flatten())
        shard.release(block)
    shapes = [linear.shape for linear in info.linears]
    assert sum(quantized_bytes(shapes, "nf4_dq", own)) == layout.nbytes
    assert Sizes(info, cfg).layer_bytes == layout.nbytes
    (path / "model.safetensors").unlink()
    bare = arch.read(str(path), need_weights=False)
    assert bare.kinds == info.kinds  # for a plan, and random weights
    random = load.build(dataclasses.replace(cfg, weights="random"), bare, world).model
    assert random.eval()(torch.arange(9)[None]).isfinite().all()


@pytest.mark.parametrize("form", ["kept", "16bit"])
def test_a_merged_model_has_its_experts_in_mxfp4_or_in_16_bit(tmp_path, world, form):
    """As they were, byte by byte, unless asked otherwise."""
    base, out, ids = save_gpt_oss(tmp_path / "base"), tmp_path / "adapter", torch.arange(40)[None]
    flags = ["--train_type=qlora", "--precision=fp32", f"--output_dir={out}", "--attn=eager"]
    flags += ["--lora_target_modules=q_proj,o_proj"]
    cfg = config.parse([f"--model_name={base}", "--quant_cache=off", *flags])
    info = arch.read(str(base), need_weights=True)
    model = load.build(cfg, info, world).model
    tiny.fill_lora(model)
    out.mkdir()
    model_files.save(model, info, cfg, None, is_writer=True)
    found, places = tiny.merged_logits(out, ids, f"--mxfp4={form}"), (base, Path(f"{out}-merged"))
    before, after = (load_file(place / "model.safetensors") for place in places)
    kept = {n for n in before if n.endswith(("_blocks", "_scales"))}
    assert kept & after.keys() == (kept if form == "kept" else set())
    assert all(torch.equal(before[name], after[name]) for name in kept & after.keys())
    with torch.no_grad():
        assert share(model.eval()(ids)[0, -1], found) < 1e-4


def fp8(weight: torch.Tensor, block: tuple[int, int], scale_name: str) -> tuple[dict, torch.Tensor]:
    """A weight in FP8 by blocks, the last ones cut off; and what it stands for."""
    rows, cols = weight.shape
    padded = torch.zeros(
        math.ceil(rows / block[0]) * block[0], math.ceil(cols / block[1]) * block[1]
    )
    padded[:rows, :cols] = weight
    tiles = padded.view(-1, block[0], padded.shape[1] // block[1], block[1])
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    back = (codes.float() * scale[:, None, :, None]).reshape(padded.shape)[:rows, :cols]
    codes = codes.reshape(padded.shape)[:rows, :cols].contiguous()
    return {"weight": codes, scale_name: scale}, back.bfloat16()


def whole_numbers(
    weight: torch.Tensor, bits: int, group: int, has_zero: bool, order: torch.Tensor | None
):
    """A weight in whole numbers, packed as compressed-tensors does; and what it stands for."""
    cols = weight.shape[1]
    of_column = torch.arange(cols) // group if order is None else order
    num = int(of_column.max()) + 1
    scale = torch.stack([weight[:, of_column == g].abs().amax(1) for g in range(num)], 1)
    scale = (scale / (2 ** (bits - 1) - 1)).bfloat16()
    zero = torch.randint(-3, 4, scale.shape) if has_zero else torch.zeros_like(scale).int()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = ((weight / scale.float()[:, of_column]).round() + zero[:, of_column]).clamp(low, high)
    back = ((codes - zero[:, of_column]) * scale.float()[:, of_column]).bfloat16()
    parts = {"weight_scale": scale, "weight_packed": packed(codes, bits)}
    parts["weight_shape"] = torch.tensor(weight.shape)
    parts |= {"weight_zero_point": packed(zero.t(), bits).t().contiguous()} if has_zero else {}
    parts |= {"weight_g_idx": order.int()} if order is not None else {}
    return parts, back


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of a row one after the other in words of 32 bits, the first lowest."""
    own, each = codes.long() + 2 ** (bits - 1), 32 // bits
    own = torch.nn.functional.pad(own, (0, -own.shape[1] % each)).view(len(own), -1, each)
    words = (own << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def int8_rows(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """A weight in int8, a scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, (codes.float() * scale.float()).bfloat16()


def compressed(form: str, **more) -> dict:
    """A quantization_config as compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": more | {"num_bits": 4}, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


STORED = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [48, 32], "activation_scheme": "dynamic"},
        lambda w: fp8(w, (48, 32), "weight_scale_inv"),
    ),
    "fp8, one scale": ({"quant_method": "fp8"}, lambda w: fp8(w, tuple(w.shape), "weight_scale")),
    "fp8 rows": (compressed("float-quantized"), lambda w: fp8(w, (1, w.shape[1]), "weight_scale")),
    "fp8 blocks": (
        compressed("float-quantized", block_structure=[48, 32]),
        lambda w: fp8(w, (48, 32), "weight_scale"),
    ),
    "int8 rows": (compressed("int-quantized"), int8_rows),
    "int4": (compressed("pack-quantized"), lambda w: whole_numbers(w, 4, 16, False, None)),
    "int4 with zeros": (
        compressed("pack-quantized"),
        lambda w: whole_numbers(w, 4, 32, True, None),
    ),
    "int8 in order": (
        compressed("pack-quantized"),
        lambda w: whole_numbers(w, 8, 32, False, torch.arange(w.shape[1]).flip(0) % 2),
    ),
}


def save_stored(base: Path, path: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a llama as `name` has it; give what its files stand for."""
    how, make = STORED[name]
    tensors = load_file(base / "model.safetensors")
    true, files = dict(tensors), {}
    for key, tensor in tensors.items():
        stem = key.removesuffix(".weight")
        if "_proj" not in key:
            files[key] = tensor
            continue
        parts, true[key] = make(tensor.float())
        files |= {f"{stem}.{part}": value for part, value in parts.items()}
        files[f"{stem}.input_scale"] = torch.ones(1)
    path.mkdir()
    save_file(files, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_bytes((base / "config.json").read_bytes())
    edit_json(path / "config.json", quantization_config=how)
    return true


def test_fp8_and_whole_numbers_are_read_as_what_they_stand_for(tmp_path):
    """Every tensor; rows of one that is no linear too; what is not understood is refused."""
    base = tiny.save_model(tmp_path / "base", dtype=torch.bfloat16)
    for number, name in enumerate(STORED):
        wanted = save_stored(base, tmp_path / f"{number}", name)
        info = arch.read(str(tmp_path / f"{number}"), need_weights=True)
        assert info.stored.whole is None and info.tensors.keys() == wanted.keys()
        names = list(wanted)
        read = weights.Weights(info).read_ahead(names, torch.device("cpu"))
        for key, tensor in zip(names, read, strict=True):
            assert torch.equal(tensor, wanted[key].to(tensor.dtype)), (name, key)
        key = next(iter(info.quantized))
        some = weights.Weights(info).read_rows(key, (3, 7), torch.float32, torch.device("cpu"))
        assert torch.equal(some, wanted[key][3:7].float())
    path = tmp_path / "0"
    for how, words in (
        ({"quant_method": "gptq"}, "already .gptq.; of such models"),
        ({"quant_method": 1.5}, "already .1.5.; of such models"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bit"),
        (compressed("nvfp4-pack-quantized"), "compressed-tensors: nvfp4-pack-quantized"),
        (compressed("int-quantized") | {"transform_config": {"a": 1}}, "transform_config"),
    ):
        edit_json(path / "config.json", quantization_config=how)
        with pytest.raises(UserError, match=words):
            arch.read(str(path), need_weights=True)
    edit_json(path / "config.json", quantization_config=MXFP4)
    with pytest.raises(UserError, match="no part of a weight as mxfp4 has it"):
        arch.read(str(path), need_weights=True)


def test_a_model_in_fp8_is_trained_as_transformers_reads_it_and_merged_in_16_bit(tmp_path, world):
    """Blocks of 16 rows, because transformers wants whole ones."""
    STORED["whole"] = (
        STORED["fp8"][0] | {"weight_block_size": [16, 32]},
        lambda w: fp8(w, (16, 32), "weight_scale_inv"),
    )
    base = tiny.save_model(tmp_path / "base", dtype=torch.bfloat16)
    path, out, ids = tmp_path / "fp8", tmp_path / "adapter", torch.arange(40)[None]
    wanted = save_stored(base, path, "whole")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in wanted.items())
    flags = ["--train_type=qlora", "--quant_cache=off", f"--output_dir={out}"]
    model, info, cfg = tiny.build(path, world, *flags, "--precision=fp32")
    tiny.fill_lora(model)
    out.mkdir()
    model_files.save(model, info, cfg, None, is_writer=True)
    found, merged = tiny.merged_logits(out, ids), Path(f"{out}-merged")
    with torch.no_grad():
        assert share(model.eval()(ids)[0, -1], found) < 1e-3
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    before, after = (load_file(place / "model.safetensors") for place in (base, merged))
    assert before.keys() == after.keys()
