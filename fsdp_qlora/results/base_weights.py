"""The weights of a base: as its files have them, or as training saw them; and LoRA matrices.

Shape letters: I in features, O out features, R LoRA rank.
"""

from collections.abc import Callable

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.model.layout import build_layout, pack_linear
from fsdp_qlora.model.packed import LayerCache, LayerStore
from fsdp_qlora.model.weights import DTYPES, Weights, read_file
from fsdp_qlora.results.adapter_files import Pair
from fsdp_qlora.weights_files import TensorRef

Reader = Callable[[str], torch.Tensor]


def choose_device(name: str) -> torch.device:
    """Where to compute.

    Args:
        name: cpu, cuda, or auto: the card if there is one.

    Raises:
        UserError: there is no card (code 3).
    """
    has_card = torch.cuda.is_available()
    if name == "cuda" and not has_card:
        raise UserError("--device cuda", "there is no card here", "use --device cpu", ENVIRONMENT)
    return torch.device("cuda" if has_card and name != "cpu" else "cpu")


def linear_names(info: ModelInfo) -> set[str]:
    """Names of the weights that training quantises: the linears of all decoder layers."""
    return {
        f"{info.layers_prefix}.{index}.{linear.name}.weight"
        for index in range(info.num_layers)
        for linear in info.linears
    }


class AsTrained:
    """Makes of a weight in the files what training computes with.

    Attributes:
        format_name: row of FORMATS that linears go through; None leaves every weight as stored.
        dtype: what they are unpacked to, and what all others are rounded to.
    """

    def __init__(self, info: ModelInfo, format_name: str | None, dtype: torch.dtype) -> None:
        self.format_name, self.dtype = format_name, dtype
        self._linears = linear_names(info)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Round a weight as training did.

        Args:
            name: in the files.
            weight: as stored; where it lies it is quantised (the card's kernels are the ones that
                training on cards used).

        Returns:
            The weight, in `dtype`; untouched without a format.
        """
        if self.format_name is None:
            return weight
        if name not in self._linears:
            return weight.to(self.dtype)
        layout = build_layout([(weight.shape[0], weight.shape[1])], self.format_name)
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=weight.device)
        pack_linear(flat, layout, 0, weight)
        return LayerStore(lambda: flat, layout, LayerCache()).weight(0, self.dtype)


def read_from(info: ModelInfo, device: torch.device, rounding: AsTrained | None = None) -> Reader:
    """Make a function that reads a weight by name.

    Args:
        info: with the places of its tensors.
        device: where they go.
        rounding: what becomes of them; None leaves them as stored.

    Returns:
        Name -> weight.
    """
    source = Weights(info)

    def read(name: str) -> torch.Tensor:
        (weight,) = source.read_ahead([name], device)
        return weight if rounding is None else rounding(name, weight)

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
    return _read(pair.a, device), _read(pair.b, device)


def _read(ref: TensorRef, device: torch.device) -> torch.Tensor:
    raw = torch.empty(ref.nbytes, dtype=torch.uint8)
    read_file(ref.file, ref.start, raw)
    return raw.view(DTYPES[ref.dtype]).view(tuple(ref.shape)).to(device, torch.float32)
