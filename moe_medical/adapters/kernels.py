"""The concat path by Triton kernels, on a GPU: gates, scale and weight casts are fused into the GEMMs' loads.

    hidden = x A^T                            A is cast on load
    y = y + scale * (hidden * gate) B^T       no (T, H) product in memory; B (E, F, rank) is read as it lies
    grad_hidden, grad_gate                    both from the accumulator of grad_y B
    grad_B = scale * grad_y^T (hidden * gate) written as (E, F, rank)
    grad_A = grad_hidden^T x,  grad_x = grad_hidden A

The oracle is `concat.py`: the same numbers up to the order of sums and, below float32, one rounding less.
Accumulators are float32; float32 inputs are multiplied in full precision. A program sums its tile alone,
without atomics: results are deterministic.

Not measured on a GPU: the block sizes are plausible ones. A tile of hidden units holds whole experts, so that
one program owns each gate's gradient; hence `available` wants a rank that is a power of two, at most 128.

The kernels are compiled when first used, since Triton is no dependency on CPU. With TRITON_INTERPRET=1 set
before that they run on CPU tensors in Triton's interpreter, which needs no driver: so they are tested. It
multiplies bfloat16 tiles as if their bits were integers, so WIDE turns them into float32 there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_medical.adapters.paths import GatedLora, Gradients, Wanted, spread_gate

MAX_RANK = 128
_FEATURES_BLOCK = 64
_TOKENS_BLOCK = 64
_HIDDEN_BLOCK = 64


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device_type: str, rank: int) -> bool:
    """Whether the kernels can run on such a device with experts of that rank."""
    on_device = device_type == "cuda" or (device_type == "cpu" and interpreted())
    fits = rank & (rank - 1) == 0 and rank <= MAX_RANK
    return on_device and fits and importlib.util.find_spec("triton") is not None


def add(y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """See `Path`; needs `available`. Kept are all hidden units, and the ids."""
    assert ids_TK is not None, "a plain LoRA goes the concat path"
    assert lora.gate is not None, "a plain LoRA goes the concat path"
    hidden_TH = hidden_units(x_TD, lora.lora_A)
    gate_TE = spread_gate(lora.gate, ids_TK, lora.num_experts)
    # The kernels read B as (E, F, rank) lies; `model.lay_out_for_answers` may have laid it out otherwise.
    add_delta(y_TF, hidden_TH, gate_TE, lora.lora_B.contiguous(), lora.scale)
    return (hidden_TH, ids_TK) if keep else ()


def gradients(
    grad_TF: Tensor, x_TD: Tensor | None, lora: GatedLora, kept: Sequence[Tensor], wanted: Wanted
) -> Gradients:
    """See `Path`; as `concat.gradients`, with a kernel for each product."""
    assert lora.gate is not None, "a plain LoRA goes the concat path"
    hidden_TH, ids_TK = kept
    grad_TF = grad_TF.contiguous()
    lora_B = lora.lora_B.contiguous()
    gate_TE = spread_gate(lora.gate, ids_TK, lora.num_experts)
    grad_hidden_TH, grad_gate_TE = hidden_gradient(grad_TF, hidden_TH, gate_TE, lora_B, lora.scale)
    grad_A = grad_B = grad_x = None
    if x_TD is not None:
        grad_A = a_gradient(grad_hidden_TH, x_TD, lora.lora_A)
        grad_B = b_gradient(grad_TF, hidden_TH, gate_TE, lora_B, lora.scale)
        del x_TD  # a copy of the layer's input, where there is dropout
    yield grad_A, grad_B
    if wanted.x_shape is not None:
        grad_x = input_gradient(grad_hidden_TH, lora.lora_A).view(wanted.x_shape)
    yield grad_gate_TE.gather(1, ids_TK).to(lora.gate.dtype), grad_x


def hidden_units(x_TD: Tensor, lora_A: Tensor) -> Tensor:
    """x A^T: (T, H) in the dtype of x."""
    A_HD = lora_A.view(-1, lora_A.shape[-1])
    # A is read as its transpose by swapping its strides: nothing is copied.
    return _product(x_TD, A_HD, (x_TD.shape[0], A_HD.shape[0]), right_strides=(1, A_HD.stride(0)))


def input_gradient(grad_hidden_TH: Tensor, lora_A: Tensor) -> Tensor:
    """grad_hidden A: (T, D) in the dtype of grad_hidden."""
    A_HD = lora_A.view(-1, lora_A.shape[-1])
    return _product(grad_hidden_TH, A_HD, (len(grad_hidden_TH), A_HD.shape[1]), right_strides=A_HD.stride())


def a_gradient(grad_hidden_TH: Tensor, x_TD: Tensor, lora_A: Tensor) -> Tensor:
    """grad_hidden^T x in the shape and dtype of A."""
    shape = (grad_hidden_TH.shape[1], x_TD.shape[1])
    grad_HD = _product(grad_hidden_TH.t(), x_TD, shape, right_strides=x_TD.stride(), dtype=lora_A.dtype)
    return grad_HD.view(lora_A.shape)


def add_delta(y_TF: Tensor, hidden_TH: Tensor, gate_TE: Tensor, lora_B: Tensor, scale: float) -> None:
    """y += scale * (hidden * gate) B^T, in place; all but the gate are contiguous."""
    (tokens, features) = y_TF.shape
    (experts, _, rank) = lora_B.shape
    grid = (_blocks(tokens, _TOKENS_BLOCK), _blocks(features, _FEATURES_BLOCK))
    sizes = (tokens, features, experts * rank, experts, scale)
    _kernels().add_delta[grid](y_TF, hidden_TH, gate_TE.contiguous(), lora_B, *sizes, **_constants(rank))


def hidden_gradient(
    grad_TF: Tensor, hidden_TH: Tensor, gate_TE: Tensor, lora_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(T, H) gradient of the hidden units in the dtype of grad_TF, (T, E) float32 gradient of the gate."""
    (tokens, features) = grad_TF.shape
    (experts, _, rank) = lora_B.shape
    grad_hidden_TH = torch.empty_like(hidden_TH)
    grad_gate_TE = torch.empty(tokens, experts, dtype=torch.float32, device=grad_TF.device)
    constants = _constants(rank)
    # BLOCK_H is a multiple of the rank: a program holds whole experts, and no two add to one gate's gradient.
    grid = (_blocks(tokens, _TOKENS_BLOCK), _blocks(experts * rank, constants["BLOCK_H"]))
    tensors = (grad_TF, hidden_TH, gate_TE.contiguous(), lora_B, grad_hidden_TH, grad_gate_TE)
    sizes = (tokens, features, experts * rank, experts, scale)
    _kernels().hidden_gradient[grid](*tensors, *sizes, **constants)
    return grad_hidden_TH, grad_gate_TE


