"""`quantize`: the bytes are those that transformers saves itself, and it loads them."""

import gc
import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fsdp_qlora import arch
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE
from fsdp_qlora.export import new_weights  # once, not in every fork
from fsdp_qlora.export.adapter import SavedAdapter
from fsdp_qlora.model.quantize import import_bitsandbytes
from fsdp_qlora.training import memory
from tests import tiny
from tests.export.test_adapter import write_adapter
from tests.export.test_merge import logits
from tests.model_files import write_model

CASES = [
    ("llama", "nf4", True, torch.bfloat16),
    ("llama", "fp4", False, torch.float16),
    ("qwen2", "nf4", False, torch.bfloat16),
]


def contents(directory: Path) -> dict[str, tuple]:
    """Name -> dtype, shape and bytes of every tensor."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tensor.shape, raw)
    return found


@pytest.mark.parametrize(("model_type", "quant_type", "double", "dtype"), CASES)
def test_it_writes_what_transformers_saves(
    tmp_path: Path, model_type: str, quant_type: str, double: bool, dtype: torch.dtype
):
    """Every tensor byte for byte, the same config.json; loaded, the same logits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    is_tied = model_type == "qwen2"
    model = tiny.save_model(tmp_path / "model", model_type, dtype, tie_word_embeddings=is_tied)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, dtype=dtype, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    argv = [f"--model_name={model}", f"--quant_type={quant_type}", f"--double_quant={double}"]
    argv += ["--device=cpu", "--max_shard_gib=0.0002"]
    assert main(["quantize", *argv, f"--out={tmp_path / 'ours'}"]) == DONE
    expected, found = contents(tmp_path / "theirs"), contents(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum("quant_state" in name for name in found) == 7 * 3
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "ours")]
    assert configs[1]["quantization_config"] == configs[0]["quantization_config"]
    assert configs[1] == configs[0]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", device_map="cpu")
    assert ours.config.quantization_config.bnb_4bit_quant_type == quant_type
    assert torch.equal(logits(ours), logits(saved))


@pytest.mark.parametrize("has_rows", [True, False], ids=["rows", "documentation"])
def test_it_says_what_was_lost(tmp_path: Path, capfd, has_rows: bool):
    """Both losses on rows of text are those of transformers, original and its own 4 bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    texts = [f"{word} and {word}, said {word} again" for word in ("la", "lo", "li")]
    model = tiny.save_model(tmp_path / "model", vocab_size=384, initializer_range=0.3)
    tiny.save_tokenizer(model, texts)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = [f"--model_name={model}", "--device=cpu", f"--out={tmp_path / 'out'}"]
    given = [f"--dataset={rows}"] * has_rows
    assert main(["quantize", *argv, *given, "--evidence_tokens=16"]) == DONE
    out = capfd.readouterr().out
    said = re.search(r"loss on these rows (\S+) -> (\S+)", out)
    assert said is not None and "in 4 bit against the original" in out, out
    settings = BitsAndBytesConfig(
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        bnb_4bit_compute_dtype=torch.float32,
    )
    nothing, info = SavedAdapter(model, "", {}), arch.read(str(model), need_weights=False)
    base = new_weights.TrainedBase(info, nothing, torch.float32, torch.device("cpu"))
    ids, _, is_text = new_weights.choose_rows(base, (8, 16), str(rows) if has_rows else None)
    assert is_text and ids
    for shown, how in zip(said.groups(), ({}, {"quantization_config": settings}), strict=True):
        plain = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, device_map="cpu", **how
        )
        plain = plain.dequantize().float() if how else plain  # bitsandbytes computes in less
        total, num = 0.0, 0
        for row in map(torch.tensor, ids):
            with torch.no_grad():
                logs = plain(row[None]).logits[0, :-1].double().log_softmax(-1)
            total -= logs.gather(1, row[1:, None]).sum().item()
            num += len(row) - 1
        assert float(shown) == pytest.approx(total / num, abs=2e-3)
    assert said[1] != said[2]


def growth_mib(argv: list[str], found) -> None:
    """Run a verb in this process; say how far its memory went up at most."""
    memory.process_peak()
    gc.freeze()  # a collection would copy what the forked process shares with its parent
    before = memory.process_peak().left_gib
    main(argv)
    found.value = (memory.process_peak().allocated_gib - before) * 1024


@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_the_host_holds_a_few_tensors_and_no_file(tmp_path: Path, verb: str):
    """A model of 425 MiB goes through in a part of that, though it is written as one file."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 48}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = write_model(tmp_path / "model", **sizes)
    adapter = write_adapter(tmp_path / "adapter", model)
    own = {
        "quantize": [f"--model_name={model}", "--evidence_rows=0"],
        "merge": [f"--adapter={adapter}", "--evidence_rows=0", "--dtype=fp32", "--base=16bit"],
    }
    context = multiprocessing.get_context("fork")
    found = context.Value("d", -1.0)
    argv = [verb, *own[verb], f"--out={tmp_path / 'out'}", "--device=cpu"]
    import_bitsandbytes()
    process = context.Process(target=growth_mib, args=(argv, found))
    process.start()
    process.join(60)
    total_mib = (model / "model.safetensors").stat().st_size / 2**20
    assert process.exitcode == 0 and (tmp_path / "out" / "model.safetensors").exists()
    assert total_mib > 420 and 0 < found.value < total_mib / 2
