"""GiB of a GPU and of the host by row and phase.

The rows are what model/ and training/ allocate, found by reading them; two rules were measured: how
much the allocator holds beyond what is in use, and what processes and drivers need
(recipes/*.md). tests/planning holds the whole against the measured peaks.
"""

import dataclasses
from itertools import pairwise

from fsdp_qlora.config import OPTIMIZERS, Config
from fsdp_qlora.hardware import GIB, has_gpu_build
from fsdp_qlora.planning import rows
from fsdp_qlora.planning.activations import (
    at_work,
    graph_rows,
    is_kept_whole,
    kept_by_level,
    layer_moments,
    num_offloaded,
    uses_graphs,
)
from fsdp_qlora.planning.limits import (
    LOGITS_BYTES,
    MOST_TOUCHED_BYTES,
    NUM_READ_AHEAD,
    NUM_SLOTS,
    ONE_GROUP_BYTES,
)
from fsdp_qlora.planning.rows import Rows, Table, Term, merged, term, total_bytes
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
# Of a CPU rank: what bitsandbytes, oneDNN and the load leave (SmolLM2-135M, two cores).
CPU_LIBRARY_BYTES = 160 * 2**20
# Measured on the H200 machine: 17, 20 and 39 GiB in use in total, less the other rows; CPU ranks on
# a machine of two cores.
SYSTEM_BYTES = 0.5 * GIB
PROCESS_BYTES = {"cuda": 1.75 * GIB, "cpu": 0.3 * GIB}
CUDA_BUILD_BYTES = 0.13 * GIB  # that a CPU rank has more where torch was made for GPUs


def device(
    s: Sizes, cfg: Config, setting: Setting, kind: str = "cuda", has_peer: bool = False
) -> Table:
    """Predict the memory of one GPU (or of one CPU rank).

    Args:
        s: numbers of the model and its adapters.
        cfg: context, precision, kernels, dropout.
        setting: batch, placements, levels.
        kind: "cuda" or "cpu".
        has_peer: GPUs read each other's memory, for which NCCL takes more.

    Returns:
        DEVICE_ROWS by phase.
    """
    states = _states(s, setting)
    unreduced = _unreduced(cfg, setting)
    trained = {rows.OPTIMIZER: _trained("moments", s, setting, moment_bytes(cfg))}
    grads = _trained("of all layers, summed over micro-batches", s, unreduced, s.master)
    saved = term("a gathered adapter", params=s.lora, bytes=4)
    if setting.count("trained") or s.trained_root:
        saved = term("a gathered tensor", params=max(s.largest, s.head), bytes=4)
    backward, forward = _backward(s, cfg, setting, kind), _forward(s, cfg, setting, kind)
    received = setting.num_ranks if setting.count("resident") else 1
    exchanged = term("layers being exchanged", layers=1 + received, bytes=s.layer_bytes)
    linears = term("linears in 16 bit", linears=2, weights=s.largest, bytes=2)  # one, and the next
    loading: Rows = {rows.LOADING: [exchanged, linears]}
    # The quantized layers come first, and their working set is gone when the rest comes.
    quantized = {row: states[row] for row in (rows.PACKED, rows.CONSTANTS, rows.BUFFERS)}
    moments: dict[str, list[Rows]] = {
        "load": [max(merged([quantized, loading]), states, key=total_bytes)],
        "forward": [states, trained, max(forward, key=total_bytes)],
        "backward": [states, trained, max(backward, key=total_bytes)],
        "optimizer": [states, trained, {rows.GRADIENTS: grads}],
        "save": [states, trained, {rows.LAYER: [saved]}],
    }
    staying = _staying(s, cfg, setting, kind)
    for phase in rows.PHASES[1:]:
        moments[phase].append(staying)
    always: Rows = {}
    if kind == "cuda":
        always[rows.LIBRARIES] = [term("cuBLAS", bytes=LIBRARY_BYTES)]
        nbytes = ALONE_BYTES if setting.num_ranks == 1 else SEVERAL_BYTES
        always[rows.CONTEXT] = [term("context, NCCL", bytes=nbytes)]
        if has_peer and setting.num_ranks > 1:
            nbytes = PEER_BYTES[not setting.count("streamed")]
            always[rows.CONTEXT].append(term("NCCL with peer access", bytes=nbytes))
    else:
        always[rows.LIBRARIES] = [term("oneDNN, bitsandbytes", bytes=CPU_LIBRARY_BYTES)]
        for phase in ("backward", "optimizer", "save"):
            moments[phase].append({rows.SLACK: _heap(s, setting, forward, phase)})
    slack: Rows = {rows.SLACK: _slack(s, setting, forward + backward, kind)}
    last = {phase: [always, slack] if phase != "load" else [always] for phase in moments}
    return Table({phase: merged([*parts, *last[phase]]) for phase, parts in moments.items()})


