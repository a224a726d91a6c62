"""What `doctor` finds: one line each, fine or with what to do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fsdp_qlora.errors import DONE, UserError, one_line

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: OK, WARNING or PROBLEM.
        value: what was found.
        remedy: what to do about it; "" when it is OK.
        code: exit code of the command, where this keeps training from working as it is.
        card: whose speeds were measured, as the driver calls it; "" = none.
        speeds: some of hardware.SPEEDS, of that card.
    """

    name: str
    status: str
    value: str
    remedy: str = ""
    code: int = DONE
    card: str = ""
    speeds: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The finding in one line of printable text."""
        parts = [self.value, self.remedy] if self.remedy else [self.value]
        return one_line(f"{self.status:<8} {self.name:<24} {'; '.join(parts)}")


def ok(name: str, value: str, card: str = "", **speeds: float) -> Finding:
    """Return a finding that asks for nothing.

    Args:
        name: what was looked at.
        value: what was found.
        card: whose speeds follow.
        speeds: some of hardware.SPEEDS.
    """
    return Finding(name, OK, value, card=card, speeds=speeds)


def warning(name: str, value: str, remedy: str) -> Finding:
    """Return a finding that training survives.

    Args:
        name: what was looked at.
        value: what was found.
        remedy: what to do.
    """
    return Finding(name, WARNING, value, remedy)


def problem(name: str, value: str, remedy: str, code: int = DONE) -> Finding:
    """Return a finding of something that does not work.

    Args:
        name: what was looked at.
        value: what was found.
        remedy: what to do.
        code: exit code of the command; DONE where training does without it.
    """
    return Finding(name, PROBLEM, value, remedy, code)


def softly(
    name: str, check: Callable[[], Iterable[Finding]], remedy: str, code: int = DONE
) -> list[Finding]:
    """Run a check whose failure is a finding too, so that it never hides the others.

    Args:
        name: of the finding, should the check fail.
        check: gives findings; those before its failure count.
        remedy: what to do about an error that does not say so itself.
        code: exit code of the command for such an error.

    Returns:
        What was found.
    """
    found: list[Finding] = []
    try:
        found.extend(check())
    except UserError as error:
        found.append(problem(name, f"{error.got}: {error.rule}", error.remedy, error.code))
    except Exception as error:  # whatever is broken here
        found.append(problem(name, first_line(error), remedy, code))
    return found


def first_line(error: BaseException) -> str:
    """An exception in one short line.

    Args:
        error: any.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
