"""What export writes for llama.cpp answers there as it does here.

Real parts: llama.cpp's converters (in the sdist of llama-cpp-python) under the transformers that
they name, and libllama as node-llama-cpp's npm package has it, which quantizes and answers.
"""

import inspect
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE
from tests.system.test_transformers4 import PACKAGES

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
SDIST = "llama-cpp-python==0.3.36"
NODE = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
PROMPT = "<|im_start|>user\nWrite a long story about a whale.<|im_end|>\n<|im_start|>assistant\n"
QUANTIZE = """#!{python}
import ctypes, glob, sys
class Params(ctypes.Structure):  # more than it is today: libllama fills its part
    _fields_ = [("threads", ctypes.c_int32), ("ftype", ctypes.c_int32), ("_", ctypes.c_char * 504)]
lib = ctypes.CDLL(glob.glob("{node}/node_modules/@node-llama-cpp/linux-x64/bins/*/libllama.*")[0])
lib.llama_model_quantize_default_params.restype = Params
params = lib.llama_model_quantize_default_params()
params.ftype = {{"Q4_K_M": 15}}[sys.argv[3]]
names = [name.encode() for name in sys.argv[1:3]]
sys.exit(lib.llama_model_quantize(*names, ctypes.byref(params)))
"""
ASK = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const [task] = process.argv.slice(2).map(JSON.parse), out = {};
// One thread: those of ggml wait for each other spinning.
const how = {gpu: false, maxThreads: 1, build: "never", logLevel: LlamaLogLevel.error};
const llama = await getLlama(how);
for (const [name, {modelPath, lora, prompt, rows}] of Object.entries(task)) {
  const model = await llama.loadModel({modelPath});
  const context = await model.createContext({contextSize: 1024, threads: 1, lora});
  const sequence = context.getSequence(), found = {answer: [], loss: 0};
  found.ids = model.tokenize(prompt, true);
  for await (const token of sequence.evaluate(found.ids, {temperature: 0})) {
    if (model.isEogToken(token) || found.answer.push(token) === 40) break;
  }
  found.text = model.detokenize(found.answer);
  const ids = model.tokenize(rows);
  await sequence.clearHistory();
  const asked = ids.slice(0, -1).map((id, i) => [id, {generateNext: {
    logits: {filter: {tokens: [ids[i + 1]], includeMax: true}}, totalLogitWeight: true}}]);
  const seen = await sequence.controlledEvaluate(asked);
  for (const [i, {next}] of seen.entries()) {
    const logits = next.logits, max = Math.max(...logits.values());
    found.loss += (max + Math.log(next.totalLogitWeight) - logits.get(ids[i + 1])) / seen.length;
  }
  out[name] = found;
  await model.dispose();
}
console.log(JSON.stringify(out));
process.exit(0);
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """llama.cpp, node's package, the converter's transformers."""
    place = tmp_path_factory.mktemp("gguf")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    own = [*PACKAGES, "sentencepiece"]
    commands = [
        [*pip, "download", "--no-deps", "--no-binary=llama-cpp-python", SDIST, f"-d{place}"],
        [*pip, "install", "--no-deps", f"--target={place / 'packages'}", *own],
        ["npm", "install", "--silent", "--no-audit", "--omit=optional", "--ignore-scripts", *NODE],
    ]
    (place / "package.json").write_text("{}")
    for running in [subprocess.Popen(command, cwd=place) for command in commands]:
        assert running.wait() == 0, running.args
    with tarfile.open(next(place.glob("*.tar.gz"))) as file:
        file.extractall(place, filter="data")
    (place / "llama.cpp").symlink_to(next(place.glob("*/vendor/llama.cpp")))
    quantizer = place / "bin" / "llama-quantize"
    quantizer.parent.mkdir()
    quantizer.write_text(QUANTIZE.format(python=sys.executable, node=place))
    quantizer.chmod(0o755)
    (place / "ask.mjs").write_text(ASK)
    return place


