"""Adapters that peft has made: computed as peft computes them, or refused in true words."""

import contextlib
import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora import arch, config, inference
from fsdp_qlora.__main__ import main
from fsdp_qlora.arch import targets
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.planning.sizes import count_trained
from tests import tiny, tiny_models, warm
from tests.ranks import run_ranks

ALPHAS = {"q_proj": 32, r"layers\.1\..*down_proj": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "alpha of some": {"target_modules": [*ATTENTION, "down_proj"], "alpha_pattern": ALPHAS},
    "alpha of all": {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}},
    "rank of some": {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2, "0.*k_proj": 9}},
    "rank and rslora": {
        **{"target_modules": ATTENTION, "use_rslora": True},
        **{"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    },
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "some layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers by pattern": {
        **{"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}
    },
    "without some": {"target_modules": ATTENTION, "exclude_modules": r".*layers\.1\..*q_proj"},
    "pattern": {"target_modules": r".*layers\.[12]\.(self_attn\.k_proj|mlp\.gate_proj)"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    "dora of some": {
        **{"target_modules": ["q_proj", "o_proj"], "use_dora": True},
        **{"layers_to_transform": [1], "alpha_pattern": {"o_proj": 3}},
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both ends": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
REFUSED = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "merge it"),
    "norm": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "merge it"),
    "bias": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "merge_and_unload"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "merge_and_unload"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "merge_and_unload"),
}
STARTS = ["dora of some", "rank and rslora", "pattern", "without some", "alpha of some"]
STARTS += ["both ends", "full names"]
IDS = torch.arange(3, 35)[None]


def based(model: Path, format_name: str = "bf16"):
    """The base of transformers, in float32."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tiny.round_base(base, format_name)
    return base


def made(model: Path, out: Path, changes: dict, format_name: str = "bf16") -> torch.Tensor:
    """Let peft make an adapter; its logits, [T, V]."""
    from peft import LoraConfig, get_peft_model

    base = based(model, format_name)
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **changes)
    adapted = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "bias" in name:
                param.add_(torch.randn(param.shape) * 0.05)
    adapted.save_pretrained(out)
    with torch.no_grad():
        return adapted(IDS).logits[0]


def opened(adapter: Path, *flags: str) -> torch.Tensor:
    """Logits of generate and evaluate."""
    from fsdp_qlora.distributed import world
    from fsdp_qlora.model.head import Targets

    env = dict(os.environ)
    try:
        cfg = inference.config_of(adapter, ["--precision=fp32", "--quant_cache=off", *flags])
        model = inference.open_run(adapter, cfg)
        model.load_adapter()
        with torch.no_grad():
            device = model.world.device
            places = torch.arange(IDS.numel(), device=device)
            return model.model(IDS.to(device), Targets(places, None)).cpu()
    finally:
        world.leave()
        os.environ.clear()
        os.environ.update(env)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its values are bfloat16's, as training stores a base that is not quantized."""
    place = tmp_path_factory.mktemp("base") / "model"
    return tiny.save_model(place, dtype=torch.bfloat16, initializer_range=0.1)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(model: Path, tmp_path: Path, case: str, capfd):
    """In float32, over the base as it is stored: what the adapter does not tell is said."""
    reference = made(model, tmp_path / "adapter", CASES[case])
    torch.testing.assert_close(opened(tmp_path / "adapter"), reference, rtol=1e-4, atol=1e-4)
    assert "does not tell what it was trained over; its base is in 16 bit" in capfd.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_with_what_to_do(model: Path, tmp_path: Path, case: str):
    changes, words = REFUSED[case]
    made(model, tmp_path / "adapter", changes)
    with pytest.raises(UserError, match=words):
        opened(tmp_path / "adapter")


def test_a_head_trained_apart_from_a_tied_embedding_is_refused(tmp_path: Path):
    """peft trains a copy; one matrix cannot be both. By merge, too, which left it out before."""
    from fsdp_qlora.__main__ import main

    model = tiny.save_model(tmp_path / "model", tie_word_embeddings=True)
    made(model, tmp_path / "adapter", CASES["whole head"])
    with pytest.raises(UserError, match="trained apart from the embedding"):
        opened(tmp_path / "adapter")
    with pytest.raises(UserError, match="trained apart from the embedding"):
        main(["merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"])


def test_another_format_than_that_of_training_is_said(model: Path, tmp_path: Path, capfd):
    """An adapter of a 16-bit base over 4 bit, and the other way round; nothing where it fits."""
    from safetensors.torch import load_file, save_file

    place = tmp_path / "adapter"
    made(model, place, CASES["plain"])
    file = place / "adapter_model.safetensors"
    for trained, flags, words in (
        ("bf16", ("--train_type=qlora",), "over a base in 16 bit; its base is in nf4_dq here"),
        ("nf4_dq", ("--train_type=lora",), "over a base in nf4_dq; its base is in 16 bit here"),
        ("nf4_dq", (), ""),
        ("hqq4", (), ""),
        ("bf16", (), ""),
    ):
        save_file(load_file(file), file, {"fsdp_qlora": json.dumps({"format": trained})})
        opened(place, *flags)
        err = capfd.readouterr().err
        assert words in err and ("note      " in err) == bool(words), (trained, err)


def first_steps(world, model: Path, folders: dict[str, list[str]]) -> dict:
    """Of runs that go on from adapters: logits before the first step, trained parameters, words."""
    from fsdp_qlora.export import model_files
    from fsdp_qlora.model import adapters
    from fsdp_qlora.model.head import Targets

    found = {}
    for folder, flags in folders.items():
        said: list[str] = []
        argv = [f"--init_adapter={folder}", f"--model_name={model}", "--precision=fp32", *flags]
        argv = adapter_files.expand_init([*argv, f"--output_dir={folder}-out", "--attn=sdpa"])
        quantized, info, cfg = tiny.build(model, world, *argv)
        adapter_files.check_init(cfg, info, said.append)
        file = adapter_files.locate(cfg.init_adapter) / adapter_files.WEIGHTS_NAME
        adapters.load(quantized, file)
        places = torch.arange(IDS.numel(), device=world.device)
        with torch.no_grad():
            logits = quantized(IDS.to(world.device), Targets(places, None)).cpu().numpy()
        model_files.save(quantized, info, cfg, None, world.rank == 0)
        found[folder] = logits, count_trained(info, cfg).total, said
    return found


def test_training_goes_on_from_what_peft_made(model: Path, tmp_path: Path):
    """Sharded and streamed on two ranks; what is exported computes the same in peft."""
    from peft import PeftModel

    streamed = ["--offload_impl=stream"], ["--use_cpu_offload=false"]
    folders, wanted = {}, {}
    for number, case in enumerate([*STARTS, *STARTS[:2]]):
        format_name = "bf16" if number < len(STARTS) else "nf4_dq"
        changes, dora = CASES[case], case.startswith("dora")
        kinds = ("lora", "dora") if number < len(STARTS) else ("qlora", "bnb_dora")
        folder = str(tmp_path / f"{number}-{case}")
        wanted[folder] = made(model, Path(folder), changes, format_name), format_name
        folders[folder] = [f"--train_type={kinds[dora]}", *streamed[number % 2]]
    for by_rank in run_ranks(first_steps, 2, model, folders):
        for folder, (logits, count, said) in by_rank.items():
            reference, format_name = wanted[folder]
            found = torch.from_numpy(logits)
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4, msg=folder)
            base = based(model, format_name)
            again = PeftModel.from_pretrained(base, f"{folder}-out", is_trainable=True).eval()
            assert count == again.get_nb_trainable_parameters()[0], folder
            assert any(line.startswith(f"adapter   goes on from {folder}: ") for line in said)
            with torch.no_grad():
                torch.testing.assert_close(again(IDS).logits[0], reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora_rank=8", "--lora_rank 8: {} has 4; leave it out"),
        ("--alpha_pattern={}", "--alpha_pattern {{}}: {} has "),
        ("--train_type=bnb_dora", "--train_type bnb_dora: {} has qlora; leave it out"),
        ("--lora_target_modules=q_proj,down_proj", "{}: adapts 12 linears, and the options 6: "),
        ("--model_name=OTHER", "adapter for model.layers.0.mlp.down_proj [128, 320]: is [96, 320]"),
    ],
)
def test_what_is_said_against_an_adapter_is_refused_in_one_line(model, tmp_path, flags, words):
    """With both values, before anything is loaded; dropout and the base may be others."""
    made(model, tmp_path / "made", CASES["alpha of some"])
    other = tiny.save_model(tmp_path / "other", hidden_size=96)
    own = [f"--init_adapter={tmp_path / 'made'}", "--weights=load"]

    def start(*more: str) -> list[str]:
        said: list[str] = []
        cfg = config.parse(adapter_files.expand_init([*own, *more]))
        adapter_files.check_init(cfg, arch.read(cfg.model_name, need_weights=True), said.append)
        assert cfg.lora_dropout == (0.1 if more else 0)
        return said

    assert not any("base, not" in line for line in start())
    twin = tiny.save_model(tmp_path / "twin", dtype=torch.bfloat16)
    said = start(f"--model_name={twin}", "--lora_dropout=0.1")
    assert f"names {model} as its base, not {twin}" in said[0]
    pattern = json.loads((tmp_path / "made" / "adapter_config.json").read_text())["alpha_pattern"]
    start(f"--alpha_pattern={json.dumps(pattern, indent=2)}", "--lora_dropout=0.1")  # spaced else
    with pytest.raises(UserError) as caught:
        start(flags.replace("OTHER", str(other)))
    assert words.format(tmp_path / "made") in str(caught.value)


