"""Causal attention whose output a recomputed layer can keep (level "selective").

Shape letters: B batch, N heads, T tokens, D head size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning.sizes import LONG_TOKENS, head_parts


class RowBounds(NamedTuple):
    """Where the rows of a sequence of T tokens begin and end.

    Attributes:
        bounds: int32 [rows + 1], first token of each row, and T.
        position_ids: int64 [1, T], counted from 0 in each row.
        longest: tokens of the longest row.
        branches: where rows go on from others, see there; or None.
        cut: which part of them this rank has, see there; None: all. Only `bounds` and `longest` are
            of the whole sequence then.
    """

    bounds: torch.Tensor
    position_ids: torch.Tensor
    longest: int
    branches: "Branches | None" = None
    cut: "Cut | None" = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "RowBounds | None":
        """Find the bounds on the host, so that the device never waits.

        Args:
            lengths: tokens of each row; empty when a sequence is one row.
            device: where they go.
        """
        if not lengths:
            return None
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        if device.type == "cuda":
            bounds = bounds.pin_memory().to(device, non_blocking=True)
            position_ids = position_ids.pin_memory().to(device, non_blocking=True)
        return cls(bounds, position_ids, max(lengths))

    def arguments(self, context: World | None = None) -> dict[str, Any]:
        """Keyword arguments of a transformers decoder; those of its flash attention, too.

        Args:
            context: the ranks that share the rows, where they are cut.
        """
        bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.bounds)
        lengths = dict.fromkeys(("max_length_q", "max_length_k"), self.longest)
        more: dict[str, Any] = {} if self.branches is None else {"branches": self.branches}
        if self.cut is not None:  # a mask of four dimensions is taken as it is: none is made
            mask = self.position_ids.new_ones(1, 1, 1, 1)
            more = {"cut": self.cut._replace(ranks=context), "attention_mask": mask}
        return {"position_ids": self.position_ids, **bounds, **lengths, **more}


class Branches(NamedTuple):
    """Rows that go on from others: prompts, behind them all answers, behind these the rest.

    Attributes:
        prompts, answers: int32 [prompts + 1] each: bounds of the prompts, and of all answers to
            each of them, counted from the first answer.
        num_prompt, num_answer: tokens.
        longest_prompt, longest_answer: of the tokens between two bounds, the most.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    num_prompt: int
    num_answer: int
    longest_prompt: int
    longest_answer: int

    @classmethod
    def join(cls, bounds: RowBounds, prompts: Sequence[int], answers: Sequence[int]) -> RowBounds:
        """Let answers go on from their prompts.

        Args:
            bounds: of prompts, answers, and padding, each a row.
            prompts, answers: tokens of each prompt, and of all answers to it.
        """
        ends = torch.stack(
            [torch.tensor([0, *part]).cumsum(0).int() for part in (prompts, answers)]
        )
        if bounds.bounds.device.type == "cuda":
            ends = ends.pin_memory().to(bounds.bounds.device, non_blocking=True)
        nums = sum(prompts), sum(answers), max(prompts), max(answers)
        return bounds._replace(branches=cls(ends[0], ends[1], *nums))


class Piece(NamedTuple):
    """A chunk of neighbouring tokens of a sequence, and the keys that it looks at.

    Attributes:
        keys: from the first token of the chunk's first row to the chunk's last.
        lengths: bounds of the rows among the chunk's tokens, among the keys, and the most tokens of
            a row in each: what kernels for rows ask for.
    """

    keys: slice
    lengths: tuple[torch.Tensor, torch.Tensor, int, int]


