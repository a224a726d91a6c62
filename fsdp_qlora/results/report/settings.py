"""What was run, on what: settings that differ, versions, cards, the command."""

import shlex
from typing import Any

from fsdp_qlora.config import Config, to_dict
from fsdp_qlora.results.report.parts import UNKNOWN, Cell, Code, Grid, Part, Words
from fsdp_qlora.results.report.record import Run

OWN = ("output_dir", "overwrite", "recipe")  # these say where a run lies, not what it is


def settings(runs: list[Run]) -> list[Part]:
    """The flags in which runs differ, or one run from the defaults; then all of them.

    Args:
        runs: the runs.

    Returns:
        A table of differences and a folded one of every flag.
    """
    flags = list(dict.fromkeys(flag for run in runs for flag in run.config))
    if not flags:
        return [Words("No configuration is recorded.")]
    every = _grid("All flags", runs, flags, is_folded=True)
    if len(runs) == 1:
        changed = [flag for flag in flags if flag not in OWN and not _is_default(runs[0], flag)]
        title = "Flags that differ from the defaults"
        return [_grid(title, runs, changed, with_default=True), every]
    differ = [flag for flag in flags if flag not in OWN and _differs(runs, flag)]
    if not differ:
        return [Words("The runs have the same configuration."), every]
    return [_grid("Flags in which the runs differ", runs, differ), every]


def _differs(runs: list[Run], flag: str) -> bool:
    return len({repr(run.config.get(flag, UNKNOWN)) for run in runs}) > 1


def _is_default(run: Run, flag: str) -> bool:
    defaults = to_dict(Config())
    return flag in defaults and defaults[flag] == run.config[flag]


def _grid(
    title: str,
    runs: list[Run],
    flags: list[str],
    with_default: bool = False,
    is_folded: bool = False,
) -> Grid:
    heads = ["", *(["default"] if with_default else []), *(run.name for run in runs)]
    defaults = to_dict(Config())
    rows = []
    for flag in flags:
        values = [defaults.get(flag, UNKNOWN)] if with_default else []
        values += [run.config.get(flag, UNKNOWN) for run in runs]
        rows.append((flag, [Cell(_word(value)) for value in values]))
    return Grid(title, heads, rows, is_folded=is_folded)


def _word(value: Any) -> str:
    words = {True: "true", False: "false", None: "not set"}
    is_word = value is None or isinstance(value, bool)
    return words[value] if is_word else str(value)


def machine(runs: list[Run]) -> list[Part]:
    """Versions, cards and commands.

    Args:
        runs: the runs.

    Returns:
        A table and one command line per run.
    """
    parts: list[Part] = [_by_run(runs, [_machine(run) for run in runs])]
    return parts + [command(run) for run in runs if run.config]


def _machine(run: Run) -> dict[str, str]:
    """What ran the run, by name."""
    last = run.steps[-1]
    facts = {"ranks": str(run.num_ranks)}
    sizes = [rank.get("device_total_gib") for rank in last["ranks"] if rank.get("device_total_gib")]
    if sizes:
        kinds = {f"{size:.1f}": None for size in sizes}
        facts["GiB per card"] = ", ".join(kinds)
    total = last["host"].get("host_total_gib")
    if total:
        facts["GiB of the host"] = f"{total:.1f}"
    limit = last["host"].get("cgroup_limit_gib")
    if limit:
        facts["GiB its control group allows"] = f"{limit:.1f}"
    return facts | {name: str(value) for name, value in run.facts.get("versions", {}).items()}


def command(run: Run) -> Code:
    """The command line of a run.

    Args:
        run: with its configuration.

    Returns:
        As it was typed where the record has it; else put together from the flags that differ from
        the defaults.
    """
    title = f"Command of {run.name}"
    typed = run.facts.get("command")
    if typed:
        return Code(title, typed if isinstance(typed, str) else shlex.join(typed))
    words = ["python", "train.py"]
    for flag, value in run.config.items():
        if not _is_default(run, flag) and value is not None and flag in to_dict(Config()):
            words += [f"--{flag}", _word(value)]
    return Code(f"{title}, from its configuration", shlex.join(words))


def facts(runs: list[Run]) -> list[Part]:
    """What the console said at the start: model, adapter, kernels, placement, load, data.

    Args:
        runs: the records.

    Returns:
        A table with a column a run, or nothing when it is not recorded.
    """
    return [_by_run(runs, [_said(run) for run in runs])] if any(map(_said, runs)) else []


def _said(run: Run) -> dict[str, str]:
    """The console's lines by their first word; what goes on below or comes again is joined."""
    found: dict[str, str] = {}
    name = ""
    for line in "\n".join(run.facts.get("lines", [])).splitlines():
        name, words = line[:10].strip() or name, line[10:].strip()
        found[name] = f"{found[name]}; {words}" if name in found else words
    return found


def _by_run(runs: list[Run], facts_of: list[dict[str, str]]) -> Grid:
    """One column a run, or one for all where they are the same."""
    found = list(dict.fromkeys(name for facts in facts_of for name in facts))
    heads = [run.name for run in runs]
    if len(runs) > 1 and all(facts == facts_of[0] for facts in facts_of):
        heads, facts_of = ["all runs"], facts_of[:1]
    rows = [(name, [Cell(facts.get(name, UNKNOWN)) for facts in facts_of]) for name in found]
    return Grid("", ["", *heads], rows)


def answers(runs: list[Run]) -> list[Part]:
    """The prompts of each run, answered before and after.

    Args:
        runs: the records.

    Returns:
        A table per run, a row a prompt; nothing when none was asked.
    """
    found: list[Part] = []
    for run in runs:
        whens = list(dict.fromkeys(str(sample.get("when")) for sample in run.samples))
        by_prompt: dict[str, dict[str, str]] = {}
        for sample in run.samples:
            answered = by_prompt.setdefault(str(sample.get("prompt", "")), {})
            answered[str(sample.get("when"))] = str(sample.get("answer", ""))
            if sample.get("expected"):
                answered["the data"] = str(sample["expected"])
        whens += ["the data"] * any("the data" in answered for answered in by_prompt.values())
        rows = [
            (prompt, [Cell(answered.get(when, UNKNOWN)) for when in whens])
            for prompt, answered in by_prompt.items()
        ]
        title = run.name if len(runs) > 1 else ""
        found += [Grid(title, ["prompt", *whens], rows)] if rows else []
    return found
