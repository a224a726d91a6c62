"""The rows on which a merged model is compared: held out by the run, or random tokens."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config, check_own_code
from fsdp_qlora.data import prepare, sources, tokenizer
from fsdp_qlora.errors import UserError
from fsdp_qlora.results.adapter_files import Adapter, run_config
from fsdp_qlora.results.verbs import MergeOptions

SEED = 0


@dataclass(frozen=True)
class Rows:
    """Token ids to compare on.

    Args:
        ids: one list each.
        note: what they are, in words.
        is_text: they are text, so that their loss means something.
    """

    ids: list[list[int]]
    note: str
    is_text: bool


def choose(options: MergeOptions, adapter: Adapter, info: ModelInfo) -> Rows:
    """Take the rows that the run held out, else some that it learned, else random tokens.

    Args:
        options: evidence_rows, evidence_tokens, dataset.
        adapter: whose run it was.
        info: the base.

    Returns:
        The rows; what they are is said.

    Raises:
        UserError: the data set asked for with --dataset cannot be read.
    """
    if options.dataset is not None:
        cfg = dataclasses.replace(Config(), dataset=options.dataset)
        return _of_data(options, cfg, adapter, info)
    if not (adapter.path / "run_config.json").is_file():
        return _random(options, info, "no run_config.json beside the adapter")
    try:
        cfg = run_config(adapter.path)
        check_own_code(vars(cfg), (), adapter.path)
        return _of_data(options, cfg, adapter, info)
    except UserError as error:
        return _random(options, info, f"the run's rows are not at hand: {error}")


def _of_data(options: MergeOptions, cfg: Config, adapter: Adapter, info: ModelInfo) -> Rows:
    if cfg.dataset == sources.DUMMY:
        return _random(options, info, "the run's rows were random, too")
    path = _tokenizer_directory(adapter, info)
    ready = prepare.prepare(
        cfg, tokenizer.read(path), info.vocab_size, lambda: tokenizer.load(path)
    )
    has_held_out = len(ready.held_out) > 0
    part = ready.held_out if has_held_out else ready.train
    found = (part[i].input_ids[: options.evidence_tokens].tolist() for i in range(len(part)))
    ids = [row for row, _ in zip(found, range(options.evidence_rows), strict=False) if row]
    if not ids:
        raise UserError(cfg.dataset, "holds no rows to compare on", "name others with --dataset")
    kind = "held-out rows" if has_held_out else "rows, none held out,"
    return Rows(ids, f"{len(ids)} {kind} of {cfg.dataset}", True)


def _tokenizer_directory(adapter: Adapter, info: ModelInfo) -> Path:
    places = [adapter.path, info.path]
    for place in places:
        if place and any((place / name).exists() for name in tokenizer.TOKENIZER_FILES):
            return place
    raise UserError(str(info.path), "has no tokenizer", "copy it beside the adapter")


def _random(options: MergeOptions, info: ModelInfo, why: str) -> Rows:
    shape = (options.evidence_rows, options.evidence_tokens)
    ids = np.random.default_rng(SEED).integers(0, info.vocab_size, shape).tolist()
    return Rows(ids, f"{options.evidence_rows} rows of random tokens ({why})", False)
