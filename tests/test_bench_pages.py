"""The pages of the benches against the plan of today: every measured row within five percent."""

import json
import shlex
from pathlib import Path

import pytest

from fsdp_qlora import arch, config
from fsdp_qlora.planning import memory
from fsdp_qlora.planning.sizes import setting_for, sizes

RECIPES = Path(__file__).parent.parent / "recipes"
ROWS = [
    (page.stem, row)
    for page in sorted(RECIPES.glob("bench-*.json"))
    for row in json.loads(page.read_text())["rows"]
    if row.get("state") == "measured" and row["place"] != "fit"
]


def test_there_are_pages():
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("page", "row"), ROWS, ids=[f"{p}-{row['name']}" for p, row in ROWS])
def test_the_plan_foretells_a_card_of_the_bench(page, row):
    """Peak of the card, CUDA context and collectives included."""
    cfg = config.parse(shlex.split(row["command"])[2:])
    info = arch.read(cfg.model_name, need_weights=False)
    setting = setting_for(info, cfg, row["num_ranks"])
    has_peer = row["p2p"] == "on" and row["num_ranks"] > 1
    planned = memory.device(sizes(info, cfg), cfg, setting, has_peer=has_peer).peak_gib
    measured = row["peaks"]["card"][1]
    assert planned == pytest.approx(measured, rel=0.05), (planned, measured)
