"""What a run has saved over its base, read without torch, and the record of that base.

That is a LoRA or DoRA adapter in peft's format, or the new layers of LLaMA-Pro.

The record lies in the header of the weights, so that it goes wherever they go: the format that the
base was quantized to, the dtype it computed in, and a digest that tells one base from another.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora import __version__
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import TensorRef, describe, read_header, read_json
from fsdp_qlora.config import TrainConfig, from_record
from fsdp_qlora.errors import INTEGRITY, UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REFERENCE_NAME = "model_state_dict.safetensors"  # what AnswerDotAI/fsdp_qlora saves
RECORD_KEY = "fsdp_qlora"
LAYERS_NAME = "new_layers.safetensors"  # of LLaMA-Pro, by the names of the model's files
SIDES = r"(?P<side>A|B|magnitude_vector)"
PAIR_NAME = re.compile(rf"base_model\.model\.(?P<module>.+)\.lora_{SIDES}(\.weight)?")
# Keys of adapter_config.json that may say anything, because the tensors tell it, or because it is
# looked at here; every other one must be absent, false or empty.
KNOWN_KEYS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these change the base at the start
SAMPLE_BYTES = 4096  # of every tensor, for the digest of a base
SNAPSHOT = re.compile(r"(?:.*/)?models--(.+?)--(.+)/snapshots/([^/]+)/?")  # of the hub's cache
BY_PEFT = "merge it with peft's merge_and_unload"


@dataclass(frozen=True)
class Pair:
    """LoRA matrices of one linear; it gains scale * B @ A.

    Args:
        a: [R, I].
        b: [O, R].
        scale: alpha / R, or alpha / sqrt(R).
        magnitude: [O], of DoRA: the length that each row then gets; None for LoRA.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    magnitude: TensorRef | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Args:
        path: its directory.
        base_name: directory, or hub name with @revision, of its base.
        pairs: linear in the model ("model.layers.0.self_attn.q_proj") -> its matrices.
        record: what this program wrote about the base; empty for an adapter made elsewhere.
        replaced: tensor of the model ("lm_head.weight") -> what stands for it.
    """

    path: Path
    base_name: str
    pairs: dict[str, Pair]
    record: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, TensorRef] = field(default_factory=dict)

    def __str__(self) -> str:
        """What it holds, for the console."""
        ranks = ", ".join(map(str, sorted({pair.a.shape[0] for pair in self.pairs.values()})))
        parts = [f"rank {ranks} on {len(self.pairs)} linears"] * bool(self.pairs)
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
        record = _read_record(layers)
        return SavedAdapter(path, str(record.get("base", "")), {}, record, read_header(layers))
    config = _read_config(path)
    file = path / WEIGHTS_NAME
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
        elif match is None or len(ref.shape) != dims.get(match["side"]):
            unknown.append(name)
        else:
            found.setdefault(match["module"], {})[match["side"]] = ref
    if unknown:
        raise UserError(f"{describe(unknown)} in {file}", "is no LoRA matrix of a linear", BY_PEFT)
    lacking = [name for name in saved if not any(name in key.split(".") for key in replaced)]
    if lacking:
        got, rule = (
            f"modules_to_save {lacking[0]} in {path / CONFIG_NAME}",
            f"is not in {file.name}",
        )
        raise UserError(got, rule, "take both files from the same place", INTEGRITY)
    if not found:
        rule = "holds no LoRA matrices"
        raise UserError(str(file), rule, "give the directory of a trained adapter", INTEGRITY)
    pairs = {name: _pair(name, sides, config, file) for name, sides in found.items()}
    return SavedAdapter(path, _base_of(config), pairs, _read_record(file), replaced)


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
    config = read_json(adapter.path / CONFIG_NAME)
    known: dict[str, Any] = {}
    if (adapter.path / "run_config.json").is_file():
        known = vars(run_config(adapter.path))
    targets = config.get("target_modules") or "all"
    return {
        "train_type": "bnb_dora" if config.get("use_dora") else "qlora",
        **known,
        **({"model_name": adapter.base_name} if adapter.base_name else {}),
        "lora_rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": config.get("use_rslora", False),
        "modules_to_save": ",".join(config.get("modules_to_save") or ()) or None,
        "lora_target_modules": targets if isinstance(targets, str) else ",".join(targets),
    }


def check(adapter: SavedAdapter, info: ModelInfo) -> None:
    """See that an adapter belongs to a model.

    Args:
        adapter: what `read` found.
        info: the base, with its tensors.

    Raises:
        UserError: a linear is absent from the base, or of another shape (code 5).
    """
    remedy = "give the base it was trained on with --model_name"
    absent = [name for name in adapter.pairs if f"{name}.weight" not in info.tensors]
    if absent:
        rule = f"no such linear in {info.path}"
        raise UserError(f"adapter for {describe(absent)}", rule, remedy, INTEGRITY)
    for name, pair in adapter.pairs.items():
        shape = (pair.b.shape[0], pair.a.shape[1])
        if shape != info.tensors[f"{name}.weight"].shape:
            rule = f"is {list(info.tensors[f'{name}.weight'].shape)} in {info.path}"
            raise UserError(f"adapter for {name} {list(shape)}", rule, remedy, INTEGRITY)
    for name, ref in adapter.replaced.items():
        is_copy = info.is_tied and name == "lm_head.weight"
        if not is_copy and (name not in info.tensors or ref.shape != info.tensors[name].shape):
            rule = f"is not so in {info.path}"
            raise UserError(f"{name} {list(ref.shape)}", rule, remedy, INTEGRITY)


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
    if not name or Path(name).expanduser().is_dir():
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
        version, base, format, compute_dtype, digest; see the module.
    """
    return {
        "version": __version__,
        "base": "@".join(filter(None, base_name(info, cfg))),
        "format": cfg.format_name,
        "compute_dtype": cfg.compute_dtype,
        "digest": digest(info),
    }


