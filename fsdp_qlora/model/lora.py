"""Frozen linears with LoRA pairs: operations of those that read the same input, fused; DoRA.

DoRA learns a weight's direction by a LoRA pair and the length of its rows by a vector:
y = (m / n) * (W + s B A) x with n the lengths of the rows of W + s B A, which gradients do not
pass. What is trained is d = m - ||W||, zero at the start: in 16 bit m itself would be off by 0.4 %
before the first step, and outputs would be scaled by it.

Shape letters: M tokens of a batch, I in features, O out features, R LoRA rank (of all linears
together in a fused operation).

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, equation 5 and section 4.3; with dropout,
peft's DoraLinearVariant.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from fsdp_qlora.model import matmul
from fsdp_qlora.planning.sizes import LONG_TOKENS


class SavedActivations:
    """Results of a layer's forward pass that its recomputation takes over instead of making them.

    The first run over the layer stores them in order, the second takes them in the same order.

    Attributes:
        is_replay: the second run is under way.
        results: what is stored.
    """

    def __init__(self) -> None:
        self.is_replay = False
        self.results: list[tuple[torch.Tensor, ...]] = []

    def store(self, *tensors: torch.Tensor) -> None:
        """Keep the next results; they must not be written to afterwards."""
        self.results.append(tensors)

    def take(self) -> tuple[torch.Tensor, ...]:
        """The next results, forgotten here."""
        return self.results.pop(0)

    def copy(self) -> "SavedActivations":
        """The same results, to be taken once more."""
        found = SavedActivations()
        found.results = [*self.results]
        return found


class Draws:
    """Random numbers that are drawn now and can be drawn once more."""

    def __init__(self, has_dropout: bool, like: torch.Tensor) -> None:
        self._devices = [like.device] if like.is_cuda else []
        self._state = (torch.get_rng_state(), *get_device_states(like)) if has_dropout else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """What is drawn inside is what was drawn then."""
        with torch.random.fork_rng(self._devices, enabled=self._state is not None):
            if self._state is not None:
                torch.set_rng_state(self._state[0])
                set_device_states(*self._state[1:])
            yield


class Later(list[torch.Tensor]):
    """Stand for deltas that FrozenMatmul adds to its own result, which saves a pass over them.

    Attributes:
        hidden_MR: x A^T of all of them, from the forward pass.
    """

    hidden_MR: torch.Tensor


class LoraMatmul(torch.autograd.Function):
    """delta_MO = scale * (x A^T) B^T for every linear, and x itself passed through.

    It runs before the frozen matmuls and is the only one of the two that saves a tensor (its
    input, and the few columns of x A^T), so that the recomputation of a checkpointed layer may
    stop before the last frozen matmul. Passing x through lets the backward add its share of the
    input gradient into that of the frozen matmuls, without another tensor. The A matrices lie in
    one tensor: x is read once for all of them, forward and backward.

    Args:
        x: [..., I], compute dtype.
        lora_x: what the adapters see instead of x (after dropout), same shape; or None; or the
            dropout, drawn once more in the backward: neither its result nor its mask is held.
        a_RI: the A matrices one below the other, compute dtype.
        scales: see LoraSlot.scale.
        outputs: stand for the deltas without being made here (see SavedActivations, Later); or
            None.
        b_ORs: the B matrices, each with its own columns of R.

    Returns:
        x as a view, then delta_MO of each linear in the compute dtype.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    @staticmethod
    def forward(ctx, x, lora_x, a_RI, scales, outputs, *b_ORs):
        ctx.set_materialize_grads(False)
        ctx.dropout = lora_x if isinstance(lora_x, float) else 0.0
        ctx.draws = Draws(ctx.dropout > 0, x)
        saved = x if lora_x is None or ctx.dropout else lora_x
        seen = nn.functional.dropout(x, ctx.dropout) if ctx.dropout else saved
        hidden_MR = _flat(seen) @ a_RI.t()
        if isinstance(outputs, Later):
            outputs.hidden_MR = hidden_MR
        ctx.save_for_backward(saved, hidden_MR, a_RI, *b_ORs)
        ctx.scales, ctx.has_own_input = scales, lora_x is not None
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        if outputs is None:
            parts = hidden_MR.split([b_OR.shape[1] for b_OR in b_ORs], 1)
            rows = zip(parts, b_ORs, scales, strict=True)
            outputs = [_scaled(part, b.t(), scale) for part, b, scale in rows]
        return passed, *outputs

    @staticmethod
    def backward(ctx, grad_x, *grads_MO):
        seen, hidden_MR, a_RI, *b_ORs = ctx.saved_tensors
        parts = hidden_MR.split([b_OR.shape[1] for b_OR in b_ORs], 1)
        grad_parts, grad_bs = [], []
        for grad_MO, b_OR, part, scale in zip(grads_MO, b_ORs, parts, ctx.scales, strict=True):
            grad_parts.append(_scaled(grad_MO, b_OR, scale))
            grad_bs.append(_scaled(grad_MO.t(), part, scale))
        grad_hidden_MR = grad_parts[0] if len(grad_parts) == 1 else torch.cat(grad_parts, 1)
        if ctx.dropout:
            x = seen.detach().requires_grad_()
            with ctx.draws.again(), torch.enable_grad():
                seen = nn.functional.dropout(x, ctx.dropout)
        grad_a, grad_seen = grad_hidden_MR.t() @ _flat(seen), None
        if ctx.dropout and grad_x is not None:
            grad_x += torch.autograd.grad(seen, x, (grad_hidden_MR @ a_RI).view_as(seen))[0]
        elif ctx.has_own_input:
            if ctx.needs_input_grad[1]:
                grad_seen = (grad_hidden_MR @ a_RI).view_as(seen)
        elif grad_x is not None:
            matmul.add_product(_flat(grad_x), grad_hidden_MR, a_RI)
        return grad_x, grad_seen, grad_a, None, None, *grad_bs


