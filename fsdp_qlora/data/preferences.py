"""Rows of preferences: a prompt with a chosen and a rejected answer, or an answer and a label.

Such a row becomes one row of a usual format for each answer, which is written, masked and checked
as any other. Source of the forms: TRL's dataset formats, LLaMA-Factory's, UltraFeedback, HH-RLHF.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fsdp_qlora.data import chats, row_formats, tokens
from fsdp_qlora.data.tokenizer import Refused, Text

if TYPE_CHECKING:
    import torch

# Columns of a prompt in text -> that of the answer in rows of the same kind.
ASKED = {"prompt": "completion", "question": "answer", "instruction": "output"}
MORE = (row_formats.KWARGS, row_formats.HISTORY, "input", "context")
BESIDE = (*chats.SYSTEM_COLUMNS, *row_formats.TOOL_COLUMNS, *MORE)
PAIRS, LABELS = row_formats.PAIRS, row_formats.LABELS
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # of HH-RLHF
WANTED = {2: "prompt+chosen+rejected", 1: "prompt+completion+label | prompt+chosen+rejected"}


@dataclass(frozen=True)
class PreferenceFormatter(row_formats.RowFormatter):
    """How rows of preferences become text.

    Args:
        num_answers: of a row: 2 = chosen and rejected; 1 = one with a label, or both of a pair.
    """

    num_answers: int = 2

    def problem(self, row: object) -> str | None:
        """Say what keeps a value from being a row of preferences, see RowFormatter."""
        if not isinstance(row, dict):
            return f"is {'running text' if hasattr(row, 'text') else chats.kind(row)}"
        try:
            sides = self.sides(row)
        except Refused as refusal:
            return str(refusal)
        faults = (super(PreferenceFormatter, self).problem(side) for side, _ in sides)
        return next(filter(None, faults), None)

    def unused(self, row: object) -> list[str]:
        """Return the columns that nothing uses, see RowFormatter."""
        if not isinstance(row, dict):
            return []
        side, own = self.sides(row)[0][0], {"chosen", "completion", "output", "answer"}
        used = {*itertools.chain(*PAIRS, LABELS), *ASKED, *chats.CHAT_COLUMNS, *own}
        found = [name for name in super().unused(side) if name in row or " " in name]
        others = (n for n, v in row.items() if n not in used | {*side} and v not in (None, "", []))
        return [*found, *others]

    def name(self, row: Any) -> str:
        """Return how a row is treated, see RowFormatter."""
        what = "pairs" if row_formats.suggested(row) == "dpo" else "labelled answers"
        return f"{super().name(self.sides(row)[0][0])}, {what}"

    def is_chat(self, row: object) -> bool:
        """Return whether a row goes through the chat template."""
        return isinstance(row, dict) and super().is_chat(self.sides(row)[0][0])

    def ask(self, question: str | list[dict], example: object, **values: Any) -> str:
        """Put a new question into the form of the rows, see RowFormatter."""
        side = self.sides(example)[0][0] if isinstance(example, dict) else None
        return super().ask(question, side, **values)

    def render(self, row: dict) -> list[Text]:
        """Turn a row into the text of each of `sides`, what is compared marked.

        Args:
            row: one without a problem.

        Raises:
            Refused: a template cannot render it, or not as one text.
        """
        return [self._one(side) for side, _ in self.sides(row)]

    def answers(self, row: dict) -> list[int | None]:
        """Return what each text of `render` is: 0 of a pair, else 1 = desirable, -1 = not."""
        return [sign for _, sign in self.sides(row)]

    def _one(self, side: dict) -> Text:
        texts = super().render(side)
        if len(texts) > 1:
            rule = "the chat template writes earlier turns in another way"
            raise Refused(f"{rule}; --train_on last compares the last answers")
        is_chat = self._as_chat(self._find(side))
        return texts[0] if is_chat else texts[0]._replace(spans=texts[0].spans[-1:])

    def sides(self, row: dict) -> list[tuple[dict, int]]:
        """Return a row of a usual format for each answer.

        Args:
            row: of preferences.

        Returns:
            Each with 0 for those of a pair, else 1 = desirable, -1 = not.

        Raises:
            Refused: it holds no answers to compare.
        """
        names = next((names for names in PAIRS if all(name in row for name in names)), None)
        if names is not None:
            signs = (0, 0) if self.num_answers == 2 else (1, -1)
            return list(zip(_pair(row, names), signs, strict=True))
        label = next((name for name in LABELS if name in row), None)
        if self.num_answers == 2 or label is None:
            shown = ", ".join(map(str, row))[:80] or "none"
            raise Refused(f"has fields {shown} (want {WANTED[self.num_answers]})")
        if row[label] not in (0, 1) or isinstance(row[label], float):
            raise Refused(f'field "{label}" is {chats.kind(row[label])} (want true or false)')
        side = row_formats.without(row, LABELS)
        if "prompt" not in side and any(side.get(name) for name in chats.CHAT_COLUMNS):
            messages = chats.conversation(side)
            kept = [name for name in side if name in BESIDE and name not in chats.SYSTEM_COLUMNS]
            beside = {name: side[name] for name in kept}
            side = beside | {"prompt": messages[:-1], "completion": messages[-1:]}
        return [(side, 1 if row[label] else -1)]


def _pair(row: dict, names: Sequence[str]) -> list[dict]:
    """The row with the chosen answer and that with the rejected one."""
    beside = {name: row[name] for name in BESIDE if name in row}
    answers: list[Any] = [row[n] if not isinstance(row[n], dict) else [row[n]] for n in names]
    asked = next((name for name in ASKED if row.get(name) not in (None, "", [])), "")
    prompt: Any = row.get(asked or next((n for n in chats.CHAT_COLUMNS if row.get(n)), ""))
    if all(isinstance(answer, str) for answer in answers):
        if prompt is None:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False))
            head = "".join(letter for letter, _ in same)
            if not TURN.match(head):
                head = head.removesuffix(" ")  # it belongs to the word behind it
                rests = [answer[len(head) :] for answer in answers]
                return [beside | {"prompt": head, "completion": rest} for rest in rests]
            answers = [_turns(answer) for answer in answers]
        else:
            asked = asked if isinstance(prompt, str) else "prompt"
            return [beside | {asked: prompt, ASKED[asked]: answer} for answer in answers]
    both = [chats.read_messages(n, value) for n, value in zip(names, answers, strict=True)]
    if isinstance(prompt, str):
        more = row.get("input") if asked == "instruction" else None
        text = "\n\n".join(filter(None, (prompt, more)))
        beside.pop("input", None)
        prompt = [{"role": "user", "content": text}]
    start = chats.read_messages("prompt", prompt) if prompt else []
    if start and all(messages[: len(start)] == start for messages in both):  # they repeat it
        both = [messages[len(start) :] for messages in both]
    elif not start or any(messages[0]["role"] in ("system", "user") for messages in both):
        pairs = enumerate(zip(*both, strict=False))
        num = next((i for i, (one, other) in pairs if one != other), min(map(len, both)) - 1)
        start, both = both[0][:num], [messages[num:] for messages in both]
    if not start or not all(both):
        raise Refused(f'"{names[0]}" and "{names[1]}" have no prompt in common')
    return [beside | {"prompt": start, "completion": messages} for messages in both]


def _turns(text: str) -> list[dict]:
    """Messages of a conversation as HH-RLHF writes it."""
    _, *parts = TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": said.strip()} for role, said in pairs]


class Sides(NamedTuple):
    """The answers in a batch, in the order of its rows: chosen, rejected, chosen ...

    Args:
        counts: targets in each row.
        is_answer: bool [N] over all targets; None: all are of an answer.
        signs: of single answers, 1 = desirable, -1 = not; empty for pairs.
        hashes: uint64, of the samples: what is known of one is found by its hash.
    """

    counts: tuple[int, ...]
    is_answer: "torch.Tensor | None" = None
    signs: tuple[int, ...] = ()
    hashes: np.ndarray = np.zeros(0, np.uint64)

    @classmethod
    def of(cls, rows: Sequence[tokens.Sample], hashes: np.ndarray | None = None) -> "Sides":
        """Those of some rows.

        Args:
            rows: from `Sample.rows`.
            hashes: of the samples.
        """
        import torch

        is_answer = None
        if any(row.is_answer is not None for row in rows):
            parts = [row.is_trained if row.is_answer is None else row.is_answer for row in rows]
            kept = [part[1:][row.is_trained[1:]] for part, row in zip(parts, rows, strict=True)]
            is_answer = torch.from_numpy(np.concatenate(kept))
        own = np.zeros(0, np.uint64) if hashes is None else hashes
        counts = tuple(row.num_trained_tokens for row in rows)
        return cls(counts, is_answer, tuple(row.label for row in rows if row.label), own)
