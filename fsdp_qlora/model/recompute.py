"""Recomputation of a decoder layer in the backward pass, and what it need not make again."""

from collections.abc import Callable

import torch


class Kept:
    """Results of a layer's forward pass that its recomputation takes over instead of making them.

    The first run over the layer stores them in order, the second takes them in the same order.

    Attributes:
        is_replay: the second run is under way.
    """

    def __init__(self) -> None:
        self.is_replay = False
        self._results: list[tuple[torch.Tensor, ...]] = []

    def store(self, *tensors: torch.Tensor) -> None:
        """Keep the next results; they must not be written to afterwards."""
        self._results.append(tensors)

    def take(self) -> tuple[torch.Tensor, ...]:
        """The next results, forgotten here."""
        return self._results.pop(0)


class Recomputed(torch.autograd.Function):
    """run(hidden, *trained), whose backward runs it once more and keeps only its inputs till then.

    As torch's reentrant checkpoint, but it hands back the gradients of what is trained instead of
    accumulating them inside, needs no input that requires one, and is several times cheaper for the
    host than the non-reentrant one, which sees every saved tensor.

    Args:
        run: (hidden, *trained) -> tensor or tuple of tensors; called twice.
        has_dropout: give the second call the random numbers of the first.
        hidden: [B, T, H].
        trained: the adapters, or the layer's own parameters; or None.

    Returns:
        What `run` returns.
    """

    @staticmethod
    def forward(ctx, run, has_dropout, hidden, *trained):
        ctx.run, ctx.random_state = run, _random_state(hidden.device) if has_dropout else None
        ctx.save_for_backward(hidden, *trained)
        return run(hidden, *trained)

    @staticmethod
    def backward(ctx, *grads_out):
        saved = ctx.saved_tensors  # asked for once: an input may come from the host
        hidden = saved[0]
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved, needed, strict=True)
        ]
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=ctx.random_state is not None):
            _set_random_state(ctx.random_state, hidden.device)
            with torch.enable_grad():
                outs = ctx.run(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        pairs = [(o, g) for o, g in zip(outs, grads_out, strict=True) if g is not None]
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
        return None, None, *[next(grads) if need else None for need in needed]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor] | None, device: torch.device) -> None:
    if states is not None:
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)


def saves_after(
    has_happened: Callable[[], bool],
) -> tuple[torch.autograd.graph.saved_tensors_hooks, Callable[[], bool]]:
    """Watch whether autograd saves a tensor after something has happened.

    Args:
        has_happened: asked at every tensor that is saved.

    Returns:
        (context manager to run in, whether it was so).
    """
    seen = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(has_happened())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    return hooks, lambda: any(seen)
