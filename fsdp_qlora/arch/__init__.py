"""What a model is, read without torch: layers, shapes, files, and what a run trains of it."""

from fsdp_qlora.arch.files import TensorRef
from fsdp_qlora.arch.info import (
    ModelInfo,
    active_linears,
    num_linear_params,
    num_params,
    read,
    select_linears,
    unquantized,
)
from fsdp_qlora.arch.layers import Linear

__all__ = [
    "Linear",
    "ModelInfo",
    "TensorRef",
    "active_linears",
    "num_linear_params",
    "num_params",
    "read",
    "select_linears",
    "unquantized",
]
