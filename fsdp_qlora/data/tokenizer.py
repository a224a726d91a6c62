"""The tokenizer of a model: read from tokenizer.json alone, or taken from transformers."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.data import chat
from fsdp_qlora.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PLAIN_PLACE = "plain chat template"
CHAT_FILE = "chat_template.jinja"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", CHAT_FILE)


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """Text to token ids, with what chat templates need.

    Args:
        core: a `tokenizers.Tokenizer` that neither cuts nor pads.
        names: texts of the special tokens by name, such as {"eos_token": "</s>"}.
        chat_template: Jinja, or None where the tokenizer has none.
        place: where it lies, for errors.
    """

    core: Any
    names: dict[str, str]
    chat_template: str | None
    place: str

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
    def added_ids(self) -> set[int]:
        """Ids that stand for no text of a language: special tokens and others added by hand."""
        return set(self.core.get_added_tokens_decoder())

    @property
    def adds_bos(self) -> bool:
        """Whether a text by itself gets the beginning-of-text token in front."""
        bos_id = self.core.token_to_id(self.names.get("bos_token", ""))
        return bos_id is not None and self.core.encode("").ids[:1] == [bos_id]

    def chat(self) -> chat.Chat:
        """Return its chat template, or a plain one where it has none."""
        if self.chat_template is not None:
            source, place = self.chat_template, f"chat template of {self.place}"
        else:
            source, place = "{{ bos_token }}" * self.adds_bos + chat.PLAIN_TEMPLATE, PLAIN_PLACE
        return chat.Chat(chat.Template(source, self.names, place))

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
        whole = json.dumps([table, self.names, self.chat_template], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()


def read(path: Path) -> TextTokenizer:
    """Read a tokenizer without transformers, in a fraction of a second.

    Args:
        path: directory of a model, with tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    from tokenizers import Tokenizer

    require_files(path)
    if not (path / "tokenizer.json").exists():
        return wrap(load(path), path)
    try:
        core = Tokenizer.from_file(str(path / "tokenizer.json"))
        config = _read_json(path / "tokenizer_config.json")
        names = dict(_named_tokens(_read_json(path / "special_tokens_map.json").items()))
        names |= dict(_named_tokens(config.items()))
        # As transformers does: the named special tokens are tokens, in the file or not.
        core.add_special_tokens([text for text in names.values() if core.token_to_id(text) is None])
        template = config.get("chat_template")
        if (path / CHAT_FILE).exists():
            template = (path / CHAT_FILE).read_text(encoding="utf-8")
    except Exception as error:  # the Rust side raises bare Exception
        raise _unreadable(path, error) from error
    return _make(core, names, template, str(path))


def load(path: Path) -> Any:
    """Load a tokenizer with transformers; nothing is fetched, no code is run.

    Args:
        path: directory of a model.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    require_files(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare Exception
        raise _unreadable(path, error) from error


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

    inner = getattr(full, "backend_tokenizer", None)
    if inner is None:
        remedy = "save one with transformers' fast tokenizer"
        raise UserError(str(place), "its tokenizer has no fast form (tokenizer.json)", remedy)
    core = Tokenizer.from_str(inner.to_str())
    names = dict(_named_tokens(full.special_tokens_map.items()))
    return _make(core, names, full.chat_template, str(place))


def has_files(path: Path) -> bool:
    """Return whether a directory holds a tokenizer."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def directory(info: ModelInfo) -> Path:
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


def _make(core: Any, names: dict[str, str], template: Any, place: str) -> TextTokenizer:
    core.no_truncation()
    core.no_padding()
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"chat template of {place}", "is no text", "correct tokenizer_config.json")
    return TextTokenizer(core, names, template, place)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _named_tokens(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, value in items:
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _unreadable(path: Path, error: Exception) -> UserError:
    rule = f"its tokenizer cannot be read ({str(error)[:120]})"
    return UserError(str(path), rule, "fetch its tokenizer files again")