class Cut(NamedTuple):
    """The part of a sequence that one of several ranks has: two chunks, see `batches.cut`.

    Attributes:
        pieces: the two chunks; one that is all.
        ranks: those that have the others; None: there are none.
    """

    pieces: tuple[Piece, ...]
    ranks: World | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], chunks: tuple[int, int], device: torch.device) -> "Cut":
        """Find the rows in the chunks on the host.

        Args:
            lengths: tokens of each row of the whole sequence.
            chunks: numbers of the two, which stand as far from the beginning and from the end.
            device: where the bounds go.
        """
        ends = [*itertools.accumulate(lengths, initial=0)]
        size, made = ends[-1] // (sum(chunks) + 1), []
        for first in (number * size for number in chunks):
            last = first + size
            inside = [(a, b) for a, b in itertools.pairwise(ends) if a < last and b > first]
            seen = [(min(b, last) - max(a, first), min(b, last) - a) for a, b in inside]
            bounds = torch.tensor([(0, 0), *seen]).cumsum(0).int().t().contiguous()
            if device.type == "cuda":
                bounds = bounds.pin_memory().to(device, non_blocking=True)
            longest = [max(column) for column in zip(*seen, strict=True)]
            made.append(Piece(slice(inside[0][0], last), (*bounds, *longest)))
        return cls(tuple(made))

    @classmethod
    def whole(cls, query: torch.Tensor, key: torch.Tensor, bounds, longest: int) -> "Cut":
        """All rows, by their bounds; or the last tokens of each, [B, N, T, D], over all of it."""
        lengths = bounds, bounds, longest, longest
        if bounds is None:
            ends = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
            nums = query.shape[2], key.shape[2]
            lengths = ends * nums[0], ends * nums[1], *nums
        return cls((Piece(slice(len(key) * key.shape[2]), lengths),))

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The tokens of all ranks in their order, [T, ...], of this rank's, [T / ranks, ...]."""
        if self.ranks is None:
            return own
        order = self._order(self.ranks.size)
        chunks = self.ranks.share(own.reshape(-1)).view(len(order), -1, *own.shape[1:])
        return torch.cat([chunks[order.index(number)] for number in range(len(order))])

    def reduce(self, whole: torch.Tensor) -> torch.Tensor:
        """The other way: `gather`, differentiated; the sum over ranks of this rank's tokens."""
        if self.ranks is None:
            return whole
        order = self._order(self.ranks.size)
        chunks = whole.view(len(order), -1, *whole.shape[1:])
        slices = torch.stack([chunks[number] for number in order]).view(self.ranks.size, -1)
        return self.ranks.sum_slices(slices).view(-1, *whole.shape[1:])

    @staticmethod
    def _order(num: int) -> list[int]:
        """Numbers of the chunks, rank after rank."""
        return [number for rank in range(num) for number in (rank, 2 * num - 1 - rank)]


aten = torch.ops.aten
PLAIN = "fsdp_qlora_causal"  # names by which transformers finds `attend`, without masks
MASKED = "fsdp_qlora_masked"  # and with masks
TRIAL = "fsdp_qlora_trial"  # and to find out whether masks are needed
WINDOWS = ("sliding_window", "attention_chunk_size")  # keys of a config
HEAD_SIZES = range(8, 257, 8)
# Keywords of which `attend` knows what they ask for; masks hold what the rest of them says.
KEYWORDS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
KEYWORDS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions"}
KEYWORDS |= {"branches", "cut", "s_aux", "output_router_logits", "logits_to_keep"}


def register(config, has_row_kernel: bool) -> str:
    """Tell transformers of `attend`; twice is harmless.

    A model whose layers all attend to everything before a token needs no mask where there is a
    kernel for rows: none is then built, which spares transformers a look at the position ids for
    which the host waits.

    Args:
        config: of the model.
        has_row_kernel: see kernels.Choice; without, transformers makes masks for rows.

    Returns:
        The name to build it with.
    """
    AttentionInterface.register(PLAIN, attend)
    AttentionInterface.register(MASKED, partial(attend, has_masks=True))
    AttentionInterface.register(TRIAL, _look)
    AttentionMaskInterface.register(MASKED, sdpa_mask)
    AttentionMaskInterface.register(TRIAL, _mark)
    kinds = set(getattr(config, "layer_types", None) or ())
    has_window = any(getattr(config, name, None) for name in WINDOWS) and not kinds
    needs_masks = not has_row_kernel or has_window or kinds - {"full_attention"}
    return MASKED if needs_masks else PLAIN


class KnownAttention(Exception):
    """A layer's attention computes what the kernel for rows does."""


def _mark(mask_function: Callable, **_: Any) -> torch.Tensor:
    """In the place of a mask: what it is made by."""
    mark = torch.empty(1, 1, 1, 1, device="meta")
    mark.sees = mask_function  # type: ignore[attr-defined]
    return mark


