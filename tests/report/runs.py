"""Records of runs for the tests of the report."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path

from fsdp_qlora.planning import rows as names
from fsdp_qlora.report import page

# As train.py left it: two CPU ranks, 8 steps of a tiny model, held-out loss before and after.
REAL = Path(__file__).parent / "run"
VOID = {"meta", "link", "path", "polygon", "polyline", "wbr"}
CONFIG = {"model_name": "models/SmolLM2", "train_type": "qlora", "gpu_budget_gib": None}
# `data` of summary.json.
AUDIT = {
    "sources": ["a<b>.jsonl"],
    "num_rows": 1200,
    "num_cut": 3,
    "num_empty": 0,
    "epoch_tokens": 54_321,
    "padding_share": {"batches": 0.125, "packed": 0.01},
    "examples": {"cut": ["a<b>.jsonl:7", "a<b>.jsonl:9"], "empty": []},
    "notes": ["the end of text is never learned"],
}

# GiB of a GPU by row, about those of a 7B model; the ledger is off by what OFF says.
DEVICE = {
    "load": {names.PACKED: 1.5, names.CONTEXT: 1.25},
    "forward": {names.PACKED: 1.5, names.KEPT: 2.0, names.SLACK: 0.75, names.CONTEXT: 1.25},
    "backward": {names.PACKED: 1.5, names.KEPT: 2.0, names.LAYER: 1.75, names.CONTEXT: 1.25},
}
HOST = {"forward": {names.HOSTED: 3.0, names.PROCESSES: 4.0}}
OFF = {names.PACKED: 0.0, names.KEPT: 0.125, names.LAYER: 0.5, names.SLACK: -0.25}


def measured(phases, rank=0):
    """What a ledger would find; rank 1 holds a little more."""
    return {
        phase: {row: gib + OFF.get(row, 0.0625) + rank / 64 for row, gib in rows.items()}
        for phase, rows in phases.items()
    }


def gpu_facts(num_ranks=2):
    """`plan` and `ledger` of a run on GPUs, as summary.json has them."""
    return {
        "plan": {"device": DEVICE, "host": HOST, "peak_device_gib": 6.5, "peak_host_gib": 7.0},
        "ledger": {
            "ranks": [{"device": measured(DEVICE, rank)} for rank in range(num_ranks)],
            "host": measured(HOST),
        },
    }


def gpu_step(step, num_ranks=2, has_rows=True, seed=0):
    """A step of a run on 24 GiB GPUs; step 1 is the same in every call."""
    chance = random.Random(step + seed)
    ranks = []
    for rank in range(num_ranks):
        rows = {
            row: gib + chance.random() / 50
            for row, gib in measured(DEVICE, rank)["backward"].items()
        }
        reserved = sum(rows.values()) - 1.25
        memory = {
            "device_allocated_gib": 2.5,
            "device_reserved_gib": reserved,
            "device_peak_allocated_gib": reserved - 0.5,
            "device_peak_reserved_gib": reserved,
            "device_used_gib": reserved + 1.5,
            "device_total_gib": 24.0,
            "host_rss_gib": 2.0 + rank,
            "host_pss_gib": 1.5 + rank,
        }
        ranks.append(memory | ({"device_rows": rows} if has_rows else {}))
    host = {"host_total_gib": 16.0, "host_used_gib": 7.5, "host_peak_used_gib": 7.75}
    host |= {"host_rows": measured(HOST)["forward"], "cpu_cores": 2.5, "num_cpu_cores": 16}
    return {
        "step": step,
        "epoch": step / 100,
        "learning_rate": 1e-4 / step,
        "num_trained_tokens": 1000,
        "num_tokens": 4096,
        "loss": 1.5 + 1 / step + chance.random() / 20,
        "grad_norm": 0.5 + chance.random() / 10,
        "tokens_per_s": 8000 + chance.random() * 500,
        "step_s": 0.5 + chance.random() / 100,
        "ranks": ranks,
        "host": host,
    }


def step_line(step, loss, num_ranks=2, gpu_gib=0.0):
    """A step of an early version: few fields."""
    rank = {"device_peak_reserved_gib": gpu_gib, "device_total_gib": 24.0 * bool(gpu_gib)}
    return {
        "step": step,
        "epoch": step / 10,
        "loss": loss,
        "tokens_per_s": 400.0,
        "step_s": 2.0,
        "ranks": [rank | {"host_rss_gib": 1.0 + i} for i in range(num_ranks)],
        "host": {"host_used_gib": 6.0, "host_total_gib": 15.0},
    }


def write_run(path, steps, evals=(), config=CONFIG, summary=None):
    """A record: the run's line, a held-out loss, the steps, a held-out loss."""
    lines = [{"event": "run", "config": config}]
    lines += [{"event": "eval", "when": "before", "loss": loss} for loss in evals[:1]]
    lines += steps
    lines += [{"event": "eval", "when": "after", "loss": loss} for loss in evals[1:]]
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_gpus(path):
    """A finished run on two GPUs with plan and ledger."""
    steps = [gpu_step(i) for i in range(1, 31)]
    summary = gpu_facts() | {"is_complete": True}
    config = CONFIG | {"max_steps": 30, "batch_size": 4}
    return write_run(path, steps, (3.0, 2.0), config, summary)


