"""What a checkpoint belongs to, base, adapter, data, and what differs in a run; no torch."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.arch import ModelInfo, select_linears
from fsdp_qlora.config import TRAIN_TYPES, Config
from fsdp_qlora.errors import UserError, one_line
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.train.checkpoint_files import Saved

if TYPE_CHECKING:
    from fsdp_qlora.data import Data

# Of the configuration, as it stands. DATA may change when the user says so, MODEL never.
MODEL = (
    *("lora_rank", "lora_alpha", "use_rslora", "lora_dropout"),
    *("modules_to_save", "optimizer"),
)
DATA = ("seed", "context_length", "packing", "train_on", "system_prompt", "template")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MAY_CHANGE = (*DATA, "global_batch", "tokenizer", "chat_template", "rows", "tokens")
MOST_CHARS = 40


def of_config(cfg: Config, info: ModelInfo, base: str | None, num_ranks: int) -> dict[str, Any]:
    """Everything that is known before data and model are loaded.

    Args:
        cfg: the run.
        info: the model.
        base: digest of its files; None for a shape without files.
        num_ranks: of the run.

    Returns:
        Plain values by name, as JSON has them.
    """
    found: dict[str, Any] = {
        "base": base or _digest(repr(sorted(info.config.items()))),
        "format": cfg.format_name,
        "adapter": TRAIN_TYPES[cfg.train_type].adapter,
        "targets": sorted(linear.name for linear in select_linears(info, cfg.lora_target_modules)),
        "compute_dtype": cfg.compute_dtype,
        "global_batch": cfg.batch_size * cfg.gradient_accumulation_steps * num_ranks,
        "tokenizer": _tokenizer(info.path),
    }
    return found | {name: getattr(cfg, name) for name in (*MODEL, *DATA)}


def of_data(data: "Data") -> dict[str, Any]:
    """What the rows became.

    Args:
        data: of the run.

    Returns:
        Plain values by name: the chat template, how many rows, and a hash over the tokens of all in
        their order (that of each is kept with it).
    """
    part = data.train.samples
    return {
        "chat_template": _digest(str(getattr(data.tokenizer, "chat_template", None))),
        "rows": len(part),
        "tokens": hashlib.sha256(part.store.hashes[part.indices].tobytes()).hexdigest()[:16],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _tokenizer(path: Path | None) -> str | None:
    for file in (path / name for name in TOKENIZER_FILES) if path is not None else ():
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return None


def check(saved: Mapping[str, Any], now: Mapping[str, Any], allow_data_change: bool) -> list[str]:
    """Refuse to go on with another base, adapter or data than the checkpoint belongs to.

    Args:
        saved, now: fingerprints; what only one of them has is not compared.
        allow_data_change: data, seed and batch may differ.

    Returns:
        A line for each difference that is allowed.

    Raises:
        UserError: something differs (code 2); its notes are a table.
    """
    other = [name for name in saved if name in now and saved[name] != now[name]]
    table = [_row(name, _text(saved[name]), _text(now[name])) for name in other]
    refused = [name for name in other if not allow_data_change or name not in MAY_CHANGE]
    if not refused:
        return [f"resume    {row}" for row in table]
    only_data = all(name in MAY_CHANGE for name in refused)
    remedy = "--allow_data_change goes on with other data" if only_data else "start a new run"
    names = ", ".join(refused)
    got = f"--resume with another {names}"
    error = UserError(got, "the checkpoint belongs to what was", remedy)
    for row in (_row("", "checkpoint", "this run"), *table):
        error.add_note(row)
    raise error


def check_early(saved: Saved | None, plan: RunPlan, base: str | None) -> None:
    """As `check`, before any rank is started, of what is known by then.

    Args:
        saved: what the run goes on from; None: nothing.
        plan: of the run.
        base: digest of the model's files.
    """
    if saved is not None:
        now = of_config(plan.cfg, plan.info, base, plan.machine.num_ranks)
        check(saved.state["fingerprint"], now, plan.cfg.allow_data_change)


def library_notes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say which libraries are others than those that the checkpoint was made with.

    Args:
        saved, now: name -> version.
    """
    both = [name for name in saved if name in now and saved[name] != now[name]]
    return [f"warning   {name} was {saved[name]}, now {now[name]}" for name in both]


def _row(name: str, before: str, after: str) -> str:
    return f"{name:<16}{before:<{MOST_CHARS}}  {after}".rstrip()


def _text(value: Any) -> str:
    text = one_line(",".join(value) if isinstance(value, list) else str(value))
    return text if len(text) <= MOST_CHARS else f"{text[: MOST_CHARS - 3]}..."
