"""The tokenizer of a model, and its chat template: a conversation to text, what of it is learned.

Templates come with models from the hub: they run in the sandbox that transformers makes for them.
"""

import contextlib
import datetime
import hashlib
import inspect
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes

from fsdp_qlora import arch, atomic
from fsdp_qlora.data.sources import LONGEST_ROW, WORDS
from fsdp_qlora.errors import UserError, brief, one_line_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PLAIN_PLACE = "plain chat template"
CHAT_FILE = "chat_template.jinja"
GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Types of models for which transformers trusts its own class and not the one that the files name.
REBUILT_TYPES = ("qwen", "hyperclovax", "siglip")
OWN_CLASSES: dict[str, str] = WORDS["own_classes"]
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", CHAT_FILE)
Span = tuple[int, int]
# Names of what the assistant thought, as transformers knows them.
DATE = "strftime_now"  # by this name templates ask for the day
REASONING = ("reasoning_content", "thinking", "reasoning")
END_OF_THOUGHT = "</think>"
# What templates, JSON and Python write in several ways.
NO_WORDS = re.compile(r"</?think>|\\u00[01][0-9a-f]|\\[bfnrt]|[\s\x00-\x1f\x7f\\\"']")
LONGEST_RENDER_S = 30  # of one row
MOST_SHOWN = 40  # characters of a text that is named


class Text(NamedTuple):
    """Text to be tokenized.

    Args:
        text: the whole.
        spans: parts that are learned, as (first character, end), in order.
        has_markup: special tokens are written out in it; the tokenizer must add none in front.
        notes: what the user should know of it: "dropped", "reasoning", "prompt", "developer" or
            "unread", and a few words.
    """

    text: str
    spans: tuple[Span, ...]
    has_markup: bool = False
    notes: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """A template cannot render a row; the text says why."""


def says_something(message: Mapping[str, Any]) -> bool:
    """Return whether a message holds text or calls of tools."""
    return bool(message["content"].strip() or message.get("tool_calls"))