def widen(source: Path, out: Path) -> None:
    """SmolLM2 with zeros to widths of a multiple of 256: heads 9 to 12, the same function."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
    config.update(sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in load_file(source / "model.safetensors").items():
        wide = model.get_parameter(name).data.zero_()
        # The mean of squares is over more numbers, by 768 / 576.
        tensor = tensor.float() * (0.75**0.5 if "norm" in name else 1)
        wide[tuple(slice(size) for size in tensor.shape)] = tensor
    model.save_pretrained(out)
    for path in source.glob("*token*"):
        (out / path.name).write_bytes(path.read_bytes())


def answers(model: Path, adapter: Path) -> list[str]:
    """40 greedy tokens of ours, in float32: of the base, then with the adapter."""
    from fsdp_qlora import inference

    cfg = inference.config_of(adapter, [f"--model_name={model}", "--precision=fp32"])
    opened = inference.open_run(adapter, cfg)
    own = opened.model, opened.tokenizer, opened.encode(PROMPT, True), 40, opened.world
    try:
        plain = inference.answer(*own)
        opened.load_adapter()
        return [plain, inference.answer(*own)]
    finally:
        opened.close()


def test_gguf_answers_as_generate_does(place: Path, tmp_path: Path, monkeypatch):
    """f16, a merged adapter and LoRA over f16 token for token; 8 and 4 bit by held-out loss."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    assert main(["fetch", "smollm2", f"--out={tmp_path / 'small'}"]) == DONE
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    widen(tmp_path / "small", model)
    settings = LoraConfig(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"v_proj": 3})
    settings.target_modules, settings.task_type = {"q_proj", "v_proj", "down_proj"}, "CAUSAL_LM"
    settings.save_pretrained(adapter)
    torch.manual_seed(1)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if (linear := name.removesuffix(".weight")).endswith(tuple(settings.target_modules)):
            stem = f"base_model.model.{linear}.lora_"
            tensors[stem + "A.weight"] = torch.randn(4, weight.shape[1]) / weight.shape[1] ** 0.5
            tensors[stem + "B.weight"] = torch.randn(weight.shape[0], 4) * 0.004
    save_file(tensors, adapter / "adapter_model.safetensors")
    plain, changed = answers(model, adapter)

    monkeypatch.setenv("PYTHONPATH", f"{place / 'packages'}")
    monkeypatch.setenv("PATH", f"{place / 'bin'}", prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    flags = [f"--llama_cpp={place / 'llama.cpp'}"]
    own, whole = [f"--adapter={adapter}", f"--model_name={model}"], [f"--model_name={model}"]
    exact = ["--outtype=f16", "--dtype=fp32", "--evidence_rows=0"]
    forms = [["gguf", *own, *exact, "--out=merged"], ["lora-gguf", *own, "--out=lora"]]
    kinds = ("f16", "q8_0", "q4_k_m")
    forms += [["gguf", *whole, f"--outtype={kind}", f"--out={kind}"] for kind in kinds]
    with ThreadPoolExecutor(2) as threads:
        codes = list(threads.map(lambda form: main(["export", *form, *flags]), forms))
    assert codes == [DONE] * 5
    said = Path("q4_k_m/Modelfile").read_text()
    assert said.startswith("FROM ./model-q4_k_m.gguf\n") and 'stop "<|im_end|>"' in said
    rows = "\n\n".join(map(inspect.getdoc, (subprocess.Popen, json.dumps, tarfile.open, os.walk)))
    names = {name: {"modelPath": f"{name}/model-{name}.gguf"} for name in kinds}
    names["merged"] = {"modelPath": "merged/model-f16.gguf"}
    names["lora"] = {**names["f16"], "lora": str(tmp_path / "lora" / "lora-f16.gguf")}
    task = json.dumps({n: {**v, "prompt": PROMPT, "rows": rows[:1200]} for n, v in names.items()})
    command = ["node", str(place / "ask.mjs"), task]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    print({name: (facts["loss"], facts["text"]) for name, facts in found.items()}, plain, changed)
    assert found["f16"]["ids"] == AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    assert "whale" in plain and plain != changed
    assert found["f16"]["text"] == plain
    assert found["merged"]["text"] == found["lora"]["text"] == changed
    assert len(found["f16"]["answer"]) == len(found["lora"]["answer"]) == 40
    losses = {name: facts["loss"] for name, facts in found.items()}
    assert 1 < losses["f16"] < 5 and abs(losses["merged"] - losses["lora"]) < 0.01
    assert abs(losses["q8_0"] - losses["f16"]) < 0.02
    assert 0 < abs(losses["q4_k_m"] - losses["f16"]) < 0.15
