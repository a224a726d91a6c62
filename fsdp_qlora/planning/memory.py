"""GiB of a GPU and of the host by row and phase.

The rows are what model/ and training/ allocate, found by reading them: what a decoder layer keeps
for its backward, what that holds besides, its CUDA graphs, and all around it. Two rules were
measured: how much the allocator holds beyond what is in use, and what processes and drivers need
(recipes/*.md). tests/planning holds the whole against the measured peaks.
"""

import dataclasses
import functools
from itertools import pairwise
from typing import Any

from fsdp_qlora.arch.files import GROUP, NUM_READ_AHEAD
from fsdp_qlora.config import DISK, OPTIMIZERS, TrainConfig
from fsdp_qlora.hardware import GIB, has_gpu_build
from fsdp_qlora.planning import rows, sizes
from fsdp_qlora.planning.rows import Rows, Table, Term, merged, present, term, total_bytes
from fsdp_qlora.planning.sizes import DTYPE_BYTES, Setting, Sizes

# Driver less allocator, measured on two H200 (recipes/*.md): one GPU; a GPU of several without
# peer access, 1.13 to 1.19; more with it, 1.95 to 2.0 in total, but 1.6 where only adapters,
# embedding and head travel.
ALONE_BYTES = 1.3 * GIB
SEVERAL_BYTES = 1.17 * GIB
PEER_BYTES = {True: 0.83 * GIB, False: 0.43 * GIB}
# cuBLAS's workspace of the forward and of the backward thread (32 MiB each on Hopper).
LIBRARY_BYTES = 64 * 2**20
# What comes and goes in a step leaves holes of this share (fits the measured peaks to 4 %).
HOLES = 1 / 3
LONG_HOLES = 0.55 * GIB  # bytes, of long rows whatever their length (8B, 65,536 to 196,608 tokens)
OTHERS = 0.4  # of the hidden size, a token of them: measured in the same runs
# Of a CPU rank: what bitsandbytes, oneDNN and the load leave (SmolLM2-135M, two cores).
CPU_LIBRARY_BYTES = 160 * 2**20
# Measured on the H200 machine: 17, 20 and 39 GiB in use in total, less the other rows; CPU ranks on
# a machine of two cores.
SYSTEM_BYTES = 0.5 * GIB
PROCESS_BYTES = {"cuda": 1.75 * GIB, "cpu": 0.3 * GIB}
# Of a token of the vocabulary: a rank's tokenizer (twice, with its merges), and its text while it
# is saved; measured on 32,000, 128,256 and 262,144 tokens, with about two merges each.
TOKENIZER_BYTES, TOKENIZER_TEXT_BYTES = 850, 1200
CUDA_BUILD_BYTES = 0.13 * GIB  # that a CPU rank has more where torch was made for GPUs
INPUT = "layer's input"
AT_WORK = 2  # of the inputs that wait on the host, back on the GPU: one in use, one on its way