@contextlib.contextmanager
def _alarm(stop: Callable[..., None]) -> Iterator[None]:
    """Call a function where the context takes too long; only the main thread has an alarm."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, LONGEST_RENDER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


class Template:
    """A compiled template.

    Args:
        source: Jinja.
        names: texts of special tokens by name, such as {"bos_token": "<s>"}.
        place: named to the user if it is wrong.

    Raises:
        UserError: it is no Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str], place: str) -> None:
        # A private name, the same in transformers 5.17 to 5.23. What is public has no strict
        # undefined names, does not tell a template's variables, and renders chats only.
        from transformers.utils import chat_template_utils

        self.source, self.place, self.names = source, place, dict(names)
        try:
            make = inspect.unwrap(chat_template_utils._cached_compile_jinja_template)
            environment: Any = make("").environment  # one of its own
            environment.intercepted_binops = frozenset({"*", "**"})
            environment.call_binop = self._product
            self.compiled = environment.from_string(source)
            tree = environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line, rule = getattr(error, "lineno", 0), f"is not a Jinja template ({brief(error)})"
            raise UserError(f"{place}:{line}" if line else place, rule, "correct it") from error
        self.variables = meta.find_undeclared_variables(tree)
        found = tree.find_all((nodes.Getattr, nodes.Const))  # message.name and message["name"]
        self.fields = {str(getattr(n, "attr", "") or getattr(n, "value", "")) for n in found}

    def _product(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        """What the sandbox computes, were it not too much for the host."""
        is_number = isinstance(left, int) and isinstance(right, int)
        size = max(left.bit_length(), 1) * right if is_number and sign == "**" else 0
        for text, times in ((left, right), (right, left)):
            if sign == "*" and isinstance(times, int) and hasattr(text, "__len__"):
                size = len(text) * times
        self._check_size(size)
        return self.compiled.environment.binop_table[sign](left, right)

    def _check_size(self, num_chars: float) -> None:
        if num_chars > LONGEST_ROW:
            rule = f"writes more than {LONGEST_ROW:,} characters for one row"
            raise UserError(self.place, rule, "correct the template, or cut the row")

    def _stop(self, *_: Any) -> None:
        rule = f"writes one row for more than {LONGEST_RENDER_S} s"
        raise UserError(self.place, rule, "correct the template, or cut the row")

    def forbid_undefined(self) -> None:
        """Make a name that is not there an error instead of empty text."""
        self.compiled.environment.undefined = jinja2.StrictUndefined

    def fill(self, **values: Any) -> tuple[str, tuple[Span, ...]]:
        """Render the template with some values.

        Args:
            values: by name; a date as `strftime_now` is the day that the template writes.

        Returns:
            The text, and the parts of it that stood in `{% generation %}` blocks.

        Raises:
            Refused: the template raises.
            UserError: it takes too long, or writes too much.
        """
        blocks: list[str] = []
        spans: list[Span] = []
        num_chars = 0
        try:
            values = {**self.names, **values}
            if isinstance(day := values.get(DATE), str):
                values[DATE] = datetime.datetime.fromisoformat(day).strftime
            with _alarm(self._stop), self.compiled.environment.activate_tracker(blocks, spans):
                for block in self.compiled.generate(values):
                    blocks.append(block)  # the tracker counts them meanwhile
                    num_chars += len(block)
                    self._check_size(num_chars)
        except UserError:
            raise
        except Exception as error:  # code of others: it may raise anything
            raise Refused(f"{type(error).__name__}: {brief(error)}") from error
        return "".join(blocks), tuple(span for span in spans if span[0] < span[1])


class Chat(Template):
    """A chat template: rendered with messages, tools and values of the user.

    Args:
        source, names, place: see Template.
        tool_source: Jinja for conversations with tools; None: the same.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], place: str, tool_source: str | None = None
    ) -> None:
        super().__init__(source, names, place)
        self.with_tools = self if tool_source is None else Template(tool_source, names, place)
        self.fields |= self.with_tools.fields | {"role", "content", "tool_calls", *REASONING}

    def chosen(self, tools: Any) -> Template:
        """Return the template of a conversation: a tokenizer may have one for tools."""
        return self.with_tools if tools else self

    def unread(self, values: Mapping[str, Any], tools: Any = None) -> list[str]:
        """Return the names of values that the template does not read."""
        set_by_us = {"messages", "tools", "add_generation_prompt"}
        return sorted(set(values) - (self.chosen(tools).variables - set_by_us) - {DATE})

    def prompt(self, messages: list[dict], **values: Any) -> str:
        """Return the text after which the assistant speaks."""
        return self._render(messages, values, asks=True)[0]

    def whole(self, messages: list[dict], **values: Any) -> str:
        """Return the text of a conversation."""
        return self._render(messages, values)[0]

    def render(self, messages: list[dict], turns: list[int], **values: Any) -> list[Text]:
        """Render a conversation and find what the assistant says in it.

        An answer begins where the prompt for it ends and ends where the conversation up to it
        ends: this holds for every template, marked with `{% generation %}` or not. Where a
        template writes earlier turns in another way once others follow (Qwen 3 leaves their
        reasoning out), each answer becomes a text of its own, as it is when the model is used.

        Args:
            messages: {"role", "content", ...} each.
            turns: numbers of the messages that are learned, all of the assistant.
            values: what else the template reads, such as tools.

        Returns:
            One text, or one for each of `turns`; with a note where the end of the last prompt,
            such as an opening think tag, is not in it.

        Raises:
            Refused: the template raises.
        """
        whole, marks = self._render(messages, values)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if marks and len(marks) == len(answers):
            marks = tuple(marks[answers.index(turn)] for turn in turns)
        elif marks and len(turns) < sum(map(says_something, (messages[i] for i in answers))):
            marks = ()  # of some answers, and they are not told apart
        if marks:
            return [Text(whole, marks, True, self._start(messages, turns[-1], whole, values)[1])]
        ends = [(turn, self._render(messages[: turn + 1], values)[0]) for turn in turns]
        starts = [self._start(messages, turn, after, values) for turn, after in ends]
        notes = starts[-1][1]
        parts = [(start, after) for (start, _), (_, after) in zip(starts, ends, strict=True)]
        less = [(start, self._less_end(after, whole)) for start, after in parts]
        if all(whole.startswith(after) for _, after in less):
            return [Text(whole, tuple((start, len(after)) for start, after in less), True, notes)]
        return [Text(after, ((start, len(after)),), True, notes) for start, after in parts]

    def _less_end(self, after: str, whole: str) -> str:
        """The text up to an answer, less the end of text that some templates (Phi 3) set last."""
        less = after.removesuffix(self.names.get("eos_token", ""))
        return less if whole.startswith(less) and not whole.startswith(after) else after

    def _start(
        self, messages: list[dict], turn: int, after: str, values: Mapping[str, Any]
    ) -> tuple[int, tuple[tuple[str, str], ...]]:
        """Where an answer begins in the text that ends with it; what of its prompt is not there."""
        try:
            before = self._render(messages[:turn], values, asks=True)[0]
        except Refused:
            if turn > 0:
                raise
            before = None  # many templates cannot ask for a first message
        if before is not None and after.startswith(before):
            return len(before), ()
        other = [*messages[:turn], {"role": "assistant", "content": "\0"}]
        asked = after[: _num_shared(after, self.whole(other, **values))]
        if before is None:
            return len(asked), ()
        # A template may write the turns before in another way, too, once this one follows.
        cue = before[_num_shared(before, self.whole(messages[:turn], **values)) :]
        held = next((n for n in range(len(cue), 0, -1) if cue[:n] in asked), 0)
        start = max(asked.rfind(cue[:held]) + held, _num_shared(before, asked))
        return start, () if held == len(cue) else (("prompt", repr(before[-MOST_SHOWN:])),)

    def _render(
        self, messages: list[dict], values: Mapping[str, Any], asks: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        own = {"messages": list(map(_aliased, messages)), "add_generation_prompt": asks}
        given = {"tools": None, "documents": None, **values, **own}
        return self.chosen(values.get("tools")).fill(**given)


def _aliased(message: dict) -> dict:
    """The reasoning under every name that a template may read, as transformers has it."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, REASONING[0]: found}


def _num_shared(a: str, b: str) -> int:
    """Characters that two texts begin with."""
    return len(os.path.commonprefix((a, b)))  # noqa: RUF071 - by characters


def find_lost(
    messages: list[dict], turns: list[int], texts: list[Text], end: int, tools: Any
) -> Iterator[tuple[str, str]]:
    """Find what of a conversation its texts do not hold.

    They are compared without whitespace, quotes, escapes and think tags; of JSON the leaf values.
    A piece must be in the text as often as in the conversation.

    Args:
        messages: {"role", "content", ...} each.
        turns: numbers of those that are learned.
        texts: one, or one for each of `turns`.
        end: number of the last message that the last text holds.
        tools: of the row.

    Yields:
        ("reasoning", which) for an earlier turn whose reasoning the template leaves out, as it does
        when the model is used; ("dropped", which) for anything else.
    """
    named = [f for tool in tools or () if isinstance(f := tool.get("function", tool), dict)]
    names = [leaf for tool in named for leaf in _leaves(tool.get("name", tool))]
    said = [_Said("tools", names, []), *map(_said, messages[: end + 1], itertools.count(1))]
    plain = [_plain(text.text) for text in texts]
    held = ["\0".join(map(_plain, entry.pieces)) for entry in said]
    # Equal pieces are told apart by role only: templates write those of users and assistants.
    for number in sorted(range(len(said)), key=lambda i: said[i].is_usual):
        which, pieces, thoughts, _ = said[number]
        is_own = len(texts) == len(turns) and number - 1 in turns
        text = plain[turns.index(number - 1)] if is_own else plain[-1]
        pool = "\0".join(filter(None, held[: number + 1] if is_own else held))
        lost = [piece for piece in pieces if text.count(_plain(piece)) < pool.count(_plain(piece))]
        if lost:
            yield "dropped", f"{which} {lost[0][:MOST_SHOWN]!r}"
        lost = [part for part in thoughts if text.count(_plain(part)) <= pool.count(_plain(part))]
        if lost:
            kind = "dropped" if is_own or number - 1 == max(turns, default=-1) else "reasoning"
            yield kind, f"the reasoning of {which} {lost[0][:MOST_SHOWN]!r}"


def _plain(text: str) -> str:
    return NO_WORDS.sub("", text)


class _Said(NamedTuple):
    """What a rendering must hold of a message, and what the assistant thought."""

    which: str
    pieces: list[str]
    thoughts: list[str]
    is_usual: bool = False  # every template writes its role


def _said(message: dict, number: int) -> _Said:
    content = message["content"]
    thoughts = [*dict.fromkeys(t for name in REASONING for t in _leaves(message.get(name)))]
    if message["role"] == "assistant" and END_OF_THOUGHT in content:
        thought, _, content = content.rpartition(END_OF_THOUGHT)
        thoughts.append(thought)
    pieces = [content]
    for call in message.get("tool_calls") or ():
        call = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(call, dict):
            call = {name: part for name, part in call.items() if name not in ("id", "type")}
        pieces += _leaves(call)
    which = f"message {number} ({message['role']})"
    is_usual = message["role"] in ("user", "assistant")
    return _Said(which, list(filter(_plain, pieces)), list(filter(_plain, thoughts)), is_usual)


def _leaves(value: Any) -> list[str]:
    """Texts and numbers in a JSON value, however deep; a text may be JSON itself."""
    found, waiting = [], [value]
    for value in waiting:  # it grows
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if isinstance(value, Mapping | list):
            waiting += value.values() if isinstance(value, Mapping) else value
        elif value is not None and not isinstance(value, bool):
            found.append(str(value))
    return found


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """Text to token ids, with what chat templates need.

    Args:
        core: a `tokenizers.Tokenizer` that neither cuts nor pads.
        names: texts of the special tokens by name, such as {"eos_token": "</s>"}.
        chat_template: Jinja, or None where the tokenizer has none.
        place: where it lies, for errors.
        full: the transformers tokenizer that this is made of.
        tool_template: Jinja for conversations with tools, where it has one by that name.
    """

    core: Any
    names: dict[str, str]
    chat_template: str | None
    place: str
    full: Any = None
    tool_template: str | None = None

    @property
    def eos_id(self) -> int:
        """Id of the end of text.

        Raises:
            UserError: there is none.
        """
        found = self.core.token_to_id(self.names.get("eos_token", ""))
        if found is None:
            remedy = "set eos_token in tokenizer_config.json"
            raise UserError(f"tokenizer of {self.place}", "has no end-of-text token", remedy)
        return found

    @property
    def adds_bos(self) -> bool:
        """Whether a text by itself gets the beginning-of-text token in front."""
        bos_id = self.core.token_to_id(self.names.get("bos_token", ""))
        return bos_id is not None and self.core.encode("").ids[:1] == [bos_id]

    def chat(self) -> Chat:
        """Return its chat template, or a plain one where it has none."""
        if self.chat_template is None:
            plain = "{{ bos_token }}" * self.adds_bos + WORDS["plain"]
            return Chat(plain, self.names, PLAIN_PLACE, self.tool_template)
        place = f"chat template of {self.place}"
        return Chat(self.chat_template, self.names, place, self.tool_template)

    def encode(self, texts: list[str], adds_special: bool) -> list[Any]:
        """Tokenize texts; other threads run meanwhile.

        Args:
            texts: valid Unicode.
            adds_special: put the tokens in front and behind that the tokenizer puts there.

        Returns:
            A `tokenizers.Encoding` each.
        """
        return self.core.encode_batch(texts, add_special_tokens=adds_special)

    def fingerprint(self) -> str:
        """Return a text that is another one for a tokenizer that works in another way."""
        table = json.loads(self.core.to_str())
        if not (table["post_processor"] or {}).get("special_tokens", True):
            table["post_processor"] = None  # transformers puts one there that does nothing
        table["split_special_tokens"] = self.core.encode_special_tokens
        parts = [table, self.names, self.chat_template, self.tool_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> TextTokenizer:
    """Read a tokenizer that gives the tokens of a run: without torch where its class is general.

    Args:
        path: directory of a model.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    return wrap(load(path, is_light=True), path)


def load(path: Path, is_light: bool = False) -> Any:
    """Load a tokenizer with transformers; nothing is fetched, no code is run.

    Args:
        path: directory of a model.
        is_light: without torch, which the choice among transformers' classes needs, where the
            files tell which one is chosen.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    require_files(path)
    import transformers

    name = is_light and _known_class(path)
    rule, remedy = "its tokenizer cannot be read ({})", "fetch its tokenizer files again"
    with one_line_of(path, remedy, rule=rule, kinds=Exception):  # the Rust side raises bare ones
        made = getattr(transformers, name or "AutoTokenizer")
        return made.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _known_class(path: Path) -> str | None:
    """Name the class that transformers itself chooses, where the files tell that.

    The general class reads tokenizer.json as it is. Others build the splitting of text anew, so
    that only they give the tokens of a run.
    """
    found: list[dict[str, Any]] = []
    for place in (path / "tokenizer_config.json", path / "config.json"):
        value = atomic.parse_json(place.read_bytes()) if place.is_file() else {}
        if value is None or (place.exists() and not place.is_file()):
            return GENERAL_CLASSES[0]  # all refuse such a file; this one does so without torch
        found.append(value)
    settings, model_type = found[0], str(found[1].get("model_type"))
    named = str(settings.get("tokenizer_class"))
    has_file = (path / "tokenizer.json").exists() and not (path / "tekken.json").exists()
    if "auto_map" in settings or not has_file:
        return None
    if named in GENERAL_CLASSES:
        return None if model_type.startswith(REBUILT_TYPES) else GENERAL_CLASSES[0]
    own = next((own for kind, own in OWN_CLASSES.items() if re.fullmatch(kind, model_type)), None)
    return own if named.removesuffix("Fast") == own else None


def wrap(full: Any, place: Path | str) -> TextTokenizer:
    """Take what is needed here from a transformers tokenizer.

    Args:
        full: transformers tokenizer; it is left as it is.
        place: where it lies, for errors.

    Returns:
        One that gives the same ids.

    Raises:
        UserError: it has no fast form.
    """
    from tokenizers import Tokenizer

    inner, template = getattr(full, "backend_tokenizer", None), full.chat_template
    if inner is None:
        remedy = "save one with transformers' fast tokenizer"
        raise UserError(str(place), "its tokenizer has no fast form (tokenizer.json)", remedy)
    core = Tokenizer.from_str(inner.to_str())
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = inner.encode_special_tokens  # its JSON leaves that out
    tool_template = None
    if isinstance(template, dict):  # several, by name
        tool_template = template.get("tool_use")
        words = f"none is the default (--template FILE.jinja is) of {', '.join(map(str, template))}"
        absent = f"{{{{ raise_exception({json.dumps(words)}) }}}}"
        template = template.get("default", absent)
    if not isinstance(template, str | None) or not isinstance(tool_template, str | None):
        raise UserError(f"chat template of {place}", "is no text", "correct tokenizer_config.json")
    names = {k: v for k, v in full.special_tokens_map.items() if isinstance(v, str)}
    return TextTokenizer(core, names, template, str(place), full, tool_template)


def has_files(path: Path) -> bool:
    """Return whether a directory holds a tokenizer."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def directory(info: arch.ModelInfo) -> Path:
    """Return where the tokenizer of a model lies.

    Args:
        info: the model.

    Raises:
        UserError: there is none.
    """
    if info.path is None:
        remedy = "use --dataset dummy, or give a model directory"
        raise UserError("a model shape without files", "has no tokenizer", remedy)
    require_files(info.path)
    return info.path


def require_files(path: Path) -> None:
    """Check that a directory has the files of a tokenizer.

    Args:
        path: directory of a model.

    Raises:
        UserError: it has none.
    """
    for name in (*TOKENIZER_FILES, *SETTINGS_FILES):
        if os.path.lexists(path / name) and not os.path.isfile(path / name):  # a pipe would wait
            raise UserError(str(path / name), "is no regular file", "fetch it again")
    if not has_files(path):
        remedy = "put tokenizer.json there, or use --dataset dummy"
        raise UserError(str(path), "has no tokenizer", remedy)
