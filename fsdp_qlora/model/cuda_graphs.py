"""CUDA graphs of one decoder layer, for batches so small that the host would be the bottleneck.

All layers of a model have the same kernels, so one pair of graphs (forward; recomputation and
backward) serves every one of them: what differs between layers (quantized bytes, adapters, norms)
is copied into the graph's own inputs before it is replayed. That costs the GPU a few per cent and
spares the host some hundred launches a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fsdp_qlora.planning.sizes import MAX_GRAPH_SHAPES, MAX_GRAPH_WORK

NUM_WARMUPS = 2  # kernels are compiled and chosen before a capture


@dataclass
class Pass:
    """The two graphs of one shape.

    Attributes:
        inputs: what is copied in before a replay: hidden, adapters, quantized bytes, norms and
            biases, rotary tables, in the order of `_inputs`.
        out, grad_out, grads: of the layer; `grads` of hidden and adapters.
        forward, backward: to replay.
    """

    inputs: Sequence[Tensor]
    out: Tensor
    grad_out: Tensor
    grads: Sequence[Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


@dataclass
class Graphs:
    """The graphs of a model, by shape of the batch.

    Attributes:
        passes: shape -> graphs; None = seen once, not captured yet.
        failure: why there are none any more, or "".
    """

    passes: dict[tuple, Pass | None] = field(default_factory=dict)
    failure: str = ""
    _weights: Sequence[Tensor] = ()  # inputs that the graphs of every shape have in common
    _pool: Any = None
    _stream: Any = None  # one for all: cuBLAS keeps scratch memory for each that it has seen
    _first_body: Any = None  # who meets a shape first captures its graphs

    def find(self, body, hidden: Tensor, args: tuple, kwargs: dict) -> "Pass | None":
        """The graphs for a layer's arguments, captured when a shape comes the second time.

        Args:
            body: the TrainedLayer.
            hidden, args, kwargs: of its forward.

        Returns:
            The graphs; None when the layer is to be run as it is.
        """
        num_tokens = hidden.shape[0] * hidden.shape[1]
        num_weights = body.store.layout.num_weights
        has_rows = "cu_seq_lens_q" in kwargs  # bounds of rows differ from batch to batch
        if self.failure or has_rows or num_weights * num_tokens > MAX_GRAPH_WORK:
            return None
        key = tuple(hidden.shape)
        if key not in self.passes and len(self.passes) < MAX_GRAPH_SHAPES:
            self.passes[key] = None
            self._first_body = body
            return None
        if self.passes.get(key) is None and body is self._first_body:
            self.passes[key] = self._capture(body, hidden, args, kwargs)
        return self.passes.get(key)

    def load(self, found: Pass, body, hidden, lora, args: tuple, kwargs: dict) -> None:
        """Copy a layer's tensors into the inputs of the graphs."""
        pairs = [*zip(found.inputs, _inputs(body, hidden, lora, args, kwargs), strict=True)]
        for dtype in {static.dtype for static, _ in pairs}:
            statics, tensors = zip(*[pair for pair in pairs if pair[0].dtype == dtype], strict=True)
            torch._foreach_copy_(statics, tensors)

    def _capture(self, body, hidden, args, kwargs) -> Pass | None:
        try:
            with torch.no_grad():
                found = [t.detach() for t in _inputs(body, hidden, body.lora, args, kwargs)]
                others = 3 + len(list(body.layer.parameters()))
                self._weights = self._weights or [t.clone() for t in found[1:others]]
                inputs = [found[0].clone(), *self._weights, *(t.clone() for t in found[others:])]
            here = torch.cuda.stream(torch.cuda.current_stream())  # also after a failed capture
            with here, _template(body, inputs, args, kwargs) as run:
                return self._record(run, inputs)
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            return None

    def _record(self, run: Callable, inputs: Sequence[Tensor]) -> Pass:
        leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
        grad_out = torch.zeros_like(leaves[0])

        def forward() -> Tensor:
            with torch.no_grad():
                return run(False)

        def backward() -> Sequence[Tensor]:
            with torch.enable_grad():
                return torch.autograd.grad(run(True), leaves, grad_out)

        self._stream = self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARMUPS):
                forward()
                backward()
        torch.cuda.current_stream().wait_stream(self._stream)
        graphs, results = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()), list[Any]()
        mode = "thread_local"  # NCCL's watchdog asks for events from its own thread meanwhile
        for graph, work in zip(graphs, (forward, backward), strict=True):
            with torch.cuda.graph(graph, self._pool, self._stream, mode):
                results.append(work())
        for leaf in leaves:
            leaf.requires_grad_(False)
        return Pass(inputs, results[0], grad_out, results[1], *graphs)


