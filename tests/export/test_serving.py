"""What is written for llama.cpp and Ollama, and what is said of vLLM; no program of theirs runs."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fsdp_qlora.__main__ import main
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import tokenizer
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, UserError
from fsdp_qlora.export import serving
from tests import tiny

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>be kind\n{% endif %}"
    "<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n\"{{'{{'}}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if m.role == 'user' %}<s>[INST] {% if loop.first and messages[0].role == 'system' %}"
    "<<SYS>>{{ messages[0].content }}<</SYS>>{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA2 = "{% set own = messages[1:] if messages[0].role == 'system' else messages %}" + (
    LLAMA2.replace("messages[1:] if messages[0].role == 'system' else messages", "own")
)
ALTERNATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
COUNTS = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
# What Go's text/template writes for it, in Jinja: trimmed by "-", two fields, four functions.
GO_TO_JINJA = {
    r"range \$i, \$_ := \.Messages": "for m in messages",
    r"\$last := .* 1": "set last = loop.last",
    r'(else )?if eq \.Role "(\w+)"': lambda m: f"{'el' if m[1] else ''}if m.role == '{m[2]}'",
    r"if eq \$i 0": "if loop.index0 == 0",
    r"else if and \$\.System \(eq \$i 1\)": "elif system and loop.index0 == 1",
    r"if (not )?\$last": lambda m: f"if {m[1] or ''}last",
    r"else": "else",
}


def by_go(template: str, turns: list[dict]) -> str:
    """What Ollama's Go template writes."""
    depth: list[str] = []

    def word(match: re.Match) -> str:
        dash, action = match[1], match[2]
        if action[0] in '".':
            return "{{ " + action.replace(".Content", "m.content") + " }}"
        for pattern, jinja in GO_TO_JINJA.items():
            if found := re.fullmatch(pattern, action):
                jinja = jinja if isinstance(jinja, str) else jinja(found)
                if jinja.startswith(("for", "if")):
                    depth.append(jinja.split()[0])
                return f"{{%{dash} {jinja} %}}"
        assert action == "end", action
        return f"{{%{dash} end{depth.pop()} %}}"

    jinja = re.sub(r'\{\{(-?) ("(?:[^"\\]|\\.)*"|[^}]*?) \}\}', word, template)
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    return jinja2.Template(jinja, keep_trailing_newline=True).render(messages=turns, system=system)


