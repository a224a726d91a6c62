"""What the charts of a page are drawn from: columns of numbers that grow with a run.

charts.js draws them, in report.html and on the live page.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from fsdp_qlora.errors import read_table
from fsdp_qlora.planning.rows import DEVICE_ROWS, HOST_ROWS
from fsdp_qlora.record import Run, hosts_of

TABLE = read_table(__file__, "look.toml")
ROWS = dict.fromkeys((*DEVICE_ROWS, *HOST_ROWS))
ROW_COLOURS = dict(zip(ROWS, itertools.cycle(TABLE["colours"]), strict=False))
LOOK = {"curves": TABLE["curves"], "colours": TABLE["colours"][:6], "rows": ROW_COLOURS}
MEMORY = TABLE["memory"]
SUMMED = {"time": "step_s", "tokens": "num_tokens"}
FIGURES = tuple(curve[0] for curve in TABLE["curves"][4:])  # of preferences alone
COLUMNS = ("step", *SUMMED, *(curve[0] for curve in TABLE["curves"]))
MAX_BINS = 800  # of memory; of neighbouring steps the one that held most is kept
LEAST, MOST, DIGITS = 1e-300, 1e300, 6  # smaller values are drawn as 0, larger ones as gaps


def short(value: Any) -> float | None:
    """A number as a chart needs it: DIGITS digits; None where it is none, or out of bounds."""
    if not isinstance(value, int | float) or not abs(value) < MOST:  # NaN compares as false
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}") * (abs(value) > LEAST)


def planned_steps(config: Mapping[str, Any], last: Mapping[str, Any]) -> int | None:
    """Steps that a run is to take.

    Args:
        config: of the run.
        last: line of its last step; empty before the first.

    Returns:
        None where neither steps nor epochs tell.
    """
    planned = config.get("max_steps") or -1
    if planned < 0 and last.get("epoch") and config.get("num_epochs"):
        planned = round(config["num_epochs"] * last["step"] / last["epoch"])
    return planned if planned > 0 else None


class Tape:
    """The numbers of one run, in the order of its record.

    Attributes:
        facts: of the run: its first line.
        last: its last step.
        version: another one where something is no longer as it was; else the lists only grow.
    """

    def __init__(self, version: int = 0) -> None:
        self.version, self.facts, self.last = version, dict[str, Any](), dict[str, Any]()
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._evals, self._samples = list[list[Any]](), list[dict[str, Any]]()
        self._memory: dict[str, dict[str, Any]] = {}
        self._stride = 1

    @classmethod
    def of(cls, run: Run) -> "Tape":
        """All of a run that was read whole."""
        tape = cls()
        tape.facts = run.facts | {"config": run.config}
        for line in (*run.steps, *run.evals, *run.samples):
            tape.add(line)
        return tape

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return len(self._columns["step"])

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line of the record; a step that was taken before replaces its first attempt."""
        kind = line.get("event")
        if kind is None:
            self._add_step(line)
        elif kind == "eval":
            step = line.get("step", self.last.get("step", 0))
            right = [short(line["accuracy"])] if "accuracy" in line else []
            self._evals.append([step, short(line.get("loss")), *right])
        elif kind == "sample":
            names = ("when", "step", "prompt", "answer", "expected")
            self._samples.append({name: line.get(name) for name in names})
        elif kind == "run":
            config = line.get("config") or {}
            planned_steps(config, {"step": 1, "epoch": 1.0})  # raises where it is no configuration
            self.facts = {**line, "config": config}

    def _add_step(self, line: Mapping[str, Any]) -> None:
        step, columns = line["step"], self._columns
        if columns["step"] and columns["step"][-1] >= step:
            self._cut(step)
        for name, values in columns.items():
            before, taken = values[-1] if values else 0, short(line.get(SUMMED.get(name, name)))
            values.append(round(before + (taken or 0), 3) if name in SUMMED else taken)
        self.last = dict(line)
        for number, rank in enumerate(line["ranks"]):
            if rank.get("device_total_gib"):
                self._hold(f"GPU {number}", "device", step, rank)
        for host in hosts_of(line):
            self._hold(" ".join(filter(None, ("host", host.get("name")))), "host", step, host)
        if self.num_steps > MAX_BINS * self._stride:
            self._widen()

    def _cut(self, step: int) -> None:
        """Forget what a resumed run does again."""
        self.version += 1
        while self._columns["step"] and self._columns["step"][-1] >= step:
            for values in self._columns.values():
                values.pop()
        self._evals = [entry for entry in self._evals if entry[0] < step]
        for chart in self._memory.values():
            chart["bins"] = [held for held in chart["bins"] if held[0] < step]

    def _hold(self, title: str, place: str, step: int, part: Mapping[str, Any]) -> None:
        """One GPU or host: [step, total, held, a value for each row]."""
        new = {"place": place, "names": [], "bins": []}
        chart, rows = self._memory.setdefault(title, new), part.get(f"{place}_rows") or {}
        names, bins, held = chart["names"], chart["bins"], part.get(MEMORY[place][0])
        total, is_first = sum(filter(None, rows.values())) or held or 0.0, not bins
        bins += [[step, -1.0]] if is_first or (self.num_steps - 1) % self._stride == 0 else []
        if total > bins[-1][1]:
            chart["limit"] = short(part.get(f"{place}_total_gib"))
            names += [row for row in rows if row not in names]
            values = (short(rows.get(row)) or 0.0 for row in names)
            bins[-1] = [step, short(total), short(held), *values]

    def _widen(self) -> None:
        self._stride, self.version = self._stride * 2, self.version + 1
        for chart in self._memory.values():
            bins = chart["bins"]
            pairs = [bins[i : i + 2] for i in range(0, len(bins), 2)]
            chart["bins"] = [max(pair, key=lambda held: held[1]) for pair in pairs]

    def _levels(self, place: str, limit: float | None) -> dict[str, float]:
        """The lines of a chart of memory: the plan, and the user's limit or the hardware's."""
        _, _, budget, owner = MEMORY[place]
        plan, own = self.facts.get("plan"), self.facts.get("config", {}).get(budget)
        peak = plan.get(f"peak_{place}_gib") if isinstance(plan, dict) else None
        levels = {"plan: peak": peak, "budget" if own else owner: own or limit}
        return {name: gib for name, gib in levels.items() if gib is not None and short(gib)}

    def since(self, token: str = "") -> dict[str, Any]:
        """What has come since an earlier answer.

        Args:
            token: of that answer; another one than this tape has given: everything.

        Returns:
            token; starts: how much of what was there before stays, by list; columns, evals,
            samples; memory: title -> place, label, names, levels, bins (the last may change).
        """
        memory, config = self._memory, self.facts.get("config") or {}
        num_bins = max(max((len(chart["bins"]) for chart in memory.values()), default=0) - 1, 0)
        counts = [self.num_steps, len(self._evals), len(self._samples), num_bins]
        version, *rest = [int(part) for part in token.split("-") if part.isdecimal()] or [-1]
        is_known = version == self.version and len(rest) == len(counts)
        steps, evals, samples, bins = rest if is_known else [0] * len(counts)
        clip = short(config.get("grad_norm")) if config.get("apply_gradient_clipping") else None
        columns, charts = dict[str, list[Any]](), dict[str, dict[str, Any]]()
        for name, values in self._columns.items():
            if name not in FIGURES or any(value is not None for value in values):
                columns[name] = values[steps:]
        for title, chart in memory.items():
            levels = self._levels(chart["place"], chart["limit"])
            own = {"bins": chart["bins"][bins:], "label": MEMORY[chart["place"]][1]}
            charts[title] = chart | own | {"levels": levels}
        token = "-".join(map(str, [self.version, *counts]))
        starts = [steps, evals, samples, bins]
        found: dict[str, Any] = {"token": token, "starts": starts, "columns": columns}
        found |= {"evals": self._evals[evals:], "samples": self._samples[samples:]}
        found |= {"memory": charts, "clip": clip, "about": _about(config)}
        return found | {"planned": planned_steps(config, self.last)}


def _about(config: Mapping[str, Any]) -> str:
    """What a run is, in a few words."""
    words = TABLE["about"]
    known = {name: str(config[name]).rsplit("/", 1)[-1] for name in words if config.get(name)}
    return "  ·  ".join(words[name] + value for name, value in known.items())