def choose(
    setting: str, layers: Sequence[torch.nn.Module], device: torch.device, work: float
) -> Graphs | None:
    """Graphs for a model whose layers differ in nothing but their weights.

    Args:
        setting: "auto" or "off".
        layers: the decoder layers as the model's author wrote them.
        device: of the rank.
        work: weights of a layer times tokens of a full micro-batch; where these are too many for
            graphs, shorter batches get none either, so that memory is what the plan says.

    Returns:
        None on a CPU, when off, with more work than MAX_GRAPH_WORK, or when an attribute differs
        between layers (other windows, layers without rotary embedding).
    """
    if setting == "off" or device.type != "cuda" or work > MAX_GRAPH_WORK:
        return None
    first, *others = map(_facts, layers)
    return Graphs() if all(facts == first for facts in others) else None


def _facts(layer: torch.nn.Module) -> list[tuple]:
    def own(module: torch.nn.Module) -> dict[str, Any]:
        plain = (int, float, str, type(None))
        return {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"}

    return [(name, type(module), own(module)) for name, module in layer.named_modules()]


class Replayed(torch.autograd.Function):
    """A layer by its graphs: forward now, recomputation and backward later.

    Args:
        graphs, found: the latter of the former's `find`.
        body, args, kwargs: the layer and the rest of its arguments.
        hidden: [B, T, H].
        lora: its adapters.

    Returns:
        The layer's output, [B, T, H].
    """

    @staticmethod
    def forward(ctx, graphs, found, body, args, kwargs, hidden, lora):
        ctx.save_for_backward(hidden, lora)
        ctx.rest = graphs, found, body, args, kwargs
        graphs.load(found, body, hidden, lora, args, kwargs)
        found.forward.replay()
        return found.out.clone()

    @staticmethod
    def backward(ctx, grad_out):
        graphs, found, body, args, kwargs = ctx.rest
        graphs.load(found, body, *ctx.saved_tensors, args, kwargs)
        found.grad_out.copy_(grad_out)
        found.backward.replay()
        pairs = zip(found.grads, ctx.needs_input_grad[5:], strict=True)
        return None, None, None, None, None, *[g.clone() if need else None for g, need in pairs]


def _inputs(body, hidden, lora, args: tuple, kwargs: dict) -> list[Tensor]:
    """Everything that the kernels of a layer read."""
    quantized = body.store.read().detach().view(torch.uint8)
    others = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return [hidden, lora, quantized, *body.layer.parameters(), *others]


@contextmanager
def _template(body, inputs: Sequence[Tensor], args: tuple, kwargs: dict) -> Iterator[Callable]:
    """Let a layer read a graph's inputs in place of its own tensors, while it is captured."""
    names = [name for name, _ in body.layer.named_parameters()]
    params = dict(zip(names, inputs[3 : 3 + len(names)], strict=True))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    others = iter(inputs[3 + len(names) :])
    leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    hidden, lora = inputs[:2]

    def run(again: bool) -> Tensor:
        body.store.cache.clear()  # what is dequantized here belongs to the graph
        step = body.run_again if again else body.run
        return step(None, hidden, lora, args, kwargs, params)

    read, body.store.read = body.store.read, lambda: inputs[2]
    try:
        yield run
    finally:
        body.store.read = read
        body.store.cache.clear()
