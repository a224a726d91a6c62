"""What others get of a run: its model card, and the upload to the Hugging Face hub.

The card's figures come from the record of the run. Nothing of the environment is in it, the command
is put together from the options, and whatever looks like a secret is removed.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from fsdp_qlora import arch, atomic, record
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, split_name, to_dict
from fsdp_qlora.errors import ENVIRONMENT, REDACTED, UserError, brief, one_line, one_line_of, redact
from fsdp_qlora.export.adapter import CONFIG_NAME, LAYERS_NAME, OF_TOKENIZER, TABLE, WEIGHTS_NAME
from fsdp_qlora.planning.sizes import count_trained

CARD_NAME = "README.md"
FILES = (*TABLE["of_model"], CONFIG_NAME, WEIGHTS_NAME, LAYERS_NAME, *OF_TOKENIZER)
FILES += (arch.files.INDEX_NAME, arch.files.SINGLE_NAME)
CARD = Path(__file__).with_name("card.md.j2")  # its text, a template of Jinja


def write_card(directory: Path, cfg: TrainConfig, info: arch.ModelInfo) -> Path:
    """Write the card of a run that has just ended.

    Args:
        directory: of the run; without metrics.jsonl in it, the card has no figures.
        cfg: the run.
        info: the base.

    Returns:
        Path of the card.
    """
    try:
        run = record.read(directory)
    except UserError:  # what is saved already does not fail for want of its figures
        run = None
    # A card is shown to all: here also what only may be a secret is removed.
    text = redact(re.sub(TABLE["maybe_secret"], REDACTED, card_text(cfg, info, run)))
    return atomic.write(directory / CARD_NAME, text)


def card_text(cfg: TrainConfig, info: arch.ModelInfo, run: record.Run | None) -> str:
    """Compose the card; `redact` it before it is written.

    Args:
        cfg: the run.
        info: the base.
        run: its record; None leaves the figures out.

    Returns:
        Markdown, with the header that the hub reads.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name, kind = cfg.resolved_output_dir.name, TRAIN_TYPES[cfg.train_type].adapter
    base, _ = split_name(cfg.model_name)
    tags = [kind, "fsdp_qlora", cfg.train_type]
    header = ModelCardData(pipeline_tag="text-generation", tags=tags)
    header.base_model = base if _is_hub_name(base) else None
    header.library_name = "peft" if kind in ("lora", "dora") else "transformers"
    header.datasets = [cfg.dataset.partition(":")[0]] if _is_hub_name(cfg.dataset) else None
    tables = {"Training": _facts(cfg, info, run)}
    if run is not None:
        tables |= {"Results": _results(run), "Versions": run.table("versions")}
    options = {flag: value for flag, value in to_dict(cfg).items() if flag not in record.OWN_FLAGS}
    merge = f"--adapter {shlex.quote(name)} --out {shlex.quote(name + '-merged')}"
    words = {"title": one_line(name), "path": repr(name), "kind": kind, "form": cfg.format_name}
    words["base"] = one_line(cfg.model_name).replace("`", "'")
    words["loader"] = "AutoModelForCausalLM" if kind == "full" else "AutoPeftModelForCausalLM"
    words["merge"] = f"python -m fsdp_qlora export merged {merge}"
    words["command"] = record.command(options)
    cells = {title: [map(_cell, row) for row in rows.items()] for title, rows in tables.items()}
    return f"{ModelCard.from_template(header, template_path=str(CARD), tables=cells, **words)}\n"


def _is_hub_name(name: str) -> bool:
    """ORGANISATION/MODEL, and not a directory here."""
    form = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.:-]*)?"
    is_form = re.fullmatch(form, name) is not None and ".py" not in name
    return is_form and not Path(name).expanduser().exists()


