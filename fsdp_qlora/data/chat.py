"""Jinja templates: a conversation or a row to text, and which characters of it are learned.

Templates come with models from the hub: they run in the sandbox that transformers makes for them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta

from fsdp_qlora.errors import UserError, one_line

# For tokenizers without a template: guanaco's form, each answer ended like a text.
PLAIN_TEMPLATE = """{% for message in messages %}\
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
        from transformers.utils import chat_template_utils

        self.source, self.place, self.names = source, place, dict(names)
        try:
            self.compiled = chat_template_utils._compile_jinja_template(source)
            tree = self.compiled.environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", 0)
            rule = f"is not a Jinja template ({one_line(str(error))[:100]})"
            raise UserError(f"{place}:{line}" if line else place, rule, "correct it") from error
        self.variables = meta.find_undeclared_variables(tree)

    def forbid_undefined(self) -> None:
        """Make a name that is not there an error instead of empty text."""
        self.compiled.environment.undefined = jinja2.StrictUndefined

    def render(self, **values: Any) -> tuple[str, tuple[Span, ...]]:
        """Render the template.

        Args:
            values: by name.

        Returns:
            The text, and the parts of it that stood in `{% generation %}` blocks.

        Raises:
            Refused: the template raises.
        """
        blocks: list[str] = []
        spans: list[Span] = []
        try:
            with self.compiled.environment.activate_tracker(blocks, spans):
                for block in self.compiled.generate({**self.names, **values}):
                    blocks.append(block)  # the tracker counts them meanwhile
        except Exception as error:  # code of others: it may raise anything
            raise Refused(f"{type(error).__name__}: {str(error)[:100]}") from error
        return "".join(blocks), tuple(span for span in spans if span[0] < span[1])


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

    def render(self, messages: list[dict], turns: list[int], tools: Any = None) -> list[Text]:
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
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(marks) == len(answers):
                marks = tuple(marks[answers.index(turn)] for turn in turns)
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
