"""New tokens for a model: its tokenizer learns them, its embeddings get rows for them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.data import tokenizer
from fsdp_qlora.errors import UserError

MULTIPLE = 8  # of embedding rows: tensor cores want it


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with new tokens.

    Args:
        core: `tokenizers.Tokenizer`.
        num_known: ids that meant something before; what follows has no trained row.
        num_rows: of the embeddings now.
    """

    core: Any
    num_known: int
    num_rows: int

    def extended(self, weight_VH: torch.Tensor) -> torch.Tensor:
        """Give an embedding, or a head, rows for new tokens: the mean of the known ones.

        Args:
            weight_VH: as stored.

        Returns:
            [num_rows, H]; the rows of known tokens are as they were.
        """
        rows = weight_VH.new_empty(self.num_rows, weight_VH.shape[1])
        known = weight_VH[: self.num_known]
        rows[: len(known)] = known
        rows[len(known) :] = known.mean(0, dtype=torch.float32)
        return rows


def add(info: ModelInfo, text: str) -> Vocabulary:
    """Add tokens to the tokenizer of a model, in memory.

    Args:
        info: the model, with its files.
        text: a file with one token a line, or tokens between commas.

    Raises:
        UserError: there are none, or a token is known already (code 2).
    """
    path = Path(text).expanduser()
    is_file = len(text) < 256 and path.is_file()
    parts = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    tokens = [part.strip() for part in parts if part.strip()]
    core = tokenizer.read(tokenizer.directory(info)).core
    known = [token for token in tokens if core.token_to_id(token) is not None]
    if known or not tokens:
        rule = f"{known[0]!r} is in the tokenizer already" if known else "names no token"
        raise UserError(f"--add_tokens {text}", rule, "give new tokens, as a,b or one a line")
    num_known = min(core.get_vocab_size(), info.vocab_size)
    core.add_special_tokens(tokens)
    num_rows = max(core.get_vocab_size(), info.vocab_size)
    return Vocabulary(core, num_known, math.ceil(num_rows / MULTIPLE) * MULTIPLE)