@pytest.mark.parametrize("source", [CHATML, LLAMA2, ALTERNATE])
def test_a_go_template_writes_what_the_chat_template_does(source: str):
    """With and without a system prompt, a first question and later ones; bos is Ollama's."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = tokenizer.Chat(source, names, "here")
    text = SimpleNamespace(names=names, adds_bos=True, chat=lambda: chat)
    template = serving.go_template(text)  # type: ignore[arg-type]
    roles = {"s": "system", "u": "user", "a": "assistant"}
    for order in ("u", "uau", "uauauau", "su", "suau", "suauau"):
        turns = [{"role": roles[r], "content": f"{r}{i} é\n"} for i, r in enumerate(order)]
        if order[0] != "s" or source != ALTERNATE:
            assert template and by_go(template, turns) == chat.prompt(turns).removeprefix("<s>")
    other = tokenizer.Chat(COUNTS, names, "here")
    assert (
        serving.go_template(SimpleNamespace(names=names, adds_bos=True, chat=lambda: other)) is None
    )  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model with a tokenizer, an adapter with two scales, and programs that stand for others."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny.save_model(tmp_path / "model", vocab_size=384)
    tiny.save_tokenizer(model, ["What is 5? It is a number."] * 9)
    settings = LoraConfig(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"v_proj": 2})
    settings.target_modules, settings.task_type = {"q_proj", "v_proj"}, "CAUSAL_LM"
    settings.init_lora_weights = False
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, settings).save_pretrained(tmp_path / "my adapter")
    tools = tmp_path / "llama.cpp"
    (tools / "build" / "bin").mkdir(parents=True)
    script = "import shutil, sys, pathlib\nargv = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
    lora = script + "shutil.copytree(sys.argv[1], argv['--outfile'])\n"
    script += "pathlib.Path(argv['--outfile']).write_text(argv['--outtype'])\n"
    (tools / "convert_hf_to_gguf.py").write_text(script)
    (tools / "convert_lora_to_gguf.py").write_text(lora)
    quantize = tools / "build" / "bin" / "llama-quantize"
    quantize.write_text(
        '#!/bin/sh\ncp "$1" "$2"; echo "3 of 9 tensor(s) required fallback quant"\n'
    )
    quantize.chmod(0o755)
    return tmp_path


def refused(*argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        main(["export", *argv])
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_forms_for_llama_cpp(place: Path, capsys, monkeypatch):
    """Its programs get the right words; what they cannot take is refused."""
    adapter, tools = f"--adapter={place / 'my adapter'}", f"--llama_cpp={place / 'llama.cpp'}"
    model, out = f"--model_name={place / 'model'}", f"--out={place / 'My Model'}"
    assert main(["export", "gguf", adapter, out, tools, "--evidence_rows=0"]) == DONE
    assert sorted(p.name for p in (place / "My Model").iterdir()) == [
        "Modelfile",
        "model-q4_k_m.gguf",
    ]
    assert (place / "My Model" / "model-q4_k_m.gguf").read_text() == "f16"
    said = capsys.readouterr().out
    assert "3 of 9 tensors" in said and f"ollama create 'my model' -f '{place}/My Model/" in said
    assert main(["export", "lora-gguf", adapter, tools, f"--out={place / 'lora'}"]) == DONE
    made = place / "lora" / "lora-f16.gguf"
    before, after = (
        load_file(p / "adapter_model.safetensors") for p in (place / "my adapter", made)
    )
    assert json.loads((made / "adapter_config.json").read_text())["lora_alpha"] == 8
    for name in before:  # alpha / sqrt(r), times r / 8
        scale = {"q": 8 / 2 * 4 / 8, "v": 2 / 2 * 4 / 8}[name.split(".")[-3][0]]
        assert after[name] == pytest.approx(before[name] * (scale if "lora_B" in name else 1))
    assert refused("gguf", tools, out).code == INPUT
    monkeypatch.setenv("PATH", "")
    fault = refused("gguf", model, f"--out={place / 'no'}")
    assert fault.code == ENVIRONMENT and "git clone" in str(fault)
    (place / "llama.cpp" / "convert_hf_to_gguf.py").write_text("import not_there")
    fault = refused("gguf", model, f"--out={place / 'no'}", tools)
    assert str(fault).endswith("No module named 'not_there'; pip install not_there")
    core = Tokenizer.from_file(str(place / "model" / "tokenizer.json"))
    core.add_special_tokens([f"<|{i}|>" for i in range(384)])
    core.save(str(place / "model" / "tokenizer.json"))
    assert "rows of embeddings" in str(refused("gguf", model, f"--out={place / 'no'}", tools))
    assert not (place / "no").exists()
    assert main(["export"]) == DONE and "lora-gguf" in capsys.readouterr().out
    assert refused("ggml").rule.startswith("want one of merged gguf")


def test_next_steps_can_be_copied(place: Path):
    """Paths with spaces are quoted, vLLM's rank is one that it has."""
    out = place / "my adapter"
    steps = [shlex.split(step) for step in serving.next_steps(out, TrainConfig())]
    assert steps[0][3:6] == ["generate", "--adapter", str(out)]
    assert steps[-1][:3] == ["vllm", "serve", str(place / "model")]
    assert steps[-1][-2:] == ["--lora-modules", f"my adapter={out}"] and "8" in steps[-1]
    assert serving.vllm_fault(True, "lm_head", 600) == "DoRA and modules_to_save and rank 600"
    whole = serving.next_steps(out, TrainConfig(train_type="full"))
    assert all("--adapter" not in step for step in whole) and shlex.split(whole[-1])[2] == str(out)