def moment_bytes(cfg: Config) -> int:
    """Bytes that the optimizer keeps for a trained parameter.

    Args:
        cfg: optimizer, precision.
    """
    row = OPTIMIZERS[cfg.optimizer]
    is_torchs = row.on_cpu  # as wide as what is trained
    return row.state_bytes * DTYPE_BYTES[cfg.master_dtype] // 4 if is_torchs else row.state_bytes


def _unreduced(cfg: Config, setting: Setting) -> Setting:
    """The setting as far as gradients go: whole on every rank until they are reduced."""
    is_whole = cfg.no_sync and setting.accumulation > 1
    return dataclasses.replace(setting, strategy="ddp") if is_whole else setting


def _trained(what: str, s: Sizes, setting: Setting, nbytes: int, first: int = 0) -> list[Term]:
    """Something of all that is trained from a layer on."""
    share = {"bytes": nbytes, "per_ranks": setting.shares}
    num = setting.placements[first:].count("trained")
    found = []
    if s.lora and first < s.layers:
        found.append(term(what, params=s.lora, layers=s.layers - first, **share))
    if num:
        found.append(term(f"whole layers: {what}", params=s.whole, layers=num, **share))
    if s.trained_root:
        found.append(term(f"embedding, head: {what}", params=s.trained_root, **share))
    return found


def _states(s: Sizes, setting: Setting) -> Rows:
    """What lies on the GPU from the load to the end."""
    found: Rows = {rows.PACKED: [], rows.CONSTANTS: []}
    for row, nbytes in ((rows.PACKED, s.quantized), (rows.CONSTANTS, s.constants)):
        for placement, ranks in (("sharded", setting.num_ranks), ("resident", 1)):
            if layers := setting.count(placement):
                found[row].append(term(placement, layers=layers, bytes=nbytes, per_ranks=ranks))
    share, num_whole = {"bytes": s.item, "per_ranks": setting.shares}, setting.count("trained")
    found[rows.UNQUANTISED] = [
        term("embedding, head, last norm", params=s.root - s.trained_root, **share),
        term("norms and biases", params=s.small, layers=s.layers - num_whole, **share),
    ]
    if s.magnitudes:
        lengths = term("row lengths of DoRA", rows=s.magnitudes, layers=s.layers, bytes=4)
        found[rows.UNQUANTISED].append(lengths)
    found[rows.ADAPTERS] = _trained("master copy", s, setting, s.master)
    found[rows.BUFFERS] = []
    if num_streamed := setting.count("streamed"):
        slots = min(NUM_SLOTS + (setting.count("resident") > 0), num_streamed)
        found[rows.BUFFERS] = [term("slots of weight streaming", slots=slots, bytes=s.layer_bytes)]
    if s.root < 2 * s.head and setting.shares > 1:  # tied: gathered once for both ends
        found[rows.BUFFERS] += [term("tied embedding", params=s.head, bytes=s.item)]
    return found


