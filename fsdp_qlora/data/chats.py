"""Messages of a conversation, read from every spelling; calls of tools in every form."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from fsdp_qlora.data.sources import STRICT, WORDS, is_unicode
from fsdp_qlora.data.tokenizer import REASONING, Refused
from fsdp_qlora.errors import one_line

CALL, ROLES = "function_call", WORDS["roles"]
# Fields of a message that switch its loss: OpenAI's and mistral-finetune's, ms-swift's, axolotl's.
SWITCHES = ("weight", "loss", "train", "loss_weight")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
JSON_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text"}
JSON_KINDS |= {type(None): "null", list: "a list"}


def kind(value: object) -> str:
    """Return what a value is, in words of people who know JSON."""
    return JSON_KINDS.get(type(value), "an object")


def conversation(row: dict) -> list[dict]:
    """Return the messages of a chat row as {"role", "content", ...}.

    Args:
        row: a row of the format "chat"; `system` stands before the messages.

    Raises:
        Refused: it has none, or one of them is wrong.
    """
    names = [name for name in CHAT_COLUMNS if name in row]
    name = next((name for name in names if row[name] is not None), names[0])
    messages = read_messages(name, row[name])
    return [*(m for m in system_message(row) if m != messages[0]), *messages]


def prompted(row: dict) -> list[dict]:
    """Return the messages of a row whose prompt and completion are lists of messages.

    Args:
        row: with `prompt` and `completion`, which may also be the text of the answer.

    Raises:
        Refused: one of the messages is wrong.

    Source: TRL's conversational form.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    said = [*read_messages("prompt", prompt), *read_messages("completion", completion)]
    return [*system_message(row), *said]


def system_message(row: dict) -> list[dict]:
    """Return the system message that a row holds in a column of its own, in a list, or none.

    Args:
        row: any.

    Raises:
        Refused: it is no text.
    """
    for name in SYSTEM_COLUMNS:
        if row.get(name) is not None:
            require_text(f'"{name}"', row[name])
    texts = dict.fromkeys(row[name] for name in SYSTEM_COLUMNS if row.get(name))
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def earlier_turns(row: dict) -> list[list[str]]:
    """Return earlier questions and answers of an alpaca row, as LLaMA-Factory has them.

    Args:
        row: `history` holds them, oldest first, as [question, answer] each.

    Raises:
        Refused: it is something else.
    """
    turns = from_json("history", row.get("history")) or []
    is_list = isinstance(turns, list) and all(isinstance(turn, list) for turn in turns)
    if not is_list or not all(len(turn) == 2 and all(map(_is_text, turn)) for turn in turns):
        raise Refused(f'field "history" is {kind(turns)} (want a list of [question, answer])')
    return turns


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value)


