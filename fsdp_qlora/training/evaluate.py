"""Evaluation before, while and after a model is trained: held-out loss, answers, the best."""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdp_qlora import __version__, atomic, checkpoint_store, cli, errors
from fsdp_qlora.checkpoint_store import CONFIG as RUN_CONFIG
from fsdp_qlora.config import OBJECTIVES, TrainConfig
from fsdp_qlora.data import Data, tokens
from fsdp_qlora.data.batches import Batch, all_once
from fsdp_qlora.data.prompts import Prompt
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model.skeleton import QuantizedModel
from fsdp_qlora.training import losses, metrics, optim
from fsdp_qlora.training.objectives import KnownReference, Preference

EVALUATION, REFERENCE = "evaluation.json", "reference.npz"
LARGEST_EXPONENT = 700.0
MOST_CHARS = 600  # of a prompt or an answer on the console


def perplexity(loss: float) -> float:
    """Return exp(loss), a number even where that is out of bounds.

    Args:
        loss: nats per token.
    """
    return math.exp(min(loss, LARGEST_EXPONENT))


def measure(
    model: Any, preference: Preference | None, batches: Sequence[Batch], world: World
) -> dict[str, float]:
    """Return loss and perplexity of held-out rows, of preferences loss, accuracy and more.

    Args:
        model: a QuantizedModel.
        preference: see Trained.
        batches: this rank's, as many on every rank.
        world: the ranks; all must call.
    """
    # In float64, so that the sum is the same however the rows are cut into batches.
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    sums, is_silent = torch.zeros(8, device=world.device), world.rank > 0
    progress = cli.Progress("evaluates", len(batches), "batches", is_silent)
    with losses.evaluating(model), progress:
        weights = losses.weigh(model, preference, batches, world)
        for batch in batches:
            hooks.reach("eval", world.rank)
            if preference is None:
                loss_sum += losses.token_loss_sum(model, batch, world.device)
            else:
                losses_B, own = losses.compare(model, preference, [batch], weights, world.device)
                loss_sum, sums = loss_sum + losses_B.sum(), sums + own
            progress.update()
    loss = world.sum(loss_sum.item()) / weights.num
    if preference is None:
        return {"loss": loss, "perplexity": perplexity(loss)}
    figures = losses.figures(preference, sums, weights, world)
    return {"loss": loss} | {name: value.item() for name, value in figures.items()}


def preference_of_base(
    model: QuantizedModel, cfg: TrainConfig, rows: Sequence[Batch], world: World
) -> Preference | None:
    """Return what an adapter that is not loaded yet is measured by; None: no preference.

    Args:
        model: the base; its reference is that of the adapter's run where it has kept it.
        cfg: the run.
        rows: this rank's, see `measure`.
        world: the ranks; all must call.
    """
    preference = Preference.of(cfg, False)
    if preference is None or cfg.objective == "kto" or not OBJECTIVES[cfg.objective].has_reference:
        return preference
    hashes = np.concatenate([batch.sides.hashes for batch in rows if batch.sides is not None])
    known = KnownReference.read(cfg.resolved_output_dir / REFERENCE, hashes)
    if not all(world.gather_objects(known is not None)):
        known = losses.reference_of(model, preference, rows, world, False)
    return dataclasses.replace(preference, is_live=False, known=known)


