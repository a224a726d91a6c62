"""`merge`: peft is the reference for the sum, bitsandbytes and hqq for what training saw."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fsdp_qlora import arch, cli, config
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE, INPUT, INTEGRITY, UserError
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.export import new_weights, serving
from fsdp_qlora.training import preflight
from tests import tiny

MODELS = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": LINEARS},
    "rslora": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    },
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LINEARS,
        "rank_pattern": {"v_proj": 4, r"layers\.1\.self_attn.q_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 64},
    },
}
IDS = torch.arange(40).view(2, 20) * 5 % 256
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
Place = tuple[Path, dict[str, Path]]


def save_adapter(model: Path, out: Path, **settings) -> Path:
    """An adapter with random matrices, as peft writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings |= {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    get_peft_model(base, LoraConfig(**settings)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Place]:
    """Model type -> a tiny model, and adapters for it by kind."""
    found = {}
    for model_type, changes in MODELS.items():
        directory = tmp_path_factory.mktemp(model_type)
        model = tiny.save_model(directory / "model", model_type, **changes)
        kinds = KINDS if model_type == "llama" else {"plain": KINDS["plain"]}
        adapters = {k: save_adapter(model, directory / k, **kinds[k]) for k in kinds}
        found[model_type] = (model, adapters)
    return found


def merge(adapter: Path, out: Path, *more: str) -> dict:
    """Run the verb; return merge.json."""
    assert main(["merge", f"--adapter={adapter}", f"--out={out}", *more]) == DONE
    return json.loads((out / "merge.json").read_text())


def peft_model(model: Path, adapter: Path, format_name: str | None = None):
    """peft on transformers, float32; the base rounded by the format's own library, if asked."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in base.named_modules():
        if format_name and isinstance(module, torch.nn.Linear) and "layers." in name:
            module.weight.data = tiny.dequantized(module.weight.data, format_name)
    return PeftModel.from_pretrained(base, adapter)


def load(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", "plain"), ("llama", "rslora"), ("llama", "patterns"), ("qwen2", "plain")],
)
def test_merged_equals_pefts_merge(places, tmp_path: Path, model_type: str, kind: str):
    """Weights and logits, in float32; nothing else lies in the files."""
    model, adapters = places[model_type]
    facts = merge(adapters[kind], tmp_path / "out", "--dtype=fp32", "--base=16bit")
    expected, ours = peft_model(model, adapters[kind]).merge_and_unload(), load(tmp_path / "out")
    state = ours.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(ours), logits(expected), **TOLERANCE)
    before = load(model)
    assert (logits(before) - logits(ours)).abs().max() > 0.05
    base, result = (arch.read(str(path), True) for path in (model, tmp_path / "out"))
    assert {n: r.shape for n, r in base.tensors.items()} == {
        n: r.shape for n, r in result.tensors.items()
    }
    evidence = facts["evidence"]
    assert evidence["max_difference"] < 1e-4 and evidence["top1_agreement"] == 1.0
    assert abs(evidence["kl_nats"]) < 1e-9 and evidence["num_tokens"] == 8 * 64


@pytest.mark.parametrize("format_name", ["nf4", "nf4_dq", "fp4", "hqq4"])
def test_dequantized_merge_equals_peft_over_dequantised_weights(
    places, tmp_path: Path, format_name: str
):
    """The base is the library's own round trip; the adapter is not merged on the other side."""
    tiny.require(format_name)
    model, adapters = places["llama"]
    adapter = with_record(adapters["plain"], tmp_path / "adapter", model, format_name, "fp32")
    facts = merge(adapter, tmp_path / "out", "--dtype=fp32", "--device=cpu")
    assert (facts["added_to"], facts["trained_over"]) == ("dequantized", format_name)
    expected = logits(peft_model(model, adapter, format_name))
    found = logits(load(tmp_path / "out"))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert facts["evidence"]["max_difference"] < 1e-4


def with_record(adapter: Path, out: Path, model: Path, format_name: str, precision: str) -> Path:
    """The adapter as a run of ours over such a base would have saved it."""
    from safetensors.torch import load_file, save_file

    flags = {
        "nf4": ["--double_quant=false"],
        "nf4_dq": [],
        "fp4": ["--quant_type=fp4", "--double_quant=false"],
        "hqq4": ["--train_type=hqq_lora"],
        "bf16": ["--train_type=lora"],
    }
    argv = [f"--model_name={model}", f"--precision={precision}", *flags[format_name]]
    cfg = config.parse(argv)
    assert cfg.format_name == format_name
    record = adapter_files.record_of(arch.read(str(model), need_weights=True), cfg)
    out.mkdir()
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, out / "adapter_model.safetensors", adapter_files.metadata(record))
    return out