def _look(module, query, key, value, attention_mask, **kwargs):
    """Compare the window that a module asks for with its mask's.

    Raises:
        KnownAttention: they are the same, and it asks for no more than the kernel computes.
        ValueError: they are not, or it does.
    """
    window = kwargs.get("sliding_window") or 2**40
    ends = torch.tensor([1, 300, 2**30, min(window, 2**30)])  # further than any chunk is long
    at = torch.cat([ends - 1, ends, ends + 1, 2 * ends])
    ago, zero = at[:, None] - at, torch.zeros((), dtype=torch.long)
    is_same = attention_mask.sees(zero, zero, at[:, None], at) == ((ago >= 0) & (ago < window))
    width = query.shape[-1]
    is_odd = width not in HEAD_SIZES or width < value.shape[-1] or kwargs.get("dropout")
    if is_odd or _unknown(kwargs) or not is_same.all():
        raise ValueError("masks are needed")
    raise KnownAttention


def _unknown(kwargs: dict) -> list[str]:
    return [key for key in kwargs if key not in KEYWORDS and kwargs[key] is not None]


def attend(module, query, key, value, attention_mask, has_masks=False, **kwargs):
    """Attention as transformers calls it: its own SDPA, unless the layer keeps the result.

    Args:
        module: its `saved` (SavedActivations) is set while a layer runs that saves its results.
        query: [B, N, T, D].
        key, value: [B, N or fewer, T, D].
        attention_mask: None = causal.
        has_masks: masks say what rows and windows a token sees, and the keywords nothing.
        kwargs: as transformers has them (dropout, scaling, is_causal, ...).

    Returns:
        ([B, T, N, D], None).

    Raises:
        UserError: a keyword asks for what is not computed here (code 2).
    """
    unknown, bounds = _unknown(kwargs), kwargs.get("cu_seq_lens_q")
    window, sinks = kwargs.get("sliding_window"), kwargs.get("s_aux")
    longest = kwargs.get("max_length_k") or key.shape[2]
    is_joint = kwargs.get("branches") is not None or kwargs.get("cut") is not None
    has_all = attention_mask is None and not has_masks  # the keywords say what a token sees
    if not is_joint and not (has_all and (window or longest) < longest):
        window = None
    has_more = window or sinks is not None
    if sinks is not None and (sinks.requires_grad or not (has_all or is_joint)):
        unknown.append("s_aux")
    if unknown:
        rule = f"{type(module).__name__} wants {unknown[0]}, which it does not compute"
        raise UserError("--attn sdpa", rule, "use --attn eager")
    saved = getattr(module, "saved", None)
    if is_joint or (has_all and (has_more or bounds is not None)):
        if has_more and not is_joint:
            kwargs["cut"] = Cut.whole(query, key, bounds, longest)
        key, value = _for_kernel(query, key, value)
        width, kwargs["window"] = value.shape[-1], window
        if width < query.shape[-1]:  # of latent attention (DeepSeek): kernels want both alike
            value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
        return _attend_rows(query, key, value, kwargs, bounds, saved)[..., :width], None
    is_plain = attention_mask is None and not kwargs.get("dropout")
    is_plain = is_plain and query.shape[2] == key.shape[2] and query.shape[2] > 1
    scale = kwargs.get("scaling")
    is_own = saved is not None or (torch.is_grad_enabled() and _is_long(query.transpose(1, 2)))
    kernel = _kernel(query, key, value, scale) if is_own and is_plain else None
    if kernel is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = _for_kernel(query, key, value)
    return _run(query, key, value, scale, kernel, saved).transpose(1, 2).contiguous(), None


def _for_kernel(query, key, value) -> Sequence[torch.Tensor]:
    """Keys and values; that of the CPU wants as many heads of them as of queries."""
    num = query.shape[1] // key.shape[1] if query.device.type == "cpu" else 1
    return [t.repeat_interleave(num, 1) if num > 1 else t for t in (key, value)]


