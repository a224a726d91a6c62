"""A saved adapter on the Hugging Face hub: private, and only the files that others need."""

from pathlib import Path

from fsdp_qlora.errors import ENVIRONMENT, UserError, one_line
from fsdp_qlora.export.beside import OF_TOKENIZER

# Not run_config.json, metrics.jsonl or logs: they name paths of this machine.
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", *OF_TOKENIZER)


def check(name: str | None) -> None:
    """See before a run that its adapter can be sent: nothing is asked of the hub.

    Args:
        name: OWNER/NAME; None: it is not to be sent.

    Raises:
        UserError: no usable name (code 2), or no token (code 3).
    """
    if name is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    got = f"--push_to_hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(got, "is no name of a repository", "give OWNER/NAME") from None
    if name.count("/") != 1:
        raise UserError(got, "names no owner", "give OWNER/NAME")
    if get_token() is None:
        rule = "there is no token of the hub"
        raise UserError(got, rule, "run hf auth login, or set HF_TOKEN", ENVIRONMENT)


def push(directory: Path, name: str | None) -> None:
    """Send a saved adapter to the hub, and say where it is.

    Args:
        directory: output directory of a finished run.
        name: OWNER/NAME; a new repository is private, one that is there stays as it is. None: it is
            not to be sent.

    Raises:
        UserError: the hub refuses, or is out of reach (code 3); the adapter stays where it is.
    """
    if name is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        place = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=directory,
            allow_patterns=list(FILES),
            commit_message="Adapter trained with fsdp_qlora",
        )
    except Exception as error:  # the transport's own errors differ between releases
        status = getattr(getattr(error, "response", None), "status_code", None)
        words = one_line(str(error).strip().partition("\n")[0])[:120] or type(error).__name__
        is_refused = isinstance(error, HfHubHTTPError) and status in (401, 403)
        rule = "the hub refuses the token" if is_refused else f"the hub has not taken it: {words}"
        remedy = f"the adapter is in {directory}: hf auth login, then hf upload {name} {directory}"
        raise UserError(f"--push_to_hub {name}", rule, remedy, ENVIRONMENT) from error
    print(f"pushed    {place}")
