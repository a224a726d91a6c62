"""GiB of host memory by row and phase."""

from fsdp_qlora.config import Config
from fsdp_qlora.hardware import has_gpu_build
from fsdp_qlora.plan import memory, rows
from fsdp_qlora.plan.activations import num_offloaded
from fsdp_qlora.plan.limits import GIB, MOST_TOUCHED_BYTES, NUM_READ_AHEAD
from fsdp_qlora.plan.rows import Rows, Table, Term, term, total_bytes
from fsdp_qlora.plan.sizes import Setting, Sizes

# Measured on the H200 machine: 17, 20 and 39 GiB in use in all, less the other rows; CPU ranks on
# a machine of two cores.
SYSTEM_BYTES = 0.5 * GIB
PROCESS_BYTES = {"cuda": 1.75 * GIB, "cpu": 0.3 * GIB}
CUDA_BUILD_BYTES = 0.13 * GIB  # that a CPU rank has more where torch was made for cards


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
        table = memory.device(s, cfg, setting, kind)
        for phase, own in phases.items():
            needed = table.total_gib(phase) * GIB
            own[rows.RANKS] = [term("the table above", bytes=needed, ranks=ranks)]
    return Table(phases)


def _copies(s: Sizes, cfg: Config, setting: Setting) -> list[Term]:
    """What is trained, as rank 0 writes it beside the training (training/checkpoint.py)."""
    if not cfg.saves_checkpoints:
        return []
    params = s.lora * s.layers + s.whole * setting.count("trained") + s.trained_root
    nbytes = s.master + memory.moment_bytes(cfg)
    return [term("copies for checkpoints: weights, moments", params=params, bytes=nbytes)]


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
    """The packed layers that lie on the host."""
    words = {"offloaded": "slices of all ranks, pinned", "streamed": "one copy for all ranks"}
    counts = {what: setting.count(placement) for placement, what in words.items()}
    nbytes = s.packed + s.constants
    return [term(what, layers=num, bytes=nbytes) for what, num in counts.items() if num]