def test_the_evidence_tells_the_bases_apart(places, tmp_path: Path):
    """Onto the 4-bit base bf16 rounding is left; onto the 16-bit base the quantisation error too.

    What is printed is what a direct comparison of the two models finds.
    """
    model, adapters = places["llama"]
    adapter = with_record(adapters["plain"], tmp_path / "adapter", model, "nf4_dq", "bf16")
    rows = ("--evidence_rows=4", "--evidence_tokens=32", "--device=cpu")
    near = merge(adapter, tmp_path / "near", *rows)["evidence"]
    far = merge(adapter, tmp_path / "far", "--base=16bit", *rows)["evidence"]
    assert 0 < near["kl_nats"] < far["kl_nats"] / 20
    assert near["max_difference"] < far["max_difference"] / 3
    assert near["top1_agreement"] >= far["top1_agreement"]
    from fsdp_qlora.export import new_weights

    info, read = arch.read(str(model), True), adapter_files.read(adapter)
    own = new_weights.TrainedBase(info, read, torch.bfloat16, torch.device("cpu"))
    ids = torch.tensor(new_weights.choose_rows(own, (4, 32), None)[0])
    with torch.no_grad():
        merged = load(tmp_path / "far").float()(ids).logits.flatten(0, 1)
        base = peft_model(model, adapter, "nf4_dq").float()
        for name, module in base.named_modules():  # training computed in bf16
            if name.endswith("base_layer"):
                module.weight.data = module.weight.data.bfloat16().float()
        for param in (base.get_input_embeddings().weight, base.lm_head.weight):
            param.data = param.data.bfloat16().float()
        trained = base(ids).logits.flatten(0, 1)
    facts = new_weights.compare(trained, merged, ids.tolist(), is_text=False)
    for name in ("max_difference", "kl_nats", "top1_agreement"):
        assert facts[name] == pytest.approx(far[name], rel=1e-2, abs=1e-6)


