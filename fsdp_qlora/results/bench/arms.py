"""The arms of `bench peers`: how each trainer is started on the same work, and read afterwards."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed.env import find_port
from fsdp_qlora.results.bench.process import Launch, Lines, Ran
from fsdp_qlora.results.bench.rows import data_flags

SEED = 42
LR = 1e-4
LORA_RANK = LORA_ALPHA = 16
PEERS_DIR = PROJECT_DIR / "recipes" / "peers"
PEERS = "pip install 'fsdp_qlora[peers]'"
REMEDIES = {"liger_kernel": "pip install liger-kernel"}
COMMON = (
    *("--train_type=qlora", "--quant_type=nf4", "--double_quant=true", "--precision=bf16"),
    *(f"--lora_rank={LORA_RANK}", f"--lora_alpha={LORA_ALPHA}", "--lora_dropout=0"),
    *("--lora_target_modules=all", f"--lr={LR}", "--lr_scheduler=constant", "--wd=0"),
    *("--apply_gradient_clipping=false", "--quant_cache=off", "--save_model=false"),
    "--log_to=stdout",
)
OURS = (*COMMON, "--use_gradient_checkpointing=true")
# tqdm's line in the reference: "Epoch 0, Loss 11.190, LR 1.00e-04:   8%|#   | 1/13 [00:03<..."
REFERENCE_STEP = re.compile(r"Loss (\d+\.\d+).*\| (\d+)/(\d+) \[")
REFERENCE_PEAK = re.compile(r"Peak (allocated|reserved) memory: +(\d+\.\d+) GiB")
REFERENCE_LOAD = re.compile(r"Loaded model weights in (\d+\.\d+) seconds")


@dataclass(frozen=True)
class Workload:
    """What all arms train, and where.

    Args:
        model: directory of a 16-bit checkpoint.
        batch_size, context_length, max_steps: rows of a rank and step, tokens of a row, steps.
        num_ranks: processes; one per GPU.
        gpu_budget_gib: cap of each card's allocator.
        has_gpu: False on a CPU.
        extra: further flags of train.py for our arms.
        best: flags of train.py that make `ours_best`.
        reference: checkout of the reference, or None.
        accumulation: micro-batches of a step.
    """

    model: Path
    batch_size: int
    context_length: int
    max_steps: int
    num_ranks: int
    gpu_budget_gib: float
    has_gpu: bool
    extra: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    reference: Path | None = None
    accumulation: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step of all ranks."""
        return self.batch_size * self.accumulation * self.context_length * self.num_ranks

    @property
    def data_flags(self) -> list[str]:
        """Flags of train.py that give the rows."""
        shape = (self.batch_size, self.context_length, self.max_steps, self.num_ranks)
        return data_flags(*shape, SEED, self.accumulation)


@dataclass(frozen=True)
class Measured:
    """What an arm measured in one run.

    Args:
        step_s: seconds of each step, the card's work included.
        losses: of each step, mean over the tokens of all ranks; None for one that is no number.
        peak_allocated_gib, peak_reserved_gib: of torch's allocator in training, the largest rank.
        load_peak_reserved_gib: the same before training; None where it is not known.
        load_s: reading and quantising the weights.
        first_step_s: from the start of the program to the end of its first step.
        has_same_rows: the arm saw the token ids that it should have seen.
    """

    step_s: list[float]
    losses: list[float | None]
    peak_allocated_gib: float
    peak_reserved_gib: float
    load_peak_reserved_gib: float | None
    load_s: float | None
    first_step_s: float | None
    has_same_rows: bool


@dataclass(frozen=True)
class Arm:
    """One trainer with its settings.

    Args:
        name: in tables and on the command line.
        what: a few words about it.
        launch: (work, output directory) -> how to start it.
        read: (work, output directory, what it left) -> what it measured.
        is_ours: it runs train.py of this project.
        needs: modules it imports that this project does not need itself.
        needs_gpu: it cannot run on a CPU.
        milestone: file in the output directory that appears just before the first step.
    """

    name: str
    what: str
    launch: Callable[[Workload, Path], Launch]
    read: Callable[[Workload, Path, Ran], Measured]
    is_ours: bool = False
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False
    milestone: str | None = None


