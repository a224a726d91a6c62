"""What a run trains: adapters, whole decoder layers, tensors outside the layers; and how much."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_qlora.arch.info import ModelInfo, num_layer_params, select_linears
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig
from fsdp_qlora.errors import UserError

NEW_LAYERS = "block_expansion_layers"  # key of config.json, written by `expand`
REFERENCE_DIRECTORY = re.compile(r".*blk_exp-(\d+)-(\d+)")  # how the reference names its result
ENDS = ("embed_tokens", "lm_head")


class Whole(NamedTuple):
    """What is trained itself, without adapters, unquantised.

    Args:
        layers: numbers of decoder layers.
        root: full names of parameters outside the layers.
    """

    layers: tuple[int, ...] = ()
    root: tuple[str, ...] = ()


class Counts(NamedTuple):
    """How many parameters a run trains.

    Args:
        adapters: of the adapters of one decoder layer, `magnitudes` included.
        magnitudes: rows of one decoder layer whose length DoRA learns.
        layer: of one decoder layer, were it trained whole.
        root: outside the decoder layers.
        total: of the model.
    """

    adapters: int
    magnitudes: int
    layer: int
    root: int
    total: int


def has_adapters(cfg: TrainConfig) -> bool:
    """Whether a run trains adapters of linears."""
    return TRAIN_TYPES[cfg.train_type].adapter in ("lora", "dora")


def whole(info: ModelInfo, cfg: TrainConfig) -> Whole:
    """Find what a run trains whole.

    Args:
        info: the model.
        cfg: train_type, modules_to_save.

    Raises:
        UserError: the model has no new layers, or no such module (code 2).
    """
    kind = TRAIN_TYPES[cfg.train_type].adapter
    if kind in ("full", "llama_pro") and any(linear.expert is not None for linear in info.linears):
        rule = "trains whole layers, and those with experts can have adapters only"
        raise UserError(f"--train_type {cfg.train_type}", rule, "use --train_type qlora or lora")
    if kind == "full":
        return Whole(tuple(range(info.num_layers)), tuple(dict(info.root_params)))
    layers = _new_layers(info) if kind == "llama_pro" else ()
    return Whole(layers, _saved(info, cfg.modules_to_save))


def new_layers(num_layers: int, num_new: int) -> tuple[int, ...]:
    """Numbers of the new layers in a block-expanded model.

    One stands behind each of the first `num_new` groups of num_layers // num_new old layers.

    Args:
        num_layers: of the old model.
        num_new: how many there are.

    Source: LLaMA Pro, arXiv 2401.02415, section 3.2; AnswerDotAI/fsdp_qlora, train.py.
    """
    group = num_layers // num_new
    return tuple(group + (group + 1) * number for number in range(num_new))


def count(info: ModelInfo, cfg: TrainConfig) -> Counts:
    """Count the trained parameters.

    Args:
        info: the model.
        cfg: the run.

    Raises:
        UserError: see `whole` and select_linears.
    """
    own, shapes = whole(info, cfg), dict(info.root_params)
    adapted = select_linears(info, cfg.lora_target_modules)
    is_dora = TRAIN_TYPES[cfg.train_type].adapter == "dora"
    magnitudes = sum(linear.out_features for linear in adapted) * is_dora
    lora = sum(cfg.lora_rank * (linear.in_features + linear.out_features) for linear in adapted)
    adapters, layer = has_adapters(cfg) * (lora + magnitudes), num_layer_params(info)
    root = sum(math.prod(shapes[name]) for name in own.root)
    total = adapters * info.num_layers + layer * len(own.layers) + root
    return Counts(adapters, magnitudes, layer, root, total)


def _new_layers(info: ModelInfo) -> tuple[int, ...]:
    if NEW_LAYERS in info.config:
        return tuple(info.config[NEW_LAYERS])
    match = REFERENCE_DIRECTORY.fullmatch((info.path or Path()).name)
    numbers = tuple(map(int, match.groups())) if match else (0, 0)
    if not 0 < numbers[1] - numbers[0] <= numbers[0] or numbers[1] != info.num_layers:
        rule = "has no new blocks to train"
        remedy = "make them with python -m fsdp_qlora expand, give the result as --llama_pro_path"
        raise UserError(str(info.path or info.model_type), rule, remedy)
    return new_layers(numbers[0], numbers[1] - numbers[0])


def _saved(info: ModelInfo, modules: str | None) -> tuple[str, ...]:
    names = {name.strip() for name in (modules or "").split(",")} - {""}
    if unknown := sorted(names - set(ENDS)):
        remedy = f"use some of {','.join(ENDS)}"
        raise UserError(f"modules_to_save {unknown[0]!r}", "cannot be trained whole", remedy)
    if info.is_tied and names:
        names = {ENDS[0]}  # one parameter for both
    found = [name for name, _ in info.root_params if name.split(".")[-2] in names]
    assert len(found) == len(names), "embedding and head are named otherwise"
    return tuple(found)


def adopt_format(
    cfg: TrainConfig, stored: str | None, given: frozenset[str] | None = None
) -> TrainConfig:
    """Take the format of the base from its files, where they are in 4 bit.

    Args:
        cfg: the run.
        stored: format of the files, or None.
        given: names of the options that the user wrote; None: those that are not as usual.

    Returns:
        The run with the format of the files.

    Raises:
        UserError: an option asks for another format (code 2).
    """
    if stored is None or cfg.format_name == stored:
        return cfg
    rule = f"the model is stored as {stored}, whose bytes are kept"
    nf4, is_double = stored.removesuffix("_dq"), stored.endswith("_dq")
    own: dict[str, Any] = {"quant_type": nf4, "double_quant": is_double}
    if TRAIN_TYPES[cfg.train_type].base != "bnb":
        own["train_type"] = "qlora"
    for name, value in own.items():
        got = getattr(cfg, name)
        is_given = got != getattr(TrainConfig, name) if given is None else name in given
        if is_given and got != value:
            remedy = "leave it out, or take the 16-bit original"
            raise UserError(f"--{name} {str(got).lower()}", rule, remedy)
    return dataclasses.replace(cfg, **own)