def _staying(s: Sizes, cfg: Config, setting: Setting, kind: str) -> Rows:
    """What layers leave on the GPU: their graphs, or the small layer that was last at work."""
    if uses_graphs(s, cfg, setting, kind):
        return graph_rows(s, cfg, setting)
    return {rows.SCRATCH: at_work(s, cfg)} if is_kept_whole(s, cfg) else {}


def _buffers(s: Sizes, setting: Setting) -> list[Term]:
    """Gathered FSDP groups around the layer at work."""
    num = setting.count("sharded", "offloaded")
    keeps_all = setting.keeps_gathered and setting.num_ranks > 1
    most = s.layers if keeps_all else min(setting.num_ranks, 2)
    held, terms = min(num, most), []
    if held:
        what = "gathered: this layer and the next" if held == 2 else "gathered layers"
        terms.append(term(what, layers=held, bytes=s.layer_bytes))
    if held and setting.num_ranks > 1:  # FSDP copies what was gathered into the parameter
        terms.append(term("one more, as gathered", bytes=s.layer_bytes))
    if setting.keeps_gathered:
        terms.append(term("embedding and head, kept gathered", params=s.root, bytes=s.item))
    if s.lora and _is_one_group(s):
        what = "gathered adapters of all layers"
        terms.append(term(what, params=s.lora, layers=s.layers, bytes=s.item))
    elif s.lora and setting.shares > 1:
        what = "gathered adapters in 16 bit (two layers), their gradients (16, 32 bit, reduced)"
        terms.append(term(what, params=s.lora, bytes=2 * 2 + 2 + 4 + 4))
    nbytes = 2 * s.item + s.item + 4 + 4 * (setting.shares > 1)
    if setting.count("trained"):
        what = "gathered whole layers (two), gradients (as gathered, 32 bit, reduced)"
        terms.append(term(what, params=s.whole, bytes=nbytes))
    if s.trained_root:
        terms.append(term("gathered embedding, its gradients", params=s.head, bytes=nbytes))
    return terms


def _is_one_group(s: Sizes) -> bool:
    """Whether adapters are so small that all layers' are gathered and reduced at once."""
    return s.lora * s.layers * s.item <= ONE_GROUP_BYTES


def _backward(s: Sizes, cfg: Config, setting: Setting, kind: str) -> list[Rows]:
    """The backward at the two ends of every run of layers of one level."""
    tokens = setting.batch_size * cfg.context_length
    last = s.layers - 1
    turns = [i for i, pair in enumerate(pairwise(setting.levels)) if pair[0] != pair[1]]
    ends = {0, last, *turns, *(i + 1 for i in turns)}
    moments: list[Rows] = []
    for at in sorted(ends):
        done = s.layers if setting.accumulation > 1 else last - at
        common: Rows = {
            rows.KEPT: kept_by_level(s, cfg, tokens, setting.levels[: at + 1], kind),
            rows.BUFFERS: _buffers(s, setting),
        }
        if done or s.trained_root:
            first = s.layers - done
            common[rows.GRADIENTS] = _trained(
                "of layers done", s, _unreduced(cfg, setting), s.master, first
            )
        if at == 0 and _is_one_group(s) and s.lora:
            what, nbytes = "their gradients: 16 bit, 32 bit", s.item + 4
            reduced = [term(what, params=s.lora, layers=s.layers, bytes=nbytes)]
            moments.append(merged([common | {rows.KEPT: []}, {rows.BUFFERS: reduced}]))
        owns = layer_moments(s, cfg, tokens, setting.levels[at], kind)
        if setting.levels[at] == "full" and uses_graphs(s, cfg, setting, kind):
            wide = {"tokens": tokens, "hidden": s.hidden, "bytes": s.item}
            owns = [{rows.LAYER: [term("gradients of input and output", n=2, **wide)]}]
        elif is_kept_whole(s, cfg):  # it stays, see _staying
            owns = [own | {rows.SCRATCH: []} for own in owns]
        moments += [merged([common, own]) for own in owns]
    return moments


