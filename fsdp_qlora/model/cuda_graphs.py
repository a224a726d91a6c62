"""CUDA graphs of one decoder layer, where the host would be the bottleneck.

All layers of a model have the same kernels, so one pair of graphs (forward; recomputation and
backward) serves every layer of a level: what differs between layers (quantized bytes, adapters,
norms, results that a selective layer keeps) is copied into the graph's own inputs before it is
replayed. That costs the GPU a few per cent and spares the host some hundred launches a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fsdp_qlora import hardware
from fsdp_qlora.model.lora import SavedActivations
from fsdp_qlora.planning.sizes import MAX_GRAPH_SHAPES, MAX_GRAPH_WORK

NUM_WARMUPS = 2  # kernels are compiled and chosen before a capture


@dataclass
class Pass:
    """The two graphs of one shape and level.

    Attributes:
        inputs: what is copied in before a replay: hidden, adapters, quantized bytes, norms and
            biases, rotary tables, in the order of `_inputs`.
        kept: results that the backward takes from the forward.
        out, grad_out, grads: of the layer; `grads` of hidden and adapters.
        forward, backward: replay them.
    """

    inputs: Sequence[Tensor]
    kept: Sequence[Tensor]
    out: Tensor
    grad_out: Tensor
    grads: Sequence[Tensor]
    forward: Callable[[], None]
    backward: Callable[[], None]


@dataclass
class Graphs:
    """The graphs of a model, by shape of the batch and level of the layer.

    Attributes:
        passes: shape and level -> graphs, or before: the layer that met them first.
        failure: why there are none any more, or "".
    """

    passes: dict[tuple, Any] = field(default_factory=dict)
    failure: str = ""
    _weights: Sequence[Tensor] = ()  # inputs that the graphs of every shape have in common
    _pool: Any = None
    _stream: Any = None  # one for all: cuBLAS keeps scratch memory for each that it has seen

    def find(self, body, hidden: Tensor, args: tuple, kwargs: dict) -> "Pass | None":
        """The graphs for a layer's arguments, captured when a shape comes the second time.

        Args:
            body: the TrainedLayer.
            hidden, args, kwargs: of its forward.

        Returns:
            The graphs, captured by the layer that met them first as it meets them again; None when
            the layer is to be run as it is.
        """
        has_rows = "cu_seq_lens_q" in kwargs  # bounds of rows differ from batch to batch
        if self.failure or has_rows:
            return None
        key = *hidden.shape, body.level
        if key not in self.passes and len(self.passes) < MAX_GRAPH_SHAPES:
            self.passes[key] = body
        elif self.passes.get(key) is body:
            self.passes[key] = self._capture(body, hidden, args, kwargs)
        found = self.passes.get(key)
        return found if isinstance(found, Pass) else None

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
            return self._record(_template(body, inputs, args, kwargs), inputs, body)
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            print(f"note      CUDA graphs are off: {self.failure}", flush=True)
            return None

    def _record(self, run: Callable, inputs: Sequence[Tensor], body) -> Pass:
        grad_out, reading = torch.zeros_like(inputs[0]), partial(_reading, body.store, inputs[2])

        def forward() -> tuple[Tensor, SavedActivations | None]:
            saved = SavedActivations() if body.level == "selective" else None
            with reading(), torch.no_grad():
                return run(saved, *inputs[:2]), saved

        def backward(saved: SavedActivations | None) -> Sequence[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs[:2]]
            with reading(), torch.enable_grad():
                out = run(saved and saved.copy(), *leaves)
                return torch.autograd.grad(out, leaves, grad_out)

        def warm_up() -> None:
            for _ in range(NUM_WARMUPS):
                backward(forward()[1])

        self._aside(warm_up)
        torch.cuda.empty_cache()  # of this, and of what layers have left that ran without graphs
        (out, saved), replay_forward = self._graph(forward)
        kept = [] if saved is None else [tensor for part in saved.results for tensor in part]
        grads, replay_backward = self._graph(partial(backward, saved))
        return Pass(inputs, kept, out, grad_out, grads, replay_forward, replay_backward)

    def _aside(self, work: Callable[[], None]) -> None:
        """Run something on the stream of the graphs."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _graph(self, work: Callable) -> tuple[Any, Callable[[], None]]:
        """Capture something: what it returns, overwritten by each replay, and the replay."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's watchdog asks for events
        here = torch.cuda.stream(torch.cuda.current_stream())  # also after a failed capture
        with here, torch.cuda.graph(graph, self._pool, self._stream, mode):
            found = work()
        return found, graph.replay


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
        None on a CPU, when off, with work that keeps the GPU busy (see MAX_GRAPH_WORK), or when an
        attribute differs between layers (other windows, layers without rotary embedding).
    """
    if setting == "off" or device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    (gpu,) = hardware.with_measured(
        [hardware.gpu_like(facts.name, facts.total_memory / hardware.GIB)]
    )
    if work > MAX_GRAPH_WORK * gpu.bf16_tflops:
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
        found.forward()
        ctx.kept = [tensor.clone() for tensor in found.kept]
        return found.out.clone()

    @staticmethod
    def backward(ctx, grad_out):
        graphs, found, body, args, kwargs = ctx.rest
        graphs.load(found, body, *ctx.saved_tensors, args, kwargs)
        for static, tensor in zip(found.kept, ctx.kept, strict=True):
            static.copy_(tensor)
        ctx.kept = None
        found.grad_out.copy_(grad_out)
        found.backward()
        pairs = zip(found.grads, ctx.needs_input_grad[5:], strict=True)
        return None, None, None, None, None, *[g.clone() if need else None for g, need in pairs]


def _inputs(body, hidden, lora, args: tuple, kwargs: dict) -> list[Tensor]:
    """Everything that the kernels of a layer read."""
    quantized = body.store.read().detach().view(torch.uint8)
    others = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return [hidden, lora, quantized, *body.layer.parameters(), *others]


def _template(body, inputs: Sequence[Tensor], args: tuple, kwargs: dict) -> Callable:
    """The layer on a graph's inputs in place of its own tensors, forward or recomputed."""
    names = [name for name, _ in body.layer.named_parameters()]
    params = dict(zip(names, inputs[3 : 3 + len(names)], strict=True))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    others = iter(inputs[3 + len(names) :])
    leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)

    def run(saved: SavedActivations | None, hidden: Tensor, lora: Tensor) -> Tensor:
        step = body.run_again if hidden.requires_grad else body.run
        return step(saved, hidden, lora, args, kwargs, params)

    return run


@contextmanager
def _reading(store, quantized: Tensor) -> Iterator[None]:
    """Let a store read a graph's input; what is made of it meanwhile belongs to the graph."""
    before = store.read, store.scales
    store.read, store.scales = lambda: quantized, {}
    store.cache.clear()
    try:
        yield
    finally:
        store.read, store.scales = before
        store.cache.clear()