def _attend_rows(query, key, value, kwargs: dict, bounds, saved) -> torch.Tensor:
    """Attention inside each row, [B, T, N, D]."""
    longest = kwargs.get("max_length_q")
    if kwargs.get("cut") is not None:
        rest = {name: kwargs[name] for name in ("cut", "window")}
        forward = partial(_gathered, **rest, sinks=kwargs.get("s_aux"))
        kernel = forward, partial(_gathered_backward, **rest)
    elif kwargs.get("branches") is not None:
        if kwargs["window"] or kwargs.get("s_aux") is not None:
            raise ValueError("a window may end inside a prompt that other rows go on from")
        rest = {"bounds": bounds, "longest": longest, "branches": kwargs["branches"]}
        kernel = partial(_joined, **rest), partial(_joined_backward, **rest)
    else:
        rest = {"lengths": (bounds, bounds, longest, longest), "is_causal": True}
        kernel = partial(_varlen, **rest), partial(_varlen_backward, **rest)
    num, scale = len(query), kwargs.get("scaling")
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return _run(query, key, value, scale, kernel, saved).unflatten(0, (num, -1))


def _run(query, key, value, scale, kernel, saved) -> torch.Tensor:
    done = saved.take() if saved is not None and saved.is_replay else None
    out, *rest = SavedAttention.apply(query, key, value, scale, kernel, done)
    if saved is not None and done is None:
        saved.store(out.detach(), *rest)
    return out


_cpu = partial(aten._scaled_dot_product_flash_attention_for_cpu, is_causal=True)
_cpu_backward = partial(
    aten._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0, is_causal=True
)


def _flash(query, key, value, scale) -> tuple[torch.Tensor, ...]:
    out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    return out[0], out[1], out[6], out[7]  # the two last: state of dropout, which there is none of


def _flash_backward(grad_out, query, key, value, out, log_sum, *state, scale) -> tuple:
    lengths = None, None, query.shape[2], key.shape[2]  # None: no row is made of several
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, log_sum, *lengths, 0.0, True, *state, scale=scale
    )


def _cudnn(query, key, value, scale, is_causal=True) -> tuple[torch.Tensor, ...]:
    out = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return out[0], out[1], out[6], out[7]


def _cudnn_backward(
    grad_out, query, key, value, out, log_sum, *state, scale, is_causal=True
) -> tuple[torch.Tensor, ...]:
    rest = (*state, None, None, None, query.shape[2], key.shape[2], 0.0, is_causal)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, log_sum, *rest, scale=scale
    )


def _joined(query, key, value, scale, bounds, longest, branches) -> tuple[torch.Tensor, ...]:
    """Each row by itself, and answers over their prompts too; the parts are joined by their sums.

    softmax over both parts of the keys = parts * exp(log sum of the part - log sum of all).
    """
    to, own = branches, (bounds, bounds, longest, longest)
    out, log_sum, *state = _varlen(query, key, value, own, True, scale)
    part, cross = slice(to.num_prompt, to.num_prompt + to.num_answer), _cross(to)
    prompts = key[: to.num_prompt], value[: to.num_prompt]
    over, over_sum, *more = _varlen(query[part], *prompts, cross, False, scale)
    _join((out[part], log_sum[:, part]), (over, over_sum))
    return out, log_sum, *state, *more


