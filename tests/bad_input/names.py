"""Two hundred names that are no names: upwards, absolute, with signs that terminals obey."""

import random

from tests.bad_input.case import Case

PARTS = (
    *(
        "..",
        ".",
        "~",
        "~root",
        "",
        " ",
        "a",
        "b.jsonl",
        "x.py",
        "x.py:f",
        "con",
        "-rf",
        "--",
        "$HOME",
    ),
    *("*", "?", "\\", "|", ";", "&", "`id`", "$(id)", "%2e%2e", "..\\..", "\u202e", "\u200b", "é"),
    *("\x1b[2J", "\x07", "\r", "\t", "\n", "\x7f", "\udcff", "x" * 300, "file:", "https:", "hf:"),
    *("x.zip", "x.tar.gz", "train[:1%]", "refs", "@main", "#", "main", "etc", "passwd", ":", "::"),
)
FLAGS = ("--model_name", "--dataset", "--template", "--eval_split", "--recipe", "--resume")


def fuzzed(num: int = 200, seed: int = 5) -> list[Case]:
    """Names joined of odd parts, in turn for every flag that takes one."""
    chance, cases = random.Random(seed), []
    for i in range(num):
        sign = chance.choice("////:,.- ")
        name = sign.join(chance.choices(PARTS, k=chance.randint(1, 6)))
        name = chance.choice(["", "", "/", "../", "~"]) + name
        cases.append(Case(f"{i}", "", (f"{FLAGS[i % len(FLAGS)]}={name}",)))
    return cases


CASES = fuzzed()
