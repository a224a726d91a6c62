"""The 4-bit store: all frozen linears of a decoder layer in one flat byte parameter.

Packed weights and quantisation constants of a layer lie one after the other in `DecoderBlock.packed`, a 1-D float32
parameter: float32, because FSDP2's copies keep its bits (bfloat16 NaN patterns are rewritten), and one, because
sharding, offload and gather then cost one operation a layer. The linears are views into it.

Shape letters: B batch, T tokens, M = B*T, I in features, O out features, R LoRA rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        fields: name -> (dtype, start, stop) byte range of a constant field, all linears one after the other.
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
    """The constant fields of a layer as typed views of its flat uint8 bytes."""
    return {
        name: flat_bytes[start:stop].view(dtype)
        for name, (dtype, start, stop) in layout.fields.items()
    }


def pack_linear(
    flat_bytes: torch.Tensor, layout: Layout, index: int, weight_OI: torch.Tensor
) -> None:
    """Quantise one linear into its places in the flat uint8 bytes [nbytes] of its layer."""
    arrays = FORMATS[layout.format_name].pack(weight_OI)
    start, stop = layout.weights[index]
    flat_bytes[start:stop] = arrays.pop("weight")
    fields = view_fields(flat_bytes, layout)
    for name, values in arrays.items():
        first = layout.elements[name][index][0]
        fields[name][first : first + values.numel()] = values


class ConstantsCache:
    """The usable constants of the layer at work: made once per pass over a layer, replaced by the next one's."""

    def __init__(self) -> None:
        self.key: tuple = ()
        self.value: list[Sequence[torch.Tensor]] = []


