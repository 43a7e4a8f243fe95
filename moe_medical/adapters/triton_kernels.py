# mypy: ignore-errors
"""The kernels themselves; `kernels.py` launches them and says what they are for.

Tensors are contiguous unless strides are passed: y, grad (T, F); hidden (T, H); gate (T, E); B (E, F, RANK),
where hidden unit h of expert h // RANK has its column at h % RANK. Masks cover ragged edges of every size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    left, right, out, M, N, K,
    left_m, left_k, right_k, right_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out (M, N) = left (M, K) @ right (K, N) cast to left's dtype."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left_mask = (m[:, None] < M) & (k[None, :] < K)
        right_mask = (k[:, None] < K) & (n[None, :] < N)
        a = tl.load(left + m[:, None] * left_m + k[None, :] * left_k, mask=left_mask, other=0.0)
        b = tl.load(right + k[:, None] * right_k + n[None, :] * right_n, mask=right_mask, other=0.0)
        total += _dot(a, b.to(a.dtype), WIDE)
    out_mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=out_mask)


@triton.jit
def add_delta(
    y, hidden, gate, B, T, F, H, E, scale,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y += scale * (hidden * gate) B^T for one tile of y."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    delta = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        units = _gated(hidden, gate, t, h, T, H, E, scale, RANK)
        at = (h[:, None] // RANK).to(tl.int64) * F * RANK + f[None, :] * RANK + h[:, None] % RANK
        b = tl.load(B + at, mask=(h[:, None] < H) & (f[None, :] < F), other=0.0)
        delta += _dot(units, b.to(units.dtype), WIDE)
    at = t[:, None] * F + f[None, :]
    mask = (t[:, None] < T) & (f[None, :] < F)
    total = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def hidden_gradient(
    grad, hidden, gate, B, grad_hidden, grad_gate, T, F, H, E, scale,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of hidden units and of the gates of the BLOCK_H // RANK experts it holds."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    gated = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        g = tl.load(grad + t[:, None] * F + f[None, :], mask=(t[:, None] < T) & (f[None, :] < F), other=0.0)
        at = (h[None, :] // RANK).to(tl.int64) * F * RANK + f[:, None] * RANK + h[None, :] % RANK
        b = tl.load(B + at, mask=(f[:, None] < F) & (h[None, :] < H), other=0.0)
        gated += _dot(g, b.to(g.dtype), WIDE)
    gated *= scale
    at = t[:, None] * H + h[None, :]
    mask = (t[:, None] < T) & (h[None, :] < H)
    weight = tl.load(gate + t[:, None] * E + h[None, :] // RANK, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_hidden + at, (gated * weight).to(grad_hidden.dtype.element_ty), mask=mask)
    per_unit = gated * tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    of_expert = tl.sum(tl.reshape(per_unit, (BLOCK_T, BLOCK_H // RANK, RANK)), axis=2)
    e = tl.program_id(1) * (BLOCK_H // RANK) + tl.arange(0, BLOCK_H // RANK)
    tl.store(grad_gate + t[:, None] * E + e[None, :], of_expert, mask=(t[:, None] < T) & (e[None, :] < E))


@triton.jit
def b_gradient(
    grad, hidden, gate, grad_B, T, F, H, E, scale,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """grad_B = scale * grad^T (hidden * gate) for one tile."""
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_F, BLOCK_H), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        g = tl.load(grad + t[None, :] * F + f[:, None], mask=(f[:, None] < F) & (t[None, :] < T), other=0.0)
        total += _dot(g, _gated(hidden, gate, t, h, T, H, E, scale, RANK), WIDE)
    at = (h[None, :] // RANK).to(tl.int64) * F * RANK + f[:, None] * RANK + h[None, :] % RANK
    tl.store(grad_B + at, total.to(grad_B.dtype.element_ty), mask=(f[:, None] < F) & (h[None, :] < H))


@triton.jit
def _gated(hidden, gate, t, h, T, H, E, scale, RANK: tl.constexpr):
    """(tokens, units): scale * hidden * gate in the dtype of hidden, 0 outside."""
    mask = (t[:, None] < T) & (h[None, :] < H)
    units = tl.load(hidden + t[:, None] * H + h[None, :], mask=mask, other=0.0)
    weight = tl.load(gate + t[:, None] * E + h[None, :] // RANK, mask=mask, other=0.0).to(tl.float32)
    return (units.to(tl.float32) * (weight * scale)).to(units.dtype)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
