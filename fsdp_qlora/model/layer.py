"""A decoder layer as it is trained: its adapters, its quantized bytes, and what it recomputes.

Quantized weights and constants of a layer lie one after the other, aligned, in
`DecoderBlock.quantized`, a 1-D float32 parameter: float32, because FSDP2's copies keep its bits
(bfloat16 NaN patterns are rewritten), and one, because sharding, offload and gather then cost one
operation a layer. The linears are views into it (quantize.LayerStore).

Inputs saved for a recomputation may wait in host memory. On a GPU the copies run on a stream of
their own: out while the next layers compute, back one layer ahead of the backward pass. The host
waits for nothing.

Of long rows the end of a layer (norm, MLP, residual) is computed tile by tile of tokens, forward
and backward: what is as wide as the MLP is never held for all of them.

Source: sequence tiling, arXiv 2506.13996.

Shape letters: I in features, O out features, R LoRA rank.
"""

import inspect
import re
from collections import UserDict
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.model import experts, placement, quantize, visit
from fsdp_qlora.model.cuda_graphs import Graphs, Replayed
from fsdp_qlora.model.lora import Adapter, Draws, InputGroup, LoraSlot, SavedActivations
from fsdp_qlora.planning.sizes import ENDING, LONG_TOKENS, TILE_TOKENS


class Tiled(torch.autograd.Function):
    """Gradients of hidden + run(hidden), tile by tile; the value itself is not made.

    Args:
        run: (tile [1, tile, H], tensors) -> the same shape.
        tile: tokens of one.
        draws: of the forward pass.
        hidden: [B, T, H].
        tensors: trained ones that `run` reads; the gradients are summed up in float32.

    Returns:
        Something of the shape of `hidden`. The gradient that comes back is written to.
    """

    @staticmethod
    def forward(ctx, run, tile, draws, hidden, *tensors):
        ctx.run, ctx.tile, ctx.draws = run, tile, draws
        ctx.save_for_backward(hidden, *tensors)
        return hidden.new_empty(1).expand(hidden.shape)

    @staticmethod
    def backward(ctx, grad):
        hidden, *tensors = ctx.saved_tensors
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
        grad = grad.contiguous()
        pairs = zip(tiles(hidden, ctx.tile), tiles(grad, ctx.tile), strict=True)
        with ctx.draws.again():
            for part, grad_part in pairs:
                part = part.detach().requires_grad_()
                with torch.enable_grad():
                    out = ctx.run(part, leaves)
                own, *found = torch.autograd.grad(out, [part, *leaves], grad_part)
                del out
                grad_part += own
                for total, new in zip(sums, found, strict=True):
                    total += new
        pairs = zip(sums, tensors, strict=True)
        return None, None, None, grad, *[total.to(tensor.dtype) for total, tensor in pairs]


def tiles(hidden: torch.Tensor, tile: int) -> Sequence[torch.Tensor]:
    """Views [1, tile or fewer, H] of all tokens of a tensor [B, T, H]."""
    return hidden.view(1, -1, hidden.shape[-1]).split(tile, 1)