def _facts(cfg: TrainConfig, info: arch.ModelInfo, run: record.Run | None) -> dict[str, Any]:
    total, num_trained = arch.num_params(info), count_trained(info, cfg).total
    base = f"{cfg.model_name}: {total:,} parameters, {info.model_type}"
    facts: dict[str, Any] = {"base": base, "base in training": cfg.format_name}
    facts["trained parameters"] = f"{num_trained:,} ({num_trained / total:.2%})"
    facts["data set"] = cfg.dataset
    if run is None:
        return facts
    lines = "\n".join(run.facts.get("lines", [])).splitlines()
    facts["data"] = "".join(line[4:].strip() for line in lines if line.startswith("data "))
    return facts | {"ranks": run.num_ranks, "steps": f"{run.steps[-1]['step']:,}"}


def _results(run: record.Run) -> dict[str, str]:
    held_out: list[Any] = [e["loss"] for e in run.evals if e["loss"] is not None]
    seconds, num_tokens = sum(run.values("step_s")), sum(run.values("num_tokens"))
    speed = f"{num_tokens / max(seconds, 1e-9):,.0f} tokens/s"
    size = record.highest(run.peaks("device_total_gib")) or 0.0
    peak = record.highest(run.peaks("device_peak_reserved_gib")) or 0.0
    host_gib = record.highest(run.host("host_peak_used_gib")) or 0.0
    rows = {
        "loss of the first and the last step": _both(run.values("loss")),
        "held-out loss before and after": _both(held_out) if len(held_out) > 1 else "",
        "tokens, padding included": f"{num_tokens:,}",
        "training time": f"{seconds / 60:.1f} minutes, {speed}",
        "peak memory of a GPU": f"{peak:.2f} GiB reserved of {size:.1f}" if size else "",
        "peak memory of the host, all programs": f"{host_gib:.1f} GiB" if host_gib else "",
    }
    return {name: text for name, text in rows.items() if text}


def _both(losses: list[Any]) -> str:
    before, after = losses[0], losses[-1]
    return "" if before is None or after is None else f"{before:.4f} -> {after:.4f}"


def _cell(value: Any) -> str:
    return one_line(str(value)).replace("|", "\\|")


def check(name: str | None) -> None:
    """See before a run that what it trains can be sent: nothing is asked of the hub.

    Args:
        name: OWNER/NAME; None: it is not to be sent.

    Raises:
        UserError: no usable name (code 2), or no token (code 3).
    """
    if name is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    got, rule = f"--push_to_hub {name}", "is no name of a repository"
    with one_line_of(got, "give OWNER/NAME", rule=rule, kinds=ValueError):
        validate_repo_id(name)
        _owner, _name = name.split("/")
    if get_token() is None:
        remedy = "run hf auth login, or set HF_TOKEN"
        raise UserError(got, "there is no token of the hub", remedy, ENVIRONMENT)


def push(directory: Path, name: str | None) -> None:
    """Send what was trained to the hub, and say where it is.

    Args:
        directory: output directory of a finished run.
        name: OWNER/NAME; a new repository is private, one that is there stays as it is. None: it is
            not to be sent.

    Raises:
        UserError: the hub refuses, or is out of reach (code 3); all stays where it is.
    """
    if name is None:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        place = api.create_repo(name, private=True, exist_ok=True)
        what: dict[str, Any] = {"allow_patterns": list(FILES)}
        what["commit_message"] = "Trained with fsdp_qlora"
        api.upload_folder(repo_id=name, folder_path=directory, **what)
    except Exception as error:  # the transport's own errors differ between releases
        status = getattr(getattr(error, "response", None), "status_code", None)
        rule = f"the hub has not taken it: {brief(error) or type(error).__name__}"
        rule = "the hub refuses the token" if status in (401, 403) else rule
        remedy = f"it is in {directory}: hf auth login, then hf upload {name} {directory}"
        raise UserError(f"--push_to_hub {name}", rule, remedy, ENVIRONMENT) from error
    print(f"pushed    {place}")
