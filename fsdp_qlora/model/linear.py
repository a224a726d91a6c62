"""Frozen linears with LoRA pairs, and the linears that read the same input together.

Shape letters: I in features, O out features, R LoRA rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fsdp_qlora.model import dora
from fsdp_qlora.model.product import FrozenProduct, LoraProduct
from fsdp_qlora.model.recompute import Kept

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
    """

    name: str
    linear: "PackedLinear"
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool = False
    has_magnitude: bool = False

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r) (rank-stabilised, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Adapter(NamedTuple):
    """The LoRA pairs of an InputGroup, in the compute dtype.

    Attributes:
        linears: that have one.
        a_RI: the A matrices one below the other.
        b_ORs: B of each.
        scale, dropout: see LoraSlot.
        changes_O, squares_O: of DoRA, what was added to the length of each row of W, and its square
            in the frozen W, float32; empty for LoRA.
    """

    linears: Sequence["PackedLinear"]
    a_RI: torch.Tensor
    b_ORs: Sequence[torch.Tensor]
    scale: float
    dropout: float
    changes_O: Sequence[torch.Tensor] = ()
    squares_O: Sequence[torch.Tensor] = ()


class InputGroup:
    """Linears of a layer that read the same input: the first one asked computes all of them.

    Attributes:
        linears: in the order of the store.
        adapter: their LoRA pairs while a pass over the layer runs, else None.
        kept: where outputs are stored or taken from while a pass runs, or None.
        is_skipped: nobody looks at the values of the outputs of this pass.
        has_run: an output was asked for in this pass.
    """

    def __init__(self, linears: Sequence["PackedLinear"]) -> None:
        self.linears = tuple(linears)
        self.adapter: Adapter | None = None
        self.kept: Kept | None = None
        self.is_skipped = self.has_run = False
        self._x: torch.Tensor | None = None
        self._outs: dict[PackedLinear, torch.Tensor] = {}
        for linear in linears:
            linear.group = self

    def output(self, linear: "PackedLinear", x: torch.Tensor) -> torch.Tensor:
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
        self.adapter = self.kept = self._x = None
        self.is_skipped = self.has_run = False
        self._outs = {}

    def _compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.adapter is not None and self.adapter.changes_O:
            return dora.outputs(x, self.linears, self.adapter, self.kept)
        if self.is_skipped:
            shape = x.shape[:-1].numel()
            empty = [x.new_empty(shape, linear.out_features) for linear in self.linears]
            return FrozenProduct.apply(*self._adapt(x, empty))
        if self.kept is None:
            return FrozenProduct.apply(*self._adapt(x, None))
        if self.kept.is_replay:
            return FrozenProduct.apply(*self._adapt(x, self.kept.take()))
        outs = FrozenProduct.apply(*self._adapt(x, None))
        # Copies where Liger's rotary kernel will write into the outputs.
        is_written_to = len(self.linears) == len(SHARED_INPUTS[0])
        self.kept.store(*[out.detach().clone() if is_written_to else out.detach() for out in outs])
        return outs

    def _adapt(self, x: torch.Tensor, done: Sequence[torch.Tensor] | None) -> tuple:
        """The arguments of FrozenProduct."""
        deltas: dict[PackedLinear, torch.Tensor | None] = dict.fromkeys(self.linears)
        deltas |= zip(self.linears, done or (), strict=False)
        if self.adapter is not None:
            linears, a_RI, b_ORs, scale, dropout, *_ = self.adapter
            outputs = None if done is None else [deltas[linear] for linear in linears]
            if dropout and linears[0].training:
                for i, a in enumerate(a_RI.split([b.shape[1] for b in b_ORs])):
                    lora_x = nn.functional.dropout(x, dropout)  # each linear has its own
                    output = None if outputs is None else outputs[i : i + 1]
                    x, deltas[linears[i]] = LoraProduct.apply(x, lora_x, a, scale, output, b_ORs[i])
            else:
                x, *made = LoraProduct.apply(x, None, a_RI, scale, outputs, *b_ORs)
                deltas |= zip(linears, made, strict=True)
        return x, self.linears, (), done is not None, *deltas.values()


class PackedLinear(nn.Module):
    """A frozen linear whose weight lies in its layer's store.

    Attributes:
        bias: frozen bias [O] or None.
        dequantize: dtype -> the frozen weight_OI, made anew.
        group: the linears that read the same input, itself included.
    """

    bias: nn.Parameter | None
    group: InputGroup

    def __init__(
        self, linear: nn.Linear, dequantize: Callable[[torch.dtype], torch.Tensor]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.register_parameter("bias", linear.bias)
        self.dequantize = dequantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Frozen product, plus LoRA product where there is a pair.

        Args:
            x: [..., I], compute dtype.

        Returns:
            [..., O], compute dtype.
        """
        return self.group.output(self, x).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def group_linears(linears: dict[str, PackedLinear]) -> list[InputGroup]:
    """Find the linears that read the same input.

    Args:
        linears: name in the layer -> linear, in the order of the store.

    Returns:
        The groups in that order, most of them of one linear.
    """
    groups: dict[tuple[str, ...], list[PackedLinear]] = {}
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        shared = next((row for row in SHARED_INPUTS if last in row), (last,))
        groups.setdefault((parent, *shared), []).append(linear)
    return [InputGroup(members) for members in groups.values()]
