"""Rows to text: by the kind of row, by a chat template, or by a template of the user's own."""

import json
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.data import shapes
from fsdp_qlora.data.chat import Chat, Refused, Template, Text
from fsdp_qlora.data.rows import Piece
from fsdp_qlora.data.shapes import ASSISTANT, SHAPES, Shape
from fsdp_qlora.errors import UserError

CHAT, BLOCKS, LABEL = "chat", "blocks", "label"
NAMES = tuple(dict.fromkeys([*(shape.name for shape in SHAPES), BLOCKS]))
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


def render(row: dict) -> tuple[str, str]:
    """Turn a row of question and answer, or of text, into what is given and what is learned.

    Args:
        row: a row for which `shapes.problem` returns None, and which has such a form.

    Returns:
        (prompt, completion); the prompt of a plain text row is empty.
    """
    shape = shapes.match(row)
    assert shape is not None and shape.pair is not None, f"no pair: {sorted(row)}"
    return shape.pair(row)


@dataclass(frozen=True)
class Writer:
    """How the rows of a run become text.

    Args:
        chat: for conversations.
        train_on: "all", "assistant" (or "completion": every answer) or "last" (the last answer).
        system: stands before every conversation or prompt in place of its own; None for its own.
        shape_name: one of NAMES that every row must have; None: each row's columns tell.
        row_template: Jinja over a row's columns; None for none.
        format: (text, column) pairs, the last column being what is learned; empty for none.
    """

    chat: Chat
    train_on: str = "assistant"
    system: str | None = None
    shape_name: str | None = None
    row_template: Template | None = None
    format: tuple[tuple[str, str | None], ...] = ()

    def problem(self, row: object) -> str | None:
        """Say what keeps a value read from a file from being a row of this run.

        Args:
            row: anything that JSON or parquet can hold, or a piece of running text.

        Returns:
            None for a good row, else a few words.
        """
        if isinstance(row, Piece):
            is_text = self.shape_name in (None, BLOCKS, "text") and not self.has_own_template
            return None if is_text else "is running text (the template wants columns)"
        if self.has_own_template:
            return self._problem_of_columns(row)
        if self.shape_name != CHAT:
            return shapes.problem(row, self._shape())
        fault, shape = shapes.problem(row), shapes.match(row) if isinstance(row, dict) else None
        is_chat = shape is not None and shape.messages is not None
        return fault or (None if is_chat else "is no conversation (want messages, or an answer)")

    @property
    def has_own_template(self) -> bool:
        """Whether the user wrote how columns become text."""
        return self.row_template is not None or bool(self.format)

    def is_block(self, row: object) -> bool:
        """Return whether a row is running text that is cut into blocks of the context's length."""
        if isinstance(row, Piece):
            return True
        if self.has_own_template or self.shape_name not in (None, BLOCKS):
            return False
        shape = shapes.match(row) if isinstance(row, dict) else None
        is_text = shape is not None and shape.name == "text"
        is_dialogue = isinstance(row, dict) and ASSISTANT in str(row.get("text"))
        return self.shape_name == BLOCKS or (is_text and not is_dialogue)

    def is_ids(self, row: object) -> bool:
        """Return whether a row holds token ids already."""
        found = self._find(row) if isinstance(row, dict) and not self.has_own_template else None
        return found is not None and found.name == "tokens"

    def name(self, row: object) -> str:
        """Return how a row is treated, in a word or two for the user."""
        if self.has_own_template or not isinstance(row, dict):
            return "own template" if self.has_own_template else BLOCKS
        name = self._find(row).name
        if self.is_block(row):
            return BLOCKS
        return f"{name} as chat" if self._as_chat(row) and name != CHAT else name

    def write(self, row: dict) -> list[Text]:
        """Turn a row into text and say which parts of it are learned.

        Args:
            row: one without a problem that is neither a block nor ids.

        Returns:
            One text; several where a chat template writes earlier turns in another way.

        Raises:
            Refused: a template cannot render it.
        """
        texts = self._write(row)
        if not all(shapes.is_unicode(text.text) for text in texts):
            raise Refused("it holds half a surrogate pair (want valid Unicode)")
        if self.train_on == "all":
            return [text._replace(spans=((0, len(text.text)),)) for text in texts]
        return texts

    def ask(self, question: str, example: object) -> str:
        """Put a new question into the shape of the rows that are trained on.

        Args:
            question: what the model is asked.
            example: any row of the training data without a problem.

        Returns:
            The prompt whose continuation is the answer.

        Raises:
            Refused: the chat template cannot render it.
        """
        is_row = isinstance(example, dict) and not self.is_block(example)
        if not is_row or self.has_own_template or self.is_ids(example):
            return question
        assert isinstance(example, dict)
        shape = self._find(example)
        if self._as_chat(example):
            first = [{"role": "system", "content": shapes.LABEL_PROMPT}] * (shape.name == LABEL)
            return self.chat.prompt(
                self._with_system([*first, {"role": "user", "content": question}])
            )
        assert shape.pair is not None
        text = question
        if ASSISTANT in str(example.get("text", "")):
            text = f"### Human: {question}\n{ASSISTANT}"
        prompt, completion = shape.pair(dict.fromkeys(shape.required, "") | {shape.question: text})
        return self._system_text() + (prompt or completion)

    def _write(self, row: dict) -> list[Text]:
        if self.row_template is not None:
            text, marks = self.row_template.render(**{str(key): row[key] for key in row})
            has_markup = "bos_token" in self.row_template.variables
            return [Text(text, marks or ((0, len(text)),), has_markup)]
        if self.format:
            return [self._fill(row)]
        if self._as_chat(row):
            return self._converse(row)
        shape = self._find(row)
        assert shape.pair is not None
        prompt, completion = shape.pair(row)
        start = len(self._system_text() + prompt)
        text = self._system_text() + prompt + completion
        return [Text(text, ((start, len(text)),) if completion.strip() else ())]

    def _converse(self, row: dict) -> list[Text]:
        shape = self._find(row)
        assert shape.messages is not None
        messages, tools = self._with_system(shape.messages(row)), _tools(row)
        said = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
            and (message["content"].strip() or message.get("tool_calls"))
        ]
        turns = said[-1:] if self.train_on == "last" else said
        if self.train_on == "all" or not turns:
            return [Text(self.chat.whole(messages, tools), (), has_markup=True)]
        return self.chat.write(messages, turns, tools)

    def _fill(self, row: dict) -> Text:
        text, start = "", 0
        for literal, column in self.format:
            text, start = text + literal, len(text + literal) if column else start
            text += str(row[column]) if column else ""
        return Text(text, ((start, len(text)),) if text[start:].strip() else ())

    def _problem_of_columns(self, row: object) -> str | None:
        if not isinstance(row, dict):
            return f"is {shapes.kind(row)} (want an object with named fields)"
        for _, column in self.format:
            if column is not None and column not in row:
                return f'has no field "{column}", which the template names'
            if column is not None and not isinstance(row[column], str | int | float):
                return f'field "{column}" is {shapes.kind(row[column])} (want text)'
        return None

    def _shape(self) -> Shape | None:
        name = "text" if self.shape_name == BLOCKS else self.shape_name
        return next((shape for shape in SHAPES if shape.name == name), None)

    def _find(self, row: dict) -> Shape:
        found = shapes.match(row) if self.shape_name in (None, CHAT) else self._shape()
        assert found is not None, f"row of no kind: {sorted(row)}"
        return found

    def _as_chat(self, row: dict) -> bool:
        shape = self._find(row)
        return shape.messages is not None and (self.shape_name == CHAT or shape.pair is None)

    def _with_system(self, messages: list[dict]) -> list[dict]:
        if self.system is None:
            return messages
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.system}, *rest]

    def _system_text(self) -> str:
        return f"{self.system}\n\n" if self.system else ""