def _forward(s: Sizes, cfg: Config, setting: Setting, kind: str) -> list[Rows]:
    """The forward's end in the head, and its last layer."""
    tokens = setting.batch_size * cfg.context_length
    wide = {"tokens": tokens, "bytes": s.item}
    kept: Rows = {rows.KEPT: kept_by_level(s, cfg, tokens, setting.levels, kind)}
    if setting.accumulation > 1:
        kept[rows.GRADIENTS] = _trained(
            "of earlier micro-batches", s, _unreduced(cfg, setting), s.master
        )
    chunk = max(16, LOGITS_BYTES // (4 * s.vocab))
    what, nbytes = "logits: float32, 16 bit", 4 + s.item
    if s.caps_logits:
        what, nbytes = "logits: float32, before and after their cap, 16 bit", 4 + 4 + s.item
    loss = [term(what, tokens=min(tokens, chunk), vocab=s.vocab, bytes=nbytes)]
    if s.trained_root:
        what = "gradient of the head: float32, of a chunk"
        loss.append(term(what, params=s.head, bytes=4 + s.item))
    head: Rows = {
        rows.LOSS: loss,
        rows.LAYER: [
            term("output, its norm, trained tokens, gradient", hidden=s.hidden, n=4, **wide)
        ],
        rows.BUFFERS: _head_gathered(s, setting),
    }
    width = 2 * s.hidden + s.gates + s.product
    layer: Rows = {
        rows.LAYER: [term("residual, norm, gates, product", features=width, **wide)],
        rows.SCRATCH: [] if is_kept_whole(s, cfg) else at_work(s, cfg),
        rows.BUFFERS: _buffers(s, setting),
    }
    return [merged([kept, head]), merged([kept, layer])]


def _head_gathered(s: Sizes, setting: Setting) -> list[Term]:
    """The head while it is at work: as gathered, and copied out of that."""
    held, copies = list[Term](), 2
    if setting.keeps_gathered:
        held, copies = _buffers(s, setting), 1
    elif s.lora and _is_one_group(s):
        held = [term("gathered adapters", params=s.lora, layers=s.layers, bytes=s.item)]
    if setting.shares == 1 or s.root < 2 * s.head:
        return held
    return [*held, term("gathered head", copies=copies, params=s.head, bytes=s.item)]


def _heap(s: Sizes, setting: Setting, forward: list[Rows], phase: str) -> list[Term]:
    """What the heap of a CPU process keeps of the forward pass: it does not shrink."""
    terms = [term("gathered head", params=s.head, bytes=s.item)] * 2
    if setting.shares == 1 or s.root < 2 * s.head:
        terms = []
    if phase != "backward":
        kept = max(total_bytes({rows.KEPT: found[rows.KEPT]}) for found in forward)
        terms = [term("activations", bytes=kept), *terms]
    return terms


def _slack(s: Sizes, setting: Setting, moments: list[Rows], kind: str) -> list[Term]:
    """What the allocator holds beyond what is in use: one rule for all.

    Blocks are not shared between streams, so the stream of the gathers keeps room for the largest
    thing it ever gathered; and what comes and goes in a step leaves holes.
    """
    passing = (rows.LAYER, rows.SCRATCH) if kind == "cuda" else (rows.KEPT, rows.LAYER)
    most = max(total_bytes({row: found.get(row, []) for row in passing}) for found in moments)
    terms = [term("holes", bytes=most, share=HOLES)]
    if kind == "cpu":
        return terms
    if setting.shares > 1:
        terms.append(term("head, in the gather's stream", params=s.head, bytes=s.item))
    if setting.count("offloaded"):
        nbytes = s.quantized + s.constants
        terms.append(term("slice on its way to the GPU", bytes=nbytes, per_ranks=setting.num_ranks))
    return terms


def host(
    s: Sizes,
    cfg: Config,
    setting: Setting,
    kind: str = "cuda",
    num_rows: int | None = None,
    system_gib: float | None = None,
) -> Table:
    """Predict the memory of the machine, everything that runs on it included.

    Args:
        s: numbers of the model and its adapters.
        cfg: context, where weights come from.
        setting: placements, number of ranks.
        kind: "cuda" or "cpu".
        num_rows: rows of the data set; None when it is not known.
        system_gib: in use before the run, files in memory included; None: as measured elsewhere.

    Returns:
        HOST_ROWS by phase.
    """
    ranks = setting.num_ranks
    process_bytes = PROCESS_BYTES[kind] + (kind == "cpu" and has_gpu_build()) * CUDA_BUILD_BYTES
    system_bytes = SYSTEM_BYTES
    if system_gib is not None:
        system_bytes = max(system_gib * GIB - s.file_bytes, 0.0)
    always: Rows = {
        rows.HOSTED: _hosted(s, setting),
        rows.FILES: [term("model files in /dev/shm", bytes=s.file_bytes)] if s.file_bytes else [],
        rows.SYSTEM: [term("in use without the run", bytes=system_bytes)],
        rows.PROCESSES: [term("Python, torch, driver", bytes=process_bytes, ranks=ranks)],
        rows.DATA: [
            term(
                "token ids of all rows at full length",
                rows=num_rows or cfg.dataset_samples,
                tokens=cfg.context_length,
                bytes=4,
                ranks=ranks,
            )
        ],
    }
    loading: Rows = {}
    if cfg.weights == "load":
        nbytes = {"weights": s.largest, "bytes": 2, "ranks": ranks}
        loading[rows.LOADING] = [term("linears read ahead", linears=1 + NUM_READ_AHEAD, **nbytes)]
    phases = {phase: always | _waiting(s, cfg, setting, phase) for phase in rows.PHASES}
    copies = _copies(s, cfg, setting)
    is_early = total_bytes({rows.SAVING: copies}) <= MOST_TOUCHED_BYTES
    for phase in rows.PHASES[1:] if is_early else ("save",):
        phases[phase][rows.PROCESSES] = always[rows.PROCESSES] + copies
    phases["load"] |= loading
    if cfg.save_model:
        phases["save"] |= {rows.SAVING: _saving(s, setting)}
    if kind == "cpu":
        table = device(s, cfg, setting, kind)
        for phase, own in phases.items():
            needed = table.total_gib(phase) * GIB
            own[rows.RANKS] = [term("the table above", bytes=needed, ranks=ranks)]
    return Table(phases)


def _copies(s: Sizes, cfg: Config, setting: Setting) -> list[Term]:
    """What is trained, as rank 0 writes it beside the training (training/checkpoint.py)."""
    if not cfg.saves_checkpoints:
        return []
    wide = {"params": s.num_trained(setting), "bytes": s.master + moment_bytes(cfg)}
    return [term("copies for checkpoints: weights, moments", **wide)]


def _saving(s: Sizes, setting: Setting) -> list[Term]:
    gathered = {"params": s.lora, "layers": s.layers, "bytes": 4}
    if setting.count("trained"):  # one after the other
        return [term("the largest tensor", params=max(s.largest, s.head), bytes=4)]
    return [term("gathered", **gathered, ranks=setting.num_ranks), term("read back", **gathered)]


def _waiting(s: Sizes, cfg: Config, setting: Setting, phase: str) -> Rows:
    """Inputs of layers that wait for the backward pass: the room for them stays."""
    num = num_offloaded(cfg, setting.levels) * (phase != "load")
    tokens = setting.batch_size * cfg.context_length * setting.num_ranks
    what = "layers' inputs, of all ranks"
    found = term(what, layers=num, tokens=tokens, hidden=s.hidden, bytes=s.item)
    return {rows.WAITING: [found]} if num else {}


def _hosted(s: Sizes, setting: Setting) -> list[Term]:
    """The quantized layers that lie on the host."""
    words = {"offloaded": "slices of all ranks, pinned", "streamed": "one copy for all ranks"}
    counts = {what: setting.count(placement) for placement, what in words.items()}
    return [term(what, layers=num, bytes=s.layer_bytes) for what, num in counts.items() if num]