def page_of(*run_dirs, out):
    """Write the report of some runs, and read its page."""
    return Page(page.write([*run_dirs], out).read_text())


def steps_of(path):
    """The step lines of a record, read without the report's help."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "event" not in row]


class Page(HTMLParser):
    """A page as a reader without a browser finds it.

    Attributes:
        tables: title -> row name -> [(text, exact value or None)] of its cells.
        tags: (name, attributes) of every element.
        words: all text, style and script left out.
        data: what its script draws.
    """

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.words = {}, [], ""
        self._path, self._title, self._row, self._cells = [], "", None, []
        self._chapter = ""
        self.data = {}
        self.feed(html)
        self.words = " ".join(self.words.split())
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids)), "scripts find parts by their id"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self._path += [] if tag in VOID else [tag]
        if tag == "table":
            self._title = self._title if "details" in self._path else ""
        elif tag == "tr":
            self._row, self._cells = "", []
        elif tag == "td":
            self._cells.append(("", None))
        elif tag == "data" and "td" in self._path:
            self._cells[-1:] = [("", float(attrs["value"]))]
        elif tag in ("summary", "h2", "caption"):
            self._title = ""

    def handle_endtag(self, tag):
        while tag not in VOID and self._path and self._path.pop() != tag:
            pass
        if tag == "tr" and self._cells:
            title = self._title or self._chapter
            cells = [(text.strip(), value) for text, value in self._cells]
            self.tables.setdefault(title, {})[self._row] = cells

    def handle_data(self, text):
        here = self._path[-1] if self._path else ""
        if here == "script" and self.tags[-1][1].get("id") == "page-data":
            self.data = json.loads(text)
        if here in ("style", "script"):
            return
        self.words += text + " "
        if here == "h2":
            self._chapter = text
        elif here in ("caption", "summary"):
            self._title += text
        elif here == "th" and self._row is not None:
            self._row += text
        elif "td" in self._path and "small" not in self._path and self._cells:
            old, value = self._cells[-1]
            self._cells[-1] = (old + text, value)

    def memory(self, title, run=0):
        """Bins of a GPU or host: row -> GiB, "total" and "held" too, and its levels."""
        chart = self.data["runs"][run]["memory"][title]
        names = ["step", "total", "held", *chart["names"]]
        return [dict(zip(names, found, strict=False)) for found in chart["bins"]], chart["levels"]

    def columns(self, run=0):
        return self.data["runs"][run]["columns"]

    def row(self, title, name):
        """Exact values of a row."""
        return [value for _, value in self.tables[title][name]]