def metadata(record: dict[str, Any]) -> dict[str, str]:
    """Put a record into the form that a safetensors header takes.

    Args:
        record: see `record_of`.

    Returns:
        Texts by name, with what transformers and peft look for.
    """
    return {"format": "pt", RECORD_KEY: json.dumps(record)}


def digest(info: ModelInfo) -> str | None:
    """Tell a base from others of the same shape, however its files are cut.

    Names, dtypes, shapes and the first bytes of every tensor count.

    Args:
        info: the base.

    Returns:
        16 characters; None for a model without files, or whose files cannot be read any more.
    """
    if not info.tensors:
        return None
    whole = hashlib.sha256()
    files: dict[Path, int] = {}
    try:
        for name, ref in sorted(info.tensors.items()):
            if ref.file not in files:
                files[ref.file] = os.open(ref.file, os.O_RDONLY)
            whole.update(f"{name}:{ref.dtype}:{ref.shape}".encode())
            whole.update(os.pread(files[ref.file], min(ref.nbytes, SAMPLE_BYTES), ref.start))
    except OSError:
        return None  # a finished run must not end here
    finally:
        for number in files.values():
            os.close(number)
    return whole.hexdigest()[:16]


def _read_config(path: Path) -> dict[str, Any]:
    if (path / REFERENCE_NAME).exists() and not (path / CONFIG_NAME).exists():
        remedy = "rename its tensors as the README shows (the reference's state dict)"
        raise UserError(str(path), "holds a state dict of AnswerDotAI/fsdp_qlora", remedy)
    if not (path / CONFIG_NAME).is_file():
        remedy = "give the output directory of a run"
        raise UserError(f"--adapter {path}", f"holds no {CONFIG_NAME}", remedy)
    config = read_json(path / CONFIG_NAME)
    got = str(path / CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise UserError(got, f"says peft_type {config.get('peft_type')!r}, not LORA", BY_PEFT)
    other = [key for key in sorted(config) if config[key] and key not in KNOWN_KEYS]
    other += ["bias"] * (config.get("bias", "none") != "none")
    if other:
        raise UserError(got, f"uses {', '.join(other)}, which is not plain LoRA", BY_PEFT)
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(OTHER_BASES):
        rule = f"was started with {start}, which changes the base"
        remedy = "convert it with peft's path_initial_model_for_weight_conversion"
        raise UserError(got, rule, remedy)
    return config


def _pair(name: str, sides: dict[str, TensorRef], config: dict[str, Any], file: Path) -> Pair:
    needed = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    if sides.keys() != needed or sides["A"].shape[0] != sides["B"].shape[1]:
        rule = f"has no pair of LoRA matrices: must have {' and '.join(sorted(needed))}"
        raise UserError(f"{name} in {file}", rule, "save it again", INTEGRITY)
    rank = sides["A"].shape[0]
    expected = _by_pattern(config, "rank_pattern", "r", name)
    if rank != expected:
        rule = f"has rank {rank}, and {CONFIG_NAME} says {expected}"
        raise UserError(f"{name} in {file}", rule, "take both files from the same place", INTEGRITY)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", name)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"lora_alpha {alpha!r} for {name}", "must be a number", "correct it")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Pair(sides["A"], sides["B"], alpha / divisor, sides.get("magnitude_vector"))


def _by_pattern(config: dict[str, Any], patterns: str, default: str, name: str) -> Any:
    """The value for a linear: that of the first pattern that its name ends with.

    Source: huggingface/peft, src/peft/utils/other.py (get_pattern_key).
    """
    for key, value in (config.get(patterns) or {}).items():
        try:
            is_match = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            rule = f"is no pattern ({error})"
            raise UserError(f"{patterns} {key!r}", rule, "correct it") from None
        if is_match:
            return value
    return config.get(default)


def _read_record(weights: Path) -> dict[str, Any]:
    """The record in the header; without one, what run_config.json beside it tells."""
    path = weights.parent
    with weights.open("rb") as file:
        raw = file.read(int.from_bytes(file.read(8), "little"))
    text = json.loads(raw).get("__metadata__", {}).get(RECORD_KEY)
    if text is not None:
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            rule = "has a damaged record of its base"
            raise UserError(str(weights), rule, "copy it again", INTEGRITY)
        return record
    if not (path / "run_config.json").is_file():
        return {}
    cfg = run_config(path)
    return {"base": cfg.model_name, "format": cfg.format_name, "compute_dtype": cfg.compute_dtype}


def run_config(path: Path) -> TrainConfig:
    """Read the options of the run that an adapter came from.

    Args:
        path: its directory, with run_config.json; options that are unknown today are left out.

    Returns:
        The options.

    Raises:
        UserError: it is absent (code 2) or damaged (code 5).
    """
    return from_record(read_json(path / "run_config.json"))[0]
