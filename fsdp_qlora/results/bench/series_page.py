"""The page, the bars and the comparisons of `bench 7b`, `bench 70b` and `bench small`."""

import json
from pathlib import Path
from typing import Any

from fsdp_qlora.report import charts
from fsdp_qlora.report.charts import Bar, Bars
from fsdp_qlora.results.bench.report import FAILED, OURS, PEER

MIN_STEPS = 8
LEAST_GIB = 0.2  # the host's memory moves by less while other programs run
# what it is, and the moves that are told: share of the earlier figure, least difference
FIGURES = {
    "peak_allocated_gib": ("GiB allocated", 0.01, 0.0),
    "peak_reserved_gib": ("GiB reserved", 0.01, 0.0),
    "host_added_gib": ("GiB on the host", 0.01, LEAST_GIB),
    "tokens_per_s": ("tokens/s", 0.15, 0.0),
}
SEED_COLOUR = "#8c6d1f"
TERMS = (
    "Speed: median (least - most) of the steps after the third, all ranks together. Card: the "
    "rank with most; allocated and reserved by torch, then with CUDA context and collectives as "
    "the ledger has it, and how far that is from the plan. Host: what the run added at its peak; "
    "then all programs, and how far that is from the plan. GiB."
)
Row = dict[str, Any]


def kind_of(where: str) -> str:
    """Name of the machine's cards or processor, without the driver's version."""
    return "; ".join(dict.fromkeys(part.split(",")[0] for part in where.split("; ")))


def line(row: Row) -> str:
    """One row in a line, for the console."""
    head = f"{row['name']:<22}"
    if row["state"] != "measured":
        return f"{head} {row['state']}: {row['reason']}"
    card = _pair(row, "card")
    return (
        f"{head} step {row['step_s']['median']:.3f} s, {row['tokens_per_s']:,.0f} tokens/s, "
        f"card {row['peak_reserved_gib']:.2f} GiB reserved{card and f', {card} in all'}, "
        f"host +{row['host_added_gib']:.1f} GiB ({row['wall_s']:.0f} s)"
    )


def _pair(row: Row, name: str) -> str:
    """What was measured in all, and how far it is from the plan; "" where it is not known."""
    if name not in row.get("peaks", {}):
        return ""
    predicted, measured = row["peaks"][name]
    share = f" ({measured / predicted - 1:+.1%})" if predicted > 0 else ""
    return f"{measured:.2f}{share}"


def moved(baseline: dict[str, Row], rows: dict[str, Row]) -> list[str]:
    """Say what is not as it was.

    Args:
        baseline: rows of an earlier bench by name.
        rows: of this one.

    Returns:
        A line for each figure that moved: memory by more than 1 %, speed by more than 15 %, a row
        that failed or no longer does.
    """
    found = []
    for name, row in rows.items():
        former = baseline.get(name)
        if former is None or former is row or "left out" in (row["state"], former["state"]):
            continue
        if row["state"] != former["state"]:
            found.append(f"{name}: {row['state']}, was {former['state']}")
        elif row["state"] == "measured":
            found += [f"{name}: {words}" for words in _moves(former, row)]
    return found


def _moves(former: Row, row: Row) -> list[str]:
    same = ("num_ranks", "p2p", "weights")
    others = [name for name in same if row[name] != former[name]]
    if others:
        told = ", ".join(f"{name} {former[name]}, now {row[name]}" for name in others)
        return [f"not compared: {told}"]
    figures = [
        (what, former[name], row[name], share)
        for name, (what, share, least) in FIGURES.items()
        if abs(row[name] - former[name]) >= least
    ]
    since = f"{former['date']}, {former['commit']}"
    return [
        f"{what} {old:,.2f} -> {new:,.2f} ({new / old - 1:+.1%} since {since})"
        for what, old, new, most in figures
        if old > 0 and abs(new / old - 1) > most
    ]


def gains(bench: dict[str, Any]) -> list[str]:
    """What the plan's choice gains over the settings of the same shape that a user would write."""
    rows = [row for row in bench["rows"] if row["state"] == "measured"]
    found = []
    for row in (row for row in rows if row["place"] == "fit"):
        others = [other for other in rows if other["shape"] == row["shape"] and other is not row]
        others = [other for other in others if other["num_ranks"] == row["num_ranks"]]
        ratios = {other["place"]: row["tokens_per_s"] / other["tokens_per_s"] for other in others}
        told = ", ".join(f"{ratio:.2f}x {place}" for place, ratio in ratios.items())
        least = bench["least_gain"]
        if least and "full_shard" in ratios:
            verdict = "reached" if ratios["full_shard"] >= least else "MISSED"
            told += f"; asked for {least}x full_shard: {verdict}"
        found.append(f"{row['name']}: {told or 'alone in its shape'}. Chosen: {row['plan_note']}")
    return found