def device(s: Sizes, setting: Setting, has_peer: bool = False) -> Table:
    """Predict the memory of one GPU (or of one CPU rank).

    Args:
        s: numbers of the run.
        setting: batch, placements, levels.
        has_peer: GPUs read each other's memory, for which NCCL takes more.

    Returns:
        DEVICE_ROWS by phase.
    """
    s, setting = (s.visiting, s.joined(setting)) if s.groups(setting) > 1 else (s, setting)
    states, backward, forward = _states(s, setting), _backward(s, setting), _forward(s, setting)
    trained = {rows.OPTIMIZER: _trained("moments", s, setting, moment_bytes(s.cfg))}
    grads = _gradients("of all layers, summed over micro-batches", s, setting)
    has_whole = setting.count("trained") or s.trained_root
    what, num = ("tensor", max(s.largest, s.head)) if has_whole else ("adapter", s.lora)
    own: dict[str, Rows] = {
        "forward": max(forward, key=total_bytes),
        "backward": max(backward, key=total_bytes),
        "optimizer": {rows.GRADIENTS: grads},
        "save": {rows.LAYER: [term(f"a gathered {what}", params=num, bytes=4)]},
    }
    # What layers leave there: their graphs, or the small layer that was last at work.
    staying: Rows = {rows.SCRATCH: at_work(s)} if s.is_kept_whole else {}
    staying = graph_rows(s, setting) if uses_graphs(s, setting) else staying
    moments = {phase: [states, trained, part, staying] for phase, part in own.items()}
    always: Rows = {rows.LIBRARIES: [term("cuBLAS", bytes=LIBRARY_BYTES)]}
    if s.kind == "cuda":
        is_several, has_all = setting.num_ranks > 1, not setting.count(*sizes.STREAMED)
        context = term("context, NCCL", bytes=SEVERAL_BYTES if is_several else ALONE_BYTES)
        peer = term("NCCL with peer access", bytes=PEER_BYTES[has_all] * (has_peer and is_several))
        always[rows.CONTEXT] = [context, *present(peer)]
    else:
        always[rows.LIBRARIES] = [term("oneDNN, bitsandbytes", bytes=CPU_LIBRARY_BYTES)]
        for phase in ("backward", "optimizer", "save"):
            moments[phase].append({rows.SLACK: _heap(s, setting, forward, phase)})
    slack: Rows = {rows.SLACK: _slack(s, setting, forward + backward)}
    found = {phase: merged([*parts, always, slack]) for phase, parts in moments.items()}
    return Table({"load": merged([_load(s, setting, states), always]), **found})


def _load(s: Sizes, setting: Setting, states: Rows) -> Rows:
    """The quantized layers come first, and their working set is gone when the rest comes."""
    quantized = {row: states[row] for row in (rows.PACKED, rows.CONSTANTS, rows.BUFFERS)}
    received = setting.num_ranks if setting.count("resident") else 1
    exchanged = term("layers being exchanged", layers=1 + received, bytes=s.fullest.layer_bytes)
    linears = term("linears in 16 bit", linears=2, weights=s.largest, bytes=2)  # one, and the next
    return max(quantized | {rows.LOADING: [exchanged, linears]}, states, key=total_bytes)


def moment_bytes(cfg: TrainConfig) -> int:
    """Bytes that the optimizer keeps for a trained parameter.

    Args:
        cfg: optimizer, precision.
    """
    row = OPTIMIZERS[cfg.optimizer]
    # Torch's own are as wide as what is trained.
    return row.state_bytes * DTYPE_BYTES[cfg.master_dtype] // 4 if row.on_cpu else row.state_bytes


def _gradients(what: str, s: Sizes, setting: Setting, first: int = 0) -> list[Term]:
    """Gradients of what is trained: whole on every rank until they are reduced."""
    if s.cfg.no_sync and setting.num_visits > 1:
        setting = dataclasses.replace(setting, strategy="ddp")
    return _trained(what, s, setting, s.master, first)


def _trained(what: str, s: Sizes, setting: Setting, nbytes: int, first: int = 0) -> list[Term]:
    """Something of all that is trained from a layer on."""
    share = {"bytes": nbytes, "per_ranks": setting.shares}
    num_whole = setting.placements[first:].count("trained")
    parts: dict[str, dict[str, float]] = {
        what: {"params": s.lora, "layers": s.layers - first},
        f"whole layers: {what}": {"params": s.whole, "layers": num_whole},
        f"embedding, head: {what}": {"params": s.trained_root},
    }
    return [term(name, **num, **share) for name, num in parts.items() if all(num.values())]


def _states(s: Sizes, setting: Setting) -> Rows:
    """What lies on the GPU from the load to the end."""
    share, num_whole = {"bytes": s.item, "per_ranks": setting.shares}, setting.count("trained")
    ranks = {"sharded": setting.shares, "resident": 1}
    layers = {name: setting.count(name) for name in ranks if setting.count(name)}
    slots = min(sizes.NUM_SLOTS + (setting.count("resident") > 0), setting.count(*sizes.STREAMED))
    return {
        row: [term(at, layers=layers[at], bytes=nbytes, per_ranks=ranks[at]) for at in layers]
        for row, nbytes in ((rows.PACKED, s.quantized), (rows.CONSTANTS, s.constants))
    } | {
        rows.UNQUANTISED: [
            term("embedding, head, last norm", params=s.root - s.trained_root, **share),
            term("norms and biases", params=s.small, layers=s.layers - num_whole, **share),
            *present(term("row lengths of DoRA", rows=s.magnitudes, layers=s.layers, bytes=4)),
        ],
        rows.ADAPTERS: _trained("master copy", s, setting, s.master),
        rows.BUFFERS: present(
            term("slots of weight streaming", slots=slots, bytes=s.fullest.layer_bytes),
            term("tied embedding", n=s.is_tied and setting.shares > 1, params=s.head, bytes=s.item),
        ),
    }


