"""A tiny random checkpoint of any causal language model that transformers knows.

One table of values by attribute name makes the default config of a type small and switches on what
real checkpoints have; TYPES holds what a few types need beside it.
"""

import warnings
from pathlib import Path
from typing import Any

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

VALUES: tuple[tuple[Any, str], ...] = (
    (
        64,
        "hidden_size n_embd d_model embedding_dim word_embed_proj_dim attention_hidden_size "
        "lru_width kv_channels_total",
    ),
    (
        4,
        "num_hidden_layers n_layer n_layers num_blocks decoder_layers num_layers "
        "num_attention_heads n_head n_heads num_heads attention_heads "
        "swa_num_attention_heads num_query_groups decoder_attention_heads "
        "linear_num_value_heads linear_num_heads d_rel",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group "
        "num_expert_group zero_expert_num linear_num_key_heads mamba_n_groups n_groups "
        "mamba_ngroups num_layers_per_stack",
    ),
    (
        16,
        "head_dim swa_head_dim global_head_dim v_head_dim dim_head swa_v_head_dim "
        "qk_nope_head_dim kv_channels linear_head_dim attention_head_dim index_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size "
        "mamba_n_heads mamba_num_heads rel_extent block_multiple_of",
    ),
    (
        8,
        "qk_rope_head_dim rotary_dim index_topk num_experts n_routed_experts "
        "num_local_experts moe_num_experts hidden_size_per_layer_input laurel_rank "
        "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size mamba_dt_rank "
        "time_step_rank gated_norm_rank block_size",
    ),
    (24, "q_lora_rank kv_lora_rank o_lora_rank router_hidden_size"),
    (
        96,
        "intermediate_size ffn_dim n_inner dim_ff dff ffn_hidden_size intermediate_size_mlp "
        "decoder_ffn_dim",
    ),
    (80, "dense_intermediate_size prefix_dense_intermediate_size"),
    (40, "moe_intermediate_size expert_ffn_hidden_size"),
    (
        48,
        "shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    (
        1,
        "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index "
        "n_shared_experts num_shared_experts moe_num_shared_experts",
    ),
    (3, "moe_layer_end_index"),
    (256, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length "
        "model_max_length original_max_position_embeddings mamba_d_ssm",
    ),
    # What real ones have.
    (
        8,
        "sliding_window attention_chunk_size sliding_window_size local_attention "
        "window_size attention_window_size keep_window_size",
    ),
    (
        True,
        "use_sliding_window attention_bias mlp_bias use_bias qkv_bias use_qkv_bias "
        "attention_out_bias norm_bias lm_head_bias bias mamba_conv_bias mamba_proj_bias "
        "conv_bias add_bias_linear projectors_bias use_expert_bias use_qk_norm qk_layernorm "
        "mup_enabled mamba_rms_norm norm_topk_prob",
    ),
    (2, "max_window_layers num_kv_shared_layers"),
    (1.5, "embedding_multiplier"),
    (0.7, "residual_multiplier"),
    (0.2, "attention_multiplier"),
    (1.7, "logits_scaling"),
    (0.6, "logit_scale"),
    (1.8, "routed_scaling_factor router_scaling_factor moe_routed_scaling_factor route_scale"),
    (
        0.8,
        "lm_head_multiplier key_multiplier attention_out_multiplier "
        "linear_attn_alpha_factor linear_attn_beta_factor",
    ),
    (1.2, "attention_in_multiplier ssm_in_multiplier ssm_out_multiplier"),
    ([0.8, 1.2], "mlp_multipliers"),
    ([0.8, 1.2, 0.9, 1.1, 1.3], "ssm_multipliers"),
    (1.3, "full_attn_alpha_factor full_attn_beta_factor"),
    (1.1, "mlp_alpha_factor mlp_beta_factor"),
    (3.0, "final_logit_softcapping"),
    (2.0, "attn_logit_softcapping"),
    (24, "query_pre_attn_scalar"),
    (0, "num_nextn_predict_layers"),
    (False, "use_mamba_kernels use_mem_eff_path use_associative_scan"),
)
CHOSEN = {name: value for value, names in VALUES for name in names.split()}
NO_DROPOUT = ("dropout", "pdrop", "jitter", "layerdrop")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "eod_token_id": 2}
# Lists with one entry for each layer; every kind occurs, and every pair of kinds of two lists.
PER_LAYER = {"layer_types": 1, "layers_block_type": 1, "mlp_layer_types": 2, "indexer_types": 1}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
TYPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert-generation": {"is_decoder": True},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            for kind in WINDOWED["layer_types"]
        },
        **WINDOWED,
    },
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": WINDOWED,
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "laguna": {**WINDOWED, "num_attention_heads_per_layer": [4, 4, 8, 8]},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "llama4_text": {"interleave_moe_layer_step": 2},
    "minicpm3": {"head_dim": 8, "num_key_value_heads": 4},
    "youtu": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "mellum": {**WINDOWED, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"pad_token_id": 0},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "xlnet": {"d_inner": 96},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
}
# Beside the default of a type.
VARIANTS = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False}),
    "granitemoehybrid, attention only": (
        "granitemoehybrid",
        {"layer_types": ["full_attention"] * 4, "num_local_experts": 0},
    ),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 0.9 * i for i in range(8)],
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "llama, dynamic rope": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
}


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
        key: 0.0
        for key, value in values.items()
        if type(value) is float and any(part in key for part in NO_DROPOUT)
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
