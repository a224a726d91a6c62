"""What the plan and the model share, without torch: limits, and the bytes of each base format.

model/quantize.py adds to every format how a weight is quantized and dequantized.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fsdp_qlora.arch.files import GROUP, NESTED
from fsdp_qlora.config import GROUP_SIZES, HQQ_AXES, HQQ_BITS, hqq_name
from fsdp_qlora.hardware import GIB

WHOLE_LAYER_BYTES = 512 * 2**20  # a layer not larger is dequantized at once, for all its matmuls
LOGITS_BYTES = 256 * 2**20  # of float32 logits held at once
NUM_SLOTS = 2  # one at work, one being filled; one more where resident layers leave gaps to bridge
ONE_GROUP_BYTES = 256 * 2**20  # adapters not larger are gathered and reduced all at once
ALIGN_BYTES = 256  # every array starts at a multiple of this, for wide loads
NUM_READ_AHEAD = 2  # linears being read while one is at work
# Weights of a layer times tokens of a full micro-batch: with more work the GPU is busy as it is,
# and a graph would only hold memory (measured on an H200 beside a slow host: 7B at 512 tokens is
# bound by the host, 70B at 1024 is not).
MAX_GRAPH_WORK = 5e11
MAX_GRAPH_SHAPES = 8  # a graph keeps the memory of a layer's pass
MOST_TOUCHED_BYTES = 4 * GIB  # copies for checkpoints: more is not taken before the first of them
PAD_MULTIPLES = {"cuda": 64, "cpu": 8}  # of a batch's length: fewer shapes, blocks are found again
ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}
PER_WORD = 10  # values of 3 bits in an int32


@dataclass(frozen=True)
class Field:
    """One stored array of a linear.

    Attributes:
        name: of the field.
        dtype: torch name of the dtype of its elements.
        num_weights: weights that share one element; 0 = those of one row do.
        multiple: the number of elements is rounded up to a multiple of it.
    """

    name: str
    dtype: str
    num_weights: int
    multiple: int = 1

    def num_elements(self, shape: Sequence[int]) -> int:
        """Elements stored for a linear of `shape` (out features, in features)."""
        num = -(-math.prod(shape) // self.num_weights) if self.num_weights else shape[0]
        return -(-num // self.multiple) * self.multiple


@dataclass(frozen=True)
class Storage:
    """A row of FORMATS.

    Attributes:
        weight_bits: bits of one quantized weight.
        fields: the quantization constants stored per linear, beside its weight.
        scratch_bytes: held per weight of a linear while it is dequantized.
        constant_bytes: held per GROUP of the layer at work, once its constants are usable.
        group_size: weights that share a constant.
        axis: of HQQ: 1 groups neighbours of a row; 0 groups weights that lie a `group_size`-th of
            the matrix apart.
    """

    weight_bits: int
    fields: tuple[Field, ...] = ()
    scratch_bytes: int = 2
    constant_bytes: int = 0
    group_size: int = GROUP
    axis: int = 1

    def weight_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the quantized weight of a linear of `shape` (out features, in features)."""
        num_weights = math.prod(shape)
        if self.weight_bits != 3:
            return -(-num_weights * self.weight_bits // 8)
        # Ten rows of hqq's matrix of groups share one row of words; the last rows are padded.
        num_groups = -(-num_weights // self.group_size)
        rows, cols = (num_groups, self.group_size)[:: 1 if self.axis else -1]
        return -(-rows // PER_WORD) * cols * 4


def _hqq(bits: int, group_size: int, axis: int) -> Storage:
    # In 8 bits, constants rounded to bfloat16 would cost as much as the quantization itself.
    dtype = "float32" if bits == 8 else "bfloat16"
    fields = (Field("scale", dtype, group_size), Field("zero", dtype, group_size))
    return Storage(bits, fields, scratch_bytes=3, group_size=group_size, axis=axis)


_ABSMAX = (Field("absmax", "float32", GROUP),)
_NESTED_ABSMAX = (
    Field("qabsmax", "uint8", GROUP, multiple=NESTED),
    Field("nested_absmax", "float32", GROUP * NESTED),
    Field("offset", "float32", GROUP * NESTED),
)
FORMATS: dict[str, Storage] = {
    "nf4": Storage(4, _ABSMAX),
    "nf4_dq": Storage(4, _NESTED_ABSMAX, constant_bytes=4),
    "fp4": Storage(4, _ABSMAX),
    "fp4_dq": Storage(4, _NESTED_ABSMAX, constant_bytes=4),
    "int8": Storage(8, (Field("row_absmax", "float32", 0),)),
    **{
        hqq_name(bits, group_size, axis): _hqq(bits, group_size, axis)
        for bits in HQQ_BITS
        for group_size in GROUP_SIZES
        for axis in HQQ_AXES
    },
    "bf16": Storage(16, scratch_bytes=0),
}
