"""The files of a model: where they lie, what their headers hold, and weights quantized there.

Only headers are read (a few MB even for a 70B). The safetensors library makes sure that every byte
of a file belongs to exactly one tensor, so that a truncated download is found before anything else
starts. A local directory never reaches the hub.

Bytes of bitsandbytes in 4 bit and of MXFP4 are kept as they are. FP8 and compressed-tensors become
16-bit weights as they are read, tensor by tensor, and go to the run's format. Scales of activations
are left out: activations are computed in 16 bit.

A linear of bitsandbytes is "X.weight" (codes), "X.weight.absmax", "X.weight.quant_map", with double
quantization also "nested_absmax" and "nested_quant_map", and JSON under "quant_state...". Experts
in MXFP4 are "X_blocks" [experts, out, in / 32, 16] and "X_scales" [experts, out, in / 32].

Source: bitsandbytes, functional.py, QuantState.as_dict; transformers, integrations/mxfp4.py and
finegrained_fp8.py; compressed-tensors, compressors/pack_quantized.
"""

import collections
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from fsdp_qlora import cli, errors
from fsdp_qlora.errors import ENVIRONMENT, INPUT, INTEGRITY, UserError, brief, one_line, one_line_of

SHAPES_DIRECTORY = Path(__file__).parent / "shapes"
NAMES = ("_name_or_path", "_also")  # in a shape, of the model on the hub
CONFIG_FILES = ["config.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.*", "merges.txt"]
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
TABLE = errors.read_table(__file__, "layouts.toml")
HUB, REFUSALS = TABLE.pop("hub"), TABLE.pop("refusals")  # the rest is arch/info's
# Sub-directories hold other formats, and consolidated* is a second copy of the same weights.
LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CODE_BYTES = {"U8": 1, "I8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1}
QUANTIZED_ITEM_BYTES = ITEM_BYTES | CODE_BYTES
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
GROUP = 64  # weights that share one constant
NESTED = 256  # constants that share one constant of the second level
ORIGINAL, FETCH = "take the 16-bit original of this model", "fetch it again"
SAME_PLACE = "take config.json and the weights from one place, or another model"
NUMBERS = ("BOOL", "I16", "I64", "U16", "U32", "U64")  # no format of 4 or 8 bit is made of these
STATE = ".quant_state.bitsandbytes__"
MXFP4 = "mxfp4"
KEPT = (MXFP4, "nf4", "nf4_dq", "fp4", "fp4_dq")  # whose bytes are trained over as they are
COMPRESSED = "compressed-tensors"
CODED = "pack-quantized int-quantized float-quantized naive-quantized mixed-precision dense"
SCALED: dict[str, str] = TABLE.pop("scaled")
OF_ACTIVATIONS = re.compile(r"(activation|input|output|[qkv])_(scale|zero_point)|input_scale_ub")
# Tables and masks that older releases stored; they are computed.
BUFFER = re.compile(r".+\.(rotary_emb\.inv_freq|(attention|attn)\.(masked_)?bias)")
PIECE = 1 << 16  # bytes compared at once
# Run apart, for it imports torch.
BUILDER = TABLE.pop("builder")
# Of every tensor, for a digest: places, bytes at each; and bytes read at once where all count.
NUM_SAMPLES, SAMPLE_BYTES, WHOLE_BYTES = 16, 4096, 1 << 24
NUM_READERS = 4  # threads that read what is hashed whole
NUM_READ_AHEAD = 2  # linears being read while one is at work
T = TypeVar("T")


def known_shapes() -> list[str]:
    """List the models whose shape can be used by name, without their files.

    Returns:
        Names such as "llama-2-7b", sorted.
    """
    return sorted(path.stem for path in SHAPES_DIRECTORY.glob("*.json"))


def locate(model_name: str, need_weights: bool) -> Path:
    """Find the config.json of a model, and its weights beside it when they are needed.

    Args:
        model_name: a local directory, one of known_shapes(), or a hub name ("Qwen/Qwen2.5-7B"),
            with @REVISION behind it or without.
        need_weights: find or download the weight files too; a shape has none.

    Returns:
        A directory, or the .json file of a shape. A hub name that is known as a shape needs no
        network when no weights are wanted.

    Raises:
        UserError: no such model (code 2), or gated, unknown or out of reach on the hub (code 3).
    """
    remedy, kinds = "give a directory, or ORGANISATION/MODEL", (OSError, RuntimeError, ValueError)
    with one_line_of(model_name, remedy, INPUT, "is no usable path ({})", kinds):
        path = Path(model_name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    if is_directory:
        return _without_metas_files(path)
    is_hub_name = model_name.count("/") == 1 and not model_name.startswith((".", "/", "~"))
    if exists or ("/" in model_name and not is_hub_name):
        remedy = "give the directory that holds config.json"
        raise UserError(model_name, "is no model directory", remedy, INPUT)
    if is_hub_name and need_weights:
        return _without_metas_files(download(model_name, MODEL_FILES))
    if is_hub_name:
        name, shapes = model_name.partition("@")[0].lower(), sorted(SHAPES_DIRECTORY.glob("*.json"))
        tables = ((path, read_json(path)) for path in shapes)
        known = (p for p, row in tables if name in [str(row.get(key)).lower() for key in NAMES])
        return _find_cached(model_name) or next(known, None) or download(model_name, CONFIG_FILES)
    if model_name.lower() not in known_shapes():
        near = get_close_matches(model_name.lower(), known_shapes(), 3, 0.5) or known_shapes()[:3]
        remedy = f"give a directory, a hub name ORGANISATION/MODEL, or a shape ({', '.join(near)})"
        raise UserError(model_name, "is no directory and no known shape", remedy, INPUT)
    if need_weights:
        remedy = "add --weights random to measure, or give a model directory or hub name"
        raise UserError(model_name, "is a shape without weights", remedy, INPUT)
    return SHAPES_DIRECTORY / f"{model_name.lower()}.json"


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


def _find_cached(hub_name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, _, revision = hub_name.partition("@")
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def download(hub_name: str, files: list[str], left_out: list[str] = LEFT_OUT) -> Path:
    """Bring files into the hub cache, or find them there when the hub cannot be reached.

    Args:
        hub_name: ORGANISATION/MODEL, with @REVISION behind it or without.
        files, left_out: their names or patterns.

    Returns:
        The directory with them.

    Raises:
        UserError: no hub name (code 2); gated, unknown or out of reach (code 3).
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_name.partition("@")
    wanted: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": left_out}
    try:
        with cli.Progress(f"asks the hub for {name}"):
            return Path(snapshot_download(name, revision=revision or None, **wanted))
    except Exception as error:  # the transport's own errors differ between releases of the hub's
        kind = next((row.__name__ for row in type(error).__mro__ if row.__name__ in HUB), None)
        if kind is not None:
            rule, remedy = (HUB[kind][part].format(name=name) for part in ("rule", "remedy"))
            code = INPUT if kind == "HFValidationError" else ENVIRONMENT
            raise UserError(hub_name, rule, remedy, code) from error
        answers = [getattr(found, "response", None) for found in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), 0)
        why = REFUSALS.get(str(status), "hub out of reach")
        rule = f"no such directory, not in the hub cache, {why} ({status or type(error).__name__})"
        command = f"hf download {name}" + f" --revision {revision}" * bool(revision)
        remedy = f"give a local directory, or run {command} where there is a network"
        if files == CONFIG_FILES:  # no weights are wanted: a model of the same size will do
            near = get_close_matches(hub_name.partition("/")[2].lower(), known_shapes(), 1, 0.6)
            remedy += f", or take the shape {near[0]}" if near else ""
        remedy = "run hf auth login, or give a local directory" if status == 401 else remedy
        raise UserError(hub_name, rule, remedy, ENVIRONMENT) from error


Shapes = dict[str, tuple[int, ...]]  # by full name


class TensorRef(NamedTuple):
    """Where the bytes of one tensor lie.

    Args:
        file: the safetensors file.
        dtype: its name in safetensors: "BF16", "F16", "F32" or "F64".
        shape: as stored, row major.
        start: absolute offset of the first byte in the file.
        nbytes: length in bytes.
        is_transposed: a matrix of this shape whose columns lie one after the other.
        joint: name of the tensor that it is a part of, with those of the other experts, or "".
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    is_transposed: bool = False
    joint: str = ""


Refs = dict[str, TensorRef]  # by full name


def read_json(path: Path) -> dict:
    """Read a JSON object, and name the file when it is not one.

    Args:
        path: for example the config.json of a model.

    Returns:
        The object.

    Raises:
        UserError: absent (code 2); a git-lfs pointer, an HTML page, no JSON object (code 5).
    """
    if not path.is_file():
        raise UserError(str(path), "is needed, and absent", "give a complete model directory")
    raw = path.read_bytes()
    _refuse_stand_in(path, raw[:64])
    rule, kinds = "is no valid JSON ({})", (ValueError, RecursionError)
    with one_line_of(path, FETCH, INTEGRITY, rule, kinds):
        value = json.loads(raw)
    if not isinstance(value, dict):
        raise _damaged(path, "must hold a JSON object")
    return value


def without_bytes(table: dict[str, list[int]] | None, config: dict) -> Refs:
    """What the files of a model would hold that has none here.

    Args:
        table: names and shapes; None: those of the model that transformers builds, in a process of
            its own.
        config: content of config.json.

    Returns:
        Tensor name -> a place of no file.

    Raises:
        UserError: transformers cannot build it (code 2).
    """
    if table is None:
        command = [sys.executable, "-c", BUILDER]
        with cli.Progress(f"asks transformers what a {config['model_type']} holds"):
            done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
        if done.returncode:
            why = one_line(done.stderr.strip().rpartition("\n")[2])
            rule = f"models are read from their files only ({why[:200] or 'transformers failed'})"
            raise UserError(config["model_type"], rule, "add the *.safetensors files")
        table = json.loads(done.stdout)
    shapes = {name: tuple(table[pattern]) for pattern in table for name in _numbered(pattern)}
    return {n: TensorRef(Path(), "BF16", at, 0, 2 * math.prod(at)) for n, at in shapes.items()}


def _numbered(pattern: str) -> list[str]:
    """The names that "layers.{0-2,5}.norm" stands for."""
    before, _, rest = pattern.partition("{")
    numbers, _, after = rest.partition("}")
    ends = [part.split("-") for part in numbers.split(",")] if numbers else []
    every = (number for end in ends for number in range(int(end[0]), int(end[-1]) + 1))
    return [n for i in every for n in _numbered(f"{before}{i}{after}")] if ends else [pattern]


def read_tensors(directory: Path, item_bytes: Mapping[str, int] = ITEM_BYTES) -> Refs:
    """Read the headers of all weight files of a model.

    Args:
        directory: holds an index and the files that it names, or model.safetensors, or loose
            *.safetensors files.
        item_bytes: dtypes that may occur, with their sizes.

    Returns:
        Tensor name -> where its bytes lie, in file order.

    Raises:
        UserError: no safetensors files (code 2); one absent, cut off, unlike the index (code 5).
    """
    index, single = _read_index(directory / INDEX_NAME), directory / SINGLE_NAME
    has_both = bool(index) and single.is_file() and SINGLE_NAME not in index.values()
    if has_both and not all((directory / name).exists() for name in set(index.values())):
        # The whole model lies in one file: transformers prefers that too.
        index = {} if read_header(single, item_bytes).keys() == index.keys() else index
    tensors: Refs = {}
    for name in sorted(set(index.values())) or _list_files(directory):
        header = read_header(directory / name, item_bytes)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise _damaged(directory / name, f"repeats {describe(twice)} of another file")
        tensors |= header
    lost = [name for name in index if name not in tensors or tensors[name].file.name != index[name]]
    if lost:
        raise _damaged(directory / INDEX_NAME, f"{describe(lost)} not in the file that it names")
    if has_both:
        header = read_header(single, item_bytes)
        is_same = header.keys() == tensors.keys()
        if not is_same or not all(same_bytes(ref, tensors[n], PIECE) for n, ref in header.items()):
            rule = f"holds another model than the files that {INDEX_NAME} names"
            raise _damaged(single, rule, "remove what is left of the other model")
    return {name: ref for name, ref in tensors.items() if not BUFFER.fullmatch(name)}


def same_bytes(one: TensorRef, other: TensorRef, num_bytes: int) -> bool:
    """Whether two tensors are stored alike.

    Args:
        one, other: the tensors.
        num_bytes: compare so many of the first.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, min(num_bytes, one.nbytes), PIECE)
    with one.file.open("rb") as file, other.file.open("rb") as other_file:
        file.seek(one.start)
        other_file.seek(other.start)
        sizes = (min(PIECE, one.nbytes - start) for start in starts)
        return all(file.read(size) == other_file.read(size) for size in sizes)


def sample_digest(tensors: Refs, num_places: int = NUM_SAMPLES) -> str | None:
    """Tell weights from others of the same shape, however their files are cut.

    Names, dtypes, shapes and some bytes of every tensor count. What is changed outside of the
    sampled places is not seen; training changes a tensor everywhere.

    Args:
        tensors: by name.
        num_places: so many pieces of 4 KiB, evenly apart from the first byte to the last, count; 0:
            every byte does.

    Returns:
        16 characters; None without tensors, or when their files cannot be read any more.
    """
    whole = hashlib.sha256()
    try:
        for name, ref in sorted(tensors.items()):
            whole.update(f"{name}:{ref.dtype}:{ref.shape}".encode())
            for part in _sampled(ref, num_places):
                whole.update(part)
    except OSError:
        return None  # a finished run must not end here
    return whole.hexdigest()[:16] if tensors else None


def _sampled(ref: TensorRef, num_places: int) -> Iterator[bytes]:
    size = min(SAMPLE_BYTES if num_places else WHOLE_BYTES, ref.nbytes)
    starts: Sequence[int] = range(0, ref.nbytes, size or 1)
    if num_places and size:
        starts = [(ref.nbytes - size) * i // max(num_places - 1, 1) for i in range(num_places)]
    with ref.file.open("rb", buffering=0) as file:
        for start in starts if num_places else ():  # a disk over a network reads all places at once
            os.posix_fadvise(file.fileno(), ref.start + start, size, os.POSIX_FADV_WILLNEED)

        def read(start: int) -> bytes:
            return os.pread(file.fileno(), min(size, ref.nbytes - start), ref.start + start)

        # To hash all takes as long as to read it.
        yield from map(read, starts) if num_places else look_ahead(read, starts, NUM_READERS)


def look_ahead(
    read: Callable[[Any], T], items: Sequence[Any], num: int = NUM_READ_AHEAD
) -> Iterator[T]:
    """Yield read(item) in order while the next items are being read in threads.

    Args:
        read: function of one item.
        items: all of them.
        num: how many are read meanwhile.
    """
    with ThreadPoolExecutor(num) as pool:
        ahead = collections.deque(pool.submit(read, item) for item in items[:num])
        for position in range(len(items)):
            result = ahead.popleft().result()
            if position + num < len(items):
                ahead.append(pool.submit(read, items[position + num]))
            yield result


def read_header(path: Path, item_bytes: Mapping[str, int] = ITEM_BYTES) -> Refs:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.
        item_bytes: dtypes that may occur, with their sizes.

    Returns:
        Tensor name -> where its bytes lie, in file order.

    Raises:
        UserError: not floating point of 16 to 64 bits (code 2); absent, a git-lfs pointer, an HTML
            page, truncated, damaged (code 5).
    """
    if not path.is_file():
        is_other = os.path.lexists(path)
        what = "is no regular file" if is_other else "is named by the index, and absent"
        raise _damaged(path, what)
    with path.open("rb") as raw:
        head = raw.read(64)
    _refuse_stand_in(path, head)
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        why, size = brief(error).partition("header: ")[2] or brief(error), path.stat().st_size
        raise _damaged(path, f"{size} bytes are no safetensors file ({why[:80]})") from None
    needed = {dtype for name, (dtype, _) in kinds.items() if not BUFFER.fullmatch(name)}
    if others := sorted(needed - item_bytes.keys()):
        of_kind = [name for name, (dtype, _) in kinds.items() if dtype == others[0]]
        rule = f"holds {others[0]} tensors ({of_kind[0]}); a base is {', '.join(ITEM_BYTES)}"
        remedy = "take a model without such" if others[0] in NUMBERS else ORIGINAL
        raise UserError(str(path), rule, remedy)
    start, refs = 8 + int.from_bytes(head[:8], "little"), {}  # the header; then byte upon byte
    for name, (dtype, shape) in kinds.items():
        nbytes = math.prod(shape) * item_bytes.get(dtype, 1)  # of a mask: 1
        refs[name] = TensorRef(path, dtype, tuple(shape), start, nbytes)
        start += nbytes
    return refs


def describe(names: list[str]) -> str:
    """Name the first three tensors of a list, and count all.

    Args:
        names: at least one name.

    Returns:
        For example "2 tensors (a, b)" or "12 tensors (a, b, c, ...)".
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _read_index(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise _damaged(path, f"weight_map names {name!r}, which is no plain file name")
    return weight_map


def _list_files(directory: Path) -> list[str]:
    if (directory / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    # No weights are an adapter, and a second copy in another format.
    weights = [name for name in names if not name.startswith(("adapter_model", "consolidated"))]
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if pickled and not weights:
        rule = f"only pickled weights ({pickled[0]}), which can run code and are never read"
        raise UserError(str(directory), rule, "convert them to safetensors")
    if not weights:
        remedy = "add the *.safetensors files, or --weights random to measure without them"
        raise UserError(str(directory), "holds no safetensors weights", remedy)
    return weights


def _refuse_stand_in(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise _damaged(path, "is a git-lfs pointer, not the file", "run git lfs pull there")
    if head.lstrip()[:5].lower() in {b"<!doc", b"<html"}:
        raise _damaged(path, "is an HTML page, not the file", "download the raw file")


def _damaged(path: Path, rule: str, remedy: str = FETCH) -> UserError:
    return UserError(str(path), rule, remedy, INTEGRITY)


def refuse(
    faults: Mapping[str, list[str]], model_name: str, remedy: str, code: int = INPUT
) -> None:
    """Raise the first fault that some tensors have.

    Args:
        faults: fault -> names of tensors that have it.
        model_name, remedy, code: of the error.
    """
    for rule, names in faults.items():
        if names:
            raise UserError(f"{describe(names)} in {model_name}", rule, remedy, code)


def check_shapes(expected: Shapes, found: Shapes, model_name: str) -> None:
    """Account for every tensor of a model.

    Args:
        expected: name -> shape of everything that the model has.
        found: the same of its files.
        model_name: for the error.

    Raises:
        UserError: one is absent, unknown or of another shape (code 5).
    """
    wrong = [name for name in expected if found.get(name, expected[name]) != expected[name]]
    faults = {
        "absent from the files": [name for name in expected if name not in found],
        "in the files, but no part of this model type": [n for n in found if n not in expected],
        "of another shape than config.json says": wrong,
    }
    refuse(faults, model_name, SAME_PLACE, INTEGRITY)


class QuantizedRef(NamedTuple):
    """Where the parts of a weight that is quantized on disk lie.

    Args:
        refs: of bitsandbytes "weight", "absmax" and so on; of MXFP4 "weight", "exponents"; of a
            weight with scales "weight", "scale", "zero", "order" -> place.
        format: whose bytes are kept, "nf4_dq" or "mxfp4"; "" for a weight with scales.
        offset: of the constants, with double quantization.
        block: rows and columns that share a scale; 0: as many as the number of scales says.
    """

    refs: Refs
    format: str = ""
    offset: float | None = None
    block: tuple[int, int] = (0, 0)


Folded = tuple[Refs, dict[str, QuantizedRef]]


class Stored(NamedTuple):
    """How a model lies on disk.

    Args:
        method: "nf4_dq" or the like, "mxfp4", "fp8", "compressed-tensors"; "" for 16 or 32 bit.
        block: see QuantizedRef.
    """

    method: str = ""
    block: tuple[int, int] = (0, 0)

    @property
    def whole(self) -> str | None:
        """The format of all linears, when it is bitsandbytes'."""
        return self.method if self.method.startswith(("nf4", "fp4")) else None


def stored_as(config: dict, model_name: str) -> Stored:
    """Say in which format a model lies on disk.

    Args:
        config: content of config.json.
        model_name: for the message.

    Raises:
        UserError: it is quantized in a way that is not read (code 2).
    """
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        return Stored()
    found = _dict(found)
    is_double = bool(found.get("bnb_4bit_use_double_quant"))
    name = f"{found.get('bnb_4bit_quant_type')}{'_dq' * is_double}"
    if found.get("load_in_4bit") and name.removesuffix("_dq") in ("nf4", "fp4"):
        return Stored(name)
    method = str(found.get("quant_method") or "unknown")
    groups = [_dict(group) for group in _dict(found.get("config_groups")).values()]
    blocks = [_dict(group.get("weights")).get("block_structure") for group in groups]
    sizes = next(filter(None, [found.get("weight_block_size"), *blocks]), (0, 0))
    is_pair = isinstance(sizes, list | tuple) and [type(n) for n in sizes] == [int, int]
    others = set() if is_pair else {f"blocks of {sizes}"}
    if method == COMPRESSED:
        every = found, _dict(found.get("sparsity_config")), *groups
        others |= {str(at.get("format") or "dense") for at in every} - {*CODED.split()}
        others |= {"transform_config"} if found.get("transform_config") else set()
    if method in (MXFP4, COMPRESSED, "fp8", "fbgemm_fp8") and not others:
        return Stored(method, (sizes[0], sizes[1]))
    method += " in 8 bit" if found.get("load_in_8bit") else ""
    method += f": {', '.join(sorted(others))}" if others else ""
    rule = f"is quantized already ({method}); of such models bitsandbytes in 4 bit, MXFP4, FP8 "
    rule += "and compressed-tensors of whole numbers or FP8 are read"
    raise UserError(model_name, rule, ORIGINAL)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def fold(tensors: Refs, stored: Stored, model_name: str) -> Folded:
    """Make one entry of the parts of each quantized weight.

    Args:
        tensors: of the files.
        stored: of `stored_as`.
        model_name: for the message.

    Returns:
        The tensors, those of quantized weights in their true shape; and the places of the parts.

    Raises:
        UserError: another block size or type, or parts that do not fit (code 5).
    """
    if stored.whole:
        return _fold_bnb(tensors, stored.whole, model_name)
    folded, quantized = (_fold_scaled, _split_blocks)[stored.method == MXFP4](tensors, stored)
    others = [n for n, ref in folded.items() if n not in quantized and ref.dtype not in ITEM_BYTES]
    refuse({f"no part of a weight as {stored.method} has it": others}, model_name, ORIGINAL)
    return folded, quantized


def piece(ref: TensorRef, index: int) -> TensorRef:
    """One expert's part of a tensor of all.

    Args:
        ref: of all.
        index: of the expert.
    """
    nbytes = ref.nbytes // ref.shape[0]
    return ref._replace(shape=ref.shape[1:], start=ref.start + index * nbytes, nbytes=nbytes)


def _split_blocks(tensors: Refs, stored: Stored) -> Folded:
    """An entry of the matrix of each expert in place of MXFP4's blocks and scales."""
    folded, quantized = dict(tensors), {}
    for name, ref in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if stem == name or scales is None or (ref.dtype, scales.dtype) != ("U8", "U8"):
            continue
        if len(ref.shape) != 4 or ref.shape != (*scales.shape, 16):
            raise _damaged(ref.file, f"{name} {list(ref.shape)} is no [experts, out, in / 32, 16]")
        del folded[name], folded[f"{stem}_scales"]
        (block, _, part), shape = stem.rpartition("."), (ref.shape[1], ref.shape[2] * 32)
        for i in range(ref.shape[0]):
            own, at = f"{block}.{i}.{part}.weight", piece(ref, i)
            # In 16 bit it lies in one tensor with the others', as [in, out].
            folded[own] = at._replace(shape=shape, is_transposed=True, joint=stem)
            quantized[own] = QuantizedRef({"weight": at, "exponents": piece(scales, i)}, MXFP4)
    return folded, quantized


def _fold_scaled(tensors: Refs, stored: Stored) -> Folded:
    """An entry of each weight in place of its numbers of 4 or 8 bits and their scales."""
    parts: dict[str, Refs] = {}
    folded: Refs = {}
    for name, ref in tensors.items():
        stem, _, part = name.rpartition(".")
        is_number = part == "weight" and ref.dtype in ("F8_E4M3", "I8")
        if part in SCALED or is_number:
            parts.setdefault(stem, {})[SCALED.get(part, part)] = ref
        elif not OF_ACTIVATIONS.fullmatch(part):
            folded[name] = ref
    quantized = {}
    for stem, refs in parts.items():
        weight, scale, name = refs.get("weight"), refs.get("scale"), f"{stem}.weight"
        shape = weight.shape if weight else ()
        if at := refs.pop("shape", None):  # numbers of 64 bits
            shape = tuple(memoryview(_read(at)[: at.nbytes // 8 * 8]).cast("q"))
        bits = weight.nbytes * 8 // math.prod(shape) if weight and len(shape) == 2 else 0
        if weight is None or scale is None or bits not in (4, 8):
            rule = f"parts {', '.join(sorted(refs))} are no matrix of 4 or 8 bits with its scales"
            where = next(iter(refs.values())).file
            raise UserError(f"{stem} in {where}", rule, ORIGINAL, INTEGRITY)
        folded[name] = weight._replace(shape=shape)
        quantized[name] = QuantizedRef(refs, block=stored.block)
    return folded, quantized


def _fold_bnb(tensors: Refs, format_name: str, model_name: str) -> Folded:
    """As `fold`."""
    states = {name: name.partition(STATE)[0] for name in tensors if STATE in name}
    folded, quantized = dict(tensors), {}
    for state_name, name in states.items():
        state = _read_state(tensors[state_name], state_name)
        refs = {"weight": tensors[name]} if name in tensors else {}
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if f"{name}.{part}" in tensors:
                refs[part] = folded.pop(f"{name}.{part}")
        del folded[state_name]
        _check(f"{name} in {model_name}", state, refs, format_name)
        quantized[name] = QuantizedRef(refs, format_name, state.get("nested_offset"))
        folded[name] = refs["weight"]._replace(shape=tuple(state["shape"]))
    return folded, quantized


def _read(ref: TensorRef) -> bytes:
    with ref.file.open("rb") as file:
        file.seek(ref.start)
        return file.read(ref.nbytes)


def _read_state(ref: TensorRef, name: str) -> dict:
    kinds = (ValueError, KeyError, TypeError, RecursionError)
    with one_line_of(ref.file, FETCH, INTEGRITY, f"{name} is no quantization state ({{}})", kinds):
        state = json.loads(_read(ref))
        if [type(size) for size in state["shape"]] != [int, int]:
            raise ValueError("no shape of two sizes")
    return state


def _check(where: str, state: dict, refs: Refs, format_name: str) -> None:
    num_weights, is_double = math.prod(state["shape"]), format_name.endswith("_dq")
    num_blocks = -(-num_weights // GROUP)
    sizes = {"weight": -(-num_weights // 2), "quant_map": 16 * 4}
    sizes["absmax"] = num_blocks * (1 if is_double else 4)
    if is_double:
        sizes |= {"nested_absmax": -(-num_blocks // NESTED) * 4, "nested_quant_map": 256 * 4}
    found = {part: ref.nbytes for part, ref in refs.items()}
    own = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize"))
    wanted = (format_name.removesuffix("_dq"), GROUP, NESTED if is_double else None)
    is_good = found == sizes and own == wanted
    if not is_good or is_double != isinstance(state.get("nested_offset"), float):
        rule = f"type and block sizes {own}, want {wanted} and the parts {', '.join(sizes)}"
        raise UserError(where, rule, ORIGINAL, INTEGRITY)
