"""From a command line and a recipe file to the fields of a dataclass, with all faults at once."""

import contextlib
import dataclasses
import difflib
import math
import re
import shutil
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import UserError, join

OptionsT = typing.TypeVar("OptionsT")
BOOL_WORDS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
RULES: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda value: value > 0,
    ">= 0": lambda value: value >= 0,
    ">= 1": lambda value: value >= 1,
    ">= 2": lambda value: value >= 2,
    "-1 or >= 1": lambda value: value == -1 or value >= 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "from 0 to 65535": lambda value: 0 <= value <= 65535,
    "from 0 to 2**32 - 1": lambda value: 0 <= value < 2**32,
    "epoch or >= 1": lambda value: re.fullmatch(r"epoch|[1-9][0-9]{0,8}", value) is not None,
    "a number of steps, or minutes as in 30m": lambda value: (
        re.fullmatch(r"\d{1,9}m?", value) is not None
    ),
    "printable text": lambda value: value.strip() != "" and value.isprintable(),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """One value as the user wrote it.

    Args:
        text: the value, not yet converted.
        place: how to show it in an error, such as "--batch_size x" or "batch_size = x in r.toml".
    """

    text: str
    place: str


def flag(
    default: Any,
    group: str,
    meaning: str,
    choices: Mapping[Any, bool] | None = None,
    rule: str | None = None,
    idle: str | None = None,
) -> Any:
    """Declare one option of a dataclass.

    Args:
        default: value when the user gives none.
        group: heading under which `--help` shows the option.
        meaning: one line of help.
        choices: allowed values; a value mapped to False is known but not built yet.
        rule: key of `RULES` that numbers must obey.
        idle: why the option has no effect here; None for one that has.

    Returns:
        A dataclass field that carries all this as metadata.
    """
    assert rule is None or rule in RULES
    metadata = {"group": group, "help": meaning, "choices": choices, "rule": rule, "idle": idle}
    return dataclasses.field(default=default, metadata=metadata)


def idle(default: Any, reason: str) -> Any:
    """Declare an option of older command lines that is accepted without effect.

    Args:
        default: value when the user gives none.
        reason: why it has none; printed once when the option is set.
    """
    return flag(default, "accepted, without effect", reason, idle=reason)


def any_of(*names: str) -> dict[str, bool]:
    """Return choices that are all built."""
    return dict.fromkeys(names, True)