class FrozenMatmul(torch.autograd.Function):
    """y_MO = delta_MO + x W^T + bias of every linear, W dequantized for the matmul only.

    Nothing is saved: the backward asks the store for each W again, and sums the input gradient in
    place over the linears.

    Args:
        x: [..., I], compute dtype.
        linears: the QuantizedLinears that hold W and bias.
        asides: for DoRA, of each linear an a_RI whose matmul with W is wanted too and whose bias
            is left out, or None; empty = none has one.
        is_done: the deltas are the outputs already (see SavedActivations); nothing is made for
            `asides`.
        deltas_MO: added to in place, in 8 bit added; None where a linear has no adapter.

    Returns:
        y_MO of each linear in the compute dtype, then W A^T (no gradient passes it) or None of each
        of `asides`.
    """

    @staticmethod
    def forward(ctx, x, linears, asides, is_done, *deltas_MO):
        ctx.set_materialize_grads(False)
        ctx.linears, ctx.shape, x_MI = linears, x.shape, _flat(x)
        ctx.is_8_bit = not asides and matmul.serves(linears, x_MI)
        if ctx.is_8_bit and not is_done:
            low_ranks = linears[0].group.low_ranks()
            outs = matmul.products(x_MI, linears, low_ranks)
            for out, delta in zip(outs, deltas_MO, strict=True):
                if delta is not None and not low_ranks:
                    out.add_(delta)
            return tuple(outs)
        ctx.mark_dirty(*[delta for delta in deltas_MO if delta is not None])
        ctx.dtype = x.dtype if asides else matmul.dtype_of(linears[0], x_MI)
        if is_done:
            return deltas_MO
        a_RIs = asides or [None] * len(linears)
        pairs = [
            _matmul(x_MI, linear, delta, a_RI, ctx.dtype)
            for linear, delta, a_RI in zip(linears, deltas_MO, a_RIs, strict=True)
        ]
        sides = [side for _, side in pairs[: len(asides)]]
        ctx.mark_non_differentiable(*[side for side in sides if side is not None])
        return *[out for out, _ in pairs], *sides

    @staticmethod
    def backward(ctx, *grads_MO):
        grad_MI = None
        if ctx.needs_input_grad[0] and ctx.is_8_bit:
            grad_MI = matmul.input_gradient(grads_MO, ctx.linears)
        elif ctx.needs_input_grad[0]:
            for grad_MO, linear in zip(grads_MO, ctx.linears, strict=False):
                grad_MI = matmul.plus_product(grad_MI, grad_MO, linear.dequantize(ctx.dtype))
        grad_x = None if grad_MI is None else grad_MI.view(ctx.shape)
        deltas = zip(grads_MO, ctx.needs_input_grad[4:], strict=False)
        return grad_x, None, None, None, *[grad if needed else None for grad, needed in deltas]


