"""Which linears get an adapter, of which rank and alpha: by the rules of peft, without torch."""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fsdp_qlora.arch.info import HEADS, JOINED, LayerKind, Linear, ModelInfo, read_size
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import UserError, one_line_of

FUSED = {"gate_up_proj": (0, 1), "up_proj": (1,), "down_proj": (2,)}
FUSED_NAME = re.compile(r".+?\.(?P<layer>\d+)\..+\.experts\.(?P<fused>(gate_)?up_proj|down_proj)")
TURNED = "llama4_text"  # whose experts peft takes for turned
ALL_LINEARS = {"all", "all-linear", "all_linear", "default"}


class Target(NamedTuple):
    """A linear with an adapter.

    Args:
        linear: of one layer; of experts a matrix of one, by the name of the parameter of them all.
        rank, alpha: of its adapter.
        num_experts: 1 of a linear.
    """

    linear: Linear
    rank: int
    alpha: float
    num_experts: int = 1

    @property
    def num_params(self) -> int:
        """Elements of its adapters."""
        return self.num_experts * self.rank * sum(self.linear.shape)


def find_targets(info: ModelInfo, cfg: TrainConfig) -> tuple[tuple[Target, ...], ...]:
    """Choose the linears that get an adapter, by the rules of peft.

    Args:
        info: the model.
        cfg: lora_target_modules ("all", a list as in "q_proj,mlp.up_proj", or a pattern for whole
            names), lora_exclude_modules, layers_to_transform; rank and alpha, and their patterns;
            expert_lora_rank.

    Returns:
        For every layer its linears, in the order of info.linears; behind them its experts.

    Raises:
        UserError: a name or a pattern matches no linear, or none is left (code 2).

    Source: huggingface/peft, src/peft/tuners/tuners_utils.py (check_target_module_exists).
    """
    params = {name for kind in info.kinds for name, _ in kind.params}
    is_outer = "language_model" in (cfg.lora_target_modules or "")  # as an adapter of a wrapper
    places = {
        info.outer_name(f"{info.layers_prefix}.{index}.{linear.name}", is_outer): (index, linear)
        for index, kind in enumerate(info.by_layer)
        for linear in kind.linears
        if linear.expert is None and not _is_read_whole(linear, params)
    }
    wanted, left_out = module_names(cfg.lora_target_modules), module_names(cfg.lora_exclude_modules)
    chosen = _matching("lora_target_modules", wanted, places)
    if layers := layer_numbers(cfg.layers_to_transform):
        got = f"layers_to_transform {cfg.layers_to_transform}"
        if isinstance(wanted, str):
            rule = f"goes with a list of linears, not with the pattern {wanted}"
            raise UserError(got, rule, "put the layers into the pattern")
        if max(layers) >= info.num_layers:
            raise UserError(got, f"the model has {info.num_layers} layers", "count from 0")
        chosen = {name for name in chosen if name in wanted or places[name][0] in layers}
    if left_out:
        chosen -= _matching("lora_exclude_modules", left_out, places)
    if not chosen:
        got = f"lora_target_modules {cfg.lora_target_modules!r}"
        raise UserError(got, "0 modules match it and are not excluded", "choose others")
    ranks = _values(cfg, "rank_pattern", "lora_rank", chosen)
    alphas = _values(cfg, "alpha_pattern", "lora_alpha", chosen)
    targets: list[list[Target]] = [[] for _ in range(info.num_layers)]
    for name, (index, linear) in places.items():
        if name in chosen:
            targets[index].append(Target(linear, ranks[name], alphas[name]))
    rank = expert_rank(info, cfg)
    ratio = rank / cfg.lora_rank  # they are scaled as the linears are
    alpha = cfg.lora_alpha * (math.sqrt(ratio) if cfg.use_rslora else ratio)
    for index in (layers or range(info.num_layers)) if rank else ():
        sides = expert_sides(info, index)
        targets[index] += [Target(linear, rank, alpha, num) for linear, num in sides]
    if cfg.expert_names == "each" and any(n.last_name == JOINED and n.expert for n in info.linears):
        rule = "has no names for one expert: it holds gate and up of all in one tensor"
        raise UserError("--expert_names each", f"{info.model_type} {rule}", "leave it out")
    if rank and all(row.num_experts == 1 for own in targets for row in own):
        raise UserError(f"--expert_lora_rank {rank}", "there are no experts", "leave it out")
    return tuple(map(tuple, targets))


