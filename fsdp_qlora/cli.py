"""From a command line and a recipe file to the fields of a dataclass, with all faults at once."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
import tomllib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple, TextIO, TypeVar

from fastcore.basics import str2bool  # it reads the reference's command lines too

from fsdp_qlora import atomic
from fsdp_qlora.errors import UserError, read_table, refuse

OptionsT = TypeVar("OptionsT")
Words = Sequence[str]
TOO_SMALL, TOO_LARGE, MOST_CHARS = 1e-30, 2**32, 100_000  # command lines hold no longer text
TABLE = read_table(__file__, "commands.toml")
TYPES = {"int": int, "float": float, "path": Path}
YAML, SWITCH = (".yaml", ".yml"), {"on", "off"}
TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
DELAY_S, LINE_S = 2.0, 30.0  # until a bar is seen; between lines where there is no terminal
RULES: dict[str, Callable[[Any], Any]] = {
    "": lambda value: True,
    "-1 or >= 1": lambda value: value == -1 or value >= 1,
    "a number of steps, or from 0.0 to 1.0": lambda v: 0 <= v <= (1 if type(v) is float else 10**9),
    "a JSON object": lambda value: atomic.parse_json(value) is not None,
    "printable text": lambda value: value.strip() != "" and value.isprintable(),
}
RULES |= {rule: re.compile(text).fullmatch for rule, text in TABLE["patterns"].items()}
RULES |= {rule: lambda v, a=a, b=b: a <= v <= b for rule, (a, b) in TABLE["bounds"].items()}


class _SafeFile(io.FileIO):
    """A file that loses what it cannot take, and remembers why; nobody may read it any more."""

    reason = ""

    def write(self, data: Any) -> int:
        """Write, and say that all is written."""
        try:
            return super().write(data)
        except BrokenPipeError:
            pass  # its reader has seen enough
        except OSError as error:
            self.reason = error.strerror or str(error)
        return len(data)


def _safe(stream: Any) -> TextIO:
    try:
        buffer = io.BufferedWriter(_SafeFile(stream.buffer.fileno(), "wb", closefd=False))
        os.set_blocking(stream.buffer.fileno(), True)  # else a slow reader is an error
    except (OSError, AttributeError):  # a notebook's, a test's: no file of the system
        return stream
    is_prompt = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=is_prompt)


@contextlib.contextmanager
def safe_output() -> Iterator[Callable[[], Any]]:
    """Let nothing that is printed end a command: what its streams do not take is lost.

    Their reader may go, their disk be full, their encoding lack a character, which is escaped then;
    or they were closed from the start. A decorator too.

    Yields:
        A function that flushes stdout and tells why it lost text; "" where all was taken that
        somebody read.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # else the next file that is opened would get its number
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(null, "r" if name == "stdin" else "w"))
    out, err = _safe(sys.stdout), _safe(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield lambda: out.flush() or getattr(getattr(out.buffer, "raw", out), "reason", "")
        finally:
            out.flush()
            err.flush()


class Progress:
    """How far something is that takes long: a bar on a terminal, elsewhere a line now and then.

    Both go to stderr. What is over in DELAY_S shows nothing; a line comes every LINE_S at least,
    also where nothing moves.
    """

    def __init__(self, what: str, total: int = 0, unit: str = "", is_silent: bool = False) -> None:
        """Show nothing yet.

        Args:
            what: is done.
            total: of `unit`; 0: unknown.
            unit: what is counted, in the plural.
            is_silent: for the ranks that do not show it.
        """
        from tqdm import tqdm  # --help needs none

        self.count, self.num_bytes, self._words = 0, 0, (what, unit)
        self._over, self._is_live, self._began_s = Event(), sys.stderr.isatty(), time.monotonic()
        form = {"bar_format": "{desc} {bar}" if total else "{desc}", "dynamic_ncols": True}
        is_off = is_silent or not self._is_live
        self._bar = tqdm(total=total, delay=DELAY_S, leave=False, disable=is_off, **form)
        self._thread = None if is_silent else Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        """Begin."""
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no bar behind."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.close()

    def update(self, count: int = 1, num_bytes: int = 0) -> None:
        """Count what is done, and the bytes of it."""
        self.count, self.num_bytes = self.count + count, self.num_bytes + num_bytes
        self._bar.set_description_str(self.line(), refresh=False)
        self._bar.update(count)

    def line(self) -> str:
        """How far it is, in words."""
        (what, unit), took_s = self._words, time.monotonic() - self._began_s
        total = f"/{self._bar.total}" if self._bar.total else ""
        speed = f"{self.num_bytes / took_s / 2**30:.2f} GiB/s" if self.num_bytes else ""
        done = f"{self.count}{total} {unit}" if unit else ""
        return f"{what:<9} {', '.join(filter(None, (done, speed, f'{took_s:.0f} s')))}"

    def _tick(self) -> None:
        show: Callable[[str], Any] = functools.partial(print, file=sys.stderr, flush=True)
        wait_s, show = (DELAY_S, self._bar.set_description_str) if self._is_live else (LINE_S, show)
        while not self._over.wait(wait_s):
            show(self.line())


class Given(NamedTuple):
    """One value as the user wrote it.

    Args:
        text: the value, not yet converted.
        place: how to show it in an error, such as "--batch_size x" or "batch_size = x in r.toml".
    """

    text: str
    place: str


class Alias(NamedTuple):
    """Another name of an option, or a name that is no option any more; `--help` shows neither.

    Args:
        option: the option that it means; "": none.
        write: form of its value as that of the option; "": the value says nothing.
        when_both: when the option is given too: "refuse", "replace" it, or "add" to it.
        usual: its default of old, which changes nothing.
        reason: why the name has no effect.
        is_refused: any other value than the usual one is a fault.
        remedy: what to do about that.
    """

    option: str = ""
    write: Callable[[str], str] = str
    when_both: str = "refuse"
    usual: str = ""
    reason: str = ""
    is_refused: bool = False
    remedy: str = "leave it out"

    def changes(self, text: str) -> bool:
        """Whether a value is another than the usual one, however true and false are spelled."""
        return plain(text) != plain(self.usual)


def flag(default: Any, group: str, meaning: str, choices: Any = None, rule: str = "") -> Any:
    """Declare one option of a dataclass.

    Args:
        default: value when the user gives none.
        group: heading under which `--help` shows the option.
        meaning: one line of help.
        choices: allowed values, any iterable.
        rule: key of RULES that values must obey.

    Returns:
        A dataclass field that carries all this as metadata.
    """
    assert rule in RULES
    allowed = None if choices is None else tuple(choices)
    metadata = {"group": group, "help": meaning, "choices": allowed, "rule": rule}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def options(cls: type) -> dict[str, SimpleNamespace]:
    """Return the options of a dataclass made of `flag` fields.

    Args:
        cls: the dataclass.

    Returns:
        Name -> default, group, help, choices, rule (see `flag`), kinds (types of a value, in the
        order they are tried) and is_optional (None is a value too).
    """
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        own = {"kinds": [kind for kind in kinds if kind is not NoneType], "default": field.default}
        found[field.name] = SimpleNamespace(is_optional=NoneType in kinds, **own, **field.metadata)
    return found


def parse(argv: list[str], cls: type[OptionsT], usage: str, needed: Sequence[str] = ()) -> OptionsT:
    """Read the command line of a command that has options of its own.

    Args:
        argv: arguments without the command.
        cls: dataclass of its options.
        usage: the first line of the help.
        needed: options that have no default.

    Returns:
        The options.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    show_help_if_asked(argv, cls, usage)
    values, faults = Reader(cls, {"model_name_or_path": Alias("model_name")}).read(argv)
    reported = " ".join(fault.got for fault in faults)
    for name in needed:
        if values.get(name) is None and f"--{name}" not in reported:
            faults.append(UserError(f"--{name}", "must be given", "--help tells what it means"))
    refuse(faults)
    if "out" in values:  # of --out=~/x no shell makes a path
        values["out"] = os.path.expanduser(values["out"] or "")
    return cls(**values)


def chosen(argv: list[str], known: Mapping[str, Sequence[str]], command: str = "") -> str:
    """Return the first word of a command line, one of several; or list them.

    Args:
        argv: the word and what follows it; nothing or --help asks for the list.
        known: word -> where its function is, what it does.
        command: of which they are forms; "": they are the commands.

    Returns:
        The word; "" where they were listed.

    Raises:
        UserError: it is none of them.
    """
    program = f"python -m fsdp_qlora {command}".strip()
    if not argv or argv[0] in ("-h", "--help"):
        width, name = max(map(len, known)) + 1, "FORM" if command else "COMMAND"
        rows = [f"  {word:<{width}} {words}" for word, (_, words) in known.items()]
        print(f"usage: {program} {name} ...  ({name} --help tells more)", "", *rows, sep="\n")
        return ""
    if argv[0] not in known:
        rule = f"want one of {' '.join(known)}"
        raise UserError(f"{command} {argv[0]}".strip(), rule, f"{program} --help")
    return argv[0]


def split(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Split a command line that has flags of train.py, too.

    Args:
        argv: arguments without the command.
        names: of the command's own options.

    Returns:
        The command's own arguments, and the others.
    """
    own, rest = list[str](), list[str]()
    part = rest
    for word in argv:
        if word.startswith("--"):
            part = own if word[2:].partition("=")[0].replace("-", "_") in names else rest
        part.append(word)
    return own, rest


@dataclasses.dataclass
class Reader:
    """Reads command lines and recipes for one dataclass of options.

    Args:
        cls: dataclass made of `flag` fields.
        aliases: other names.
        recipes_dir: where the bare name behind --recipe is looked up; None: there are no recipes.
        faults: every fault found.
        notes: what is to be said of names without effect.
        near: other options of the command line, for hints.
    """

    cls: type
    aliases: Mapping[str, Alias] = dataclasses.field(default_factory=dict)
    recipes_dir: Path | None = None
    faults: list[UserError] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    near: Collection[str] = ()

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[UserError]]:
        """Read the command line, and below it the recipe it names.

        Args:
            argv: arguments without the program's name.

        Returns:
            The values the user gave, by field name, and every fault found.
        """
        return self.convert(self.read_texts(argv)), self.faults

    def read_texts(self, argv: Sequence[str]) -> dict[str, Given]:
        """Return what `read` converts: by field name, the command line above its recipe."""
        given = self.read_argv(argv)
        below: dict[str, Given] = {}
        if self.recipes_dir is not None and "recipe" in given:
            below = self._read_recipe(given.pop("recipe").text, self.recipes_dir)
        return below | given

    def read_argv(self, argv: Sequence[str]) -> dict[str, Given]:
        """Split a command line into values by field name; the last one of a repeated flag counts.

        Args:
            argv: `--flag value`, `--flag=value`, for booleans bare `--flag`; `-` is as good as `_`.

        Returns:
            The values; faults are unknown flags, missing values, words that belong to no flag.
        """
        given, strays = dict[str, Given](), list[str]()
        words = list(argv)
        while words:
            shown, sign, text = words.pop(0).partition("=")
            if not shown.startswith("--"):
                strays.append(shown + sign + text)
                continue
            name = self._find(shown[2:])
            if not sign and words and not words[0].startswith("--"):
                text = words.pop(0)
            elif not sign and self._is_switch(name):
                text = "true"
            elif not sign and name is not None:
                self._refuse(shown, "has no value", f"write {shown}=VALUE")
                continue
            if name is None:
                self._refuse_name(shown, shown[2:])
            else:
                given[name] = Given(text, f"{shown} {text}")
        if strays:  # of `*.jsonl` there may be many
            more = f" and {len(strays) - 3} more" * (len(strays) > 3)
            rule = "belong to no flag" if strays[1:] else "belongs to no flag"
            self._refuse(", ".join(strays[:3]) + more, rule, "write --flag value")
        return self.rename(given)

    def _read_recipe(self, name: str, recipes_dir: Path) -> dict[str, Given]:
        """The `option = value` lines of a TOML or YAML file, given by path or bare name."""
        is_path = name.endswith((".toml", *YAML)) or "/" in name
        path = Path(name) if is_path else recipes_dir / f"{name}.toml"
        if not os.path.isfile(path):
            known = ", ".join(sorted(found.stem for found in recipes_dir.glob("*.toml")))
            self._refuse(f"--recipe {name}", "no such file", f"recipes here: {known}")
            return {}
        try:
            table = _read_table(path)
        except (OSError, ValueError) as error:
            kind = "YAML" if name.endswith(YAML) else "TOML"
            self._refuse(str(path), f"not a {kind} file: {error}", "repair the file")
            return {}
        given = {}
        for key, value in table.items():
            field_name, place = self._find(key), f"{key} = {value} in {path}"
            if field_name is None or field_name == "recipe":
                self._refuse_name(f"{key} in {path}", key)
            elif isinstance(value, bool | int | float | str | list) or (
                isinstance(value, dict)
                and getattr(options(self.cls).get(field_name), "rule", "") == "a JSON object"
            ):
                given[field_name] = Given(to_text(value), place)
            elif value is not None:  # as YAML leaves a thing out
                self._refuse(place, "must be text, number or true/false", "rewrite it")
        return self.rename(given)

    def _refuse(self, got: str, rule: str, remedy: str) -> None:
        self.faults.append(UserError(got, rule, remedy))

    def _find(self, spelling: str) -> str | None:
        """The option or other name that `spelling` means, or None."""
        name = spelling.replace("-", "_")
        has_recipe = name == "recipe" and self.recipes_dir is not None
        return name if name in options(self.cls) or name in self.aliases or has_recipe else None

    def _is_switch(self, name: str | None) -> bool:
        alias = self.aliases.get(name or "", Alias(name or ""))
        option = options(self.cls).get(alias.option)
        if option is None:  # what has no effect needs no value
            return name in self.aliases
        is_switched = not SWITCH.isdisjoint(option.choices or ()) or alias.write("true") != "true"
        return bool in option.kinds or is_switched

    def _refuse_name(self, shown: str, spelling: str) -> None:
        """Note a name that is no option, with the nearest one."""
        plain = spelling.replace("-", "_").lower()
        names = {name: alias.option for name, alias in self.aliases.items() if alias.option}
        names |= {name: name for name in (*options(self.cls), *self.near)}
        near = difflib.get_close_matches(plain, names, n=1)
        remedy = f"did you mean --{names[near[0]]}?" if near else "--help all lists them"
        self._refuse(shown, "no such option", remedy)

    def rename(self, given: Mapping[str, Given]) -> dict[str, Given]:
        """Put options in the place of other names; note those that are refused or without effect.

        Args:
            given: values by option or other name.

        Returns:
            The values by option.
        """
        found = {name: entry for name, entry in given.items() if name not in self.aliases}
        for name, alias in ((name, self.aliases[name]) for name in given if name in self.aliases):
            entry, before = given[name], found.get(alias.option)
            is_usual, text = not alias.changes(entry.text), alias.write(entry.text)
            is_idle = is_usual and (before or not alias.option or alias.when_both != "refuse")
            if is_idle:
                continue
            if alias.is_refused:
                self._refuse(entry.place, alias.reason, alias.remedy)
            elif not alias.option or (entry.text and not text):
                is_told = alias.reason != "" and not is_usual
                self.notes += [f"--{name} has no effect: {alias.reason}"] * is_told
            elif before is not None and alias.when_both == "refuse" and before.text != text:
                rule = f"--{alias.option} {before.text} is given too, and means the same"
                self._refuse(entry.place, rule, "give one of them")
            else:
                prefix = f"{before.text}," if before and alias.when_both == "add" else ""
                found[alias.option] = Given(prefix + text, entry.place)
        return found

    def convert(self, given: Mapping[str, Given]) -> dict[str, Any]:
        """Turn texts into values.

        Args:
            given: what the user wrote, by field name.

        Returns:
            The values that obey choices and rules; the others are faults.
        """
        values = {}
        for name, (text, place) in given.items():
            option = options(self.cls)[name]
            if not SWITCH.isdisjoint(option.choices or ()):
                words = {"true": "on" if "on" in option.choices else "auto", "false": "off"}
                text = text if text in option.choices else words.get(plain(text), text)
            nothing = ("none", "null") if str in option.kinds else ("none", "null", "auto")
            is_none = option.is_optional and text.lower() in nothing
            value = None if is_none else _typed(text, option.kinds)
            fault = find_fault(value, option, place)
            if fault is None:
                values[name] = value
            else:
                self.faults.append(fault)
        return values


