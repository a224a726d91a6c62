"""Every causal language model of transformers: equal to transformers + peft, or refused in a line.

A tiny random checkpoint of each type is read by the trainer. Loss, logits and the gradient of every
adapter, of rows padded and of rows one after the other, at every checkpointing level, are those of
transformers + peft with each row alone.
"""

import contextlib
import dataclasses
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from fsdp_qlora import arch, config, inference
from fsdp_qlora.arch.targets import TURNED
from fsdp_qlora.data.batches import Batch, collate, flatten
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import model_files
from fsdp_qlora.model import adapters, attention, load, shard, skeleton, weights
from fsdp_qlora.model.attention import RowBounds
from fsdp_qlora.model.head import Targets
from fsdp_qlora.planning import sizes
from fsdp_qlora.training import losses
from tests import tiny, tiny_models
from tests.model.test_packed_batches import make_samples
from tests.model_files import edit_json

FLAGS = ("--train_type=lora", "--precision=fp32", "--lora_rank=4", "--lora_alpha=8")
FLAGS += ("--lora_dropout=0", "--quant_cache=off")
LEVELS = {
    "full": {},
    "selective": {"selective_layers": 99},
    "none": {"use_gradient_checkpointing": False},
}
LAYINGS = {"padded": collate, "packed": flatten}
TOLERANCE = 1e-5
# Scores that are not divided by the root of the head size make much of a rounding; and so do the
# states of a delta rule, whose error of 4e-6 is 1e-5 with another number of threads.
SHARP, SHARP_TOLERANCE = ("gemma4_text", "gemma4_unified_text", "qwen3_next"), 2e-4
TABLE = Path(__file__).parents[2] / "recipes" / "models.md"
# Configs of many parts, of a draft model, or (dbrx) that transformers 5.23 cannot build itself.
NOT_BUILT = {"blt", "dbrx", "gemma4_assistant", "gemma4_unified_assistant"}


class Finding(NamedTuple):
    """What became of a type.

    Attributes:
        verdict: "equal", "refused", "different", "crash" or "not built".
        note: why it is refused; where it differs and by how much; the error.
    """

    verdict: str
    note: str


class Results(NamedTuple):
    """Of rows: loss sum, logits [N, V] where a token is trained, and gradients by peft's names."""

    loss: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def judge(path: Path, world: World) -> Finding:
    """Say what becomes of the model in `path`."""
    cfg = config.parse([f"--model_name={path}", *FLAGS])
    with patch.object(weights, "read_file", wraps=weights.read_file) as reader:
        try:
            model, info, cfg = build(cfg, world, expert_rank=3)
        except UserError as error:
            verdict = "different" if reader.called else "refused"
            words = str(error).replace(str(path), "DIR")
            # A long list is cut where the path's length has it.
            return Finding(verdict, re.sub(r"\([^()]*\.\.\.[^()]*\)", "(...)", words))
    flats = tiny.fill_lora(model)
    routers = [n.name for n in info.linears if n.out_features == tiny_models.EXPERTS]
    if routers:
        return Finding("different", f"routers are quantized: {routers[0]}")
    lora = tiny.lora_dict(model, flats)
    known = {info.outer_name(name) for name in info.tensors}  # as merge looks for them
    named = {re.sub(r"base_model\.model\.(.*)\.lora_[AB]", r"\1", name) for name in lora}
    if lost := {name for name in named - known if ".experts." not in name}:
        return Finding("different", f"adapters are named {min(lost)}, as no tensor of the files is")
    said = info.rope_note(64)  # then a row has the loss of a row alone only in a batch of its own
    samples = make_samples(1 if said else 3)
    wanted = reference(path, lora, cfg, samples)
    if isinstance(wanted, str):
        return Finding("different", wanted)
    is_apart = losses.are_rows_apart(model, world)
    worst: dict[str, float] = {}
    for laying, lay in LAYINGS.items():
        batch = lay(samples, 1)
        if laying == "packed" and not is_apart:
            continue
        for level, flags in LEVELS.items():
            model.set_checkpointing(dataclasses.replace(cfg, **flags), world.device)
            found = run(model, batch, world)
            for what, size in differences(found, wanted).items():
                worst[f"{laying} {level} {what}"] = size
    most = SHARP_TOLERANCE if info.model_type in SHARP else TOLERANCE
    bad = {where: size for where, size in worst.items() if not size < most}
    notes = [f"{max(worst.values()):.1e}"] + ["with --attn eager"] * (cfg.attn == "eager")
    notes += ["packing off"] * (not is_apart) + ["rope said"] * bool(said)
    if bad:
        notes[0] = ", ".join(f"{w} {s:.1e}" for w, s in bad.items())
    return Finding("equal" if len(notes[0]) < 10 else "different", ", ".join(notes))


