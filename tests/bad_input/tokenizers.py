"""Bad tokenizer files beside a good model."""

import json
import os

from tests import small_tokenizers
from tests.bad_input.case import Case, Place
from tests.bad_input.models import PAGE, POINTER, in_place_of, loop, text
from tests.model_files import edit_json, write_model

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def remove(place: Place) -> None:
    """No tokenizer at all."""
    for path in place.model.glob("tokenizer*"):
        path.unlink()


def cut(place: Place) -> None:
    """A download that stopped."""
    path = place.model / TOKENIZER
    path.write_bytes(path.read_bytes()[:5000])


def settings(**values):
    """Set keys of tokenizer_config.json; None removes one."""
    return lambda place: edit_json(place.model / CONFIG, **values)


def too_many_ids(place: Place) -> None:
    """The tokenizer of a larger model: every id is one beyond the embedding."""
    path = place.model / TOKENIZER
    table = json.loads(path.read_text())
    table["model"]["vocab"] = {word: i + 640 for word, i in table["model"]["vocab"].items()}
    for token in table["added_tokens"]:
        token["id"] += 640
    path.write_text(json.dumps(table))


def small_embedding(place: Place) -> None:
    """The model of a smaller tokenizer."""
    write_model(place.model, vocab_size=96)


def chat_rows(place: Place) -> None:
    """Rows that need the chat template."""
    place.rows.write_text("\n".join(small_tokenizers.TEXTS) + "\n")


def template(source: object):
    """Rows for a chat template, and a wrong one."""

    def damage(place: Place) -> None:
        chat_rows(place)
        edit_json(place.model / CONFIG, chat_template=source)

    return damage


RAISES = "{{ raise_exception('no') }}"
ESCAPES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
ENDLESS = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
CASES = [
    Case("absent", "has no tokenizer", make=remove),
    Case("cut off", "cannot be read", make=cut),
    Case("empty", "cannot be read", make=text(TOKENIZER, "")),
    Case("a list", "cannot be read", make=text(TOKENIZER, "[]")),
    Case("no model in it", "cannot be read", make=text(TOKENIZER, '{"version": "1.0"}')),
    Case("a pointer", "cannot be read", make=text(TOKENIZER, POINTER)),
    Case("a page", "cannot be read", make=text(TOKENIZER, PAGE)),
    Case("a directory", "no regular file", make=in_place_of(TOKENIZER, os.mkdir)),
    Case("a pipe", "no regular file", make=in_place_of(TOKENIZER, os.mkfifo)),
    Case("a link to itself", "no regular file", make=in_place_of(TOKENIZER, loop)),
    Case("settings cut off", "cannot be read", make=text(CONFIG, '{"eos_token": ')),
    Case("settings a list", "cannot be read", make=text(CONFIG, "[]")),
    Case("settings a pipe", "no regular file", make=in_place_of(CONFIG, os.mkfifo)),
    Case("special tokens cut off", "cannot be", make=text("special_tokens_map.json", "{")),
    Case("no end of text", "has no end-of-text token", make=settings(eos_token=None)),
    Case("end of text a number", "its tokenizer cannot be read", make=settings(eos_token=7)),
    Case("ids beyond the embedding", "the model's embedding has 640 rows", make=too_many_ids),
    Case("small embedding", "the model's embedding has 96 rows", make=small_embedding),
    Case("template is no Jinja", "is not a Jinja template", make=template("{% for x %}")),
    Case("template a number", "chat template", make=template(7)),
    Case("template not UTF-8", "cannot be read", make=lambda place: _not_utf8(place)),
    Case("template that refuses", "rows.jsonl:1", make=template(RAISES)),
    Case("template that reaches out", "rows.jsonl:1", make=template(ESCAPES)),
    Case("template without an end", "rows.jsonl:1", make=template(ENDLESS)),
]


def _not_utf8(place: Place) -> None:
    (place.model / "chat_template.jinja").write_bytes(b"\xff")
