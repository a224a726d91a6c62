"""Tasks of EleutherAI's lm-eval on the sharded model; lm-eval is not required by the rest."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.errors import ENVIRONMENT, UserError

if TYPE_CHECKING:
    from fsdp_qlora.results.reopen import Opened

LONGEST_TOKENS = 2048  # of a row, where the model could read more
ANSWER_TOKENS = 256


def require() -> None:
    """Check that lm-eval is there, without importing it.

    Raises:
        UserError: it is not (code 3).
    """
    if importlib.util.find_spec("lm_eval") is None:
        rule = "needs lm-eval, which is not installed"
        raise UserError("--tasks", rule, "pip install lm-eval", ENVIRONMENT)


def score(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int, device: Any
) -> list[tuple[float, bool]]:
    """Say how likely each row's continuation is; every rank must call it, all the same.

    Args:
        model: a PackedModel in evaluation mode.
        rows: ids that are given (at least one) and ids that follow (at least one).
        batch_size: rows computed at once.
        device: of this rank.

    Returns:
        Sum of the log probabilities, and whether each token is the likeliest, by row.
    """
    import torch

    from fsdp_qlora.model.head import Targets

    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0] + rows[i][1]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        wholes = [rows[i][0] + rows[i][1] for i in some]
        width = len(wholes[0])
        ids_BT = torch.tensor([whole + [0] * (width - len(whole)) for whole in wholes])
        spans = [
            range(number * width + len(rows[i][0]) - 1, number * width + len(whole) - 1)
            for number, (i, whole) in enumerate(zip(some, wholes, strict=True))
        ]
        positions_N = torch.tensor([place for span in spans for place in span])
        following_N = ids_BT.flatten()[positions_N + 1].to(device)
        with torch.no_grad():
            logits_NV = model(ids_BT.to(device), Targets(positions_N.to(device), None)).float()
        chosen_N = logits_NV.gather(1, following_N.unsqueeze(1)).squeeze(1)
        log_probs = (chosen_N - logits_NV.logsumexp(1)).double().cpu().split(list(map(len, spans)))
        hits = (logits_NV.argmax(1) == following_N).cpu().split(list(map(len, spans)))
        for i, values, hit in zip(some, log_probs, hits, strict=True):
            found[i] = (values.sum().item(), bool(hit.all()))
    return found


def run(
    opened: "Opened", tokenizer: Any, names: list[str], task_dir: Path | None, limit: int | None
) -> dict[str, Any]:
    """Run tasks on the model as it is; every rank does all of the work.

    Args:
        opened: the model.
        tokenizer: transformers tokenizer.
        names: of the tasks.
        task_dir: directory with more tasks, or None.
        limit: rows of each task, or None for all.

    Returns:
        Figures by task, as lm-eval names them ("acc,none").

    Raises:
        UserError: there is no such task.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = str(task_dir) if task_dir else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # to read all of lm-eval's own takes its time
        manager = TaskManager(include_path=own)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        remedy = "lm-eval ls tasks lists them; --task_dir DIR adds your own"
        raise UserError(f"--tasks {','.join(unknown)}", "lm-eval has no such task", remedy)
    done = lm_eval.simple_evaluate(
        model=_wrap(opened, tokenizer),
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    return done["results"]


def lines(name: str, results: dict[str, Any]) -> Iterator[str]:
    """Write the figures of some tasks.

    Args:
        name: of the model.
        results: see `run`.

    Yields:
        One line per figure.
    """
    for task, figures in results.items():
        for figure, value in figures.items():
            is_figure = isinstance(value, float) and not figure.partition(",")[0].endswith("stderr")
            if is_figure:
                yield f"{name:<8} {task} {figure.partition(',')[0]} {value:.4f}"


def _wrap(opened: "Opened", tokenizer: Any) -> Any:
    """The model as lm-eval wants it: a class of its own, made here so that it stays optional."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    from fsdp_qlora.results.generate import pieces

    model, world = opened.model, opened.world
    longest = min(opened.info.config.get("max_position_embeddings", LONGEST_TOKENS), LONGEST_TOKENS)

    class Model(TemplateLM):
        """base + adapter."""

        @property
        def eot_token_id(self):
            return tokenizer.eos_token_id

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer(string, add_special_tokens=add_special_tokens is not False).input_ids

        def _loglikelihood_tokens(self, requests, **kwargs):
            pairs = [(given, said) for _, given, said in requests]
            cut = [(given[-max(longest - len(said), 1) :], said) for given, said in pairs]
            return score(model, cut, opened.cfg.batch_size, world.device)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            sums = []
            for (text,) in (request.args for request in requests):
                ids = self.tok_encode(text, add_special_tokens=False)
                windows = utils.get_rolling_token_windows(ids, self.eot_token_id, longest, 1)
                pairs = [utils.make_disjoint_window(window) for window in windows]
                found = score(model, pairs, opened.cfg.batch_size, world.device)
                sums.append(sum(value for value, _ in found))
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            return [self._continue(*request.args) for request in requests]

        def _continue(self, context, wishes):
            ends = wishes.get("until") or []
            ends = [ends] if isinstance(ends, str) else ends
            num_tokens = wishes.get("max_gen_toks", ANSWER_TOKENS)
            heat = float(wishes.get("temperature") or 0.0) if wishes.get("do_sample") else 0.0
            ids, said = self.tok_encode(context)[-max(longest - num_tokens, 1) :], ""
            for piece in pieces(model, tokenizer, ids, num_tokens, world, heat):
                said += piece
                if any(end in said for end in ends):
                    break
            return said[: min([said.find(end) for end in ends if end in said] + [len(said)])]

    return Model()
