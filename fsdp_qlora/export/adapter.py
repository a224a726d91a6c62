"""What a run has saved over its base, read without torch, and the record of that base.

That is a LoRA or DoRA adapter in peft's format, or the new layers of LLaMA-Pro.

The record lies in the header of the weights, so that it goes wherever they go: the format that the
base was quantized to, the dtype it computed in, and a digest that tells one base from another.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from fsdp_qlora import __version__, arch, atomic, checkpoint_store, cli, config
from fsdp_qlora.arch import ModelInfo, TensorRef
from fsdp_qlora.arch.files import TOKENIZER_FILES, describe, read_header, read_json, same_bytes
from fsdp_qlora.arch.targets import ALL_LINEARS, by_pattern, find_targets, module_names
from fsdp_qlora.config import HQQ_FORMATS, PRECISIONS, TRAIN_TYPES, TrainConfig, from_record
from fsdp_qlora.errors import INTEGRITY, UserError, read_table
from fsdp_qlora.planning.sizes import ENDS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REFERENCE_NAME = "model_state_dict.safetensors"  # what AnswerDotAI/fsdp_qlora saves
RECORD_KEY = "fsdp_qlora"
LAYERS_NAME = "new_layers.safetensors"  # of LLaMA-Pro, by the names of the model's files
IN_LAYER = re.compile(r".*?\.\d+\.(.+)")  # a linear of a layer, by its name in the layer
EXPERTS = re.compile(r".*?\.(\d+)\.(?:.*\.)?experts(\.base_layer)?")  # both sides, in peft's files
EACH = "per_expert"  # directory with the same adapter by names of single experts
PAIR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(\.weight)?")
TABLE = read_table(__file__)
TYPES = {"alpha_pattern": dict, "rank_pattern": dict, "modules_to_save": list}
SNAPSHOT = re.compile(r"(?:.*/)?models--(.+?)--(.+)/snapshots/([^/]+)/?")  # of the hub's cache
SELECTION = ("lora_exclude_modules", "layers_to_transform")
OPEN = ("lora_dropout", "lora_target_modules", "model_name", *SELECTION)  # may be others than its
BY_PEFT = "merge it with peft's merge_and_unload"
OWN_BASE = "give the base it was trained on with --model_name"
SAME_PLACE = "take both files from the same place"
OF_TOKENIZER = (*TOKENIZER_FILES, *TABLE["of_tokenizer"])


class Pair(NamedTuple):
    """LoRA matrices of one linear; it gains scale * B @ A.

    Args:
        a: [R, I].
        b: [O, R].
        scale: alpha / R, or alpha / sqrt(R).
        magnitude: [O], of DoRA: the length that each row then gets; None for LoRA.
        num_experts: whose matrices these are, A expert by expert, B rank by rank; 1 of a linear.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    magnitude: TensorRef | None = None
    num_experts: int = 1

    @property
    def rank(self) -> int:
        """R, of one expert."""
        return self.a.shape[0] // self.num_experts


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Args:
        path: its directory.
        base_name: directory, or hub name with @revision, of its base.
        pairs: linear in the model ("model.layers.0.self_attn.q_proj") -> its matrices.
        record: what this program wrote about the base; empty for an adapter made elsewhere.
        replaced: tensor of the model ("lm_head.weight") -> what stands for it.
        experts: experts of a layer, as peft names what they read ("model.layers.0.mlp.experts.
            base_layer") and what they write ("model.layers.0.mlp.experts") -> their matrices.
    """

    path: Path
    base_name: str
    pairs: dict[str, Pair]
    record: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, TensorRef] = field(default_factory=dict)
    experts: dict[str, Pair] = field(default_factory=dict)

    @cached_property
    def expert_places(self) -> dict[tuple[int, bool], Pair]:
        """(Layer, whether it is what they read) -> matrices of its experts."""
        found = ((EXPERTS.fullmatch(name), pair) for name, pair in self.experts.items())
        return {(int(m[1]), m[2] is not None): pair for m, pair in found if m}

    def __str__(self) -> str:
        """What it holds, for the console."""
        ranks = ", ".join(map(str, sorted({pair.a.shape[0] for pair in self.pairs.values()})))
        parts = [f"rank {ranks} on {len(self.pairs)} linears"] * bool(self.pairs)
        layers = len({layer for layer, _ in self.expert_places})
        own = ", ".join(map(str, sorted({pair.rank for pair in self.experts.values()})))
        parts += [f"rank {own} on the experts of {layers} layers"] * bool(layers)
        return ", ".join(parts + [f"{len(self.replaced)} whole tensors"] * bool(self.replaced))


def read(path: Path) -> SavedAdapter:
    """Read an adapter.

    Args:
        path: directory of an adapter in peft's format, or of the new layers of LLaMA-Pro.

    Returns:
        What it holds; no weight is read.

    Raises:
        UserError: it is none, is not plain LoRA (code 2), or its files disagree (code 5).
    """
    layers = path / LAYERS_NAME
    if layers.is_file():
        tensors, record = read_header(layers), _read_record(layers)
        return SavedAdapter(path, str(record.get("base", "")), {}, record, tensors)
    config, file = _read_config(path), path / WEIGHTS_NAME
    if not file.exists() and (path / "adapter_model.bin").exists():
        rule = "is pickled, which can run code and is never read"
        raise UserError(str(path / "adapter_model.bin"), rule, "save it as safetensors with peft")
    found: dict[str, dict[str, TensorRef]] = {}
    dims = {"A": 2, "B": 2} | ({"magnitude_vector": 1} if config.get("use_dora") else {})
    unknown, replaced, saved = [], {}, config.get("modules_to_save") or []
    for name, ref in read_header(file).items():
        match = PAIR_NAME.fullmatch(name)
        if name.removesuffix(".weight").rpartition(".")[2] in saved:
            replaced[name.removeprefix("base_model.model.")] = ref
        elif match is None or len(ref.shape) != dims.get(match[2]):
            unknown.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = ref
    if unknown:
        raise UserError(f"{describe(unknown)} in {file}", "is no LoRA matrix of a linear", BY_PEFT)
    for name in saved:
        if not any(name in key.split(".") for key in replaced):
            got = f"modules_to_save {name} in {path / CONFIG_NAME}"
            raise UserError(got, f"is not in {file.name}", SAME_PLACE, INTEGRITY)
    if not found:
        remedy = "give the directory of a trained adapter"
        raise UserError(str(file), "holds no LoRA matrices", remedy, INTEGRITY)
    pairs = {name: _pair(f"{name} in {file}", sides, config) for name, sides in found.items()}
    experts = {name: pairs.pop(name) for name in found if pairs[name].num_experts > 1}
    return SavedAdapter(path, _base_of(config), pairs, _read_record(file), replaced, experts)


def fault(directory: Path, cfg: TrainConfig) -> str:
    """What is missing or damaged of the result of a finished run, in words; "" for nothing.

    Args:
        directory: of the run.
        cfg: the run.
    """
    try:
        is_model = cfg.train_type == "full"
        arch.read(str(directory), need_weights=True) if is_model else read(directory)
    except UserError as error:
        return f"{error.got} {error.rule}"
    listed = atomic.read_json(directory / checkpoint_store.SUMMARY).get("result", {})
    faults = ((name, checkpoint_store.fault_of(directory / name, listed[name])) for name in listed)
    return next((f"{directory / name} {fault}" for name, fault in faults if fault), "")


def options(adapter: SavedAdapter) -> dict[str, Any]:
    """Collect what the files of an adapter tell of the run that made it.

    Args:
        adapter: what `read` found.

    Returns:
        Options of train.py by name: those of run_config.json, where it is there, below what
        adapter_config.json says.

    Raises:
        UserError: a file is damaged (code 5).
    """
    cfg = run_config(adapter.path)
    known = {} if cfg is None else vars(cfg)
    known = known | ({"model_name": adapter.base_name} if adapter.base_name else {})
    if not adapter.pairs:
        return {"train_type": "bnb_llama_pro"} | known
    config = read_json(adapter.path / CONFIG_NAME)
    rank = max(pair.a.shape[0] for pair in adapter.pairs.values())
    alpha, use_rslora = config["lora_alpha"], bool(config.get("use_rslora"))
    if {pair.scale for pair in adapter.pairs.values()} != {_scale(alpha, rank, use_rslora)}:
        alpha, use_rslora = rank, False  # each pair has its own scale, see model/adapters.load
    targets = {inside[1] for name in adapter.pairs if (inside := IN_LAYER.fullmatch(name))}
    return {
        "expert_lora_rank": _expert_rank(adapter),
        **_format_options(adapter.record.get("format"), bool(config.get("use_dora"))),
        **known,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "modules_to_save": ",".join(config.get("modules_to_save") or ()) or None,
        "lora_target_modules": ",".join(sorted(targets)) or "all",
        **dict.fromkeys((*SELECTION, "rank_pattern", "alpha_pattern", "init_adapter")),
    }


def locate(name: str) -> Path:
    """Find the directory of an adapter.

    Args:
        name: a directory, or a hub name with @REVISION behind it or without.

    Raises:
        UserError: gated, unknown or out of reach on the hub (code 3).
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    return arch.files.download(name, [CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"], [])


def expand_init(argv: Sequence[str]) -> list[str]:
    """Put behind --init_adapter all that it stands for, see `_start_options`.

    Args:
        argv: arguments of `train` or `plan`.

    Raises:
        UserError: it is no adapter that can be trained here (code 2), or the user says otherwise.
    """
    given = cli.Reader(TrainConfig, config.ALIASES, config.RECIPES_DIR).read(argv)[0]
    if not given.get("init_adapter"):
        return list(argv)
    adapter, flags = read(locate(given["init_adapter"])), []
    for name, value in _start_options(adapter, given.get("train_type", "qlora")).items():
        mine = given.get(name, value)
        is_same = name in OPEN or mine == value
        if name == "train_type":
            is_same = TRAIN_TYPES[mine].adapter == TRAIN_TYPES[value].adapter
        elif name in ("rank_pattern", "alpha_pattern"):  # JSON may be written in several ways
            is_same = json.loads(mine or "{}") == json.loads(value or "{}")
        if not is_same:
            got, rule = f"--{name} {cli.to_text(mine)}", f"{adapter.path} has {cli.to_text(value)}"
            raise UserError(got, rule, "leave it out, or start without --init_adapter")
        if name not in given and value is not None:
            flags.append(f"--{name}={cli.to_text(value)}")
    return [*argv, *flags]


def _start_options(adapter: SavedAdapter, train_type: str) -> dict[str, Any]:
    """The options of a run that goes on from an adapter, as far as it tells them."""
    if not adapter.pairs:
        rule = "holds new layers of LLaMA-Pro, no LoRA"
        raise UserError(f"--init_adapter {adapter.path}", rule, "give it as --llama_pro_path")
    known, pairs = read_json(adapter.path / CONFIG_NAME), adapter.pairs
    kind = TRAIN_TYPES[train_type]._replace(adapter="dora" if known.get("use_dora") else "lora")
    layers = known.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    layers = [str(layer) for layer in layers if any(f".{layer}." in name for name in pairs)]
    found = {
        "train_type": next(name for name, row in TRAIN_TYPES.items() if row == kind),
        "lora_rank": known.get("r"),
        "lora_alpha": known.get("lora_alpha"),
        "use_rslora": bool(known.get("use_rslora")),
        "lora_dropout": float(known.get("lora_dropout") or 0),
        "expert_lora_rank": _expert_rank(adapter) or None,
        "modules_to_save": ",".join(known.get("modules_to_save") or ()) or None,
        "lora_target_modules": _target_text(known.get("target_modules"), pairs),
        "lora_exclude_modules": _pattern(known.get("exclude_modules")),
        "layers_to_transform": ",".join(layers) or None,
        "model_name": adapter.base_name or None,
    }
    for name in ("rank_pattern", "alpha_pattern"):
        table = known.get(name) or {}
        used = [k for k in table if any(by_pattern({name: {k: 1}}, name, "", p) for p in pairs)]
        found[name] = json.dumps({key: table[key] for key in used}) if used else None
    return found


def _pattern(names: str | list[str] | None) -> str | None:
    """A list as the pattern that matches the same; a pattern as it is."""
    if isinstance(names, str | None):
        return names or None
    return rf"(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"


def _target_text(names: str | list[str] | None, pairs: Collection[str]) -> str:
    """A list without what matches nothing; a pattern so that it is seen to be one."""
    if isinstance(names, str):
        return names if names in ALL_LINEARS or module_names(names) == names else f"({names})"
    kept = [key for key in names or () if any(f".{name}".endswith(f".{key}") for name in pairs)]
    return ",".join(sorted(kept)) or "all"


def init_facts(name: str | None) -> dict[str, Any]:
    """What all ranks must begin with: a hash of the weights of --init_adapter, if there is one."""
    file = locate(name) / WEIGHTS_NAME if name else None
    return {} if file is None else {"init_adapter": checkpoint_store.listing(file)["sha256"]}


def check_init(cfg: TrainConfig, info: ModelInfo, say: Callable[[str], Any]) -> None:
    """See that a run can go on from its --init_adapter, before anything is loaded.

    Args:
        cfg: init_adapter, and what `expand_init` took from it.
        info: the base.
        say: is told where the base is not that of the adapter.

    Raises:
        UserError: it adapts other linears than the options, or is of another shape.
    """
    if cfg.init_adapter is None:
        return
    adapter = read(locate(cfg.init_adapter))
    check_open(adapter, info)
    if info.tensors:
        check(adapter, info)
    held: dict[Any, int] = {name: pair.rank for name, pair in adapter.pairs.items()}
    held |= {str(place): pair.rank for place, pair in adapter.expert_places.items()}
    wanted, layers = dict[str, int](), enumerate(find_targets(info, cfg))
    for index, row in ((index, row) for index, layer in layers for row in layer):
        name = info.outer_name(f"{info.layers_prefix}.{index}.{row.linear.name}")
        expert = str((index, row.linear.last_name != "down_proj"))
        wanted[expert if row.num_experts > 1 else name] = row.rank
    own_scales = {pair.scale for pair in adapter.experts.values()}
    if own_scales and own_scales != {pair.scale for pair in adapter.pairs.values()}:
        rule = "scales the experts' matrices otherwise than those of the linears"
        raise UserError(f"--init_adapter {adapter.path}", rule, "start without --init_adapter")
    if other := sorted(dict(held.items() ^ wanted.items())):
        rule = f"adapts {len(held)} linears, and the options {len(wanted)}: {describe(other)}"
        remedy = "leave out the options that choose linears"
        raise UserError(f"--init_adapter {adapter.path}", rule, remedy)
    own = {cfg.model_name, "@".join(filter(None, base_name(info, cfg)))}
    named = {adapter.base_name, config.split_name(adapter.base_name)[0]}
    try:
        check_base(adapter, info)
        if not named & {"", *own, *(config.split_name(name)[0] for name in own)}:
            rule = f"names {adapter.base_name} as its base, not {cfg.model_name}"
            say(f"note      {adapter.path} {rule}")
    except UserError as fault:
        say(f"warning   {fault.got} {fault.rule}")
    say(f"adapter   goes on from {adapter.path}: {adapter}")
    if note := base_note(adapter, cfg.format_name):
        say(note)


def _format_options(name: str | None, is_dora: bool) -> dict[str, Any]:
    """The options that quantize a base to a format; None, it is not known: as it is stored."""
    kind = "dora" if is_dora else "lora"
    if name in (None, "bf16"):
        return {"train_type": kind}
    if name in HQQ_FORMATS:
        numbers = zip(("n_bits", "group_size", "hqq_axis"), HQQ_FORMATS[name], strict=True)
        return {"train_type": f"hqq_{kind}", **dict(numbers)}
    codes = {"quant_type": str(name).removesuffix("_dq"), "double_quant": name.endswith("_dq")}
    return {"train_type": "bnb_dora" if is_dora else "qlora", **codes}


def base_note(adapter: SavedAdapter, format_name: str) -> str:
    """Say that a base is not computed as the adapter was trained over it.

    Args:
        adapter: what `read` found.
        format_name: row of planning.sizes.FORMATS that the base is computed in.

    Returns:
        A line; empty where both are the same.
    """
    trained_over = adapter.record.get("format")
    if trained_over == format_name:
        return ""
    here = "16 bit" if format_name == "bf16" else format_name
    was = "16 bit" if trained_over == "bf16" else trained_over
    told = f"was trained over a base in {was}" if was else "does not tell what it was trained over"
    return f"note      {adapter.path} {told}; its base is in {here} here"


def check_base(adapter: SavedAdapter, info: ModelInfo, any_base: bool = False) -> None:
    """See that a base is the one that an adapter was trained on, where its record tells.

    Args:
        adapter: what `read` found.
        info: the base.
        any_base: take another one, too.

    Raises:
        UserError: it is another one (code 2).
    """
    name = "samples" if "samples" in adapter.record else "digest"
    trained_on = adapter.record.get(name) if info.tensors and not any_base else None
    if trained_on not in (None, info.digest() if name == "samples" else info.digest(1)):
        rule = f"is not the base that {adapter.path} was trained on ({adapter.record.get('base')})"
        remedy = "give that one with --model_name, or add --any_base true"
        raise UserError(str(info.path), rule, remedy)


def check_open(adapter: SavedAdapter, info: ModelInfo) -> None:
    """See that a model with adapters on the linears of its layers can compute an adapter.

    Args:
        adapter: what `read` found.
        info: the base.

    Raises:
        UserError: it changes something else (code 2), or is not of this base (code 5).
    """
    places = info.linear_places().items()
    is_dense = {name: info.by_layer[at].linears[i].expert is None for name, (at, i) in places}
    known = {info.outer_name(name) for name in is_dense if is_dense[name]}
    outside = [name for name in adapter.pairs if f"{name}.weight" not in known]
    if adapter.pairs:
        outside += [name for name in adapter.replaced if name.split(".")[-2] not in ENDS]
    if info.tensors and (outside or (adapter.pairs and adapter.replaced)):
        check(adapter, info)
    if outside:
        rule = "is changed by it; here only linears of the layers, embedding and head can be"
        remedy = "merge it (python -m fsdp_qlora export merged), give the result as --model_name"
        raise UserError(f"{adapter.path}: {describe(outside)}", rule, remedy)


def check(adapter: SavedAdapter, info: ModelInfo) -> None:
    """See that an adapter belongs to a model.

    Args:
        adapter: what `read` found.
        info: the base, with its tensors.

    Raises:
        UserError: a linear is absent from the base, or of another shape (code 5).
    """
    shapes = {name: ref.shape for name, ref in adapter.replaced.items()}
    for name, pair in adapter.pairs.items():
        shapes[f"{name}.weight"] = pair.b.shape[0], pair.a.shape[1]
    if info.is_tied:
        shapes.pop("lm_head.weight", None)  # a copy
        _check_copy(adapter)
    for (layer, is_in), pair in adapter.expert_places.items():
        sides = arch.targets.expert_sides(info, layer) if layer < info.num_layers else []
        sides = sides[:1] if is_in else sides[1:]
        found = (pair.b.shape[0], pair.a.shape[1]), pair.num_experts
        if found not in [(linear.shape, num) for linear, num in sides]:
            got = f"adapter for {found[1]} experts of {list(found[0])} in layer {layer}"
            raise UserError(got, f"no such experts in {info.path}", OWN_BASE, INTEGRITY)
    there = {info.outer_name(name): ref.shape for name, ref in info.tensors.items()}
    for name, shape in shapes.items():
        stored = there.get(name)
        if stored != shape:
            rule = f"{f'is {list(stored)}' if stored else 'no such linear'} in {info.path}"
            got = f"adapter for {name.removesuffix('.weight')} {list(shape)}"
            raise UserError(got, rule, OWN_BASE, INTEGRITY)


def _check_copy(adapter: SavedAdapter) -> None:
    """Of a tied base: a head that peft has trained by itself is no copy of the embedding."""
    head = adapter.replaced.get("lm_head.weight")
    if head is None or not adapter.pairs:
        return
    names = (name for name in adapter.replaced if name.split(".")[-2] == ENDS[0])
    embeddings = (adapter.replaced[name] for name in names)
    if not any(same_bytes(head, embedding, head.nbytes) for embedding in embeddings):
        rule = "was trained apart from the embedding, and its base has one matrix for both"
        remedy = "merge it with peft, into a base with tie_word_embeddings false"
        raise UserError(f"{adapter.path}: lm_head.weight", rule, remedy)


def base_name(info: ModelInfo, cfg: TrainConfig) -> tuple[str, str | None]:
    """Name the base of a run so that it is found from any directory, on other machines too.

    Args:
        info: the base.
        cfg: of the run.

    Returns:
        Name on the hub and revision, or the absolute path of a directory and None.
    """
    if info.path is None:
        return cfg.model_name, None
    path = info.path.absolute()
    match = SNAPSHOT.fullmatch(str(path))
    return (f"{match[1]}/{match[2]}", match[3]) if match else (str(path), None)


def _base_of(config: dict[str, Any]) -> str:
    """The base in adapter_config.json, with its revision, as arch.read takes it."""
    name, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if not name or os.path.isdir(os.path.expanduser(name)):
        return name
    if match := SNAPSHOT.fullmatch(name):  # of another machine's cache
        name, revision = f"{match[1]}/{match[2]}", match[3]
    return f"{name}@{revision}" if revision and name.count("/") == 1 else name


def record_of(info: ModelInfo, cfg: TrainConfig) -> dict[str, Any]:
    """What an adapter must say of its base, so that it can be merged as it was trained.

    Args:
        info: the base.
        cfg: of the run.

    Returns:
        version, base, format, compute_dtype, digest (for older versions), samples; see the module.
    """
    base = "@".join(filter(None, base_name(info, cfg)))
    found: dict[str, Any] = {"version": __version__, "base": base, "format": cfg.format_name}
    found |= {"compute_dtype": cfg.compute_dtype, "digest": info.digest(1)}
    return found | {"samples": info.digest()}


def metadata(record: dict[str, Any]) -> dict[str, str]:
    """Put a record into the form that a safetensors header takes.

    Args:
        record: see `record_of`.

    Returns:
        Texts by name, with what transformers and peft look for.
    """
    return {"format": "pt", RECORD_KEY: json.dumps(record)}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        if (path / REFERENCE_NAME).exists():
            remedy = "rename its tensors as the README shows (the reference's state dict)"
            raise UserError(str(path), "holds a state dict of AnswerDotAI/fsdp_qlora", remedy)
        remedy = "give the output directory of a run"
        raise UserError(f"--adapter {path}", f"holds no {CONFIG_NAME}", remedy)
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        rule = f"says peft_type {config.get('peft_type')!r}, not LORA"
        raise UserError(str(file), rule, BY_PEFT)
    other = [key for key in sorted(config) if config[key] and key not in TABLE["known_keys"]]
    other += ["bias"] * (config.get("bias", "none") != "none")
    if other:
        raise UserError(str(file), f"uses {', '.join(other)}, which is not plain LoRA", BY_PEFT)
    for key, kind in TYPES.items():
        if not isinstance(config.get(key) or kind(), kind):
            rule = f"must be {'a list' if kind is list else 'an object'}"
            raise UserError(f"{key} = {config[key]} in {file}", rule, "copy it again", INTEGRITY)
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(tuple(TABLE["other_bases"])):
        rule = f"was started with {start}, which changes the base"
        remedy = "convert it with peft's path_initial_model_for_weight_conversion"
        raise UserError(str(file), rule, remedy)
    return config


def _pair(place: str, sides: dict[str, TensorRef], config: dict[str, Any]) -> Pair:
    """The matrices of a linear; `place` is "LINEAR in FILE"."""
    name = place.partition(" in ")[0]
    needed = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    if sides.keys() != needed or sides["A"].shape[0] != sides["B"].shape[1]:
        rule = f"has no pair of LoRA matrices: must have {' and '.join(sorted(needed))}"
        raise UserError(place, rule, "save it again", INTEGRITY)
    name = _parameter_name(name, config)
    whole, rank = sides["A"].shape[0], by_pattern(config, "rank_pattern", "r", name)
    num = whole // max(rank, 1) if ".experts." in name and name not in place else 1
    if whole != rank * num:
        rule = f"has rank {whole}, and {CONFIG_NAME} says {rank}"
        raise UserError(place, rule, SAME_PLACE, INTEGRITY)
    alpha = by_pattern(config, "alpha_pattern", "lora_alpha", name)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"lora_alpha {alpha!r} for {name}", "must be a number", "correct it")
    scale = _scale(alpha, rank, bool(config.get("use_rslora")))
    return Pair(sides["A"], sides["B"], scale, sides.get("magnitude_vector"), num)


def _parameter_name(name: str, config: dict[str, Any]) -> str:
    """The parameter of a layer's experts that peft's name stands for; another name as it is."""
    match = EXPERTS.fullmatch(name)
    params = {str(part).rpartition(".")[2] for part in config.get("target_parameters") or ()}
    if match is None or not params:
        return name
    own = params - {"down_proj"} if match[2] else params & {"down_proj"}
    if len(params) != 2 or len(own) != 1:
        rule = f"is of {', '.join(sorted(params))}: must be of both sides of the experts"
        raise UserError(name, rule, BY_PEFT)
    return f"{name.removesuffix(match[2] or '')}.{own.pop()}"


def _expert_rank(adapter: SavedAdapter) -> int:
    """The rank of the experts' matrices; 0 without them."""
    ranks = {pair.rank for pair in adapter.experts.values()}
    if len(ranks) > 1:
        rule = "adapts experts with several ranks: here all have one"
        raise UserError(str(adapter.path), rule, BY_PEFT)
    return max(ranks, default=0)


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _read_record(weights: Path) -> dict[str, Any]:
    """The record in the header; without one, what run_config.json beside it tells."""
    with safe_open(weights, "np") as file:
        text = (file.metadata() or {}).get(RECORD_KEY)
    if text is not None:
        record = atomic.parse_json(text.encode())
        texts = [(record or {}).get(name, "") for name in ("base", "format", "digest")]
        are_texts = all(isinstance(text, str | None) for text in texts)
        dtypes = (None, *PRECISIONS.values())
        if record is None or not are_texts or record.get("compute_dtype") not in dtypes:
            rule = "has a damaged record of its base"
            raise UserError(str(weights), rule, "copy it again", INTEGRITY)
        return record
    cfg = run_config(weights.parent)
    if cfg is None:
        return {}
    return {"base": cfg.model_name, "format": cfg.format_name, "compute_dtype": cfg.compute_dtype}


def run_config(path: Path) -> TrainConfig | None:
    """Read the options of the run that an adapter came from.

    Args:
        path: its directory, with run_config.json; options that are unknown today are left out.

    Returns:
        The options; None without the file.

    Raises:
        UserError: it is damaged (code 5).
    """
    file = path / checkpoint_store.CONFIG
    return from_record(read_json(file))[0] if file.is_file() else None