def from_json(name: str, value: Any) -> Any:
    """Return a value that some data sets hold as JSON in text.

    Args:
        name: of its field.
        value: text, or the value itself.

    Raises:
        Refused: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return STRICT.decode(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Refused(f'field "{name}" is not JSON') from error


def objects(name: str, value: Any) -> list[dict]:
    """Return objects that a row holds in a list, or JSON of each or of all.

    Args:
        name: of their field.
        value: null for none.

    Raises:
        Refused: they are something else.
    """
    found = from_json(name, value) or []
    found = [from_json(name, entry) for entry in found] if isinstance(found, list) else found
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Refused(f'field "{name}" is {kind(found)} (want a list of objects)')
    return found


def read_messages(name: str, entries: object) -> list[dict]:
    """Return messages as {"role", "content", ...}, whatever their spelling.

    Args:
        name: of their field.
        entries: a list of them.

    Raises:
        Refused: it is no such list, or one of them is wrong.
    """
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else kind(entries)
        raise Refused(f'field "{name}" is {what} (want a list of messages)')
    return [_message(number, entry) for number, entry in enumerate(entries, 1)]


def _message(number: int, entry: object) -> dict:
    """ShareGPT's from and value become role and content; empty fields of a table are left out."""
    if not isinstance(entry, dict):
        raise Refused(f"message {number} is {kind(entry)} (want an object with role and content)")
    others = {name: value for name, value in entry.items() if value is not None}
    role = others.pop("role" if "role" in others else "from", None)
    content = others.pop("content" if "content" in others else "value", None)
    spelled = role.lower().replace("-", "_") if isinstance(role, str) else None
    if spelled not in ROLES:
        want, shown = "want system, user, assistant or tool", one_line(str(role))[:30]
        raise Refused(f"message {number} has role {shown} ({want})")
    for name in SWITCHES:
        if others.get(name) not in (None, 0, 1):
            shown = one_line(str(others[name]))[:30]
            raise Refused(f"message {number} {name} is {shown} (want 0 or 1)")
    others |= {name: _joined(others[name]) for name in REASONING if name in others}
    old = None if others.get("tool_calls") else from_json(CALL, others.pop(CALL, None))
    if old:  # OpenAI's form before tool_calls
        others["tool_calls"] = [{"type": "function", "function": old}]
    calls = objects(f"tool_calls of message {number}", others.get("tool_calls"))
    if calls:
        others["tool_calls"], content = calls, "" if content is None else content
    require_text(f"message {number} content", content := _joined(content))
    return {**others, "role": ROLES[spelled], "content": content}


def _joined(parts: Any) -> Any:
    """The text of a content in parts, where all of them are text."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return parts
    are_text = all(str(part.get("type") or "text").endswith("text") for part in parts)
    found = [part.get("text", part.get("value")) for part in parts]
    return "".join(found) if are_text and all(isinstance(text, str) for text in found) else parts


def call_message(message: dict, is_known: bool) -> dict:
    """Return ShareGPT's function_call as an answer with calls, any other message as it is.

    Args:
        message: from `read_messages`.
        is_known: the chat template writes calls; else theirs is the answer's text.
    """
    if message["role"] != CALL:
        return message
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(message["content"])
    calls = found if isinstance(found, list) else [found]
    are_calls = calls and all(isinstance(call, dict) and "name" in call for call in calls)
    if not is_known or not are_calls:
        return message | {"role": "assistant"}
    made = [{"type": "function", "function": call} for call in calls]
    return message | {"role": "assistant", "content": "", "tool_calls": made}


def as_object(arguments: Any) -> Any:
    """Return arguments of a call as an object where they are one in JSON."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if isinstance(json.loads(arguments), dict):
            return from_json("arguments", arguments)
    return arguments


def as_text(arguments: Any) -> Any:
    """Return arguments of a call as JSON in text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def with_arguments(message: dict, form: Callable[[Any], Any]) -> dict:
    """Return a message with the arguments of its calls in another form.

    Args:
        message: any.
        form: `as_object` or `as_text`.
    """
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(inner, dict) and "arguments" in inner:
            inner = inner | {"arguments": form(inner["arguments"])}
            call = call | {"function": inner} if "function" in call else inner
        calls.append(call)
    return message | {"tool_calls": calls}


def require_text(what: str, value: object) -> None:
    """Check that a value is text.

    Args:
        what: names it in the error.
        value: any.

    Raises:
        Refused: it is none, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise Refused(f"{what} is {kind(value)} (want text)")
    if not is_unicode(value):
        raise Refused(f"{what} holds half a surrogate pair (want valid Unicode)")


def has_python(messages: list[dict], text: str) -> bool:
    """Return whether the arguments of a call stand in a text as Python writes them.

    Args:
        messages: arguments as objects.
        text: what a template made of them.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    inner = [call.get("function", call) for call in calls if isinstance(call, dict)]
    written = [str(f["arguments"]) for f in inner if isinstance(f, dict) and f.get("arguments")]
    written = [form for form in written if form.startswith("{'")]
    said = [message["content"] for message in messages]
    return any(form in text and not any(form in other for other in said) for form in written)