def build(
    cfg, world: World, expert_rank: int = 0
) -> tuple[Any, arch.ModelInfo, config.TrainConfig]:
    """The model as a run builds it; with the flag that a refusal names, if it names one."""
    try:
        info = arch.read(cfg.model_name, need_weights=True)
        if any(linear.expert for linear in info.linears) and info.model_type != TURNED:
            cfg = dataclasses.replace(cfg, expert_lora_rank=expert_rank)
        return load.build(cfg, info, world).model, info, cfg
    except UserError as error:
        if cfg.attn == "eager" or not str(error).endswith("use --attn eager"):
            raise
        return build(dataclasses.replace(cfg, attn="eager"), world, expert_rank)


def run(model, batch: Batch, world: World) -> Results:
    """What the trainer computes."""
    shard.settle(model)  # the logits of the last batch left parameters gathered
    model.zero_grad()
    model.train()
    loss = losses.token_loss_sum(model, batch, world.device)
    loss.backward()
    grads = tiny.lora_grads(model)
    targets = Targets.of(batch.labels, world.device)
    rows = RowBounds.of(batch.row_lengths, world.device)
    with torch.no_grad():
        logits = model(batch.input_ids, Targets(targets.positions_N, None), rows=rows)
    return Results(loss.detach(), logits, tiny.lora_dict(model, grads))