def _join(*parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Attention of one and the same queries over two parts of the keys: (out, log sum) of each.

    What both have together takes the place of the first's.
    """
    (out, log_sum), (over, over_sum) = parts
    whole = torch.logaddexp(log_sum, over_sum)
    share = (over_sum - whole).exp().t().unsqueeze(2)
    torch.lerp(out, over, share.to(out.dtype), out=out)  # one pass over long tensors
    log_sum.copy_(whole)


def _joined_backward(
    grad_out, query, key, value, out, log_sum, *states, scale, bounds, longest, branches
) -> tuple[torch.Tensor, ...]:
    """Every part's own backward, with the output and the log sum of all."""
    to, num = branches, len(states) // 2
    own = {"lengths": (bounds, bounds, longest, longest), "is_causal": True, "scale": scale}
    rest = (query, key, value, out, log_sum)
    grads = _varlen_backward(grad_out, *rest, *states[:num], **own)
    part, first = slice(to.num_prompt, to.num_prompt + to.num_answer), slice(to.num_prompt)
    rest = (query[part], key[first], value[first], out[part], log_sum[:, part].contiguous())
    own |= {"lengths": _cross(to), "is_causal": False}
    more = _varlen_backward(grad_out[part], *rest, *states[num:], **own)
    for grad, other, at in zip(grads, more, (part, first, first), strict=True):
        grad[at] += other
    return grads


def _gathered(query, key, value, scale, cut, window, sinks=None) -> tuple[torch.Tensor, ...]:
    """Two chunks of queries over all keys up to their ends.

    A sink adds exp(sink) to the sum of its head's powers, and nothing to what is summed up.

    Source: zigzag halves, Llama 3, arXiv 2407.21783, section 3.3.2.
    """
    key, value = cut.gather(key), cut.gather(value)
    pairs = zip(query.chunk(len(cut.pieces)), cut.pieces, strict=True)
    made = [
        _varlen(part, key[to.keys], value[to.keys], to.lengths, True, scale, window)
        for part, to in pairs
    ]
    states = [state for _, _, *own in made for state in own]
    out, log_sum = torch.cat([own[0] for own in made]), torch.cat([own[1] for own in made], 1)
    if sinks is not None:
        whole = torch.logaddexp(log_sum, sinks.float().unsqueeze(1))
        out, log_sum = (out.float() * (log_sum - whole).exp().t().unsqueeze(2)).to(out.dtype), whole
    return out, log_sum, *states


def _gathered_backward(
    grad_out, query, key, value, out, log_sum, *states, scale, cut, window
) -> tuple[torch.Tensor, ...]:
    """Keys and values are gathered again; their gradients are summed in float32."""
    dtype, parts = key.dtype, len(cut.pieces)
    num = len(states) // parts
    key, value = cut.gather(key), cut.gather(value)
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in (key, value)]
    columns = [t.chunk(parts) for t in (grad_out, query, out)] + [log_sum.chunk(parts, 1)]
    grads = []
    for i, (grad, q, o, total, to) in enumerate(zip(*columns, cut.pieces, strict=True)):
        rest = (q, key[to.keys], value[to.keys], o, total.contiguous())
        own = {"lengths": to.lengths, "is_causal": True, "scale": scale, "window": window}
        grad, *more = _varlen_backward(grad, *rest, *states[i * num : (i + 1) * num], **own)
        grads.append(grad)
        for whole, part in zip(sums, more, strict=True):
            whole[to.keys] += part
    return torch.cat(grads), *(cut.reduce(whole).to(dtype) for whole in sums)


def _is_for_cudnn(query, lengths, is_causal: bool, window) -> bool:
    """Whether cuDNN serves the end of one row without a window, as it would serve the whole row."""
    if window or not is_causal or len(lengths[0]) > 2 or not query.is_cuda:
        return False
    (own,) = _heads(query)
    return _kernel(own, own, own, None) is KERNELS[SDPBackend.CUDNN_ATTENTION]


