"""A model that lies on disk in 4 bit is trained over those bytes, and merged over them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fsdp_qlora import arch, config
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.export import model_files as export
from fsdp_qlora.model import shard
from fsdp_qlora.model.quantize import view_fields
from fsdp_qlora.planning.sizes import adopt_format
from tests import tiny
from tests.ranks import run_ranks

KINDS = {"nf4_dq": ("nf4", "true"), "fp4": ("fp4", "false")}
ADAPTER = ("--precision=fp32", "--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """Models as transformers with bitsandbytes saves them (test_quantized.py compares)."""
    place = tmp_path_factory.mktemp("stored")
    model = tiny.save_model(place / "model", dtype=torch.bfloat16)
    for name, (quant_type, double) in KINDS.items():
        argv = [f"--model_name={model}", f"--out={place / name}", "--device=cpu"]
        argv += [f"--quant_type={quant_type}", f"--double_quant={double}"]
        assert main(["quantize", *argv]) == DONE
    return {name: place / name for name in KINDS}


@pytest.fixture(scope="module")
def trained(stored, tmp_path_factory) -> tuple[Path, dict[str, tuple]]:
    """Place of the adapters, and what rank 0 of two has seen (one spawn for all kinds)."""
    out = tmp_path_factory.mktemp("adapters")
    return out, run_ranks(see_all, 2, stored, out)[0]


def see_all(world, stored: dict[str, Path], out: Path) -> dict[str, tuple]:
    return {name: bytes_and_logits(world, path, name, out / name) for name, path in stored.items()}


def bytes_and_logits(world, path: Path, name: str, out: Path) -> tuple:
    """The gathered bytes of every linear as named in the file, and logits over an adapter."""
    quant_type, double = KINDS[name]
    flags = (f"--quant_type={quant_type}", f"--double_quant={double}")
    model, info, cfg = tiny.build(path, world, *ADAPTER, *flags, f"--output_dir={out}")
    tiny.fill_lora(model)
    found, layout = {}, model.layouts[0]
    for number, block in enumerate(shard.blocks(model)):
        flat = shard.gathered(block).cpu()
        for index, linear in enumerate(info.linears):
            stem = f"{info.layers_prefix}.{number}.{linear.name}.weight"
            found[stem] = flat[slice(*layout.weights[index])].numpy().tobytes()
            for field, values in view_fields(flat, layout).items():
                part = values[slice(*layout.elements[field][index])]
                found[f"{stem}.{field}"] = part.numpy().tobytes()
        shard.release(block)
    out.mkdir(exist_ok=True, parents=True)
    export.save(model, info, cfg, None, is_writer=world.rank == 0)
    model.eval()
    with torch.no_grad():
        ids = torch.arange(40, device=world.device)[None]
        return found, model(ids)[0, -1].float().cpu().numpy()


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_hold_the_bytes_of_the_file_and_merge_adds_to_them(
    stored, trained, tmp_path: Path, name: str
):
    """Byte for byte; and the merged model gives the logits of the trained one."""
    path, out, (found, logits) = stored[name], trained[0] / name, trained[1][name]
    fields = {"absmax": "qabsmax", "nested_absmax": "nested_absmax"}
    fields = fields if name.endswith("_dq") else {"absmax": "absmax"}
    num_compared = 0
    with safe_open(path / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            stem, _, part = key.rpartition(".weight.")
            ours = f"{stem}.weight.{fields[part]}" if part in fields else key
            if ours in found:
                raw = file.get_tensor(key).contiguous().view(-1).view(torch.uint8).numpy()
                assert found[ours].startswith(raw.tobytes()), key
                num_compared += 1
    assert num_compared == 3 * 7 * (1 + len(fields))
    last = tiny.merged_logits(out, torch.arange(40)[None], most=1e-4)
    facts = json.loads(Path(f"{out}-merged", "merge.json").read_text())
    assert facts["trained_over"] == name
    torch.testing.assert_close(last, torch.from_numpy(logits), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"is stored as {name}, not in 16 bit"):
        main(["merge", f"--adapter={out}", f"--out={tmp_path / 'no'}", "--base=16bit"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--quant_type fp4", "--quant_type fp4: the model is stored as nf4_dq"),
        ("--double_quant false", "--double_quant false: the model is stored as nf4_dq"),
        ("--train_type hqq_lora", "--train_type hqq_lora: the model is stored as nf4_dq"),
        ("--train_type lora", "--train_type lora: the model is stored as nf4_dq"),
        ("", ""),
        ("--quant_type nf4", ""),
    ],
)
def test_the_format_is_that_of_the_files_and_another_is_refused(flags: str, words: str):
    cfg = config.parse(flags.split())
    if words:
        with pytest.raises(UserError, match=words):
            adopt_format(cfg, "nf4_dq", config.given(flags.split()))
    else:
        cfg = adopt_format(cfg, "fp4" if not flags else "nf4", config.given(flags.split()))
        assert cfg.format_name == ("nf4" if flags else "fp4")


def test_what_is_quantised_otherwise_is_refused_in_one_line(stored, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    text = json.loads((stored["fp4"] / "config.json").read_text())
    with pytest.raises(UserError, match="is quantized already, as fp4"):
        main(["quantize", f"--model_name={stored['fp4']}", f"--out={tmp_path / 'out'}"])
    asked = ["plan", f"--model_name={stored['fp4']}", "--gpus=24"]
    assert main(asked) == DONE
    with pytest.raises(UserError, match="--quant_type nf4: the model is stored as fp4"):
        main([*asked, "--quant_type=nf4"])
    # Written as another type than its files have: no byte may be read by the wrong code.
    text["quantization_config"]["bnb_4bit_quant_type"] = "nf4"
    for path in stored["fp4"].glob("model*.safetensors"):
        (other / path.name).symlink_to(path)
    (other / "config.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="type and block sizes"):
        arch.read(str(other), need_weights=True)