def reference(path: Path, lora: dict[str, torch.Tensor], cfg, samples) -> Results | str:
    """What transformers and peft compute, a row at a time; or what hinders them."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import transformers_weight_conversion

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    names = {re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.weight", r"\1", name) for name in lora}
    mixtures = {name.removesuffix(".base_layer") for name in names if ".experts" in name[-19:]}
    names -= {*mixtures, *(f"{name}.base_layer" for name in mixtures)}
    unknown = sorted((names | mixtures) - {name for name, _ in model.named_modules()})
    if unknown:
        return f"adapters are named {unknown[0]}, as no module of transformers is"
    params = [n for n, p in model.named_parameters() if n.rpartition(".")[0] in mixtures]
    params = [name for name in params if name.endswith("_proj")]
    scale = cfg.lora_alpha / cfg.lora_rank
    lora_config = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=names,
        target_parameters=params or None,
        rank_pattern=dict.fromkeys(map(re.escape, params), 3),
        alpha_pattern=dict.fromkeys(map(re.escape, params), 3 * scale),
    )
    # It takes the linears of shared experts for those of experts.
    with patch.object(transformers_weight_conversion, "_convert_peft_config_moe"):
        model = get_peft_model(model, lora_config)
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert named.keys() == lora.keys()
    for name, param in named.items():
        param.data = lora[name].clone()
    losses, logits = [], []
    for sample in samples:
        batch = collate([sample], 1)
        out = model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float()
        is_trained = batch.labels[0, 1:] != -100
        logits.append(out[is_trained])
        labels = batch.labels[0, 1:][is_trained]
        losses.append(torch.nn.functional.cross_entropy(logits[-1], labels, reduction="sum"))
    torch.stack(losses).sum().backward()
    grads = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named.items()
    }
    return Results(torch.stack(losses).sum().detach(), torch.cat(logits).detach(), grads)


def differences(found: Results, wanted: Results) -> dict[str, float]:
    """How far results are from those wanted, each as a share of its largest number."""
    most = max(float(g.abs().max()) for g in wanted.gradients.values())
    sizes = [
        share(found.gradients[name], grad, 1e-2 * most) for name, grad in wanted.gradients.items()
    ]
    return {
        "loss": share(found.loss, wanted.loss),
        "logits": share(found.logits, wanted.logits),
        "gradients": max(sizes),
    }


def share(found: torch.Tensor, wanted: torch.Tensor, least: float = 1e-30) -> float:
    """The largest difference, as a share of the largest number wanted."""
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), least)


def judge_type(name: str, path: Path, world: World) -> Finding:
    """Make a tiny model of a type in `path`, and say what becomes of it."""
    try:
        tiny_models.save(path, name)
    except Exception as error:
        return Finding("not built", f"{type(error).__name__}: {error}")
    try:
        return judge(path, world)
    except Exception as error:
        return Finding("crash", f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def found(tmp_path_factory, world) -> dict[str, Finding]:
    """What became of every type."""
    place, names = tmp_path_factory.mktemp("sweep"), tiny_models.all_types()
    return {name: judge_type(name, place / f"{i}", world) for i, name in enumerate(names)}


def names_of(found: dict[str, Finding], verdict: str) -> dict[str, str]:
    return {name: finding.note for name, finding in found.items() if finding.verdict == verdict}


def test_what_is_accepted_computes_as_transformers_and_peft(found):
    assert not names_of(found, "different")
    assert not names_of(found, "crash")
    assert len(names_of(found, "equal")) >= 100 + len(tiny_models.VARIANTS)


def test_every_type_is_built_but_those_named(found):
    assert names_of(found, "not built").keys() == NOT_BUILT


def test_the_table_in_recipes_is_that_of_this_sweep(found):
    """Where it differs it is written anew: look at it, and commit it."""
    old = TABLE.read_text() if TABLE.exists() else ""
    TABLE.write_text(new := table(found))
    assert old == new, f"{TABLE} was not what the sweep finds; it is now"


def test_an_installation_gets_no_newer_transformers_than_was_swept():
    """pip takes the newest that is admitted, and a newer one may name its arguments otherwise."""
    project = tomllib.loads((config.PROJECT_DIR / "pyproject.toml").read_text())["project"]
    wanted = {row.name: row.specifier for row in map(Requirement, project["dependencies"])}
    swept = Version(re.search(r"transformers ([\d.]+),", TABLE.read_text())[1])
    assert swept in wanted["transformers"]
    assert f"{swept.major}.{swept.minor + 1}.0" not in wanted["transformers"]


def table(found: dict[str, Finding]) -> str:
    """Markdown: what becomes of every type, the accepted ones first."""
    import transformers

    out = tiny_models.left_out()
    equal, refused = names_of(found, "equal"), names_of(found, "refused")
    rows = [f"| {name} | {', '.join(note.split(', ')[1:])} |" for name, note in equal.items()]
    rows = [
        "# Models that can be trained",
        "",
        f"Every causal language model of transformers {transformers.__version__}, as a tiny random "
        "checkpoint: loss, logits and every LoRA gradient, padded and packed, at all three "
        f"checkpointing levels, are those of transformers + peft within {TOLERANCE:.0e} in fp32 "
        f"({', '.join(SHARP)}, which make much of a rounding: {SHARP_TOLERANCE:.0e}), "
        "or the model is refused before its weights are read. Written by "
        "tests/model/test_model_sweep.py.",
        "",
        f"## Accepted and equal: {len(equal)}",
        "",
        *("| type | what a run says or needs |", "|---|---|", *rows, ""),
        f"## Refused: {len(refused)}",
        "",
        *("| type | the line |", "|---|---|"),
        *(f"| {name} | {note.replace('|', '/')} |" for name, note in refused.items()),
        "",
        f"## Not tried: {len(NOT_BUILT) + len(out)}",
        "",
        f"transformers builds no tiny one: {', '.join(sorted(NOT_BUILT))}.",
        "",
        f"Of another task first, or with such a part: {', '.join(sorted(out))}.",
    ]
    return "\n".join(rows) + "\n"


KERNEL = {"gpt_oss": True, "mistral": True, "mimo_v2_flash": True, "qwen2_moe": False}


@pytest.mark.parametrize("name", KERNEL)
def test_windows_and_sinks_need_no_masks_where_a_kernel_for_rows_runs(tmp_path, world, name):
    """As on a GPU; a model that hands no window to its attention keeps its masks."""
    usual = skeleton.choose_kernels

    def choose(*args):
        return dataclasses.replace(usual(*args), attention="sdpa", has_row_kernel=True)

    with patch.object(skeleton, "choose_kernels", choose):
        finding = judge_type(name, tmp_path, world)
        assert finding.verdict == "equal" and "packing off" not in finding.note, finding
        model, _, _ = build(config.parse([f"--model_name={tmp_path}", *FLAGS]), world)
    tiny.fill_lora(model)
    own = model.eval().decoder.config
    assert (own._attn_implementation == attention.PLAIN) == KERNEL[name]
    ids, cache = torch.arange(3, 63).view(2, 30), DynamicCache(config=own)
    with torch.no_grad():
        wanted = model(ids)
        model(ids[:, :-1], cache={"past_key_values": cache})
        assert share(model(ids[:, -1:], cache={"past_key_values": cache}), wanted) < TOLERANCE


def test_sinks_of_another_form_are_eager_and_why_is_said(tmp_path, world):
    """Of odd heads the plan knows it too; what only a trial of the layers finds, is said."""
    tiny_models.save(tmp_path, "gpt_oss")
    argv, device = [f"--model_name={tmp_path}", *FLAGS], torch.device("cpu")
    cfg, info = config.parse(argv), arch.read(str(tmp_path), need_weights=True)
    usual = skeleton.choose_kernels

    def choose(cfg, device, extra):
        kernel = {"attention": "sdpa", "has_row_kernel": True} if extra == "sinks" else {}
        return dataclasses.replace(usual(cfg, device, extra), **kernel)

    with (
        patch.object(skeleton, "choose_kernels", choose),
        patch.object(skeleton, "_spare_masks", lambda *_: False),
    ):
        note = skeleton.build(info, cfg, device).kernels.note
    assert "attention eager (no GPU, sinks of another form)" in note
    on_gpu = config.parse([argv[0]])
    assert not sizes.is_eager(on_gpu, info.attention_extra, "cuda")
    odd = dataclasses.replace(info, config=info.config | {"head_dim": 60})
    assert sizes.is_eager(on_gpu, odd.attention_extra, "cuda")
    assert "(no GPU, sinks of heads of 60)" in usual(cfg, device, odd.attention_extra).note


MERGED = ("gpt_oss", "qwen3_5_text", "granitemoe", "nemotron_h", "phi3", "mixtral", "gpt_neox")


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_of_several_kinds_is_that_of_the_adapter(tmp_path, world, name):
    """Experts in one tensor, linear attention, shared keys: written as the base has them."""
    base, out = tmp_path / "model", tmp_path / "adapter"
    tiny_models.save(base, name)
    flags = ("--train_type=qlora", "--precision=fp32", "--quant_cache=off", f"--output_dir={out}")
    model, info, cfg = build(config.parse([f"--model_name={base}", *flags]), world)
    tiny.fill_lora(model)
    out.mkdir()
    model_files.save(model, info, cfg, None, is_writer=True)
    ids = torch.arange(40)[None]
    found = tiny.merged_logits(out, ids, f"--model_name={base}")
    with torch.no_grad():
        assert share(model.eval()(ids)[0, -1], found) < 1e-4


def edit_files(path: Path, edit) -> None:
    """Write the tensors of a model anew, `edit` having changed the dict of them."""
    tensors = load_file(path / "model.safetensors")
    save_file(edit(tensors) or tensors, path / "model.safetensors", {"format": "pt"})


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def same_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def no_prefix(tensors):
    return {re.sub(r"^(model|transformer)\.", "", name): t for name, t in tensors.items()}


def foretelling(tensors):
    """Layers behind the last one, and by names of their own, that foretell further tokens."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    layer = {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{last}.")}
    tensors |= {n.replace(f".{last}.", f".{last + 1}.", 1): t.clone() for n, t in layer.items()}
    tensors |= {f"model.layers.{last + 1}.eh_proj.weight": torch.ones(4, 8)}
    tensors |= {"mtp.layers.0.norm.weight": torch.ones(4), "mtp.fc.weight": torch.ones(4, 4)}


