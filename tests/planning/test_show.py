"""`python -m fsdp_qlora plan` as a user runs it."""

import json
import os
import sys
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning import rows, show
from tests import timing

ROOT = Path(__file__).parents[1]
ARGS = ["--model_name=llama-2-70b", "--lora_rank=16", "--batch_size=2", "--context_length=2048"]
CARDS = ["--cards=2x3090", "--host=64"]


def output(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a plan prints."""
    assert main(["plan", *argv]) == code
    return capsys.readouterr().out


def test_a_plan_answers_in_less_than_a_second_without_torch():
    """The fastest of three, with the search for a better setting and what would make it fit."""
    program = (
        "import sys; from fsdp_qlora.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'transformers', 'numpy'} & set(sys.modules) else code)"
    )
    for GPUs, code in (("2xA100-80", 0), ("2x12", 3)):
        words = ["plan", "--model_name=llama-2-70b", "--batch_size=8", f"--cards={GPUs}"]
        argv = [sys.executable, "-c", program, *words, "--context_length=2048"]
        done, seconds = timing.fastest(argv, ROOT)
        assert (done.returncode, done.stderr) == (code, "")
        assert seconds < 1.0


def test_json_holds_the_tables_and_survives_a_round_trip(capsys: pytest.CaptureFixture[str]):
    """Rows add up to totals, the largest total is the peak, numbers are those of the text."""
    values = json.loads(output(capsys, *ARGS, *CARDS, "--json"))
    assert values == json.loads(json.dumps(values))
    for place, names in (("card", rows.DEVICE_ROWS), ("host", rows.HOST_ROWS)):
        table = values[place]
        assert table["phases_gib"].keys() == set(rows.PHASES)
        for phase, parts in table["phases_gib"].items():
            assert parts.keys() <= set(names)
            assert sum(parts.values()) == pytest.approx(table["totals_gib"][phase])
        assert table["peak_gib"] == max(table["totals_gib"].values())
    text = output(capsys, *ARGS, *CARDS)
    assert f"{values['card']['peak_gib']:.1f} of 23.6 GiB on a 3090" in text
    assert f"{values['tokens_per_s']:,.0f} tokens/s" in text
    assert values["fits"] and values["num_steps"] == 128
    assert values["eta_s"] == pytest.approx(128 * values["step_s"])


@pytest.mark.parametrize(
    "words",
    [
        [*ARGS, *CARDS, "--explain"],
        [*ARGS, "--cards=2x12", "--host=40", "--batch_size=16"],
        ["--model_name=llama-2-7b", "--cards=none", "--world_size=2", "--train_type=lora"],
        ["--model_name=gemma-2-9b", "--cards=3090,T4", "--sharding_strategy=ddp"],
    ],
)
def test_no_line_is_wider_than_100_columns(capsys: pytest.CaptureFixture[str], words: list[str]):
    """And none is broken in the middle of an option."""
    main(["plan", *words])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line.endswith("--")]


def test_every_row_is_explained_by_numbers_that_make_it(capsys: pytest.CaptureFixture[str]):
    """The products shown are the row."""
    text = output(capsys, *ARGS, *CARDS, "--explain")
    line = "full: layer's input: 4,096 tokens x 8,192 hidden x 2 bytes x 80 layers = 5.000 GiB"
    assert line in text
    assert "one copy for all ranks: 80 layers x 441,606,144 bytes = 32.902 GiB" in text
    options, cfg, machine = show.parse([*ARGS, *CARDS])
    assert not options.explain
    assert (machine.num_ranks, machine.host_gib, cfg.lora_rank) == (2, 64.0, 16)


def test_what_does_not_fit_says_so_with_a_remedy_that_fits(capsys: pytest.CaptureFixture[str]):
    """Code 3; the flags of the first remedy, added to the command line, give code 0."""
    words = [*ARGS, "--cards=2x12", "--host=64", "--batch_size=8", "--lora_dropout=0"]
    assert "MISSING" in output(capsys, *words, code=3)
    remedy = json.loads(output(capsys, *words, "--json", code=3))["to_fit"][0]
    again = [f"--{name}={value}" for name, value in remedy["flags"].items()]
    assert again
    values = json.loads(output(capsys, *words, *again, "--json"))
    assert values["card"]["peak_gib"] == pytest.approx(remedy["card_gib"])


def test_a_better_setting_is_what_its_flags_give(capsys: pytest.CaptureFixture[str]):
    """Added to the command line they give the memory and the speed that were promised."""
    first = json.loads(output(capsys, *ARGS, *CARDS, "--json"))
    again = [f"--{name}={value}" for name, value in first["better"]["flags"].items()]
    second = json.loads(output(capsys, *ARGS, *CARDS, *again, "--json"))
    assert second["card"]["peak_gib"] == pytest.approx(first["better"]["card_gib"])
    speed = second["tokens_per_s"] / first["tokens_per_s"]
    assert speed == pytest.approx(first["better"]["speed"])
    assert second["better"] is None


def test_all_faults_are_told_at_once():
    """Those of plan's own options and those of train.py's."""
    words = ["--cards=2x3091", "--host=-1", "--batch_size=x", "--lora_rnk=3"]
    with pytest.raises(UserError) as caught:
        show.parse(words)
    for part in ("did you mean 3090?", "--host -1: must be > 0", "--batch_size x", "--lora_rank?"):
        assert part in str(caught.value)
    assert str(caught.value).count(" | ") == 3
    with pytest.raises(UserError, match="a rank needs one"):
        show.parse(["--cards=2x3090", "--world_size=3"])
    assert show.parse(["--gpus", "2x3090"])[2] == show.parse(["--cards=2x3090"])[2]


def test_measured_speeds_are_used_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From $FSDP_QLORA_CACHE/machine.json, which doctor writes."""
    monkeypatch.setitem(os.environ, "FSDP_QLORA_CACHE", str(tmp_path))
    assert "by tabled speeds" in " ".join(output(capsys, *ARGS, *CARDS).split())
    row = {"bf16_tflops": 5.0}
    (tmp_path / "machine.json").write_text(json.dumps({"cards": {"RTX 3090": row}}))
    assert "by measured speeds" in " ".join(output(capsys, *ARGS, *CARDS).split())
