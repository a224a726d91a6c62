"""What a run asks the model before and after training: the user's questions, or held-out rows."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsdp_qlora import config, errors
from fsdp_qlora.data import chats, row_formats, sources
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.data.tokenizer import Refused, TextTokenizer
from fsdp_qlora.data.tokens import Sample

NUM_HELD_OUT = 3
PROBE = "Which question?"
TEXT_TOKENS = 32  # of running text, in which nothing is a question


class Prompt(NamedTuple):
    """A text that the model continues.

    Args:
        shown: what the user wrote, or the text itself.
        ids: its tokens, in the form of the training rows.
        expected: the answer of the data, or None.
    """

    shown: str
    ids: tuple[int, ...]
    expected: str | None = None


def has_prompts(cfg: config.TrainConfig) -> bool:
    """Return whether the user asks something of their own.

    Args:
        cfg: the run.
    """
    return cfg.sample_prompt is not None or cfg.sample_prompts not in ("auto", "off")


def choose_prompts(
    cfg: config.TrainConfig, ready: PreparedData, tokenizer: TextTokenizer | None
) -> tuple[Prompt, ...]:
    """Find the prompts of a run.

    Args:
        cfg: sample_prompt, sample_prompts, sample_tokens.
        ready: the data; its held-out rows are asked where the user names no prompt.
        tokenizer: None where there is no text.

    Returns:
        The prompts; none without a tokenizer.

    Raises:
        UserError: a file that cannot be read, a line of it that is no prompt, or a prompt that
            the template cannot render.
    """
    if tokenizer is None:
        return ()
    asked = list[tuple[str, Any, dict]]()
    asked += [("--sample_prompt", cfg.sample_prompt, {})] if cfg.sample_prompt is not None else []
    if cfg.sample_prompts not in ("auto", "off"):
        asked += read_prompts(Path(cfg.sample_prompts), "--sample_prompts")
    if asked or cfg.sample_prompts == "off" or ready.formatter is None:
        return tuple(_ask(*prompt, ready, tokenizer) for prompt in asked)
    number = min(NUM_HELD_OUT, len(ready.held_out))
    chosen = np.random.default_rng(cfg.seed).permutation(len(ready.held_out))[:number]
    samples = (ready.held_out[index].rows()[0] for index in sorted(chosen.tolist()))
    around = _around_question(ready, tokenizer)
    return tuple(_ask_row(sample, tokenizer, cfg.sample_tokens, around) for sample in samples)


def _around_question(ready: PreparedData, tokenizer: TextTokenizer) -> tuple[str, str]:
    """What the template of a run writes before and behind a question."""
    text = PROBE
    if ready.formatter is not None:
        with contextlib.suppress(Refused):
            text = ready.formatter.ask(PROBE, ready.example)
    core = tokenizer.core
    before, _, after = core.decode(core.encode(text, add_special_tokens=False).ids).partition(PROBE)
    return before.strip(), after.strip()


def _question(text: str, around: tuple[str, str]) -> str:
    """The question in a rendered prompt; of several turns the last."""
    before, after = around
    text = text.strip().removesuffix(after)
    for head in filter(None, (before, before.rpartition("\n")[2])):
        start, found, question = text.rpartition(f"{head}\n" if f"{head}\n" in text else head)
        if found and (head == before or start.endswith("\n")):
            return question.strip()
    return text.strip()


def read_prompts(path: Path, flag: str) -> list[tuple[str, Any, dict]]:
    """Read a file of prompts: one a line, or JSONL.

    Args:
        path: its name.
        flag: that names it.

    Returns:
        Place, question (a text, or the messages of a conversation) and row of every line that is
        not empty.

    Raises:
        UserError: it cannot be read, is empty, or a line is no prompt.
    """
    remedy = "give a file with one prompt a line" + ", auto or off" * (flag == "--sample_prompts")
    path = path.expanduser()
    lines = sources.read_own_file(path, flag, remedy).splitlines()
    found = [(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise errors.UserError(f"{flag} {path}", "is empty", remedy)
    is_json, asked = path.suffix.lower() in (".jsonl", ".json", ".ndjson"), []
    for place, line in found:
        row = sources.parse_json(line) if is_json else line
        whole = row if isinstance(row, dict) else {"prompt": row}
        asked.append((place, _parse_prompt(place, row), whole))
    return asked


def _parse_prompt(place: str, value: Any) -> Any:
    """A text, or the messages of a conversation."""
    value = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    is_chat = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if not value or not (isinstance(value, str) or is_chat):
        remedy = 'write "text", {"prompt": "text"} or {"messages": [...]}'
        raise errors.UserError(place, "is no prompt in JSON", remedy)
    if not is_chat:
        return value
    with errors.one_line_of(place, "correct it", kinds=Refused):
        return chats.read_messages("messages", value)


def _ask(at: str, asked: Any, row: dict, ready: PreparedData, tokenizer: TextTokenizer) -> Prompt:
    """A prompt as the rows have it; the template of a chat writes the beginning of text itself."""
    is_chat, text = isinstance(asked, list), asked
    shown = str(asked[-1].get("content", "")) if is_chat else asked
    rule: Any = {"rule": "cannot be asked ({})", "kinds": Refused}
    with errors.one_line_of(f"{at} {shown}", "leave it out", **rule):
        if ready.formatter is not None:
            text = ready.formatter.ask(asked, ready.example, **row_formats.chat_values(row))
    if is_chat or (ready.formatter is not None and ready.formatter.is_chat(ready.example)):
        return Prompt(shown, tuple(tokenizer.encode([text], False)[0].ids))
    bos = tokenizer.names.get("bos_token", "") if tokenizer.adds_bos else ""
    return Prompt(shown, tuple(tokenizer.encode([text.removeprefix(bos)], True)[0].ids))


def _ask_row(row: Sample, tokenizer: TextTokenizer, most: int, around: tuple[str, str]) -> Prompt:
    """What stands before the first answer of a row; the beginning of running text."""
    flags = np.append(row.is_trained, False)
    flags[0] = False
    first = int(flags.argmax())
    last = first + int((~flags[first:]).argmax())
    if first <= 1:
        around, first = ("", ""), min(TEXT_TOKENS, max(len(row.input_ids) // 2, 1))
        last = min(last, first + most)
    ids, decode = row.input_ids.tolist(), tokenizer.core.decode
    shown, expected = _question(decode(ids[:first]), around), decode(ids[first:last]).strip()
    return Prompt(shown, tuple(ids[:first]), expected)
