"""What a model is, read without torch: layers, shapes, files, and what a run trains of it."""

from fsdp_qlora.arch.files import TensorRef as TensorRef
from fsdp_qlora.arch.info import LayerKind as LayerKind
from fsdp_qlora.arch.info import Linear as Linear
from fsdp_qlora.arch.info import ModelInfo as ModelInfo
from fsdp_qlora.arch.info import read as read
from fsdp_qlora.arch.targets import active_linears as active_linears
from fsdp_qlora.arch.targets import num_params as num_params
from fsdp_qlora.arch.targets import unquantized as unquantized
