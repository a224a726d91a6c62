"""Experts over the 4-bit store: the kernel, adapters, files, against own arithmetic and peft."""

from unittest.mock import patch

import torch

from fsdp_qlora.model import experts, quantize
from tests import tiny

ENDS = {"spread": (True, False), "joined": (False, True), "rows": (False, False)}


def matrices_of(num: int, shapes, format_name="nf4_dq") -> tuple[experts.ExpertMatrices, list]:
    """Matrices of `num` experts, each of several parts, in a store; and what they are there."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes for _ in range(num)]
    store, _ = tiny.quantized_store(format_name, weights)
    store.is_mixed = True
    parts = [tuple(range(i * num, i * num + num)) for i in range(len(shapes))]
    rounded = [tiny.dequantized(weight, format_name) for weight in weights]
    whole = [torch.cat([rounded[i] for i in row]) for row in zip(*parts, strict=True)]
    return experts.ExpertMatrices(store, parts, "mlp.experts"), whole


def test_all_paths_are_own_arithmetic_in_groups_of_experts(monkeypatch):
    """Sorted on the device, the kernel (by Triton's interpreter) and the loop; LoRA in any order.

    In NF4 with double quantization: matrices side by side in the store, and with gaps.
    """
    num, top, rank = 6, 2, 3
    paths = [None]
    if quantize.triton_kernels() is not None:
        paths.append(quantize.triton_kernels())
    for shapes in ([(64, 256), (64, 256)], [(40, 72)]):
        matrices, whole = matrices_of(num, shapes)
        out, inner = matrices.out_features, matrices.in_features
        monkeypatch.setattr(experts, "WHOLE_LAYER_BYTES", 4 * 4 * out * inner)
        assert [row[:2] for row in matrices.weights(torch.float32)] == [(0, 3), (3, 6)]
        numbers = torch.tensor([0, 5, 1, 2, 4, 3])
        chosen = torch.stack([torch.randperm(num)[:top] for _ in range(90)])
        chosen[:40, 0] = 5  # more than a tile of one expert, and one that nobody chooses
        chosen[chosen == 2] = 5
        bias, a_RI = torch.randn(num, out), torch.randn(rank * num, inner)
        b_OR = torch.randn(out, rank * num)
        for name, ends in ENDS.items():
            routing = experts.Routing(chosen, numbers, numbers.argsort())
            x = torch.randn(90 if ends[0] else 180, inner)
            tokens, own = routing.order // top, chosen.flatten()[routing.order]
            wanted = [t.clone().requires_grad_() for t in (x, a_RI, b_OR)]
            rows = wanted[0][tokens] if ends[0] else wanted[0]
            pairs = [
                wanted[2].view(out, rank, num)[..., i] @ wanted[1][i * rank : i * rank + rank]
                for i in range(num)
            ]
            matrix = [whole[int(numbers.argsort()[i])] + 0.5 * pairs[i] for i in range(num)]
            made = torch.stack(
                [matrix[i] @ row + bias[i] for i, row in zip(own, rows, strict=False)]
            )
            if ends[1]:
                made = torch.zeros(90, out).index_add(0, tokens, made)
            grad = torch.randn_like(made)
            made.backward(grad)
            for kernels in paths:
                given = [t.clone().requires_grad_() for t in (x, a_RI, b_OR)]
                with patch.object(experts, "_kernels", lambda x, found=kernels: found):
                    call = experts.GroupedCall(matrices, routing, ends, 0.5)
                    found = experts.GroupedMatmul.apply(given[0], call, bias, *given[1:])
                    found.backward(grad)
                rows = [
                    (found, made),
                    *((a.grad, b.grad) for a, b in zip(given, wanted, strict=False)),
                ]
                for part, other in rows:
                    assert torch.allclose(part, other, 1e-4, 1e-4), (name, kernels)