def with_reference(
    trained: optim.Trained, data: Data, cfg: TrainConfig, saved: Any, base: Callable[[], Any]
) -> optim.Trained:
    """Let a run know the log-probabilities by its reference, where they are computed once.

    They lie in the directory of the run, and by what they depend on beside the cache of tokens.

    Args:
        trained: what will be trained; all ranks must call.
        data: of the run.
        cfg: the run.
        saved: the checkpoint that is resumed, whose weights `trained` has; None: nothing yet.
        base: gives a digest of the model's files, or None.

    Returns:
        The same with `preference.known`.

    Raises:
        UserError: a run that goes on has lost them, and they cannot be made again (code 5).
    """
    preference, world, model = trained.preference, trained.world, trained.model
    if preference is None or not cfg.has_cached_reference:
        return trained
    assert isinstance(model, QuantizedModel)
    rows, held_out = data.train.samples, data.held_out
    own = np.concatenate([rows.hashes, *(batch.sides.hashes for batch in held_out if batch.sides)])
    wanted = np.unique(np.concatenate(world.gather_objects(np.unique(own))))
    kind = (cfg.format_name, cfg.compute_dtype, cfg.attn, __version__)
    parts = (digest := base(), *kind, wanted.tobytes())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    root, is_base = tokens.cache_root(cfg.token_cache), cfg.trains_new_adapters
    place = root / f"reference-{key}.npz" if is_base and digest and root is not None else None
    place = place if is_base else cfg.resolved_output_dir / REFERENCE
    is_read = place is not None and (is_base or saved is not None)
    known = world.first(lambda: KnownReference.read(place, wanted) if is_read and place else None)
    if known is None and saved is not None and not is_base:
        rule = "does not hold what the reference said of all rows before the first step"
        raise errors.UserError(str(place), rule, "start a new run", errors.INTEGRITY)
    if known is None:
        batches = itertools.chain(all_once(rows, data.train.sampler), held_out)
        known = losses.reference_of(model, preference, batches, world, is_base)
        if world.rank == 0 and place is not None:
            with contextlib.suppress(*[OSError] * is_base):
                place.parent.mkdir(parents=True, exist_ok=True)
                known.write(place)
    return dataclasses.replace(trained, preference=dataclasses.replace(preference, known=known))


def _indented(text: str) -> str:
    """A text below a name of ten characters, with its line breaks."""
    shown = text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} …"
    return "\n          ".join(map(errors.one_line, shown.splitlines()))


