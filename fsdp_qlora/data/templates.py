"""A row's columns decide how it becomes a prompt (masked) and a completion (trained)."""

from collections.abc import Callable
from dataclasses import dataclass

ASSISTANT = "### Assistant:"


@dataclass(frozen=True)
class Template:
    """One shape of row.

    Args:
        required: columns that make a row of this shape; each holds text.
        optional: columns that may be absent, null or empty.
        question: the column that a new question goes into.
        render: row -> (prompt, completion).
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    question: str
    render: Callable[[dict], tuple[str, str]]


def render(row: dict) -> tuple[str, str]:
    """Turn a row into the text that is given and the text that is learned.

    Args:
        row: a row for which `problem` returns None.

    Returns:
        (prompt, completion); the prompt of a plain text row is empty.
    """
    return _find(row).render(row)


def ask(question: str, example: dict) -> str:
    """Put a new question into the shape of the rows that are trained on.

    Args:
        question: what the model is asked.
        example: any row of the training data.

    Returns:
        The prompt whose continuation is the answer.
    """
    template = _find(example)
    text = question
    if ASSISTANT in str(example.get("text", "")):
        text = f"### Human: {question}\n{ASSISTANT}"
    prompt, completion = template.render(
        dict.fromkeys(template.required, "") | {template.question: text}
    )
    return prompt or completion


def problem(row: object) -> str | None:
    """Say what keeps a value read from a file from being a row.

    Args:
        row: anything that JSON or parquet can hold.

    Returns:
        None for a good row, else a few words such as 'field "output" is null (want text)'.
    """
    if not isinstance(row, dict):
        return f"is {_kind(row)} (want an object with named fields)"
    template = _match(row)
    if template is None:
        shapes = " | ".join("+".join(t.required) for t in TEMPLATES)
        return f"has fields {', '.join(map(str, row))[:80] or 'none'} (want {shapes})"
    for name in template.required + template.optional:
        value = row.get(name)
        if value is None and name in template.optional:
            continue
        if not isinstance(value, str):
            return f'field "{name}" is {_kind(value)} (want text)'
        if not _is_unicode(value):
            return f'field "{name}" holds half a surrogate pair (want valid Unicode)'
    return None


def _match(row: dict) -> Template | None:
    return next((t for t in TEMPLATES if all(name in row for name in t.required)), None)


def _find(row: dict) -> Template:
    template = _match(row)
    assert template is not None, f"row without a template: {sorted(row)}"
    return template


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _text(row: dict) -> tuple[str, str]:
    """All of the text is learned; in a dialogue (guanaco), all after the first answer begins."""
    before, marker, after = row["text"].partition(ASSISTANT)
    return (before + marker, after) if marker else ("", before)


TEMPLATES = (
    Template(("instruction", "output"), ("input",), "instruction", _alpaca),
    Template(("question", "answer"), ("context",), "question", _question),
    Template(("prompt", "completion"), (), "prompt", _prompt),
    Template(("text",), (), "text", _text),
)
