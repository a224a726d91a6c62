"""Rows to text: by the format that a row's columns tell, a chat template, or the user's own."""

import functools
import itertools
import json
import operator
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.data import chats, sources
from fsdp_qlora.data.tokenizer import Chat, Refused, Template, Text, find_lost, says_something
from fsdp_qlora.errors import UserError, one_line, one_line_of

ASSISTANT = "### Assistant:"
TOOL_COLUMNS = ("tools", "functions")
KWARGS = "chat_template_kwargs"
HISTORY = "history"
LABEL_PROMPT = "Find what the text names and answer with the labels as JSON."
NOT_TRAINED = -100
NOTHING: tuple[Any, ...] = (None, "", [], {})  # in a column
CHAT, BLOCKS, LABEL, TEXT = "chat", "blocks", "label", "text"
TOKENS, OWN = "tokens", "own template"
# Columns of preferences: a chosen and a rejected answer; whether an answer is a good one.
PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
LABELS = ("label", "kto_tag")


@dataclass(frozen=True)
class RowFormat:
    """One kind of row, told by its columns.

    Args:
        name: as --template takes it.
        required: columns that make a row of this kind; a new question goes into the first.
        optional: columns that may be absent, null or empty.
        pair: row -> (prompt, completion) without a chat template; None where there is no such form.
        messages: row -> conversation; None for text that is no conversation.
        check: raises Refused for a row whose columns are wrong; None: all of them hold text, and
            `history` earlier questions and answers.
        holds: what the first required column must be in a row of this kind.
        answers: the column whose messages alone are learned; None for all.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    pair: Any = None
    messages: Any = None
    check: Any = None
    holds: type = object
    answers: str | None = None

    def has(self, row: dict) -> bool:
        """Return whether a row has the columns of this kind."""
        is_complete = all(name in row for name in self.required)
        return is_complete and (not self.required or isinstance(row[self.required[0]], self.holds))

    def spelled(self, **others: str) -> "RowFormat":
        """Return the same kind with other names of columns.

        Args:
            others: the other name by the usual one, such as output="response".
        """

        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(others.get(name, name) for name in names)

        def through(form: Any) -> Any:
            return form and (lambda row: form(row | {k: row.get(v) for k, v in others.items()}))

        names = renamed(self.required), renamed(self.optional)
        return RowFormat(self.name, *names, through(self.pair), through(self.messages))

    def problem(self, row: dict) -> str | None:
        """Say what is wrong with the columns of a row that has them, or return None."""
        names = self.required + self.optional if self.check is None else ()
        try:
            for name in names:
                if name == HISTORY:
                    chats.earlier_turns(row)
                elif row.get(name) is not None or name in self.required:
                    chats.require_text(f'field "{name}"', row[name])
            if self.check is not None:
                self.check(row)
        except Refused as refusal:
            return str(refusal)
        return None


def match(row: dict, formats: Sequence[RowFormat] = ()) -> RowFormat | None:
    """Return the first format, of some or all, whose columns a row has, or None."""
    return next((found for found in formats or ROW_FORMATS if found.has(row)), None)


def suggested(row: object) -> str:
    """Return the objective that the columns of a row ask for, or "".

    Args:
        row: as it was read.
    """
    if not isinstance(row, dict):
        return ""
    if any(all(name in row for name in names) for names in PAIRS):
        return "dpo"
    found = match(without(row, LABELS)) if any(type(row.get(n)) is bool for n in LABELS) else None
    return "kto" if found is not None and found.name != TEXT else ""


def _is_heeded(name: str, value: Any, role: str) -> bool:
    """Whether a field of a message is empty, or a switch that is used or asks for nothing."""
    is_due = not value or role in ("assistant", chats.CALL)
    return value in NOTHING or (name in chats.SWITCHES and is_due)


def without(row: dict, names: Collection[str]) -> dict:
    """Return a row without some columns."""
    return {name: value for name, value in row.items() if name not in names}


def _check_label(row: dict) -> None:
    if row["label"] is None:
        raise Refused('field "label" is null (want text, a list or an object)')
    try:
        written = json.dumps(row["label"], ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Refused('field "label" cannot be written as JSON') from error
    chats.require_text('field "label"', written)
    chats.require_text('field "text"', row["text"])


def _check_ids(row: dict) -> None:
    ids, labels = row["input_ids"], row.get("labels")
    for name in ("input_ids", "labels", "attention_mask"):
        values = row.get(name)
        if values is None and name != "input_ids":
            continue
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise Refused(f'field "{name}" is not a list of whole numbers')
        if len(values) != len(ids):
            raise Refused(f'field "{name}" has {len(values)} entries and "input_ids" {len(ids)}')
    if any(not 0 <= number < 2**31 for number in ids):
        raise Refused('field "input_ids" holds a number that is no token')
    pairs = zip(ids, labels or (), strict=False)
    if any(label not in (number, NOT_TRAINED) for number, label in pairs):
        want = f"want the same number, or {NOT_TRAINED}"
        raise Refused(f'field "labels" differs from "input_ids" ({want})')


def _alpaca(row: dict) -> tuple[str, str]:
    """Source: the prompt format of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca)."""
    kind = "with_input" if row.get("input") else "without_input"
    return sources.WORDS["alpaca"][kind].format_map(row), row["output"]


def _question(row: dict) -> tuple[str, str]:
    context = f"###Context:\n{row['context']}\n" if row.get("context") else ""
    return f"{context}###Question:\n{row['question']}\n###Answer:\n", row["answer"]


def _dialogue(row: dict) -> tuple[str, str]:
    """All of the text is learned; in a dialogue (guanaco), all after the first answer begins."""
    before, marker, after = row["text"].partition(ASSISTANT)
    return (before + marker, after) if marker else ("", before)


def _ask(*columns: str, system: str = "") -> Callable[[dict], list[dict]]:
    """Make a function row -> conversation: the last column answers, the others are asked."""
    *given, answer = columns
    first = [{"role": "system", "content": system}] if system else None
    has_history = "instruction" in columns

    def messages(row: dict) -> list[dict]:
        said = row[answer]
        said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        asked = "\n\n".join(row[name] for name in given if row.get(name))
        pairs = [*(chats.earlier_turns(row) if has_history else ()), (asked, said)]
        roles = itertools.cycle(("user", "assistant"))
        turns = zip(roles, itertools.chain.from_iterable(pairs), strict=False)
        start = chats.system_message(row) if first is None else first
        return [*start, *({"role": role, "content": text} for role, text in turns)]

    return messages


_SYSTEM, _PROMPT = chats.SYSTEM_COLUMNS, ("prompt", "completion")
_MORE, _CONTEXT = ("input", *_SYSTEM, HISTORY), ("context", *_SYSTEM)
_ask_task = _ask("instruction", "input", "output")
_ask_question = _ask("context", "question", "answer")
_ALPACA = RowFormat("alpaca", ("instruction", "output"), _MORE, _alpaca, _ask_task)
_QUESTION = RowFormat("question", ("question", "answer"), _CONTEXT, _question, _ask_question)
_PAIR = RowFormat("prompt", _PROMPT, _SYSTEM, operator.itemgetter(*_PROMPT), _ask(*_PROMPT))
_talk = chats.conversation
_CHATS = [RowFormat(CHAT, (name,), _SYSTEM, None, _talk, _talk) for name in chats.CHAT_COLUMNS]
_PARTS = RowFormat(CHAT, _PROMPT, _SYSTEM, None, chats.prompted, chats.prompted, list, "completion")
_LABELS = _ask("text", "label", system=LABEL_PROMPT)
ROW_FORMATS = (
    RowFormat(TOKENS, ("input_ids",), ("labels", "attention_mask"), check=_check_ids),
    *(*_CHATS[:2], _ALPACA, _QUESTION, _PARTS, _PAIR),
    RowFormat(LABEL, ("text", "label"), messages=_LABELS, check=_check_label),
    RowFormat(TEXT, ("text",), (), _dialogue),
    *(_CHATS[2], _ALPACA.spelled(output="response", input="context")),
    *(_QUESTION.spelled(answer="response"), _PAIR.spelled(completion="response")),
)
NAMES = tuple(dict.fromkeys([*(found.name for found in ROW_FORMATS), BLOCKS]))


@dataclass(frozen=True)
class RowFormatter:
    """How the rows of a run become text.

    Args:
        chat: for conversations.
        train_on: "all", "assistant" (or "completion": every answer) or "last" (the last answer).
        system: stands before every conversation or prompt in place of its own; None for its own.
        format_name: one of NAMES that every row must have; None: each row's columns tell.
        row_template: Jinja over a row's columns; None for none.
        parts: (text, column) pairs, the last column being what is learned; empty for none.
        chat_kwargs: what a chat template reads besides; a row's own `chat_template_kwargs` stand
            above them.
        allows_dropped: rows are trained whose text the chat template does not write.
    """

    chat: Chat
    train_on: str = "assistant"
    system: str | None = None
    format_name: str | None = None
    row_template: Template | None = None
    parts: tuple[tuple[str, str | None], ...] = ()
    chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allows_dropped: bool = False

    @functools.cached_property
    def formats(self) -> tuple[RowFormat, ...]:
        """The formats that a row may have: the first whose columns it has is its own."""
        if self.row_template is not None or self.parts:
            columns = tuple(column for _, column in self.parts if column is not None)
            check = functools.partial(_check_columns, columns)
            return (RowFormat(OWN, columns, (), functools.partial(_fill, self.parts), None, check),)
        name = TEXT if self.format_name == BLOCKS else self.format_name
        return tuple(found for found in ROW_FORMATS if name in (None, CHAT, found.name))

    def problem(self, row: object) -> str | None:
        """Say what keeps a value read from a file from being a row of this run.

        Args:
            row: anything that JSON or parquet can hold, or a piece of running text.

        Returns:
            None for a good row, else a few words such as 'field "output" is null (want text)'.
        """
        if isinstance(row, sources.TextPiece):
            is_text = self.format_name != CHAT and any(f.name == TEXT for f in self.formats)
            return None if is_text else "is running text (the template wants columns)"
        if not isinstance(row, dict):
            return f"is {chats.kind(row)} (want an object with named fields)"
        found = match(row, self.formats)
        if found is None:
            usual = {f.name: f for f in reversed(self.formats)}
            kinds = ["+".join(f.required) for f in self.formats if usual[f.name] is f]
            names = one_line(", ".join(map(str, row)))[:80]
            hint = "; --objective dpo learns pairs" if suggested(row) == "dpo" else ""
            return f"has fields {names or 'none'} (want {' | '.join(kinds)}{hint})"
        is_refused = self.format_name == CHAT and found.messages is None
        fault = "is no conversation (want messages, or an answer)" if is_refused else None
        return found.problem(row) or fault

    def unused(self, row: object) -> list[str]:
        """Return what a row holds and nothing uses: names of columns, switches of loss elsewhere.

        Args:
            row: one without a problem.
        """
        if not isinstance(row, dict):
            return []
        found, names = self._find(row), []
        used = {*found.required, *found.optional}
        used |= self.row_template.variables if self.row_template is not None else set()
        used |= {*TOOL_COLUMNS, KWARGS} if self._as_chat(found) else set()
        if found.name == CHAT and found.messages is not None:
            every = ((n, v, m["role"]) for m in found.messages(row) for n, v in m.items())
            lost = (at for at in every if not _is_heeded(*at) and at[0] not in self.chat.fields)
            names = list(dict.fromkeys(f"{name} of {role} messages" for name, _, role in lost))
        given = (name for name, value in row.items() if value not in NOTHING)
        return [str(name) or "(unnamed)" for name in given if name not in used] + names

    def name(self, row: object) -> str:
        """Return how a row is treated, in a word or two for the user.

        Args:
            row: one without a problem.

        Returns:
            One of NAMES ("tokens" are ids already, "blocks" running text that is cut into blocks
            of the context's length), OWN, or "... as chat".
        """
        if not isinstance(row, dict):
            return BLOCKS
        found = self._find(row)
        is_text = self.format_name is None and found.name == TEXT
        if self.format_name == BLOCKS or (is_text and ASSISTANT not in str(row["text"])):
            return BLOCKS
        is_made_chat = self._as_chat(found) and found.name != CHAT
        return f"{found.name} as chat" if is_made_chat else found.name

    def render(self, row: dict) -> list[Text]:
        """Turn a row into text and say which parts of it are learned.

        Args:
            row: one without a problem that is neither a block nor ids.

        Returns:
            One text; several where a chat template writes earlier turns in another way.

        Raises:
            Refused: a template cannot render it.
        """
        texts = self._render(row)
        if not all(sources.is_unicode(text.text) for text in texts):
            raise Refused("it holds half a surrogate pair (want valid Unicode)")
        if self.train_on == "all":
            return [text._replace(spans=((0, len(text.text)),)) for text in texts]
        return texts

    def answers(self, row: dict) -> Iterable[int | None]:
        """Return what each text of `render` is in a comparison: None, as nothing is compared."""
        return itertools.repeat(None)

    def ask(self, question: str | list[dict], example: Any, **values: Any) -> str:
        """Put a new question into the form of the rows that are trained on.

        Args:
            question: what the model is asked, or a conversation.
            example: any row of the training data without a problem.
            values: what a chat template reads besides.

        Returns:
            The prompt whose continuation is the answer.

        Raises:
            Refused: the chat template cannot render it.
        """
        values = {**self.chat_kwargs, **values}
        if isinstance(question, list):
            return self.chat.prompt(question, **values)
        if RowFormatter.name(self, example) in (BLOCKS, OWN, TOKENS):
            return question
        found = self._find(example)
        if self._as_chat(found):
            first = [{"role": "system", "content": LABEL_PROMPT}] * (found.name == LABEL)
            messages = [*first, {"role": "user", "content": question}]
            return self.chat.prompt(self._with_system(messages), **values)
        if ASSISTANT in str(example.get("text", "")):
            question = f"### Human: {question}\n{ASSISTANT}"
        blank = dict.fromkeys(found.required, "")
        prompt, completion = found.pair(blank | {found.required[0]: question})
        return self._system_text(found, {}) + (prompt or completion)

    def is_chat(self, row: object) -> bool:
        """Return whether a row goes through the chat template."""
        return isinstance(row, dict) and self._as_chat(self._find(row))

    def _render(self, row: dict) -> list[Text]:
        if self.row_template is not None:
            text, marks = self.row_template.fill(**{str(key): row[key] for key in row})
            has_markup = "bos_token" in self.row_template.variables
            return [Text(text, marks or ((0, len(text)),), has_markup)]
        found = self._find(row)
        if self._as_chat(found):
            return self._render_chat(found, row)
        start = "" if self.parts else self._system_text(found, row)
        history = chats.earlier_turns(row) if HISTORY in found.optional else []
        turns = [dict(zip(found.required, turn, strict=True)) for turn in history]
        text, spans = start, []
        for number, turn in enumerate([*turns, row]):
            prompt, completion = found.pair(turn)
            if number:  # the head of alpaca's prompt stands once
                prompt = "\n\n" + prompt[prompt.index("### Instruction:") :]
            text += prompt + completion
            spans.append((len(text) - len(completion), len(text)))
        spans = spans[-1:] if self.train_on == "last" else spans
        return [Text(text, tuple((a, b) for a, b in spans if text[a:b].strip()))]

    def _render_chat(self, found: RowFormat, row: dict) -> list[Text]:
        values, messages = {**self.chat_kwargs, **chat_values(row)}, found.messages(row)
        tools = values["tools"]
        notes = [("unread", name) for name in self.chat.unread(values, tools) if name != "tools"]
        if "developer" not in self.chat.chosen(tools).source:
            notes += [("developer", "") for m in messages if m["role"] == "developer"]
            renamed = {"developer": "system"}
            messages = [{**m, "role": renamed.get(m["role"], m["role"])} for m in messages]
        messages = self._with_calls(self._with_system(messages), values)
        completion = row[found.answers] if found.answers else messages
        first = len(messages) - (len(completion) if isinstance(completion, list) else 1)
        said = [i for i in range(max(first, 0), len(messages)) if says_something(messages[i])]
        answers = [number for number in said if messages[number]["role"] == "assistant"]
        turns = answers[-1:] if self.train_on == "last" else answers
        learned = [n for n in turns if all(messages[n].get(name, 1) for name in chats.SWITCHES)]
        is_off = any(not message.get(name, 1) for message in messages for name in chats.SWITCHES)
        if self.train_on == "all" and is_off:
            raise Refused("a message is switched off by its weight, and --train_on all learns all")
        if self.train_on == "all" or not learned:
            texts, end = [Text(self.chat.whole(messages, **values), (), True)], len(messages) - 1
        else:
            texts, end = self.chat.render(messages, learned, **values), learned[-1]
        is_read = learned or self.train_on == "all"
        notes += find_lost(messages, learned, texts, end, tools) if is_read else []
        return [texts[0]._replace(notes=(*texts[0].notes, *notes)), *texts[1:]]

    def _with_calls(self, messages: list[dict], values: dict[str, Any]) -> list[dict]:
        """Calls as the template writes them: arguments as objects, as JSON text where it must be.

        Templates that add text to text raise at an object, or write it as Python does.
        """
        is_known = "tool_calls" in self.chat.chosen(values["tools"]).source
        messages = [chats.call_message(message, is_known) for message in messages]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        refusal = None
        for form in (chats.as_object, chats.as_text):
            made = [chats.with_arguments(message, form) for message in messages]
            try:
                text = self.chat.whole(made, **values)
            except Refused as error:
                refusal = refusal or error
                continue
            if form is chats.as_text or not chats.has_python(made, text):
                return made
        assert refusal is not None
        raise refusal

    def _find(self, row: dict) -> RowFormat:
        found = match(row, self.formats)
        assert found is not None, f"row of no kind: {sorted(row)}"
        return found

    def _as_chat(self, found: RowFormat) -> bool:
        return found.messages is not None and (self.format_name == CHAT or found.pair is None)

    def _with_system(self, messages: list[dict]) -> list[dict]:
        if self.system is None:
            return messages
        others = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.system}, *others]

    def _system_text(self, found: RowFormat, row: dict) -> str:
        own = chats.system_message(row) if "system" in found.optional else []
        text = own[0]["content"] if own and self.system is None else self.system
        return f"{text}\n\n" if text else ""


def _fill(parts: tuple[tuple[str, str | None], ...], row: dict) -> tuple[str, str]:
    """What stands before the last column, and all from there on."""
    texts = [(literal, str(row[column]) if column else "") for literal, column in parts]
    last = max(i for i, (_, column) in enumerate(parts) if column)
    prompt = "".join(map("".join, texts[:last])) + texts[last][0]
    return prompt, texts[last][1] + "".join(map("".join, texts[last + 1 :]))


def _check_columns(columns: tuple[str, ...], row: dict) -> None:
    for column in columns:
        if not isinstance(row[column], str | int | float):
            raise Refused(f'field "{column}" is {chats.kind(row[column])} (want text)')


def choose(
    template: str | None, chat: Chat, train_on: str = "assistant", system: str | None = None
) -> RowFormatter:
    """Find out what --template means.

    Args:
        template: a name in NAMES, a Jinja file, text with {columns}, or None for what fits a row.
        chat: the tokenizer's chat template.
        train_on: what is learned.
        system: system prompt, or None.

    Returns:
        What turns rows into text.

    Raises:
        UserError: it is none of these, or wrong.
    """
    if template is None or template == "auto":
        return RowFormatter(chat, train_on, system)
    if template in NAMES:
        return RowFormatter(chat, train_on, system, format_name=template)
    if template.endswith((".jinja", ".jinja2", ".j2")):
        source = sources.read_own_file(Path(template), "--template", "give a Jinja file")
        jinja = Chat(source, chat.names, template)
        if "messages" in jinja.variables:
            return RowFormatter(jinja, train_on, system, format_name=CHAT)
        jinja.forbid_undefined()
        return RowFormatter(chat, train_on, system, row_template=jinja)
    if "{" in template:
        return RowFormatter(chat, train_on, system, parts=_parse_format(template))
    remedy = f"one of {' '.join(NAMES)}, a .jinja file, or text with {{columns}}"
    raise UserError(f"--template {template}", "is no template", f"give {remedy}")


def chat_values(row: dict) -> dict[str, Any]:
    """Return what a chat template reads of a row beside its messages.

    Args:
        row: its `chat_template_kwargs`, `tools` (or OpenAI's older `functions`).

    Raises:
        Refused: they are not what they should be.
    """
    own = chats.from_json(KWARGS, row.get(KWARGS)) or {}
    if not isinstance(own, dict):
        raise Refused(f'field "{KWARGS}" is {chats.kind(own)} (want an object)')
    functions = chats.objects("functions", row.get("functions"))
    older = [{"type": "function", "function": function} for function in functions]
    tools = chats.objects("tools", row.get("tools") or own.get("tools")) or older
    return {k: v for k, v in own.items() if v is not None} | {"tools": tools or None}


def _parse_format(template: str) -> tuple[tuple[str, str | None], ...]:
    got = f"--template {template}"
    with one_line_of(got, "write {column}, and {{ for a brace", kinds=ValueError):
        parts = list(string.Formatter().parse(template.replace("\\n", "\n")))
    for _, column, spec, conversion in parts:
        if column == "" or spec or conversion or any(sign in (column or "") for sign in "[]"):
            raise UserError(got, "want the name of a column in each pair of braces", "correct it")
    if all(column is None for _, column, _, _ in parts):
        raise UserError(got, "names no {column}", "write the column to learn last")
    return tuple((literal, column) for literal, column, _, _ in parts)
