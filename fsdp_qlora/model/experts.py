"""Experts of a mixture over the layer's store: all of them together, each with its LoRA pair.

transformers holds the experts of a layer in two 3-D parameters, which no 4-bit linear replaces.
Here the rows (token, chosen expert) are sorted by expert on the device, and one grouped matmul
serves all experts whose weights fit into WHOLE_LAYER_BYTES. A GPU is asked for nothing: the host
runs ahead of it. What else the experts have and do is their class's: biases, how gate and up become
one, a norm behind them.

LoRA is that of peft's `target_parameters`: A [R of all experts, I] expert by expert, B [O, R of all
experts] rank by rank; gate and up, which lie in one parameter, share their A.

Shape letters: M tokens, K experts that a token goes to, S = M * K rows, E experts, I in features, O
out features, R LoRA rank of one expert, H hidden size.

Source: huggingface/transformers, integrations/moe.py, use_experts_implementation; huggingface/peft,
tuners/lora/layer.py, ParamWrapper.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fsdp_qlora.arch.info import Linear
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model.lora import InputGroup
from fsdp_qlora.model.matmul import triton_kernels
from fsdp_qlora.model.quantize import LayerStore
from fsdp_qlora.planning.sizes import WHOLE_LAYER_BYTES

TILE_ROWS = 128  # of one expert, that a program of the kernel computes
OTHER_MODEL = "take another model"
# First expert, last + 1, their matrices.
Weights = Iterable[tuple[int, int, Tensor]]


class Routing:
    """The rows of a pass, sorted by expert.

    Experts are counted as they lie in the store, but in arguments as the model does.

    Attributes:
        num: of experts, E.
        top: experts of a token, K.
        numbers, places: [E], the experts in the order of the store; the place of each there.
        order: [S], which row each sorted one was, counted token by token.
        tokens: [S], the token of each sorted row.
        starts: [E + 1], the first row of each expert.
    """

    def __init__(self, experts_MK: Tensor, numbers: Tensor, places: Tensor) -> None:
        """Sort.

        Args:
            experts_MK: int64, the experts of each token.
            numbers, places: see above.
        """
        self.numbers, self.places = numbers, places
        self.num, self.top = len(places), experts_MK.shape[1]
        sorted_S, self.order = places[experts_MK].flatten().sort(stable=True)
        self.tokens = self.order // self.top
        self.starts = torch.searchsorted(sorted_S, torch.arange(self.num + 1, device=places.device))

    @cached_property
    def _bounds(self) -> list[int]:
        return self.starts.tolist()

    @cached_property
    def _tiles(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Of as many tiles as there can be: expert (E: no more) and first row, see the kernel."""
        num_tiles = (self.starts.diff() + TILE_ROWS - 1) // TILE_ROWS
        ends = num_tiles.cumsum(0)
        tiles = torch.arange(-(-len(self.order) // TILE_ROWS) + self.num, device=ends.device)
        expert = torch.searchsorted(ends, tiles, right=True)
        own = expert.clamp(max=self.num - 1)
        row = self.starts[own] + (tiles - (ends - num_tiles)[own]) * TILE_ROWS
        return expert, row, self.starts[1:], TILE_ROWS

    def matmul(
        self, x: Tensor, weights: Weights, num_out: int, ends: tuple[bool, bool], **rest: Any
    ) -> Tensor:
        """Each row times the matrix of its expert.

        Args:
            x: [S, I] sorted, or [M, I].
            weights: [experts, O, I] of all experts, some at once.
            num_out: O.
            ends: `x` is of tokens; the result is summed over the rows of a token.
            rest: see triton_kernels.grouped_matmul: turned (weights [experts, I, O]), alpha, bias,
                low, high.

        Returns:
            [S, O] sorted, or [M, O].
        """
        x, out = x.contiguous(), x.new_empty(len(self.order), num_out)
        source, target = self.tokens if ends[0] else None, self.order if ends[1] else None
        kernels, places = triton_kernels(x.is_cuda), {"source": source, "target": target}
        for first, last, weight in weights:
            rest |= {"experts": (first, last), **places}
            if kernels is not None:
                kernels.grouped_matmul(x, weight, out, self._tiles, **rest)
            else:
                self._loop(x, weight, out, **rest)
            del weight  # before the next are made
        return out.view(-1, self.top, num_out).sum(1) if ends[1] else out

    def _loop(self, x, weight, out, experts, **rest) -> None:
        """As triton_kernels.grouped_matmul."""
        source, target, bias, low, high = map(rest.get, ("source", "target", "bias", "low", "high"))
        turned, alpha = rest.get("turned", False), rest.get("alpha", 1.0)
        high = high if turned or high is None else high.transpose(1, 2)
        for expert, matrix in enumerate(weight, experts[0]):
            own = slice(*self._bounds[expert : expert + 2])
            rows = x[own] if source is None else x[source[own]]
            made = alpha * (rows @ (matrix if turned else matrix.t()))
            if low is not None:
                made.addmm_(low[own], high[expert])  # type: ignore[index]
            if bias is not None:
                made += bias[expert]
            out[own if target is None else target[own]] = made

    def outer(self, low: Tensor, x: Tensor, is_of_tokens: bool) -> Tensor:
        """Sum low^T x over the rows of each expert.

        Args:
            low: [S, R] sorted.
            x: [S, I] sorted, or of tokens [M, I].
            is_of_tokens: which.

        Returns:
            [E, R, I].
        """
        out = x.new_empty(self.num, low.shape[1], x.shape[1])
        source, kernels = self.tokens if is_of_tokens else None, triton_kernels(x.is_cuda)
        if kernels is not None:
            kernels.grouped_outer(low, x.contiguous(), out, self.starts, source=source)
            return out
        for expert in range(self.num):
            own = slice(*self._bounds[expert : expert + 2])
            rows = x[own] if source is None else x[source[own]]
            torch.matmul(low[own].t(), rows, out=out[expert])
        return out


class ExpertMatrices:
    """One frozen matrix of each expert: those that read the input, or those that make the output.

    Attributes:
        stored_name: of its adapter, by the name of the block in the files.
        out_features, in_features: O and I.
        group: holds the LoRA pair while a pass runs.
    """

    group: InputGroup

    def __init__(self, store: LayerStore, parts: Sequence[tuple[int, ...]], name: str) -> None:
        """Remember where they lie.

        Args:
            store: of the layer.
            parts: of each of the parts of a matrix, one below the other, the linears in the store
                that are this part of each expert.
            name: see `stored_name`.
        """
        self._store, self._parts, self.stored_name = store, parts, name
        shapes = [store.layout.shapes[part[0]] for part in parts]
        self.out_features, self.in_features = sum(rows for rows, _ in shapes), shapes[0][1]
        InputGroup([self])  # type: ignore[list-item]

    def weights(self, dtype: torch.dtype) -> Weights:
        """Dequantize them, as many experts at once as WHOLE_LAYER_BYTES hold."""
        num = len(self._parts[0])
        nbytes = num * self.out_features * self.in_features * dtype.itemsize
        step = -(-num // -(-nbytes // WHOLE_LAYER_BYTES))
        for first in range(0, num, step):
            last = min(first + step, num)
            yield first, last, self._store.stacked([p[first:last] for p in self._parts], dtype)


class GroupedCall(NamedTuple):
    """What a grouped matmul is of.

    Args:
        matrices: of the experts.
        routing: of the rows.
        ends: see Routing.matmul.
        scale: see LoraSlot.scale.
    """

    matrices: ExpertMatrices
    routing: Routing
    ends: tuple[bool, bool]
    scale: float = 1.0

    def by_expert(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """LoRA matrices [E, R, I] and [E, O, R] in the order of the store, of those of peft."""
        num, numbers = self.routing.num, self.routing.numbers
        b_EOR = b_OR.view(len(b_OR), -1, num).permute(2, 0, 1)[numbers]
        return a_RI.view(num, -1, a_RI.shape[1])[numbers], b_EOR.contiguous()


class GroupedMatmul(torch.autograd.Function):
    """y of each row: x W^T + scale * (x A^T) B^T + bias by the matrices of its expert.

    Of a frozen matrix nothing is saved: the backward asks the store for it again.

    Args:
        x: see Routing.matmul.
        call: GroupedCall.
        bias: [E, O], frozen, or None.
        a_RI, b_OR: the LoRA pairs as peft has them, compute dtype; or None.

    Returns:
        [S, O] sorted, or [M, O], compute dtype.
    """

    @staticmethod
    def forward(ctx, x, call, bias, a_RI, b_OR):
        ctx.call, (matrices, routing, ends, scale) = call, call
        rest = {"bias": None if bias is None else bias[routing.numbers]}
        if a_RI is not None:
            a_ERI, rest["high"] = call.by_expert(a_RI, b_OR)
            own = [(0, routing.num, a_ERI)], a_ERI.shape[1], (ends[0], False)
            rest["low"] = routing.matmul(x, *own, alpha=scale)
        ctx.save_for_backward(None if a_RI is None else x, rest.get("low"), a_RI, b_OR)
        num_out = matrices.out_features
        if matrices.group.is_skipped:
            return x.new_empty(len(routing.order) // (routing.top if ends[1] else 1), num_out)
        return routing.matmul(x, matrices.weights(x.dtype), num_out, ends, **rest)

    @staticmethod
    def backward(ctx, grad):
        x, low, a_RI, b_OR = ctx.saved_tensors
        matrices, routing, (is_spread, is_joined), scale = ctx.call
        grad_a, grad_b, grad_x, rest = None, None, None, {"turned": True}
        grad = grad.contiguous()
        if low is not None:
            rest["high"], b_EOR = ctx.call.by_expert(a_RI, b_OR)
            own = [(0, routing.num, b_EOR)], low.shape[1], (is_joined, False)
            rest["low"] = routing.matmul(grad, *own, turned=True, alpha=scale)
            grad_a = routing.outer(rest["low"], x, is_spread)[routing.places].flatten(0, 1)
            grad_b = routing.outer(low, grad, is_joined)[routing.places]
            grad_b = grad_b.permute(2, 1, 0).flatten(1)
        if ctx.needs_input_grad[0]:
            own = matrices.weights(grad.dtype), matrices.in_features, (is_joined, is_spread)
            grad_x = routing.matmul(grad, *own, **rest)
        return grad_x, None, None, grad_a, grad_b


class QuantizedExperts(nn.Module):
    """Goes before the class of a layer's experts.

    Attributes:
        in_name: of the parameter that the input meets first, as transformers has it.
        ins: of each expert gate and up, both in one, or up alone.
        down: of each expert what makes the output.
        numbers: [E], the experts in the order of the store.
        places: [E], the place of each expert in that order.
        loads: float32 [E], rows that each has been given since `take_load`, when they are trained.
    """

    in_name: str
    ins: ExpertMatrices
    down: ExpertMatrices
    numbers: Tensor
    places: Tensor
    loads: Tensor

    def forward(self, hidden_MH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the chosen experts make of each token.

        Args:
            hidden_MH: compute dtype.
            top_k_index, top_k_weights: [M, K], the experts of each token and their shares; a number
                beyond the experts is none.

        Returns:
            [M, H].
        """
        own: Any = self
        is_one, most = top_k_index < len(self.places), len(self.places) - 1
        experts_MK, shares_MK = top_k_index.clamp(max=most), top_k_weights.masked_fill(~is_one, 0)
        routing = Routing(experts_MK, self.numbers, self.places)
        if self.training:
            self.loads += routing.starts.diff()
        shares_S1 = shares_MK.flatten().gather(0, routing.order).unsqueeze(1)
        biases = (f"{self.in_name}_bias", "down_proj_bias")
        in_bias, bias = (getattr(own, name) if own.has_bias else None for name in biases)
        first = _matmul(hidden_MH, self.ins, routing, (True, False), in_bias)
        product = own._apply_gate(first) if own.has_gate else own.act_fn(first)
        if getattr(own, "has_post_expert_norm", False):  # of newer transformers
            last = own.post_expert_norm(_matmul(product, self.down, routing, (False, False), bias))
            last = (last * shares_S1).to(hidden_MH.dtype)
            return torch.zeros_like(hidden_MH).index_add(0, routing.tokens, last)
        bias_MH = None
        if bias is not None:  # before the matmul, which is then the last one and not made again
            shares_ME = torch.zeros_like(shares_MK[:, :1]).expand(-1, most + 1)
            shares_ME = shares_ME.scatter_add(1, experts_MK, shares_MK)
            bias_MH = shares_ME.to(bias.dtype) @ bias
        weighted = (product * shares_S1).to(hidden_MH.dtype)
        out_MH = _matmul(weighted, self.down, routing, (False, True), None)
        return out_MH if bias_MH is None else out_MH + bias_MH


class ScaledExperts(QuantizedExperts):
    """Those of Llama 4: what an expert reads is multiplied by its share, not what it writes."""

    def forward(self, hidden_MH, top_k_index, top_k_weights):
        """As QuantizedExperts: each row is a token of one expert."""
        rows_SH = (hidden_MH.unsqueeze(1) * top_k_weights.unsqueeze(2)).flatten(0, 1)
        out_SH = super().forward(rows_SH, top_k_index.view(-1, 1), torch.ones_like(rows_SH[:, :1]))
        return out_SH.view(*top_k_index.shape, -1).sum(1)

    def _apply_gate(self, first):
        (gate, up), own = first.chunk(2, -1), cast(Any, self)
        return own.act_fn(gate) * up


class ScaledMixture(nn.Module):
    """Goes before the class of Llama 4's mixture, which has every expert compute every token."""

    def forward(self, hidden):
        """What transformers' own returns: the sum of all, and the router's logits."""
        own: Any = self
        hidden_MH = hidden.flatten(0, -2)
        scores_ME, logits_ME = own.router(hidden_MH)
        routed_MH = own.experts(hidden_MH, *scores_ME.topk(own.top_k, 1)[::-1])
        return own.shared_expert(hidden_MH) + routed_MH, logits_ME


def _matmul(x, matrices: ExpertMatrices, routing: Routing, ends, bias) -> Tensor:
    adapter, call = matrices.group.adapter, GroupedCall(matrices, routing, ends)
    pair: tuple = (None, None)
    if adapter is not None:
        call, pair = call._replace(scale=adapter.scales[0]), (adapter.a_RI, adapter.b_ORs[0])
    out = GroupedMatmul.apply(x, call, bias, *pair)
    matrices.group.has_run = True
    return out


def replace_experts(
    layer: nn.Module, linears: Sequence[Linear], store: LayerStore
) -> list[InputGroup]:
    """Let a decoder layer's experts read their matrices from its store.

    Args:
        layer: as transformers has built it.
        linears: of the layer, in the order of its store.
        store: of the layer.

    Returns:
        Their groups; none in a dense layer.

    Raises:
        UserError: 3-D weights that transformers does not compute by its interface for experts
            (code 2), or other shapes than the files have (code 5).
    """
    tables: dict[int, dict[int, int]] = {}  # part of an expert -> expert -> linear in the store
    for index, linear in enumerate(linears):
        if linear.expert:
            tables.setdefault(linear.expert[2], {})[linear.expert[1]] = index
    modules = dict(layer.named_modules())
    paths = {path.rpartition(".")[0] for path, p in layer.named_parameters() if p.dim() > 2}
    found = {p: modules[p] for p in sorted(paths) if not isinstance(modules[p], nn.Conv1d)}
    if not found and not tables:
        return []
    names = [f"{path} ({type(module).__name__})" for path, module in found.items()]
    base, module = _base_of(layer, found), cast(Any, next(iter(found.values()), None))
    if len(found) != 1 or not hasattr(module, "is_transposed"):
        rule = "is no matrix, and no expert that transformers computes by its interface for them"
        raise UserError(f"a weight of {[*names, 'no module'][0]} in a layer", rule, OTHER_MODEL)
    ids = ((3,) if 3 in tables else (0, 1)) if module.has_gate else (1,)
    module.in_name = "gate_up_proj" if module.has_gate else "up_proj"
    numbers, sides = [*tables.get(2, {})], []
    for name, own_ids in ((module.in_name, ids), ("down_proj", (2,))):
        num, *shape = getattr(module, name).shape
        wanted = num, *(shape[::-1] if module.is_transposed else shape)
        delattr(module, name)
        own = [tables.get(i, {}) for i in own_ids]
        is_whole = all(sorted(table) == [*range(num)] for table in own)
        parts = [tuple(table[number] for number in numbers) for table in own] if is_whole else []
        shapes = [[linears[i].shape for i in rows] for rows in zip(*parts, strict=True)]
        sizes = {(len(shapes), sum(n for n, _ in row), row[0][1]) for row in shapes}
        if sizes != {wanted}:
            rule = f"are {num} of {wanted[1:]} in config.json, not so in the files"
            raise UserError(
                f"experts of {names[0]}", rule, "copy both from the same place", INTEGRITY
            )
        sides.append(parts)
    kind, stem = type(module), f"{next(n.expert[0] for n in linears if n.expert)}.experts"
    module.__class__ = type(kind.__name__, (base, kind), {})
    module.__dict__.pop("forward", None)  # that Liger has put there
    module.ins = ExpertMatrices(store, sides[0], f"{stem}.{module.in_name}")
    module.down = ExpertMatrices(store, sides[1], f"{stem}.down_proj")
    places = torch.tensor(numbers, device="cpu")
    module.register_buffer("numbers", places, persistent=False)
    module.register_buffer("places", places.argsort(), persistent=False)
    module.register_buffer("loads", torch.zeros(num, device="cpu"), persistent=False)
    store.is_mixed = True
    return [module.ins.group, module.down.group]


def _base_of(layer: nn.Module, found: dict[str, nn.Module]) -> type[QuantizedExperts]:
    """What goes before the class of a layer's experts; those of Llama 4 are told what they are."""
    path, experts = next(iter(found.items()), ("", layer))
    if type(experts).__name__ != "Llama4TextExperts":
        return QuantizedExperts
    mixture = layer.get_submodule(path.rpartition(".")[0])
    mixture.__class__ = type(type(mixture).__name__, (ScaledMixture, type(mixture)), {})
    vars(experts).update(is_transposed=True, has_gate=True, has_bias=False)
    return ScaledExperts


def take_load(mixtures: Sequence[QuantizedExperts]) -> dict[str, Tensor]:
    """How evenly the rows went to the experts since the last time.

    Args:
        mixtures: of the layers; their counts begin anew.

    Returns:
        expert_load: rows of the fullest expert by those of the mean one, mean of the layers, 0-d on
        the device; nothing without layers.
    """
    if not mixtures:
        return {}
    ratios = [m.loads.max() / m.loads.mean().clamp_min(1) for m in mixtures]
    torch._foreach_zero_([m.loads for m in mixtures])
    return {"expert_load": torch.stack(ratios).mean()}


def pair_of_one(linear: Linear, num: int, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """The LoRA pair of a matrix of one expert.

    Args:
        linear: the matrix; of gate or up, its half of what both have together.
        num: of experts.
        a_RI, b_OR: of all experts of the layer, as peft has them.

    Returns:
        A [R, I] and B [O, R].
    """
    _, number, part = linear.expert or ("", 0, 0)
    b_OR = b_OR.view(len(b_OR), -1, num)[..., number]
    rows = linear.out_features
    b_OR = b_OR[rows:] if part == 1 and len(b_OR) > rows else b_OR[:rows]
    return a_RI.view(num, -1, a_RI.shape[1])[number], b_OR
