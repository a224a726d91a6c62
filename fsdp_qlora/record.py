"""The record of a run: metrics.jsonl, and summary.json once the run has ended."""

import contextlib
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, cli
from fsdp_qlora.config import TrainConfig, renamed, to_dict
from fsdp_qlora.errors import INTEGRITY, UserError, one_line, one_line_of

RUN_FORMAT = 2  # of the directory of a run; one that has no number is 1
NUM_WARMUP_STEPS = 3  # left out of medians, as in summary.json
OWN_FLAGS = ("output_dir", "overwrite", "recipe", "watch")  # where a run is, not what it is
NEEDED = ("step", "step_s", "ranks", "host")  # in the line of a step


@dataclass
class Run:
    """The record of a run.

    Args:
        name: of its directory.
        directory: absolute.
        steps: lines of metrics.jsonl that are optimizer steps, by rising number.
        evals: events "eval": step, which is 0 before the first, loss, accuracy of preferences.
        config: the run's configuration by flag, as far as it is recorded.
        facts: everything else in its first line and in summary.json, by name.
        samples: events "sample": when, prompt, answer.
        num_redone: steps taken again after a resume; their first attempt is left out.
    """

    name: str
    directory: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    num_redone: int = 0

    @property
    def num_ranks(self) -> int:
        """The most ranks of any step: a resumed run may have fewer."""
        return max(len(step["ranks"]) for step in self.steps)

    @property
    def has_gpus(self) -> bool:
        """Whether the ranks had GPU memory of their own."""
        return any(rank.get("device_total_gib") for rank in self.steps[-1]["ranks"])

    @property
    def state(self) -> str:
        """One of "finished", "stopped early" and, without a summary, "still running"."""
        is_complete: Any = self.facts.get("is_complete")
        return {True: "finished", False: "stopped early"}.get(is_complete, "still running")

    def values(self, name: str) -> list[Any]:
        """A field of the steps: one value per step."""
        return [step.get(name) for step in self.steps]

    def host(self, name: str) -> list[Any]:
        """A field of the host, of several the highest: one value per step."""
        return [highest(host.get(name) for host in hosts_of(step)) for step in self.steps]

    def rank(self, rank: int) -> list[dict[str, Any]]:
        """What a rank recorded: one table per step, empty for a step that had fewer ranks."""
        return [(step["ranks"][rank : rank + 1] or [{}])[0] for step in self.steps]

    def peaks(self, name: str) -> list[float | None]:
        """The largest value of a field: one per rank."""
        ranks = map(self.rank, range(self.num_ranks))
        return [highest(step.get(name) for step in steps) for steps in ranks]

    def table(self, name: str) -> dict[str, Any]:
        """A fact that is a table by itself, such as "plan"; empty where it is not recorded."""
        fact = self.facts.get(name)
        return fact if isinstance(fact, dict) else {}

    def median(self, name: str) -> float | None:
        """Median of a field of the steps, without the first steps, which warm up."""
        known = [value for value in self.values(name) if value is not None]
        return statistics.median(known[NUM_WARMUP_STEPS:] or known) if known else None


def check_format(table: Mapping[str, Any], place: str) -> None:
    """Refuse what a newer version of the trainer has written.

    Args:
        table: an event of a record, or the state of a checkpoint.
        place: where it stands.

    Raises:
        UserError: it is of a run format that this version does not know (code 5).
    """
    number = table.get("run_format", 1)
    if not isinstance(number, int) or number > RUN_FORMAT:
        rule = f"is of run format {number}, and this version reads up to {RUN_FORMAT}"
        raise UserError(place, rule, "use the version that wrote it", INTEGRITY)


def read(run_dir: Path) -> Run:
    """Read the record of a run; a last line that is still being written is left out.

    Args:
        run_dir: output directory of the run.

    Returns:
        The record, with at least one step.

    Raises:
        UserError: no record, no step in it, a line that cannot be read, or a newer run format.
    """
    path, directory = run_dir / "metrics.jsonl", run_dir.resolve()
    end = directory / "summary.json"  # written when the run ends
    with one_line_of(path, "give the output directory of a run"):
        lines, ending = path.read_bytes().splitlines(), end.read_bytes() if end.exists() else b"{}"
    run = Run(directory.name, directory, [], [])
    for number, line in enumerate(lines, 1):
        row = atomic.parse_json(line)
        if row is None and number == len(lines):
            break
        is_step = row is not None and row.get("event") is None
        row = _checked(row, f"{path}:{number}", NEEDED if is_step else ())
        check_format(row, f"{path}:{number}")
        _add(run, row)
    if not run.steps:
        raise UserError(str(path), "holds no optimizer step", "wait for the first, then try again")
    summary = _checked(atomic.parse_json(ending), str(end))
    run.facts |= summary
    config = run.config = run.config or summary.get("config", {})
    with contextlib.suppress(UserError):  # what no version has written is shown as it stands
        values, removed = renamed(config)
        run.config = values | {name: config[name] for name in removed}
    return run


def _checked(row: dict[str, Any] | None, place: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A step, or an event or summary.json without its nulls; an error where it is none."""
    missing = [name for name in needed if row is not None and row.get(name) in (None, [])]
    if row is None or missing:
        fault = f"{missing[0]} is missing" if missing else "no JSON object"
        rule = f"is not part of the record of a run: {fault}"
        raise UserError(place, rule, "remove it, or give the output directory of a run")
    return row if needed else {name: value for name, value in row.items() if value is not None}


def _add(run: Run, row: dict[str, Any]) -> None:
    """Add a line; a step taken before (the run was resumed) replaces its first attempt."""
    kind, last = row.get("event"), run.steps[-1]["step"] if run.steps else 0
    if kind is None:
        while run.steps and run.steps[-1]["step"] >= row["step"]:
            run.steps.pop()
            run.num_redone += 1
        run.evals = [line for line in run.evals if line["step"] < row["step"]]
        run.steps.append(row)
    elif kind == "eval":
        run.evals.append({"step": last, "loss": None} | row)
    elif kind == "sample":
        run.samples.append(row)
    elif kind == "run":
        run.config, run.facts = row.get("config", {}), row


def word(value: Any) -> str:
    """The value of a flag as it is written on a command line; "not set" for None."""
    return "not set" if value is None else cli.to_text(value)


def command(options: Mapping[str, Any]) -> str:
    """The command line that makes such a run, from the options that differ from the defaults.

    Args:
        options: flag -> value.

    Returns:
        One line of shell.
    """
    words, defaults = ["python", "train.py"], to_dict(TrainConfig())
    for flag, value in options.items():
        if flag == "model_name" or not (value is None or value == defaults.get(flag, value)):
            words += [f"--{flag}", word(value)]
    return one_line(shlex.join(words))


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Name runs of one name by their whole path.

    Args:
        runs: of different directories.

    Returns:
        The same in their order, each with a name of its own.
    """
    names = [run.name for run in runs]
    return [replace(r, name=str(r.directory)) if names.count(r.name) > 1 else r for r in runs]


def hosts_of(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a step's line says of every host; of one host an older record says it too."""
    return step.get("hosts") or [step["host"]]


def highest(values: Iterable[float | None]) -> float | None:
    """The largest of the values that are known; None when none is."""
    return max((value for value in values if value is not None), default=None)