class _Ending:
    """In the place of what a layer adds to the residual; makes the sum when that is asked for."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._make = make

    def __radd__(self, residual: torch.Tensor) -> torch.Tensor:
        return self._make(residual)


class Recomputed(torch.autograd.Function):
    """run(hidden, *trained), whose backward runs it once more and keeps only its inputs till then.

    As torch's reentrant checkpoint, but it hands back the gradients of what is trained instead of
    accumulating them inside, needs no input that requires one, and is several times cheaper for the
    host than the non-reentrant one, which sees every saved tensor.

    Args:
        run: (hidden, *trained) -> tensor or tuple of tensors; called twice.
        has_dropout: give the second call the random numbers of the first.
        hidden: [B, T, H].
        trained: the adapters, or the layer's own parameters; or None; then SharedStates.tensors.

    Returns:
        What `run` returns.
    """

    @staticmethod
    def forward(ctx, run, has_dropout, hidden, *trained):
        ctx.run, ctx.draws = run, Draws(has_dropout, hidden)
        ctx.save_for_backward(hidden, *trained)
        return run(hidden, *trained)

    @staticmethod
    def backward(ctx, *grads_out):
        saved = ctx.saved_tensors  # asked for once: an input may come from the host
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved, needed, strict=True)
        ]
        with ctx.draws.again(), torch.enable_grad():
            outs = ctx.run(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        every = zip(outs, grads_out, strict=True)
        pairs = [(get_gradient_edge(o), g) for o, g in every if g is not None and o.requires_grad]
        del outs, every  # nobody looks at their values
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        of = [out for out, _ in pairs], wanted, [grad for _, grad in pairs]
        grads = iter(torch.autograd.grad(*of, allow_unused=True))
        return None, None, *[next(grads) if need else None for need in needed]


class SharedStates:
    """What layers hand on beside the residual: keys and values that later layers read (Gemma 4).

    transformers passes a mapping that a layer writes to or reads from. For a recomputation its
    tensors become inputs and outputs of the layer, so that their gradients arrive.

    Attributes:
        tensors: that earlier layers have written.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        """Find the mapping among a layer's arguments; most layers have none.

        Args:
            kwargs: of the layer.
        """
        self._kwargs = kwargs
        self._key = next((k for k, v in kwargs.items() if isinstance(v, UserDict)), None)
        self.tensors, self._spec = pytree.tree_flatten(dict(kwargs[self._key]) if self._key else {})
        self._given: dict[str, Any] = {}
        self._written: Any = None  # names and structure of what the layer writes
        self._is_tuple = False

    def give(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The layer's arguments with `tensors` for those of the mapping."""
        if self._key is None:
            return self._kwargs
        self._given = pytree.tree_unflatten(list(tensors), self._spec)
        self._board = type(self._kwargs[self._key])(self._given)
        return self._kwargs | {self._key: self._board}

    def take(self, out: Any) -> Any:
        """The layer's result, and behind it what it has written."""
        if self._key is None:
            return out
        new = {n: v for n, v in self._board.items() if v is not self._given.get(n)}
        tensors, self._written = pytree.tree_flatten(new)
        self._is_tuple = isinstance(out, tuple)
        return (*out, *tensors) if self._is_tuple else (out, *tensors)

    def put(self, outs: Any) -> Any:
        """Write the tensors behind the layer's result into the mapping; return the result."""
        if self._key is None:
            return outs
        num = len(outs) - self._written.num_leaves
        self._kwargs[self._key].update(pytree.tree_unflatten(list(outs[num:]), self._written))
        return outs[:num] if self._is_tuple else outs[0]


class Offload:
    """The last tensor put away is the first to come back."""

    def __init__(self, device: torch.device, nbytes: int, folder: Path | None = None) -> None:
        """Make room as it is needed.

        Args:
            device: of the rank.
            nbytes: of the largest tensor that is expected.
            folder: where they lie in a file instead; or None.
        """
        self._device, self._nbytes, self._folder = device, nbytes, folder
        self._rooms: list[placement.HostBytes] = []
        self._stack: list[torch.Tensor] = []  # on the host
        self._fetched: dict[int, tuple[torch.Tensor, Any]] = {}  # and when they have arrived
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Host memory that it holds."""
        return sum(room.bytes.nbytes for room in self._rooms if self._folder is None)

    def saving(self, *hidden: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Context in which autograd keeps `hidden` on the host; other tensors stay where they are.

        Args:
            hidden: [B, T, H], inputs of a layer that keeps them for its backward, and them alone.
        """
        where = {(tensor.data_ptr(), tensor.shape) for tensor in hidden}

        def pack(tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
            if (tensor.data_ptr(), tensor.shape) not in where:
                return tensor
            depth = self._put(tensor.detach())
            return lambda: self._take(depth)

        def unpack(packed: Any) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed()

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _put(self, tensor: torch.Tensor) -> int:
        depth, nbytes = len(self._stack), tensor.nbytes
        if depth < len(self._rooms) and self._rooms[depth].bytes.numel() < nbytes:
            if self._copies is not None:
                self._copies.synchronize()  # the last step may still be reading
            del self._rooms[depth:]
        if depth == len(self._rooms):
            room = placement.private(max(nbytes, self._nbytes), bool(self._copies), self._folder)
            self._rooms.append(room)
        copy = self._rooms[depth].bytes[:nbytes].view(tensor.dtype).view(tensor.shape)
        placement.copy(copy, tensor, self._copies)
        if self._copies is not None:
            tensor.record_stream(self._copies)
        self._stack.append(copy)
        return depth

    def _take(self, depth: int) -> torch.Tensor:
        assert depth == len(self._stack) - 1, "saved inputs are asked for in another order"
        self._fetch(depth)
        if depth:
            self._fetch(depth - 1)
        self._stack.pop()
        found, arrived = self._fetched.pop(depth)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        return found

    def _fetch(self, depth: int) -> None:
        if depth in self._fetched:
            return
        # Made in the stream that computes: its memory is free once what uses it has run there.
        copy = self._stack[depth]
        fetched = torch.empty_like(copy, device=self._device)
        self._fetched[depth] = fetched, placement.copy(fetched, copy, self._copies)


def _ending(layer: nn.Module) -> list[nn.Module]:
    """The modules at the end of a layer whose sum with the residual it returns; or none."""
    try:
        source = inspect.getsource(type(layer).forward)
        found = ENDING.search(source)
    except (OSError, TypeError):
        return []
    if found is None or found.end() != len(source):
        return []
    if any(isinstance(part, experts.QuantizedExperts) for part in layer.modules()):
        return []
    return [layer.get_submodule(name) for name in re.findall(r"= self\.(\w+)", found[1])]


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
        num_lora: elements of `lora` that are no padding.
        level: "full", "selective" or "none".
        is_reentrant: recompute with torch's older checkpoint.
        is_whole: its own parameters are trained, nothing is quantized.
        tile_tokens: of long rows, tokens whose end of the layer is computed at once.
        graphs: CUDA graphs where the host is the bottleneck, shared by all layers; or None.
        is_bare: it runs without its adapters.
    """

    lora: nn.Parameter
    row_squares: torch.Tensor | None

    def __init__(
        self, layer: nn.Module, groups: Sequence[InputGroup], store: quantize.LayerStore | None
    ) -> None:
        super().__init__()
        self.is_whole = store is None
        self.layer = layer
        self.register_parameter("lora", None)
        self.register_buffer("row_squares", None, persistent=False)
        self.slots: tuple[LoraSlot, ...] = ()
        self.num_lora = 0
        self.level, self.is_reentrant = "none", False
        self.graphs: Graphs | None = None
        self.is_bare, self.tile_tokens = False, TILE_TOKENS
        self.store = store
        self._groups = tuple(groups)
        self._adapted: list[tuple[InputGroup, list[LoraSlot]]] = []
        self._sizes: list[int] = []
        self._is_last_needed: bool | None = None  # by a recomputation; not known yet
        # What can keep results: all matmuls but the last (which recomputation does not need),
        # and the attention, see attention.py.
        attentions = [m for m in layer.modules() if hasattr(m, "is_causal")]
        self._savers: list[Any] = [*self._groups[:-1], *attentions]
        self._ending = [] if self.is_whole else _ending(layer)
        inside = {linear for module in self._ending for linear in module.modules()}
        self._end_groups = [group for group in self._groups if group.linears[0] in inside]
        if self._end_groups[-1:] != list(self._groups[-1:]):
            self._end_groups = []  # it ends otherwise

    @property
    def is_trained(self) -> bool:
        """Whether it has adapters, or is trained whole."""
        return self.is_whole or bool(self.slots)

    def set_slots(self, slots: Sequence[LoraSlot]) -> int:
        """Say which linears are adapted.

        Args:
            slots: in the order of the store; all have one dropout.

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
        self.num_lora = sum(self._sizes)
        return self.num_lora

    def _adapters(self, flat: torch.Tensor) -> list[Adapter]:
        parts = iter(flat.split([*self._sizes, flat.numel() - self.num_lora]))
        squares = dict(zip(self.slots, self.split_squares(), strict=False))
        return [
            Adapter(
                [slot.linear for slot in slots],
                next(parts).view(-1, slots[0].linear.in_features),
                [next(parts).view(-1, slot.rank) for slot in slots],
                [slot.scale for slot in slots],
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
            columns = [adapter.a_RIs, adapter.b_ORs, adapter.changes_O]
            rows = zip(slots, *filter(len, columns), strict=True)
            found |= {slot.name: parts for slot, *parts in rows}
        return [found[slot.name] for slot in self.slots]

    def split_squares(self) -> Sequence[torch.Tensor]:
        """`row_squares` of every slot; nothing for LoRA."""
        if self.row_squares is None:
            return ()
        return self.row_squares.split([slot.linear.out_features for slot in self.slots])

    def run(self, saved, hidden, lora, args: tuple, kwargs: dict, params=None):
        """Run the layer as it is.

        Args:
            saved: SavedActivations where its results are stored or taken from, or None.
            hidden, args, kwargs: of `forward`.
            lora: stands for `self.lora`; None: without the adapters.
            params: name in `layer` -> tensor that stands for the parameter; None = none does.

        Returns:
            What the layer returns.
        """
        if lora is not None:
            for (group, _), adapter in zip(self._adapted, self._adapters(lora), strict=True):
                group.adapter = adapter
        for saver in self._savers:
            saver.saved = saved
        ending = self._ending if self._is_tiled(hidden) else []
        plain = [module.forward for module in ending]
        for module in ending:
            module.forward = lambda x: x
        if ending:
            ending[-1].forward = lambda _: _Ending(partial(self._end, plain))
        try:
            if params is None:
                return self.layer(hidden, *args, **kwargs)
            return torch.func.functional_call(self.layer, params, (hidden, *args), kwargs)
        finally:
            for module, forward in zip(ending, plain, strict=True):
                module.forward = forward
            for saver in self._savers:
                saver.saved = None
            for group in self._groups:
                group.forget()

    def _end(self, modules: Sequence[Callable], hidden: torch.Tensor) -> torch.Tensor:
        """hidden + modules(hidden); in a recomputation for the gradients alone."""
        groups = [(group, group.adapter) for group in self._end_groups if group.adapter]

        def run(part: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            left = list(tensors)
            for group, adapter in groups:
                group.adapter, left = adapter.of(left)
            through = partial(reduce, lambda x, module: module(x), modules, part)
            try:
                return self._without_last(through) if torch.is_grad_enabled() else through()
            finally:
                for group in self._groups:
                    group.forget()

        tensors = [tensor for _, adapter in groups for tensor in adapter.trained]
        if torch.is_grad_enabled():
            draws = Draws(any(adapter.dropout for _, adapter in groups), hidden)
            return Tiled.apply(run, self.tile_tokens, draws, hidden, *tensors)
        out = torch.empty_like(hidden)
        for part, own in zip(*(tiles(t, self.tile_tokens) for t in (hidden, out)), strict=True):
            torch.add(part, run(part, tensors), out=own)
        return out

    def run_again(self, saved: SavedActivations | None, *rest):
        """As `run`, for the gradients alone: what the last linears return is not needed.

        Unless something after them saves a tensor, which the first time tells.
        """
        if saved is not None:
            saved.is_replay = True
        if not self._groups or self._is_tiled(rest[0]):
            return self.run(saved, *rest)
        return self._without_last(self.run, saved, *rest)

    def _without_last(self, run: Callable, *args):
        """run(*args), without the last matmul where nothing behind it needs that."""
        last = self._groups[-1]
        if self._is_last_needed is None:
            has_run = []

            def watch(tensor: torch.Tensor) -> torch.Tensor:
                has_run.append(last.has_run)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
                out = run(*args)
            self._is_last_needed = any(has_run)
            return out
        last.is_skipped = not self._is_last_needed
        return run(*args)

    def _is_tiled(self, hidden: torch.Tensor) -> bool:
        """Whether its end is computed tile by tile."""
        is_long = hidden.shape[:-1].numel() > self.tile_tokens * LONG_TOKENS // TILE_TOKENS
        return is_long and self.level == "full" and len(self._end_groups) > 0

    def forward(self, hidden, *args, **kwargs):
        """Run the layer: arguments and result are those of its own forward.

        Or on groups of rows, one after the other.

        Args:
            hidden: [B, T, H]; or a list of them, one of each group.
            args, kwargs: of the layer's own forward; or its LayerCall of each group.

        Returns:
            What the layer returns, of each group.
        """
        if isinstance(hidden, list):
            return self._visit(hidden, *args)
        has_dropout = any(slot.dropout for slot in self.slots)
        is_alone = not any(isinstance(value, UserDict) for value in kwargs.values())
        is_plain = torch.is_grad_enabled() and self.level != "none"
        is_plain &= not has_dropout and is_alone
        if self.graphs is not None and is_plain and not self._is_tiled(hidden):
            found = self.graphs.find(self, hidden, args, kwargs)
            if found is not None:
                return Replayed.apply(self.graphs, found, self, args, kwargs, hidden, self.lora)
        return self._pass(hidden, args, kwargs, self._own())

    def _own(self) -> dict[str, Any]:
        """What is trained, by name: its own parameters, or the adapters."""
        own = {} if self.is_bare else {"lora": self.lora}
        return dict(self.layer.named_parameters()) if self.is_whole else own

    def _visit(self, hiddens: list[torch.Tensor], calls: Sequence[visit.LayerCall]) -> list:
        """The last group first: the backward, which goes the other way, begins with the first."""
        own, num = self._own(), len(calls)
        owns = [own] * num
        if torch.is_grad_enabled() and self.is_trained and not self.is_reentrant:
            parts = iter(visit.Spread.apply(num, *own.values()))
            owns = [{name: next(parts) for name in own} for _ in calls]
        outs: list[Any] = [None] * num
        for i in reversed(range(num)):
            (args, kwargs, has_adapters), hidden = calls[i], hiddens[i]
            if has_adapters:
                outs[i] = self._pass(hidden, args, kwargs, owns[i])
                continue
            with torch.no_grad():
                outs[i] = self.run(None, hidden, None, args, kwargs)
        return outs

    def _pass(self, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any], own: dict):
        """Run the layer with `own` for what is trained."""
        has_gradient = torch.is_grad_enabled() and (self.is_trained or hidden.requires_grad)
        lora, params = own.get("lora"), own if self.is_whole else None
        if self.level == "none" or not has_gradient:
            return self.run(None, hidden, lora, args, kwargs, params)
        has_dropout = any(slot.dropout for slot in self.slots)
        saved = SavedActivations() if self.level == "selective" else None
        shared, trained = SharedStates(kwargs), () if self.is_reentrant else (*own.values(),)

        def run(hidden, *inputs):
            rest = shared.give(inputs[len(trained) :])
            if self.is_reentrant:
                if saved is not None:
                    saved.is_replay = torch.is_grad_enabled()
                return shared.take(self.run(saved, hidden, self.lora, args, rest))
            step = self.run_again if torch.is_grad_enabled() else self.run
            if not self.is_whole:
                return shared.take(step(saved, hidden, inputs[0], args, rest))
            given = dict(zip(own, inputs, strict=False))
            return shared.take(step(saved, hidden, None, args, rest, given))

        if not self.is_reentrant:
            return shared.put(Recomputed.apply(run, has_dropout, hidden, *trained, *shared.tensors))
        if not hidden.requires_grad:
            hidden.requires_grad_()  # without one such input, this kind builds no graph
        rest: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": has_dropout}
        return shared.put(checkpoint(run, hidden, *shared.tensors, **rest))


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
    store: quantize.LayerStore | None
    offload: Offload | None
    body: TrainedLayer

    def __init__(self, layout: quantize.Layout | None, cache: quantize.LayerCache) -> None:
        super().__init__()
        self.register_parameter("quantized", None)
        self.store = self.offload = None
        if layout is not None:
            quantized = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
            self.quantized = nn.Parameter(quantized, requires_grad=False)
            self.store = quantize.LayerStore(lambda: self.quantized, layout, cache)

    def forward(self, *args, **kwargs):
        """Run the layer: arguments and results are those of TrainedLayer.forward."""
        if self.offload is None or not torch.is_grad_enabled():
            return self.body(*args, **kwargs)
        hidden = args[0] if isinstance(args[0], list) else args[:1]
        with self.offload.saving(*hidden):
            return self.body(*args, **kwargs)

    @property
    def layer_store(self) -> quantize.LayerStore:
        """The store of a layer that has one."""
        assert self.store is not None, "a layer that is trained whole has no quantized bytes"
        return self.store

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask layers for plain attributes, such as attention_type
            return getattr(cast(TrainedLayer, super().__getattr__("body")).layer, name)
