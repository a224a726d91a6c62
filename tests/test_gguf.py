"""A GGUF file, written here from the format's description, becomes the model that it came from."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fsdp_qlora import arch, gguf
from fsdp_qlora.errors import INTEGRITY, UserError

TYPES = {int: 4, float: 6, str: 8, list: 9}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
TOKENS = [*CONTROL, *ALPHABET, "ĊĊ", "ab"]


def text(value: str) -> bytes:
    """A string of the format."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def item(value: int | float | str | list) -> bytes:
    """A value without its type."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        return struct.pack("<IQ", TYPES[type(value[0])], len(value)) + b"".join(map(item, value))
    return struct.pack("<f" if isinstance(value, float) else "<I", value)


def write(metadata: dict, tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A whole file: name -> (storage type, row-major shape, bytes)."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + struct.pack("<I", TYPES[type(value)]) + item(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += text(name) + dims + struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return out + bytes(-len(out) % 32) + data


def llama_metadata(config: LlamaConfig) -> dict:
    """The keys of a Llama with a byte-level BPE tokenizer."""
    return {
        "general.architecture": "llama",
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "llama.context_length": config.max_position_embeddings,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": ["Ċ Ċ", "a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp keeps them: row i of a head's halves side by side."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def llama_file(model: LlamaForCausalLM) -> bytes:
    """The model as a GGUF file in float32."""
    to_gguf = {hf: name for name, hf in (gguf.LAYER_NAMES | gguf.ROOT_NAMES).items()}
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    tensors = {}
    for name, value in model.named_parameters():
        module = name.removesuffix(".weight").removeprefix("model.layers.")
        index, _, inner = module.partition(".")
        is_layer = index.isdigit()
        gguf_name = f"blk.{index}.{to_gguf[inner]}" if is_layer else to_gguf[module]
        num_heads = heads.get(name.split(".")[-2])
        stored = interleave(value.detach(), num_heads) if num_heads else value.detach()
        tensors[f"{gguf_name}.weight"] = (gguf.F32, tuple(value.shape), stored.numpy().tobytes())
    return write(llama_metadata(model.config), tensors)


def tiny_llama(is_tied: bool) -> LlamaForCausalLM:
    """Random, in float32, of values that bf16 holds exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        initializer_range=0.5,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config)
    for value in model.parameters():
        value.data = value.data.bfloat16().float()
    return model


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_llama_through_gguf_gives_the_same_logits(is_tied: bool, tmp_path: Path) -> None:
    """Names, shapes, rotary rows, epsilon and base: all come back."""
    model = tiny_llama(is_tied)
    gguf.save_directory(gguf.parse(llama_file(model)), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40)[None] % len(TOKENS)
    assert torch.equal(again(ids).logits, model(ids).logits)
    info = arch.read(str(tmp_path), need_weights=True)
    assert (info.is_tied, info.num_layers) == (is_tied, 2)
    assert {ref.dtype for ref in info.tensors.values()} == {"BF16"}


def test_the_tokenizer_splits_digits_and_keeps_control_tokens(tmp_path: Path) -> None:
    """Line breaks before a number stay one token, and control tokens are never cut."""
    gguf.save_directory(gguf.parse(llama_file(tiny_llama(True))), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("<|im_start|>ab:\n\n12<|im_end|>").input_ids
    expected = ["<|im_start|>", "ab", ":", "ĊĊ", "1", "2", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == "<|im_start|>ab:\n\n12<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "ab"


def test_blocks_unpack_as_the_format_says() -> None:
    """Q8_0 is byte * d; Q4_1 is nibble * d + m, low nibbles first; two rows of two blocks."""
    rng = np.random.default_rng(0)
    scales = rng.normal(size=(4, 2)).astype(np.float16)
    levels = rng.integers(-128, 128, (4, 32)).astype(np.int8)
    q8_0 = b"".join(scales[i, :1].tobytes() + levels[i].tobytes() for i in range(4))
    nibbles = rng.integers(0, 16, (4, 32)).astype(np.uint8)
    packed = nibbles[:, :16] | nibbles[:, 16:] << 4
    q4_1 = b"".join(scales[i].tobytes() + packed[i].tobytes() for i in range(4))
    file = gguf.parse(write({}, {"a": (gguf.Q8_0, (2, 64), q8_0), "b": (gguf.Q4_1, (2, 64), q4_1)}))

    first = np.array(
        [[int(q) * np.float32(d) for q in row] for row, (d, _) in zip(levels, scales, strict=True)]
    )
    second = np.array(
        [
            [int(q) * np.float32(d) + np.float32(m) for q in row]
            for row, (d, m) in zip(nibbles, scales, strict=True)
        ]
    )
    a, b = (gguf.dequantize(file.data, file.tensors[name]) for name in "ab")
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, first.reshape(2, 64), rtol=1e-6)
    np.testing.assert_allclose(b, second.reshape(2, 64), rtol=1e-6, atol=1e-6)


def test_bf16_rounding_equals_torch() -> None:
    """Ties to even included: every pattern of the lower half around a few upper halves."""
    low = np.arange(1 << 16, dtype=np.uint32)
    bits = np.concatenate([low | (high << 16) for high in (0, 0x3F80, 0x3F81, 0xC2FF, 0x7F7F)])
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(gguf.to_bf16(values), expected)


def test_a_damaged_file_is_refused() -> None:
    """Cut anywhere in its header or its tensors; another format; an unknown storage type."""
    whole = write({"general.name": "x"}, {"a": (gguf.F32, (8,), bytes(32))})
    assert gguf.parse(whole).metadata == {"general.name": "x"}
    unknown = write({}, {"a": (99, (8,), bytes(32))})
    for data in [whole[:n] for n in range(len(whole))] + [b"PK" + whole, unknown]:
        with pytest.raises(UserError) as caught:
            gguf.parse(data)
        assert caught.value.code == INTEGRITY


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """Its tensors would be given wrong names."""
    with pytest.raises(UserError, match="must be a Llama"):
        gguf.save_directory(gguf.parse(write({"general.architecture": "mamba"}, {})), tmp_path)
    metadata = llama_metadata(tiny_llama(True).config)
    odd = gguf.parse(write(metadata, {"blk.0.ssm.weight": (gguf.F32, (8,), bytes(32))}))
    with pytest.raises(UserError, match="is no part of a Llama"):
        gguf.save_directory(odd, tmp_path)
