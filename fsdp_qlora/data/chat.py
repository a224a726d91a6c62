"""Jinja templates: a conversation or a row to text, and which characters of it are learned.

Templates come with models from the hub: they run in Jinja's sandbox, as transformers runs them.
"""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fsdp_qlora.errors import UserError, one_line

# Around what a `{% generation %}` block renders: Unicode keeps these two out of all texts.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
HAS_MARKS = re.compile(r"\{%[-+]?\s*generation\b")
# For tokenizers without a template: guanaco's form, each answer ended like a text.
PLAIN = """{% for message in messages %}\
{% if message['role'] == 'assistant' %}\
{{ '### Assistant: ' + message['content'] + eos_token + '\n' }}\
{% else %}\
{{ '### ' + {'user': 'Human'}.get(message['role'], message['role'] | capitalize) + ': ' }}\
{{ message['content'] + '\n' }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"""

Span = tuple[int, int]


class Text(NamedTuple):
    """Text to be tokenized.

    Args:
        text: the whole.
        spans: parts that are learned, as (first character, end), in order.
        has_markup: special tokens are written out in it; the tokenizer must add none in front.
    """

    text: str
    spans: tuple[Span, ...]
    has_markup: bool = False


class Refused(Exception):
    """A template cannot render a row; the text says why."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the model is to say."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


class Template:
    """A compiled template.

    Args:
        source: Jinja.
        names: texts of special tokens by name, such as {"bos_token": "<s>"}.
        place: what the user is told if it is wrong.
        is_strict: a name that is not there is an error, not empty text.

    Raises:
        UserError: it is no Jinja.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], place: str, is_strict: bool = False
    ) -> None:
        self.source, self.place, self.names = source, place, dict(names)
        self.has_marks = HAS_MARKS.search(source) is not None
        try:
            environment = _environment(is_strict)
            self.compiled = environment.from_string(source)
            tree = environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", 0)
            raise UserError(
                f"{place}:{line}" if line else place,
                f"is not a Jinja template ({one_line(str(error))[:100]})",
                "correct it",
            ) from error
        self.variables = meta.find_undeclared_variables(tree)

    def render(self, **values: Any) -> tuple[str, tuple[Span, ...]]:
        """Render the template.

        Args:
            values: by name.

        Returns:
            The text, and the parts of it that stood in generation blocks.

        Raises:
            Refused: the template raises.
        """
        try:
            marked = self.compiled.render(**{**self.names, **values})
        except Exception as error:  # code of others: it may raise anything
            raise Refused(f"{type(error).__name__}: {str(error)[:100]}") from error
        signs = [sign for sign in marked if sign in (OPEN, CLOSE)] if self.has_marks else []
        if signs != [OPEN, CLOSE] * (len(signs) // 2):
            raise Refused("the text holds U+FDD0 or U+FDD1, which are no characters")
        if not signs:
            return marked, ()
        pieces, spans, length = re.split(f"[{OPEN}{CLOSE}]", marked), [], 0
        for number, piece in enumerate(pieces):
            if number % 2 and piece:
                spans.append((length, length + len(piece)))
            length += len(piece)
        return "".join(pieces), tuple(spans)


class Chat:
    """A chat template in use.

    Args:
        template: rendered with messages, tools and add_generation_prompt.
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def prompt(self, messages: list[dict], tools: Any = None) -> str:
        """Return the text after which the assistant speaks."""
        return self._render(messages, tools, asks=True)[0]

    def whole(self, messages: list[dict], tools: Any = None) -> str:
        """Return the text of a conversation."""
        return self._render(messages, tools)[0]

    def write(self, messages: list[dict], turns: list[int], tools: Any = None) -> list[Text]:
        """Render a conversation and find what the assistant says in it.

        An answer begins where the prompt for it ends and ends where the conversation up to it
        ends: this holds for every template, marked with `{% generation %}` or not. Where a
        template writes earlier turns in another way once others follow (Qwen 3 leaves their
        reasoning out), each answer becomes a text of its own, as it is when the model is used.

        Args:
            messages: {"role", "content", ...} each.
            turns: numbers of the messages that are learned, all of the assistant.
            tools: what the template shows as tools.

        Returns:
            One text, or one for each of `turns`.

        Raises:
            Refused: the template raises.
        """
        whole, marks = self._render(messages, tools)
        if marks:
            num_said = sum(message["role"] == "assistant" for message in messages)
            if len(marks) == num_said:
                said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
                marks = tuple(marks[said.index(turn)] for turn in turns)
            return [Text(whole, marks, has_markup=True)]
        ends = [(turn, self._render(messages[: turn + 1], tools)[0]) for turn in turns]
        parts = [(self._start(messages, turn, after, tools), after) for turn, after in ends]
        parts = [(start, self._less_end(after, whole)) for start, after in parts]
        if all(whole.startswith(after) for _, after in parts):
            spans = tuple((start, len(after)) for start, after in parts)
            return [Text(whole, spans, has_markup=True)]
        parts = [(start, after) for (start, _), (_, after) in zip(parts, ends, strict=True)]
        return [Text(after, ((start, len(after)),), has_markup=True) for start, after in parts]

    def _less_end(self, after: str, whole: str) -> str:
        """The text up to an answer, less the end of text that some templates (Phi 3) set last."""
        less = after.removesuffix(self.template.names.get("eos_token", ""))
        return less if whole.startswith(less) and not whole.startswith(after) else after

    def _start(self, messages: list[dict], turn: int, after: str, tools: Any) -> int:
        """Where an answer begins in the text that ends with it."""
        try:
            before = self._render(messages[:turn], tools, asks=True)[0]
        except Refused:
            if turn > 0:
                raise
            # Many templates cannot ask for a first message: it begins with its own words.
            return max(after.find(messages[0]["content"].strip()), 0)
        if after.startswith(before):
            return len(before)
        pairs = zip(before, after, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))

    def _render(
        self, messages: list[dict], tools: Any, asks: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        return self.template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=asks
        )


def _environment(is_strict: bool) -> ImmutableSandboxedEnvironment:
    """What transformers gives chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        undefined=jinja2.StrictUndefined if is_strict else jinja2.Undefined,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, this escapes no HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