def test_a_run_that_goes_on_from_an_adapter_is_resumed_without_it(tmp_path: Path):
    """And tells in its adapter_config.json what it was started from; plan counts the same."""
    warm.make_model(tmp_path)
    start, model, out = tmp_path / "made", tmp_path / "model", tmp_path / "out"
    made(model, start, {"target_modules": r".*1\..*[qk]_proj", "rank_pattern": {"q_proj": 2}})
    flags = [f"--init_adapter={start}", f"--dataset={tmp_path / 'data.jsonl'}", "--lr=1e-9"]
    flags += ["--save_every=1", "--batch_size=4", "--context_length=128", "--world_size=2"]
    flags += ["--quant_cache=off", "--token_cache=off"]
    run = warm.start([*flags, "--max_steps=1", f"--output_dir={out}"], tmp_path)
    assert run.wait() == 0, run.err
    assert f"adapter   goes on from {start}: rank 2, 4 on 2 linears" in run.out
    plan = contextlib.redirect_stdout(io.StringIO())
    with plan as printed:
        assert main(["plan", *flags, "--gpus=2x24", "--json"]) == 0
    held = load_file(start / "adapter_model.safetensors")
    num_held = sum(tensor.numel() for tensor in held.values())
    assert json.loads(printed.getvalue())["num_trained"] == num_held
    config_of = (json.loads((place / "adapter_config.json").read_text()) for place in (start, out))
    before, after = config_of
    assert {key for key in before if before[key] != after.get(key)} <= {"base_model_name_or_path"}
    first, last = (load_file(place / "adapter_model.safetensors") for place in (start, out))
    assert all(torch.allclose(first[name], last[name], atol=1e-7) for name in first | last)
    start.rename(tmp_path / "gone")
    again = warm.start([f"--resume={out}", "--max_steps=2"], tmp_path)
    assert again.wait() == 0, again.err


