"""Write tests/data/rows/trl_masks.json: what TRL learns of real chats, for tests without TRL.

pip install trl==1.16.0 && python -m tests.data.trl_masks
"""

import json
import tempfile
from pathlib import Path

from tests import small_tokenizers

FILE = small_tokenizers.ROWS / "trl_masks.json"
# template of TRL's package -> special tokens (the first begins a text), the end of text
KINDS = {
    "llama3": small_tokenizers.KINDS["llama3"][1:],
    "phi3": (["<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "<|endoftext|>"),
    "qwen2_5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}


def save(directory: Path, kind: str, template: str) -> Path:
    """A small tokenizer with a template of TRL's package."""
    special, end = KINDS[kind]
    return small_tokenizers.save_as(directory, template, special, end, adds_bos=False)


def main() -> None:
    """Ask TRL for the masks of its SFT trainer under assistant_only_loss."""
    import trl
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    found = {"trl": trl.__version__}
    for kind in KINDS:
        path = Path(trl.__file__).parent / "chat_templates" / f"{kind}.jinja"
        with tempfile.TemporaryDirectory() as folder:
            place = save(Path(folder), kind, path.read_text(encoding="utf-8"))
            tokenizer = AutoTokenizer.from_pretrained(place)
        training = get_training_chat_template(tokenizer)
        rendered = [
            tokenizer.apply_chat_template(
                chat, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
            )
            for chat in small_tokenizers.conversations()
        ]
        masks = ["".join(map(str, entry["assistant_masks"])) for entry in rendered]
        ids = [entry["input_ids"] for entry in rendered]
        found[kind] = {"template": tokenizer.chat_template, "ids": ids, "masks": masks}
    FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