def b_gradient(grad_TF: Tensor, hidden_TH: Tensor, gate_TE: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """scale * grad_y^T (hidden * gate) in the shape and dtype of B."""
    (tokens, features) = grad_TF.shape
    (experts, _, rank) = lora_B.shape
    grad_B = torch.empty_like(lora_B)
    constants = _constants(rank)
    grid = (_blocks(features, _FEATURES_BLOCK), _blocks(experts * rank, constants["BLOCK_H"]))
    sizes = (tokens, features, experts * rank, experts, scale)
    _kernels().b_gradient[grid](grad_TF, hidden_TH, gate_TE.contiguous(), grad_B, *sizes, **constants)
    return grad_B


def _product(
    left: Tensor,
    right: Tensor,
    shape: tuple[int, int],
    right_strides: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """left (M, K) times right, read with these strides as (K, N) and cast to the dtype of left."""
    out = torch.empty(shape, dtype=dtype or left.dtype, device=left.device)
    grid = (_blocks(shape[0], _TOKENS_BLOCK), _blocks(shape[1], _FEATURES_BLOCK))
    sizes = (*shape, left.shape[1])
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    strides = (*left.stride(), *right_strides)
    _kernels().product[grid](left, right, out, *sizes, *strides, WIDE=interpreted(), **blocks)
    return out


def _constants(rank: int) -> dict[str, Any]:
    blocks = {"BLOCK_T": _TOKENS_BLOCK, "BLOCK_F": _FEATURES_BLOCK, "BLOCK_H": max(_HIDDEN_BLOCK, rank)}
    return {"RANK": rank, "WIDE": interpreted(), **blocks}


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _kernels() -> Any:
    from moe_medical.adapters import triton_kernels  # needs Triton

    return triton_kernels
