"""The 4-bit store: all frozen linears of a decoder layer in one flat byte parameter.

Packed weights and quantisation constants of a layer lie one after the other in
`DecoderBlock.packed`, a 1-D float32 parameter: float32, because FSDP2's copies keep its bits
(bfloat16 NaN patterns are rewritten), and one, because sharding, offload and gather then cost one
operation a layer. The linears are views into it.

Shape letters: I in features, O out features, R LoRA rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.model.product import FrozenProduct, LoraProduct
from fsdp_qlora.model.quantize import FORMATS, Fields

ALIGN_BYTES = 256  # every array starts at a multiple of this, for wide loads


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


def build_layout(shapes: Sequence[tuple[int, int]], format_name: str) -> Layout:
    """Lay out the linears of one decoder layer.

    Args:
        shapes: (out features, in features) of each linear.
        format_name: row of FORMATS.

    Returns:
        The places; a layer of the same shapes has the same.
    """
    fmt, offset = FORMATS[format_name], 0
    weights, fields, elements = [], {}, {}
    for out_features, in_features in shapes:
        nbytes = -(-out_features * in_features * fmt.weight_bits // 8)
        weights.append((offset, offset + nbytes))
        offset = _round_up(offset + nbytes, ALIGN_BYTES)
    for field in fmt.fields:
        ranges, start = [], 0
        for out_features, in_features in shapes:
            stop = start + field.num_elements(out_features * in_features)
            ranges.append((start, stop))
            start = stop
        elements[field.name] = tuple(ranges)
        fields[field.name] = (field.dtype, offset, offset + start * field.dtype.itemsize)
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
        flat_bytes: uint8 [nbytes], written to; on the device of the weight.
        layout: of the layer.
        index: of the linear.
        weight_OI: 16 or 32 bit.
    """
    arrays = FORMATS[layout.format_name].pack(weight_OI)
    start, stop = layout.weights[index]
    flat_bytes[start:stop] = arrays.pop("weight")
    fields = view_fields(flat_bytes, layout)
    for name, values in arrays.items():
        first = layout.elements[name][index][0]
        fields[name][first : first + values.numel()] = values


class ConstantsCache:
    """The usable constants of the layer at work, replaced by the next one's.

    Attributes:
        key: (store, dtype) that `value` belongs to; () = none.
        value: per linear, what the format's `constants` made.
    """

    def __init__(self) -> None:
        self.key: tuple = ()
        self.value: list[Sequence[torch.Tensor]] = []


class LayerStore:
    """Reads one layer's linears out of its flat parameter.

    Attributes:
        owner: module whose `packed` (gathered by FSDP when it is read) holds the bytes.
        layout: of the bytes.
        cache: shared by all layers of the model.
        format: row of FORMATS.
    """

    def __init__(self, owner: "DecoderBlock", layout: Layout, cache: ConstantsCache) -> None:
        self.owner, self.layout, self.cache = owner, layout, cache
        self.format = FORMATS[layout.format_name]
        self._viewed: torch.Tensor | None = None

    def _view(self) -> None:
        # FSDP keeps one gathered parameter per layer and only resizes its storage: views stay good.
        self._viewed, self.cache.key = self.owner.packed, ()
        flat_bytes = self._viewed.detach().view(torch.uint8)
        self._weights = [flat_bytes[start:stop] for start, stop in self.layout.weights]
        self._fields = view_fields(flat_bytes, self.layout)

    def _constants(self, dtype: torch.dtype) -> list[Sequence[torch.Tensor]]:
        if self.cache.key != (id(self), dtype):
            tensors = self.format.constants(self._fields, dtype)
            ranges = self.layout.elements.get(self.format.index_field, ())
            sizes = [stop - start for start, stop in ranges]
            parts = [tensor.split(sizes) for tensor in tensors]
            self.cache.value = [[p[i] for p in parts] for i in range(len(self._weights))]
            self.cache.key = (id(self), dtype)
        return self.cache.value

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantise one linear.

        Args:
            index: of the linear in the layer.
            dtype: of the result.

        Returns:
            weight_OI, on the device of the gathered bytes.
        """
        if self.owner.packed is not self._viewed:
            self._view()
        constants = self._constants(dtype)[index]
        return self.format.unpack(self._weights[index], constants, self.layout.shapes[index], dtype)


class PackedLinear(nn.Module):
    """A frozen linear whose weight lies in its layer's store, with room for a LoRA pair.

    Attributes:
        bias: frozen bias [O] or None.
        lora: (A_RI, B_OR, scale, dropout) while a forward pass of the layer runs, else None.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, store: LayerStore, index: int) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.register_parameter("bias", linear.bias)
        self.store, self.index = store, index
        self.lora: tuple[torch.Tensor, torch.Tensor, float, float] | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weight_OI in `dtype`, made anew."""
        return self.store.weight(self.index, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Frozen product, plus LoRA product where there is a pair.

        Args:
            x: [..., I], compute dtype.

        Returns:
            [..., O], compute dtype.
        """
        delta = None
        shape = (*x.shape[:-1], self.out_features)
        if self.lora is not None:
            a_RI, b_OR, scale, dropout = self.lora
            drop = dropout > 0 and self.training
            lora_x = nn.functional.dropout(x, dropout) if drop else None
            x, delta = LoraProduct.apply(x, lora_x, a_RI, b_OR, scale)
        return FrozenProduct.apply(x, delta, self).view(shape)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.store.layout.format_name}"


