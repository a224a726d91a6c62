"""Base formats: how a frozen weight becomes bytes, and bytes a weight again.

Each format is a row of FORMATS. A row knows which fields it stores per linear (quantized weights
and quantization constants), how to `quantize` a weight into them, how to make the constants of a
whole decoder layer usable at once (`constants`), and how to `dequantize` one linear. Only this
module knows bitsandbytes and hqq. HQQ's bytes become weights without hqq, by the fastest way there
is: hqq views a weight as a matrix of groups, [groups, group size] (axis 1) or [group size, groups]
(axis 0), and puts the values of rows that lie far apart into one word.

Shape letters: O out features, I in features, N = O*I weights of a linear.

Source: mobiusml/hqq, hqq/core/bitpack.py and quantize.py (Quantizer.dequantize).
"""

import itertools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import GROUP, MXFP4, NESTED
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError, one_line_of
from fsdp_qlora.model import matmul
from fsdp_qlora.planning.sizes import ALIGN_BYTES, PER_WORD, STORAGES, Storage, whole_layer_bytes


def _dequantize_hqq(quantized, constants, shape, dtype, out=None, *, storage) -> torch.Tensor:
    """The bits of hqq's own dequantization.

    As there, difference and product are rounded to the wider one of the compute dtype and the
    dtype of the constants (zero and scale of each group, as stored); what is wider than the compute
    dtype is then rounded to it.
    """
    (zero, scale), bits = constants, storage.weight_bits
    cols = storage.group_size if storage.axis else math.prod(shape) // storage.group_size
    rows = math.prod(shape) // cols
    words = quantized.view(torch.int32 if bits == 3 else torch.uint8).view(-1, cols)
    math_dtype = torch.promote_types(dtype, zero.dtype)
    if kernels := matmul.triton_kernels(quantized.is_cuda):
        out = torch.empty(rows, cols, dtype=dtype, device=quantized.device)
        kernels.dequantize_hqq(words, zero, scale, out, bits, storage.axis, math_dtype)
        return out.view(*shape)
    zero, scale = (part.unsqueeze(storage.axis) for part in constants)
    return _values(words, bits, math_dtype)[:rows].sub_(zero).mul_(scale).view(*shape).to(dtype)