def expert_rank(info: ModelInfo, cfg: TrainConfig) -> int:
    """Rank of the adapter of one expert; 0: experts are frozen.

    Args:
        info: the model.
        cfg: expert_lora_rank; where that is True, lora_rank.

    Raises:
        UserError: peft would read such an adapter otherwise (code 2).
    """
    if cfg.expert_lora_rank and info.model_type == TURNED:
        rule = f"peft takes the experts' matrices of {TURNED} turned, and could not read the result"
        raise UserError(f"--expert_lora_rank {cfg.expert_lora_rank}", rule, "leave it out")
    if cfg.expert_lora_rank is not True:
        return int(cfg.expert_lora_rank)
    return usual_expert_rank(info, cfg)


def usual_expert_rank(info: ModelInfo, cfg: TrainConfig) -> int:
    """The rank of a bare --expert_lora_rank: lora_rank / experts of a token, at least 2."""
    return max(2, cfg.lora_rank // max(active_linears(info, kind)[1] for kind in info.kinds))


def expert_sides(info: ModelInfo, index: int) -> list[tuple[Linear, int]]:
    """What the experts of a layer read and what they write, each a matrix of one expert.

    Args:
        info: the model.
        index: of the layer.

    Returns:
        The matrix, by the name of the parameter of all, and how many experts there are; those that
        read come first; empty for a dense layer.
    """
    found = {n.expert: n for n in info.by_layer[index].linears if n.expert is not None}
    if not found:
        return []
    parts = {part: linear for (_, number, part), linear in found.items() if number == 0}
    ins = [parts[part] for part in (0, 1, 3) if part in parts]
    num, stem = len({number for _, number, _ in found}), f"{next(iter(found))[0]}.experts"
    name = JOINED if {0, 3} & {*parts} else "up_proj"
    wide = sum(linear.out_features for linear in ins), ins[0].in_features
    down = Linear(f"{stem}.down_proj", *parts[2].shape, False)
    return [(Linear(f"{stem}.{name}", *wide, False), num), (down, num)]


def peft_name(name: str) -> str:
    """What peft calls a linear, or a parameter of all experts of a layer: those wrap each other.

    Args:
        name: of the linear, or of the parameter as in "mlp.experts.gate_up_proj".
    """
    stem, _, part = name.rpartition(".")
    if stem.rpartition(".")[2] != "experts":
        return name
    return stem if part == "down_proj" else f"{stem}.base_layer"


def module_names(text: str | None) -> str | list[str]:
    """Return a pattern as it is, and the names of a list sorted; of "all" that name."""
    is_pattern = re.search(r"[\\^$*+?()\[\]{}|]", text or "")
    names = {name.strip() for name in (text or "").split(",")} - {""}
    return str(text) if is_pattern else sorted(names)


def layer_numbers(text: str | None) -> list[int]:
    """Return the numbers of "0,8-15", sorted; none of None."""
    pairs = [part.split("-") for part in (text or "").split(",") if part]
    return sorted({i for ends in pairs for i in range(int(ends[0]), int(ends[-1]) + 1)})


def _matching(option: str, wanted: str | list[str], places: Mapping[str, Any]) -> set[str]:
    if isinstance(wanted, str):
        with _explained(option, wanted):
            found = {wanted: {name for name in places if re.fullmatch(wanted, name)}}
    elif len(wanted) == 1 and wanted[0] in ALL_LINEARS:
        return set(places)
    else:
        found = {key: {name for name in places if f".{name}".endswith(f".{key}")} for key in wanted}
    unmatched = [key for key in found if not found[key]]
    if unmatched or not found:
        text = wanted if isinstance(wanted, str) else ",".join(wanted)
        names = dict.fromkeys(linear.last_name for _, linear in places.values())
        rule = f"0 modules match {', '.join(unmatched) or 'it'}"
        raise UserError(f"{option} {text!r}", rule, f"use all, or some of {','.join(names)}")
    return set().union(*found.values())


def _values(cfg: TrainConfig, option: str, usual: str, names: Iterable[str]) -> dict[str, Any]:
    """Rank or alpha of each linear."""
    patterns, is_rank = json.loads(getattr(cfg, option) or "{}"), option == "rank_pattern"
    rule = "must be a whole number >= 1" if is_rank else "must be a number > 0"
    for key, value in patterns.items():
        if type(value) not in ((int,) if is_rank else (int, float)) or not value > 0:
            raise UserError(f"{option} {key} = {value!r}", rule, "correct it")
        if all(by_pattern({option: {key: 1}}, option, "", name) is None for name in names):
            raise UserError(f"{option} {key}", "no linear with an adapter matches", "correct it")
    table = {option: patterns, usual: getattr(cfg, usual)}
    return {name: by_pattern(table, option, usual, name) for name in names}


def by_pattern(table: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    """The value for a linear: that of the first pattern that its name ends with.

    Args:
        table: as adapter_config.json.
        patterns, default: keys of it.
        name: of the linear in the model.

    Raises:
        UserError: a pattern is none (code 2).

    Source: huggingface/peft, src/peft/utils/other.py (get_pattern_key).
    """
    for key, value in (table.get(patterns) or {}).items():
        with _explained(patterns, key):
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return table.get(default)


def _explained(option: str, pattern: str) -> contextlib.AbstractContextManager[None]:
    got, rule = f"{option} {pattern!r}", "is no pattern ({})"
    return one_line_of(got, "correct it", rule=rule, kinds=re.error)


def _is_read_whole(linear: Linear, params: set[str]) -> bool:
    """A Mamba kernel reads these weights itself: an adapter beside them would have no effect."""
    block = linear.name.rpartition(".")[0]
    return linear.last_name in ("out_proj", "x_proj", "dt_proj") and f"{block}.D" in params


def unquantized(info: ModelInfo) -> dict[str, int]:
    """The matrices that stay in 16 bit.

    Args:
        info: the model.

    Returns:
        Name ("*" for the number of the layer) -> elements in all.
    """
    shapes = {name: (shape, 1) for name, shape in info.root_params}
    for kind in info.kinds:
        for name, shape in kind.params:
            full = f"{info.layers_prefix}.*.{name}"
            shapes[full] = shape, shapes.get(full, (shape, 0))[1] + len(kind.layers)
    return {name: math.prod(at) * num for name, (at, num) in shapes.items() if len(at) > 1}


def active_linears(info: ModelInfo, kind: LayerKind) -> tuple[tuple[Linear, ...], int]:
    """The linears that one token passes in a layer.

    Args:
        info: the model.
        kind: of the layer.

    Returns:
        The linears, those of an expert as often as a token has experts; and how many it has, 1 in
        a dense layer.
    """
    dense = tuple(linear for linear in kind.linears if linear.expert is None)
    of_first = [linear for linear in kind.linears if linear.expert and not linear.expert[1]]
    one = sorted(of_first, key=lambda linear: linear.expert or ())
    if not one:
        return dense, 1
    num = read_size(info.config, "num_experts_per_tok")
    return dense + tuple(linear for linear in one for _ in range(num)), num


def num_params(info: ModelInfo) -> int:
    """Count all parameters; a tied head counts once.

    Args:
        info: the model.

    Returns:
        Elements of all parameters.
    """
    root = sum(math.prod(shape) for _, shape in info.root_params)
    return sum(kind.num_params * len(kind.layers) for kind in info.kinds) + root


def stored_name(info: ModelInfo, name: str) -> str:
    """Name in the files, where transformers calls a parameter otherwise.

    Mixtral's experts lie in `block_sparse_moe` there and in `mlp` in the model; GPT-NeoX's head is
    `embed_out` there.

    Args:
        info: the model.
        name: full name of a parameter that the built model has and that is not fused.

    Source: transformers, src/transformers/conversion_mapping.py.
    """
    if name in HEADS:
        return next((head for head, _ in info.root_params if head in HEADS), name)
    stored = next((linear.expert[0] for linear in info.linears if linear.expert), "mlp")
    return name.replace(".mlp.", f".{stored}.")


def expert_matrices(info: ModelInfo, name: str) -> list[list[str]]:
    """Names in the files of what a fused 3-D parameter holds.

    transformers holds the experts of a layer in `experts.gate_up_proj` and `experts.down_proj`;
    files have a matrix for each projection of each expert.

    Args:
        info: the model.
        name: full name in the built model, "model.layers.0.mlp.experts.gate_up_proj".

    Returns:
        For each expert the matrices that lie one below the other; empty for another parameter.
    """
    match = FUSED_NAME.fullmatch(name)
    if match is None:
        return []
    wanted = FUSED[match["fused"]]
    parts = {linear.expert[1:]: linear.name for linear in info.linears if linear.expert}
    if wanted == (0, 1) and (0, 3) in parts:
        wanted = (3,)
    num = 1 + max((number for number, _ in parts), default=-1)
    stem = f"{info.layers_prefix}.{match['layer']}"
    return [[f"{stem}.{parts[i, part]}.weight" for part in wanted] for i in range(num)]