def obstacle(arm: Arm, work: Workload) -> str | None:
    """Say what keeps an arm from running here, before it is started.

    Args:
        arm: the arm.
        work: says whether there is a GPU.

    Returns:
        One line with the remedy, or None.
    """
    if arm.needs_gpu and not work.has_gpu:
        return "its kernels need a GPU"
    missing = [name for name in arm.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed: {REMEDIES.get(missing[0], PEERS)}"
    return None


def launch_ours(flags: tuple[str, ...], work: Workload, out: Path) -> Launch:
    """Say how train.py is started.

    Args:
        flags: besides those of the work.
        work: what it trains.
        out: directory of the arm; the run is in run/.
    """
    argv = [
        *(sys.executable, str(PROJECT_DIR / "train.py"), f"--model_name={work.model}"),
        *(*flags, *work.data_flags, f"--world_size={work.num_ranks}"),
        *(f"--gpu_budget_gib={work.gpu_budget_gib}", *work.extra),
        f"--output_dir={out / 'run'}",
    ]
    return Launch(argv, PROJECT_DIR)


def _ours(flags: Callable[[Workload], tuple[str, ...]]) -> Callable[[Workload, Path], Launch]:
    return lambda work, out: launch_ours((*OURS, *flags(work)), work, out)


def read_ours(work: Workload, out: Path, ran: Ran) -> Measured:
    """Read the record of a run of train.py; its step seconds are those of metrics.jsonl.

    Args:
        work: what it should have trained.
        out: directory of the arm.
        ran: gives the time until metrics.jsonl began: the first step follows at once.

    Returns:
        What it measured.
    """
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "event" not in line]
    summary = json.loads((out / "run" / "summary.json").read_text(encoding="utf-8"))
    peaks, config = summary["peaks"]["ranks"], summary["config"]
    wanted = dict(flag.removeprefix("--").split("=") for flag in work.data_flags)
    first_step_s = None if ran.milestone_s is None else ran.milestone_s + steps[0]["step_s"]
    return Measured(
        step_s=[step["step_s"] for step in steps],
        losses=[step["loss"] for step in steps],
        peak_allocated_gib=max(peak["device_peak_allocated_gib"] for peak in peaks),
        peak_reserved_gib=max(peak["device_peak_reserved_gib"] for peak in peaks),
        load_peak_reserved_gib=summary["load_peaks"]["device_peak_reserved_gib"],
        load_s=summary["load_s"],
        first_step_s=first_step_s,
        has_same_rows=summary["num_ranks"] == work.num_ranks
        and all(str(config[name]) == text for name, text in wanted.items()),
    )


def _trl(liger: bool) -> Callable[[Workload, Path], Launch]:
    def launch(work: Workload, out: Path) -> Launch:
        settings = PEERS_DIR / "accelerate_fsdp2.yaml"
        num_ranks, port = str(work.num_ranks), str(find_port(None))
        fsdp2 = ("accelerate.commands.launch", "--config_file", str(settings))
        start = (*fsdp2, "--num_processes", num_ranks, "--main_process_port", port)
        ddp = ("torch.distributed.run", "--nproc-per-node", num_ranks, "--master-port", port)
        argv = [
            *(sys.executable, "-m", *(start if work.has_gpu else ddp)),
            *(str(PEERS_DIR / "trl_fsdp2.py"), f"--model={work.model}", f"--liger={liger:d}"),
            *(f"--batch_size={work.batch_size}", f"--context_length={work.context_length}"),
            *(f"--max_steps={work.max_steps}", f"--gpu_budget_gib={work.gpu_budget_gib}"),
            *(f"--lr={LR}", f"--seed={SEED}", f"--out={out / 'result.json'}"),
        ]
        return Launch(argv, out)

    return launch


def read_trl(work: Workload, out: Path, ran: Ran) -> Measured:
    """Read what recipes/peers/trl_fsdp2.py has written.

    Args:
        work: not needed.
        out: directory of the arm.
        ran: when it was started.

    Returns:
        What it measured.
    """
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    first_step_s = result.pop("first_step_unix_s") - ran.started_unix_s
    return Measured(**result, first_step_s=first_step_s)


