"""What is learned of a chat is what TRL learns under assistant_only_loss, token by token."""

import json

import numpy as np
import pytest

from fsdp_qlora.data import tokenizer
from tests.data import trl_masks
from tests.data.test_chat import samples
from tests.small_tokenizers import conversations

STORED = json.loads(trl_masks.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", trl_masks.KINDS)
def test_masks_equal_those_of_trl_token_by_token(tmp_path, kind):
    """TRL knows each template by heart and marks it; ours finds the answers in the plain one.

    For Qwen 2.5 TRL learns the line break behind "<|im_start|>assistant" too, which whoever asks
    the model writes: that one token of each answer is the only difference.
    """
    stored = STORED[kind]
    light = tokenizer.read(trl_masks.save(tmp_path / kind, kind, stored["template"]))
    ours = samples(light, conversations())
    assert len(ours) == len(stored["ids"]) > 3
    for chat, ids, mask, (our_ids, is_learned) in zip(
        conversations(), stored["ids"], stored["masks"], ours, strict=True
    ):
        assert our_ids == ids
        differ = np.nonzero(np.array(is_learned) != np.array([flag == "1" for flag in mask]))[0]
        num_answers = sum(message["role"] == "assistant" for message in chat)
        assert len(differ) == (num_answers if kind == "qwen2_5" else 0)
        assert {light.core.decode([ids[i]], False) for i in differ} <= {"\n"}
        assert not any(is_learned[i] for i in differ)
        assert 0 < sum(is_learned) < len(ids)
