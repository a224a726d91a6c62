"""What `bench 7b`, `bench 70b` and `bench small` run: a row of this table is a run of train.py."""

import fnmatch
from dataclasses import dataclass, field, replace

from fsdp_qlora.errors import UserError

CPU_SHARE = 8  # a CPU trains on this part of each context
SMALL_SHAPE = {  # of Llama-2, with every width and count cut down
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}


@dataclass(frozen=True)
class Place:
    """Where the base lies.

    Args:
        what: in a few words.
        flags: of train.py.
        least_ranks: fewer cards make it another row of the table.
        most_ranks: it uses no more; None for all cards.
        is_fitted: the plan chooses what the flags leave open.
    """

    what: str
    flags: tuple[str, ...]
    least_ranks: int = 1
    most_ranks: int | None = None
    is_fitted: bool = False


CHECKPOINTED = ("--fit=off", "--use_gradient_checkpointing=true")
PLACES = {
    "one_card": Place(
        "one card, nothing sharded",
        (*CHECKPOINTED, "--sharding_strategy=ddp", "--use_cpu_offload=false"),
        most_ranks=1,
    ),
    "ddp": Place(
        "the whole base on every card",
        (*CHECKPOINTED, "--sharding_strategy=ddp", "--use_cpu_offload=false"),
        least_ranks=2,
    ),
    "full_shard": Place(
        "base sharded over the cards",
        (*CHECKPOINTED, "--sharding_strategy=full_shard", "--use_cpu_offload=false"),
        least_ranks=2,
    ),
    "offload": Place(
        "base on the host",
        (*CHECKPOINTED, "--sharding_strategy=full_shard", "--use_cpu_offload=true"),
    ),
    "fit": Place("the plan chooses: --fit auto", ("--fit=auto",), is_fitted=True),
}


@dataclass(frozen=True)
class Seed:
    """A figure that is to be beaten.

    Args:
        card_gb: of one card.
        host_gb: of the host; None: not told.
        source: where it stands.
    """

    card_gb: float
    host_gb: float | None
    source: str


@dataclass(frozen=True)
class Case:
    """One row of a bench.

    Args:
        place: row of PLACES.
        batch_size: rows per rank and micro-batch.
        context_length: tokens of a row.
        accumulation: micro-batches of a step.
        seed: published figure of this row, or None.
    """

    place: str
    batch_size: int
    context_length: int
    accumulation: int = 1
    seed: Seed | None = None

    @property
    def shape(self) -> str:
        """Batch, accumulation and context: "4x2048", "8x2x512"."""
        parts = [self.batch_size, *[self.accumulation] * (self.accumulation > 1)]
        return "x".join(map(str, [*parts, self.context_length]))

    @property
    def name(self) -> str:
        """In tables and on the command line."""
        return f"{self.shape}-{self.place}"


@dataclass(frozen=True)
class Kind:
    """One bench.

    Args:
        title: of its page.
        model: known shape that it trains.
        hub_name: the model itself, used when its files are in the hub's cache.
        cases: rows, in the order in which they run.
        least_gain: what the fitted row shall be of the sharded one's speed at least, or None.
    """

    title: str
    model: str
    hub_name: str
    cases: tuple[Case, ...] = field(repr=False)
    least_gain: float | None = None


LENGTHS = (512, 2048)
ALONE = Seed(22.0, None, "without FSDP, batch 4")
SHARED = Seed(7.0, 18.0, "with FSDP and offload, batch 4")
SEEDS = {"one_card": ALONE, "ddp": ALONE, "offload": SHARED}
CASES_7B = (
    *(
        Case(place, 4, length, seed=SEEDS.get(place))
        for length in LENGTHS
        for place in ("one_card", "ddp", "full_shard", "offload")
    ),
    Case("fit", 4, 2048),
    *(Case(place, 8, length, 2) for length in LENGTHS for place in ("full_shard", "offload")),
)
CASES_70B = (
    *(Case("offload", batch_size, length) for length in LENGTHS for batch_size in (1, 2, 4)),
    Case("fit", 2, 2048),
)
KINDS = {
    "7b": Kind("Llama-2 7B", "llama-2-7b", "meta-llama/Llama-2-7b-hf", CASES_7B, 1.12),
    "70b": Kind("Llama-2 70B", "llama-2-70b", "meta-llama/Llama-2-70b-hf", CASES_70B),
    "small": Kind("scaled Llama-2", "llama-2-7b", "", CASES_7B),
}


def scaled(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The same rows with shorter contexts, without the figures of the real ones.

    Args:
        cases: of a bench.
    """
    return tuple(
        replace(case, context_length=case.context_length // CPU_SHARE, seed=None) for case in cases
    )


def pick(cases: tuple[Case, ...], wanted: str | None) -> tuple[Case, ...]:
    """Choose rows.

    Args:
        cases: of a bench.
        wanted: names or patterns (4x2048-*), separated by commas; None for all.

    Returns:
        Those that match, in the order of the table.

    Raises:
        UserError: a name that matches nothing.
    """
    patterns = wanted.split(",") if wanted is not None else ["*"]
    names = [case.name for case in cases]
    unknown = [text for text in patterns if text and not fnmatch.filter(names, text)]
    if unknown:
        raise UserError(f"--rows {','.join(unknown)}", "no such row", f"use {' '.join(names)}")
    return tuple(
        case for case in cases if any(fnmatch.fnmatch(case.name, text) for text in patterns)
    )