@dataclass(frozen=True)
class LoraSlot:
    """One adapted linear; A_RI, then B_OR lie in the layer's flat LoRA parameter, slot after slot.

    Attributes:
        name: of the linear inside the layer, "self_attn.q_proj".
        linear: what is adapted.
        rank: R.
        alpha: LoRA's alpha.
        dropout: probability, on the input of the adapter.
        use_rslora: see `scale`.
    """

    name: str
    linear: PackedLinear
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r) (rank-stabilised, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of A and of B."""
        return self.rank * self.linear.in_features, self.linear.out_features * self.rank

    def views(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A_RI and B_OR as views of two flat pieces, as long as `sizes` says."""
        return (
            a.view(self.rank, self.linear.in_features),
            b.view(self.linear.out_features, self.rank),
        )


class TrainedLayer(nn.Module):
    """A decoder layer, its adapters in one flat parameter, recomputed in the backward if asked.

    Attributes:
        layer: the layer as the model's author wrote it, its linears replaced by PackedLinear.
        lora: float32 [sum of sizes, padded]; None until adapters.attach gives it.
        slots: what lies where in `lora`.
        checkpointing: "none", "reentrant" or "non_reentrant".
    """

    lora: nn.Parameter

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_parameter("lora", None)
        self.slots: tuple[LoraSlot, ...] = ()
        self.checkpointing = "none"

    def split_lora(self, flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(A_RI, B_OR) of every slot, as views of a whole flat tensor such as `lora`."""
        sizes = [size for slot in self.slots for size in slot.sizes]
        parts = flat.split([*sizes, flat.numel() - sum(sizes)])
        return [
            slot.views(a, b)
            for slot, a, b in zip(self.slots, parts[0:-1:2], parts[1::2], strict=False)
        ]

    def _run(self, *args, **kwargs):
        pairs = self.split_lora(self.lora) if self.slots else []
        for slot, (a, b) in zip(self.slots, pairs, strict=True):
            slot.linear.lora = (a, b, slot.scale, slot.dropout)
        try:
            return self.layer(*args, **kwargs)
        finally:
            for slot in self.slots:
                slot.linear.lora = None

    def forward(self, hidden: torch.Tensor, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(hidden, *args, **kwargs)
        if self.checkpointing == "reentrant" and not hidden.requires_grad:
            hidden.requires_grad_()  # without one such input, this kind builds no graph
        return checkpoint(
            partial(self._run, **kwargs),
            hidden,
            *args,
            use_reentrant=self.checkpointing == "reentrant",
            preserve_rng_state=any(slot.dropout for slot in self.slots),
        )


class DecoderBlock(nn.Module):
    """What stands in the model's list of layers: frozen bytes outside, adapters and norms inside.

    Two modules, because FSDP2 treats them as two groups: `packed` without any cast, `body` with
    mixed precision.

    Attributes:
        packed: float32 [layout.nbytes / 4], frozen: the bytes of all linears.
        store: reads `packed`.
        body: everything else of the layer.
    """

    packed: nn.Parameter
    body: TrainedLayer

    def __init__(self, layer: nn.Module, layout: Layout, cache: ConstantsCache) -> None:
        super().__init__()
        packed = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.store = LayerStore(self, layout, cache)
        self.body = TrainedLayer(layer)

    def forward(self, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward."""
        return self.body(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask layers for plain attributes, such as attention_type
            return getattr(cast(TrainedLayer, super().__getattr__("body")).layer, name)
