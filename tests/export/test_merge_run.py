"""What a run leaves is merged as it was trained: its record, its packed bytes, its card."""

import json
from pathlib import Path

import torch

from fsdp_qlora.__main__ import main
from tests import tiny
from tests.ranks import run_ranks


def _export(world, model: Path, out: Path) -> torch.Tensor:
    from fsdp_qlora.export import model_files as export

    flags = ("--quant_type=fp4", "--precision=fp32", "--lora_rank=4", f"--output_dir={out}")
    built, info, cfg = tiny.build(model, world, *flags, f"--quant_cache={out / 'cache'}")
    tiny.fill_lora(built)
    cfg.resolved_output_dir.mkdir(exist_ok=True)
    export.save(built, info, cfg, None, is_writer=world.rank == 0)
    built.eval()
    with torch.no_grad():
        return built(torch.arange(12).view(1, -1).to(world.device))[0, -1].cpu().numpy()


def merge(adapter: Path, out: Path, *more: str) -> dict:
    flags = [f"--adapter={adapter}", f"--out={out}", "--dtype=fp32", "--evidence_rows=2"]
    assert main(["merge", *flags, *more]) == 0
    return json.loads((out / "merge.json").read_text())


def test_an_adapter_of_two_ranks_merges_as_it_was_trained(tmp_path: Path, capsys):
    """From the adapter's own two files, wherever they are taken: the logits are the run's own.

    With the packed bytes that training kept, made anew where damaged, or quantised anew: equal.
    """
    from transformers import AutoModelForCausalLM

    model, out, taken = tiny.save_model(tmp_path / "model"), tmp_path / "run", tmp_path / "taken"
    trained = run_ranks(_export, 2, model, out)[0]
    assert "`fp4_dq`" in (out / "README.md").read_text()
    taken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).rename(taken / name)
    cache = f"--quant_cache={out / 'cache'}"
    kept = merge(taken, tmp_path / "kept", cache)
    assert (kept["added_to"], kept["trained_over"]) == ("dequantized", "fp4_dq")
    assert str(out / "cache") in kept["packed_bytes"]
    assert kept["evidence"]["max_difference"] < 1e-4
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
        found = merged(torch.arange(12).view(1, -1)).logits[0, -1]
    torch.testing.assert_close(found, torch.tensor(trained), rtol=1e-3, atol=1e-4)
    anew = merge(taken, tmp_path / "anew", "--quant_cache=off")
    assert anew["packed_bytes"] == "quantized anew"
    if tiny.DEVICE == "cpu":  # where the same kernels quantised
        files = [tmp_path / name / "model.safetensors" for name in ("kept", "anew")]
        assert files[0].read_bytes() == files[1].read_bytes()
    (layer,) = out.glob("cache/*/layer-00001.safetensors")
    content = bytearray(layer.read_bytes())
    content[-100] ^= 1
    layer.write_bytes(content)
    merge(taken, tmp_path / "mended", cache)
    assert "layers.1.mlp.up_proj.weight in " in capsys.readouterr().out
    if tiny.DEVICE == "cpu":
        assert (tmp_path / "mended" / "model.safetensors").read_bytes() == files[0].read_bytes()
