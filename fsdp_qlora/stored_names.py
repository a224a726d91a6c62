"""Names of parameters in the files where transformers calls or shapes them otherwise.

transformers holds the experts of a layer in two 3-D parameters, `experts.gate_up_proj` and
`experts.down_proj`; files have a matrix for each projection of each expert. Mixtral's lie in
`block_sparse_moe` there, in `mlp` in the model; GPT-NeoX's head is `embed_out` there.

Source: transformers, src/transformers/conversion_mapping.py.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsdp_qlora.arch import ModelInfo

HEADS = ("lm_head.weight", "embed_out.weight")
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = {"gate_up_proj": (0, 1), "down_proj": (2,)}
FUSED_NAME = re.compile(r"(?P<layer>.+\.\d+)\..+\.experts\.(?P<fused>gate_up_proj|down_proj)")


def expert_part(name: str) -> tuple[str, int, int] | None:
    """Tell an expert's matrix by its name.

    Args:
        name: of a tensor inside a decoder layer.

    Returns:
        (path of the mixture, number of the expert, 0 for gate, 1 for up or 2 for down); None when
        it is something else.
    """
    match = EXPERT.fullmatch(name)
    for parts in EXPERT_PARTS:
        if match and match["part"] in parts:
            return match["block"], int(match["index"]), parts.index(match["part"])
    return None


def stored_name(info: "ModelInfo", name: str) -> str:
    """Name in the files.

    Args:
        info: the model.
        name: full name of a parameter that the built model has and that is not fused.
    """
    if name in HEADS:
        return next((head for head, _ in info.root_params if head in HEADS), name)
    stored = next((linear.expert[0] for linear in info.linears if linear.expert), "mlp")
    return name.replace(".mlp.", f".{stored}.")


def expert_matrices(info: "ModelInfo", name: str) -> list[list[str]]:
    """Names in the files of what a fused 3-D parameter holds.

    Args:
        info: the model.
        name: full name in the built model, "model.layers.0.mlp.experts.gate_up_proj".

    Returns:
        For each expert the matrices that lie one below the other; empty for another parameter.
    """
    match = FUSED_NAME.fullmatch(name)
    if match is None:
        return []
    wanted = FUSED[match["fused"]]
    parts = {linear.expert[1:]: linear.name for linear in info.linears if linear.expert}
    num = 1 + max((number for number, _ in parts), default=-1)
    return [[f"{match['layer']}.{parts[i, part]}.weight" for part in wanted] for i in range(num)]