def _values(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    num_slots = PER_WORD if bits == 3 else 8 // bits
    values = torch.empty((num_slots, *words.shape), dtype=dtype, device=words.device)
    for slot, part in enumerate(values):
        part.copy_((words >> bits * (num_slots - 1 - slot)).bitwise_and_((1 << bits) - 1))
    return values.flatten(0, 1)


Fields = dict[str, torch.Tensor]
ABSMAX = ("absmax", "qabsmax")  # of bitsandbytes' formats: without and with double quantization


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    Attributes:
        quantize: weight_OI -> {field name: 1-D tensor}, at most `num_elements` long; "weight" is
            the quantized weight.
        constants: fields of all linears of a layer -> tensors, each indexed like `index_field`.
        index_field: the field whose element ranges cut the tensors of `constants` into linears
            ("" = no constants).
        is_sequential: the bytes and constants of several linears, one after the other, are those of
            one long linear.
        dequantize: (quantized bytes, constants of the linear, shape, compute dtype, out) ->
            weight_OI in the compute dtype; it may write to the tensor `out`, and then returns that.
    """

    quantize: Callable[[torch.Tensor], Fields]
    constants: Callable[[Fields], Sequence[torch.Tensor]]
    index_field: str
    dequantize: Callable[..., torch.Tensor]
    is_sequential: bool = True


def import_bitsandbytes():
    """bitsandbytes.functional, without warnings that mean nothing here, and without foreign code.

    (As it is imported on a CPU with bfloat16 instructions, bitsandbytes 0.50 has the package
    `kernels`, where that is installed, fetch a compiled kernel from the hub, or run a cached one,
    which is not used here. And where it compiles one, a torch made for CUDA looks for a GPU.)
    """
    for name in ("bitsandbytes", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = sys.modules.pop("kernels", None)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # it cannot be imported
    try:
        import bitsandbytes.functional as bnb
    finally:
        del sys.modules["kernels"]
        sys.modules.update({"kernels": own} if own else {})
    return bnb


import_bitsandbytes()  # before peft does


def _quantize_bnb(weight_OI: torch.Tensor, quant_type: str, double: bool) -> Fields:
    bnb = import_bitsandbytes()
    settings = {"blocksize": GROUP, "quant_type": quant_type, "quant_storage": torch.uint8}
    settings["compress_statistics"] = double
    quantized, state = bnb.quantize_4bit(weight_OI.contiguous(), **settings)
    found = {"weight": quantized.view(-1), ABSMAX[double]: state.absmax}
    if double:
        nested = state.state2.absmax
        offset = state.offset.expand_as(nested).contiguous()  # kernels read it by its address
        found |= {"nested_absmax": nested, "offset": offset}
    return found


def from_stored(parts: Fields, offset: float | None, format_name: str, name: str) -> Fields:
    """Take a linear as bitsandbytes has saved it, byte by byte.

    Args:
        parts: "weight", "absmax" and so on, as in the file.
        offset: of the constants, with double quantization.
        format_name: row of FORMATS.
        name: of the weight, for the message.

    Returns:
        What `quantize` would have made.

    Raises:
        UserError: the codes are not those of the format (code 5).
    """
    bnb, host = import_bitsandbytes(), torch.device("cpu")
    codes = {"quant_map": bnb.get_4bit_type(format_name[:3], device="cpu")}
    codes |= {"nested_quant_map": dynamic_map(host)} if offset is not None else {}
    if not all(torch.equal(parts[part], code) for part, code in codes.items()):
        rule = "stored with another code than this bitsandbytes has"
        raise UserError(name, rule, "take the 16-bit original of this model", INTEGRITY)
    found = {"weight": parts["weight"], ABSMAX[offset is not None]: parts["absmax"]}
    if offset is not None:
        nested = parts["nested_absmax"]
        found |= {"nested_absmax": nested, "offset": torch.full_like(nested, offset)}
    return found


def _as_stored(*names: str) -> Callable[[Fields], Sequence[torch.Tensor]]:
    return lambda fields: [fields[name] for name in names]


def _nested_absmax(fields: Fields) -> Sequence[torch.Tensor]:
    """Second-level constants to absmax, for all linears of a layer in one kernel.

    Source: QLoRA, arXiv 2305.14314, section 3, double quantization.
    """
    quantized, nested, offset = (fields[name] for name in ("qabsmax", "nested_absmax", "offset"))
    code, dtype = dynamic_map(nested.device), torch.float32
    if kernels := matmul.triton_kernels(nested.is_cuda):
        return (kernels.expand(quantized, nested, offset, code, NESTED),)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(quantized, nested, code, NESTED, dtype)
    absmax.view(-1, NESTED).add_(offset.unsqueeze(1))
    return (absmax,)


@lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 256-entry code of 8-bit constants, float32, one copy per device."""
    return import_bitsandbytes().create_dynamic_map().to(device)


@lru_cache
def values_of(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit code, float32, as the library's own kernel has them."""
    codes = torch.arange(16, dtype=torch.uint8, device=device).mul_(16).view(-1, 1)
    rest = torch.ones(1, device=device), GROUP, quant_type, (16, 2), torch.float32
    return torch.ops.bitsandbytes.dequantize_4bit(codes, *rest)[:, 0].contiguous()


def _dequantize_bnb(quantized, constants, shape, dtype, out=None, *, quant_type) -> torch.Tensor:
    if kernels := matmul.triton_kernels(quantized.is_cuda):
        table = values_of(quant_type, quantized.device)
        out = torch.empty(*shape, dtype=dtype, device=quantized.device) if out is None else out
        return kernels.dequantize_bnb(quantized, constants[0], table, out, GROUP)
    rest = constants[0], GROUP, quant_type, shape, dtype
    return torch.ops.bitsandbytes.dequantize_4bit(quantized.view(-1, 1), *rest)


def _quantize_hqq(weight_OI: torch.Tensor, storage: Storage) -> Fields:
    bits, group_size = storage.weight_bits, storage.group_size
    num_groups, rest = divmod(weight_OI.numel(), group_size)
    if rest or (storage.axis == 1 and bits in (2, 4) and num_groups % (8 // bits)):
        rule = f"hqq quantizes whole groups of {group_size}, {8 // bits} of them together"
        remedy = "use another --group_size, or --train_type qlora"
        raise UserError(f"a linear of {list(weight_OI.shape)}", rule, remedy)
    got, rule = "hqq, which an HQQ base needs", "cannot be imported ({})"  # it has no wheel
    remedy = "pip install hqq, or use --train_type qlora"
    with one_line_of(got, remedy, ENVIRONMENT, rule, ImportError):
        from hqq.core.quantize import Quantizer
    groups = {"group_size": group_size, "axis": storage.axis, "device": weight_OI.device.type}
    quantized, meta = Quantizer.quantize(weight_OI, nbits=bits, **groups)
    dtype = getattr(torch, storage.fields[0].dtype)
    constants = {name: meta[name].view(-1).to(dtype) for name in ("scale", "zero")}
    return {"weight": quantized.view(-1).view(torch.uint8), **constants}


def _quantize_int8(weight_OI: torch.Tensor) -> Fields:
    """Row-wise absmax: LLM.int8, arXiv 2208.07339, section 3."""
    quantized, row_absmax, _ = import_bitsandbytes().int8_vectorwise_quant(weight_OI.half())
    return {"weight": quantized.view(-1).view(torch.uint8), "row_absmax": row_absmax}


def _dequantize_int8(quantized, constants, shape, dtype, out=None) -> torch.Tensor:
    """In one kernel, rounded once, as the backward pass of bitsandbytes' MatMul8bitLt does."""
    weight_OI = torch.empty(*shape, dtype=dtype, device=quantized.device)
    values = quantized.view(torch.int8).view(*shape)
    return torch.mul(values, constants[0].unsqueeze(1), out=weight_OI)


def _quantize_mxfp4(weight_OI: torch.Tensor) -> Fields:
    raise AssertionError("MXFP4 is kept where files have it, never made")


def _dequantize_mxfp4(quantized, constants, shape, dtype, out=None) -> torch.Tensor:
    """Codes of e2m1 times a power of two; the low bits of a byte come first.

    Source: Open Compute Project, Microscaling Formats, v1.0, section 5.3.
    """
    table, group = mxfp4_values(quantized.device), STORAGES[MXFP4].group_size
    if kernels := matmul.triton_kernels(quantized.is_cuda):
        out = torch.empty(*shape, dtype=dtype, device=quantized.device) if out is None else out
        return kernels.dequantize_bnb(quantized, constants[0], table, out, group)
    exponents = constants[0].int()  # as the bits of a float32; 0 is the one below the normal ones
    scales = torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)
    codes = torch.stack([quantized & 15, quantized >> 4], -1).view(-1, group)
    return (table[codes.int()] * scales.unsqueeze(1)).view(shape).to(dtype)


@lru_cache
def mxfp4_values(device: torch.device) -> torch.Tensor:
    """The 16 values of e2m1, float32."""
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor([*half, *(-value for value in half)], device=device)


def from_scaled(parts: Fields, shape: Sequence[int], block: tuple[int, int]) -> torch.Tensor:
    """Make a 16-bit weight of whole numbers or FP8 and their scales.

    Args:
        parts: "weight" [O, I], or int32 that hold several columns, low bits first; "scale" of all,
            of rows, of groups of columns, of blocks; where there are such, "zero", alike, and
            "order", the group of each column.
        shape: O, I.
        block: see arch.formats.QuantizedRef.

    Returns:
        weight_OI, in the dtype of the scales, bfloat16 where that is wider.

    Source: compressed-tensors, quantization/lifecycle/forward.py; transformers,
        integrations/finegrained_fp8.py.
    """
    codes, scale, zero = parts["weight"], parts["scale"], parts.get("zero")
    bits = codes.nbytes * 8 // math.prod(shape)
    dtype = scale.dtype if scale.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    if codes.dtype == torch.int32:
        codes = _unpacked(codes, bits, shape[1]) - (1 << bits - 1)
    scale = scale.float().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
    if zero is not None and zero.dtype == torch.int32:
        zero = _unpacked(zero.t(), bits, shape[0]).t() - (1 << bits - 1)
    weight_OI = codes.float()
    for part, apply in ((zero, weight_OI.sub_), (scale, weight_OI.mul_)):
        if part is not None:
            apply(_spread(part.float().view(scale.shape), parts.get("order"), shape, block))
    return weight_OI.to(dtype)


def _unpacked(words: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """The numbers of the rows of int32 words, from 0 on, int32."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).flatten(1)[:, :cols]


def _spread(part, order, shape: Sequence[int], block: tuple[int, int]) -> torch.Tensor:
    """One number for each element, or each row."""
    for dim, (num, most) in enumerate(zip(part.shape, shape, strict=True)):
        if dim == 1 and order is not None:
            part = part[:, order.long()]
        elif num not in (1, most):
            step = block[dim] if block[dim] else -(-most // num)
            part = part.repeat_interleave(step, dim).narrow(dim, 0, most)
    return part


def _quantize_bf16(weight_OI: torch.Tensor) -> Fields:
    return {"weight": weight_OI.bfloat16().contiguous().view(-1).view(torch.uint8)}


def _dequantize_bf16(quantized, constants, shape, dtype, out=None) -> torch.Tensor:
    return quantized.view(torch.bfloat16).view(shape).to(dtype)


def _bnb_row(name: str) -> Format:
    quant_type, _, double = name.partition("_")
    return Format(
        quantize=partial(_quantize_bnb, quant_type=quant_type, double=bool(double)),
        constants=_nested_absmax if double else _as_stored("absmax"),
        index_field=ABSMAX[bool(double)],
        dequantize=partial(_dequantize_bnb, quant_type=quant_type),
    )


def _hqq_row(storage: Storage) -> Format:
    return Format(
        quantize=partial(_quantize_hqq, storage=storage),
        constants=_as_stored("zero", "scale"),
        index_field="scale",
        dequantize=partial(_dequantize_hqq, storage=storage),
        is_sequential=False,
    )


def _int8_scales(fields: Fields) -> Sequence[torch.Tensor]:
    return (fields["row_absmax"] * (1.0 / 127.0),)


FORMATS: dict[str, Format] = {
    **{name: _bnb_row(name) for name in ("nf4", "nf4_dq", "fp4", "fp4_dq")},
    "int8": Format(_quantize_int8, _int8_scales, "row_absmax", _dequantize_int8, False),
    **{name: _hqq_row(row) for name, row in STORAGES.items() if name.startswith("hqq")},
    "bf16": Format(_quantize_bf16, _as_stored(), "", _dequantize_bf16),
    MXFP4: Format(_quantize_mxfp4, _as_stored("exponents"), "exponents", _dequantize_mxfp4),
}


def _aligned(value: int) -> int:
    return -(-value // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the flat bytes of one decoder layer.

    Attributes:
        format_name: row of FORMATS that the run has.
        formats: row of FORMATS of each linear, in order.
        shapes: (O, I) of each linear.
        weights: (start, stop) byte range of each linear's quantized weight.
        fields: name -> (dtype, start, stop) byte range of a constant field, all linears that have
            it one after the other.
        elements: name -> (start, stop) element range of each linear within the field.
        nbytes: length of the flat bytes.
    """

    format_name: str
    formats: tuple[str, ...]
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
        return self.is_run(range(len(self.shapes)))

    def is_run(self, indices: Sequence[int]) -> bool:
        """Whether the weights and constants of some linears are those of one, without gaps."""
        name, own = self.formats[indices[0]], slice(indices[0], indices[-1] + 1)
        is_joint = [*indices] == [*range(own.start, own.stop)]
        if not is_joint or not FORMATS[name].is_sequential or len({*self.formats[own]}) > 1:
            return False
        has_gaps = any(a[1] != b[0] for a, b in itertools.pairwise(self.weights[own]))
        steps = [field.num_weights * field.multiple for field in STORAGES[name].fields]
        return not has_gaps and not any(n % step for n in self.numels[own] for step in steps)


def build_layout(
    shapes: Sequence[tuple[int, int]], format_name: str, own: Sequence[str] = ()
) -> Layout:
    """Lay out the linears of one decoder layer.

    Args:
        shapes: (out features, in features) of each linear.
        format_name: row of FORMATS.
        own: the same of each linear, "" for `format_name`; empty: all are in that.

    Returns:
        The places; a layer of the same shapes has the same.
    """
    formats, offset = tuple(name or format_name for name in own or [""] * len(shapes)), 0
    weights, fields, elements = [], {}, {}
    for shape, name in zip(shapes, formats, strict=True):
        nbytes = STORAGES[name].weight_bytes(shape)
        weights.append((offset, offset + nbytes))
        offset = _aligned(offset + nbytes)
    every = [(name, field) for name in dict.fromkeys(formats) for field in STORAGES[name].fields]
    for name, field in every:
        ranges, start, dtype = [], 0, getattr(torch, field.dtype)
        for shape, of in zip(shapes, formats, strict=True):
            stop = start + (field.num_elements(shape) if of == name else 0)
            ranges.append((start, stop))
            start = stop
        elements[field.name] = tuple(ranges)
        fields[field.name] = (dtype, offset, offset + start * dtype.itemsize)
        offset = _aligned(fields[field.name][2])
    return Layout(format_name, formats, tuple(shapes), tuple(weights), fields, elements, offset)


def layer_layouts(info: ModelInfo, format_name: str) -> tuple[Layout, ...]:
    """The layout of every decoder layer of a model; layers of one kind share theirs.

    Args:
        info: the model.
        format_name: row of FORMATS.
    """
    by_kind: dict[int, Layout] = {}
    for kind in info.kinds:
        own = [linear.format for linear in kind.linears]
        layout = build_layout([linear.shape for linear in kind.linears], format_name, own)
        by_kind |= dict.fromkeys(kind.layers, layout)
    return tuple(by_kind[index] for index in range(info.num_layers))


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


def store_linear(flat_bytes: torch.Tensor, layout: Layout, index: int, arrays: Fields) -> None:
    """Put a quantized linear into its places in the bytes of its layer.

    Args:
        flat_bytes: uint8 [nbytes], written to; on the device of the arrays.
        layout: of the layer.
        index: of the linear.
        arrays: of the format's `quantize`; emptied of the quantized weight.
    """
    start, stop = layout.weights[index]
    flat_bytes[start:stop] = arrays.pop("weight")
    fields = view_fields(flat_bytes, layout)
    for name, values in arrays.items():
        first = layout.elements[name][index][0]
        fields[name][first : first + values.numel()] = values


class LayerCache:
    """What was made of the layer at work, replaced by the next one's.

    Attributes:
        key: (store, dtype) that it belongs to; () = none.
        constants: what the `constants` of each format made.
        weights: the linears, dequantized; None = they are made anew for each matmul.
        joint: places in the layer -> the 4-bit weights of linears that read one input.
        most_bytes: of the weights of a layer that is dequantized at once.
        code: of large matmuls in 8 bit, or None.
        sums_in_fp16: whether large matmuls do.
    """

    def __init__(self, way: str = "bf16") -> None:
        self.most_bytes, self.code = whole_layer_bytes(), matmul.CODES.get(way)
        self.sums_in_fp16 = way == "fp16"
        self.clear()

    def clear(self) -> None:
        """Forget the layer."""
        self.key: tuple = ()
        self.constants: dict[str, Sequence[torch.Tensor]] = {}
        self.joint: dict[tuple[int, ...], matmul.Quantized4] = {}
        self.weights: list[torch.Tensor] | None = None


class LayerStore:
    """Reads one layer's linears out of its flat bytes.

    Attributes:
        read: gives the bytes of the whole layer on the device of the rank: FSDP's gathered
            parameter, or what a placement puts here.
        layout: of the bytes.
        cache: shared by all layers of a model; its own by default.
        formats: rows of FORMATS, by name.
        is_mixed: it holds experts, which are dequantized by themselves, see `stacked`.
        scales: of linears that run in 8 bit, see matmul.Quantized4; kept from their first use on.
    """

    def __init__(
        self, read: Callable[[], torch.Tensor], layout: Layout, cache: LayerCache | None = None
    ) -> None:
        self.read, self.layout, self.cache = read, layout, cache or LayerCache()
        self.formats = {name: FORMATS[name] for name in layout.formats}
        self._viewed: torch.Tensor | None = None
        self.is_mixed = False
        self.scales: dict[tuple[int, ...], torch.Tensor] = {}
        self._runs: dict[tuple[int, ...], bool] = {}  # linears that lie side by side

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize one linear, or all of a small layer, which then serve until another layer.

        Args:
            index: of the linear in the layer.
            dtype: of the result.

        Returns:
            weight_OI, on the device of the bytes.
        """
        cache = self.cache
        if cache.key != (id(self), dtype):
            self._dequantize_layer(dtype)
        if cache.weights is not None:
            return cache.weights[index]
        return self._dequantize(index, dtype)

    def can_multiply(self, indices: Sequence[int]) -> bool:
        """Whether large matmuls of linears run in 8 bit: asked for, and their places allow it.

        Args:
            indices: of linears that read one input.
        """
        layout = self.layout
        is_joint = len(indices) == 1 or layout.is_run(indices)
        fits = not any(rows % 16 or cols % GROUP for rows, cols in layout.shapes)
        names = [layout.formats[index] for index in indices]
        is_hqq = all(name.startswith("hqq") for name in names)
        can_join = is_hqq or (is_joint and self.formats[names[0]].index_field in ABSMAX)
        return self.cache.code is not None and can_join and fits

    def quantized(self, indices: tuple[int, ...]) -> matmul.Quantized4 | matmul.Quantized8:
        """The 4-bit weights of linears that read one input.

        Args:
            indices: for which `can_multiply` holds.
        """
        cache, key, layout, code = self.cache, (id(self), None), self.layout, self.cache.code
        assert code is not None
        if layout.formats[indices[0]].startswith("hqq"):
            weights = [self.weight(index, torch.bfloat16) for index in indices]
            weight_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
            codes_OI, scales_O1 = matmul.quantize_rows([weight_OI], code._replace(block=0))
            return matmul.Quantized8(codes_OI, scales_O1[:, 0], code)
        if cache.key != key:
            self._begin(key)
        if indices not in cache.joint:
            first, last = indices[0], indices[-1]
            num_out = sum(layout.shapes[index][0] for index in indices)
            codes = self._bytes[layout.weights[first][0] : layout.weights[last][1]]
            absmax = self._constants(first, last)[0][: codes.numel() * 2 // GROUP]
            table = values_of(layout.formats[first][:3], codes.device)
            if indices not in self.scales:
                self.scales[indices] = matmul.row_scales(absmax, num_out, code)
            cache.joint[indices] = matmul.Quantized4(
                codes, absmax, table, self.scales[indices], code
            )
        return cache.joint[indices]

    def stacked(self, parts: Sequence[tuple[int, ...]], dtype: torch.dtype) -> torch.Tensor:
        """Dequantize linears of one shape into one tensor: at once where they lie side by side.

        Args:
            parts: linears, as many in each part; the first of all parts lie one below the other in
                the first matrix of the result, and so on.
            dtype: of the result.

        Returns:
            [linears of a part, O of all parts, I].
        """
        if self.cache.key != (id(self), dtype):
            self._dequantize_layer(dtype)
        shapes = [self.layout.shapes[part[0]] for part in parts]
        rows = [shape[0] for shape in shapes]
        size = len(parts[0]), sum(rows), shapes[0][1]
        stacked = torch.empty(size, dtype=dtype, device=self._bytes.device)
        for part, out in zip(parts, stacked.split(rows, 1), strict=True):
            self._stack(part, out)
        return stacked

    def _stack(self, part: tuple[int, ...], out: torch.Tensor) -> None:
        if part not in self._runs:
            self._runs[part] = self.layout.is_run(part)
        if not self._runs[part]:
            for index, matrix in zip(part, out, strict=True):
                matrix.copy_(self._dequantize(index, out.dtype))
            return
        made = self._joint(
            part[0], part[-1], (out.shape[1] * len(part), out.shape[2]), out.dtype, out
        )
        if made is not out:
            out.copy_(made.view(out.shape))

    def _dequantize(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        return self._joint(index, index, self.layout.shapes[index], dtype)

    def _joint(self, first: int, last: int, shape, dtype, out=None) -> torch.Tensor:
        """Dequantize linears that lie side by side as one of this shape."""
        weights, fmt = self.layout.weights, self.formats[self.layout.formats[first]]
        quantized = self._bytes[weights[first][0] : weights[last][1]]
        return fmt.dequantize(quantized, self._constants(first, last), shape, dtype, out)

    def _constants(self, first: int, last: int) -> Sequence[torch.Tensor]:
        """Those of linears that lie side by side."""
        name = self.layout.formats[first]
        ranges = self.layout.elements.get(self.formats[name].index_field)
        if ranges is None:
            return []
        return [tensor[ranges[first][0] : ranges[last][1]] for tensor in self.cache.constants[name]]

    def _dequantize_layer(self, dtype: torch.dtype) -> None:
        layout, cache = self.layout, self.cache
        self._begin((id(self), dtype))
        is_small = layout.num_weights * dtype.itemsize <= cache.most_bytes and not self.is_mixed
        if is_small and layout.is_contiguous:
            flat = self._joint(0, len(layout.shapes) - 1, (layout.num_weights, 1), dtype)
            parts = zip(flat.view(-1).split(layout.numels), layout.shapes, strict=True)
            cache.weights = [part.view(shape) for part, shape in parts]
            cache.constants.clear()
        elif is_small and not self.formats[layout.formats[0]].is_sequential:
            cache.weights = [self._dequantize(i, dtype) for i in range(len(layout.shapes))]

    def _begin(self, key: tuple) -> None:
        flat, cache = self.read(), self.cache
        if flat is not self._viewed:
            # FSDP keeps one gathered parameter per layer and only resizes its storage; with weight
            # streaming a layer comes to the same slot again and again: views stay good.
            self._viewed = flat
            self._bytes = flat.detach().view(torch.uint8)
            self._fields = view_fields(self._bytes, self.layout)
        cache.clear()  # before the next weights are allocated
        cache.constants = {n: fmt.constants(self._fields) for n, fmt in self.formats.items()}
        cache.key = key
