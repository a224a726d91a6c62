"""A decoder layer over its flat bytes: the store that reads them, adapters, recomputation.

Packed weights and constants of a layer lie in `DecoderBlock.packed`, a 1-D float32 parameter:
float32, because FSDP2's copies keep its bits (bfloat16 NaN patterns are rewritten), and one,
because sharding, offload and gather then cost one operation a layer. The linears are views into it.

Shape letters: I in features, O out features, R LoRA rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.model.graphs import Graphs, Replayed
from fsdp_qlora.model.layout import Layout, view_fields
from fsdp_qlora.model.linear import Adapter, InputGroup, LoraSlot
from fsdp_qlora.model.offload import Offload
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.model.recompute import Kept, Recomputed, saves_after
from fsdp_qlora.planning.limits import WHOLE_LAYER_BYTES

# What a layer keeps for its backward: its input alone; also what is dear to make again (attention,
# products); everything.
LEVELS = ("full", "selective", "none")


class LayerCache:
    """What was made of the layer at work, replaced by the next one's.

    Attributes:
        key: (store, dtype) that it belongs to; () = none.
        constants: per linear, what the format's `constants` made.
        weights: the linears, dequantised; None = they are made anew for each product.
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

    def _view(self, flat: torch.Tensor) -> None:
        # FSDP keeps one gathered parameter per layer and only resizes its storage, a streamed layer
        # comes to the same slot again and again: views stay good.
        self._viewed = flat
        self._bytes = flat.detach().view(torch.uint8)
        self._fields = view_fields(self._bytes, self.layout)

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantise one linear, or all of a small layer, which then serve until another layer.

        Args:
            index: of the linear in the layer.
            dtype: of the result.

        Returns:
            weight_OI, on the device of the bytes.
        """
        cache = self.cache
        if cache.key != (id(self), dtype):
            self._unpack_layer(dtype)
        if cache.weights is not None:
            return cache.weights[index]
        return self._unpack(index, dtype)

    def _unpack(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        start, stop = self.layout.weights[index]
        packed, shape = self._bytes[start:stop], self.layout.shapes[index]
        return self.format.unpack(packed, self.cache.constants[index], shape, dtype)

    def _unpack_layer(self, dtype: torch.dtype) -> None:
        flat, layout, cache = self.read(), self.layout, self.cache
        if flat is not self._viewed:
            self._view(flat)
        cache.clear()  # before the next weights are allocated
        tensors = self.format.constants(self._fields, dtype)
        cache.key = (id(self), dtype)
        is_small = layout.num_weights * dtype.itemsize <= WHOLE_LAYER_BYTES
        if is_small and layout.is_contiguous:
            packed = self._bytes[: layout.weights[-1][1]]
            flat = self.format.unpack(packed, tensors, (layout.num_weights, 1), dtype)
            parts = zip(flat.view(-1).split(layout.numels), layout.shapes, strict=True)
            cache.weights = [part.view(shape) for part, shape in parts]
            return
        sizes = [stop - start for start, stop in layout.elements.get(self.format.index_field, ())]
        split = [tensor.split(sizes) for tensor in tensors]
        cache.constants = [[part[i] for part in split] for i in range(len(layout.shapes))]
        if is_small and not self.format.is_sequential:
            cache.weights = [self._unpack(i, dtype) for i in range(len(layout.shapes))]


class TrainedLayer(nn.Module):
    """A decoder layer, its adapters in one flat parameter, recomputed in the backward if asked.

    Attributes:
        layer: the layer as the model's author wrote it, its linears replaced by PackedLinear.
        lora: float32 [num_lora padded]; group after group, first the A matrices (one below the
            other), then the B matrices, then (DoRA) the changes of the magnitudes; None until
            adapters.attach gives it.
        row_squares: float32, of DoRA: sums of squares of the rows of the adapted frozen weights, in
            the order of the slots; None until adapters.initialise gives it.
        store: of the bytes of its linears; None when it is trained whole.
        slots: the adapted linears, in the order of the store.
        level: row of LEVELS.
        is_reentrant: recompute with torch's older checkpoint.
        is_whole: its own parameters are trained, nothing is packed.
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
        # What can keep results: all products but the last (which recomputation does not need),
        # and the attention, see attention.py.
        attentions = [m for m in layer.modules() if hasattr(m, "is_causal")]
        self._keepers: list[Any] = [*self._groups[:-1], *attentions]

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

    def run(self, kept: Kept | None, hidden, lora, args: tuple, kwargs: dict, params=None):
        """Run the layer as it is.

        Args:
            kept: where its results are stored or taken from, or None.
            hidden, args, kwargs: of `forward`.
            lora: stands for `self.lora`.
            params: name in `layer` -> tensor that stands for the parameter; None = none does.

        Returns:
            What the layer returns.
        """
        if self.slots:
            for (group, _), adapter in zip(self._adapted, self._adapters(lora), strict=True):
                group.adapter = adapter
        for keeper in self._keepers:
            keeper.kept = kept
        try:
            if params is None:
                return self.layer(hidden, *args, **kwargs)
            return torch.func.functional_call(self.layer, params, (hidden, *args), kwargs)
        finally:
            for keeper in self._keepers:
                keeper.kept = None
            for group in self._groups:
                group.forget()

    def run_again(self, kept: Kept | None, *rest):
        """As `run`, for the gradients alone: what the last linears return is not needed.

        Unless something after them saves a tensor, which the first time tells.
        """
        if kept is not None:
            kept.is_replay = True
        if not self._groups:
            return self.run(kept, *rest)
        last = self._groups[-1]
        if self._is_last_needed is None:
            watch, is_needed = saves_after(lambda: last.has_run)
            with watch:
                out = self.run(kept, *rest)
            self._is_last_needed = is_needed()
            return out
        last.is_skipped = not self._is_last_needed
        return self.run(kept, *rest)

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
        kept = Kept() if self.level == "selective" else None
        if not self.is_reentrant:
            own = dict(self.layer.named_parameters()) if self.is_whole else {}

            def run(hidden, *trained):
                step = self.run_again if torch.is_grad_enabled() else self.run
                if not own:
                    return step(kept, hidden, trained[0], args, kwargs)
                params = dict(zip(own, trained, strict=True))
                return step(kept, hidden, None, args, kwargs, params)

            trained = own.values() or (self.lora,)
            return Recomputed.apply(run, has_dropout, hidden, *trained)
        if not hidden.requires_grad:
            hidden.requires_grad_()  # without one such input, this kind builds no graph

        def run_older(hidden):
            if kept is not None:
                kept.is_replay = torch.is_grad_enabled()
            return self.run(kept, hidden, self.lora, args, kwargs)

        return checkpoint(run_older, hidden, use_reentrant=True, preserve_rng_state=has_dropout)