def test_small_shards_have_an_index_that_transformers_reads(places, tmp_path: Path):
    """As one file or as many, the model is the same; the tokenizer comes along."""
    _, adapters = places["qwen2"]
    flags = ("--dtype=bf16", "--evidence_rows=0")
    whole = merge(adapters["plain"], tmp_path / "whole", *flags)
    many = merge(adapters["plain"], tmp_path / "many", *flags, "--max_shard_gib=0.0002")
    assert whole["num_files"] == 1 and many["num_files"] > 3
    assert whole["evidence"] == {"skipped": "--evidence_rows 0"}
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    first, second = load(tmp_path / "whole"), load(tmp_path / "many")
    assert first.dtype == torch.bfloat16 and first.config.tie_word_embeddings
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_check_and_llama_cpps_programs_show_how_far_they_are(
    places, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.setattr(cli, "LINE_S", 0.002)
    merge(places["llama"][1]["plain"], tmp_path / "out")
    serving.run_tool("sleep", "0.1")
    said = capfd.readouterr().err
    assert re.search(r"compares  [1-6]/6 layers, \d+ s", said) and "sleep works 0 s" in said


def test_held_out_rows_of_the_run_are_used(places, tmp_path: Path):
    """With the run's configuration beside the adapter; a lost data set is said, not fatal."""
    model, adapters = places["llama"]
    adapter = with_record(adapters["plain"], tmp_path / "adapter", model, "nf4_dq", "bf16")
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save_tokenizer(adapter, [json.dumps(row) for row in rows], vocab_size=256)
    argv = [f"--model_name={model}", f"--dataset={data}", "--eval_samples=3", "--seed=1"]
    config.save(config.parse([*argv, f"--output_dir={adapter}"]), adapter / "run_config.json", {})
    found = merge(adapter, tmp_path / "one", "--device=cpu")
    assert found["evidence"]["rows"] == f"3 held-out rows of {data}"
    assert found["evidence"]["num_rows"] == 3 and found["evidence"]["loss_merged"] > 1
    assert (tmp_path / "one" / "tokenizer.json").exists()
    evil = write_evil(adapter)
    asked = merge(adapter, tmp_path / "asked", "--device=cpu", "--evidence_rows=1")["evidence"]
    assert (
        "Python's documentation" in asked["rows"] and f"add --dataset {evil}:rows" in asked["rows"]
    )
    assert not (adapter / "ran").exists()
    merge(adapter, tmp_path / "named", "--evidence_rows=1", f"--dataset={evil}:rows")
    assert (adapter / "ran").exists()
    config.save(config.parse([*argv, f"--output_dir={adapter}"]), adapter / "run_config.json", {})
    data.unlink()
    lost = merge(adapter, tmp_path / "two", "--device=cpu")["evidence"]
    assert "Python's documentation" in lost["rows"] and str(data.name) in lost["rows"]
    assert lost["loss_merged"] > 1
    (adapter / "tokenizer.json").unlink()
    lost = merge(adapter, tmp_path / "three", "--device=cpu")["evidence"]
    assert "random tokens" in lost["rows"] and "loss_merged" not in lost


def write_evil(adapter: Path) -> Path:
    """Python in the directory, named as the data of the run; running it leaves the file `ran`."""
    evil = adapter / "evil.py"
    evil.write_text(
        f"open({str(adapter / 'ran')!r}, 'w')\n"
        "def rows(*_):\n    return [{'instruction': 'What is 5?', 'output': 'It is 5.'}] * 4\n"
    )
    table = json.loads((adapter / "run_config.json").read_text())
    table |= {"dataset": f"{evil}:rows", "eval_split": None, "eval_samples": 0}
    (adapter / "run_config.json").write_text(json.dumps(table))
    return evil


def edit(adapter: Path, out: Path, **values) -> Path:
    """The adapter with other values in its adapter_config.json."""
    out.mkdir()
    table = json.loads((adapter / "adapter_config.json").read_text()) | values
    (out / "adapter_config.json").write_text(json.dumps(table))
    (out / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    return out


REFUSED = {
    "dora": ({"use_dora": True}, INTEGRITY, "must have A and B and magnitude_vector"),
    "bias": ({"bias": "all"}, INPUT, "bias, which is not plain LoRA"),
    "heads": ({"modules_to_save": ["lm_head"]}, INTEGRITY, "modules_to_save lm_head"),
    "unknown": ({"use_something_new": {"a": 1}}, INPUT, "use_something_new"),
    "ia3": ({"peft_type": "IA3"}, INPUT, "peft_type 'IA3'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, INPUT, "which changes the base"),
    "alphas": ({"alpha_pattern": True}, INTEGRITY, "must be an object"),
    "whole": ({"modules_to_save": True}, INTEGRITY, "must be a list"),
    "rank": ({"r": 4}, INTEGRITY, "has rank 8, and adapter_config.json says 4"),
    "alpha": ({"lora_alpha": "x"}, INPUT, "must be a number"),
    "pattern": ({"rank_pattern": {"(": 8}}, INPUT, "is no pattern"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_one_line(places, tmp_path: Path, case: str):
    """Before anything is written."""
    values, code, words = REFUSED[case]
    adapter = edit(places["llama"][1]["plain"], tmp_path / "adapter", **values)
    refuse(code, words, adapter, tmp_path / "out")


def refuse(code: int, words: str, adapter: Path, out: Path, *more: str) -> None:
    with pytest.raises(UserError) as caught:
        merge(adapter, out, *more)
    assert words in str(caught.value) and caught.value.code == code
    assert not out.exists() and not list(out.parent.glob(".out*"))


def _refuse_to_open(adapter: Path, model: Path, tmp_path: Path) -> None:
    """A base that differs where none of its tensors begins: by all commands, where it is known."""
    info, near = arch.read(str(model), need_weights=True), tmp_path / "near"
    ref = info.tensors["model.layers.0.mlp.up_proj.weight"]
    shutil.copytree(model, near)
    content = bytearray(ref.file.read_bytes())
    content[ref.start + ref.nbytes - 1] ^= 1
    (near / ref.file.name).write_bytes(content)
    refuse(INPUT, "is not the base that", adapter, tmp_path / "no", f"--model_name={near}")
    for command in ("generate", "evaluate"):
        with pytest.raises(UserError, match=r"is not the base that .* --any_base true"):
            main([command, f"--adapter={adapter}", f"--model_name={near}"])
    saved, other = adapter_files.read(adapter), arch.read(str(near), need_weights=True)
    adapter_files.check_base(saved, info)
    adapter_files.check_base(saved, other, any_base=True)
    saved.record.pop("samples")  # of an older version: by the first bytes alone
    adapter_files.check_base(saved, other)
    cfg = config.parse([f"--model_name={model}", "--dataset=dummy"])
    prints = [preflight.fingerprint(cfg, base, base.digest(1), 1) for base in (info, other)]
    with pytest.raises(UserError, match="--resume with another base_samples"):
        preflight.check_same(*prints, allow_data_change=True)


def test_another_base_is_refused(places, tmp_path: Path):
    """By shape, by what its weights begin with; of the same weights cut otherwise it is not."""
    (model, adapters), (other, _) = places["llama"], places["qwen2"]
    adapter = with_record(adapters["plain"], tmp_path / "adapter", model, "nf4_dq", "bf16")
    out = tmp_path / "out"
    wide = tiny.save_model(tmp_path / "wide", intermediate_size=384)
    refuse(INTEGRITY, "mlp.", adapter, out, f"--model_name={wide}")
    refuse(INPUT, "is not the base that", adapter, out, f"--model_name={other}")
    with pytest.raises(UserError, match="exists, and nothing is written over it"):
        merge(adapter, model)
    taken = merge(adapter, out, f"--model_name={other}", "--any_base=true", "--evidence_rows=0")
    assert taken["base"] == str(other)
    _refuse_to_open(adapter, model, tmp_path)
    info = arch.read(str(model), need_weights=True)
    load(model).save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    cut = arch.read(str(tmp_path / "cut"), need_weights=True)
    assert len({ref.file for ref in cut.tensors.values()}) > 3
    assert cut.digest(1) == info.digest(1)
    assert dataclasses.replace(info, tensors={}).digest(1) is None


def test_dequantized_wants_to_know_the_format(places, tmp_path: Path):
    """An adapter made elsewhere does not tell; the user can. Else it is 16bit, and said."""
    _, adapters = places["llama"]
    refuse(INPUT, "add --format", adapters["plain"], tmp_path / "out", "--base=dequantized")
    told = ("--base=dequantized", "--format=nf4", "--evidence_rows=0")
    assert merge(adapters["plain"], tmp_path / "a", *told)["trained_over"] == "nf4"
    silent = merge(adapters["plain"], tmp_path / "b", "--evidence_rows=1")
    assert silent["added_to"] == "16bit"
    much = ("--evidence_rows=100000", "--evidence_tokens=100000")
    left_out = merge(adapters["plain"], tmp_path / "c", *much)["evidence"]["skipped"]
    assert re.match(r"needs [\d.]+ GiB, [\d.]+ GiB of \w+ memory are free; fewer", left_out)
    assert "does not tell" in silent["evidence"]["base_of_adapter"]


def test_values_that_the_dtype_cannot_hold_are_an_error(tmp_path: Path):
    """fp16 ends at 65,504."""
    model = tiny.save_model(tmp_path / "model", num_hidden_layers=1)
    big = load(model)
    big.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    big.save_pretrained(model)
    adapter = save_adapter(model, tmp_path / "adapter", **KINDS["plain"])
    words = "model.layers.0.mlp.up_proj.weight: is not finite in torch.float16"
    refuse(INTEGRITY, words, adapter, tmp_path / "out", "--dtype=fp16")


def test_the_check_of_a_merged_model_gives_back_what_each_layer_has_taken(tmp_path, monkeypatch):
    """What threads read and freed stays with the process: 0.9 GiB of a model of 1.1."""
    path, heard = tiny.save_model(tmp_path / "model"), list[str]()
    monkeypatch.setattr(new_weights.hardware, "release_freed_memory", lambda: heard.append("free"))
    info, cpu = arch.read(str(path), need_weights=True), torch.device("cpu")
    nothing = adapter_files.SavedAdapter(path, "", {})
    base = new_weights.TrainedBase(info, nothing, torch.bfloat16, cpu)
    new_weights.logits(base, [[1, 2, 3]], lambda: heard.append("layer"))
    assert heard == ["layer", "free"] * info.num_layers
