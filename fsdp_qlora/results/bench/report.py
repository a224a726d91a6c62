"""What the runs of a bench say together: medians, ratios of paired rounds, void rows."""

import statistics
from collections.abc import Sequence
from typing import Any

from fsdp_qlora.report import charts
from fsdp_qlora.report.charts import Bar, Bars

NUM_WARMUP_STEPS = 3
MIN_STEPS = 10
MAX_LOSS_DIFFERENCE = 0.005  # bfloat16 shows a loss of 11.2 to 0.3 %
SETTINGS = {
    "on": "NCCL as it comes",
    "off": "NCCL_P2P_DISABLE=1",
    "cpu": "CPU, gloo",
}
OURS, PEER, FAILED = "#00795a", "#57606a", "#a40e26"

Run = dict[str, Any]
Row = dict[str, Any]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Summarise the seconds of steps.

    Args:
        seconds: at least one.

    Returns:
        median, min, max, p90 (interpolated) and num.
    """
    pairs = list(seconds) if len(seconds) > 1 else [*seconds, *seconds]
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "p90": statistics.quantiles(pairs, n=10, method="inclusive")[8],
        "num": len(seconds),
    }


def disagreement(run: Run, base: Run) -> str | None:
    """Say why a run does not count beside another: other rows, or other losses.

    Args:
        run: has `losses` and `has_same_rows`.
        base: the run of the same round that it is held against.

    Returns:
        One line with the numbers of both, or None when first and mean loss are within
        `MAX_LOSS_DIFFERENCE`.
    """
    rows = "" if run["has_same_rows"] else "trains on other rows; "
    mine, theirs = run["losses"], base["losses"]
    if None in mine or None in theirs or len(mine) != len(theirs):
        counts = [sum(loss is not None for loss in losses) for losses in (mine, theirs)]
        return f"{rows}{counts[0]} losses against {counts[1]} of {base['arm']}"
    pairs = {
        "first": (mine[0], theirs[0]),
        "mean": (statistics.fmean(mine), statistics.fmean(theirs)),
    }
    apart = {name: abs(a - b) / abs(b) for name, (a, b) in pairs.items()}
    if not rows and max(apart.values()) <= MAX_LOSS_DIFFERENCE:
        return None
    words = [
        f"{name} loss {a:.4f} against {b:.4f} ({apart[name]:.1%})" for name, (a, b) in pairs.items()
    ]
    return f"{rows}{', '.join(words)} of {base['arm']}"


def judge(runs: list[Run]) -> list[Run]:
    """Void the runs that disagree with the first good one of their setting and round.

    Args:
        runs: each with arm, p2p, round, state ("measured" or "failed"), reason.

    Returns:
        The same in their order; some are "void" now, with the reason.
    """
    bases: dict[tuple, Run] = {}
    judged = []
    for run in runs:
        reason, place = None, (run["p2p"], run["round"])
        if run["state"] == "measured":
            if run["has_same_rows"]:
                bases.setdefault(place, run)
            reason = disagreement(run, bases.get(place, run))
        judged.append({**run, "state": "void", "reason": reason} if reason else run)
    return judged


def rows_of(runs: list[Run], tokens_per_step: int) -> list[Row]:
    """Summarise the runs of each arm under each setting.

    Args:
        runs: from `judge`.
        tokens_per_step: of all ranks.

    Returns:
        Rows in the order of the runs. A void row keeps its numbers, and no ratio.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["p2p"], run["arm"]), []).append(run)
    return [_row(group, runs, tokens_per_step) for group in groups.values()]


def _row(group: list[Run], runs: list[Run], tokens_per_step: int) -> Row:
    states = {run["state"] for run in group}
    state = next(name for name in ("void", "measured", "failed") if name in states)
    reasons = {run["reason"]: run["round"] for run in reversed(group) if run["reason"]}
    row: Row = {name: group[0][name] for name in ("arm", "p2p", "what", "is_ours")}
    row |= {
        "state": state,
        "reason": "; ".join(f"round {n}: {text}" for text, n in reasons.items()),
    }
    row["rounds"] = [run["round"] for run in group if run["state"] == "measured"]
    good = [run for run in group if run["state"] != "failed"]
    if not good:
        return row
    row["step_s"] = spread([second for run in good for second in steady(run)])
    row["tokens_per_s"] = tokens_per_step / row["step_s"]["median"]
    highest = ("peak_allocated_gib", "peak_reserved_gib", "load_peak_reserved_gib")
    for name in (*highest, "host_peak_gib", "host_added_gib"):
        row[name] = max((run[name] for run in good if run[name] is not None), default=None)
    for name in ("load_s", "first_step_s"):
        known = [run[name] for run in good if run[name] is not None]
        row[name] = statistics.median(known) if known else None
    row["losses"] = good[0]["losses"]
    row["ratios"] = _ratios(group, runs) if state == "measured" else {}
    return row


def steady(run: Run) -> list[float]:
    """Seconds of the steps of a run after the first ones, which warm up."""
    return run["step_s"][NUM_WARMUP_STEPS:] or run["step_s"][-1:]