@dataclasses.dataclass
class Evaluator:
    """Held-out loss and answers of a run; the adapter with the lowest loss is kept.

    Nothing here draws from torch's generators or leaves a trace in the model: with and without it
    the steps of training are the same bit for bit. Every rank must call all of it.

    Attributes:
        trained: what is evaluated.
        data: held_out batches and prompts, either of which may be empty.
        cfg: eval_every, sample_tokens, save_model, the directory.
        answer: gives the continuation of a prompt.
        save: writes what was trained into the directory of a configuration.
        recorder: gets the events and the lines; its tracker the memory of an evaluation.
        num_done: steps that are done; not 0 after a resume.
        losses: held-out loss by step, 0 being before the first.
        accuracies: of preferences, by step.
        answers: of all prompts, by step.
        best: loss and step of the adapter in `best`, or None.
    """

    trained: optim.Trained
    data: Data
    cfg: TrainConfig
    answer: Callable[[Prompt], str]
    save: Callable[[TrainConfig], object]
    recorder: metrics.Recorder
    num_done: int = 0
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    accuracies: dict[int, float] = dataclasses.field(default_factory=dict)
    answers: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    best: tuple[float, int] | None = None

    @property
    def every(self) -> int:
        """Steps from one evaluation to the next; 0: only before and after."""
        is_epoch = self.cfg.eval_every == "epoch"
        return self.data.train.steps_per_epoch if is_epoch else int(self.cfg.eval_every or 0)

    def begin(self) -> None:
        """Evaluate the untrained model; after a resume, read what was seen of it."""
        if self.num_done:
            self._recall()
        else:
            self._evaluate("before")

    def after_step(self) -> None:
        """Count a step, and evaluate when it is time; the last step is left to `end`."""
        self.num_done += 1
        is_last = self.num_done == self.data.train.num_steps
        if self.every and self.num_done % self.every == 0 and not is_last:
            self._evaluate("step")
            words = f"loss {self.losses[self.num_done]:.3f}, {self._figures(self.num_done)}"
            self.recorder.say(f"step {self.num_done} held-out {words}")

    def end(self) -> list[str]:
        """Evaluate the trained model; return how it compares with the untrained one, in lines."""
        self._evaluate("after")
        lines = []
        if {0, self.num_done} <= self.losses.keys():
            before, after = self.losses[0], self.losses[self.num_done]
            words = f"loss {before:.3f} -> {after:.3f}, {self._figures(0, self.num_done)}"
            if self.best is not None and self.best[1] != self.num_done:
                words += f"; lowest {self.best[0]:.3f} after step {self.best[1]}"
                kept = atomic.read_json(self._best_dir / EVALUATION)  # may be of before a resume
                words += f", kept in {self._best_dir}" * (kept.get("step") == self.best[1])
            lines.append(f"held-out  {words}")
        before_all = self.answers.get(0, [""] * len(self.data.prompts))
        rows = zip(self.data.prompts, before_all, self.answers[self.num_done], strict=False)
        for prompt, old, new in rows:
            texts = {"prompt": prompt.shown, "before": old, "after": new}
            texts |= {"the data": prompt.expected} if prompt.expected else {}
            lines += [f"{name:<10}{_indented(text)}" for name, text in texts.items()]
        return lines

    def _figures(self, *steps: int) -> str:
        """Perplexity after some steps, of preferences accuracy, in words."""
        if self.accuracies:
            return "accuracy " + " -> ".join(f"{self.accuracies[step]:.1%}" for step in steps)
        return "perplexity " + " -> ".join(f"{perplexity(self.losses[s]):.2f}" for s in steps)

    def _evaluate(self, when: str) -> None:
        with self.recorder.tracker.phase("evaluation"):
            if self.data.held_out:
                self._measure(when)
            if when != "step":
                self._ask(when)

    def _measure(self, when: str) -> None:
        model, rows = self.trained.model, self.data.held_out
        found = measure(model, self.trained.preference, rows, self.trained.world)
        loss = self.losses[self.num_done] = found["loss"]
        self.accuracies |= {self.num_done: found["accuracy"]} if "accuracy" in found else {}
        is_lowest = loss < (self.best[0] if self.best else math.inf)
        is_best = self.every > 0 and self.num_done > 0 and is_lowest
        values = {"step": self.num_done, **found}
        if is_best:
            self.best = (loss, self.num_done)
            if self.cfg.save_model:
                self._keep(values)
        self.recorder.event("eval", {"when": when, **values, "is_best": is_best})

    def _keep(self, values: dict[str, Any]) -> None:
        """Save the adapter as the best, with what `generate` and `evaluate` need.

        Where the disk does not take it the one before stays, and the training goes on.
        """
        place, is_writer = self._best_dir, self.trained.world.rank == 0
        draft = place.with_name(checkpoint_store.BEST_DRAFT) / checkpoint_store.BEST_DIR
        try:
            self.save(dataclasses.replace(self.cfg, output_dir=str(draft)))
            if is_writer:
                atomic.write(draft / RUN_CONFIG, (place.parent / RUN_CONFIG).read_bytes())
                atomic.write_json(draft / EVALUATION, values)
                atomic.commit(draft, place)
        except OSError as error:
            words = f"the best adapter so far could not be saved ({error.strerror or error})"
            self.recorder.say(f"warning   {words}; the training goes on")
        if is_writer:
            shutil.rmtree(draft.parent, ignore_errors=True)

    @property
    def _best_dir(self) -> Path:
        return Path(self.cfg.resolved_output_dir) / checkpoint_store.BEST_DIR

    def _ask(self, when: str) -> None:
        texts = self.answers[self.num_done] = list[str]()
        prompts, is_silent = self.data.prompts, self.trained.world.rank > 0
        with cli.Progress("answers", len(prompts), "prompts", is_silent) as progress:
            for prompt in prompts:
                texts.append(self.answer(prompt))
                values = {"prompt": prompt.shown, "answer": texts[-1], "expected": prompt.expected}
                self.recorder.event("sample", {"when": when, "step": self.num_done, **values})
                progress.update()

    def _recall(self) -> None:
        """What the run saw before it was stopped: its record, as rank 0 has cut it."""
        events = [line for line in self.recorder.resumed.lines if "event" in line]
        for event in self.trained.world.gather_objects(events)[0]:
            loss, step = event.get("loss"), event.get("step", 0)
            if event["event"] == "eval" and loss is not None:
                self.losses[step] = loss
                self.accuracies |= {step: event["accuracy"]} if "accuracy" in event else {}
                self.best = (loss, step) if event.get("is_best") else self.best
            elif event["event"] == "sample" and event.get("when") == "before":
                self.answers.setdefault(0, []).append(event["answer"])
