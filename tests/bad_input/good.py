"""Nothing is wrong: this run would start."""

from tests.bad_input.case import Case

CASES = [Case("nothing is wrong", "")]