class DecoderBlock(nn.Module):
    """What stands in the model's list of layers: frozen bytes outside, adapters and norms inside.

    Two modules, because FSDP2 treats them as two groups: `packed` without any cast, `body` with
    mixed precision.

    Attributes:
        packed: float32 [layout.nbytes / 4], frozen: the bytes of all linears; None when they are
            read from elsewhere, or the layer is trained whole.
        store: reads them; None for a layer that is trained whole.
        body: everything else of the layer.
        offload: keeps the layer's input on the host for its backward; or None.
    """

    packed: nn.Parameter
    store: LayerStore | None
    body: TrainedLayer

    def __init__(self, layout: Layout | None, cache: LayerCache) -> None:
        super().__init__()
        self.register_parameter("packed", None)
        self.offload: Offload | None = None
        if layout is None:
            self.store = None
            return
        packed = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.store = LayerStore(lambda: self.packed, layout, cache)

    def forward(self, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward."""
        if self.offload is None or not torch.is_grad_enabled():
            return self.body(*args, **kwargs)
        with self.offload.saving(args[0]):
            return self.body(*args, **kwargs)

    @property
    def layer_store(self) -> LayerStore:
        """The store of a layer that has one."""
        assert self.store is not None, "a layer that is trained whole has no packed bytes"
        return self.store

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask layers for plain attributes, such as attention_type
            return getattr(cast(TrainedLayer, super().__getattr__("body")).layer, name)
