"""Groups of rows that pass a layer one after the other while its bytes are there.

Weights that are streamed, gathered or dequantized cost time per visit of a layer, not per row. So
all groups of a step (its micro-batches; the rows of a reference model) go through the first layer,
then through the second, and back the same way.

transformers has the loop over the layers, and makes masks, positions and rotary tables in it. It
runs once for each group with stand-ins in the layers' places, which write down what each layer is
called with; and once more at the end, for what it does behind the last layer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsdp_qlora.model import attention, head


class RowGroup(NamedTuple):
    """Rows that run together.

    Attributes:
        input_ids: int64 [B, T].
        targets: what is trained, or asked for.
        rows: see QuantizedModel.forward.
        has_adapters: False: the frozen model, without gradient.
    """

    input_ids: Tensor
    targets: head.Targets | None
    rows: attention.RowBounds | None = None
    has_adapters: bool = True


class LayerCall(NamedTuple):
    """What a layer is called with for one group, its input aside.

    Attributes:
        args, kwargs: of the layer's own forward.
        has_adapters: see RowGroup.
    """

    args: tuple
    kwargs: dict[str, Any]
    has_adapters: bool = True


class Spread(torch.autograd.Function):
    """The same trained tensors for each group; gradients are summed up in the groups' order.

    Args:
        num: of groups.
        tensors: some may be None.

    Returns:
        Views of all tensors, group after group; their gradients are added in float32 at least.
    """

    @staticmethod
    def forward(ctx, num, *tensors):
        ctx.set_materialize_grads(False)
        ctx.num = num
        return tuple(None if t is None else t.view_as(t) for _ in range(num) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        width = len(grads) // ctx.num
        return None, *[_sum(grads[i::width]) for i in range(width)]


def _sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    found = [grad for grad in grads if grad is not None]
    if not found:
        return None
    return functools.reduce(torch.add, found[1:], found[0].float()).to(found[0].dtype)


class StandIn(nn.Module):
    """In the place of a module; whatever else it is asked, that answers.

    Args:
        own: the module.
        answer: called instead of it.
        is_for_all: stands for the modules inside it too.
    """

    def __init__(self, own: nn.Module, answer: Callable, is_for_all: bool = False) -> None:
        super().__init__()
        # [own] is no part of it: neither moved nor found.
        self._own, self._answer, self._is_for_all = [own], answer, is_for_all

    def forward(self, *args, **kwargs):
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str):
        found = getattr(self.__dict__["_own"][0], name)
        return self if self._is_for_all and isinstance(found, nn.Module) else found


@contextmanager
def _replaced(layers: nn.ModuleList, step: Callable[..., Tensor]) -> Iterator[None]:
    blocks = dict(layers.named_children())
    stand_ins = {n: StandIn(b, functools.partial(step, int(n))) for n, b in blocks.items()}
    try:
        layers._modules.update(stand_ins)
        yield
    finally:
        layers._modules.update(blocks)


@contextmanager
def may_refuse() -> Iterator[None]:
    """Context in which code of a model may refuse inputs of a kind; other faults are raised."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (AttributeError, ValueError, TypeError, RuntimeError):
        return


class _Recorded(Exception):
    """The last layer's arguments are known; nothing behind it need run."""


def take_apart(
    decoder: nn.Module, layers: nn.ModuleList, has_adapters: bool, inputs: dict[str, Any]
) -> tuple[Tensor, list[LayerCall]]:
    """Find what a decoder calls its layers with.

    Args:
        decoder: of transformers.
        layers: its own list of them.
        has_adapters: of the calls.
        inputs: of the decoder.

    Returns:
        The input of the first layer and the calls of all.

    Raises:
        ValueError: it does more between its layers than to hand on what each returns.
    """
    found, first = list[LayerCall](), list[Tensor]()

    def step(number: int, hidden: Tensor, *args: Any, **kwargs: Any):
        first.append(hidden) if not first else None
        if number != len(found) or hidden is not first[0]:
            raise ValueError("its layers are not called one after the other")
        found.append(LayerCall(args, kwargs, has_adapters))
        if len(found) == len(layers):
            raise _Recorded
        return hidden

    try:
        with _replaced(layers, step):
            decoder(use_cache=False, **inputs)
    except _Recorded:
        return first[0], found
    raise ValueError("it leaves out some of its layers")


def finish(decoder: nn.Module, layers: nn.ModuleList, last: Tensor, inputs: dict) -> Tensor:
    """What a decoder makes of the output of its last layer.

    Args:
        decoder, layers, inputs: see `take_apart`.
        last: that output.
    """

    def step(number: int, hidden: Tensor, *_, **__):
        return last if number == len(layers) - 1 else hidden

    with _replaced(layers, step):
        return decoder(use_cache=False, **inputs).last_hidden_state
