"""Bad model directories: config.json, safetensors files, and what stands in their place."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fsdp_qlora.arch import files
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY
from tests.bad_input.case import Case, Place
from tests.model_files import edit_json, write_header

CONFIG, WEIGHTS = "config.json", "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9000000\n"
PAGE = "\n<!DOCTYPE html><html>Sign in</html>"
NO_WINDOW = {"layer_types": ["sliding_attention"], "sliding_window": 0}
EVIL_ROPE = {"rope_type": "evil"}
NO_NORM = b'{"model_type": "llama", "rms_norm_eps": null}'
PAYLOAD = "import os\nopen({!r}, 'w').close()\nos.system('touch {}')\n"


def config(**values):
    """Set keys of config.json; None removes one."""
    return lambda place: edit_json(place.model / "config.json", **values)


def text(name: str, content: str):
    """Put a file into the model's directory, whatever stands there."""
    return lambda place: (place.model / name).write_text(content)


def raw(name: str, content: bytes):
    """The same with bytes."""
    return lambda place: (place.model / name).write_bytes(content)


def edited(name: str, change: Callable[[bytes], bytes]):
    """Change what a file holds."""

    def damage(place: Place) -> None:
        path = place.model / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(old: bytes, new: bytes):
    """Replace text in the header, keeping its length."""
    return edited(WEIGHTS, lambda raw: raw.replace(old, new, 1))


def gone(name: str):
    """A file is absent."""
    return lambda place: (place.model / name).unlink()


def adapter_only(place: Place) -> None:
    """An adapter's directory instead of a model's."""
    (place.model / WEIGHTS).rename(place.model / "adapter_model.safetensors")


def in_place_of(name: str, make: Callable[[Path], object]):
    """Put something else where a file was."""

    def damage(place: Place) -> None:
        (place.model / name).unlink()
        make(place.model / name)

    return damage


def index(**weight_map: object):
    """Write an index of a file a.safetensors, which is the weights under another name."""

    def damage(place: Place) -> None:
        names = files.read_header(place.model / "model.safetensors")
        (place.model / "model.safetensors").rename(place.model / "a.safetensors")
        table = dict.fromkeys(names, "a.safetensors") | weight_map
        text(files.INDEX_NAME, json.dumps({"weight_map": table}))(place)

    return damage


def entry(**changes: object):
    """Change the header's entry of one tensor; the bytes stay."""

    def damage(place: Place) -> None:
        path = place.model / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header["model.norm.weight"] |= changes
        kept = {key: value for key, value in header["model.norm.weight"].items() if value != "-"}
        header["model.norm.weight"] = kept
        write_header(path, header, content[8 + length :])

    return damage


def one_more(place: Place) -> None:
    """A tensor that no layer has."""
    named = load_file(place.model / WEIGHTS) | {"model.layers.1.mlp.a.weight": np.zeros(3, "f4")}
    save_file(named, place.model / WEIGHTS)


def copy_shard(place: Place) -> None:
    """Two loose files with the same tensors."""
    content = (place.model / "model.safetensors").read_bytes()
    (place.model / "model.safetensors").rename(place.model / "a.safetensors")
    (place.model / "b.safetensors").write_bytes(content)


def metas_files(place: Place) -> None:
    """Llama as Meta hands it out."""
    for path in place.model.iterdir():
        path.unlink()
    (place.model / "params.json").write_text("{}")
    (place.model / "consolidated.00.pth").write_bytes(b"PK")


def own_code(place: Place) -> None:
    """A model type that brings its own code; it would leave a file."""
    mark = str(place.root / "was-run")
    (place.model / "evil.py").write_text(PAYLOAD.format(mark, mark))
    edit_json(
        place.model / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )


def pickled(name: str):
    """Only weights that run code when they are read."""

    def damage(place: Place) -> None:
        (place.model / "model.safetensors").unlink()
        call = b"cos\nsystem\n(S'touch was-run'\ntR."  # pickle of os.system("touch was-run")
        (place.model / name).write_bytes(call)

    return damage


def loop(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path)


def tensors(**shapes: tuple[int, ...]):
    """Other tensors, "__" for ".", of a type without a row in the table of layouts."""

    def damage(place: Place) -> None:
        table, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            entry = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
            table[name.replace("__", ".")] = entry
        write_header(place.model / WEIGHTS, table, bytes(end))
        edit_json(place.model / CONFIG, model_type="mixtral", num_hidden_layers=1)

    return damage


