"""What is written is read by transformers 4, which vLLM and llama.cpp's converter use too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import DONE
from tests import tiny

pytestmark = pytest.mark.system
PACKAGES = ("transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23")
TEXT = "What is 5? <|tool|>"
READ = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.57.6"
found = {}
for place in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    found[place] = [type(tokenizer).__name__, tokenizer("What is 5? <|tool|>").input_ids]
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    with torch.no_grad():
        found[place].append(model(torch.arange(3, 20).view(1, -1)).logits[0, -1, :300].tolist())
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def transformers4(tmp_path_factory) -> Path:
    """A directory with transformers 4.57.6 and what it needs to be older."""
    place = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={place}"]
    subprocess.run([*pip, *PACKAGES], check=True)
    return place


def test_merged_and_expanded_models_are_read_by_transformers_4(transformers4: Path, tmp_path: Path):
    """Tokens and logits are those that this environment's transformers finds."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny.save_model(tmp_path / "model", vocab_size=384)
    tiny.save_tokenizer(model, ["What is 5? It is a number."] * 9)
    tiny.keep_as_on_the_hub(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    settings.task_type = "CAUSAL_LM"
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    merged, larger = tmp_path / "merged", tmp_path / "larger"
    flags = [f"--adapter={tmp_path / 'adapter'}", f"--out={merged}", "--dtype=fp32"]
    assert main(["merge", *flags, "--evidence_rows=0"]) == DONE
    flags = [f"--model_name={model}", f"--out={larger}", "--add_tokens=<|tool|>"]
    assert main(["expand", *flags, "--expansion_rate=0.5"]) == DONE
    places = [str(merged), str(larger)]
    path = {"PYTHONPATH": str(transformers4)}
    run = subprocess.run(
        [sys.executable, "-c", READ, *places],
        cwd=tmp_path,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for place, (name, ids, logits) in json.loads(run.stdout).items():
        assert name == "PreTrainedTokenizerFast"
        assert ids == AutoTokenizer.from_pretrained(place)(TEXT).input_ids
        ours = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        with torch.no_grad():
            expected = ours(torch.arange(3, 20).view(1, -1)).logits[0, -1, :300]
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
