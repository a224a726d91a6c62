"""The weights of a base: as its files have them, or as training saw them; and LoRA matrices.

Shape letters: I in features, O out features, R LoRA rank.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from fsdp_qlora import atomic
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import TensorRef, read_json
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.export.adapter import Pair
from fsdp_qlora.model.layer import LayerCache, LayerStore, Layout, build_layout, store_linear
from fsdp_qlora.model.load import QuantizedCache, key
from fsdp_qlora.model.quantize import FORMATS, Fields
from fsdp_qlora.model.weights import DTYPES, Weights, read_file

Reader = Callable[[str], torch.Tensor]


def choose_device(name: str) -> torch.device:
    """Where to compute.

    Args:
        name: cpu, cuda, or auto: the GPU if there is one.

    Raises:
        UserError: there is no GPU (code 3).
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda", "there is no GPU here", "use --device cpu", ENVIRONMENT)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def linear_names(info: ModelInfo) -> set[str]:
    """Names of the weights that training quantises: the linears of all decoder layers."""
    return {
        f"{info.layers_prefix}.{index}.{linear.name}.weight"
        for index in range(info.num_layers)
        for linear in info.linears
    }


class TrainedBase:
    """Makes of a weight in the files what training computes with.

    Attributes:
        format_name: row of FORMATS that linears go through; None leaves every weight as stored.
        dtype: what they are dequantized to, and what all others are rounded to.
        cached: the quantized layers that training itself wrote, where they are still there.
        note: where the quantized bytes come from, in words.
    """

    def __init__(
        self, info: ModelInfo, format_name: str | None, dtype: torch.dtype, quant_cache: str
    ) -> None:
        """Look for the quantized layers of the model.

        Args:
            info: the base.
            format_name, dtype: see the class.
            quant_cache: auto, off or a directory, see train.py.
        """
        self.format_name, self.dtype = format_name, dtype
        self._linears = linear_names(info)
        self._order = {linear.name: index for index, linear in enumerate(info.linears)}
        self._prefix = f"{info.layers_prefix}."
        self.cached: QuantizedCache | None = None
        self.note = "quantised anew"
        self._layer = -1
        self._store: LayerStore | None = None
        if format_name is not None:
            shapes = [(linear.out_features, linear.in_features) for linear in info.linears]
            self._layout = build_layout(shapes, format_name)
            self.cached = find_cached(info, self._layout, quant_cache)
            self.note = f"from {self.cached.directory}" if self.cached else self.note
        self._stored = Weights(info) if info.quantized else None
        if self._stored is not None and format_name != info.stored_format:
            rule = f"is stored as {info.stored_format}, not {format_name or 'in 16 bit'}"
            raise UserError(str(info.path), rule, "use --base auto, or take the 16-bit original")

    def needs(self, name: str) -> bool:
        """Whether the weight in the files is needed to make what training saw of it."""
        return name not in self._linears or (self.cached is None and self._stored is None)

    def __call__(
        self, name: str, weight: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Round a weight as training did.

        Args:
            name: in the files.
            weight: as stored; None where it is not needed. Where it lies it is quantised (the
                GPU's kernels are the ones that training on GPUs used).
            device: of the result.

        Returns:
            The weight, in `dtype`; untouched without a format.

        Raises:
            UserError: a cached layer is damaged (code 5).
        """
        if weight is None and self._stored is not None:
            packed = self._stored.read_quantized([name], device)
            assert packed is not None
            return self._dequantized(next(packed), self._stored.info.tensors[name].shape, device)
        if weight is None:
            return self._from_cache(name, device)
        if self.format_name is None:
            return weight
        if name not in self._linears:
            return weight.to(self.dtype)
        fields = FORMATS[self.format_name].quantize(weight)
        return self._dequantized(fields, weight.shape, weight.device)

    def _dequantized(
        self, fields: Fields, shape: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        layout = build_layout([(shape[0], shape[1])], str(self.format_name))
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        store_linear(flat, layout, 0, fields)
        return LayerStore(lambda: flat, layout, LayerCache()).weight(0, self.dtype)

    def _from_cache(self, name: str, device: torch.device) -> torch.Tensor:
        number, _, rest = name.removeprefix(self._prefix).partition(".")
        if self._store is None or self._layer != int(number):
            assert self.cached is not None
            (packed,) = self.cached.read_layers([int(number)])
            flat = packed.to(device)
            self._layer = int(number)
            self._store = LayerStore(lambda: flat, self._layout, LayerCache())
        return self._store.weight(self._order[rest.removesuffix(".weight")], self.dtype)


def find_cached(info: ModelInfo, layout: Layout, quant_cache: str) -> QuantizedCache | None:
    """Find the quantized layers that a training run has left on this machine.

    Args:
        info: the base.
        layout: of a layer.
        quant_cache: auto, off or a directory, see train.py.

    Returns:
        The layers, verified as they are read; None when they are not there.

    Raises:
        UserError: what is there does not describe this model (code 5).
    """
    if quant_cache == "off" or layout.format_name == "bf16":
        return None
    usual = str(atomic.cache_dir())
    root = Path(usual if quant_cache == "auto" else quant_cache).expanduser()
    directory = root / key(info, layout)
    if not (directory / "manifest.json").exists():
        return None
    digests = read_json(directory / "manifest.json").get("sha256", [])
    if len(digests) != info.num_layers:
        rule = f"holds {len(digests)} layers, the model has {info.num_layers}"
        raise UserError(str(directory), rule, "delete it, or use --quant_cache off", INTEGRITY)
    return QuantizedCache(directory, "", layout.nbytes, True, dict(enumerate(digests)))


def read_from(
    info: ModelInfo,
    device: torch.device,
    rounding: TrainedBase | None = None,
    replaced: Mapping[str, TensorRef] = MappingProxyType({}),
) -> Reader:
    """Make a function that reads a weight by name.

    Args:
        info: with the places of its tensors.
        device: where they go.
        rounding: what becomes of them; None leaves them as stored.
        replaced: by name, what is read in place of them.

    Returns:
        Name -> weight.
    """
    source = Weights(info)

    def read(name: str) -> torch.Tensor:
        if name in replaced:
            return load(replaced[name], device)
        if rounding is not None and not rounding.needs(name):
            return rounding(name, None, device)
        (weight,) = source.read_ahead([name], device)
        return weight if rounding is None else rounding(name, weight, device)

    return read


def load_pair(pair: Pair, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the LoRA matrices of a linear.

    Args:
        pair: where they lie.
        device: where they go.

    Returns:
        a_RI and b_OR, float32.

    Raises:
        UserError: the file ends too early (code 5).
    """
    return load(pair.a, device), load(pair.b, device)


def add_pair(weight_OI: torch.Tensor, pair: Pair, device: torch.device) -> torch.Tensor:
    """Add LoRA matrices to a weight; of DoRA, give its rows their lengths then.

    Args:
        weight_OI: of the base.
        pair: of this linear.
        device: where it is computed.

    Returns:
        The sum, float32.
    """
    a_RI, b_OR = load_pair(pair, device)
    weight_OI = torch.addmm(weight_OI.float(), b_OR, a_RI, alpha=pair.scale)
    if pair.magnitude is not None:
        weight_OI *= (load(pair.magnitude, device) / weight_OI.norm(dim=1)).unsqueeze(1)
    return weight_OI


def load(ref: TensorRef, device: torch.device) -> torch.Tensor:
    """Read a tensor, float32."""
    raw = read_file(ref.file, ref.start, ref.nbytes)
    return raw.view(DTYPES[ref.dtype]).view(tuple(ref.shape)).to(device, torch.float32)