def _heads(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """[1, N, T, D] of [T, N, D], and back."""
    yield from (t.transpose(0, 1)[None] if t.dim() == 3 else t[0].transpose(0, 1) for t in tensors)


def _ends(query, key) -> tuple[tuple[slice, bool], ...]:
    """Keys that queries at their end look at: their own, causally, and all that are before.

    cuDNN lets the beginnings of queries and keys meet.
    """
    before = len(key) - len(query)
    return ((slice(before, None), True), (slice(before), False))[: 1 + (before > 0)]


def _by_cudnn(query, key, value, scale) -> tuple[torch.Tensor, ...]:
    found = []
    for part, is_causal in _ends(query, key):
        q, k, v = _heads(query, key[part], value[part])
        made, log_sum, *state = _cudnn(q, k, v, scale, is_causal)
        (out,) = _heads(made)
        found.append((out, log_sum.reshape(-1, len(query))))
    if len(found) > 1:
        _join(*found)
    return *found[0], *state


def _by_cudnn_backward(grad_out, query, key, value, out, log_sum, *state, scale) -> tuple:
    """Each part's own backward, with the output and the log sum of both."""
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for part, is_causal in _ends(query, key):
        tensors = _heads(grad_out, query, key[part], value[part], out)
        rest = (log_sum[None, ..., None], *state)
        found = _cudnn_backward(*tensors, *rest, scale=scale, is_causal=is_causal)
        for whole, at, more in zip(grads, (slice(None), part, part), _heads(*found), strict=True):
            whole[at] += more
    return tuple(grads)


def joins_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of a device give the joined parts the output and the gradients of one.

    Args:
        device: of the rank.
        dtype: of the activations.
    """
    prompts, answers, generator = (5, 9), ((3, 6), (7, 2)), torch.Generator().manual_seed(0)
    lengths = [*prompts, *itertools.chain(*answers), 4]
    bounds = RowBounds.of(lengths, device)
    assert bounds is not None
    rows = Branches.join(bounds, prompts, [sum(a) for a in answers])
    one = [
        torch.randn(sum(lengths), 4, 64, generator=generator).to(device, dtype) for _ in range(4)
    ]
    rest = {"bounds": rows.bounds, "longest": rows.longest, "branches": rows.branches}
    kernel = partial(_joined, **rest), partial(_joined_backward, **rest)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    prompt_of = torch.tensor([-1, -1, 0, 0, 1, 1, -1], device=device)[owner]
    mask, found = (owner[:, None] == owner).tril() | (prompt_of[:, None] == owner), []
    for is_joined in (True, False):
        parts = (t if is_joined else t.float() for t in one)
        grad, *inputs = [t.detach().requires_grad_() for t in parts]
        with torch.enable_grad():
            if is_joined:
                out = SavedAttention.apply(*inputs, None, kernel, None)[0]
            else:
                q, k, v = (t.transpose(0, 1) for t in inputs)
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
                out = out.transpose(0, 1)
        found.append([out, *torch.autograd.grad(out, inputs, grad.detach())])
    limit, pairs = 1e-5 if dtype == torch.float32 else 0.03, zip(*found, strict=True)
    return all(bool((a.float() - b).norm() <= limit * b.norm()) for a, b in pairs)


def _cross(to: Branches) -> tuple:
    return to.answers, to.prompts, to.longest_answer, to.longest_prompt


def _varlen(query, key, value, lengths, is_causal: bool, scale, window=None) -> tuple:
    """Attention inside parts, whose ends meet: out [T, N, D], log sums [N, T], state."""
    if _is_for_cudnn(query, lengths, is_causal, window):
        return _by_cudnn(query, key, value, scale)
    if query.device.type == "cuda":
        rest, more = (*lengths, 0.0, is_causal, False), _sides(scale, window)
        return aten._flash_attention_forward(query, key, value, *rest, **more)[:4]
    parts = list(_parts(lengths, query, key, value))
    pairs = [_cpu(*part, **_mask(part, is_causal, window), scale=scale) for part in parts]
    outs, sums = zip(*pairs, strict=True)
    return torch.cat([o[0].transpose(0, 1) for o in outs]), torch.cat([s[0] for s in sums], 1)


def _varlen_backward(
    grad_out, query, key, value, out, log_sum, *state, lengths, is_causal, scale, window=None
) -> tuple[torch.Tensor, ...]:
    rest = (query, key, value, out, log_sum)
    if _is_for_cudnn(query, lengths, is_causal, window):
        return _by_cudnn_backward(grad_out, *rest, *state, scale=scale)
    if query.device.type == "cuda":
        rest = (*rest, *lengths, 0.0, is_causal, *state)
        return aten._flash_attention_backward(grad_out, *rest, **_sides(scale, window))
    sums, found = torch.split(log_sum, lengths[0].diff().tolist(), 1), []
    for (q, k, v, o, g), s in zip(
        _parts(lengths, query, key, value, out, grad_out), sums, strict=True
    ):
        rest = (q, k, v, o, s[None].contiguous())
        found.append(_cpu_backward(g, *rest, **_mask(rest, is_causal, window), scale=scale))
    return tuple(
        torch.cat([g[0].transpose(0, 1) for g in grads]) for grads in zip(*found, strict=True)
    )


def _sides(scale, window: int | None) -> dict[str, Any]:
    """Keywords of flash attention."""
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    return {"scale": scale, **sides}


def _mask(part: Sequence[torch.Tensor], is_causal: bool, window: int | None) -> dict[str, Any]:
    """Keywords of the CPU's kernel, whose own causal mask lets the beginnings meet."""
    query, num_keys = part[0], part[1].shape[2]
    if not is_causal or (query.shape[2] == num_keys and window is None):
        return {"is_causal": is_causal}
    ago = torch.arange(num_keys - query.shape[2], num_keys)[:, None] - torch.arange(num_keys)
    is_seen = (ago >= 0) & (ago < (window or num_keys))
    mask = torch.zeros(ago.shape, dtype=query.dtype).masked_fill_(~is_seen, -torch.inf)
    return {"is_causal": False, "attn_mask": mask}


def _parts(lengths, query, key, value, *of_query) -> Iterator[list[torch.Tensor]]:
    """[1, N, T, D] of every part, as the kernel of the CPU wants it."""
    by_query, by_key = (bounds.diff().tolist() for bounds in lengths[:2])
    sizes = [by_query, by_key, by_key, *[by_query] * len(of_query)]
    every = (query, key, value, *of_query)
    split = [torch.split(t, size) for t, size in zip(every, sizes, strict=True)]
    for parts in zip(*split, strict=True):
        yield [part.transpose(0, 1).unsqueeze(0).contiguous() for part in parts]


KERNELS: dict[Any, tuple[Callable, Callable]] = {
    "cpu": (_cpu, _cpu_backward),
    SDPBackend.FLASH_ATTENTION: (_flash, _flash_backward),
    SDPBackend.CUDNN_ATTENTION: (_cudnn, _cudnn_backward),
}


def _kernel(query, key, value, scale) -> tuple[Callable, Callable] | None:
    """The kernel that PyTorch's SDPA would choose, if it is one whose result can be saved."""
    if query.shape[-1] != value.shape[-1] or query.shape[-1] not in HEAD_SIZES:
        return None  # SDPA pads these
    if query.device.type == "cpu":
        return KERNELS["cpu"]
    choice = torch._fused_sdp_choice(
        query, key, value, None, 0.0, True, scale=scale, enable_gqa=True
    )
    return KERNELS.get(SDPBackend(choice))


def _is_long(query: torch.Tensor) -> bool:
    """Whether the backward kernel's own copies are worth sparing; [..., N, D]."""
    return query.shape[:-2].numel() > LONG_TOKENS


def _by_heads(backward: Callable, grad_out, tensors: Sequence[torch.Tensor], scale) -> tuple:
    """The backward of a kernel, some heads after the others, in whatever it makes of each.

    Flash attention sums the gradient of the queries in float32, and has those of keys and values
    for every query head. Heads are the second dimension, of the log-sum-exp of rows the first.
    """
    query, key, value, out, log_sum, *state = tensors
    parts = head_parts(key.shape[1])
    columns = [t.chunk(parts, 1) for t in (grad_out, query, key, value, out)]
    columns.append([t.contiguous() for t in log_sum.chunk(parts, 1 if query.dim() == 4 else 0)])
    grads = tuple(map(torch.empty_like, (query, key, value)))
    columns += [grad.chunk(parts, 1) for grad in grads]
    for *own, grad_query, grad_key, grad_value in zip(*columns, strict=True):
        found = backward(*own, *state, scale=scale)
        for place, grad in zip((grad_query, grad_key, grad_value), found, strict=True):
            place.copy_(grad)
    return grads


class SavedAttention(torch.autograd.Function):
    """PyTorch's own attention, forward and backward, or only the latter of a saved result.

    Args:
        query, key, value: [B, N, T, D]; for rows [T, N, D].
        scale: of the scores; None = D ** -0.5.
        kernel: (forward, backward), such as a row of KERNELS.
        done: what a former call returned, taken over without computing; or None.

    Returns:
        out, shaped as query, log-sum-exp of the scores, and what else the backward kernel asks for.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale, kernel, done):
        ctx.set_materialize_grads(False)
        ctx.scale, (forward, ctx.backward_kernel) = scale, kernel
        results = done or forward(query, key, value, scale=scale)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(query, key, value, *results)
        return results

    @staticmethod
    def backward(ctx, grad_out, *_):
        tensors, backward = ctx.saved_tensors, ctx.backward_kernel
        query = tensors[0] if tensors[0].dim() == 3 else tensors[0].transpose(1, 2)
        if _is_long(query):
            grads = _by_heads(backward, grad_out, tensors, ctx.scale)
        else:
            grads = backward(grad_out, *tensors, scale=ctx.scale)
        return *grads, None, None, None