def write(stem: Path, bench: dict[str, Any]) -> None:
    """Write the JSON file, the page and the bars, each whole or not at all.

    Args:
        stem: path of the files without their endings.
        bench: what the JSON file holds.
    """
    texts = {
        ".json": json.dumps(bench, indent=1, default=str) + "\n",
        ".svg": picture(bench),
        ".md": markdown(bench, stem),
    }
    for ending, text in texts.items():
        draft = stem.with_name(f".{stem.name}{ending}.part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(stem.with_suffix(ending))


def markdown(bench: dict[str, Any], stem: Path) -> str:
    """The page: where, the table, what moved, each row beside its plan, the command lines.

    Args:
        bench: what the JSON file holds.
        stem: path of the files, for the picture.
    """
    here, rows = bench["machine"], bench["rows"]
    package = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    budget = bench["gpu_budget_gib"]
    capped = f"each card's allocator capped at {budget:g} GiB; " if budget else ""
    parts = [f"# {bench['title']}: what each setting needs and how fast it is"]
    parts += [f"**{note}.**" for note in bench["notes"]]
    parts += [
        f"{bench['date']}. Machine: {here['cards']}; {here['cpu']}, {here['num_cores']} cores, "
        f"{here['host_total_gib']:.0f} GiB; {here['platform']}. {package}; fsdp_qlora at "
        f"{bench['commit']}. Weights: {bench['weights']}; random tokens; {capped}LoRA r 16 on all "
        "linears, NF4 with double quantisation, every layer checkpointed unless the plan chose.",
        TERMS,
        _table(rows),
        f"![bars]({stem.name}.svg)",
    ]
    sources = {(s["card_gb"], s["host_gb"], s["source"]) for row in rows if (s := row["seed"])}
    parts += [
        f"- To be beaten, {source}: {card:g} GB a card" + (f", {host:g} GB host." if host else ".")
        for card, host, source in sorted(sources, key=str)
    ]
    sections = {"Chosen by the plan": gains(bench), "Moved since the stored bench": bench["moved"]}
    sections["Failed or left out"] = [
        f"{row['name']}: {row['reason']}" for row in rows if row["state"] != "measured"
    ]
    for title, lines in sections.items():
        parts += ["\n".join([f"## {title}", "", *(f"- {each}" for each in lines)])] if lines else []
    tables = [f"{row['name']}\n" + "\n".join(row["table"]) for row in rows if row.get("table")]
    parts += _block("Predicted and measured", tables)
    commands = [f"# {row['name']}\n{row['command']}" for row in rows if row["command"]]
    parts += _block("Commands", [bench["command"], *commands])
    return "\n\n".join(parts) + "\n"


def _block(title: str, texts: list[str]) -> list[str]:
    body = "\n\n".join(texts)
    return [f"## {title}\n\n```text\n{body}\n```"] if texts else []


def _table(rows: list[Row]) -> str:
    heads = ["row", "ranks", "step s", "tokens/s", "card: allocated / reserved / in all (to plan)"]
    heads += ["host: added / all (to plan)", "to be beaten, GB: card + host", "loss", "measured"]
    lines = [heads, ["---"] * len(heads), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> list[str]:
    head = [f"{row['name']}: {row['what']}", str(row["num_ranks"])]
    seed, when = row["seed"], f"{row['date']} {row['commit']}"
    if row["state"] != "measured":
        return [*head, row["state"], "", "", "", "", "", when]
    step = row["step_s"]
    known = [loss for loss in row["losses"] if loss is not None]
    host = f" + {seed['host_gb']:g}" if seed and seed["host_gb"] else ""
    return [
        *head,
        f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['peak_allocated_gib']:.2f} / {row['peak_reserved_gib']:.2f} / {_pair(row, 'card')}",
        f"{row['host_added_gib']:.1f} / {_pair(row, 'host')}",
        f"{seed['card_gb']:g}{host}" if seed else "",
        f"{known[0]:.3f} - {known[-1]:.3f}" if known else "none",
        when,
    ]


def picture(bench: dict[str, Any]) -> str:
    """The rows as bars: card, host, speed; an SVG document.

    Args:
        bench: what the JSON file holds.
    """
    rows = bench["rows"]
    lines = [f"{bench['machine']['cards']}  ·  {bench['date']}", *bench["notes"][:1]]
    groups = []
    for title, unit, name, seed in (
        ("Memory of a card", "GiB with CUDA context; brown: to be beaten", "card", "card_gb"),
        ("Memory of the host", "GiB added at the peak; brown: to be beaten", "host", "host_gb"),
        ("Speed", "tokens/s of all ranks; thin line: slowest to fastest step", "speed", ""),
    ):
        bars = [bar for row in rows for bar in _bars(row, name, seed)]
        if any(bar.value for bar in bars):
            groups.append(Bars(title, unit, bars))
    return charts.draw_bars(bench["title"], lines, groups)


def _bars(row: Row, name: str, seed: str) -> list[Bar]:
    """The bar of a row, and that of the figure to be beaten below it."""
    if row["state"] != "measured":
        return [Bar(row["name"], FAILED, None, row["state"])]
    card = row["peaks"].get("card", [0.0, row["peak_reserved_gib"]])[1]
    values = {"card": card, "host": row["host_added_gib"], "speed": row["tokens_per_s"]}
    value = max(values[name], 0.0)
    ends = None
    if name == "speed":
        num_tokens = value * row["step_s"]["median"]
        ends = (num_tokens / row["step_s"]["max"], num_tokens / row["step_s"]["min"])
    colour = OURS if row["place"] != "fit" else PEER
    text = f"{value:,.0f}" if name == "speed" else f"{value:.1f}"
    bars = [Bar(row["name"], colour, value, text, ends)]
    goal = (row["seed"] or {}).get(seed)
    if goal:
        gib = goal * 1e9 / 2**30
        bars.append(Bar("", SEED_COLOUR, gib, f"{gib:.1f}  ({goal:g} GB {row['seed']['source']})"))
    return bars
