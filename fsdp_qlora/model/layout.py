"""Where everything lies in the flat bytes of one decoder layer.

Packed weights and quantisation constants of a layer lie one after the other, aligned, so that
sharding, offload, copies and gathers cost one operation a layer.

Shape letters: I in features, O out features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fsdp_qlora.model.quantize import FORMATS, Fields
from fsdp_qlora.planning.limits import ALIGN_BYTES


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the flat bytes of one decoder layer.

    Attributes:
        format_name: row of FORMATS.
        shapes: (O, I) of each linear, in order.
        weights: (start, stop) byte range of each linear's packed weight.
        fields: name -> (dtype, start, stop) byte range of a constant field, all linears one after
            the other.
        elements: name -> (start, stop) element range of each linear within the field.
        nbytes: length of the flat bytes.
    """

    format_name: str
    shapes: tuple[tuple[int, int], ...]
    weights: tuple[tuple[int, int], ...]
    fields: dict[str, tuple[torch.dtype, int, int]]
    elements: dict[str, tuple[tuple[int, int], ...]]
    nbytes: int

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Weights of each linear."""
        return tuple(rows * cols for rows, cols in self.shapes)

    @cached_property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return sum(self.numels)

    @cached_property
    def is_contiguous(self) -> bool:
        """The layer's weights and constants are those of one long linear, without gaps."""
        fmt = FORMATS[self.format_name]
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return fmt.is_sequential and all(
            [before[1] == after[0] for before, after in pairs]
            + [
                o * i % (f.num_weights * f.multiple) == 0
                for f in fmt.storage.fields
                for o, i in self.shapes
            ]
        )


def build_layout(shapes: Sequence[tuple[int, int]], format_name: str) -> Layout:
    """Lay out the linears of one decoder layer.

    Args:
        shapes: (out features, in features) of each linear.
        format_name: row of FORMATS.

    Returns:
        The places; a layer of the same shapes has the same.
    """
    storage, offset = FORMATS[format_name].storage, 0
    weights, fields, elements = [], {}, {}
    for shape in shapes:
        nbytes = storage.weight_bytes(shape)
        weights.append((offset, offset + nbytes))
        offset = _round_up(offset + nbytes, ALIGN_BYTES)
    for field in storage.fields:
        ranges, start, dtype = [], 0, getattr(torch, field.dtype)
        for shape in shapes:
            stop = start + field.num_elements(shape)
            ranges.append((start, stop))
            start = stop
        elements[field.name] = tuple(ranges)
        fields[field.name] = (dtype, offset, offset + start * dtype.itemsize)
        offset = _round_up(fields[field.name][2], ALIGN_BYTES)
    return Layout(format_name, tuple(shapes), tuple(weights), fields, elements, offset)


def view_fields(flat_bytes: torch.Tensor, layout: Layout) -> Fields:
    """The constant fields of a layer as typed views of its bytes.

    Args:
        flat_bytes: uint8 [nbytes].
        layout: of the layer.

    Returns:
        Name -> 1-D view in the dtype of the field.
    """
    return {
        name: flat_bytes[start:stop].view(dtype)
        for name, (dtype, start, stop) in layout.fields.items()
    }


def pack_linear(
    flat_bytes: torch.Tensor, layout: Layout, index: int, weight_OI: torch.Tensor
) -> None:
    """Quantise one linear into its places in the bytes of its layer.

    Args:
        flat_bytes, layout, index: see put_linear.
        weight_OI: 16 or 32 bit.
    """
    put_linear(flat_bytes, layout, index, FORMATS[layout.format_name].pack(weight_OI))


def put_linear(flat_bytes: torch.Tensor, layout: Layout, index: int, arrays: Fields) -> None:
    """Put a packed linear into its places in the bytes of its layer.

    Args:
        flat_bytes: uint8 [nbytes], written to; on the device of the arrays.
        layout: of the layer.
        index: of the linear.
        arrays: of the format's `pack`; emptied of the packed weight.
    """
    start, stop = layout.weights[index]
    flat_bytes[start:stop] = arrays.pop("weight")
    fields = view_fields(flat_bytes, layout)
    for name, values in arrays.items():
        first = layout.elements[name][index][0]
        fields[name][first : first + values.numel()] = values
