"""Small model directories made without transformers: zeros for weights."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fsdp_qlora.arch.info import from_config

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(directory: Path, model_type: str = "llama", **more) -> Path:
    """Write config.json and model.safetensors of a three-layer model."""
    config = {"model_type": model_type} | TINY | more
    shapes = from_config(config).all_shapes()
    directory.mkdir(exist_ok=True)
    save_file({n: np.zeros(shapes[n], "f4") for n in shapes}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_header(path: Path, header: dict, data: bytes) -> None:
    """Write a safetensors file by hand."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(path: Path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: config[key] for key in config if config[key] is not None}))
