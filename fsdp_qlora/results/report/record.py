"""The record of a run as its files hold it: metrics.jsonl, and summary.json once it has ended."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import UserError

STEP_FIELDS = {"step", "step_s", "ranks", "host"}


@dataclass(frozen=True)
class Run:
    """The record of a run.

    Args:
        name: of its directory.
        directory: absolute.
        steps: lines of metrics.jsonl that are optimizer steps, by rising number.
        evals: (step, held-out loss); step 0 is before the first.
        config: the run's configuration by flag, as far as it is recorded.
        facts: what else its first line and summary.json tell, by name.
        samples: events "sample": when, prompt, answer.
        num_redone: steps that were taken again after a resume; the first attempt is left out.
    """

    name: str
    directory: Path
    steps: list[dict]
    evals: list[tuple[float, float | None]]
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    num_redone: int = 0

    @property
    def num_ranks(self) -> int:
        """Ranks of every step; where there were fewer, the last ones have zeros."""
        return len(self.steps[-1]["ranks"])

    @property
    def has_cards(self) -> bool:
        """Whether the ranks had device memory of their own."""
        return any(rank.get("device_total_gib") for rank in self.steps[-1]["ranks"])

    @property
    def state(self) -> str:
        """finished, stopped (by an error or a signal), or going on: there is no summary yet."""
        states = {True: "finished", False: "stopped early", None: "still running"}
        return states[self.facts.get("is_complete")]

    def ranks(self, name: str) -> list[list[float | None]]:
        """A field of every rank: one list per step."""
        return [[rank.get(name) for rank in step["ranks"]] for step in self.steps]

    def host(self, name: str) -> list[float | None]:
        """A field of the machine: one value per step."""
        return [step["host"].get(name) for step in self.steps]


def read(run_dir: Path) -> Run:
    """Read the record of a run; a last line that is still being written is left out.

    Args:
        run_dir: output directory of the run.

    Returns:
        The record, with at least one step.

    Raises:
        UserError: no record, no step in it, or a line that cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), reason, "give the output directory of a run") from error
    directory = run_dir.resolve()
    run = Run(directory.name, directory, [], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            place = f"{path}:{number}"
            raise UserError(place, "is not JSON", "remove the line") from error
        if not isinstance(row, dict) or not ("event" in row or row.keys() >= STEP_FIELDS):
            rule = "is neither a step nor an event of a run"
            raise UserError(f"{path}:{number}", rule, "give the output directory of a run")
        run = _event(run, row) if "event" in row else _step(run, row)
    if not run.steps:
        raise UserError(str(path), "holds no optimizer step", "wait for the first, then try again")
    most = max(len(step["ranks"]) for step in run.steps)  # it may have gone on with fewer
    run.steps[:] = [
        step | {"ranks": (step["ranks"] + [_absent(step["ranks"][0])] * most)[:most]}
        for step in run.steps
    ]
    summary = _summary(directory / "summary.json")
    config = run.config or summary.get("config", {})
    return replace(run, config=config, facts=run.facts | summary)


def _absent(rank: dict[str, Any]) -> dict[str, Any]:
    """The figures of a rank that a step did without: nothing, on a card like that of another."""
    nothing = {name: 0.0 for name, value in rank.items() if isinstance(value, int | float)}
    return {**rank, **nothing, "device_rows": {}, "device_total_gib": rank.get("device_total_gib")}


def _step(run: Run, row: dict) -> Run:
    """Add a step; one that was taken before (the run was resumed) takes the place of the former."""
    num_redone = run.num_redone
    while run.steps and run.steps[-1]["step"] >= row["step"]:
        run.steps.pop()
        num_redone += 1
    run.steps.append(row)
    if num_redone == run.num_redone:
        return run
    evals = [entry for entry in run.evals if entry[0] < row["step"]]
    return replace(run, evals=evals, num_redone=num_redone)


def _event(run: Run, row: dict) -> Run:
    if row["event"] == "eval":
        last = run.steps[-1]["step"] if run.steps else 0
        run.evals.append((row.get("step", last), row.get("loss")))
    elif row["event"] == "sample":
        run.samples.append(row)
    elif row["event"] == "run":
        facts = {name: value for name, value in row.items() if name not in ("event", "config")}
        return replace(run, config=row.get("config", {}), facts=facts)
    return run


def _summary(path: Path) -> dict[str, Any]:
    """What summary.json holds; nothing while the run goes on."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            str(path), "cannot be read", "remove it: metrics.jsonl is enough"
        ) from error
    return found if isinstance(found, dict) else {}


def name_apart(runs: Sequence[Run]) -> list[Run]:
    """Give runs of one name the directories above it too, until all differ.

    Args:
        runs: of different directories.

    Returns:
        The same in their order, each with a name of its own.
    """
    names = [run.name for run in runs]
    for depth in range(2, max((len(run.directory.parts) for run in runs), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(run.directory.parts[-depth:]) if names.count(name) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def highest(values: Iterable[float | None]) -> float | None:
    """The largest of the values that are known; None when none is."""
    return max((value for value in values if value is not None), default=None)
