"""Results that run elsewhere: GGUF for llama.cpp and Ollama, and what vLLM loads.

llama.cpp's own scripts and llama-quantize write GGUF. Ollama does not run the Jinja template that a
GGUF file holds: it takes one of its own that is nearly the same text, else none. So the Modelfile
gets a Go template, made of what the tokenizer's own template writes around the turns.

Source: template.Named and detectChatTemplate of github.com/ollama/ollama; its issue 10222.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import arch, atomic, cli, hardware
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, split_name
from fsdp_qlora.distributed.launch import tied_to_parent
from fsdp_qlora.errors import ENVIRONMENT, UserError, one_line
from fsdp_qlora.export.adapter import CONFIG_NAME, EACH, TABLE, WEIGHTS_NAME, SavedAdapter, read

if TYPE_CHECKING:
    from fsdp_qlora.data.tokenizer import TextTokenizer

CONVERTED = ("f16", "bf16", "f32", "q8_0")  # by the converter itself; the others by llama-quantize
OUTTYPES = ("q4_k_m", "q5_k_m", "q6_k", "q4_0", "q3_k_m", *CONVERTED)
CONVERTER, LORA_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
QUANTIZER, GO = "llama-quantize", TABLE["go"]
# Source: MaxLoRARanks in vllm/config/lora.py and _validate_features in vllm/lora/peft_helper.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def find_tool(name: str, llama_cpp: str | None) -> str:
    """Find a program of llama.cpp.

    Args:
        name: of its file.
        llama_cpp: directory of llama.cpp, looked at before PATH.

    Returns:
        Its path.

    Raises:
        UserError: it is not there (code 3).
    """
    home = os.path.expanduser(llama_cpp or "")
    places = [os.path.join(home, part) for part in ("", "build/bin", "bin")] if llama_cpp else []
    path = os.pathsep.join([*places, os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, os.F_OK, path):
        return found
    rule = f"is not in {llama_cpp} or on PATH" if llama_cpp else "is not on PATH"
    raise UserError(name, rule, TABLE["build" if name == QUANTIZER else "clone"], ENVIRONMENT)


def run_tool(*words: str | Path) -> str:
    """Run a program of llama.cpp.

    Args:
        words: its command line.

    Returns:
        What it printed.

    Raises:
        UserError: it has failed (code 3).
    """
    command = [*[sys.executable] * str(words[0]).endswith(".py"), *map(str, words)]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    how["preexec_fn"] = tied_to_parent()
    with cli.Progress(f"{Path(words[0]).name} works"):
        done = subprocess.run(command, text=True, errors="replace", **how)
    if done.returncode:
        remedy = f"see what it prints: {shlex.join(command)}"
        if absent := re.search(r"No module named '([\w.]+)'", done.stdout):
            remedy = f"pip install {absent[1]}"
        last = (done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(Path(words[0]).name, one_line(last), remedy, ENVIRONMENT)
    return done.stdout


def check_tokens(place: Path, info: arch.ModelInfo) -> None:
    """See that every token of a tokenizer has a row in the model, as llama.cpp wants it.

    Args:
        place: directory of the tokenizer.
        info: the model.

    Raises:
        UserError: there are more tokens than rows (code 2), or no tokenizer can be read.
    """
    from fsdp_qlora.data import tokenizer as tokenizers

    last = max(tokenizers.read(place).core.get_vocab().values())
    if last >= info.vocab_size:
        rule = f"has token {last:,}, and the model has {info.vocab_size:,} rows of embeddings"
        remedy = "train a model with rows for it: export expanded --add_tokens, --modules_to_save"
        raise UserError(f"tokenizer of {place}", rule, remedy)


def write_gguf(model: Path, out: Path, outtype: str, llama_cpp: str | None) -> list[str]:
    """Convert a whole model in transformers' format.

    Args:
        model: its directory.
        out: directory for the file.
        outtype: of OUTTYPES.
        llama_cpp: see `find_tool`.

    Returns:
        What to say of it.
    """
    path, is_converted = out / f"model-{outtype}.gguf", outtype in CONVERTED
    first, kind = (path, outtype) if is_converted else (out / "model-f16.gguf", "f16")
    run_tool(find_tool(CONVERTER, llama_cpp), model, "--outfile", first, "--outtype", kind)
    printed = ""
    if not is_converted:
        printed = run_tool(find_tool(QUANTIZER, llama_cpp), first, path, outtype.upper())
        first.unlink()
    lines = [f"{path.name}, {path.stat().st_size / hardware.GIB:.2f} GiB"]
    if other := re.search(r"(\d+ of \d+) tensor\(s\) required fallback", printed):
        lines.append(f"{other[1]} tensors are wider: {outtype} wants rows of a multiple of 256")
    return lines


def write_lora(adapter: SavedAdapter, base: Path, out: Path, outtype: str, script: str) -> None:
    """Convert the matrices of an adapter.

    llama.cpp scales all of them by alpha / r, with one alpha: what has another scale (rsLoRA, a
    pattern of alphas) gets it into its B matrix.

    Args:
        adapter: plain LoRA.
        base: directory of its base.
        out: directory for the file.
        outtype: of CONVERTED.
        script: convert_lora_to_gguf.py.
    """
    from safetensors.torch import load_file, save_file

    config = arch.files.read_json(adapter.path / CONFIG_NAME)
    tensors = load_file(adapter.path / WEIGHTS_NAME)
    draft, alpha = out / "lora", float(config["lora_alpha"]) or 1.0
    draft.mkdir()
    for name, pair in adapter.pairs.items():
        b_OR = tensors[f"base_model.model.{name}.lora_B.weight"]
        b_OR.mul_(pair.scale * b_OR.shape[1] / alpha)
    save_file(tensors, draft / WEIGHTS_NAME)
    atomic.write_json(draft / CONFIG_NAME, config | {"lora_alpha": alpha})
    file = out / f"lora-{outtype}.gguf"
    run_tool(script, draft, "--base", base, "--outfile", file, "--outtype", outtype)
    shutil.rmtree(draft)


def go_template(text: "TextTokenizer") -> str | None:
    """Make a Go template for Ollama of a chat template in Jinja.

    Args:
        text: the tokenizer.

    Returns:
        The template; None where the Jinja template writes more than texts around the turns.
    """
    from fsdp_qlora.data import tokenizer as tokenizers

    bos = text.names.get("bos_token", "") if text.adds_bos else ""  # Ollama puts it there, too
    chat = text.chat()

    def around(roles: str) -> list[str]:
        words = {"s": "system", "u": "user", "a": "assistant"}
        turns = [{"role": words[role], "content": f"turn{i}turn"} for i, role in enumerate(roles)]
        return re.split(r"turn\d+turn", chat.prompt(turns).removeprefix(bos))

    try:
        first, asked, answered, ask = around("uau")
        is_plain = around("u") == [first, ask]
        is_plain &= around("uauau") == [first, asked, answered, asked, answered, ask]
    except (tokenizers.Refused, ValueError):
        return None
    system, after = "", first
    try:
        before, after, _ = around("su")
        is_plain &= around("suau") == [before, after, asked, answered, ask]
        system = _go(before) + "{{ .Content }}"
    except tokenizers.Refused:
        pass  # it takes no system prompt
    except ValueError:
        return None
    parts = {"SYSTEM": system, "FIRST": _go(first), "AFTER": _go(after), "ASKED": _go(asked)}
    parts |= {"ANSWERED": _go(answered), "ASK": _go(ask)}
    return re.sub(rf"\b({'|'.join(parts)})\b", lambda m: parts[m[1]], GO) if is_plain else None


def _go(text: str) -> str:
    """A Go template that writes a text as it is."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def write_modelfile(out: Path, gguf: str, model: Path, system: str | None) -> str:
    """Write what `ollama create` reads.

    Args:
        out: directory for it.
        gguf: name of the file beside it.
        model: directory with tokenizer and generation_config.json.
        system: system prompt of the training, or None.

    Returns:
        What Ollama will do with the turns of a chat.
    """
    from fsdp_qlora.data import tokenizer as tokenizers

    text, lines = tokenizers.read(model), [f"FROM ./{gguf}"]
    ids = atomic.read_json(model / "generation_config.json").get("eos_token_id") or []
    found = [text.core.id_to_token(i) for i in (ids if isinstance(ids, list) else [ids])]
    stops = dict.fromkeys([text.names.get("eos_token"), *found])
    said, template = "no chat template: it goes on with the text as it is", None
    if text.chat_template:
        said, template = TABLE["no_go"], go_template(text)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
        said = "chat template of the tokenizer"
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    atomic.write(out / "Modelfile", "\n".join(lines) + "\n")
    return said