def _buffers(s: Sizes, setting: Setting) -> list[Term]:
    """Gathered FSDP groups around the layer at work."""
    is_several, is_shared = setting.num_ranks > 1, setting.shares > 1
    most = s.layers if setting.keeps_gathered and is_several else min(setting.num_ranks, 2)
    held = min(setting.count("offloaded", *["sharded"] * is_shared), most)
    layer, item = {"bytes": s.fullest.layer_bytes}, {"bytes": s.item}
    nbytes = 2 * s.item + s.item + 4 + 4 * is_shared
    what = "gathered: this layer and the next" if held == 2 else "gathered layers"
    two = "gathered adapters in 16 bit (two layers), their gradients (16, 32 bit, reduced)"
    whole = "gathered whole layers (two), gradients (as gathered, 32 bit, reduced)"
    one_group, has_more = s.one_group, s.lora and is_shared
    parts = (
        (held, what, {"layers": held, **layer}),
        (held and is_several, "one more, as gathered", layer),  # FSDP copies into the parameter
        (setting.keeps_gathered, "embedding and head, kept gathered", {"params": s.root, **item}),
        (one_group, "gathered adapters of all layers", {**one_group, **item}),
        (has_more and not one_group, two, {"params": s.lora, "bytes": 2 * 2 + 2 + 4 + 4}),
        (setting.count("trained"), whole, {"params": s.whole, "bytes": nbytes}),
        (s.trained_root, "gathered embedding, its gradients", {"params": s.head, "bytes": nbytes}),
    )
    return [term(name, **factors) for is_there, name, factors in parts if is_there]


def _backward(s: Sizes, setting: Setting) -> list[Rows]:
    """The backward at the two ends of every run of layers of one level."""
    tokens, last = s.tokens(setting), s.layers - 1
    turns = [i for i, pair in enumerate(pairwise(setting.levels)) if pair[0] != pair[1]]
    moments, waiting = list[Rows](), (setting.per_visit, setting.hosts_inputs)
    for at in sorted({0, last, *turns, *(i + 1 for i in turns)}):
        done = s.layers if setting.num_visits > 1 else last - at
        kept = kept_by_level(s, tokens, setting.levels[: at + 1], *waiting)
        common: Rows = {rows.KEPT: kept, rows.BUFFERS: _buffers(s, setting)}
        common[rows.LAYER] = _between(s, setting)
        if done or s.trained_root:
            common[rows.GRADIENTS] = _gradients("of layers done", s, setting, s.layers - done)
        if at == 0 and s.one_group:
            reduced = [term("their gradients: 16 bit, 32 bit", **s.one_group, bytes=s.item + 4)]
            moments.append(merged([common | {rows.KEPT: []}, {rows.BUFFERS: reduced}]))
        owns = layer_moments(s, tokens, setting.levels[at])
        if setting.levels[at] != "none" and uses_graphs(s, setting):
            wide = {"tokens": tokens, "hidden": s.hidden, "bytes": s.item}
            owns = [{rows.LAYER: [term("gradients of input and output", n=2, **wide)]}]
        elif s.is_kept_whole:  # it stays, see `device`
            owns = [own | {rows.SCRATCH: []} for own in owns]
        moments += [merged([common, own]) for own in owns]
    return moments