def test_preferences_that_go_on_from_an_adapter_are_compared_with_it(tmp_path: Path):
    """The first loss is log 2, as the policy is the reference; after a resume it still is that."""
    warm.make_model(tmp_path)
    start, out = tmp_path / "made", tmp_path / "out"
    made(tmp_path / "model", start, {"target_modules": ATTENTION})
    words = [f"what is {i}" for i in range(8)]
    rows = [{"prompt": w, "chosen": f"{w} it is", "rejected": f"so {w} why"} for w in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--init_adapter={start}", f"--dataset={tmp_path / 'pairs.jsonl'}", "--lr=1e-3"]
    flags += ["--objective=dpo", "--precision=fp32", "--batch_size=2", "--context_length=64"]
    flags += ["--save_every=1", "--world_size=2", "--quant_cache=off", "--token_cache=off"]
    run = warm.start([*flags, "--max_steps=2", f"--output_dir={out}"], tmp_path)
    assert run.wait() == 0, run.err
    again = warm.start([f"--resume={out}", "--max_steps=3"], tmp_path)
    assert again.wait() == 0, again.err
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    steps = {line["step"]: line for line in lines if "event" not in line}
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[1]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps[3]["margin"] > 0.001


SELECTIONS = [
    {},
    {"target_modules": ["v_proj", "dense", "fc1", "mlp.up_proj", "g_proj"]},
    {"target_modules": r".*\.[02]\..*(q|k|query_key_value|fc2)(_proj)?"},
    {"exclude_modules": ["o_proj", "1.self_attn.q_proj", "dense_4h_to_h", "fc2"]},
    {"exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "query_key_value", "k_proj"], "layers_to_transform": [0, 2]},
    {
        "rank_pattern": {r"[01]\..*(q_proj|query_key_value)": 3, "v_proj|dense": 5, "q_proj": 9},
        "alpha_pattern": {"(k|v)_proj|fc1|dense_h_to_4h": 7, "mlp.*": 1.5},
    },
]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi", "qwen3", "lfm3"])
def test_linears_ranks_and_scales_are_chosen_as_peft_chooses(kind: str, tmp_path: Path):
    """Each name of a list that a type has not is left out, as one who knows it would."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path / "model"
    tiny_models.save(path, kind)
    info = arch.read(str(path), need_weights=True)
    names = [
        info.outer_name(f".{n.name}").rpartition(".")[2] for n in info.linears
    ]  # lfm3's g_proj

    def known(modules):
        is_list = isinstance(modules, list)
        return [m for m in modules if m.rpartition(".")[2] in names] if is_list else modules

    for changes in SELECTIONS:
        changes = {"target_modules": "all-linear"} | {
            k: known(v) if "modules" in k else v for k, v in changes.items()
        }
        values = {
            "target_modules": "lora_target_modules",
            "exclude_modules": "lora_exclude_modules",
        }
        texts = {values.get(key, key): value for key, value in changes.items()}
        for key, value in texts.items():
            text = json.dumps(value) if isinstance(value, dict) else value
            texts[key] = ",".join(map(str, value)) if isinstance(value, list) else text
        for key in ("rank_pattern", "alpha_pattern"):  # keys that match nothing are refused
            if key in changes:
                absent = {"q_proj"} - {*names} | ({"mlp.*"} if kind == "lfm3" else set())
                kept = {k: v for k, v in changes[key].items() if k not in absent}
                changes[key], texts[key] = kept, json.dumps(kept)
        cfg = config.TrainConfig(use_rslora=True, **texts)
        peft = get_peft_model(
            based(path), LoraConfig(r=16, lora_alpha=32, use_rslora=True, **changes)
        )
        theirs = {
            name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
            for name, m in peft.named_modules()
            if hasattr(m, "lora_A")
        }
        ours = {
            info.outer_name(f"{info.layers_prefix}.{i}.{row.linear.name}"): (
                row.rank,
                row.alpha / math.sqrt(row.rank),
            )
            for i, layer in enumerate(targets.find_targets(info, cfg))
            for row in layer
        }
        assert ours == theirs, (kind, changes)
        assert count_trained(info, cfg).total == peft.get_nb_trainable_parameters()[0]
