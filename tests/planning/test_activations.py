"""The plan knows packed bytes and kept activations without torch; here torch checks them."""

import json
from pathlib import Path

import pytest
import torch

from fsdp_qlora import arch, config
from fsdp_qlora.model import adapters, quantize, shard, skeleton
from fsdp_qlora.model.layer import build_layout
from fsdp_qlora.planning import memory
from fsdp_qlora.planning.sizes import FORMATS, Sizes, quantized_bytes

MODELS = ["llama-2-7b", "llama-2-70b", "qwen2.5-0.5b", "phi-3-mini", "gemma-2-2b"]
SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def test_the_plan_knows_every_format():
    """A format that the trainer learns must be planned for."""
    assert FORMATS.keys() == quantize.FORMATS.keys()


@pytest.mark.parametrize("format_name", FORMATS)
def test_packed_bytes_are_those_of_the_layout(format_name):
    """Of whole models, and of odd shapes that need padding everywhere."""
    shapes = [
        [(n.out_features, n.in_features) for n in arch.read(m, False).linears] for m in MODELS
    ]
    for layer in [*shapes, [(3, 65), (127, 64), (130, 192)]]:
        assert sum(quantized_bytes(layer, format_name)) == build_layout(layer, format_name).nbytes


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_a_layer_keeps_what_the_formula_says(tmp_path: Path, dropout: str):
    """What autograd saves of a real layer without recomputation, unfused as on a CPU, to the byte.

    Left out by the formula: rotary tables (shared by all layers) and the norms' one number a token.
    """
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    argv = [f"--model_name={tmp_path}", "--lora_rank=8", f"--lora_dropout={dropout}"]
    cfg, info = config.parse(argv), arch.read(str(tmp_path), need_weights=False)
    chosen = skeleton.choose_kernels("sdpa", "off", "bfloat16", torch.device("cpu"), False)
    model = skeleton.build(info, "nf4_dq", chosen)
    adapters.attach(model, info.linears, cfg, 1)
    (block,) = shard.blocks(model)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                dtype = torch.bfloat16 if name == "lora" else param.dtype  # as FSDP gathers it
                values = torch.zeros(param.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(values, param.requires_grad)
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    tokens = 2 * 96
    x = torch.randn(2, 96, 256, dtype=torch.bfloat16, requires_grad=True)
    tables = model.decoder.rotary_emb(x, torch.arange(96)[None])
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = block(x, position_embeddings=tables, attention_mask=None)
    del result
    others = own | {table.untyped_storage().data_ptr() for table in tables}
    total = sum(nbytes for place, nbytes in saved.items() if place not in others)
    kept = memory.kept_bytes(Sizes(info, cfg, "cpu"), tokens, "none")
    assert total == sum(item.nbytes for item in kept) + 2 * tokens * 4
