"""Secrets, kept out of what is said and written: access tokens, passwords in addresses.

They belong in the environment or in `hf auth login`. On a command line they are refused, as they
would be in the record of the run; in error lines, traces and model cards they are blotted out.
"""

import re
from collections.abc import Mapping, Sequence

BLOT = "[secret]"
# A name may begin like a token: only what is as long as one and has no word in it counts.
SECRETS = (
    re.compile(r"\b(?:hf_|sk-|gh[po]_|glpat-)[A-Za-z0-9]{16,}"),
    re.compile(r"\bgithub_pat_\w{8,}|\bAKIA[A-Z0-9]{12,}|\bAIza[\w-]{20,}"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=[?&])[a-z_]*(token|key|secret|password)=[^\s&'\"]+"),
)
SECRET_NAMES = re.compile(
    r"TOKEN(?!IZER|S)|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY"
)
LEAST_SECRET_CHARS = 8


def redact(
    words: str, environment: Mapping[str, str], patterns: Sequence[re.Pattern] = SECRETS
) -> str:
    """Blot out what looks like a secret, and the values of variables that are named like one.

    Args:
        words: any text.
        environment: variables of the process.
        patterns: of what looks like one.

    Returns:
        The text without them.
    """
    values = [value for name, value in environment.items() if SECRET_NAMES.search(name.upper())]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= LEAST_SECRET_CHARS and not value.startswith("/"):  # a file with a token
            words = words.replace(value, BLOT)
    for pattern in patterns:
        words = pattern.sub(BLOT, words)
    return words