def _ratios(group: list[Run], runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Speed as a multiple of each peer's, round by round: the machine's drift cancels out."""
    found: dict[str, list[float]] = {}
    for run in group:
        for peer in runs:
            is_paired = (peer["p2p"], peer["round"]) == (run["p2p"], run["round"])
            states = (run["state"], peer["state"])
            if is_paired and states == ("measured", "measured") and not peer["is_ours"]:
                ratio = statistics.median(steady(peer)) / statistics.median(steady(run))
                found.setdefault(peer["arm"], []).append(ratio)
    found.pop(group[0]["arm"], None)
    return {
        peer: {"median": statistics.median(rounds), "rounds": rounds}
        for peer, rounds in found.items()
    }


def markdown(bench: dict[str, Any]) -> str:
    """Write the page of a bench.

    Args:
        bench: what peers.json holds.

    Returns:
        Markdown: where, a table per setting, what is void or failed, the command lines.
    """
    rows, machine = bench["rows"], bench["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    parts = [f"# {headline(bench)}", *(f"**{note}**" for note in bench["notes"])]
    parts += [
        f"{bench['date']}. Machine: {machine['cards']}; {machine['cpu']}, {machine['num_cores']} "
        f"cores, {machine['host_total_gib']:.0f} GiB; {machine['platform']}. {versions}; "
        f"fsdp_qlora at {bench['commit']}.",
        bench["terms"],
    ]
    for p2p in dict.fromkeys(row["p2p"] for row in rows):
        parts += [f"## {SETTINGS[p2p]}", _table([row for row in rows if row["p2p"] == p2p])]
    faults = [
        f"- {row['arm']} ({SETTINGS[row['p2p']]}) {row['state']}: {row['reason']}"
        for row in rows
        if row["reason"]
    ]
    parts += ["\n".join(["## Void or failed", "", *faults])] if faults else []
    firsts: dict[str, Run] = {}
    for run in bench["runs"]:
        if run["command"]:
            firsts.setdefault(run["arm"], run)
    commands = [f"# {run['arm']}: {run['what']}\n{run['command']}" for run in firsts.values()]
    block = "\n".join([bench["command"], *commands])
    parts += [f"## Commands (of the first round)\n\n```text\n{block}\n```"]
    return "\n\n".join(parts) + "\n"


def headline(bench: dict[str, Any]) -> str:
    """Name the work in a few words."""
    work = bench["work"]
    return (
        f"{bench['model']}, {work['batch_size']} x {work['context_length']}, "
        f"{work['num_ranks']} ranks: ours against its peers"
    )


def _table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("ratios", {})))
    heads = ["arm", "step s: median (min - max), p90", "tokens/s", "peak GiB allocated / reserved"]
    heads += ["host GiB: peak (added)", "load s", "first step s", "loss: first, mean"]
    heads += [f"x {peer}" for peer in peers]
    lines = [_line(heads), _line(["---"] * len(heads))]
    return "\n".join([*lines, *(_line(_cells(row, peers)) for row in rows)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, peers: list[str]) -> list[str]:
    if row["state"] == "failed":
        return [row["arm"], "failed", *[""] * (6 + len(peers))]
    step = row["step_s"]
    cells = [
        row["arm"] + " (void)" * (row["state"] == "void"),
        f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f}), {step['p90']:.3f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['peak_allocated_gib']:.2f} / {row['peak_reserved_gib']:.2f}",
        f"{row['host_peak_gib']:.1f} ({row['host_added_gib']:.1f})",
        *("" if row[name] is None else f"{row[name]:.1f}" for name in ("load_s", "first_step_s")),
    ]
    known = [loss for loss in row["losses"] if loss is not None]
    cells.append(f"{known[0]:.4f}, {statistics.fmean(known):.4f}" if known else "none")
    for peer in peers:
        ratio = row["ratios"].get(peer)
        rounds = ratio["rounds"] if ratio else []
        text = f"{ratio['median']:.2f} ({min(rounds):.2f} - {max(rounds):.2f})" if ratio else ""
        cells.append(text)
    return cells


def picture(bench: dict[str, Any]) -> str:
    """Draw the rows of a bench as bars.

    Args:
        bench: what peers.json holds.

    Returns:
        An SVG document.
    """
    lines = [f"{bench['machine']['cards']}  ·  {bench['date']}", *bench["notes"][:1]]
    measures = [
        ("tokens_per_s", "Speed", "tokens/s of all ranks; thin line: slowest to fastest step"),
        ("peak_reserved_gib", "Memory of a card", "GiB reserved, peak of the largest rank"),
        ("host_added_gib", "Memory of the host", "GiB added at the peak, all programs"),
        ("first_step_s", "Time to the first step", "s from the start of the program"),
    ]
    groups = []
    for p2p in dict.fromkeys(row["p2p"] for row in bench["rows"]):
        rows = [row for row in bench["rows"] if row["p2p"] == p2p]
        for name, title, unit in measures:
            if any(row.get(name) for row in rows):
                bars = [_bar(row, name, bench["tokens_per_step"]) for row in rows]
                groups.append(Bars(f"{title} · {SETTINGS[p2p]}", unit, bars))
    return charts.draw_bars(headline(bench), lines, groups)


def _bar(row: Row, name: str, tokens_per_step: int) -> Bar:
    colour = OURS if row["is_ours"] else PEER
    value = row.get(name)
    if row["state"] == "failed" or value is None:
        return Bar(row["arm"], FAILED, None, "failed" if row["state"] == "failed" else "not known")
    is_speed = name == "tokens_per_s"
    text = f"{value:,.0f}" if is_speed else f"{value:.1f}"
    if is_speed and row["is_ours"] and row["ratios"]:
        peer = min(row["ratios"], key=lambda name: row["ratios"][name]["median"])  # the fastest
        text += f"  ·  {row['ratios'][peer]['median']:.2f} x {peer}"
    step = row["step_s"]
    ends = (tokens_per_step / step["max"], tokens_per_step / step["min"]) if is_speed else None
    is_void = row["state"] == "void"
    return Bar(row["arm"], FAILED if is_void else colour, value, text + "  void" * is_void, ends)
