"""A Llama model in a GGUF file, made into an ordinary Hugging Face directory in bf16.

The 4-bit values of the file are unpacked, not trained further: the result is as exact as they are.
Tensors go through one by one, so memory stays at the file plus its largest tensor.

Source: the format, docs/gguf.md in github.com/ggml-org/ggml; its blocks, ggml/src/ggml-common.h;
the order of the rotary rows, LlamaModel.permute in convert_hf_to_gguf.py of
github.com/ggml-org/llama.cpp.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora.errors import INTEGRITY, UserError

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK_BYTES = {F32: (1, 4), Q4_1: (32, 20), Q8_0: (32, 34)}  # elements, bytes
CONTROL_TOKEN = 3
ROOT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Args:
        kind: storage type, a key of BLOCK_BYTES.
        shape: row major, as PyTorch counts.
        start: absolute offset of its first byte.
    """

    kind: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file in memory.

    Args:
        data: all its bytes.
        metadata: its keys and values.
        tensors: name -> where its bytes lie.
    """

    data: bytes
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def parse(data: bytes) -> GgufFile:
    """Read the header of a GGUF file.

    Args:
        data: all bytes of the file.

    Returns:
        The file.

    Raises:
        UserError: no GGUF file, cut off, or of an unknown storage type (code 5).
    """
    try:
        magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        metadata, position = {}, struct.calcsize("<4sIQQ")
        for _ in range(num_keys):
            key, position = _value(data, STRING, position)
            (kind,) = struct.unpack_from("<I", data, position)
            metadata[key], position = _value(data, kind, position + 4)
        headers = {}
        for _ in range(num_tensors):
            name, position = _value(data, STRING, position)
            (num_dims,) = struct.unpack_from("<I", data, position)
            *dims, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", data, position + 4)
            position += 4 + struct.calcsize(f"<{num_dims}QIQ")
            headers[name] = GgufTensor(kind, tuple(reversed(dims)), offset)
        align = metadata.get("general.alignment", 32)
        base = math.ceil(position / align) * align
        tensors = {n: GgufTensor(t.kind, t.shape, base + t.start) for n, t in headers.items()}
        ends = [tensor.start + _num_bytes(tensor) for tensor in tensors.values()]
    except (struct.error, ValueError, KeyError) as error:
        raise UserError(
            "the GGUF file", f"cannot be read ({error})", "fetch it again", INTEGRITY
        ) from None
    if max(ends, default=0) > len(data):
        raise UserError("the GGUF file", "is cut off", "fetch it again", INTEGRITY)
    return GgufFile(data, metadata, tensors)


def dequantize(data: bytes, tensor: GgufTensor) -> np.ndarray:
    """Unpack one tensor.

    Args:
        data: the file that holds it.
        tensor: which one.

    Returns:
        float32 array of tensor.shape. Q4_1: nibble * d + m, Q8_0: byte * d, with d and m (fp16) of
        each block of 32.
    """
    raw = np.frombuffer(data, np.uint8, _num_bytes(tensor), tensor.start)
    if tensor.kind == F32:
        return raw.view("<f4").reshape(tensor.shape)
    blocks = raw.reshape(-1, BLOCK_BYTES[tensor.kind][1])
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if tensor.kind == Q8_0:
        return (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(tensor.shape)
    offset = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (nibbles.astype(np.float32) * scale + offset).reshape(tensor.shape)


def save_directory(gguf: GgufFile, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of a Llama model.

    Args:
        gguf: the model.
        directory: exists, and is empty.

    Raises:
        UserError: not a Llama model with a byte-level BPE tokenizer (code 5).
    """
    metadata = gguf.metadata
    kind = (metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model"))
    if kind != ("llama", "gpt2"):
        raise UserError(
            f"GGUF of {kind}", "must be a Llama with BPE", "use another file", INTEGRITY
        )
    config = _config(gguf)
    _write_json(directory / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", ids)
    _save_tokenizer(metadata, directory)
    _save_weights(gguf, directory / "model.safetensors")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to bf16, ties to even.

    Args:
        values: float32, finite.

    Returns:
        uint16 of the same shape: the bits of the bf16 numbers.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _value(data: bytes, kind: int, position: int) -> tuple[Any, int]:
    """Read a value of the header; return it and where the next one starts."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 8 + length
        return data[position + 8 : end].decode(), end
    if kind != ARRAY:
        code = "<" + SCALARS[kind]
        (number,) = struct.unpack_from(code, data, position)
        return number, position + struct.calcsize(code)
    item_kind, length = struct.unpack_from("<IQ", data, position)
    position += 12
    items = []
    for _ in range(length):
        item, position = _value(data, item_kind, position)
        items.append(item)
    return items, position


def _num_bytes(tensor: GgufTensor) -> int:
    elements, num_bytes = BLOCK_BYTES[tensor.kind]
    return math.prod(tensor.shape) // elements * num_bytes


def _config(gguf: GgufFile) -> dict[str, Any]:
    meta = gguf.metadata
    heads = meta["llama.attention.head_count"]
    theta = float(f"{meta['llama.rope.freq_base']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        # The file keeps fp32: 1e-5 is there as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _save_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # tokenizer.ggml.pre = smollm: every digit is a word of its own, which parts "\n\n" from "1".
    splits = [pre_tokenizers.Digits(individual_digits=True)] * (
        metadata["tokenizer.ggml.pre"] == "smollm"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name, short in names.items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(directory / "tokenizer_config.json", special | settings)


def _save_weights(gguf: GgufFile, path: Path) -> None:
    """Write bf16 safetensors, a tensor at a time: the header is known before any value is."""
    names = {_hf_name(name): name for name in gguf.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for hf_name in sorted(names):
        shape = gguf.tensors[names[hf_name]].shape
        start, end = end, end + 2 * math.prod(shape)
        header[hf_name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for hf_name in sorted(names):
            file.write(to_bf16(_weight(gguf, names[hf_name])).tobytes())


def _weight(gguf: GgufFile, name: str) -> np.ndarray:
    values = dequantize(gguf.data, gguf.tensors[name])
    kind = name.split(".")[-2]
    if kind not in ("attn_q", "attn_k"):
        return values
    # llama.cpp pairs neighbouring rows in its rotary embedding, transformers the halves of a head.
    suffix = "_kv" if kind == "attn_k" else ""
    heads = gguf.metadata[f"llama.attention.head_count{suffix}"]
    pairs = values.reshape(heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    if parts[0] in ROOT_NAMES:
        return f"{ROOT_NAMES[parts[0]]}.{parts[1]}"
    raise UserError(f"GGUF tensor {name}", "is no part of a Llama", "use another file", INTEGRITY)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