def old_buffers(tensors):
    """Masks, as Pythia's files have them."""
    masks = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    tensors |= {f"gpt_neox.layers.1.attention.{name}": mask for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("name", "edit", "is_tied"),
    [
        ("gpt_neox", old_buffers, False),
        ("glm4_moe", foretelling, False),
        ("llama, tied", other_head, False),
        ("llama, tied", same_head, True),
        ("llama, tied", only_head, True),
        ("gemma", other_head, False),
        ("llama, tied", no_prefix, True),
        ("llama", no_prefix, False),
        ("cohere", other_head, False),
        *[(name, no_prefix, True) for name in ("bloom", "opt", "olmo2")],
    ],
)
def test_files_are_read_as_transformers_reads_them(tmp_path, world, name, edit, is_tied):
    """The head of a tied config that is another; one name for both; names of a part."""
    tiny_models.save(tmp_path / "model", name)
    edit_files(tmp_path / "model", edit)
    if edit is foretelling:
        edit_json(tmp_path / "model" / "config.json", num_nextn_predict_layers=1)
    found = judge(tmp_path / "model", world)
    assert found.verdict == "equal", found
    info = arch.read(str(tmp_path / "model"), need_weights=True)
    assert name == "olmo2" or info.is_tied == is_tied


def test_a_head_that_config_json_wants_and_the_files_lack_is_no_copy(tmp_path):
    tiny_models.save(tmp_path, "cohere")  # a type that no table knows
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"1 tensor \(lm_head.weight\) in .*: absent from"):
        arch.read(str(tmp_path), need_weights=True)