def _forward(s: Sizes, setting: Setting) -> list[Rows]:
    """The forward's end in the head, and its last layer."""
    tokens = s.tokens(setting)
    wide, waiting = {"tokens": tokens, "bytes": s.item}, (setting.per_visit, setting.hosts_inputs)
    kept: Rows = {rows.KEPT: kept_by_level(s, tokens, setting.levels, *waiting)}
    if setting.num_visits > 1:
        kept[rows.GRADIENTS] = _gradients("of earlier micro-batches", s, setting)
    chunk = min(tokens, max(16, sizes.LOGITS_BYTES // (4 * s.vocab)))
    capped, nbytes = ", before and after their cap" * s.caps_logits, 4 + 4 * s.caps_logits + s.item
    what = f"logits: float32{capped}, 16 bit"
    loss = [term(what, tokens=chunk, vocab=s.vocab, bytes=nbytes)]
    if s.trained_root:
        what = "gradient of the head: float32, of a chunk"
        loss.append(term(what, params=s.head, bytes=4 + s.item))
    num = 4 * setting.per_visit
    outputs = term("output, its norm, trained tokens, gradient", hidden=s.hidden, n=num, **wide)
    head: Rows = {rows.LOSS: loss, rows.LAYER: [outputs], rows.BUFFERS: _head_gathered(s, setting)}
    width, what = 2 * s.hidden + s.fullest.gates + s.fullest.product, "gates, product"
    if is_tiled(s, tokens, setting.levels[-1]):
        width, what = 2 * s.hidden + _qkv(s.fullest) + s.fullest.attention, "attention"
    read = term(f"residual, norm, {what}", features=width, **wide)
    scratch = [] if s.is_kept_whole else at_work(s)
    layer: Rows = {rows.LAYER: [read, *_of_all_ranks(s, tokens), *_between(s, setting)]}
    layer |= {rows.SCRATCH: scratch, rows.BUFFERS: _buffers(s, setting)}
    return [merged([kept, head]), merged([kept, layer])]


def _between(s: Sizes, setting: Setting) -> list[Term]:
    """What groups of rows that pass a layer together have between two layers."""
    others, adapted = s.groups(setting) - 1, setting.per_visit - 1
    wide = {"tokens": s.tokens(setting), "hidden": s.hidden, "bytes": s.item}
    ends = term("inputs, outputs (gradients) of the other groups", n=2, groups=others, **wide)
    own = {"groups": adapted, "params": s.lora, "bytes": s.item}
    return present(ends, term("the other groups' gradients of adapters", **own))


def _head_gathered(s: Sizes, setting: Setting) -> list[Term]:
    """The head while it is at work: as gathered, and copied out of that."""
    copies = 1 if setting.keeps_gathered else 2
    held = [term("gathered adapters", **s.one_group, bytes=s.item)] if s.one_group else []
    held = _buffers(s, setting) if setting.keeps_gathered else held
    head = term("gathered head", copies=copies, params=s.head, bytes=s.item)
    return [*held, head] if setting.shares > 1 and not s.is_tied else held


def _heap(s: Sizes, setting: Setting, forward: list[Rows], phase: str) -> list[Term]:
    """What the heap of a CPU process keeps of the forward pass: it does not shrink."""
    num = 2 if setting.shares > 1 and not s.is_tied else 0
    terms = [term("gathered head", params=s.head, bytes=s.item)] * num
    if phase != "backward":
        kept = max(total_bytes({rows.KEPT: found[rows.KEPT]}) for found in forward)
        terms = [term("activations", bytes=kept), *terms]
    return terms


def _slack(s: Sizes, setting: Setting, moments: list[Rows]) -> list[Term]:
    """What the allocator holds beyond what is in use: one rule for all.

    Blocks are not shared between streams, so the stream of the gathers keeps room for the largest
    thing it ever gathered; and what comes and goes in a step leaves holes.
    """
    passing = (rows.LAYER, rows.SCRATCH) if s.kind == "cuda" else (rows.KEPT, rows.LAYER)
    most = max(total_bytes({row: found.get(row, []) for row in passing}) for found in moments)
    is_long = s.tokens(setting) > sizes.LONG_TOKENS
    terms = [term("holes", bytes=LONG_HOLES) if is_long else term("holes", bytes=most, share=HOLES)]
    if s.kind == "cuda" and setting.shares > 1:
        terms.append(term("head, in the gather's stream", params=s.head, bytes=s.item))
    if s.kind == "cuda" and setting.count("offloaded"):
        share = {"bytes": s.layer_bytes, "per_ranks": setting.shares}
        terms.append(term("slice on its way to the GPU", **share))
    return terms


def host(s: Sizes, setting: Setting, system_gib: float | None = None) -> Table:
    """Predict the memory of a machine, everything that runs on it included.

    Args:
        s: numbers of the run.
        setting: placements, number of ranks.
        system_gib: in use before the run, files in memory included; None: as measured elsewhere.

    Returns:
        HOST_ROWS by phase.
    """
    cfg, ranks = s.cfg, setting.local_ranks
    process_bytes = PROCESS_BYTES[s.kind]
    process_bytes += (s.kind == "cpu" and has_gpu_build()) * CUDA_BUILD_BYTES
    in_use = None if system_gib is None else max(system_gib * GIB - s.file_bytes, 0.0)
    system_bytes = SYSTEM_BYTES if in_use is None else in_use
    ids = {"rows": s.num_rows or cfg.dataset_samples, "tokens": cfg.context_length, "bytes": 4}
    tokens = {"tokens": s.vocab * (cfg.dataset != "dummy" or cfg.sample_prompt is not None)}
    process = term("Python, torch, driver", bytes=process_bytes, ranks=ranks)
    tokenizer = term("tokenizer", **tokens, bytes=TOKENIZER_BYTES, ranks=ranks)
    always: Rows = {
        rows.HOSTED: _hosted(s, setting),
        rows.FILES: present(term("model files in /dev/shm", bytes=s.file_bytes)),
        rows.SYSTEM: [term("in use without the run", bytes=system_bytes)],
        rows.PROCESSES: present(process, tokenizer),
        rows.DATA: [term("token ids of all rows at full length", **ids, ranks=ranks)],
    }
    wide = {"tokens": s.tokens(setting) * ranks, "hidden": s.hidden, "bytes": s.item}
    num = num_offloaded(s, setting) * (setting.hosts_inputs != DISK)
    inputs = term("layers' inputs, of all ranks", layers=num, **wide)
    waiting: Rows = {rows.WAITING: [inputs]} if num else {}  # for the backward: the room stays
    phases = {name: always | (waiting if name != "load" else {}) for name in rows.PHASES}
    # What is trained, as rank 0 writes it beside the training (training/checkpoint.py).
    held = {"params": s.num_trained(setting), "bytes": s.master + moment_bytes(cfg)}
    copies = [term("copies for checkpoints: weights, moments", **held)] * cfg.saves_checkpoints
    is_early = total_bytes({rows.SAVING: copies}) <= sizes.MOST_TOUCHED_BYTES
    for phase in rows.PHASES[1:] if is_early else ("save",):
        phases[phase][rows.PROCESSES] = always[rows.PROCESSES] + copies
    if cfg.weights == "load":
        read = {"linears": 1 + NUM_READ_AHEAD, "weights": s.largest, "bytes": 2}
        phases["load"][rows.LOADING] = [term("linears read ahead", **read, ranks=ranks)]
    if cfg.save_model:
        text = term("text of the tokenizer", **tokens, bytes=TOKENIZER_TEXT_BYTES)
        phases["save"][rows.SAVING] = [*_saving(s, setting), *present(text)]
    if s.kind == "cpu":
        table = device(s, setting)
        for phase, own in phases.items():
            needed = table.total_gib(phase) * GIB
            own[rows.RANKS] = [term("the table above", bytes=needed, ranks=ranks)]
    return Table(phases)


def _saving(s: Sizes, setting: Setting) -> list[Term]:
    if setting.count("trained"):  # one after the other
        return [term("the largest tensor", params=max(s.largest, s.head), bytes=4)]
    gathered = {"params": s.lora, "layers": s.layers, "bytes": 4}
    return [term("gathered", **gathered, ranks=setting.local_ranks), term("read back", **gathered)]


def _hosted(s: Sizes, setting: Setting) -> list[Term]:
    """The quantized layers that lie on the host."""
    sliced, whole = ({"layers": setting.count(n)} for n in ("offloaded", "streamed"))
    own = {"bytes": s.layer_bytes, "per_machines": max(setting.shares // setting.local_ranks, 1)}
    copy = term("one copy for all ranks", **whole, bytes=s.layer_bytes)
    num_slots = min(sizes.NUM_RING_SLOTS, setting.count(DISK))
    ring = term("slots of layers from disk", slots=num_slots, bytes=s.fullest.layer_bytes)
    return present(term("slices of all ranks, pinned", **sliced, **own), copy, ring)


@functools.lru_cache
def kept_bytes(s: Sizes, tokens: int, level: str) -> list[Term]:
    """What one layer keeps between forward and backward.

    Derived for a Llama layer with fused norms, rotary embedding and activation (Liger's), flash
    attention and this project's LoRA matmul, which keeps its input only. Liger's kernels are not
    used on a CPU.

    Args:
        s: numbers of the run.
        tokens: of a micro-batch on a rank.
        level: "full", "selective" or "none".

    Returns:
        The terms, for one layer.
    """

    def wide(what: str, nbytes: int = s.item, **width: float) -> Term:
        return term(what, tokens=tokens, **width, bytes=nbytes)

    kept = [wide(INPUT, hidden=s.hidden)]
    if level == "full":
        return kept
    kept.append(wide("outputs of all matmuls but the last", features=s.outs))
    kept.append(wide("attention's output", features=s.attention))
    kept.append(wide("its log-sum-exp", 4, heads=s.heads))
    if level == "selective":
        return kept
    read = wide("norms' outputs, activation product", features=s.input_features)
    if s.cfg.lora_dropout and s.lora:
        mask = 1 if s.kind == "cuda" else s.item
        read = wide("dropped inputs, masks", s.item + mask, features=s.dropped_features)
    others = (s.norms - 2) * s.hidden + s.head_norms
    kept += [read, wide("matmuls with A", ranks=s.lora_ranks)]
    kept += present(wide("outputs of experts, their products", features=s.routed))
    kept += present(wide("outputs to be scaled", features=s.magnitudes))
    kept += present(wide("inputs of more norms", features=others))
    if s.kind == "cpu" or s.cfg.liger == "off":
        norms = {"hidden": s.hidden, "norms": s.norms}
        kept.append(wide("norms' inputs in float32 instead (not fused)", 4 - s.item, **norms))
        kept.append(wide("activation function's output (not fused)", features=s.product))
    if s.is_eager:
        pairs = {"context": s.cfg.context_length, "heads": s.heads}
        kept.append(wide("attention's scores (not fused)", s.item + 4, **pairs))
    return kept


def at_work(s: Sizes) -> list[Term]:
    """What is held of a layer's frozen weights, dequantized, while it is at work.

    All of a small layer, once for all its matmuls, and until another layer takes its place: after
    the last one too. Of a larger layer one linear at a time; of experts as many as fit.

    Args:
        s: numbers of the run.
    """
    if s.is_kept_whole:
        return [term("all linears", weights=s.fullest.weights, bytes=s.item)]
    if (grouped := min(s.grouped * s.item, sizes.WHOLE_LAYER_BYTES)) > s.largest * s.item:
        return [term("experts at work", bytes=grouped)]
    return [term("largest linear", weights=s.largest, bytes=s.format.scratch_bytes)]


@functools.lru_cache
def layer_moments(s: Sizes, tokens: int, level: str) -> list[Rows]:
    """What a layer's backward holds beside what was kept: its fullest moments.

    Args:
        s, tokens, level: see kept_bytes.

    Returns:
        Rows of each such moment.
    """
    s = s.fullest
    wide = {"tokens": tokens, "bytes": s.item}
    made_of = {"its output": s.hidden, "the activation product": s.product}
    grads = [term(f"gradient of {what}", features=num, **wide) for what, num in made_of.items()]
    in_fp16 = (s.hidden + s.product) * (s.cfg.matmul == "fp16")
    grads += present(term("inputs and sums in float16", features=in_fp16, **wide))
    constants = {"weights": s.formatted, "bytes": s.format.constant_bytes, "per_group": GROUP}
    rest = [term("constants of the layer", **constants)]  # before its first matmul
    scratch = [*at_work(s), *rest]
    if s.is_kept_whole:
        scratch = rest = at_work(s)
    matmul_before: Rows = {rows.LAYER: grads, rows.SCRATCH: scratch}
    if level == "none":
        return [matmul_before]
    if is_tiled(s, tokens, level):
        return _tiled_moments(s, tokens, scratch)
    kept = {item.what for item in kept_bytes(s, tokens, level)}
    made = [t for t in kept_bytes(s, tokens, "none") if t.what not in kept]
    made = [item._replace(what=f"recomputed: {item.what}") for item in made]
    made += _of_all_ranks(s, tokens, 1)
    output = term("LoRA output of the last linear", features=s.hidden, **wide)
    if level == "selective":
        residual = term("recomputed: residual", features=s.hidden, **wide)
        between: Rows = {rows.LAYER: [*made, residual, output, *grads]}
        return [matmul_before, between | ({rows.SCRATCH: rest} if s.is_kept_whole else {})]
    if s.cfg.reentrant_checkpointing:  # recomputed to the end, before the backward begins
        return [{rows.LAYER: [*made, output, *grads], rows.SCRATCH: scratch}]
    # The backward of the last matmul runs first and keeps nothing; then the layer is recomputed.
    waiting = term("activation product, not yet made", features=-s.product, **wide)
    both = (output, rest), (waiting, scratch)
    return [{rows.LAYER: [*made, own, *grads], rows.SCRATCH: held} for own, held in both]


def is_tiled(s: Sizes, tokens: int, level: str) -> bool:
    """Whether the end of a layer is computed tile by tile: see model/layer.py.

    Args:
        s, tokens, level: see kept_bytes.
    """
    return s.has_tiles and level == "full" and tokens > sizes.LONG_TOKENS


def _qkv(s: Sizes) -> float:
    """Features of what attention reads."""
    return s.outs - s.gates - s.hidden


def keys_values(s: Sizes) -> float:
    """Features of the keys and values of a token in a layer."""
    return _qkv(s) - s.attention


def _of_all_ranks(s: Sizes, tokens: int, parts: int = 0) -> list[Term]:
    """Keys and values gathered for rows that are cut over ranks; `parts`: of heads, backward."""
    wide = {"tokens": tokens, "ranks": s.cfg.context_parallel, "features": keys_values(s)}
    if s.cfg.context_parallel == 1:
        return []
    if not parts:
        return [term("keys, values of all ranks; as they arrive", **wide, bytes=1.5 * s.item)]
    what = "keys, values of all ranks; their gradients, 32 bit"
    return [term(what, **wide, bytes=2 * s.item + 6, per_part=parts)]


def _tiled_moments(s: Sizes, tokens: int, scratch: list[Term]) -> list[Rows]:
    """The backward of a tile at the end of a layer, and that of the attention."""
    wide, qkv = {"tokens": tokens, "bytes": s.item}, _qkv(s)
    made = [
        term("recomputed: norm, queries, keys, values", features=s.hidden + qkv, **wide),
        term("recomputed: attention's output", features=s.attention, **wide),
        term("its log-sum-exp", tokens=tokens, heads=s.heads, bytes=4),
        term("gradient of its output", features=s.hidden, **wide),
        *present(term("inputs of more norms", features=s.head_norms, **wide)),
        term("rotary tables, ids, gradients on their way", features=OTHERS * s.hidden, **wide),
    ]
    if s.kind == "cpu" or s.cfg.liger == "off":
        made.append(term("norm's input in float32 (not fused)", hidden=s.hidden, **wide, n=2))
    features = 5 * s.hidden + 2 * s.gates + 2 * s.product
    residual = term("recomputed: residual", features=s.hidden, **wide)
    tile = [residual, term("a tile", tokens=sizes.TILE_TOKENS, features=features, bytes=s.item)]
    # Of some heads after the others: gradients of queries in float32, of keys and values for all
    # the queries' heads, and all three as they are handed on.
    num_parts = sizes.head_parts(int(keys_values(s) / 2 * s.heads / s.attention))
    part = s.attention * (4 + 2 * s.item) + qkv * s.item
    around = term("gradients around the attention", features=s.attention + qkv, **wide)
    inside = term("its own", tokens=tokens, bytes=part, per_part=num_parts)
    attention = [around, inside, *_of_all_ranks(s, tokens, num_parts)]
    both = (tile, scratch), (attention, scratch if s.is_kept_whole else scratch[1:])
    return [{rows.LAYER: [*made, *own], rows.SCRATCH: held} for own, held in both]


def kept_by_level(
    s: Sizes, tokens: int, levels: tuple[str, ...], per_visit: int = 1, hosts_inputs: Any = False
) -> list[Term]:
    """Sum `kept_bytes` over layers.

    Args:
        s, tokens: see kept_bytes.
        levels: of the layers.
        per_visit, hosts_inputs: see Setting.

    Returns:
        The terms, over the layers of each level.
    """
    terms = []
    for level in dict.fromkeys(levels):
        for item in kept_bytes(s, tokens, level):
            num = levels.count(level) * per_visit
            if item.what == INPUT and hosts_inputs and level != "none":
                num = min(num, AT_WORK)
            factors = (*item.factors, ("layers", num))
            terms.append(Term(f"{level}: {item.what}", factors, item.nbytes * num))
    return terms


def num_offloaded(s: Sizes, setting: Setting) -> int:
    """Inputs of layers that wait on the host: of the recomputed ones, but for the very last."""
    num = setting.per_visit * bool(setting.hosts_inputs)
    return sum(level != "none" for level in setting.levels[:-1]) * num


def uses_graphs(s: Sizes, setting: Setting) -> bool:
    """Whether layers that recompute anything run by graphs, as the model chooses.

    Rows of several lengths in one micro-batch are laid one after the other, which no graph follows.

    Args:
        s: numbers of the run.
        setting: batch, levels.
    """
    cfg, is_plain = s.cfg, s.lora > 0 and not s.magnitudes and s.active == s.weights
    has_one_length = cfg.dataset == "dummy" or setting.batch_size == 1 or cfg.packing == "off"
    return (
        s.kind == "cuda"
        and cfg.cuda_graphs == "auto"
        and (is_plain and s.is_uniform and not setting.count("trained"))
        and (cfg.lora_dropout == 0 and not cfg.reentrant_checkpointing)
        and setting.count("full", "selective") > 0
        and (cfg.packing != "on" and has_one_length)
        and (s.groups(setting) == cfg.context_parallel == 1)
        and (s.weights * s.tokens(setting) <= s.graph_work)
        and not is_tiled(s, s.tokens(setting), "full")
    )


def graph_rows(s: Sizes, setting: Setting) -> Rows:
    """What the graphs hold from the second step to the end.

    Tensors that a layer's are copied into, of weights once, of the rest once a shape of batch and
    level; and a pool that all share, as large as the fullest moment of a layer, which nothing else
    may use.

    Args:
        s, setting: see `uses_graphs`.
    """
    tokens, lengths = s.tokens(setting), -(-s.cfg.context_length // sizes.PAD_MULTIPLES["cuda"])
    shapes = 1 if s.cfg.dataset == "dummy" else min(sizes.MAX_GRAPH_SHAPES, lengths)
    levels = [level for level in ("full", "selective") if level in setting.levels]
    moments = [moment for level in levels for moment in layer_moments(s, tokens, level)]
    kept = [t for level in levels for t in kept_bytes(s, tokens, level) if t.what != INPUT]
    shapes *= len(levels)
    layer_bytes = s.layer_bytes + (s.lora + s.small) * s.item
    wide = {"tokens": tokens, "hidden": s.hidden, "n": 4, "bytes": s.item}
    return {
        rows.LAYER: [
            term("graphs: bytes, adapters, norms", bytes=layer_bytes),
            term("graphs: gradients of adapters", shapes=shapes, params=s.lora, bytes=s.item),
            term("graphs: input, output, their gradients", shapes=shapes, **wide),
            *(item._replace(what=f"graphs: {item.what}") for item in kept),
        ],
        rows.SLACK: [
            term("graphs: their pool", bytes=max(map(total_bytes, moments))),
            term("left by the steps before them", bytes=total_bytes({rows.SLACK: at_work(s)})),
        ],
    }