NAME = "--model_name="
CASES = [
    Case("no such directory", "is no model directory", (NAME + "./absent",)),
    Case("no such shape", "a shape (llama-2-7b", (NAME + "llama-2-7x",)),
    Case("shape without weights", "--weights random", (NAME + "llama-2-7b",)),
    Case("file for a directory", "is no model directory", (NAME + "{root}/rows.jsonl",)),
    Case("three parts", "is no model directory", (NAME + "a/b/c",)),
    Case("no hub name", "and no hub name", (NAME + "org/--x",)),
    Case("home of nobody", "is no usable path", (NAME + "~nobody-here/x",)),
    Case("4,096 letters", "is no usable path", (NAME + "x" * 4096,)),
    Case("not in the hub's cache", "hf download", (NAME + "org/x",), code=ENVIRONMENT),
    Case("empty directory", "config.json: is needed", (NAME + "{root}",)),
    Case("meta's files", "convert_llama_weights_to_hf", make=metas_files),
    Case("config absent", "config.json: is needed", make=gone("config.json")),
    Case(
        "config cut off",
        "is no valid JSON",
        (),
        edited("config.json", lambda raw: raw[:100]),
        INTEGRITY,
    ),
    Case("config a list", "must hold a JSON object", (), text("config.json", "[]"), INTEGRITY),
    Case("config empty", "is no valid JSON", (), text("config.json", ""), INTEGRITY),
    Case(
        "config not UTF-8", "is no valid JSON", (), raw("config.json", b'{"a": "\xff"}'), INTEGRITY
    ),
    Case("config deep", "is no valid JSON", (), text("config.json", "[" * 100_000), INTEGRITY),
    Case("config a pointer", "git-lfs pointer", (), text("config.json", POINTER), INTEGRITY),
    Case("config a page", "is an HTML page", (), text("config.json", PAGE), INTEGRITY),
    Case("config a pipe", "config.json: is needed", (), in_place_of("config.json", os.mkfifo)),
    Case("config a directory", "is needed", (), in_place_of("config.json", os.mkdir)),
    Case("config of no type", "config.json must name one", make=config(model_type=None)),
    Case("type a number", "config.json must name one", make=config(model_type=7)),
    Case("one layer more", "says 4 decoder layers", make=config(num_hidden_layers=4)),
    Case("one layer fewer", "the files hold 3", make=config(num_hidden_layers=2)),
    Case("layers as text", "must be a positive integer", make=config(num_hidden_layers="3")),
    Case("no width", "hidden_size = None", make=config(hidden_size=None)),
    Case("negative width", "hidden_size = -32", make=config(hidden_size=-32)),
    Case("endless width", "hidden_size = 1", make=config(hidden_size=10**30)),
    Case("no heads", "num_attention_heads = 0", make=config(num_attention_heads=0)),
    Case("heads a list", "num_attention_heads = [4]", make=config(num_attention_heads=[4])),
    Case("heads half", "must be a positive", make=config(num_attention_heads=2.5)),
    Case("more key heads", "of another shape", (), config(num_key_value_heads=4), INTEGRITY),
    Case("larger vocabulary", "of another shape", (), config(vocab_size=641), INTEGRITY),
    Case("biases", "12 tensors (model.l", (), config(attention_bias=True), INTEGRITY),
    Case("another type", "absent from the files", (), config(model_type="qwen3"), INTEGRITY),
    Case("fused by mistake", "6 tensors (model.l", (), config(model_type="phi3"), INTEGRITY),
    Case("norm as text", "must be a positive number", make=config(rms_norm_eps="1e-5")),
    Case("no norm", "must be a positive number", make=raw("config.json", NO_NORM)),
    Case("unknown rotation", "whose rope_type is one of", make=config(rope_scaling=EVIL_ROPE)),
    Case("rotation as text", "whose rope_type is one of", make=config(rope_parameters="x")),
    Case("base as text", "rope_theta = '1e4'", make=config(rope_theta="1e4")),
    Case("unknown activation", "must be one of", make=config(hidden_act="evil")),
    Case("sees later ones", "false or vision", make=config(use_bidirectional_attention=1)),
    Case("not causal", "must be true", make=config(is_causal=False)),
    Case("unknown dtype", "must be one of", make=config(dtype="evil")),
    Case("negative positions", "positive integer", make=config(max_position_embeddings=-1)),
    Case("dropout of all", "from 0 to below 1", make=config(attention_dropout=2)),
    Case("tied as text", "must be true or false", make=config(tie_word_embeddings="no")),
    Case("id as text", "must be a whole number", make=config(bos_token_id="x")),
    Case("pad beyond the rows", "has 640 rows", make=config(pad_token_id=9999)),
    Case("multi-modal", "is multi-modal", make=config(vision_config={})),
    Case("quantised already", "is quantized already", make=config(quantization_config={})),
    Case("own code", "wants its own code run", make=own_code),
    Case("experts", "no expert as Mixtral", make=tensors(h__0__mlp__experts=(8, 4, 4))),
    Case("Conv1D", "as GPT-2's", make=tensors(h__0__a__weight=(4, 12), h__0__a__bias=(12,))),
    Case("two stacks", "found 2", make=tensors(a__0__q__weight=(4, 4), b__0__q__weight=(4, 4))),
    Case("text of another", "is multi-modal", make=config(text_config={})),
    Case("window of nothing", "window is none", make=config(**NO_WINDOW)),
    Case("pickle .bin", "which can run code", make=pickled("pytorch_model.bin")),
    Case("pickle .pth", "which can run code", make=pickled("consolidated.pth")),
    Case("pickle .pt", "which can run code", make=pickled("model.pt")),
    Case("adapter for a model", "no safetensors weights", make=adapter_only),
    Case("pointer", "run git lfs pull", (), text(WEIGHTS, POINTER), INTEGRITY),
    Case("page", "is an HTML page", (), text(WEIGHTS, PAGE), INTEGRITY),
    Case(
        "last byte lost", "not fully covered", (), edited(WEIGHTS, lambda raw: raw[:-1]), INTEGRITY
    ),
    Case("header cut off", "are no safe", (), edited(WEIGHTS, lambda raw: raw[:100]), INTEGRITY),
    Case("empty file", "0 bytes are no safe", (), raw(WEIGHTS, b""), INTEGRITY),
    Case(
        "a byte too many",
        "not fully covered",
        (),
        edited(WEIGHTS, lambda raw: raw + b"\0"),
        INTEGRITY,
    ),
    Case("renamed tensor", "(model.norm.weight)", (), header(b"l.norm", b"l.mean"), INTEGRITY),
    Case("a tensor too many", "no part of this model type", (), one_more, INTEGRITY),
    Case("integers", "holds I32 tensors", make=header(b'"F32"', b'"I32"')),
    Case("eight bits", "holds F8_E4M3 tensors", make=entry(dtype="F8_E4M3", shape=[128])),
    Case("garbled header", "invalid", (), header(b'"F32"', b'"F32,'), INTEGRITY),
    Case("endless header", "are no safe", (), raw(WEIGHTS, b"\xff" * 64), INTEGRITY),
    Case("header of nothing", "found 0", (), raw(WEIGHTS, b"\2" + bytes(7) + b"{}")),
    Case("offsets with points", "are no safe", (), entry(data_offsets=[0.5, 9.5]), INTEGRITY),
    Case("no offsets", "invalid", (), entry(data_offsets="-"), INTEGRITY),
    Case("offsets as text", "invalid", (), entry(data_offsets="ab"), INTEGRITY),
    Case("negative size", "invalid", (), entry(shape=[-32]), INTEGRITY),
    Case("nested shape", "invalid", (), entry(shape=[[32]]), INTEGRITY),
    Case("dtype a list", "invalid", (), entry(dtype=["F32"]), INTEGRITY),
    Case("weights a directory", "no regular", (), in_place_of(WEIGHTS, os.mkdir), INTEGRITY),
    Case("weights a pipe", "no regular", (), in_place_of(WEIGHTS, os.mkfifo), INTEGRITY),
    Case("weights a link to itself", "no regular", (), in_place_of(WEIGHTS, loop), INTEGRITY),
    Case("tensors twice", "of another file", (), copy_shard, INTEGRITY),
    Case("index cut off", "no valid JSON", (), text(files.INDEX_NAME, "{"), INTEGRITY),
    Case("index a pointer", "git lfs", (), text(files.INDEX_NAME, POINTER), INTEGRITY),
    Case("index of nothing", "no weight_map", (), text(files.INDEX_NAME, "{}"), INTEGRITY),
    Case("shard lost", "and absent", (), index(x="b.safetensors"), INTEGRITY),
    Case("index of others", "not in the file", (), index(x="a.safetensors"), INTEGRITY),
    Case("index outside", "no plain file name", (), index(x="../a.safetensors"), INTEGRITY),
    Case("index absolute", "no plain file name", (), index(x="/etc/passwd"), INTEGRITY),
    Case("index of numbers", "no plain file name", (), index(x=7), INTEGRITY),
]