def _reference(work: Workload, out: Path) -> Launch:
    assert work.reference is not None
    model = _with_tokenizer(work.model, out / "model")
    argv = [
        *(sys.executable, str(work.reference / "train.py"), "--model_name", str(model)),
        *("--world_size", str(work.num_ranks), "--train_type", "custom_qlora"),
        *("--batch_size", str(work.batch_size), "--context_length", str(work.context_length)),
        *("--precision", "bf16", "--use_gradient_checkpointing", "true"),
        *("--reentrant_checkpointing", "true", "--use_cpu_offload", "false"),
        *("--dataset", "dummy", "--num_epochs", "1", "--dataset_samples"),
        str(work.max_steps * work.batch_size * work.num_ranks),
        *("--lora_rank", str(LORA_RANK), "--lora_alpha", str(LORA_ALPHA), "--lora_dropout", "0"),
        *("--lr", str(LR), "--wd", "0", "--seed", str(SEED), "--verbose", "true"),
        *("--log_to", "stdout", "--master_port", str(find_port(None))),
    ]
    # It starts a process per visible card, whatever --world_size says.
    every = ",".join(map(str, range(work.num_ranks)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    env = {"CUDA_VISIBLE_DEVICES": ",".join(visible[: work.num_ranks])}
    return Launch(argv, work.reference, env)


def _with_tokenizer(model: Path, directory: Path) -> Path:
    """Give a checkpoint the tokenizer that the reference asks for: one token a character."""
    directory.mkdir(parents=True)
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    if (directory / "tokenizer_config.json").exists():
        return directory
    splitting = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated"}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer: dict[str, Any] = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": []},
        **{"normalizer": None, "post_processor": None, "decoder": None},
        "pre_tokenizer": {**splitting, "invert": False},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    return directory


def read_reference(work: Workload, out: Path, ran: Ran) -> Measured:
    """Read the progress bar and the last lines of the reference's train.py.

    It says the loss of a step once the card is done with it, so the time of that line ends the
    step. Its rows are its own text, so they are never those of the others.

    Args:
        work: not needed.
        out: not needed.
        ran: its lines.

    Returns:
        What it measured.

    Raises:
        ValueError: it showed no step.
    """
    ends, losses = _reference_steps(ran.lines)
    text = "\n".join(text for _, text in ran.lines)
    peaks = [(kind, float(gib)) for kind, gib in REFERENCE_PEAK.findall(text)]
    load = REFERENCE_LOAD.search(text)
    return Measured(
        step_s=[after - before for before, after in pairwise(ends)],
        losses=losses,
        peak_allocated_gib=max((gib for kind, gib in peaks if kind == "allocated"), default=0.0),
        peak_reserved_gib=max((gib for kind, gib in peaks if kind == "reserved"), default=0.0),
        load_peak_reserved_gib=None,
        load_s=float(load[1]) if load else None,
        first_step_s=ends[1],
        has_same_rows=False,
    )


def _reference_steps(lines: Lines) -> tuple[list[float], list[float | None]]:
    """When each step ended, with the begin of the first in front, and the losses."""
    states: dict[int, list[tuple[float, float]]] = {}
    for said_s, text in lines:
        found = REFERENCE_STEP.search(text)
        if found:
            states.setdefault(int(found[2]), []).append((said_s, float(found[1])))
    if len(states) < 2 or sorted(states) != list(range(len(states))):
        raise ValueError("its progress bar shows no steps")
    ends, losses = [states[0][-1][0]], list[float | None]()
    for step in range(1, len(states)):
        loss = states[step][-1][1]
        # The bar moves first, with the loss of the step before.
        ends.append(next(said_s for said_s, shown in states[step] if shown == loss))
        losses.append(loss)
    return ends, losses


def _our_arm(name: str, what: str, flags: Callable[[Workload], tuple[str, ...]]) -> Arm:
    return Arm(name, what, _ours(flags), read_ours, is_ours=True, milestone="run/metrics.jsonl")


TRL = ("trl", "peft", "accelerate", "datasets")
RESIDENT = ("--use_cpu_offload=false",)
STREAMED = ("--use_cpu_offload=true", "--offload_impl=stream")
ARMS = (
    _our_arm("ours", "base on the cards", lambda work: RESIDENT),
    _our_arm("ours_streamed", "base on the host, layers copied ahead", lambda work: STREAMED),
    _our_arm("ours_best", "base on the cards, --best", lambda work: (*RESIDENT, *work.best)),
    Arm("trl_fsdp2", "TRL + PEFT + accelerate", _trl(False), read_trl, needs=TRL),
    Arm(
        "trl_fsdp2_liger",
        "the same with Liger's kernels",
        _trl(True),
        read_trl,
        needs=(*TRL, "liger_kernel"),
        needs_gpu=True,
    ),
    Arm("reference", "its own rows, LoRA without o_proj, no cap", _reference, read_reference),
)
