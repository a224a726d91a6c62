"""A decoder layer over its flat bytes: where everything lies in them, the store that reads them.

Quantized weights and constants of a layer lie one after the other, aligned, in
`DecoderBlock.quantized`, a 1-D float32 parameter: float32, because FSDP2's copies keep its bits
(bfloat16 NaN patterns are rewritten), and one, because sharding, offload and gather then cost one
operation a layer. The linears are views into it.

Shape letters: I in features, O out features, R LoRA rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.model.checkpointing import Offload, Recomputed, SavedActivations
from fsdp_qlora.model.cuda_graphs import Graphs, Replayed
from fsdp_qlora.model.lora import Adapter, InputGroup, LoraSlot
from fsdp_qlora.model.quantize import FORMATS, Fields
from fsdp_qlora.planning.sizes import ALIGN_BYTES, WHOLE_LAYER_BYTES


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the flat bytes of one decoder layer.

    Attributes:
        format_name: row of FORMATS.
        shapes: (O, I) of each linear, in order.
        weights: (start, stop) byte range of each linear's quantized weight.
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


# What a layer keeps for its backward: its input alone; also what is expensive to make again
# (attention, matmuls); everything.
LEVELS = ("full", "selective", "none")


class LayerCache:
    """What was made of the layer at work, replaced by the next one's.

    Attributes:
        key: (store, dtype) that it belongs to; () = none.
        constants: per linear, what the format's `constants` made.
        weights: the linears, dequantized; None = they are made anew for each matmul.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the layer."""
        self.key: tuple = ()
        self.constants: list[Sequence[torch.Tensor]] = []
        self.weights: list[torch.Tensor] | None = None


class LayerStore:
    """Reads one layer's linears out of its flat bytes.

    Attributes:
        read: gives the bytes of the whole layer on the device of the rank: FSDP's gathered
            parameter, or what a placement puts here.
        layout: of the bytes.
        cache: shared by all layers of the model.
        format: row of FORMATS.
    """

    def __init__(self, read: Callable[[], torch.Tensor], layout: Layout, cache: LayerCache) -> None:
        self.read, self.layout, self.cache = read, layout, cache
        self.format = FORMATS[layout.format_name]
        self._viewed: torch.Tensor | None = None

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

    def _dequantize(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        start, stop = self.layout.weights[index]
        quantized, shape = self._bytes[start:stop], self.layout.shapes[index]
        return self.format.dequantize(quantized, self.cache.constants[index], shape, dtype)

    def _dequantize_layer(self, dtype: torch.dtype) -> None:
        flat, layout, cache = self.read(), self.layout, self.cache
        if flat is not self._viewed:
            # FSDP keeps one gathered parameter per layer and only resizes its storage; with weight
            # streaming a layer comes to the same slot again and again: views stay good.
            self._viewed = flat
            self._bytes = flat.detach().view(torch.uint8)
            self._fields = view_fields(self._bytes, layout)
        cache.clear()  # before the next weights are allocated
        tensors = self.format.constants(self._fields, dtype)
        cache.key = (id(self), dtype)
        is_small = layout.num_weights * dtype.itemsize <= WHOLE_LAYER_BYTES
        if is_small and layout.is_contiguous:
            quantized = self._bytes[: layout.weights[-1][1]]
            flat = self.format.dequantize(quantized, tensors, (layout.num_weights, 1), dtype)
            parts = zip(flat.view(-1).split(layout.numels), layout.shapes, strict=True)
            cache.weights = [part.view(shape) for part, shape in parts]
            return
        sizes = [stop - start for start, stop in layout.elements.get(self.format.index_field, ())]
        split = [tensor.split(sizes) for tensor in tensors]
        cache.constants = [[part[i] for part in split] for i in range(len(layout.shapes))]
        if is_small and not self.format.is_sequential:
            cache.weights = [self._dequantize(i, dtype) for i in range(len(layout.shapes))]


class TrainedLayer(nn.Module):
    """A decoder layer, its adapters in one flat parameter, recomputed in the backward if asked.

    Attributes:
        layer: the layer as the model's author wrote it, its linears replaced by QuantizedLinear.
        lora: float32 [num_lora padded]; group after group, first the A matrices (one below the
            other), then the B matrices, then (DoRA) the changes of the magnitudes; None until
            adapters.attach gives it.
        row_squares: float32, of DoRA: sums of squares of the rows of the adapted frozen weights, in
            the order of the slots; None until adapters.initialise gives it.
        store: of the bytes of its linears; None when it is trained whole.
        slots: the adapted linears, in the order of the store.
        level: row of LEVELS.
        is_reentrant: recompute with torch's older checkpoint.
        is_whole: its own parameters are trained, nothing is quantized.
        graphs: CUDA graphs for small batches at level "full", shared by all layers; or None.
    """

    lora: nn.Parameter
    row_squares: torch.Tensor | None

    def __init__(
        self, layer: nn.Module, groups: Sequence[InputGroup], store: LayerStore | None
    ) -> None:
        super().__init__()
        self.is_whole = store is None
        self.layer = layer
        self.register_parameter("lora", None)
        self.register_buffer("row_squares", None, persistent=False)
        self.slots: tuple[LoraSlot, ...] = ()
        self.level, self.is_reentrant = "none", False
        self.graphs: Graphs | None = None
        self.store = store
        self._groups = tuple(groups)
        self._adapted: list[tuple[InputGroup, list[LoraSlot]]] = []
        self._sizes: list[int] = []
        self._is_last_needed: bool | None = None  # by a recomputation; not known yet
        # What can keep results: all matmuls but the last (which recomputation does not need),
        # and the attention, see attention.py.
        attentions = [m for m in layer.modules() if hasattr(m, "is_causal")]
        self._savers: list[Any] = [*self._groups[:-1], *attentions]

    @property
    def is_trained(self) -> bool:
        """Whether it has adapters, or is trained whole."""
        return self.is_whole or bool(self.slots)

    @property
    def num_lora(self) -> int:
        """Elements of `lora` that are no padding."""
        return sum(self._sizes)

    def set_slots(self, slots: Sequence[LoraSlot]) -> int:
        """Say which linears are adapted.

        Args:
            slots: in the order of the store; those of one InputGroup have one scale and dropout.

        Returns:
            Elements that `lora` needs.
        """
        self.slots = tuple(slots)
        by_group = [(g, [s for s in slots if s.linear.group is g]) for g in self._groups]
        self._adapted = [(group, members) for group, members in by_group if members]
        self._sizes = []
        for _, members in self._adapted:
            self._sizes.append(sum(s.rank for s in members) * members[0].linear.in_features)
            self._sizes += [slot.linear.out_features * slot.rank for slot in members]
            self._sizes += [s.linear.out_features for s in members if s.has_magnitude]
        return sum(self._sizes)

    def _adapters(self, flat: torch.Tensor) -> list[Adapter]:
        parts = iter(flat.split([*self._sizes, flat.numel() - sum(self._sizes)]))
        squares = dict(zip(self.slots, self.split_squares(), strict=False))
        return [
            Adapter(
                [slot.linear for slot in slots],
                next(parts).view(-1, slots[0].linear.in_features),
                [next(parts).view(-1, slot.rank) for slot in slots],
                slots[0].scale,
                slots[0].dropout,
                [next(parts) for slot in slots if slot.has_magnitude],
                [squares[slot] for slot in slots if slot in squares],
            )
            for _, slots in self._adapted
        ]

    def split_lora(self, flat: torch.Tensor) -> list[list[torch.Tensor]]:
        """[A_RI, B_OR, of DoRA change_O] of every slot: views of a whole tensor like `lora`."""
        found: dict[str, list[torch.Tensor]] = {}
        for (_, slots), adapter in zip(self._adapted, self._adapters(flat), strict=True):
            a_RIs = adapter.a_RI.split([slot.rank for slot in slots])
            columns = [a_RIs, adapter.b_ORs, adapter.changes_O]
            rows = zip(slots, *filter(len, columns), strict=True)
            found |= {slot.name: parts for slot, *parts in rows}
        return [found[slot.name] for slot in self.slots]

    def split_squares(self) -> Sequence[torch.Tensor]:
        """`row_squares` of every slot; nothing for LoRA."""
        if self.row_squares is None:
            return ()
        return self.row_squares.split([slot.linear.out_features for slot in self.slots])

    def run(
        self, saved: SavedActivations | None, hidden, lora, args: tuple, kwargs: dict, params=None
    ):
        """Run the layer as it is.

        Args:
            saved: where its results are stored or taken from, or None.
            hidden, args, kwargs: of `forward`.
            lora: stands for `self.lora`.
            params: name in `layer` -> tensor that stands for the parameter; None = none does.

        Returns:
            What the layer returns.
        """
        if self.slots:
            for (group, _), adapter in zip(self._adapted, self._adapters(lora), strict=True):
                group.adapter = adapter
        for saver in self._savers:
            saver.saved = saved
        try:
            if params is None:
                return self.layer(hidden, *args, **kwargs)
            return torch.func.functional_call(self.layer, params, (hidden, *args), kwargs)
        finally:
            for saver in self._savers:
                saver.saved = None
            for group in self._groups:
                group.forget()

    def run_again(self, saved: SavedActivations | None, *rest):
        """As `run`, for the gradients alone: what the last linears return is not needed.

        Unless something after them saves a tensor, which the first time tells.
        """
        if saved is not None:
            saved.is_replay = True
        if not self._groups:
            return self.run(saved, *rest)
        last = self._groups[-1]
        if self._is_last_needed is None:
            has_run = []

            def watch(tensor: torch.Tensor) -> torch.Tensor:
                has_run.append(last.has_run)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
                out = self.run(saved, *rest)
            self._is_last_needed = any(has_run)
            return out
        last.is_skipped = not self._is_last_needed
        return self.run(saved, *rest)

    def forward(self, hidden: torch.Tensor, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward."""
        has_gradient = torch.is_grad_enabled() and (self.is_trained or hidden.requires_grad)
        if self.level == "none" or not has_gradient:
            return self.run(None, hidden, self.lora, args, kwargs)
        has_dropout = any(slot.dropout for slot in self.slots)
        if self.graphs is not None and self.level == "full" and not has_dropout:
            found = self.graphs.find(self, hidden, args, kwargs)
            if found is not None:
                return Replayed.apply(self.graphs, found, self, args, kwargs, hidden, self.lora)
        saved = SavedActivations() if self.level == "selective" else None
        if not self.is_reentrant:
            own = dict(self.layer.named_parameters()) if self.is_whole else {}

            def run(hidden, *trained):
                step = self.run_again if torch.is_grad_enabled() else self.run
                if not own:
                    return step(saved, hidden, trained[0], args, kwargs)
                params = dict(zip(own, trained, strict=True))
                return step(saved, hidden, None, args, kwargs, params)

            trained = own.values() or (self.lora,)
            return Recomputed.apply(run, has_dropout, hidden, *trained)
        if not hidden.requires_grad:
            hidden.requires_grad_()  # without one such input, this kind builds no graph

        def run_older(hidden):
            if saved is not None:
                saved.is_replay = torch.is_grad_enabled()
            return self.run(saved, hidden, self.lora, args, kwargs)

        return checkpoint(run_older, hidden, use_reentrant=True, preserve_rng_state=has_dropout)


