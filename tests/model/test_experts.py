"""Experts over the 4-bit store: the kernel, adapters, files, against own arithmetic and peft."""

from unittest.mock import patch

import pytest
import torch

from fsdp_qlora.model import experts, quantize
from tests import tiny

ENDS = {"spread": (True, False), "joined": (False, True), "rows": (False, False)}
NUM, TOP, RANK, TOKENS = 6, 2, 3, 90


def matrices_of(shapes, format_name="nf4_dq") -> tuple[experts.ExpertMatrices, list]:
    """Matrices of NUM experts, each of several parts, in a store; and what they are there."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes for _ in range(NUM)]
    store, _ = tiny.quantized_store(format_name, weights)
    store.is_mixed = True
    parts = [tuple(range(i * NUM, i * NUM + NUM)) for i in range(len(shapes))]
    rounded = [tiny.dequantized(weight, format_name) for weight in weights]
    whole = [torch.cat([rounded[i] for i in row]) for row in zip(*parts, strict=True)]
    return experts.ExpertMatrices(store, parts, "mlp.experts"), whole


def by_hand(given, whole, routing, ends, bias, own):
    """Each row by the matrix of its expert; B is rank by rank."""
    x, a_RI, b_OR = given
    rows = x[routing.tokens] if ends[0] else x
    b_ORE = b_OR.view(b_OR.shape[0], RANK, NUM)
    pairs = [b_ORE[..., i] @ a_RI[i * RANK : i * RANK + RANK] for i in range(NUM)]
    matrix = [whole[int(routing.places[i])] + 0.5 * pairs[i] for i in range(NUM)]
    made = torch.stack([matrix[i] @ row + bias[i] for i, row in zip(own, rows, strict=True)])
    if not ends[1]:
        return made
    return torch.zeros(TOKENS, made.shape[1]).index_add(0, routing.tokens, made)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("shapes", [[(64, 256), (64, 256)], [(40, 72)]])
def test_all_paths_are_own_arithmetic_in_groups_of_experts(monkeypatch, shapes, name):
    """Sorted on the device, the kernel (by Triton's interpreter) and the loop; LoRA in any order.

    In NF4 with double quantization: matrices side by side in the store, and with gaps.
    """
    (matrices, whole), ends = matrices_of(shapes), ENDS[name]
    out, inner = matrices.out_features, matrices.in_features
    monkeypatch.setattr(experts, "WHOLE_LAYER_BYTES", 4 * 4 * out * inner)
    assert [row[:2] for row in matrices.weights(torch.float32)] == [(0, 3), (3, 6)]
    numbers = torch.tensor([0, 5, 1, 2, 4, 3])
    chosen = torch.stack([torch.randperm(NUM)[:TOP] for _ in range(TOKENS)])
    chosen[:40, 0] = 5  # more than a tile of one expert, and one that nobody chooses
    chosen[chosen == 2] = 5
    routing = experts.Routing(chosen, numbers, numbers.argsort())
    bias, pair = torch.randn(NUM, out), [torch.randn(RANK * NUM, inner), torch.randn(out, 3 * NUM)]
    x = torch.randn(TOKENS if ends[0] else TOKENS * TOP, inner)
    wanted = [t.clone().requires_grad_() for t in (x, *pair)]
    made = by_hand(wanted, whole, routing, ends, bias, chosen.flatten()[routing.order])
    grad = torch.randn_like(made)
    made.backward(grad)
    kernels = quantize.triton_kernels()
    call = experts.GroupedCall(matrices, routing, ends, 0.5)
    for path in [None, kernels] if kernels else [None]:
        given = [t.clone().requires_grad_() for t in (x, *pair)]
        with patch.object(experts, "_kernels", lambda x, path=path: path):
            found = experts.GroupedMatmul.apply(given[0], call, bias, *given[1:])
            found.backward(grad)
        assert torch.allclose(found, made, 1e-4, 1e-4), path
        for part, other in zip(given, wanted, strict=True):
            assert torch.allclose(part.grad, other.grad, 1e-4, 1e-4), path
