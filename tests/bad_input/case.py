"""One bad input, and the good place that it is planted in."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fsdp_qlora.errors import INPUT
from tests import small_tokenizers
from tests.model_files import write_model

VOCAB_SIZE = 640
ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(12)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@dataclass(frozen=True)
class Place:
    """A directory in which a run would succeed: `model`, `rows.jsonl`; `out` is not there yet."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def rows(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def flags(self) -> list[str]:
        """A run of one step on the CPU."""
        return [
            f"--model_name={self.model}",
            f"--dataset={self.rows}",
            f"--output_dir={self.out}",
            *("--max_steps=1", "--context_length=64", "--lora_rank=4", "--world_size=1"),
        ]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: what is wrong, unique in its group.
        words: part of the line that must be said.
        flags: added to those of `Place`; later ones win; {root} stands for the place.
        make: damages the place.
        code: exit code.
        env: environment of the run; {root} stands for the place.
        absent: modules that shall not be installed.
        has_table: what differs follows the line, one below the other.
    """

    name: str
    words: str
    flags: tuple[str, ...] = ()
    make: Callable[[Place], object] | None = None
    code: int = INPUT
    env: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    has_table: bool = False


def write_place(root: Path) -> Place:
    """Write the good place; zeros for weights, a real tokenizer; no torch."""
    place = Place(root)
    root.mkdir(parents=True)
    write_model(place.model, vocab_size=VOCAB_SIZE)
    small_tokenizers.save(place.model, "chatml")
    place.rows.write_text("".join(LINES))
    return place
