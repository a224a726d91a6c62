"""The commands: `fsdp-qlora COMMAND ...`, or `python -m fsdp_qlora COMMAND ...`."""

import contextlib
import importlib
import io
import os
import re
import sys

from fsdp_qlora import cli
from fsdp_qlora.errors import DONE, ENVIRONMENT, SIGINT, SIGTERM, UserError, redact_tracebacks

COMMANDS, FORMER, SHELLS = (cli.TABLE[name] for name in ("commands", "former", "completion"))
ANSWERS = {"plan", "data", "doctor", "generate", "cache", "recipe"}  # they print their result


def main(argv: list[str]) -> int:
    """Run a command; only its own module is imported.

    Args:
        argv: the command and its arguments.

    Returns:
        Exit code.

    Raises:
        UserError: there is no such command.
    """
    cli.show_version_if_asked(argv[:2])
    if argv and argv[0].startswith("--completion"):
        print(completion(" ".join(argv[:2])[len("--completion=") :]))
        return DONE
    argv = ["export", FORMER[argv[0]], *argv[1:]] if argv and argv[0] in FORMER else argv
    if not cli.chosen(argv, COMMANDS):
        print("\n--version; --completion bash | zsh | fish prints what completes words")
        return DONE
    target = COMMANDS[argv[0]][0]
    if argv[0] == "export":
        argv, forms = argv[1:], cli.TABLE["export"]
        if not cli.chosen(argv, forms, "export"):
            return DONE
        target = forms[argv[0]][0]
    if sys.flags.optimize > 1 and argv[0] != "train":  # whose ranks start without it
        rule = "transformers reads its docstrings, which are gone"
        raise UserError("python -OO", rule, "leave it and PYTHONOPTIMIZE out", ENVIRONMENT)
    if argv[0] == "plan" and any(re.match("--init[-_]adapter", word) for word in argv):
        from fsdp_qlora.export import adapter  # of a later room than the plan

        argv = ["plan", *adapter.expand_init(argv[1:])]
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(argv[1:])


def completion(shell: str) -> str:
    """Write what makes a shell complete commands, options and their values.

    Args:
        shell: bash, zsh or fish.

    Raises:
        UserError: another shell.
    """
    if shell not in ("bash", "zsh", "fish"):
        raise UserError(f"--completion {shell}", "want one of bash, zsh, fish", "name your shell")
    words: dict[str, dict[str, str]] = {}  # command -> option, form, argument -> values
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([command, "--help", "all"])
        entries = re.findall(r"^  (-*\w+)  +(.*(?:\n {9,}.*)*)", out.getvalue(), re.MULTILINE)
        values = [re.findall(r"\(([^ ()]+(?:\s+\|\s+[^ ()]+)+)\)", text)[:1] for _, text in entries]
        listed = [" ".join(" ".join(found).replace("|", "").split()) for found in values]
        words[command] = dict(zip((name for name, _ in entries), listed, strict=True))
        if re.search(r"(options?|flags) of train\.py", out.getvalue()):
            words[command] |= words["train"]
    if shell == "fish":
        rows = [f"complete -c fsdp-qlora -n __fish_use_subcommand -a '{' '.join(COMMANDS)}'"]
        for command, name, value in ((c, n, v) for c, row in words.items() for n, v in row.items()):
            what = f"-l {name[2:]}" + f" -xa '{value}'" * bool(value)
            what = what if name.startswith("--") else f"-a '{value or name}'"
            rows.append(f"complete -c fsdp-qlora -n '__fish_seen_subcommand_from {command}' {what}")
        return "\n".join(rows)
    every = {name: value for row in words.values() for name, value in row.items() if value}
    cases = [f'*" {name}") words="{value}";;' for name, value in every.items()]
    for command, row in words.items():
        names = " ".join(name if name.islower() else value for name, value in row.items())
        cases.append(f'"{command} "*) words="{names}";;')
    start = SHELLS["zsh"] * (shell == "zsh")
    return start + SHELLS["bash"] % ("\n".join(cases), " ".join(COMMANDS))


def console() -> int:
    """Run the command of this process's command line: `fsdp-qlora`, `python -m fsdp_qlora`.

    Returns:
        Exit code; a UserError is one line on stderr. Where the answer of a command is lost, it has
        failed; files are whole all the same.
    """
    redact_tracebacks()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # it may be killed
        from fsdp_qlora.distributed import launch

        launch.tied_to_parent(os.getppid())()
    with cli.safe_output() as lost:
        try:
            code = main(sys.argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.code
        except (KeyboardInterrupt, SystemExit) as end:
            code = getattr(end, "code", SIGINT)
            if name := {SIGINT: "SIGINT", SIGTERM: "SIGTERM"}.get(code):
                print(f"stopped by {name}", file=sys.stderr)
        if why := lost():
            print(f"warning   stdout has not taken all that was printed: {why}", file=sys.stderr)
            code = code or ENVIRONMENT * (not ANSWERS.isdisjoint(sys.argv[1:2]))
    return code


if __name__ == "__main__":
    sys.exit(console())