def read(
    argv: Sequence[str], cls: type, aliases: Mapping[str, str], recipes_dir: Path
) -> tuple[dict[str, Any], list[UserError]]:
    """Read the command line, and below it the recipe it names, into values for `cls`.

    Args:
        argv: arguments without the program's name.
        cls: dataclass made of `flag` fields, one of them called `recipe`.
        aliases: other spelling -> field name.
        recipes_dir: where a bare recipe name is looked up.

    Returns:
        The values the user gave, by field name, and every fault found.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    given, faults = read_argv(argv, types, aliases)
    if "recipe" in given:
        try:
            from_recipe, recipe_faults = read_recipe(
                given["recipe"].text, recipes_dir, types, aliases
            )
        except UserError as fault:
            from_recipe, recipe_faults = {}, [fault]
        given = from_recipe | given
        faults += recipe_faults
    values = {}
    for name, entry in given.items():
        try:
            values[name] = convert(entry, fields[name], types[name])
        except UserError as fault:
            faults.append(fault)
    return values, faults


def read_argv(
    argv: Sequence[str], types: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[dict[str, Given], list[UserError]]:
    """Split a command line into values by field name; the last one of a repeated flag counts.

    Args:
        argv: `--flag value`, `--flag=value`, for booleans bare `--flag`; `-` is as good as `_`.
        types: field name -> type.
        aliases: other spelling -> field name.

    Returns:
        The values and the faults: unknown flags, missing values, words that belong to no flag.
    """
    given: dict[str, Given] = {}
    faults = []
    words = list(argv)
    while words:
        word = words.pop(0)
        shown, has_value, text = word.partition("=")
        if not word.startswith("--"):
            faults.append(UserError(word, "belongs to no flag", "write --flag value"))
            continue
        name = find_name(shown[2:], types, aliases)
        if not has_value and words and not words[0].startswith("--"):
            has_value, text = "yes", words.pop(0)
        elif not has_value and name is not None and types[name] is bool:
            has_value, text = "yes", "true"
        if name is None:
            faults.append(unknown(shown, shown[2:], types, aliases))
        elif not has_value:
            faults.append(UserError(shown, "has no value", f"write {shown}=VALUE"))
        else:
            given[name] = Given(text, f"{shown} {text}")
    return given, faults


def find_name(spelling: str, names: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """Return the field that `spelling` means, or None."""
    name = spelling.replace("-", "_")
    name = aliases.get(name, name)
    return name if name in names else None


def unknown(
    shown: str, spelling: str, names: Mapping[str, Any], aliases: Mapping[str, str]
) -> UserError:
    """Return the error for a name that is no option, with the nearest one."""
    plain = spelling.replace("-", "_").lower()
    near = difflib.get_close_matches(plain, [*names, *aliases], n=1)
    remedy = f"did you mean --{near[0]}?" if near else "--help lists all"
    return UserError(shown, "no such option", remedy)


def read_recipe(
    name: str, recipes_dir: Path, types: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[dict[str, Given], list[UserError]]:
    """Read a TOML file of `option = value` lines.

    Args:
        name: a path, or the bare name of a file in `recipes_dir`.
        recipes_dir: directory of the recipes that come with the project.
        types: field name -> type.
        aliases: other spelling -> field name.

    Returns:
        The values and the faults: unknown names, values that are tables or dates.

    Raises:
        UserError: the file is absent or no TOML.
    """
    path = find_recipe(name, recipes_dir)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"not a TOML file: {error}", "repair the file") from error
    given: dict[str, Given] = {}
    faults = []
    for key, value in table.items():
        field_name = find_name(key, types, aliases)
        place = f"{key} = {value} in {path}"
        if field_name is None or field_name == "recipe":
            faults.append(unknown(f"{key} in {path}", key, types, aliases))
        elif isinstance(value, bool | int | float | str | list):
            given[field_name] = Given(to_text(value), place)
        else:
            faults.append(UserError(place, "must be text, number or true/false", "rewrite it"))
    return given, faults


def find_recipe(name: str, recipes_dir: Path) -> Path:
    """Return the path of a recipe given by path or bare name.

    Raises:
        UserError: there is no such file; names the recipes that exist.
    """
    is_path = name.endswith(".toml") or "/" in name
    path = Path(name) if is_path else recipes_dir / f"{name}.toml"
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            return path
    known = sorted(found.stem for found in recipes_dir.glob("*.toml"))
    raise UserError(f"--recipe {name}", "no such file", f"recipes here: {', '.join(known)}")


def to_text(value: Any) -> str:
    """Return a TOML value as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(to_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def convert(entry: Given, field: dataclasses.Field, hint: Any) -> Any:
    """Turn a text into the value of a field.

    Args:
        entry: what the user wrote.
        field: a field made by `flag`.
        hint: its type: bool, int, float or str, or one of these with None.

    Returns:
        The value, which obeys the field's choices and rule.

    Raises:
        UserError: it is of another type, no choice, not built yet, or out of range.
    """
    kinds = typing.get_args(hint) or (hint,)
    kind = kinds[0]
    nothing = ("none", "null") if kind is str else ("none", "null", "auto")
    if type(None) in kinds and entry.text.lower() in nothing:
        return None
    default = "leave it out" if field.default is None else f"default is {to_text(field.default)}"
    try:
        value = BOOL_WORDS[entry.text.lower()] if kind is bool else kind(entry.text)
    except (KeyError, ValueError):
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(entry.place, f"must be {TYPE_WORDS[kind]}", default)
    choices, rule = field.metadata["choices"], field.metadata["rule"]
    if choices is not None and not choices.get(value, False):
        built = ", ".join(to_text(choice) for choice, is_built in choices.items() if is_built)
        problem = "not built yet" if value in choices else "no such choice"
        raise UserError(entry.place, problem, f"use {built}")
    if rule is not None and not RULES[rule](value):
        raise UserError(entry.place, f"must be {rule}", default)
    return value


def render_help(cls: type, usage: str) -> str:
    """Return the help text: every option under its group, with choices and default.

    Args:
        cls: dataclass made of `flag` fields.
        usage: the lines above the options.

    Returns:
        Text as wide as the terminal, at most 100 columns.
    """
    groups: dict[str, list[str]] = {}
    width = min(shutil.get_terminal_size().columns, 100)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        built = [
            to_text(choice) for choice, is_built in (meta["choices"] or {}).items() if is_built
        ]
        parts = [meta["help"], f"({' | '.join(built)})" if len(built) > 1 else ""]
        parts += [f"[{to_text(field.default)}]" if field.default is not None else ""]
        text = " ".join(part for part in parts if part)
        head = f"  --{field.name} "
        body = textwrap.wrap(text, max(width - 33, 20), break_on_hyphens=False)
        lines = [head.ljust(33) + body[0]] if len(head) <= 33 else [head, " " * 33 + body[0]]
        groups.setdefault(meta["group"], []).extend(lines + [" " * 33 + more for more in body[1:]])
    sections = [f"{group}\n" + "\n".join(lines) for group, lines in groups.items()]
    return "\n\n".join([usage, *sections]) + "\n"


def show_help_if_asked(argv: Sequence[str], cls: type, usage: str) -> None:
    """Print the help and leave with code 0 when `argv` has `--help` or `-h`.

    Args:
        argv: arguments without the program's name.
        cls: dataclass made of `flag` fields.
        usage: the lines above the options.

    Raises:
        SystemExit: help was asked for.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(render_help(cls, usage))
        raise SystemExit(0)


def parse(argv: Sequence[str], cls: type[OptionsT], usage: str, needed: Sequence[str]) -> OptionsT:
    """Read the command line of a command with options of its own.

    Args:
        argv: arguments without the command.
        cls: dataclass of its options, made of `flag` fields.
        usage: the lines above the options in the help.
        needed: options that have no default.

    Returns:
        The options.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    show_help_if_asked(argv, cls, usage)
    values, faults = read(argv, cls, {"model_name_or_path": "model_name"}, Path())
    shown = " ".join(fault.got for fault in faults)
    for name in needed:
        if values.get(name) is None and f"--{name}" not in shown:
            faults.append(UserError(f"--{name}", "must be given", "--help tells what it means"))
    if faults:
        raise join(faults)
    return cls(**values)
