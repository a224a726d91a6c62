"""A tiny random checkpoint of any causal language model that transformers knows.

One table of values by attribute name makes the default config of a type small and switches on what
real checkpoints have; TYPES holds what a few types need beside it.
"""

import json
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, logging
from transformers.models.auto import modeling_auto

warnings.filterwarnings("ignore")
logging.set_verbosity_error()

# A type is left out when transformers gives it another main task than text, or a side of one.
OTHER_TASKS = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
OTHER_TASKS += ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
OTHER_PARTS = ("audio", "vision", "encoder_")  # a part of the config is called so
LAYERS = 4
EXPERTS = 8  # of no other size: a linear with so many outputs is a router

# Values and the attributes that have them; what a few types need beside it; variants beside a type.
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CHOSEN = {name: value for value, names in TABLES["values"] for name in names.split()}
DROPOUT = ("dropout", "pdrop", "jitter", "layerdrop")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "eod_token_id": 2}
# Lists with one entry for each layer; every kind occurs, and every pair of kinds of two lists.
PER_LAYER = {"layer_types": 1, "layers_block_type": 1, "mlp_layer_types": 2, "indexer_types": 1}
TYPES, VARIANTS = TABLES["types"], TABLES["variants"]


def left_out() -> dict[str, str]:
    """CausalLM types whose main task is none of text, with that task or part."""
    names = {t: getattr(modeling_auto, f"MODEL_FOR_{t}_MAPPING_NAMES") for t in OTHER_TASKS}
    found = {}
    for model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        tasks = [task for task in OTHER_TASKS if model_type in names[task]]
        parts = getattr(_config_class(model_type), "sub_configs", {})
        tasks += [part for part in parts if part.startswith(OTHER_PARTS) and model_type != "blt"]
        if tasks:
            found[model_type] = tasks[0]
    return found


def all_types() -> list[str]:
    """The CausalLM types of the installed transformers, but those left out; and the variants."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [*sorted(names.keys() - left_out().keys()), *VARIANTS]


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def tiny_config(name: str) -> PreTrainedConfig:
    """A small config with what real ones have switched on.

    Args:
        name: a type, or a row of VARIANTS.
    """
    model_type, own = VARIANTS.get(name, (name, {}))
    own = TYPES.get(model_type, {}) | own
    usual = _config_class(model_type)()
    values = vars(usual)
    attributes = set(values) | set(usual.attribute_map)
    chosen = {k: v for k, v in (CHOSEN | TOKENS).items() if k in attributes}
    chosen = {k: v for k, v in chosen.items() if usual.attribute_map.get(k, k) == k}
    chosen |= {
        key: 0.1
        for key, value in values.items()
        if type(value) is float and any(part in key for part in DROPOUT)
    }
    for key, times in PER_LAYER.items():
        if isinstance(values.get(key), list):
            kinds = [kind for kind in dict.fromkeys(values[key]) for _ in range(times)]
            if len(kinds) > times:
                chosen[key] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    lengths = {len(chosen[key]) for key in PER_LAYER if key in chosen}
    if lengths and "num_hidden_layers" in chosen:
        chosen["num_hidden_layers"] = max(lengths)
    return AutoConfig.for_model(model_type, **(chosen | own))


def save(directory: Path, name: str) -> PreTrainedConfig:
    """Write a random model as transformers does; its numbers are exact in bfloat16.

    Args:
        directory: to be made.
        name: a type, or a row of VARIANTS.

    Returns:
        Its config.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num = sum(p.numel() for p in model.parameters())
    assert num < 4e6, f"{num:.1e} parameters are not tiny: name its sizes in VALUES"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_((noise if tensor.dim() > 1 else tensor + noise).bfloat16())
    model.save_pretrained(directory)
    return config