def _read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML or YAML file; a ValueError where it is none."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix not in YAML:
        return tomllib.loads(text)
    import yaml  # huggingface_hub needs it too

    try:
        table = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError("it has no lines of name: value")
    names = re.findall(r"^([\w-]+)[ \t]*:", text, re.MULTILINE)
    if len({*names}) < len(names):
        raise ValueError("a name stands there twice")
    return table


def to_text(value: Any) -> str:
    """Return a value as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(to_text(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(text: str, kinds: Sequence[type]) -> Any:
    """The value of the first type that can read the text; NaN: of none."""
    for kind in kinds:
        with contextlib.suppress(ValueError, TypeError):
            return str2bool(text or "?") if kind is bool else kind(text)
    return math.nan


def plain(text: str) -> str:
    """Return a text, every spelling of true and false made the same."""
    return to_text(value) if isinstance(value := _typed(text, (bool, str)), bool) else text


def find_fault(value: Any, option: SimpleNamespace, place: str) -> UserError | None:
    """Return what is wrong with the value of an option, if anything.

    Args:
        value: of any type.
        option: row of `options`.
        place: how to show it in the error.
    """
    if value is None and option.is_optional:
        return None
    usual = option.default
    remedy = "leave it out" if usual is None else f"default is {to_text(usual)}"
    is_typed = type(value) in option.kinds or (type(value) is int and float in option.kinds)
    if not is_typed or (isinstance(value, float) and not math.isfinite(value)):
        kinds = " or ".join(TYPE_WORDS[kind] for kind in option.kinds)
        return UserError(place, f"must be {kinds}", remedy)
    if option.choices is not None and value not in option.choices:
        return UserError(place, "no such choice", f"use {', '.join(map(to_text, option.choices))}")
    if isinstance(value, int | float) and not (value == 0 or TOO_SMALL < abs(value) < TOO_LARGE):
        return UserError(place, f"must be below 2**32, and 0 or above {TOO_SMALL}", remedy)
    if isinstance(value, str) and len(value) > MOST_CHARS:
        return UserError(place, f"must have at most {MOST_CHARS:,} characters", remedy)
    if not RULES[option.rule](value):
        return UserError(place, f"must be {option.rule}", remedy)
    return None


def show_help_if_asked(
    argv: Words, cls: type, usage: str, main: Words = (), more: str = "", aliases: Any = ()
) -> None:
    """Print the options under their groups, with choices and default, when `argv` asks for it.

    Args:
        argv: arguments without the program's name; --help or -h asks, --version too.
        cls: dataclass made of `flag` fields; its docstring, up to Raises, stands above them.
        usage: the line above that.
        main: options that are shown alone, unless `all` follows --help.
        more: what stands below these, such as examples.
        aliases: other name -> Alias; they stand beside the options.

    Raises:
        SystemExit: it was asked for (code 0).
    """
    show_version_if_asked(argv)
    words = [word for word in argv if word in ("--help", "-h", "--help=all")]
    if not words:
        return
    asks_all = "--help=all" in argv or [*argv, ""][[*argv].index(words[0]) + 1] == "all"
    is_short, groups = bool(main) and not asks_all, dict[str, list[str]]()
    known = options(cls)
    for name, option in ((name, known[name]) for name in (main if is_short else known)):
        parts = [option.help, f"[{to_text(option.default)}]" * (option.default not in (None, ""))]
        if option.choices and not is_short:
            parts.insert(1, f"({' | '.join(map(to_text, option.choices))})")
        if (also := [other for other in aliases if aliases[other].option == name]) and not is_short:
            parts.append(f"also: {', '.join(also)}")
        group = f"the options that matter (--help all: {len(known)})" if is_short else option.group
        groups.setdefault(group, []).append(_entry(f"--{name}", " ".join(filter(None, parts))))
    about = str(inspect.getdoc(cls)).partition("\n\nRaises:")[0]
    sections = [f"{group}\n" + "\n".join(lines) for group, lines in groups.items()]
    sys.stdout.write("\n\n".join([usage, about, *sections, *filter(None, [more])]) + "\n")
    raise SystemExit(0)


def show_version_if_asked(argv: Sequence[str]) -> None:
    """Print the version when `argv` asks for it, and end with code 0."""
    if "--version" in argv:
        from fsdp_qlora import __version__

        sys.stdout.write(f"fsdp_qlora {__version__}\n")
        raise SystemExit(0)


def _entry(name: str, words: str) -> str:
    """An option and what it means, in two columns."""
    width = max(min(shutil.get_terminal_size().columns, 100), 53)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * 33, break_on_hyphens=False)
    wrapper.initial_indent = f"  {name} ".ljust(33)
    return wrapper.fill(words) if words else wrapper.initial_indent.rstrip()


class Parser(argparse.ArgumentParser):
    """An argparse parser with the help and the errors of the other commands."""

    def format_help(self) -> str:
        """The usage, what it does, and a line or more for each argument."""
        lines = []
        for action in (row for row in self._actions if row.dest != "help"):
            name = ", ".join(action.option_strings) or str(action.metavar or action.dest).upper()
            choices = f"({' | '.join(map(to_text, action.choices))})" if action.choices else ""
            text = f"{action.help or ''}".replace("%(default)s", to_text(action.default))
            is_told = action.default in (None, False) or "[" in text
            usual = "" if is_told else f"[{to_text(action.default)}]"
            lines.append(_entry(name, " ".join(filter(None, [text, choices, usual]))))
        about = inspect.cleandoc(self.description or "")
        return "\n\n".join([f"usage: {self.usage}", about, "\n".join(lines)]) + "\n"

    def error(self, message: str) -> typing.NoReturn:
        """Refuse a command line in one line."""
        raise UserError(self.prog, message, "--help tells what it takes")


def arguments(command: str, argv: Sequence[str], about: str | None, **known: dict[str, Any]) -> Any:
    """Read the command line of a command whose arguments stand in commands.toml.

    Args:
        command: its name.
        argv: arguments without it.
        about: what it does.
        known: argument -> what of it the command alone knows, such as its choices.

    Returns:
        The values by name.

    Raises:
        UserError: a wrong argument.
    """
    program = f"python -m fsdp_qlora {command}"
    parser = Parser(program, f"{program} {TABLE['usage'][command]}", about)
    for name, row in TABLE["arguments"][command].items():
        row = {**row, "type": TYPES.get(row.get("type", ""), str), **known.get(name.strip("-"), {})}
        parser.add_argument(name, **row)
    return parser.parse_args(argv)
