"""A model made larger gives the logits of the model as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora import arch
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import commands, new_weights
from fsdp_qlora.planning.sizes import NEW_LAYERS, new_layers, trained_whole
from tests import tiny

IDS = torch.arange(3, 40).unsqueeze(0)


def logits(path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_an_expanded_model_computes_the_same_bits(tmp_path, model_type):
    """Windows that differ from layer to layer stay with their layers; several files, too."""
    changes = {"num_hidden_layers": 4, "pad_token_id": 0}
    changes |= {"sliding_window": 8, "head_dim": 32} if model_type == "gemma3_text" else {}
    path, out = tiny.save_model(tmp_path / "model", model_type, **changes), tmp_path / "deep"
    argv = [f"--model_name={path}", f"--out={out}", "--expansion_rate=0.5"]
    assert commands.expand([*argv, "--max_shard_gib=0.001"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    info = arch.read(str(out), need_weights=True)
    assert info.num_layers == 6 and info.config[NEW_LAYERS] == [2, 5]
    assert new_layers(4, 2) == (2, 5)
    assert logits(out).equal(logits(path))
    assert logits(out, torch.bfloat16).equal(logits(path, torch.bfloat16))


def test_new_layers_stand_where_the_reference_puts_them():
    """Reference: AnswerDotAI/fsdp_qlora, train.py: [split + (split + 1) * n for n in new]."""
    for old, new in ((32, 3), (80, 8), (12, 12), (28, 5)):
        split = old // new
        assert new_layers(old, new) == tuple(split + (split + 1) * n for n in range(new))


def test_new_tokens_get_the_mean_row_and_old_logits_stay(tmp_path, capsys):
    from transformers import AutoTokenizer

    path, out = tiny.save_model(tmp_path / "model", vocab_size=386), tmp_path / "some more"
    tiny.save_tokenizer(path, ["What is 5? It is a number."] * 9)
    kept = tiny.keep_as_on_the_hub(path)
    num_known = len(AutoTokenizer.from_pretrained(path))
    file = tmp_path / "tokens.txt"
    file.write_text("<|tool|>\n<|end_tool|>\n")
    assert commands.expand([f"--model_name={path}", f"--out={out}", f"--add_tokens={file}"]) == 0
    assert f"--model_name '{out}' --modules" in capsys.readouterr().out  # it can be pasted
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<|tool|>5<|end_tool|>", add_special_tokens=False).input_ids
    assert (ids[0], ids[-1], len(ids)) == (num_known, num_known + 1, 3)
    assert (out / "tokenizer_config.json").read_bytes() == kept["tokenizer_config.json"]
    table, old = (
        json.loads(text) for text in ((out / "tokenizer.json").read_bytes(), kept["tokenizer.json"])
    )
    added = table.pop("added_tokens")
    assert added[:-2] == old.pop("added_tokens") and table == old
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 392
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (392, 128)
        assert after[name][:num_known].equal(before[name][:num_known])
        mean = before[name][:num_known].mean(0)
        torch.testing.assert_close(after[name][num_known:], mean.expand(392 - num_known, -1))
    old = IDS.max().item() + 1
    torch.testing.assert_close(logits(out)[..., :old], logits(path)[..., :old], rtol=0, atol=0)
    with pytest.raises(UserError, match="already"):
        commands.expand([f"--model_name={out}", f"--out={out}2", "--add_tokens=<|tool|>"])
    for name in ("missing.txt", "./missing", "~/tokens", "/tmp/none"):
        with pytest.raises(UserError, match="is no file"):
            new_weights.add_tokens(arch.read(out, False), name)
    assert new_weights.add_tokens(arch.read(out, False), "</end>, <a.b>").num_rows == 392


def test_a_rate_that_adds_nothing_is_refused(tmp_path):
    path = tiny.save_model(tmp_path / "model")
    for rate, word in (("0.1", "makes 0 new layers"), ("1.5", "makes [3-9] new layers")):
        with pytest.raises(UserError, match=word):
            commands.expand(
                [f"--model_name={path}", f"--out={tmp_path / 'x'}", f"--expansion_rate={rate}"]
            )
    with pytest.raises(UserError, match="no new blocks"):
        from fsdp_qlora import config

        cfg = config.parse([f"--llama_pro_path={path}", "--train_type=bnb_llama_pro"])
        trained_whole(arch.read(cfg.model_name, need_weights=True), cfg)