def tables_of(name: str, size: int) -> list[str]:
    """Tensors of a model, built without memory, that grow with the positions it is to know."""
    own = tiny_models.tiny_config(name)
    own.get_text_config().max_position_embeddings = size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors |= {f"{n}.{k}": t for n, m in model.named_modules() for k, t in vars(m).items()}
    found = {n: t.shape for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return [name for name, shape in found.items() if {size, size + 2} & {*shape}]


def test_types_that_look_positions_up_are_known():
    """XGLM makes its table longer when a row wants it."""
    part = TABLE.read_text().partition("## Accepted")[2].partition("\n## ")[0]
    names = {name.partition(",")[0] for name in re.findall(r"^\| ([a-z]\S+)", part, re.M)} - {
        "type"
    }
    assert len(names) > 100
    found = {name for name in names if tables_of(name, 53)} - {"xglm"}
    assert found == {*arch.info.POSITION_TABLES}


@pytest.mark.parametrize("name", [*arch.info.POSITION_TABLES, "xglm", "llama"])
def test_rows_beyond_the_table_of_positions_are_refused_before_weights_are_read(tmp_path, name):
    tiny_models.save(tmp_path, name)
    keys = json.loads((tmp_path / "config.json").read_text()).keys()
    key = "n_positions" if "n_positions" in keys else "max_position_embeddings"
    edit_json(tmp_path / "config.json", **{key: 40})
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ids = torch.arange(41)[None] + 3
    made(ids[:, :40])
    is_cut = name in arch.info.POSITION_TABLES
    cfg = config.parse([f"--model_name={tmp_path}", "--weights=random", "--context_length=40"])
    info = arch.read(cfg.model_name, need_weights=True)  # their headers
    sizes.check_context(info, cfg, 1)
    with pytest.raises((IndexError, RuntimeError)) if is_cut else contextlib.nullcontext():
        made(ids)
    words = f"a {name} model knows positions of 40 tokens; use 40 or less"
    with pytest.raises(UserError, match=words) if is_cut else contextlib.nullcontext():
        sizes.check_context(info, dataclasses.replace(cfg, context_length=41), 1)


def test_an_answer_ends_at_the_last_position_that_the_model_knows(tmp_path, world):
    tiny_models.save(tmp_path, "opt")
    cfg = config.parse([f"--model_name={tmp_path}", *FLAGS])
    model, *_ = build(cfg, world)
    most = model.decoder.config.max_position_embeddings
    names = {"eos_token_id": None, "name_or_path": ""}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)), **names)
    said = inference.answer(model, tokenizer, [7] * (most - 4), 48, world)
    assert len(said.split()) == 5  # the last one's place is never read
    with pytest.raises(
        UserError, match=f"a prompt of {most + 1} tokens: the model knows positions"
    ):
        inference.answer(model, tokenizer, [7] * (most + 1), 48, world)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_none(tmp_path, world, window):
    path = tmp_path / "model"
    tiny_models.save(path, "mistral")
    edit_json(path / "config.json", sliding_window=window)
    cfg = config.parse([f"--model_name={path}", *FLAGS])
    model, *_ = build(cfg, world)
    assert "attention_dropout 0.1 is off" in model.kernels.note
    flats, samples = tiny.fill_lora(model), make_samples(3)
    own = run(model, collate(samples, 1), world)
    raw = json.loads((path / "config.json").read_text()) | {"sliding_window": None}
    (path / "config.json").write_text(json.dumps(raw))
    lora = tiny.lora_dict(model, flats)
    assert max(differences(own, reference(path, lora, cfg, samples)).values()) < TOLERANCE