def choose(
    template: str | None,
    chat: Chat,
    names: Mapping[str, str],
    train_on: str = "assistant",
    system: str | None = None,
) -> Writer:
    """Find out what --template means.

    Args:
        template: a name in NAMES, a Jinja file, text with {columns}, or None for what fits a row.
        chat: the tokenizer's chat template.
        names: texts of its special tokens by name.
        train_on: what is learned.
        system: system prompt, or None.

    Returns:
        What turns rows into text.

    Raises:
        UserError: it is none of these, or wrong.
    """
    if template is None or template == "auto":
        return Writer(chat, train_on, system)
    if template in NAMES:
        return Writer(chat, train_on, system, shape_name=template)
    if template.endswith(JINJA_SUFFIXES):
        source = _read(Path(template).expanduser())
        if "messages" in Template(source, names, template).variables:
            chat = Chat(Template(source, names, template))
            return Writer(chat, train_on, system, shape_name=CHAT)
        own = Template(source, names, template, is_strict=True)
        return Writer(chat, train_on, system, row_template=own)
    if "{" in template:
        return Writer(chat, train_on, system, format=_parse_format(template))
    remedy = f"one of {' '.join(NAMES)}, a .jinja file, or text with {{columns}}"
    raise UserError(f"--template {template}", "is no template", f"give {remedy}")


def _tools(row: dict) -> Any:
    """What a chat template shows as tools; some data sets hold them as JSON in text."""
    tools = row.get("tools")
    if not isinstance(tools, str) or not tools.strip():
        return tools or None
    try:
        return json.loads(tools)
    except ValueError as error:
        raise Refused('field "tools" is not JSON') from error


def _read(path: Path) -> str:
    if os.path.lexists(path) and not os.path.isfile(path):  # a pipe would wait
        raise UserError(f"--template {path}", "is no regular file", "give a Jinja file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"--template {path}", reason, "give a Jinja file") from error


def _parse_format(template: str) -> tuple[tuple[str, str | None], ...]:
    got = f"--template {template}"
    try:
        parts = list(string.Formatter().parse(template.replace("\\n", "\n")))
    except ValueError as error:
        raise UserError(got, str(error), "write {column}, and {{ for a brace") from error
    for _, column, spec, conversion in parts:
        if column == "" or spec or conversion or any(sign in (column or "") for sign in "[]"):
            raise UserError(got, "want the name of a column in each pair of braces", "correct it")
    if all(column is None for _, column, _, _ in parts):
        raise UserError(got, "names no {column}", "write the column to learn last")
    return tuple((literal, column) for literal, column, _, _ in parts)