def vllm_fault(is_dora: bool, saved: object, rank: int) -> str:
    """What vLLM refuses of an adapter, in words; "" for nothing.

    Args:
        is_dora: it has magnitudes.
        saved: what was trained whole beside it.
        rank: the largest.
    """
    found = ["DoRA"] * is_dora + ["modules_to_save"] * bool(saved)
    return " and ".join(found + [f"rank {rank}"] * (rank > VLLM_RANKS[-1]))


def notes(cfg: TrainConfig) -> list[str]:
    """What to say before a run of where its adapter will not load.

    Args:
        cfg: the run.
    """
    is_dora = TRAIN_TYPES[cfg.train_type].adapter == "dora"
    fault = vllm_fault(is_dora, cfg.modules_to_save, cfg.lora_rank)
    words = f"note      vLLM loads no adapter with {fault}: it takes what export merged writes"
    return [words] * bool(fault)


def next_steps(out: Path, cfg: TrainConfig) -> list[str]:
    """Commands that make something of a finished run, to be copied.

    Args:
        out: directory of the run.
        cfg: the run.
    """
    name, ours = shlex.quote(str(out)), "python -m fsdp_qlora"
    which, serve = f"--model_name {name}", [f"vllm serve {name}"]
    if cfg.train_type != "full":
        which, merged = f"--adapter {name}", shlex.quote(f"{out}-merged")
        place = out / EACH if (out / EACH).is_dir() else out  # vLLM wants names of single experts
        adapter = read(place)
        pairs = adapter.pairs.values()
        rank = max((pair.a.shape[0] for pair in pairs), default=0)
        serve = [f"{ours} export merged {which} --out {merged}", f"vllm serve {merged}"]
        is_dora = any(pair.magnitude for pair in pairs)
        if not (vllm_fault(is_dora, adapter.replaced, rank) or adapter.experts):
            limit = next(limit for limit in VLLM_RANKS if limit >= rank)
            base, revision = split_name(adapter.base_name)
            flags = f" --revision {revision}" * bool(revision) + f" --max-lora-rank {limit}"
            flags += f" --enable-lora --lora-modules {shlex.quote(f'{out.name}={place}')}"
            serve[1] = f"vllm serve {shlex.quote(base)}{flags}"
    return [
        f"{ours} generate {which} --prompt 'What is a whale?'",
        f"{ours} report {name}",
        f"{ours} export gguf {which} --out {shlex.quote(f'{out}-gguf')} --llama_cpp DIR",
        *serve,
    ]
