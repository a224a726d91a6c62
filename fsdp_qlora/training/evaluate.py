"""Evaluation before, while and after a model is trained: held-out loss, answers, the best."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, cli
from fsdp_qlora.checkpoint_store import BEST_DIR, BEST_DRAFT
from fsdp_qlora.checkpoint_store import CONFIG as RUN_CONFIG
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import Data
from fsdp_qlora.data.prompts import Prompt
from fsdp_qlora.errors import one_line
from fsdp_qlora.training import loop
from fsdp_qlora.training.metrics import Recorder
from fsdp_qlora.training.optim import Trained

EVALUATION = "evaluation.json"
LARGEST_EXPONENT = 700.0
MOST_CHARS = 600  # of a prompt or an answer on the console


def perplexity(loss: float) -> float:
    """Return exp(loss), a number even where that is out of bounds.

    Args:
        loss: nats per token.
    """
    return math.exp(min(loss, LARGEST_EXPONENT))


def _indented(text: str) -> str:
    """A text below a name of ten characters, with its line breaks."""
    shown = text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} …"
    return "\n          ".join(map(one_line, shown.splitlines()))


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
        answers: of all prompts, by step.
        best: loss and step of the adapter in `best`, or None.
    """

    trained: Trained
    data: Data
    cfg: TrainConfig
    answer: Callable[[Prompt], str]
    save: Callable[[TrainConfig], object]
    recorder: Recorder
    num_done: int = 0
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
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
            loss = self.losses[self.num_done]
            words = f"held-out loss {loss:.3f}, perplexity {perplexity(loss):.2f}"
            self.recorder.say(f"step {self.num_done} {words}")

    def end(self) -> list[str]:
        """Evaluate the trained model; return how it compares with the untrained one, in lines."""
        self._evaluate("after")
        lines = []
        if {0, self.num_done} <= self.losses.keys():
            before, after = self.losses[0], self.losses[self.num_done]
            words = f"loss {before:.3f} -> {after:.3f}, perplexity "
            words += f"{perplexity(before):.2f} -> {perplexity(after):.2f}"
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

    def _evaluate(self, when: str) -> None:
        with self.recorder.tracker.phase("evaluation"):
            if self.data.held_out:
                self._measure(when)
            if when != "step":
                self._ask(when)

    def _measure(self, when: str) -> None:
        loss = loop.evaluate(self.trained.model, self.data.held_out, self.trained.world)
        self.losses[self.num_done] = loss
        is_lowest = loss < (self.best[0] if self.best else math.inf)
        is_best = self.every > 0 and self.num_done > 0 and is_lowest
        values = {"step": self.num_done, "loss": loss, "perplexity": perplexity(loss)}
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
        draft = place.with_name(BEST_DRAFT) / BEST_DIR
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
        return Path(self.cfg.resolved_output_dir) / BEST_DIR

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
                self.best = (loss, step) if event.get("is_best") else self.best
            elif event["event"] == "sample" and event.get("when") == "before":
                self.answers.setdefault(0, []).append(event["answer"])
