"""The verbs beside training: `python -m fsdp_qlora VERB ...`."""

import importlib
import sys

from fsdp_qlora.errors import DONE, SIGINT, UserError

VERBS = {
    "bench": ("fsdp_qlora.bench", "main", "measure what each setting needs and how fast it is"),
    "data": ("fsdp_qlora.data.verb", "main", "look at the data of a run before the GPU is rented"),
    "doctor": ("fsdp_qlora.train.doctor.command", "main", "say what works here and how fast it is"),
    "fetch": ("fsdp_qlora.fetch", "main", "make a small model or a data set without the hub"),
    "expand": ("fsdp_qlora.export.expand", "main", "add new layers that change nothing yet"),
    "evaluate": (
        "fsdp_qlora.inference",
        "evaluate",
        "held-out loss of a base with and without its adapter",
    ),
    "generate": (
        "fsdp_qlora.inference",
        "generate",
        "answer a prompt, or converse, with a base and its adapter",
    ),
    "merge": ("fsdp_qlora.export.merge", "main", "add an adapter to its base, and compare"),
    "plan": ("fsdp_qlora.plan.command", "main", "say what a run needs, whether it fits, how long"),
    "quantize": ("fsdp_qlora.export.quantize", "main", "write a 4-bit model for transformers"),
    "train": ("fsdp_qlora.run", "main", "fine-tune a model, as train.py does"),
    "report": ("fsdp_qlora.report.page", "main", "show a run, or several side by side"),
}


def usage() -> str:
    """Say which verbs there are.

    Returns:
        A few lines of text.
    """
    rows = [f"  {verb:<8} {words}" for verb, (_, _, words) in VERBS.items()]
    return "\n".join(["usage: python -m fsdp_qlora VERB ...  (VERB --help tells more)", "", *rows])


def main(argv: list[str]) -> int:
    """Run a verb; only its own module is imported.

    Args:
        argv: the verb and its arguments.

    Returns:
        Exit code.

    Raises:
        UserError: there is no such verb.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return DONE
    if argv[0] not in VERBS:
        raise UserError(argv[0], f"want one of {' '.join(VERBS)}", "python -m fsdp_qlora --help")
    module, function, _ = VERBS[argv[0]]
    return getattr(importlib.import_module(module), function)(argv[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(SIGINT)