def _matmul(x_MI, linear, delta_MO, a_RI, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight_OI = linear.dequantize(dtype)
    out_MO = matmul.plus_product(delta_MO, x_MI, weight_OI.t())
    if a_RI is not None:
        return out_MO, weight_OI @ a_RI.t()
    return out_MO if linear.bias is None else out_MO.add_(linear.bias), None


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right in one kernel (with beta 0 the first tensor is never read)."""
    return left @ right if scale == 1 else left.new_empty(1).addmm(left, right, beta=0, alpha=scale)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


ROWS = 1024  # of a weight in float32 at once


class Rescaled(torch.autograd.Function):
    """y_MO = (1 + gain_O) * z_MO + bias_O.

    Args:
        z_MO: compute dtype.
        gain_O: float32; added to one only in the product, where it is not rounded away.
        bias_O: frozen, or None.

    Returns:
        y_MO, compute dtype.
    """

    @staticmethod
    def forward(ctx, z_MO, gain_O, bias_O):
        gain_O = gain_O.to(z_MO.dtype)
        ctx.save_for_backward(z_MO, gain_O)
        out_MO = torch.addcmul(z_MO, z_MO, gain_O)
        return out_MO if bias_O is None else out_MO.add_(bias_O)

    @staticmethod
    def backward(ctx, grad_MO):
        z_MO, gain_O = ctx.saved_tensors
        grad_gain_O = (grad_MO * z_MO).sum(0, dtype=torch.float32)
        return torch.addcmul(grad_MO, grad_MO, gain_O), grad_gain_O, None


def row_squares(weight_OI: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of every row, float32 [O]; only ROWS rows are ever held in float32."""
    return torch.cat([part.float().square().sum(1) for part in weight_OI.split(ROWS)])


@torch.no_grad()
def row_norms(squares_O, weight_a_OR, a_RI, b_OR, scale: float) -> torch.Tensor:
    """Lengths of the rows of W + s B A, without that matrix.

    ||w + s b A||^2 = ||w||^2 + 2 s (A w) . b + s^2 b (A A^T) b^T for a row w of W and b of B.

    Args:
        squares_O: of the rows of W, float32.
        weight_a_OR: W A^T.
        a_RI, b_OR, scale: the LoRA pair.

    Returns:
        float32 [O].
    """
    a_RI, b_OR = a_RI.float(), b_OR.float()
    gram_RR = a_RI @ a_RI.t()
    crossed_OR = (2 * scale * weight_a_OR.float()).addmm_(b_OR, gram_RR, alpha=scale * scale)
    return (squares_O + crossed_OR.mul_(b_OR).sum(1)).clamp_min_(1e-30).sqrt_()


def _rescaled(z_MO, bias_O, change_O, square_O, norm_O) -> torch.Tensor:
    return Rescaled.apply(z_MO, (square_O.sqrt() - norm_O + change_O.float()) / norm_O, bias_O)


Dequantize = Callable[[torch.dtype], torch.Tensor]
# Linears of one module that read the same tensor, by their last name.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LoraSlot:
    """One adapted linear.

    Attributes:
        name: of the linear inside the layer, "self_attn.q_proj".
        linear: what is adapted.
        rank: R.
        alpha: LoRA's alpha.
        dropout: probability, on the input of the adapter.
        use_rslora: see `scale`.
        has_magnitude: DoRA: the length of each row of the weight is learnt by itself.
        num_experts: whose matrices lie in `linear`, each with an own pair of R / num_experts.
    """

    name: str
    linear: "QuantizedLinear"
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool = False
    has_magnitude: bool = False
    num_experts: int = 1

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r) (rank-stabilised, arXiv 2312.03732)."""
        rank = self.rank // self.num_experts
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)


class Adapter(NamedTuple):
    """The LoRA pairs of an InputGroup, in the compute dtype.

    Attributes:
        linears: that have one.
        a_RI: the A matrices one below the other.
        b_ORs: B of each.
        scales, dropout: see LoraSlot; a scale of each.
        changes_O, squares_O: of DoRA, what was added to the length of each row of W, and its square
            in the frozen W, float32; empty for LoRA.
    """

    linears: Sequence["QuantizedLinear"]
    a_RI: torch.Tensor
    b_ORs: Sequence[torch.Tensor]
    scales: Sequence[float]
    dropout: float
    changes_O: Sequence[torch.Tensor] = ()
    squares_O: Sequence[torch.Tensor] = ()

    @property
    def trained(self) -> list[torch.Tensor]:
        """What the gradients are of."""
        return [self.a_RI, *self.b_ORs, *self.changes_O]

    def of(self, tensors: list[torch.Tensor]) -> tuple["Adapter", list[torch.Tensor]]:
        """The same with other tensors for those of `trained`; and those that are left."""
        num, own = len(self.b_ORs), len(self.trained)
        b_ORs, changes_O = tensors[1 : 1 + num], tensors[1 + num : own]
        return self._replace(a_RI=tensors[0], b_ORs=b_ORs, changes_O=changes_O), tensors[own:]

    @property
    def a_RIs(self) -> Sequence[torch.Tensor]:
        """A of each."""
        return self.a_RI.split([b_OR.shape[1] for b_OR in self.b_ORs])


class InputGroup:
    """Linears of a layer that read the same input: the first one asked computes all of them.

    Attributes:
        linears: in the order of the store.
        adapter: their LoRA pairs while a pass over the layer runs, else None.
        saved: where outputs are stored or taken from while a pass runs, or None.
        is_skipped: nobody looks at the values of the outputs of this pass.
        has_run: an output was asked for in this pass.
    """

    def __init__(self, linears: Sequence["QuantizedLinear"]) -> None:
        self.linears = tuple(linears)
        self.adapter: Adapter | None = None
        self.saved: SavedActivations | None = None
        self.is_skipped = self.has_run = False
        self._later: Later | None = None
        self._x: torch.Tensor | None = None
        self._outs: dict[QuantizedLinear, torch.Tensor] = {}
        for linear in linears:
            linear.group = self

    def output(self, linear: "QuantizedLinear", x: torch.Tensor) -> torch.Tensor:
        """y_MO of one of the linears.

        Args:
            linear: one of the group.
            x: [..., I]; as long as it is the same tensor, the group computes once.
        """
        if self._x is not x or linear not in self._outs:
            self._x, self._outs = x, dict(zip(self.linears, self._compute(x), strict=True))
        out = self._outs.pop(linear)
        if not self._outs:
            self._x = None
        self.has_run = True
        return out

    def forget(self) -> None:
        """Drop what belongs to the pass that ends."""
        self.adapter = self.saved = self._x = self._later = None
        self.is_skipped = self.has_run = False
        self._outs = {}

    def _compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        adapter, saved = self.adapter, self.saved
        done: Sequence[torch.Tensor] | None = None
        if adapter is not None and adapter.changes_O:
            has_dropout = adapter.dropout and self.linears[0].training
            return self._dropped(x, adapter) if has_dropout else self._rescale(x, adapter)
        if self.is_skipped:
            shape = x.shape[:-1].numel()
            done = [x.new_empty(shape, linear.out_features) for linear in self.linears]
        elif saved is not None and saved.is_replay:
            done = saved.take()
        outs = FrozenMatmul.apply(*self._adapt(x, done))
        if saved is not None and done is None:
            # Copies where Liger's rotary kernel will write into the outputs.
            is_written_to = len(self.linears) == len(SHARED_INPUTS[0])
            saved.store(*[out.detach().clone() if is_written_to else out.detach() for out in outs])
        return outs

    def _adapt(self, x: torch.Tensor, done: Sequence | None, asides: Sequence = ()) -> tuple:
        """The arguments of FrozenMatmul."""
        deltas: dict[QuantizedLinear, torch.Tensor | None] = dict.fromkeys(self.linears)
        deltas |= zip(self.linears, done or (), strict=False)
        if self.adapter is not None:
            linears, a_RI, b_ORs, scales, dropout, *_ = self.adapter
            outputs: Any = None if done is None else [deltas[linear] for linear in linears]
            if dropout and linears[0].training:
                for i, a in enumerate(self.adapter.a_RIs):
                    is_long = x.shape[:-1].numel() > LONG_TOKENS  # each linear has its own
                    lora_x = dropout if is_long else nn.functional.dropout(x, dropout)
                    output, own = None if outputs is None else outputs[i : i + 1], scales[i : i + 1]
                    x, deltas[linears[i]] = LoraMatmul.apply(x, lora_x, a, own, output, b_ORs[i])
            else:
                if outputs is None and not asides and matmul.serves(self.linears, _flat(x)):
                    shapes = [(x.shape[:-1].numel(), linear.out_features) for linear in linears]
                    outputs = self._later = Later(map(x.new_empty(1).expand, shapes))
                x, *made = LoraMatmul.apply(x, None, a_RI, scales, outputs, *b_ORs)
                deltas |= zip(linears, made, strict=True)
        return x, self.linears, asides, done is not None, *deltas.values()

    def low_ranks(self) -> dict["QuantizedLinear", matmul.LowRank]:
        """Hidden, B and scale of each adapted linear whose delta was not made; see Later."""
        adapter, later = self.adapter, self._later
        if adapter is None or later is None:
            return {}
        parts = later.hidden_MR.split([b_OR.shape[1] for b_OR in adapter.b_ORs], 1)
        rows = zip(parts, (b_OR.detach() for b_OR in adapter.b_ORs), adapter.scales, strict=True)
        return dict(zip(adapter.linears, rows, strict=True))

    def _rescale(self, x: torch.Tensor, adapter: Adapter) -> list[torch.Tensor]:
        """DoRA: lengths are stored or taken with the outputs."""
        own, saved, num = adapter.linears, self.saved, len(self.linears)
        done = saved.take() if saved is not None and saved.is_replay else None
        a_RIs = dict(zip(own, adapter.a_RIs, strict=True))
        asides = [a_RIs.get(linear) for linear in self.linears]
        outputs = FrozenMatmul.apply(*self._adapt(x, done, asides))
        made_of = dict(zip(self.linears, outputs, strict=False))
        if done is not None:
            norms_O = list(done[num:])
        else:
            sides = [side for side in outputs[num:] if side is not None]
            columns = adapter.squares_O, sides, adapter.a_RIs, adapter.b_ORs, adapter.scales
            norms_O = [row_norms(*parts) for parts in zip(*columns, strict=True)]
        if saved is not None and done is None:
            # What has no adapter is handed out as it is, and Liger's rotary kernel writes into it.
            safe = [z.detach() if n in a_RIs else z.detach().clone() for n, z in made_of.items()]
            saved.store(*safe, *norms_O)
        for linear, *parts in zip(own, adapter.changes_O, adapter.squares_O, norms_O, strict=True):
            made_of[linear] = _rescaled(made_of[linear], linear.bias, *parts)
        return list(made_of.values())

    def _dropped(self, x: torch.Tensor, adapter: Adapter) -> list[torch.Tensor]:
        """DoRA as peft: the base sees x, what changes in it sees x after dropout; two matmuls."""
        columns = adapter.a_RIs, adapter.b_ORs, adapter.scales, adapter.changes_O, adapter.squares_O
        own, outs = dict(zip(adapter.linears, zip(*columns, strict=True), strict=True)), []
        for linear in self.linears:
            if linear not in own:
                outs += FrozenMatmul.apply(x, (linear,), (), False, None)
                continue
            a_RI, b_OR, scale, change_O, square_O = own[linear]
            dropped = nn.functional.dropout(x, adapter.dropout)
            (rest,) = FrozenMatmul.apply(x - dropped, (linear,), (), False, None)
            dropped, delta = LoraMatmul.apply(dropped, None, a_RI, (scale,), None, b_OR)
            output, aside = FrozenMatmul.apply(dropped, (linear,), (a_RI,), False, delta)
            norm_O = row_norms(square_O, aside, a_RI, b_OR, scale)
            outs.append(rest + _rescaled(output, None, change_O, square_O, norm_O))
        return outs


class QuantizedLinear(nn.Module):
    """A frozen linear whose weight lies in its layer's store.

    Attributes:
        bias: frozen bias [O] or None.
        dequantize: dtype -> the frozen weight_OI, made anew.
        stored_name: its name among the linears of the layer's files.
        group: the linears that read the same input, itself included.
        quantized: gives the 4-bit weights of its group, whose first it is, where large matmuls run
            in 8 bit; else None.
        sums_in_fp16: whether large matmuls do.
    """

    bias: nn.Parameter | None
    group: InputGroup
    quantized: Callable[[], matmul.Quantized4 | matmul.Quantized8] | None = None
    sums_in_fp16 = False

    def __init__(self, linear: nn.Linear, dequantize: Dequantize, stored_name: str = "") -> None:
        super().__init__()
        self.stored_name = stored_name
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self._dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        self.dequantize = dequantize

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight_OI, made anew, for layers that hand it to kernels of their own."""
        return self.dequantize(self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Frozen matmul, plus LoRA matmul where there is a pair.

        Args:
            x: [..., I], compute dtype.

        Returns:
            [..., O], compute dtype.
        """
        return self.group.output(self, x).view(*x.shape[:-1], self.out_features)


def group_linears(linears: dict[str, QuantizedLinear]) -> list[InputGroup]:
    """Find the linears that read the same input.

    Args:
        linears: name in the layer -> linear, in the order of the store.

    Returns:
        The groups in that order, most of them of one linear.
    """
    groups: dict[tuple[str, ...], list[QuantizedLinear]] = {}
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        shared = next((row for row in SHARED_INPUTS if last in row), (last,))
        groups.setdefault((parent, *shared), []).append(linear)
    return [InputGroup(members) for members in groups.values()]