def test_a_single_file_beside_the_index_of_another_model_is_refused(tmp_path):
    path = tmp_path / "model"
    tiny_models.save(path, "llama")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors, path / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert arch.read(str(path), need_weights=True).num_layers == tiny_models.LAYERS
    edit_files(path, lambda tensors: {n: t + 1 for n, t in tensors.items()})
    with pytest.raises(UserError, match=r"model.safetensors: holds another model than the files"):
        arch.read(str(path), need_weights=True)


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "solar_open", "qwen2_moe", "llama"])
def test_it_is_said_where_plain_peft_computes_otherwise(tmp_path, world, name):
    """What is merged computes in transformers as in training, of these types too."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    path, samples = tmp_path / "model", make_samples(1)
    tiny_models.save(path, name)
    cfg = config.parse([f"--model_name={path}", *FLAGS])
    model, info, _ = build(cfg, world)
    lora = tiny.lora_dict(model, tiny.fill_lora(model))
    names = sorted({key.split(".")[-3] for key in lora})
    LoraConfig(r=4, lora_alpha=8, target_modules=names).save_pretrained(tmp_path)
    save_file({n: t.contiguous() for n, t in lora.items()}, tmp_path / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        ids = collate(samples, 1).input_ids
        found = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits[:, -1:]
        trained = model.eval()(ids)
    is_same = torch.allclose(trained, found, 1e-4, 1e-4)
    merged = tiny.merged_logits(tmp_path, ids, f"--model_name={path}")
    assert torch.allclose(merged, trained[0, -1], 1e-4, 1e-4)
    assert is_same == (adapters.peft_note(model, info) == "")
    assert is_same == (name in ("qwen2_moe", "llama"))