class LayerStore:
    """Reads one layer's linears out of the flat parameter of `owner` (whole, that is gathered, when it is read)."""

    def __init__(self, owner: nn.Module, layout: Layout, cache: ConstantsCache) -> None:
        self.owner, self.layout, self.cache = owner, layout, cache
        self.format = FORMATS[layout.format_name]
        self._viewed: torch.Tensor | None = None

    def _view(self) -> None:
        # FSDP keeps one gathered parameter per layer and only resizes its storage, so views stay good.
        self._viewed, self.cache.key = self.owner.packed, ()
        flat_bytes = self._viewed.detach().view(torch.uint8)
        self._weights = [flat_bytes[start:stop] for start, stop in self.layout.weights]
        self._fields = view_fields(flat_bytes, self.layout)

    def _constants(self, dtype: torch.dtype) -> list[Sequence[torch.Tensor]]:
        if self.cache.key != (id(self), dtype):
            tensors = self.format.constants(self._fields, dtype)
            ranges = self.layout.elements.get(self.format.index_field, ((0, 0),) * 99)
            sizes = [stop - start for start, stop in ranges]
            parts = [tensor.split(sizes) for tensor in tensors]
            self.cache.value = [[p[i] for p in parts] for i in range(len(self._weights))]
            self.cache.key = (id(self), dtype)
        return self.cache.value

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight_OI of linear `index`, in `dtype`, on the device of the gathered bytes."""
        if self.owner.packed is not self._viewed:
            self._view()
        constants = self._constants(dtype)[index]
        return self.format.unpack(
            self._weights[index], constants, self.layout.shapes[index], dtype
        )


class LoraProduct(torch.autograd.Function):
    """delta_MO = scale * (x A^T) B^T, and x itself passed through.

    It runs before the frozen product and is the only one of the two that saves a tensor (its input), so that the
    recomputation of a checkpointed layer may stop before the last frozen product. Passing x through lets the
    backward add its share of the input gradient into that of the frozen product, without another tensor.
    """

    @staticmethod
    def forward(ctx, x, lora_x, a_RI, b_OR, scale):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if lora_x is None else lora_x, a_RI, b_OR)
        ctx.scale, ctx.has_own_input = scale, lora_x is not None
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        hidden_MR = _flat(x if lora_x is None else lora_x) @ a_RI.t()
        return passed, hidden_MR.mul_(scale) @ b_OR.t()

    @staticmethod
    def backward(ctx, grad_x, grad_MO):
        x, a_RI, b_OR = ctx.saved_tensors
        x_MI = _flat(x)
        hidden_MR = (x_MI @ a_RI.t()).mul_(ctx.scale)
        grad_hidden_MR = (grad_MO @ b_OR).mul_(ctx.scale)
        grad_a, grad_b = grad_hidden_MR.t() @ x_MI, grad_MO.t() @ hidden_MR
        if ctx.has_own_input:
            grad_lora_x = (grad_hidden_MR @ a_RI).view_as(x) if ctx.needs_input_grad[1] else None
            return grad_x, grad_lora_x, grad_a, grad_b, None
        if grad_x is not None:
            _flat(grad_x).addmm_(grad_hidden_MR, a_RI)
        return grad_x, None, grad_a, grad_b, None


class FrozenProduct(torch.autograd.Function):
    """y_MO = delta_MO + x W^T + bias with W dequantised for the product only, in forward and again in backward.

    `delta` (or None) is added to in place. Nothing is saved: the backward asks the store for W.
    """

    @staticmethod
    def forward(ctx, x, delta_MO, linear):
        ctx.linear, ctx.shape = linear, x.shape
        weight_OI = linear.dequantize(x.dtype)
        if delta_MO is None:
            out_MO = _flat(x) @ weight_OI.t()
        else:
            out_MO = delta_MO.addmm_(_flat(x), weight_OI.t())
            ctx.mark_dirty(delta_MO)
        return out_MO if linear.bias is None else out_MO.add_(linear.bias)

    @staticmethod
    def backward(ctx, grad_MO):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MO @ ctx.linear.dequantize(grad_MO.dtype)).view(ctx.shape)
        return grad_x, grad_MO if ctx.needs_input_grad[1] else None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class PackedLinear(nn.Module):
    """A frozen linear whose weight lies in its layer's store, with room for a LoRA pair.

    Attributes:
        bias: frozen bias [O] or None.
        lora: (A_RI, B_OR, scale, dropout) while a forward pass of the layer runs, else None.
    """

    def __init__(self, linear: nn.Linear, store: LayerStore, index: int) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.register_parameter("bias", linear.bias)
        self.store, self.index = store, index
        self.lora: tuple[torch.Tensor, torch.Tensor, float, float] | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """weight_OI in `dtype`."""
        return self.store.weight(self.index, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
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
    """One adapted linear: its place in the flat LoRA parameter of the layer (A_RI first, then B_OR)."""

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
        """Flat pieces as A_RI and B_OR."""
        return (
            a.view(self.rank, self.linear.in_features),
            b.view(self.linear.out_features, self.rank),
        )


class TrainedLayer(nn.Module):
    """A decoder layer with its adapters in one flat parameter, recomputed in the backward pass if asked.

    Attributes:
        layer: the layer as the model's author wrote it, its linears replaced by PackedLinear.
        lora: float32 [sum of sizes, padded] or None; `slots` say what lies where.
        checkpointing: "none", "reentrant" or "non_reentrant".
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_parameter("lora", None)
        self.slots: tuple[LoraSlot, ...] = ()
        self.checkpointing = "none"

    def split_lora(self, flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(A_RI, B_OR) of every slot, as views of the flat tensor."""
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
        """As the layer's own forward."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(hidden, *args, **kwargs)
        if self.checkpointing == "reentrant" and not hidden.requires_grad:
            hidden.requires_grad_()  # reentrant checkpointing builds no graph without one such input
        return checkpoint(
            partial(self._run, **kwargs),
            hidden,
            *args,
            use_reentrant=self.checkpointing == "reentrant",
            preserve_rng_state=any(slot.dropout for slot in self.slots),
        )


class DecoderBlock(nn.Module):
    """What stands in the model's list of layers: the frozen bytes outside, adapters and norms inside.

    Two modules, because FSDP2 treats them as two groups: `packed` without any cast, `body` with mixed precision.
    """

    def __init__(self, layer: nn.Module, layout: Layout, cache: ConstantsCache) -> None:
        super().__init__()
        packed = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.store = LayerStore(self, layout, cache)
        self.body = TrainedLayer(layer)

    def forward(self, *args, **kwargs):
        """As the layer's own forward."""
        return self.body(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for plain attributes, such as attention_type
            return getattr(super().__getattr__("body").layer, name)
