"""What a row is, told by its columns: which must be there, what they may hold, what they ask."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.errors import one_line

ASSISTANT = "### Assistant:"
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
LABEL_PROMPT = "Find what the text names and answer with the labels as JSON."
NOT_TRAINED = -100


@dataclass(frozen=True)
class Shape:
    """One kind of row.

    Args:
        name: as --template takes it.
        required: columns that make a row of this kind.
        optional: columns that may be absent, null or empty.
        question: the column that a new question goes into.
        check: row -> what is wrong with its columns, or None; told what is required and optional.
        pair: row -> (prompt, completion) without a chat template; None where there is no such form.
        messages: row -> conversation; None for text that is no conversation.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    question: str
    check: Callable[[dict, "Shape"], str | None]
    pair: Callable[[dict], tuple[str, str]] | None
    messages: Callable[[dict], list[dict]] | None


def match(row: dict) -> Shape | None:
    """Return the first kind whose columns a row has, or None."""
    return _match(frozenset(row))


@functools.lru_cache(1024)
def _match(names: frozenset) -> Shape | None:
    return next((shape for shape in SHAPES if names.issuperset(shape.required)), None)


def problem(row: object, shape: Shape | None = None) -> str | None:
    """Say what keeps a value read from a file from being a row.

    Args:
        row: anything that JSON or parquet can hold.
        shape: what it shall be; None for any kind.

    Returns:
        None for a good row, else a few words such as 'field "output" is null (want text)'.
    """
    if not isinstance(row, dict):
        return f"is {kind(row)} (want an object with named fields)"
    found = match(row) if shape is None else shape
    missing = [name for name in found.required if name not in row] if found else []
    if found is None or missing:
        wanted = [shape] if shape else SHAPES
        kinds = " | ".join(dict.fromkeys("+".join(s.required) for s in wanted))
        names = one_line(", ".join(map(str, row)))[:80]
        return f"has fields {names or 'none'} (want {kinds})"
    return found.check(row, found)


def kind(value: object) -> str:
    """Return what a value is, in words of people who know JSON."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def conversation(row: dict) -> list[dict]:
    """Return the messages of a chat row as {"role", "content", ...}.

    Args:
        row: a row of the shape "chat" without a problem; `system` stands before the messages.
    """
    messages = [_message(entry) for entry in row.get("messages") or row["conversations"]]
    system = row.get("system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _message(entry: dict) -> dict:
    """ShareGPT's from and value become role and content; empty fields of a table are left out."""
    rest = {k: v for k, v in entry.items() if v is not None and k not in ("from", "value")}
    content = entry.get("content", entry.get("value"))
    if isinstance(content, list):  # parts, all of them text
        content = "".join(part["text"] for part in content)
    role = ROLES[entry["role"] if "role" in entry else entry["from"]]
    return {**rest, "role": role, "content": "" if content is None else content}


def _check_text(row: dict, shape: Shape) -> str | None:
    for name in shape.required + shape.optional:
        value = row.get(name)
        if value is None and name in shape.optional:
            continue
        if fault := _check_string(f'field "{name}"', value):
            return fault
    return None


