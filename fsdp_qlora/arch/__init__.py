"""What a model is, read without torch: layers, shapes, files, and what a run trains of it."""

from fsdp_qlora.arch.files import TensorRef as TensorRef
from fsdp_qlora.arch.info import ALL_LINEARS as ALL_LINEARS
from fsdp_qlora.arch.info import Linear as Linear
from fsdp_qlora.arch.info import ModelInfo as ModelInfo
from fsdp_qlora.arch.info import Target as Target
from fsdp_qlora.arch.info import active_linears as active_linears
from fsdp_qlora.arch.info import by_pattern as by_pattern
from fsdp_qlora.arch.info import find_targets as find_targets
from fsdp_qlora.arch.info import layer_numbers as layer_numbers
from fsdp_qlora.arch.info import module_names as module_names
from fsdp_qlora.arch.info import num_layer_params as num_layer_params
from fsdp_qlora.arch.info import num_params as num_params
from fsdp_qlora.arch.info import read as read
from fsdp_qlora.arch.info import unquantized as unquantized
