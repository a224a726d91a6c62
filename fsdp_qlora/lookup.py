"""Model names to directories: local ones, well-known shapes, the Hugging Face hub and its cache.

Nothing else in the program reaches the hub for a model, and a local directory never does.
"""

import json
from difflib import get_close_matches
from pathlib import Path

from fsdp_qlora.errors import ENVIRONMENT, INPUT, UserError

SHAPES_DIRECTORY = Path(__file__).parent / "shapes"
CONFIG_FILES = ["config.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.*", "merges.txt"]
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
NO_TOKEN = 401
REFUSALS = {NO_TOKEN: "the hub refuses your access token", 429: "the hub wants fewer requests"}
REFUSALS |= dict.fromkeys((500, 502, 503, 504), "the hub is down")
# Sub-directories hold other formats, and consolidated* is a second copy of the same weights.
LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]


def known_shapes() -> list[str]:
    """List the models whose shape can be used by name, without their files.

    Returns:
        Names such as "llama-2-7b", sorted.
    """
    return sorted(path.stem for path in SHAPES_DIRECTORY.glob("*.json"))


def locate(model_name: str, need_weights: bool) -> Path:
    """Find the config.json of a model, and its weights beside it when they are needed.

    Args:
        model_name: a local directory, one of known_shapes(), or a hub name ("Qwen/Qwen2.5-7B").
        need_weights: find or download the weight files too; a shape has none.

    Returns:
        A directory, or the .json file of a shape. A hub name that is known as a shape needs no
        network when no weights are wanted.

    Raises:
        UserError: no such model (code 2), or gated, unknown or out of reach on the hub (code 3).
    """
    try:
        path = Path(model_name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "give a directory, or ORGANISATION/MODEL"
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(model_name, f"is no usable path ({reason})", remedy, INPUT) from None
    if is_directory:
        return _without_metas_files(path)
    is_hub_name = model_name.count("/") == 1 and not model_name.startswith((".", "/", "~"))
    if exists or ("/" in model_name and not is_hub_name):
        remedy = "give the directory that holds config.json"
        raise UserError(model_name, "is no model directory", remedy, INPUT)
    if is_hub_name and need_weights:
        return _without_metas_files(_download(model_name, MODEL_FILES))
    if is_hub_name:
        return (
            _find_cached(model_name) or _shape_of(model_name) or _download(model_name, CONFIG_FILES)
        )
    if model_name.lower() not in known_shapes():
        near = get_close_matches(model_name.lower(), known_shapes(), 3, 0.5) or known_shapes()[:3]
        remedy = f"give a directory, a hub name ORGANISATION/MODEL, or a shape ({', '.join(near)})"
        raise UserError(model_name, "is no directory and no known shape", remedy, INPUT)
    if need_weights:
        remedy = "add --weights random to measure, or give a model directory or hub name"
        raise UserError(model_name, "is a shape without weights", remedy, INPUT)
    return SHAPES_DIRECTORY / f"{model_name.lower()}.json"


def fetch_tokenizer(hub_name: str) -> Path:
    """Find the tokenizer of a model on the hub, without its weights.

    Args:
        hub_name: ORGANISATION/MODEL.

    Returns:
        A directory with its files.

    Raises:
        UserError: gated, unknown or out of reach (code 3).
    """
    return _download(hub_name, [*CONFIG_FILES, *TOKENIZER_FILES])


def _without_metas_files(path: Path) -> Path:
    """Refuse a directory with Llama as Meta hands it out, and say how it is converted."""
    has_metas = (path / "params.json").exists() or any(path.glob("consolidated.*.pth"))
    if not has_metas or (path / "config.json").exists():
        return path
    rule = "holds Meta's original files (params.json, consolidated.*.pth)"
    if (path.parent / "config.json").exists():
        raise UserError(str(path), rule, f"give the directory above it, {path.parent}", INPUT)
    script = "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir"
    remedy = f"convert them with transformers below 5: {script} DIR --output_dir NEW, see README"
    raise UserError(str(path), rule, remedy, INPUT)


def _shape_of(hub_name: str) -> Path | None:
    for path in sorted(SHAPES_DIRECTORY.glob("*.json")):
        if json.loads(path.read_text())["_name_or_path"].lower() == hub_name.lower():
            return path
    return None


def _find_cached(hub_name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _download(hub_name: str, files: list[str]) -> Path:
    """Bring files into the hub cache, or find them there when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_name, allow_patterns=files, ignore_patterns=LEFT_OUT))
    except HFValidationError:
        remedy = "give a directory, or ORGANISATION/MODEL"
        raise UserError(hub_name, "is no directory and no hub name", remedy, INPUT) from None
    except GatedRepoError as error:
        rule = "the hub refuses it until you accept the model's terms"
        remedy = f"accept them at https://huggingface.co/{hub_name}, then run hf auth login"
        raise UserError(hub_name, rule, remedy, ENVIRONMENT) from error
    except RepositoryNotFoundError as error:
        rule = "no such directory here, and no such public model on the hub"
        remedy = "check the spelling; for a private model run hf auth login"
        raise UserError(hub_name, rule, remedy, ENVIRONMENT) from error
    except (
        Exception
    ) as error:  # the transport's own errors differ between releases of huggingface_hub
        answers = [getattr(found, "response", None) for found in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), 0)
        why = REFUSALS.get(status, "hub out of reach")
        rule = f"no such directory, not in the hub cache, {why} ({status or type(error).__name__})"
        remedy = f"give a local directory, or run hf download {hub_name} where there is a network"
        if files == CONFIG_FILES:  # no weights are wanted: a model of the same size will do
            near = get_close_matches(hub_name.partition("/")[2].lower(), known_shapes(), 1, 0.6)
            remedy += f", or take the shape {near[0]}" if near else ""
        remedy = "run hf auth login, or give a local directory" if status == NO_TOKEN else remedy
        raise UserError(hub_name, rule, remedy, ENVIRONMENT) from error