def _check_string(what: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"{what} is {kind(value)} (want text)"
    return None if is_unicode(value) else f"{what} holds half a surrogate pair (want valid Unicode)"


def _check_label(row: dict, shape: Shape) -> str | None:
    if row["label"] is None:
        return 'field "label" is null (want text, a list or an object)'
    try:
        fault = _check_string('field "label"', json.dumps(row["label"], ensure_ascii=False))
    except (TypeError, ValueError):
        fault = 'field "label" cannot be written as JSON'
    return fault or _check_string('field "text"', row["text"])


def _check_chat(row: dict, shape: Shape) -> str | None:
    name = "messages" if row.get("messages") is not None else "conversations"
    entries = row.get(name)
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else kind(entries)
        return f'field "{name}" is {what} (want a list of messages)'
    if row.get("system") is not None and (fault := _check_string('"system"', row["system"])):
        return fault
    numbered = enumerate(entries, 1)
    return next((f"message {i} {fault}" for i, e in numbered if (fault := _check_message(e))), None)


def _check_message(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return f"is {kind(entry)} (want an object with role and content)"
    role = entry.get("role", entry.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        return f"has role {one_line(str(role))[:30]} (want system, user, assistant or tool)"
    content = entry.get("content", entry.get("value"))
    if isinstance(content, list):
        are_texts = all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
        content = "".join(p["text"] for p in content) if are_texts else content
    if content is None and entry.get("tool_calls"):
        return None
    return _check_string("content", content)


def _check_ids(row: dict, shape: Shape) -> str | None:
    ids = row["input_ids"]
    labels, mask = row.get("labels"), row.get("attention_mask")
    for name, values in {"input_ids": ids, "labels": labels, "attention_mask": mask}.items():
        if values is None and name != "input_ids":
            continue
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            return f'field "{name}" is not a list of whole numbers'
        if len(values) != len(ids):
            return f'field "{name}" has {len(values)} entries and "input_ids" {len(ids)}'
    if any(not 0 <= number < 2**31 for number in ids):
        return 'field "input_ids" holds a number that is no token'
    pairs = zip(ids, labels or (), strict=False)
    if any(label not in (number, NOT_TRAINED) for number, label in pairs):
        return f'field "labels" differs from "input_ids" (want the same number, or {NOT_TRAINED})'
    return None


def _alpaca(row: dict) -> tuple[str, str]:
    """Source: the prompt format of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca)."""
    context = row.get("input") or ""
    paired = ", paired with an input that provides further context" if context else ""
    prompt = (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n"
    )
    if context:
        prompt += f"### Input:\n{context}\n\n"
    return prompt + "### Response:\n", row["output"]


def _question(row: dict) -> tuple[str, str]:
    context = f"###Context:\n{row['context']}\n" if row.get("context") else ""
    return f"{context}###Question:\n{row['question']}\n###Answer:\n", row["answer"]


def _prompt(row: dict) -> tuple[str, str]:
    return row["prompt"], row["completion"]


def _dialogue(row: dict) -> tuple[str, str]:
    """All of the text is learned; in a dialogue (guanaco), all after the first answer begins."""
    before, marker, after = row["text"].partition(ASSISTANT)
    return (before + marker, after) if marker else ("", before)


def _ask(given: Callable[[dict], str], answer: Callable[[dict], str], system: str = "") -> Any:
    """Make a function row -> conversation of one question and its answer."""
    first = [{"role": "system", "content": system}] if system else []

    def messages(row: dict) -> list[dict]:
        question = {"role": "user", "content": given(row)}
        return [*first, question, {"role": "assistant", "content": answer(row)}]

    return messages


def _label(row: dict) -> str:
    label = row["label"]
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)


def _join(*parts: Any) -> str:
    return "\n\n".join(part for part in parts if part)


SHAPES = (
    Shape("tokens", ("input_ids",), ("labels", "attention_mask"), "", _check_ids, None, None),
    Shape("chat", ("messages",), (), "", _check_chat, None, conversation),
    Shape("chat", ("conversations",), (), "", _check_chat, None, conversation),
    Shape(
        "alpaca",
        ("instruction", "output"),
        ("input",),
        "instruction",
        _check_text,
        _alpaca,
        _ask(lambda row: _join(row["instruction"], row.get("input")), lambda row: row["output"]),
    ),
    Shape(
        "question",
        ("question", "answer"),
        ("context",),
        "question",
        _check_text,
        _question,
        _ask(lambda row: _join(row.get("context"), row["question"]), lambda row: row["answer"]),
    ),
    Shape(
        "prompt",
        ("prompt", "completion"),
        (),
        "prompt",
        _check_text,
        _prompt,
        _ask(lambda row: row["prompt"], lambda row: row["completion"]),
    ),
    Shape(
        "label",
        ("text", "label"),
        (),
        "text",
        _check_label,
        None,
        _ask(lambda row: row["text"], _label, LABEL_PROMPT),
    ),
    Shape("text", ("text",), (), "text", _check_text, _dialogue, None),
)