class DecoderBlock(nn.Module):
    """What stands in the model's list of layers: frozen bytes outside, adapters and norms inside.

    Two modules, because FSDP2 treats them as two groups: `quantized` without any cast, `body` with
    mixed precision.

    Attributes:
        quantized: float32 [layout.nbytes / 4], frozen: the bytes of all linears; None when they are
            read from elsewhere, or the layer is trained whole.
        store: reads them; None for a layer that is trained whole.
        body: everything else of the layer.
        offload: keeps the layer's input on the host for its backward; or None.
    """

    quantized: nn.Parameter
    store: LayerStore | None
    body: TrainedLayer

    def __init__(self, layout: Layout | None, cache: LayerCache) -> None:
        super().__init__()
        self.register_parameter("quantized", None)
        self.offload: Offload | None = None
        if layout is None:
            self.store = None
            return
        quantized = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.quantized = nn.Parameter(quantized, requires_grad=False)
        self.store = LayerStore(lambda: self.quantized, layout, cache)

    def forward(self, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward."""
        if self.offload is None or not torch.is_grad_enabled():
            return self.body(*args, **kwargs)
        with self.offload.saving(args[0]):
            return self.body(*args, **kwargs)

    @property
    def layer_store(self) -> LayerStore:
        """The store of a layer that has one."""
        assert self.store is not None, "a layer that is trained whole has no quantized bytes"
        return self.store

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask layers for plain attributes, such as attention_type
            return getattr(cast(TrainedLayer, super().__getattr__("body")).layer, name)
